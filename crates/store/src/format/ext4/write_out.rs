//! What is written when all files are there: directories, inodes, attributes, bitmaps, descriptors, and the superblock last.

use super::super::{FormatError, Target};
use super::checksum::crc32c;
use super::directory::DirectoryBlocks;
use super::extent::{self, Extent};
use super::inode::{self, Attributes, Inode, Kind};
use super::layout::{BLOCK_LEN, DESCRIPTOR_LEN, GROUP_BLOCKS, INODE_LEN, Layout};
use super::superblock::{self, FIRST_INODE, Facts, GroupFacts, JOURNAL_INODE, SUPERBLOCK_AT};
use super::tree::NodeIndex;
use super::{Ext4Writer, LOST_AND_FOUND, ROOT};
use std::collections::HashMap;

/// The inode of the root directory.
const ROOT_INODE: u32 = 2;
/// Bytes of the inode table that are written at once.
const TABLE_WRITE_LEN: usize = 256 << 10;

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ext4Summary {
    /// Files, directories and everything else, without what ext4 needs for itself.
    pub entries: u64,
    /// Bytes of the disk that are taken.
    pub used_len: u64,
    /// Bytes of the file system.
    pub len: u64,
}

/// Inodes in use, group by group.
#[derive(Default)]
struct InodeUse {
    groups: HashMap<u64, InodeGroup>,
}

struct InodeGroup {
    bitmap: Vec<u8>,
    used: u64,
    directories: u64,
    /// One more than the last that is used.
    end: u64,
}

impl InodeUse {
    fn mark(&mut self, number: u32, directory: bool, layout: &Layout) {
        let (group, index) = place(number, layout);
        let group = self.groups.entry(group).or_insert_with(|| InodeGroup {
            bitmap: vec![0; BLOCK_LEN as usize],
            used: 0,
            directories: 0,
            end: 0,
        });
        group.bitmap[(index / 8) as usize] |= 1 << (index % 8);
        group.used += 1;
        group.directories += u64::from(directory);
        group.end = group.end.max(index + 1);
    }
}

/// The group of an inode and its index there.
fn place(number: u32, layout: &Layout) -> (u64, u64) {
    let index = u64::from(number) - 1;
    (index / layout.inodes_per_group, index % layout.inodes_per_group)
}

/// The number of an inode.
fn number_of(node: NodeIndex) -> u32 {
    match node {
        ROOT => ROOT_INODE,
        other => FIRST_INODE + other - LOST_AND_FOUND,
    }
}

/// Inodes that lie one behind the other, on their way to the table.
struct TableWriter {
    at: u64,
    bytes: Vec<u8>,
}

impl TableWriter {
    fn put(&mut self, at: u64, inode: &[u8], target: &mut dyn Target) -> Result<(), FormatError> {
        if self.at + self.bytes.len() as u64 != at || self.bytes.len() >= TABLE_WRITE_LEN {
            self.flush(target)?;
            self.at = at;
        }
        self.bytes.extend_from_slice(inode);
        Ok(())
    }

    fn flush(&mut self, target: &mut dyn Target) -> Result<(), FormatError> {
        if !self.bytes.is_empty() {
            target.write_at(self.at, &self.bytes)?;
            self.bytes.clear();
        }
        Ok(())
    }
}

