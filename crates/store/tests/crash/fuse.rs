//! File systems that this process serves through FUSE: mounting, and requests as the kernel sends them.

use std::ffi::CString;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

pub const WRITE_LEN_MAX: usize = 1 << 20;
pub const ROOT: u64 = 1;
/// How long the kernel may remember: nobody else changes anything.
const VALID_S: u64 = 1 << 20;
/// Requests that are worked on at a time: one that is held up holds up no other.
const THREADS: usize = 4;
const HEADER_LEN: usize = 40;

pub const LOOKUP: u32 = 1;
pub const GETATTR: u32 = 3;
pub const SETATTR: u32 = 4;
pub const MKNOD: u32 = 8;
pub const MKDIR: u32 = 9;
pub const UNLINK: u32 = 10;
pub const RMDIR: u32 = 11;
pub const RENAME: u32 = 12;
pub const OPEN: u32 = 14;
pub const READ: u32 = 15;
pub const WRITE: u32 = 16;
pub const STATFS: u32 = 17;
pub const RELEASE: u32 = 18;
pub const FSYNC: u32 = 20;
pub const FLUSH: u32 = 25;
const INIT: u32 = 26;
pub const OPENDIR: u32 = 27;
pub const READDIR: u32 = 28;
pub const RELEASEDIR: u32 = 29;
pub const FSYNCDIR: u32 = 30;
pub const ACCESS: u32 = 34;
pub const CREATE: u32 = 35;
pub const DESTROY: u32 = 38;
pub const FALLOCATE: u32 = 43;
pub const RENAME2: u32 = 45;

/// What answers requests; the error is a number of the host's.
pub trait FileSystem: Send + Sync + 'static {
    fn answer(&self, opcode: u32, node: u64, body: Fields<'_>) -> Result<Vec<u8>, i32>;
}

/// A file system that is mounted, until it is dropped.
pub struct Mount {
    folder: PathBuf,
    servers: Vec<JoinHandle<()>>,
}

impl Mount {
    /// Mounts a file system at a folder; none, with a message, where that is not allowed.
    pub fn new(folder: &Path, files: Arc<impl FileSystem>) -> Option<Mount> {
        let device = match File::options().read(true).write(true).open("/dev/fuse") {
            Ok(device) => Arc::new(device),
            Err(error) => {
                eprintln!("not run: FUSE cannot be used: {error}");
                return None;
            }
        };
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other", device.as_raw_fd());
        let (target, options) = (path(folder), CString::new(options).unwrap());
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
        let servers = (0..THREADS).map(|_| {
            let (device, files) = (device.clone(), files.clone());
            std::thread::spawn(move || serve(&device, &*files))
        });
        Some(Mount { folder: folder.to_path_buf(), servers: servers.collect() })
    }

    /// Waits until somebody unmounts it.
    pub fn wait(mut self) {
        for server in self.servers.drain(..) {
            server.join().unwrap();
        }
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if !self.servers.is_empty() {
            unmount(&self.folder);
        }
        for server in self.servers.drain(..) {
            let _ = server.join();
        }
    }
}

/// Takes what is mounted away from a folder, also if it is in use.
pub fn unmount(folder: &Path) {
    let target = path(folder);
    // SAFETY: the string ends with a zero and lives until the call comes back.
    unsafe { libc::umount2(target.as_ptr(), libc::MNT_DETACH) };
}

fn path(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).unwrap()
}

/// A request's fields, taken one after the other.
pub struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    pub fn u32(&mut self) -> u32 {
        let (field, rest) = self.0.split_at(4);
        self.0 = rest;
        u32::from_le_bytes(field.try_into().unwrap())
    }

    pub fn u64(&mut self) -> u64 {
        let (field, rest) = self.0.split_at(8);
        self.0 = rest;
        u64::from_le_bytes(field.try_into().unwrap())
    }

    pub fn name(&mut self) -> String {
        let end = self.0.iter().position(|&byte| byte == 0).unwrap();
        let name = String::from_utf8(self.0[..end].to_vec()).unwrap();
        self.0 = &self.0[end + 1..];
        name
    }

    /// The last bytes of the request.
    pub fn last(&self, len: usize) -> &'a [u8] {
        &self.0[self.0.len() - len..]
    }
}

fn serve(mut device: &File, files: &impl FileSystem) {
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
        // FORGET, BATCH_FORGET and INTERRUPT have no answer.
        if matches!(opcode, 2 | 36 | 42) {
            continue;
        }
        let answer = match opcode {
            INIT => Ok(greeting()),
            _ => files.answer(opcode, node, Fields(&buffer[HEADER_LEN..len])),
        };
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

/// Version 7.31, with writes of more than a page.
fn greeting() -> Vec<u8> {
    let fields = [7, 31, 128 << 10, 1 << 5 | 1 << 22, 64 << 16 | 64, WRITE_LEN_MAX as u32, 1, 256];
    let mut bytes = fields.map(u32::to_le_bytes).concat();
    bytes.resize(64, 0);
    bytes
}

/// What the kernel is told of a file.
#[derive(Clone, Copy)]
pub struct Attributes {
    pub node: u64,
    pub mode: u32,
    pub len: u64,
    pub used_bytes: u64,
}

impl Attributes {
    fn to_bytes(self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for field in [self.node, self.len, self.used_bytes / 512, 0, 0, 0] {
            bytes.extend_from_slice(&field.to_le_bytes());
        }
        for field in [0, 0, 0, self.mode, 1, 0, 0, 0, 4096, 0] {
            bytes.extend_from_slice(&u32::to_le_bytes(field));
        }
        bytes
    }

    /// The answer to a question for them.
    pub fn answer(self) -> Vec<u8> {
        [&VALID_S.to_le_bytes()[..], &[0; 8], &self.to_bytes()].concat()
    }

    /// The answer to a question for a name.
    pub fn entry(self) -> Vec<u8> {
        let fields = [self.node, 0, VALID_S, VALID_S, 0].map(u64::to_le_bytes).concat();
        [fields, self.to_bytes()].concat()
    }
}

/// The answer where a file was opened: what the kernel has cached of it stays (FOPEN_KEEP_CACHE). It would be dropped otherwise while it is
/// written, and a read between a write's way into the cache and its way to us brings what was there before, for good.
pub const OPENED: [u8; 16] = [0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0];

/// The answer to a write of so many bytes.
pub fn written(len: usize) -> Vec<u8> {
    [(len as u32).to_le_bytes(), [0; 4]].concat()
}

/// The answer to a question for free room.
pub fn space(free_bytes: Option<u64>) -> Vec<u8> {
    let free = free_bytes.unwrap_or(0).min(1 << 50) / 4096;
    let blocks = if free_bytes.is_some() { 1 << 40 } else { 0 };
    let mut bytes = [blocks, free, free, 1 << 20, 1 << 20].map(u64::to_le_bytes).concat();
    bytes.extend_from_slice(&[4096, 255, 4096, 0, 0, 0, 0, 0, 0, 0].map(u32::to_le_bytes).concat());
    bytes
}
