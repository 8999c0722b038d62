//! A file system in memory that knows what a power cut would leave of it: a FUSE server of this process.
//!
//! The store runs on it unchanged, its catalog included, so that nothing between the two can be forgotten: what a file system hears is
//! what it can lose. Every file has what was synced, and the writes since; every folder has the names that were synced, and what was done to
//! them since. A cut leaves any part of what was not synced, by sectors of 512 bytes and in any order: more than most
//! file systems would lose, and nothing that POSIX promises. It can also be full, and fail operations.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CString;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;

use super::random::Random;

const PAGE_LEN: usize = 4096;
const SECTOR_LEN: usize = 512;
const WRITE_LEN_MAX: usize = 1 << 20;
const ROOT: u64 = 1;

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
    Write { offset: u64, bytes: Vec<u8> },
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

/// Which syncs fail, by a part of the file's name, and from which change on.
#[derive(Clone, Default)]
pub struct Faults {
    pub syncs_of: Option<&'static str>,
    pub from: u64,
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
    pub faults: Faults,
}

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
            faults: Faults::default(),
        }
    }
}

impl Disk {
    /// Bytes of all files that have a name.
    pub fn used_bytes(&self) -> u64 {
        let named: BTreeSet<u64> = self.nodes.values().flat_map(|node| node.names.values().copied()).collect();
        named.iter().filter_map(|number| self.nodes.get(number)).map(Node::used_bytes).sum()
    }

    /// What is there when the power comes back.
    pub fn after_power_loss(&self, random: &mut Random) -> Disk {
        let mut after = Disk::default();
        // Some cuts leave all or nothing of what was not synced, most leave some of it.
        let share = [0, 10, 50, 90, 100][random.below(5) as usize];
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
    disk: Arc<Mutex<Disk>>,
    folder: tempfile::TempDir,
    server: Option<JoinHandle<()>>,
}

impl PowerDisk {
    /// Mounts a disk; none, with a message, where that is not allowed.
    pub fn mount(disk: Disk) -> Option<PowerDisk> {
        let folder = tempfile::tempdir().unwrap();
        let device = match File::options().read(true).write(true).open("/dev/fuse") {
            Ok(device) => device,
            Err(error) => {
                eprintln!("not run: FUSE cannot be used: {error}");
                return None;
            }
        };
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", device.as_raw_fd());
        let (target, options) = (path(folder.path()), CString::new(options).unwrap());
        // SAFETY: the strings end with a zero and live until the call comes back.
        let mounted = unsafe {
            libc::mount(
                c"polder-test".as_ptr(),
                target.as_ptr(),
                c"fuse".as_ptr(),
                libc::MS_NOSUID | libc::MS_NODEV,
                options.as_ptr().cast(),
            )
        };
        if mounted != 0 {
            eprintln!("not run: a FUSE file system cannot be mounted: {}", std::io::Error::last_os_error());
            return None;
        }
        let disk = Arc::new(Mutex::new(disk));
        let server = std::thread::spawn({
            let disk = disk.clone();
            move || serve(device, &disk)
        });
        Some(PowerDisk { disk, folder, server: Some(server) })
    }

    pub fn path(&self) -> PathBuf {
        self.folder.path().join("store")
    }

    pub fn disk(&self) -> MutexGuard<'_, Disk> {
        self.disk.lock().unwrap()
    }
}

fn path(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).unwrap()
}

impl Drop for PowerDisk {
    fn drop(&mut self) {
        let target = path(self.folder.path());
        // SAFETY: the string ends with a zero and lives until the call comes back.
        unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) };
        if let Some(server) = self.server.take() {
            let _ = server.join();
        }
    }
}

/// A request's fields, taken one after the other.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn u32(&mut self) -> u32 {
        let (field, rest) = self.0.split_at(4);
        self.0 = rest;
        u32::from_le_bytes(field.try_into().unwrap())
    }

    fn u64(&mut self) -> u64 {
        let (field, rest) = self.0.split_at(8);
        self.0 = rest;
        u64::from_le_bytes(field.try_into().unwrap())
    }

    fn name(&mut self) -> String {
        let end = self.0.iter().position(|&byte| byte == 0).unwrap();
        let name = String::from_utf8(self.0[..end].to_vec()).unwrap();
        self.0 = &self.0[end + 1..];
        name
    }
}