impl Ext4Writer<'_> {
    /// Writes everything that was held back. The target is not finished.
    pub fn finish(mut self) -> Result<Ext4Summary, FormatError> {
        self.close_file()?;
        self.write_directories()?;
        let mut inodes = InodeUse::default();
        // The reserved ones count as used.
        (1..FIRST_INODE).for_each(|number| inodes.mark(number, number == ROOT_INODE, &self.layout));
        let journal = self.write_inodes(&mut inodes)?;
        for (place, (block, sharers)) in std::mem::take(&mut self.shared_xattrs) {
            self.write_blocks(place, &block.bytes(place, sharers, self.seed))?;
        }
        self.write_groups(&mut inodes, journal)?;
        let live = self.nodes.iter().filter(|inode| inode.links > 0).count() as u64;
        Ok(Ext4Summary {
            // Without the root and lost+found.
            entries: live - 2,
            used_len: (self.layout.blocks - self.blocks.free_total()) * BLOCK_LEN,
            len: self.layout.blocks * BLOCK_LEN,
        })
    }

    fn write_directories(&mut self) -> Result<(), FormatError> {
        let mut all: Vec<NodeIndex> = self.directories.keys().copied().collect();
        all.sort_unstable();
        for node in all {
            let directory = self.directories.remove(&node).expect("it is in the list");
            let mut blocks = DirectoryBlocks::new(inode::seed(self.seed, number_of(node)));
            let own_type = Kind::Directory.file_type();
            blocks.push(number_of(node), own_type, b".");
            blocks.push(number_of(directory.parent), own_type, b"..");
            let mut links = 2;
            for (name, entry) in &directory.entries {
                let kind = self.nodes[*entry as usize].kind;
                blocks.push(number_of(*entry), kind.file_type(), name);
                links += u32::from(kind == Kind::Directory);
            }
            let bytes = blocks.finish();
            let mut done = 0;
            while done < bytes.len() {
                let run = self.blocks.take((bytes.len() - done) as u64 / BLOCK_LEN).ok_or_else(|| self.full())?;
                let len = (run.len * BLOCK_LEN) as usize;
                self.write_blocks(run.start, &bytes[done..done + len])?;
                let next = Extent { logical: (done as u64 / BLOCK_LEN) as u32, start: run.start, len: run.len };
                extent::push(&mut self.nodes[node as usize].extents, next);
                done += len;
            }
            self.nodes[node as usize].len = bytes.len() as u64;
            self.nodes[node as usize].links = links;
        }
        Ok(())
    }

    /// Writes every inode; gives the journal's root and length.
    fn write_inodes(&mut self, inodes: &mut InodeUse) -> Result<Option<([u8; 60], u64)>, FormatError> {
        let mut table = TableWriter { at: 0, bytes: Vec::new() };
        let nodes = std::mem::take(&mut self.nodes);
        let mut journal = None;
        for (index, inode) in nodes.iter().enumerate().filter(|(_, inode)| inode.links > 0) {
            let number = number_of(index as NodeIndex);
            self.write_inode(number, inode, &mut table)?;
            if number >= FIRST_INODE {
                inodes.mark(number, inode.kind == Kind::Directory, &self.layout);
            }
            if number == ROOT_INODE && !self.journal.is_empty() {
                let log = self.journal_inode();
                journal = self.write_inode(JOURNAL_INODE, &log, &mut table)?.map(|root| (root, log.len));
            }
        }
        self.nodes = nodes;
        table.flush(self.target)?;
        Ok(journal)
    }

    fn journal_inode(&self) -> Inode {
        let time = super::Time { seconds: i64::from(self.options.time_s), nanoseconds: 0 };
        let attributes = Attributes { permissions: 0o600, modified: time, ..Attributes::default() };
        let mut inode = Self::inode(Kind::File, &attributes);
        inode.extents.clone_from(&self.journal);
        inode.len = self.layout.journal_blocks * BLOCK_LEN;
        inode.links = 1;
        inode
    }

    /// Writes one inode with its tree of extents; gives the root of that.
    fn write_inode(
        &mut self,
        number: u32,
        inode: &Inode,
        table: &mut TableWriter,
    ) -> Result<Option<[u8; 60]>, FormatError> {
        let seed = inode::seed(self.seed, number);
        let fast_symlink = inode.kind == Kind::Symlink && inode.extents.is_empty();
        let has_extents = matches!(inode.kind, Kind::File | Kind::Directory | Kind::Symlink) && !fast_symlink;
        let mut blocks = inode.extents.iter().map(|one| one.len).sum::<u64>() + u64::from(inode.xattr_block != 0);
        let mut root = None;
        if has_extents {
            let needed = extent::tree_blocks(inode.extents.len());
            blocks += needed;
            let places: Vec<u64> = (0..needed).map(|_| self.take_block()).collect::<Result<_, _>>()?;
            let (tree_root, tree_blocks) = extent::tree(&inode.extents, seed, &places);
            for (place, block) in tree_blocks {
                self.write_blocks(place, &block)?;
            }
            root = Some(tree_root);
        }
        let (group, index) = place(number, &self.layout);
        let at = self.layout.inode_table(group) * BLOCK_LEN + index * INODE_LEN;
        table.put(at, &inode.bytes(seed, root.as_ref(), blocks), self.target)?;
        Ok(root)
    }

    /// Bitmaps, descriptors and superblocks.
    fn write_groups(&mut self, inodes: &mut InodeUse, journal: Option<([u8; 60], u64)>) -> Result<(), FormatError> {
        let layout = self.layout.clone();
        let per_group = layout.inodes_per_group;
        let mut descriptors = Vec::with_capacity((layout.groups * DESCRIPTOR_LEN) as usize);
        let mut free_inodes = 0;
        for group in 0..layout.groups {
            let mut facts = GroupFacts {
                free_blocks: self.blocks.free_in(group),
                free_inodes: per_group,
                unused_inodes: per_group,
                ..GroupFacts::default()
            };
            // The last group is never left out, as in mke2fs.
            let untouched = (group == layout.groups - 1).then(|| self.blocks.untouched_bitmap(group));
            let bitmap = self.blocks.touched(group).or(untouched.as_ref().map(|bitmap| &bitmap[..]));
            if let Some(bitmap) = bitmap {
                facts.block_bitmap_sum = Some(crc32c(self.seed, bitmap));
                self.target.write_at(layout.block_bitmap(group) * BLOCK_LEN, bitmap)?;
            }
            if let Some(used) = inodes.groups.get_mut(&group) {
                (per_group..GROUP_BLOCKS).for_each(|bit| used.bitmap[(bit / 8) as usize] |= 1 << (bit % 8));
                facts.inode_bitmap_sum = Some(crc32c(self.seed, &used.bitmap[..per_group as usize / 8]));
                facts.free_inodes = per_group - used.used;
                facts.unused_inodes = per_group - used.end;
                facts.directories = used.directories;
                self.target.write_at(layout.inode_bitmap(group) * BLOCK_LEN, &used.bitmap)?;
            }
            free_inodes += facts.free_inodes;
            descriptors.extend(superblock::descriptor(&layout, group, &facts, self.seed));
        }
        descriptors.resize((layout.descriptor_blocks * BLOCK_LEN) as usize, 0);
        let facts = Facts {
            uuid: self.options.uuid,
            label: &self.options.label,
            time_s: self.options.time_s,
            free_blocks: self.blocks.free_total(),
            free_inodes,
            journal,
        };
        for group in (0..layout.groups).rev().filter(|group| Layout::has_superblock(*group)) {
            let first = Layout::first_block(group);
            self.target.write_at((first + 1) * BLOCK_LEN, &descriptors)?;
            let at = first * BLOCK_LEN + if group == 0 { SUPERBLOCK_AT as u64 } else { 0 };
            self.target.write_at(at, &superblock::superblock(&layout, &facts, group))?;
        }
        Ok(())
    }
}
