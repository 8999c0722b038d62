//! A file system in memory that knows what a power cut would leave of it: a FUSE server of this process.
//!
//! The store runs on it unchanged, its catalog included, so that nothing between the two can be forgotten: what a file system hears is
//! what it can lose. Every file has what was synced, and the writes since; every folder has the names that were synced, and what was done to
//! them since. A cut leaves any part of what was not synced, by sectors of 512 bytes and in any order: more than most
//! file systems would lose, and nothing that POSIX promises. It can also be full, and fail operations.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use super::fuse::{self, Attributes, Fields, FileSystem, Mount, OPENED, ROOT};
use super::host;
use super::random::Random;

const PAGE_LEN: usize = 4096;
const SECTOR_LEN: usize = 512;
/// How soon a request that is held up is looked at again.
const HELD_LOOK: Duration = Duration::from_millis(5);

/// The bytes of a file; pages that were never written are zeros.
#[derive(Clone, Default)]
struct Content {
    pages: BTreeMap<u64, Arc<[u8; PAGE_LEN]>>,
    len: u64,
}

impl Content {
    fn write(&mut self, offset: u64, bytes: &[u8]) {
        let mut done = 0;
        while done < bytes.len() {
            let at = offset + done as u64;
            let from = (at % PAGE_LEN as u64) as usize;
            let len = (PAGE_LEN - from).min(bytes.len() - done);
            let page = self.pages.entry(at / PAGE_LEN as u64).or_insert_with(|| Arc::new([0; PAGE_LEN]));
            Arc::make_mut(page)[from..from + len].copy_from_slice(&bytes[done..done + len]);
            done += len;
        }
        self.len = self.len.max(offset + bytes.len() as u64);
    }

    fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let len = len.min(self.len.saturating_sub(offset) as usize);
        let mut bytes = vec![0; len];
        let mut done = 0;
        while done < len {
            let at = offset + done as u64;
            let from = (at % PAGE_LEN as u64) as usize;
            let part = (PAGE_LEN - from).min(len - done);
            if let Some(page) = self.pages.get(&(at / PAGE_LEN as u64)) {
                bytes[done..done + part].copy_from_slice(&page[from..from + part]);
            }
            done += part;
        }
        bytes
    }

    fn set_len(&mut self, len: u64) {
        if len < self.len {
            let page = len / PAGE_LEN as u64;
            self.pages.split_off(&len.div_ceil(PAGE_LEN as u64));
            if let Some(page) = self.pages.get_mut(&page) {
                Arc::make_mut(page)[(len % PAGE_LEN as u64) as usize..].fill(0);
            }
        }
        self.len = len;
    }
}

/// Something that was done to a file and not synced.
#[derive(Clone)]
enum Change {
    Write { offset: u64, bytes: Arc<[u8]> },
    SetLen(u64),
}

/// Something that was done to a folder and not synced.
#[derive(Clone)]
enum NameChange {
    Add(String, u64),
    Remove(String),
    Rename(String, String),
}

fn apply_names(names: &mut BTreeMap<String, u64>, change: &NameChange) {
    match change {
        NameChange::Add(name, node) => drop(names.insert(name.clone(), *node)),
        NameChange::Remove(name) => drop(names.remove(name)),
        NameChange::Rename(from, to) => {
            if let Some(node) = names.remove(from) {
                names.insert(to.clone(), node);
            }
        }
    }
}

#[derive(Clone, Default)]
struct Node {
    mode: u32,
    now: Content,
    stable: Content,
    changes: Vec<Change>,
    names: BTreeMap<String, u64>,
    stable_names: BTreeMap<String, u64>,
    name_changes: Vec<NameChange>,
    /// Bytes that were set aside by `fallocate`.
    allocated: u64,
}

impl Node {
    fn is_folder(&self) -> bool {
        self.mode & libc::S_IFMT == libc::S_IFDIR
    }

    fn used_bytes(&self) -> u64 {
        (self.now.pages.len() as u64 * PAGE_LEN as u64).max(self.allocated)
    }
}

