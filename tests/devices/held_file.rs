//! A file whose reads and writes are answered when the test says so: a file system in user space (FUSE) of one file.
//!
//! The host's kernel asks over /dev/fuse as `linux/fuse.h` lays it out; the mount is a file's, not a folder's.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::mount::{MountFlags, mount};

const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const FORGET: u32 = 2;
const RELEASE: u32 = 18;
const FLUSH: u32 = 25;
const INIT: u32 = 26;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;

const VERSION: [u32; 2] = [7, 31];
/// Each read of the file is one question, whatever was read before.
const OPEN_DIRECT_IO: u64 = 1;
const MODE: u32 = 0o100_600;
const REQUEST_LEN_MAX: usize = 1 << 17;
const WRITE_LEN_MAX: u32 = 1 << 16;
const ENOSYS: i32 = 38;
/// How soon it is noticed that they may be answered.
const LOOK: Duration = Duration::from_millis(20);
/// They are held no longer than this: a process that waits for an answer cannot even be killed.
const HELD_MAX: Duration = Duration::from_secs(90);

/// What the file is: zeros of this length, of which a part is held.
pub struct HeldFile {
    pub len: u64,
    pub held: std::ops::Range<u64>,
}

/// A question of the host's kernel.
struct Request {
    operation: u32,
    unique: u64,
    body: Vec<u8>,
}

impl HeldFile {
    /// Mounts the file over `path` and answers on a thread until the file is mounted no more. Held requests wait until `released`,
    /// which is told how many there are, or until a test that fails must end.
    pub fn mount(self, path: &Path, released: impl Fn(usize) -> bool + Send + 'static) -> PathBuf {
        File::create(path).expect("the scratch folder can be written");
        let mut device = OpenOptions::new().read(true).write(true).open("/dev/fuse").expect("the host has FUSE");
        let options = format!("fd={},rootmode={MODE:o},user_id=0,group_id=0\0", device.as_raw_fd());
        let options =
            std::ffi::CString::from_vec_with_nul(options.into_bytes()).expect("there is one zero, at the end");
        mount("held", path, "fuse", MountFlags::NOSUID | MountFlags::NODEV, Some(options.as_c_str()))
            .expect("root of a mount namespace can mount");
        std::thread::spawn(move || {
            let (mut held, mut open, start): (Vec<Request>, _, _) = (Vec::new(), false, Instant::now());
            loop {
                if !open && (released(held.len()) || start.elapsed() >= HELD_MAX) {
                    open = true;
                    held.drain(..).for_each(|request| self.answer(&mut device, &request));
                }
                match next(&mut device) {
                    Next::Request(request) if !open && self.is_held(&request) => held.push(request),
                    Next::Request(request) => self.answer(&mut device, &request),
                    Next::Nothing => {}
                    Next::Unmounted => return,
                }
            }
        });
        path.to_path_buf()
    }

    fn is_held(&self, request: &Request) -> bool {
        matches!(request.operation, READ | WRITE) && self.held.contains(&word(&request.body, 8))
    }

    fn answer(&self, device: &mut File, request: &Request) {
        let mut body = Vec::new();
        let mut error = 0;
        match request.operation {
            // No answer is expected.
            FORGET | BATCH_FORGET | INTERRUPT => return,
            INIT => {
                VERSION.iter().for_each(|part| body.extend(part.to_le_bytes()));
                body.extend([0; 12]);
                body.extend(WRITE_LEN_MAX.to_le_bytes());
                body.resize(64, 0);
            }
            GETATTR => {
                body.extend([0; 16]);
                [1, self.len, self.len / 512, 0, 0, 0].iter().for_each(|part: &u64| body.extend(part.to_le_bytes()));
                body.extend([0; 12]);
                [MODE, 1, 0, 0, 0, 4096, 0].iter().for_each(|part: &u32| body.extend(part.to_le_bytes()));
            }
            OPEN => [0, OPEN_DIRECT_IO].iter().for_each(|part: &u64| body.extend(part.to_le_bytes())),
            READ => {
                let (offset, size) = (word(&request.body, 8), word(&request.body, 16) & 0xffff_ffff);
                body.resize(size.min(self.len.saturating_sub(offset)) as usize, 0);
            }
            // What is written is taken and forgotten.
            WRITE => body.extend([word(&request.body, 16) & 0xffff_ffff].iter().flat_map(|size| size.to_le_bytes())),
            RELEASE | FLUSH => {}
            _ => error = -ENOSYS,
        }
        let mut answer = (body.len() as u32 + 16).to_le_bytes().to_vec();
        answer.extend(error.to_le_bytes());
        answer.extend(request.unique.to_le_bytes());
        answer.extend(body);
        // A question whose asker has gone meanwhile takes no answer.
        let _ = device.write(&answer);
    }
}

enum Next {
    Request(Request),
    Nothing,
    Unmounted,
}

fn next(device: &mut File) -> Next {
    let wait = Timespec { tv_sec: 0, tv_nsec: LOOK.subsec_nanos().into() };
    let mut ready = [PollFd::new(&*device, PollFlags::IN)];
    if poll(&mut ready, Some(&wait)).is_ok_and(|count| count == 0) {
        return Next::Nothing;
    }
    let mut bytes = vec![0; REQUEST_LEN_MAX];
    match device.read(&mut bytes) {
        Ok(len @ 40..) => {
            let operation = word(&bytes, 0) >> 32;
            Next::Request(Request {
                operation: operation as u32,
                unique: word(&bytes, 8),
                body: bytes[40..len].to_vec(),
            })
        }
        Err(error) if error.kind() == ErrorKind::Interrupted || error.kind() == ErrorKind::NotFound => Next::Nothing,
        _ => Next::Unmounted,
    }
}

/// The eight bytes at an offset, zeros where there are none.
fn word(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.iter_mut().zip(bytes.iter().skip(at)).for_each(|(to, from)| *to = *from);
    u64::from_le_bytes(word)
}
