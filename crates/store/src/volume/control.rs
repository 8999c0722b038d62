//! How other processes of the host reach a volume that one has open: a Unix socket in the volume's folder.
//!
//! A request is a line, and so is the answer: `ok`, or `error` and why. None is carried out once the socket is closed: whoever opens the
//! volume next would not know of it.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::error::{Result, StoreError};
use crate::volume::core::Core;

const SOCKET: &str = "control";
/// Longest line.
const LINE_LEN_MAX: u64 = 4096;
/// Requests that are worked on at a time; others are refused.
const REQUESTS_MAX: usize = 16;
/// How long a request may take to arrive.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long an answer may take: a whole log may have to be moved.
const ANSWER_PATIENCE: Duration = Duration::from_secs(600);

/// The socket of a volume that is open.
pub(crate) struct ControlSocket {
    stop: Arc<AtomicBool>,
    door: Arc<Door>,
    socket: UnixListener,
    folder: std::path::PathBuf,
    thread: Option<JoinHandle<()>>,
}

/// What requests go through to be carried out.
#[derive(Default)]
struct Door {
    state: Mutex<DoorState>,
    left: Condvar,
}

#[derive(Default)]
struct DoorState {
    closed: bool,
    /// Requests that are being carried out.
    inside: usize,
}

impl Door {
    fn state(&self) -> MutexGuard<'_, DoorState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Carries something out, unless it is too late.
    fn through(&self, act: impl FnOnce() -> Result<()>) -> Result<()> {
        {
            let mut state = self.state();
            if state.closed {
                return Err(StoreError::Refused("the volume is being closed".to_owned()));
            }
            state.inside += 1;
        }
        let result = act();
        self.state().inside -= 1;
        self.left.notify_all();
        result
    }

    /// Lets nobody in any more, and waits for those who are.
    fn close(&self) {
        let mut state = self.state();
        state.closed = true;
        while state.inside > 0 {
            state = self.left.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// A short way to a folder, as paths of sockets are limited to 107 bytes.
fn in_folder<T>(folder: &Path, act: impl FnOnce(&Path) -> io::Result<T>) -> io::Result<T> {
    let opened = File::open(folder)?;
    act(&Path::new("/proc/self/fd").join(opened.as_raw_fd().to_string()).join(SOCKET))
}

impl ControlSocket {
    /// Listens in the volume's folder. The caller has the volume's lock: what lies there is of a process that is gone.
    pub fn open(core: &Arc<Core>) -> Result<Self> {
        let folder = core.folder.clone();
        let path = folder.join(SOCKET);
        let listening = (|| {
            let _ = std::fs::remove_file(&path);
            let listener = in_folder(&folder, |path| UnixListener::bind(path))?;
            let stop = Arc::new(AtomicBool::new(false));
            let door = Arc::new(Door::default());
            let socket = listener.try_clone()?;
            let thread = std::thread::Builder::new().name("volume-control".to_owned()).spawn({
                let (core, stop, door) = (core.clone(), stop.clone(), door.clone());
                move || serve(&listener, &core, &stop, &door)
            })?;
            Ok(ControlSocket { stop, door, socket, folder: folder.clone(), thread: Some(thread) })
        })();
        listening.map_err(StoreError::file("listen at", &path))
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        // Wakes the thread, even where the folder cannot be reached any more.
        let _ = rustix::net::shutdown(&self.socket, rustix::net::Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        self.door.close();
        let _ = std::fs::remove_file(self.folder.join(SOCKET));
    }
}

fn serve(listener: &UnixListener, core: &Arc<Core>, stop: &AtomicBool, door: &Arc<Door>) {
    let working = Arc::new(AtomicUsize::new(0));
    for stream in listener.incoming() {
        if stop.load(Ordering::SeqCst) {
            break;
        }
        let Ok(mut stream) = stream else { continue };
        if working.fetch_add(1, Ordering::SeqCst) >= REQUESTS_MAX {
            let _ = writeln!(stream, "error the volume is busy with {REQUESTS_MAX} requests");
            working.fetch_sub(1, Ordering::SeqCst);
            continue;
        }
        let (core, done, door) = (core.clone(), working.clone(), door.clone());
        let spawned = std::thread::Builder::new().name("volume-request".to_owned()).spawn(move || {
            // A peer that went away gets no answer.
            let _ = answer(&core, &door, &stream);
            done.fetch_sub(1, Ordering::SeqCst);
        });
        if spawned.is_err() {
            working.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

fn answer(core: &Arc<Core>, door: &Door, mut stream: &UnixStream) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut line = String::new();
    BufReader::new(stream.take(LINE_LEN_MAX)).read_line(&mut line)?;
    let mut words = line.split_whitespace();
    let done = door.through(|| match (words.next(), words.next(), words.next()) {
        (Some("compact"), None, None) => core.compact(),
        (Some("snapshot"), Some(name), None) => core.snapshot(name).map(drop),
        (Some("resize"), Some(bytes), None) => match bytes.parse() {
            Ok(bytes) => core.resize(bytes),
            Err(_) => Err(StoreError::Refused(format!("{bytes:?} is no size"))),
        },
        _ => Err(StoreError::Refused("that is no request".to_owned())),
    });
    match done {
        Ok(()) => writeln!(stream, "ok"),
        Err(error) => {
            let mut text = error.to_string();
            let mut cause = std::error::Error::source(&error);
            while let Some(source) = cause {
                text += &format!(": {source}");
                cause = source.source();
            }
            writeln!(stream, "error {}", text.replace('\n', " "))
        }
    }
}

fn request(folder: &Path, line: &str) -> Result<()> {
    let answer = (|| {
        let mut stream = in_folder(folder, |path| UnixStream::connect(path))?;
        stream.set_read_timeout(Some(ANSWER_PATIENCE))?;
        writeln!(stream, "{line}")?;
        let mut answer = String::new();
        BufReader::new(stream.take(LINE_LEN_MAX)).read_line(&mut answer)?;
        Ok(answer)
    })();
    let answer = answer.map_err(StoreError::file("ask the process that has open the volume in", folder))?;
    match answer.trim_end().split_once(' ').unwrap_or((answer.trim_end(), "")) {
        ("ok", _) => Ok(()),
        ("error", why) => Err(StoreError::Refused(why.to_owned())),
        _ => Err(StoreError::Refused("the process that has the volume open gave no answer".to_owned())),
    }
}

/// Asks the process that has a volume open to move what was written into the tree.
pub(crate) fn compact(folder: &Path) -> Result<()> {
    request(folder, "compact")
}

/// Asks it for a snapshot.
pub(crate) fn snapshot(folder: &Path, name: &str) -> Result<()> {
    request(folder, &format!("snapshot {name}"))
}

/// Asks it for another size.
pub(crate) fn resize(folder: &Path, capacity_bytes: u64) -> Result<()> {
    request(folder, &format!("resize {capacity_bytes}"))
}