/// What goes wrong with files, which are said by a part of their names.
#[derive(Clone, Default)]
pub struct Faults {
    /// All syncs of such files fail, from a change on.
    pub syncs_of: Option<&'static str>,
    pub from: u64,
    /// One such call fails, after so many that do not. A read fails twice: the kernel reads ahead, and asks again for what it needs.
    pub once: Option<(Call, &'static str, u64)>,
    /// The name of the file whose call failed.
    pub failed: Option<String>,
    /// What changes such files is not answered.
    pub stuck: Option<&'static str>,
    /// There was such a change.
    pub held: bool,
}

/// A call that can fail by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    Read,
    Write,
}

/// The state of the file system.
#[derive(Clone)]
pub struct Disk {
    nodes: BTreeMap<u64, Node>,
    next: u64,
    /// Changes so far.
    pub changes: u64,
    /// At which change the power goes.
    pub cut_at: u64,
    pub cut: bool,
    /// Bytes that files may take.
    pub space: u64,
    /// Whether it says how many of them are left. What uses it meets the full disk unprepared otherwise.
    pub tells_space: bool,
    pub faults: Faults,
    /// Sees the disk right before something of it is synced.
    pub before_sync: Option<Arc<Watcher>>,
}

pub type Watcher = dyn Fn(&Disk) + Send + Sync;

impl Default for Disk {
    fn default() -> Self {
        let root = Node { mode: libc::S_IFDIR | 0o755, ..Node::default() };
        Disk {
            nodes: BTreeMap::from([(ROOT, root)]),
            next: ROOT + 1,
            changes: 0,
            cut_at: u64::MAX,
            cut: false,
            space: u64::MAX,
            tells_space: false,
            faults: Faults::default(),
            before_sync: None,
        }
    }
}

impl Disk {
    /// Bytes of all files that have a name.
    pub fn used_bytes(&self) -> u64 {
        let named: BTreeSet<u64> = self.nodes.values().flat_map(|node| node.names.values().copied()).collect();
        named.iter().filter_map(|number| self.nodes.get(number)).map(Node::used_bytes).sum()
    }

    /// What is there when the power comes back. Some cuts leave all or nothing of what was not synced, most leave some of it.
    pub fn after_power_loss(&self, random: &mut Random) -> Disk {
        self.with_some_left([0, 10, 50, 90, 100][random.below(5) as usize], random)
    }

    /// As [`after_power_loss`](Self::after_power_loss), with so many per cent left of what was not synced.
    pub fn with_some_left(&self, share: u64, random: &mut Random) -> Disk {
        let mut after = Disk::default();
        let mut wanted = vec![ROOT];
        while let Some(number) = wanted.pop() {
            let Some(node) = self.nodes.get(&number) else { continue };
            let mut left = Node { mode: node.mode, ..Node::default() };
            if node.is_folder() {
                let mut names = node.stable_names.clone();
                for change in &node.name_changes {
                    if random.below(100) < share {
                        apply_names(&mut names, change);
                    }
                }
                wanted.extend(names.values());
                (left.names, left.stable_names) = (names.clone(), names);
            } else {
                let mut content = node.stable.clone();
                for change in &node.changes {
                    match change {
                        Change::SetLen(len) if random.below(100) < share => content.set_len(*len),
                        Change::SetLen(_) => {}
                        Change::Write { offset, bytes } => {
                            // Sectors as the disk knows them.
                            let mut at = 0;
                            while at < bytes.len() {
                                let len = SECTOR_LEN - (*offset as usize + at) % SECTOR_LEN;
                                let end = (at + len).min(bytes.len());
                                if random.below(100) < share {
                                    content.write(offset + at as u64, &bytes[at..end]);
                                }
                                at = end;
                            }
                        }
                    }
                }
                (left.now, left.stable) = (content.clone(), content);
                left.allocated = node.allocated;
            }
            after.nodes.insert(number, left);
        }
        after.next = self.next;
        after
    }
}

/// A [`Disk`] that is mounted.
pub struct PowerDisk {
    files: Arc<Files>,
    mount: Option<Mount>,
    folder: tempfile::TempDir,
}