fn serve(mut device: File, disk: &Mutex<Disk>) {
    let mut buffer = vec![0; WRITE_LEN_MAX + (64 << 10)];
    loop {
        let len = match device.read(&mut buffer) {
            Ok(len) => len,
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINTR | libc::ENOENT | libc::EAGAIN)) => continue,
            // Unmounted.
            Err(_) => return,
        };
        let mut fields = Fields(&buffer[..len]);
        let (_, opcode, unique, node) = (fields.u32(), fields.u32(), fields.u64(), fields.u64());
        let body = Fields(&buffer[40..len]);
        // FORGET, BATCH_FORGET and INTERRUPT have no answer.
        if matches!(opcode, 2 | 36 | 42) {
            continue;
        }
        let answer = answer(&mut disk.lock().unwrap(), opcode, node, body);
        let (error, bytes) = match answer {
            Ok(bytes) => (0, bytes),
            Err(error) => (-error, Vec::new()),
        };
        let mut reply = Vec::with_capacity(16 + bytes.len());
        reply.extend_from_slice(&(16 + bytes.len() as u32).to_le_bytes());
        reply.extend_from_slice(&error.to_le_bytes());
        reply.extend_from_slice(&unique.to_le_bytes());
        reply.extend_from_slice(&bytes);
        // Who asked may have been killed.
        let _ = device.write(&reply);
    }
}

fn attributes(number: u64, node: &Node) -> Vec<u8> {
    let mut bytes = Vec::new();
    for field in [number, node.now.len, node.used_bytes() / 512, 0, 0, 0] {
        bytes.extend_from_slice(&field.to_le_bytes());
    }
    for field in [0, 0, 0, node.mode, 1, 0, 0, 0, PAGE_LEN as u32, 0] {
        bytes.extend_from_slice(&field.to_le_bytes());
    }
    bytes
}

/// How long the kernel may remember: nobody else changes anything.
const VALID_S: u64 = 1 << 20;

fn entry(number: u64, node: &Node) -> Vec<u8> {
    let mut bytes = Vec::new();
    for field in [number, 0, VALID_S, VALID_S, 0] {
        bytes.extend_from_slice(&field.to_le_bytes());
    }
    bytes.extend_from_slice(&attributes(number, node));
    bytes
}

const OPENED: [u8; 16] = [0; 16];

