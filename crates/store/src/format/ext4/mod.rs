//! Writes an ext4 file system with a tree of files, without a kernel, without root, and the same bytes for the same input.
//!
//! `mke2fs -d` takes owners from the host's files, so that an ordinary user has to go through fakeroot or user namespaces to keep
//! them, and reads archives only since e2fsprogs 1.47.1; docs/image-formats.md says what else was looked at.
//!
//! Files come one after the other and their content goes straight to the target. Directories, inodes and bitmaps are in memory
//! until the end. What always holds:
//! - A path never leaves the tree, and nothing in it is followed.
//! - Memory: at most [`ENTRIES_MAX`] inodes of about 200 bytes, [`NAMES_MAX`] names of at most 255, 4 KiB for each 128 MiB of the disk in use,
//!   [`XATTR_CACHE_LEN_MAX`] of attributes, 1 MiB of content.
//! - Nothing is written beyond the disk; when it is full, that is the error.
//!
//! The file system has blocks of 4 KiB, inodes of 256 bytes, extents, checksums of all metadata, and an empty journal unless it is
//! small. What was never written of the target has to read as zeros.
//!
//! Modules: `layout` (where things lie), `blocks` (which are taken), `tree` (names), `inode`, `extent`, `directory`, `xattr`,
//! `superblock`, `write_out` (everything that is written at the end), `checksum`.

mod blocks;
mod checksum;
mod directory;
mod extent;
mod inode;
mod layout;
mod superblock;
mod tree;
mod write_out;
mod xattr;

use super::error::printable;
use super::{FormatError, Target};
use blocks::{Blocks, Run};
use extent::{EXTENT_BLOCKS_MAX, Extent};
pub use inode::{Attributes, Time};
use inode::{Inode, Kind};
use layout::{BLOCK_LEN, Layout};
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use superblock::FIRST_INODE;
use tree::{Directory, NodeIndex};
pub use write_out::Ext4Summary;
use xattr::XattrBlock;

/// Inodes that are written, at most.
pub const ENTRIES_MAX: usize = 2 << 20;
/// Names in all directories together, at most: a file may have several.
pub const NAMES_MAX: u64 = 4 << 20;
/// Bytes of extended attributes that are kept to be shared; further ones get a block each.
pub const XATTR_CACHE_LEN_MAX: usize = 16 << 20;
/// Content is written in pieces of this many bytes.
const WRITE_LEN: usize = 1 << 20;
/// A symbolic link's text that lies in the inode is shorter than this.
const FAST_SYMLINK_LEN: usize = 60;
/// Names of one file, at most, as in the kernel.
const LINKS_MAX: u32 = 65_000;
/// The number of the root directory.
const ROOT: NodeIndex = 0;
/// The number of lost+found.
const LOST_AND_FOUND: NodeIndex = 1;

/// What a file system is made with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ext4Options {
    /// Its UUID, which also seeds its checksums and hashes.
    pub uuid: [u8; 16],
    /// Its name, at most 16 bytes.
    pub label: Vec<u8>,
    /// When it was made, seconds since 1970; also the time of directories that nothing describes.
    pub time_s: u32,
    /// One inode is there for so many bytes of the disk.
    pub bytes_per_inode: u64,
}

impl Default for Ext4Options {
    fn default() -> Self {
        Ext4Options { uuid: [0x70; 16], label: Vec::new(), time_s: 0, bytes_per_inode: 16 << 10 }
    }
}

/// What a path becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry<'a> {
    /// A directory.
    Directory,
    /// A file of so many bytes, whose content [`Ext4Writer::write`] brings; what it does not bring is a hole.
    File {
        /// Bytes.
        len: u64,
    },
    /// A symbolic link.
    Symlink {
        /// Its text, which nobody looks at.
        text: &'a [u8],
    },
    /// Another name of something that is there already and is no directory.
    HardLink {
        /// The path of that.
        target: &'a [u8],
    },
    /// A character device.
    Character {
        /// Driver.
        major: u32,
        /// Device.
        minor: u32,
    },
    /// A block device.
    Block {
        /// Driver.
        major: u32,
        /// Device.
        minor: u32,
    },
    /// A named pipe.
    Fifo,
    /// A Unix socket.
    Socket,
}