struct Files(Mutex<Disk>);

impl PowerDisk {
    /// Mounts an empty disk, in a mount namespace of this thread's own; none, with a message, where that is not allowed.
    pub fn new() -> Option<PowerDisk> {
        host::own_mounts();
        PowerDisk::mount(Disk::default())
    }

    /// Mounts a disk; none, with a message, where that is not allowed.
    pub fn mount(disk: Disk) -> Option<PowerDisk> {
        let folder = tempfile::tempdir().unwrap();
        let files = Arc::new(Files(Mutex::new(disk)));
        let mount = Mount::new(folder.path(), files.clone())?;
        Some(PowerDisk { files, mount: Some(mount), folder })
    }

    pub fn path(&self) -> PathBuf {
        self.folder.path().join("store")
    }

    pub fn disk(&self) -> MutexGuard<'_, Disk> {
        self.files.0.lock().unwrap()
    }
}

impl Drop for PowerDisk {
    fn drop(&mut self) {
        self.disk().faults.stuck = None;
        self.mount = None;
    }
}

impl FileSystem for Files {
    fn answer(&self, opcode: u32, node: u64, body: Fields<'_>) -> Result<Vec<u8>, i32> {
        loop {
            let mut disk = self.0.lock().unwrap();
            if !disk.is_stuck(opcode, node) {
                return disk.answer(opcode, node, body);
            }
            disk.faults.held = true;
            drop(disk);
            std::thread::sleep(HELD_LOOK);
        }
    }
}

fn attributes(number: u64, node: &Node) -> Attributes {
    Attributes { node: number, mode: node.mode, len: node.now.len, used_bytes: node.used_bytes() }
}

fn entry(number: u64, node: &Node) -> Vec<u8> {
    attributes(number, node).entry()
}