fn answer(disk: &mut Disk, opcode: u32, number: u64, mut fields: Fields<'_>) -> Result<Vec<u8>, i32> {
    // SETATTR, MKNOD, MKDIR, UNLINK, RMDIR, RENAME, WRITE, FSYNC, FSYNCDIR, CREATE, FALLOCATE and RENAME2 change something.
    if matches!(opcode, 4 | 8 | 9 | 10 | 11 | 12 | 16 | 20 | 30 | 35 | 43 | 45) {
        disk.changes += 1;
        disk.cut |= disk.changes >= disk.cut_at;
    }
    if disk.cut && opcode != 26 {
        return Err(libc::EIO);
    }
    match opcode {
        // LOOKUP
        1 => {
            let child = *disk.folder(number)?.names.get(&fields.name()).ok_or(libc::ENOENT)?;
            Ok(entry(child, disk.node(child)?))
        }
        // GETATTR
        3 => {
            let mut bytes = [VALID_S.to_le_bytes(), [0; 8]].concat();
            bytes.extend_from_slice(&attributes(number, disk.node(number)?));
            Ok(bytes)
        }
        // SETATTR
        4 => {
            let valid = fields.u32();
            let _ = (fields.u32(), fields.u64());
            let len = fields.u64();
            if valid & 1 << 3 != 0 {
                let node = disk.node_mut(number)?;
                node.now.set_len(len);
                node.allocated = node.allocated.min(len);
                node.changes.push(Change::SetLen(len));
            }
            let mut bytes = [VALID_S.to_le_bytes(), [0; 8]].concat();
            bytes.extend_from_slice(&attributes(number, disk.node(number)?));
            Ok(bytes)
        }
        // MKNOD, MKDIR and CREATE
        8 | 9 | 35 => {
            let first = fields.u32();
            let mode = match opcode {
                8 => {
                    let _ = (fields.u32(), fields.u32(), fields.u32());
                    first
                }
                9 => {
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
            disk.take_space(0)?;
            if disk.folder(number)?.names.contains_key(&name) {
                return Err(libc::EEXIST);
            }
            let child = disk.next;
            disk.next += 1;
            disk.nodes.insert(child, Node { mode, ..Node::default() });
            disk.change_names(number, NameChange::Add(name, child))?;
            let mut bytes = entry(child, disk.node(child)?);
            if opcode == 35 {
                bytes.extend_from_slice(&OPENED);
            }
            Ok(bytes)
        }
        // UNLINK and RMDIR
        10 | 11 => {
            let name = fields.name();
            let child = *disk.folder(number)?.names.get(&name).ok_or(libc::ENOENT)?;
            if opcode == 11 && !disk.folder(child)?.names.is_empty() {
                return Err(libc::ENOTEMPTY);
            }
            disk.change_names(number, NameChange::Remove(name))?;
            Ok(Vec::new())
        }
        // RENAME and RENAME2
        12 | 45 => {
            let to_folder = fields.u64();
            if opcode == 45 {
                let _ = fields.u64();
            }
            let (from, to) = (fields.name(), fields.name());
            if to_folder != number {
                return Err(libc::EXDEV);
            }
            if !disk.folder(number)?.names.contains_key(&from) {
                return Err(libc::ENOENT);
            }
            disk.change_names(number, NameChange::Rename(from, to))?;
            Ok(Vec::new())
        }
        // OPEN and OPENDIR
        14 | 27 => disk.node(number).map(|_| OPENED.to_vec()),
        // READ
        15 => {
            let _ = fields.u64();
            let (offset, len) = (fields.u64(), fields.u32());
            Ok(disk.node(number)?.now.read(offset, len as usize))
        }
        // WRITE
        16 => {
            let _ = fields.u64();
            let (offset, len) = (fields.u64(), fields.u32() as usize);
            let bytes = fields.0[fields.0.len() - len..].to_vec();
            let node = disk.node(number)?;
            let pages = offset / PAGE_LEN as u64..(offset + len as u64).div_ceil(PAGE_LEN as u64);
            let new = pages.filter(|page| !node.now.pages.contains_key(page)).count();
            let after = ((node.now.pages.len() + new) * PAGE_LEN) as u64;
            disk.take_space(after.saturating_sub(node.used_bytes()))?;
            let node = disk.node_mut(number)?;
            node.now.write(offset, &bytes);
            node.changes.push(Change::Write { offset, bytes });
            Ok([(len as u32).to_le_bytes(), [0; 4]].concat())
        }
        // STATFS
        17 => {
            let mut bytes = Vec::new();
            let free = disk.space.saturating_sub(disk.used_bytes()).min(1 << 50) / PAGE_LEN as u64;
            for field in [1u64 << 40, free, free, 1 << 20, 1 << 20] {
                bytes.extend_from_slice(&field.to_le_bytes());
            }
            bytes.extend_from_slice(
                &[PAGE_LEN as u32, 255, PAGE_LEN as u32, 0, 0, 0, 0, 0, 0, 0].map(u32::to_le_bytes).concat(),
            );
            Ok(bytes)
        }
        // RELEASE, FLUSH, RELEASEDIR, ACCESS and DESTROY
        18 | 25 | 29 | 34 | 38 => Ok(Vec::new()),
        // FSYNC
        20 => {
            let fails = disk.sync_fails(number);
            let node = disk.node_mut(number)?;
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
        // INIT
        26 => {
            let mut bytes = Vec::new();
            // Version 7.31, with writes of more than a page.
            for field in [
                7,
                31,
                128 << 10,
                1 << 5 | 1 << 22,
                64 << 16 | 64,
                WRITE_LEN_MAX as u32,
                1,
                256,
                0,
                0,
                0,
                0,
                0,
                0,
                0,
                0,
            ] {
                bytes.extend_from_slice(&field.to_le_bytes());
            }
            Ok(bytes)
        }
        // READDIR
        28 => {
            let _ = fields.u64();
            let (offset, len) = (fields.u64(), fields.u32() as usize);
            let mut bytes = Vec::new();
            for (at, (name, child)) in disk.folder(number)?.names.iter().enumerate().skip(offset as usize) {
                let kind = disk.node(*child)?.mode >> 12;
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
        // FSYNCDIR
        30 => {
            let node = disk.node_mut(number)?;
            node.stable_names = node.names.clone();
            node.name_changes.clear();
            Ok(Vec::new())
        }
        // FALLOCATE
        43 => {
            let _ = fields.u64();
            let (offset, len, mode) = (fields.u64(), fields.u64(), fields.u32());
            if mode != 0 {
                return Err(libc::EOPNOTSUPP);
            }
            let before = disk.node(number)?.used_bytes();
            let end = offset + len;
            disk.take_space(end.saturating_sub(before))?;
            let node = disk.node_mut(number)?;
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
        let Some(of) = self.faults.syncs_of.filter(|_| self.changes >= self.faults.from) else { return false };
        let is = |(name, child): (&String, &u64)| *child == number && name.contains(of);
        self.nodes.values().any(|node| node.names.iter().any(is))
    }
}