/// A file that content is written to.
#[derive(Debug)]
struct OpenFile {
    node: NodeIndex,
    /// Where `buffer` begins in the file: whole blocks.
    start: u64,
    buffer: Vec<u8>,
}

/// A file system that is being written.
pub struct Ext4Writer<'a> {
    target: &'a mut dyn Target,
    /// For errors: what the entries come from.
    origin: String,
    options: Ext4Options,
    layout: Layout,
    blocks: Blocks,
    seed: u32,
    nodes: Vec<Inode>,
    directories: HashMap<NodeIndex, Directory>,
    names: u64,
    open: Option<OpenFile>,
    /// Blocks of extended attributes that may be shared, by place, each with its sharers; and where more may join.
    shared_xattrs: BTreeMap<u64, (Arc<XattrBlock>, u32)>,
    joinable_xattrs: HashMap<Arc<XattrBlock>, u64>,
    journal: Vec<Extent>,
}

impl<'a> Ext4Writer<'a> {
    /// Begins a file system that fills `target`; `origin` says in errors what its files come from.
    pub fn new(target: &'a mut dyn Target, origin: &str, options: Ext4Options) -> Result<Self, FormatError> {
        let layout = Layout::new(target.len(), options.bytes_per_inode)?;
        let blocks = Blocks::new(&layout);
        let seed = checksum::crc32c(!0, &options.uuid);
        let mut writer = Ext4Writer {
            target,
            origin: origin.to_owned(),
            layout,
            blocks,
            seed,
            nodes: Vec::new(),
            directories: HashMap::new(),
            names: 0,
            open: None,
            shared_xattrs: BTreeMap::new(),
            joinable_xattrs: HashMap::new(),
            journal: Vec::new(),
            options,
        };
        writer.place_journal()?;
        for (index, permissions) in [(ROOT, 0o755), (LOST_AND_FOUND, 0o700)] {
            let made = writer.implied_directory(permissions);
            writer.nodes.push(made);
            writer.directories.insert(index, Directory { parent: ROOT, entries: BTreeMap::new() });
        }
        writer.attach(ROOT, b"lost+found", LOST_AND_FOUND)?;
        Ok(writer)
    }

    fn place_journal(&mut self) -> Result<(), FormatError> {
        let wanted = self.layout.journal_blocks;
        let mut taken = 0;
        while taken < wanted {
            let run = self.blocks.take(wanted - taken).ok_or_else(|| self.full())?;
            extent::push(&mut self.journal, Extent { logical: taken as u32, start: run.start, len: run.len });
            taken += run.len;
        }
        match self.journal.first().map(|first| first.start) {
            Some(first) => self.write_blocks(first, &superblock::empty_journal(wanted, self.options.uuid)),
            None => Ok(()),
        }
    }

    /// A directory that nothing describes: root's.
    fn implied_directory(&self, permissions: u16) -> Inode {
        let time = Time { seconds: i64::from(self.options.time_s), nanoseconds: 0 };
        let attributes = Attributes { permissions, modified: time, ..Attributes::default() };
        Self::inode(Kind::Directory, &attributes)
    }

    fn inode(kind: Kind, attributes: &Attributes) -> Inode {
        Inode {
            kind,
            permissions: attributes.permissions,
            user: attributes.user,
            group: attributes.group,
            modified: attributes.modified,
            accessed: attributes.accessed.unwrap_or(attributes.modified),
            changed: attributes.changed.unwrap_or(attributes.modified),
            len: 0,
            links: 0,
            extents: Vec::new(),
            text: Box::default(),
            xattr_block: 0,
        }
    }

    fn wrong(&self, path: &[u8], problem: impl Into<String>) -> FormatError {
        FormatError::malformed(&self.origin, format!("entry {}", printable(path)), problem)
    }

    fn full(&self) -> FormatError {
        FormatError::TargetFull { target_len: self.target.len(), what: "blocks" }
    }