impl Disk {
    fn answer(&mut self, opcode: u32, number: u64, mut fields: Fields<'_>) -> Result<Vec<u8>, i32> {
        if changes_something(opcode) {
            self.changes += 1;
            self.cut |= self.changes >= self.cut_at;
        }
        if self.cut || self.call_fails(opcode, number) {
            return Err(libc::EIO);
        }
        match opcode {
            fuse::LOOKUP => {
                let child = *self.folder(number)?.names.get(&fields.name()).ok_or(libc::ENOENT)?;
                Ok(entry(child, self.node(child)?))
            }
            fuse::GETATTR => Ok(attributes(number, self.node(number)?).answer()),
            fuse::SETATTR => {
                let valid = fields.u32();
                let _ = (fields.u32(), fields.u64());
                let len = fields.u64();
                if valid & 1 << 3 != 0 {
                    let node = self.node_mut(number)?;
                    node.now.set_len(len);
                    node.allocated = node.allocated.min(len);
                    node.changes.push(Change::SetLen(len));
                }
                Ok(attributes(number, self.node(number)?).answer())
            }
            fuse::MKNOD | fuse::MKDIR | fuse::CREATE => {
                let first = fields.u32();
                let mode = match opcode {
                    fuse::MKNOD => {
                        let _ = (fields.u32(), fields.u32(), fields.u32());
                        first
                    }
                    fuse::MKDIR => {
                        let _ = fields.u32();
                        libc::S_IFDIR | first
                    }
                    _ => {
                        let mode = fields.u32();
                        let _ = (fields.u32(), fields.u32());
                        mode
                    }
                };
                let name = fields.name();
                self.take_space(0)?;
                if self.folder(number)?.names.contains_key(&name) {
                    return Err(libc::EEXIST);
                }
                let child = self.next;
                self.next += 1;
                self.nodes.insert(child, Node { mode, ..Node::default() });
                self.change_names(number, NameChange::Add(name, child))?;
                let mut bytes = entry(child, self.node(child)?);
                if opcode == fuse::CREATE {
                    bytes.extend_from_slice(&OPENED);
                }
                Ok(bytes)
            }
            fuse::UNLINK | fuse::RMDIR => {
                let name = fields.name();
                let child = *self.folder(number)?.names.get(&name).ok_or(libc::ENOENT)?;
                if opcode == fuse::RMDIR && !self.folder(child)?.names.is_empty() {
                    return Err(libc::ENOTEMPTY);
                }
                self.change_names(number, NameChange::Remove(name))?;
                Ok(Vec::new())
            }
            fuse::RENAME | fuse::RENAME2 => {
                let to_folder = fields.u64();
                if opcode == fuse::RENAME2 {
                    let _ = fields.u64();
                }
                let (from, to) = (fields.name(), fields.name());
                let moved = *self.folder(number)?.names.get(&from).ok_or(libc::ENOENT)?;
                if to_folder == number {
                    self.change_names(number, NameChange::Rename(from, to))?;
                } else {
                    // Both halves or none, and not before what came earlier: a journal keeps them so. Here it is written at once.
                    self.folder(to_folder)?;
                    self.change_names(number, NameChange::Remove(from))?;
                    self.change_names(to_folder, NameChange::Add(to, moved))?;
                    for node in self.nodes.values_mut().filter(|node| node.is_folder()) {
                        node.stable_names = node.names.clone();
                        node.name_changes.clear();
                    }
                }
                Ok(Vec::new())
            }
            fuse::OPEN | fuse::OPENDIR => self.node(number).map(|_| OPENED.to_vec()),
            fuse::READ => {
                let _ = fields.u64();
                let (offset, len) = (fields.u64(), fields.u32());
                Ok(self.node(number)?.now.read(offset, len as usize))
            }
            fuse::WRITE => {
                let _ = fields.u64();
                let (offset, len) = (fields.u64(), fields.u32() as usize);
                let bytes: Arc<[u8]> = fields.last(len).into();
                let node = self.node(number)?;
                let pages = offset / PAGE_LEN as u64..(offset + len as u64).div_ceil(PAGE_LEN as u64);
                let new = pages.filter(|page| !node.now.pages.contains_key(page)).count();
                let after = ((node.now.pages.len() + new) * PAGE_LEN) as u64;
                self.take_space(after.saturating_sub(node.used_bytes()))?;
                let node = self.node_mut(number)?;
                node.now.write(offset, &bytes);
                node.changes.push(Change::Write { offset, bytes });
                Ok(fuse::written(len))
            }
            fuse::STATFS => {
                let free = self.space.saturating_sub(self.used_bytes());
                Ok(fuse::space(self.tells_space.then_some(free)))
            }
            fuse::RELEASE | fuse::FLUSH | fuse::RELEASEDIR | fuse::ACCESS | fuse::DESTROY => Ok(Vec::new()),
            fuse::FSYNC => {
                self.show_before_sync();
                let fails = self.sync_fails(number);
                let node = self.node_mut(number)?;
                if fails {
                    node.changes.clear();
                    node.now = node.stable.clone();
                    return Err(libc::EIO);
                }
                for change in std::mem::take(&mut node.changes) {
                    match change {
                        Change::Write { offset, bytes } => node.stable.write(offset, &bytes),
                        Change::SetLen(len) => node.stable.set_len(len),
                    }
                }
                Ok(Vec::new())
            }
            fuse::READDIR => {
                let _ = fields.u64();
                let (offset, len) = (fields.u64(), fields.u32() as usize);
                let mut bytes = Vec::new();
                for (at, (name, child)) in self.folder(number)?.names.iter().enumerate().skip(offset as usize) {
                    let kind = self.node(*child)?.mode >> 12;
                    let mut one = Vec::new();
                    one.extend_from_slice(&child.to_le_bytes());
                    one.extend_from_slice(&(at as u64 + 1).to_le_bytes());
                    one.extend_from_slice(&(name.len() as u32).to_le_bytes());
                    one.extend_from_slice(&kind.to_le_bytes());
                    one.extend_from_slice(name.as_bytes());
                    one.resize(one.len().next_multiple_of(8), 0);
                    if bytes.len() + one.len() > len {
                        break;
                    }
                    bytes.extend_from_slice(&one);
                }
                Ok(bytes)
            }
            fuse::FSYNCDIR => {
                self.show_before_sync();
                let node = self.node_mut(number)?;
                node.stable_names = node.names.clone();
                node.name_changes.clear();
                Ok(Vec::new())
            }
            fuse::FALLOCATE => {
                let _ = fields.u64();
                let (offset, len, mode) = (fields.u64(), fields.u64(), fields.u32());
                if mode != 0 {
                    return Err(libc::EOPNOTSUPP);
                }
                let before = self.node(number)?.used_bytes();
                let end = offset + len;
                self.take_space(end.saturating_sub(before))?;
                let node = self.node_mut(number)?;
                node.allocated = node.allocated.max(end);
                if end > node.now.len {
                    node.now.set_len(end);
                    node.changes.push(Change::SetLen(end));
                }
                Ok(Vec::new())
            }
            _ => Err(libc::ENOSYS),
        }
    }
}