    /// Adds an entry, or replaces what has its path; directories above it that are missing are made. Leading slashes and `.` mean
    /// nothing: the tree's root is the root.
    pub fn add(&mut self, path: &[u8], attributes: &Attributes, entry: Entry<'_>) -> Result<(), FormatError> {
        self.close_file()?;
        let wrong = |writer: &Self, problem: String| writer.wrong(path, problem);
        let parts = tree::components(path).map_err(|problem| wrong(self, problem))?;
        let Some((name, above)) = parts.split_last() else {
            if entry != Entry::Directory {
                return Err(self.wrong(path, "it would take the place of the root directory"));
            }
            return self.describe(ROOT, path, attributes);
        };
        let kind = match entry {
            Entry::HardLink { target } => {
                let node = self.find(target).map_err(|problem| wrong(self, format!("its target: {problem}")))?;
                let parent = self.parent(path, above)?;
                return self.add_link(path, parent, name, node);
            }
            Entry::Directory => Kind::Directory,
            Entry::File { .. } => Kind::File,
            Entry::Symlink { text } if text.is_empty() || text.len() as u64 >= BLOCK_LEN || text.contains(&0) => {
                return Err(self.wrong(path, format!("a symbolic link cannot have {} bytes of text", text.len())));
            }
            Entry::Symlink { .. } => Kind::Symlink,
            Entry::Character { major, minor } | Entry::Block { major, minor }
                if major >= 1 << 12 || minor >= 1 << 20 =>
            {
                return Err(self.wrong(path, format!("there is no device {major}:{minor}")));
            }
            Entry::Character { major, minor } => Kind::Character { major, minor },
            Entry::Block { major, minor } => Kind::Block { major, minor },
            Entry::Fifo => Kind::Fifo,
            Entry::Socket => Kind::Socket,
        };
        let parent = self.parent(path, above)?;
        let present = self.directories[&parent].entries.get(*name).copied();
        if let Some(present) = present {
            if kind == Kind::Directory && self.nodes[present as usize].kind == Kind::Directory {
                return self.describe(present, path, attributes);
            }
            self.detach(path, parent, name, present)?;
        }
        let node = self.new_node(Self::inode(kind, attributes))?;
        self.attach(parent, name, node)?;
        self.describe(node, path, attributes)?;
        match entry {
            Entry::Directory => {
                self.directories.insert(node, Directory { parent, entries: BTreeMap::new() });
            }
            Entry::Symlink { text } => self.set_text(node, text)?,
            Entry::File { len } => {
                if len.div_ceil(BLOCK_LEN) >= u64::from(u32::MAX) {
                    return Err(self.wrong(path, format!("a file cannot have {len} bytes")));
                }
                self.nodes[node as usize].len = len;
                self.open = Some(OpenFile { node, start: 0, buffer: Vec::new() });
            }
            _ => {}
        }
        Ok(())
    }

    fn new_node(&mut self, inode: Inode) -> Result<NodeIndex, FormatError> {
        if self.nodes.len() >= ENTRIES_MAX {
            let (what, limit) = ("the number of entries", ENTRIES_MAX as u64);
            return Err(FormatError::TooLarge { file: self.origin.clone(), what, value: limit + 1, limit });
        }
        if self.nodes.len() as u64 + u64::from(FIRST_INODE) > self.layout.inodes() {
            return Err(FormatError::TargetFull { target_len: self.target.len(), what: "inodes" });
        }
        self.nodes.push(inode);
        Ok(self.nodes.len() as NodeIndex - 1)
    }

    fn attach(&mut self, parent: NodeIndex, name: &[u8], node: NodeIndex) -> Result<(), FormatError> {
        self.names += 1;
        if self.names > NAMES_MAX {
            let (what, value) = ("the number of names", self.names);
            return Err(FormatError::TooLarge { file: self.origin.clone(), what, value, limit: NAMES_MAX });
        }
        let directory = self.directories.get_mut(&parent).expect("a parent is a directory");
        directory.entries.insert(name.into(), node);
        self.nodes[node as usize].links += 1;
        Ok(())
    }