impl Disk {
    fn node(&self, number: u64) -> Result<&Node, i32> {
        self.nodes.get(&number).ok_or(libc::ESTALE)
    }

    fn node_mut(&mut self, number: u64) -> Result<&mut Node, i32> {
        self.nodes.get_mut(&number).ok_or(libc::ESTALE)
    }

    fn folder(&self, number: u64) -> Result<&Node, i32> {
        self.node(number).and_then(|node| if node.is_folder() { Ok(node) } else { Err(libc::ENOTDIR) })
    }

    fn change_names(&mut self, folder: u64, change: NameChange) -> Result<(), i32> {
        let node = self.node_mut(folder)?;
        apply_names(&mut node.names, &change);
        node.name_changes.push(change);
        Ok(())
    }

    fn take_space(&self, more: u64) -> Result<(), i32> {
        match self.space == u64::MAX || self.used_bytes() + more <= self.space {
            true => Ok(()),
            false => Err(libc::ENOSPC),
        }
    }

    fn sync_fails(&self, number: u64) -> bool {
        self.faults.syncs_of.filter(|_| self.changes >= self.faults.from).is_some_and(|of| self.is_called(number, of))
    }

    /// The name of a file that holds a word.
    fn name_with(&self, number: u64, part: &str) -> Option<&String> {
        let is = |(name, child): &(&String, &u64)| **child == number && name.contains(part);
        self.nodes.values().find_map(|node| node.names.iter().find(is)).map(|(name, _)| name)
    }

    fn is_called(&self, number: u64, part: &str) -> bool {
        self.name_with(number, part).is_some()
    }

    fn is_stuck(&self, opcode: u32, number: u64) -> bool {
        !self.cut && changes_something(opcode) && self.faults.stuck.is_some_and(|of| self.is_called(number, of))
    }

    /// Whether this is the call that fails.
    fn call_fails(&mut self, opcode: u32, number: u64) -> bool {
        let call = match opcode {
            fuse::READ => Call::Read,
            fuse::WRITE => Call::Write,
            _ => return false,
        };
        let Some((_, of, before)) = self.faults.once.filter(|(fails, _, _)| *fails == call) else { return false };
        let Some(name) = self.name_with(number, of).cloned() else { return false };
        if before > 0 {
            self.faults.once = Some((call, of, before - 1));
            return false;
        }
        self.faults.once = match call {
            Call::Read if self.faults.failed.is_none() => Some((call, of, 0)),
            _ => None,
        };
        self.faults.failed = Some(name);
        true
    }

    fn show_before_sync(&self) {
        if let Some(watcher) = self.before_sync.clone() {
            watcher(self);
        }
    }
}

fn changes_something(opcode: u32) -> bool {
    matches!(
        opcode,
        fuse::SETATTR
            | fuse::MKNOD
            | fuse::MKDIR
            | fuse::UNLINK
            | fuse::RMDIR
            | fuse::RENAME
            | fuse::WRITE
            | fuse::FSYNC
            | fuse::FSYNCDIR
            | fuse::CREATE
            | fuse::FALLOCATE
            | fuse::RENAME2
    )
}