    /// Takes away what has a name, so that something else can have it.
    fn detach(&mut self, path: &[u8], parent: NodeIndex, name: &[u8], node: NodeIndex) -> Result<(), FormatError> {
        if node == LOST_AND_FOUND {
            return Err(self.wrong(path, "it would take the place of lost+found"));
        }
        if let Some(directory) = self.directories.get(&node) {
            if !directory.entries.is_empty() {
                return Err(self.wrong(path, "it would take the place of a directory that is not empty"));
            }
            self.directories.remove(&node);
        }
        self.directories.get_mut(&parent).expect("a parent is a directory").entries.remove(name);
        self.names -= 1;
        let inode = &mut self.nodes[node as usize];
        inode.links -= 1;
        if inode.links == 0 {
            for extent in std::mem::take(&mut inode.extents) {
                self.blocks.give_back(Run { start: extent.start, len: extent.len });
            }
            self.drop_xattrs(node);
        }
        Ok(())
    }

    fn add_link(&mut self, path: &[u8], parent: NodeIndex, name: &[u8], node: NodeIndex) -> Result<(), FormatError> {
        if self.nodes[node as usize].kind == Kind::Directory {
            return Err(self.wrong(path, "it is a hard link to a directory"));
        }
        match self.directories[&parent].entries.get(name).copied() {
            // A link to itself.
            Some(present) if present == node => return Ok(()),
            Some(present) => self.detach(path, parent, name, present)?,
            None => {}
        }
        if self.nodes[node as usize].links >= LINKS_MAX {
            return Err(self.wrong(path, format!("its target has {LINKS_MAX} names already")));
        }
        self.attach(parent, name, node)
    }

    /// The inode of a path that is there.
    fn find(&self, path: &[u8]) -> Result<NodeIndex, String> {
        let mut node = ROOT;
        let mut last: &[u8] = b"/";
        for part in tree::components(path)? {
            let Some(directory) = self.directories.get(&node) else {
                return Err(tree::not_a_directory(last, self.nodes[node as usize].kind));
            };
            node = *directory
                .entries
                .get(part)
                .ok_or_else(|| format!("there is nothing named {} yet", printable(path)))?;
            last = part;
        }
        Ok(node)
    }

    /// The directory of a path's upper part, made where it is missing.
    fn parent(&mut self, path: &[u8], above: &[&[u8]]) -> Result<NodeIndex, FormatError> {
        let mut node = ROOT;
        for part in above {
            node = match self.directories[&node].entries.get(*part).copied() {
                Some(next) if self.directories.contains_key(&next) => next,
                Some(next) => {
                    return Err(self.wrong(path, tree::not_a_directory(part, self.nodes[next as usize].kind)));
                }
                None => {
                    let made = self.new_node(self.implied_directory(0o755))?;
                    self.attach(node, part, made)?;
                    self.directories.insert(made, Directory { parent: node, entries: BTreeMap::new() });
                    made
                }
            };
        }
        Ok(node)
    }

    /// Gives attributes to an inode.
    fn describe(&mut self, node: NodeIndex, path: &[u8], attributes: &Attributes) -> Result<(), FormatError> {
        let new = Self::inode(self.nodes[node as usize].kind, attributes);
        let inode = &mut self.nodes[node as usize];
        (inode.permissions, inode.user, inode.group) = (new.permissions, new.user, new.group);
        (inode.modified, inode.accessed, inode.changed) = (new.modified, new.accessed, new.changed);
        self.drop_xattrs(node);
        if !attributes.xattrs.is_empty() {
            let block = XattrBlock::new(&attributes.xattrs).map_err(|problem| self.wrong(path, problem))?;
            self.nodes[node as usize].xattr_block = self.place_xattrs(block)?;
        }
        Ok(())
    }

    fn place_xattrs(&mut self, block: XattrBlock) -> Result<u64, FormatError> {
        if let Some(place) = self.joinable_xattrs.get(&block).copied() {
            let (_, sharers) = self.shared_xattrs.get_mut(&place).expect("what can be joined is shared");
            *sharers += 1;
            if *sharers == xattr::SHARERS_MAX {
                self.joinable_xattrs.remove(&block);
            }
            return Ok(place);
        }
        let place = self.take_block()?;
        if (self.shared_xattrs.len() + 1) * BLOCK_LEN as usize > XATTR_CACHE_LEN_MAX {
            self.write_blocks(place, &block.bytes(place, 1, self.seed))?;
        } else {
            let block = Arc::new(block);
            self.shared_xattrs.insert(place, (block.clone(), 1));
            self.joinable_xattrs.insert(block, place);
        }
        Ok(place)
    }

    fn drop_xattrs(&mut self, node: NodeIndex) {
        let place = std::mem::take(&mut self.nodes[node as usize].xattr_block);
        if place == 0 {
            return;
        }
        if let Some((block, sharers)) = self.shared_xattrs.get_mut(&place) {
            *sharers -= 1;
            if *sharers > 0 {
                return;
            }
            if self.joinable_xattrs.get(block) == Some(&place) {
                self.joinable_xattrs.remove(block);
            }
            self.shared_xattrs.remove(&place);
        }
        self.blocks.give_back(Run { start: place, len: 1 });
    }

    fn set_text(&mut self, node: NodeIndex, text: &[u8]) -> Result<(), FormatError> {
        self.nodes[node as usize].len = text.len() as u64;
        if text.len() < FAST_SYMLINK_LEN {
            self.nodes[node as usize].text = text.into();
            return Ok(());
        }
        let place = self.take_block()?;
        let mut block = text.to_vec();
        block.resize(BLOCK_LEN as usize, 0);
        self.nodes[node as usize].extents.push(Extent { logical: 0, start: place, len: 1 });
        self.write_blocks(place, &block)
    }

    fn take_block(&mut self) -> Result<u64, FormatError> {
        self.blocks.take(1).map(|run| run.start).ok_or_else(|| self.full())
    }

    fn write_blocks(&mut self, first: u64, bytes: &[u8]) -> Result<(), FormatError> {
        self.target.write_at(first * BLOCK_LEN, bytes)
    }

    /// Writes content of the file that was added last, in ascending order.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), FormatError> {
        let file = self.open.as_mut().expect("content comes behind its file");
        let end = file.start + file.buffer.len() as u64;
        assert!(offset >= end && offset + bytes.len() as u64 <= self.nodes[file.node as usize].len, "content in order");
        if offset > end && offset >= end.next_multiple_of(BLOCK_LEN) {
            // A hole: what lies before it is whole.
            self.flush_file(FlushTo::End)?;
            let file = self.open.as_mut().expect("flushing leaves it open");
            file.start = offset & !(BLOCK_LEN - 1);
        }
        let mut rest = bytes;
        while !rest.is_empty() {
            let file = self.open.as_mut().expect("flushing leaves it open");
            let gap = (offset + (bytes.len() - rest.len()) as u64 - file.start) as usize;
            file.buffer.resize(gap, 0);
            let taken = rest.len().min(WRITE_LEN.saturating_sub(gap).max(1));
            file.buffer.extend_from_slice(&rest[..taken]);
            rest = &rest[taken..];
            if file.buffer.len() >= WRITE_LEN {
                self.flush_file(FlushTo::WholeBlock)?;
            }
        }
        Ok(())
    }

    fn flush_file(&mut self, to: FlushTo) -> Result<(), FormatError> {
        let Some(mut file) = self.open.take() else { return Ok(()) };
        let len = match to {
            FlushTo::End => {
                file.buffer.resize(file.buffer.len().next_multiple_of(BLOCK_LEN as usize), 0);
                file.buffer.len()
            }
            FlushTo::WholeBlock => file.buffer.len() & !(BLOCK_LEN as usize - 1),
        };
        let mut done = 0;
        while done < len {
            let wanted = ((len - done) as u64 / BLOCK_LEN).min(EXTENT_BLOCKS_MAX);
            let run = self.blocks.take(wanted).ok_or_else(|| self.full())?;
            let run_len = (run.len * BLOCK_LEN) as usize;
            self.target.write_at(run.start * BLOCK_LEN, &file.buffer[done..done + run_len])?;
            let logical = ((file.start + done as u64) / BLOCK_LEN) as u32;
            let next = Extent { logical, start: run.start, len: run.len };
            extent::push(&mut self.nodes[file.node as usize].extents, next);
            done += run_len;
        }
        file.buffer.drain(..len);
        file.start += len as u64;
        self.open = Some(file);
        Ok(())
    }

    fn close_file(&mut self) -> Result<(), FormatError> {
        self.flush_file(FlushTo::End)?;
        self.open = None;
        Ok(())
    }
}

/// How much of a buffer is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FlushTo {
    /// All of it, the last block filled up with zeros.
    End,
    /// What are whole blocks.
    WholeBlock,
}
