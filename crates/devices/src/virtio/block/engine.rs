//! How requests reach the host: io_uring, or a few threads with plain calls.
//!
//! Both engines raise the worker's signal when something completed. An engine is dropped only when nothing is in flight;
//! whoever submits keeps the vectors, and the guest memory behind them, alive until then.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use io_uring::{IoUring, Probe, opcode, types};

use crate::lock;
use crate::virtio::{Buffers, Signal};

/// Threads of one queue where io_uring is not to be had.
const POOL_THREADS: usize = 4;

/// How requests are to reach the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EngineChoice {
    /// io_uring, and threads where the host refuses it.
    #[default]
    Auto,
    /// Threads, whatever the host offers.
    Threads,
}

/// Host ranges for vectored I/O. They point into guest memory (or at constant zeros), which outlives every request.
pub(super) struct Vectors(Vec<libc::iovec>);

// SAFETY: the pointers are only handed to the kernel; the memory behind them may be touched by any thread.
unsafe impl Send for Vectors {}
// SAFETY: as above.
unsafe impl Sync for Vectors {}

impl Vectors {
    /// The buffers, without their first `skip` bytes.
    pub fn new(buffers: &Buffers, skip: u64) -> Self {
        let left = buffers.slice(skip, buffers.len().saturating_sub(skip));
        let ranges = left.iter().flat_map(Buffers::host_ranges);
        Vectors(ranges.map(|range| libc::iovec { iov_base: range.pointer.cast(), iov_len: range.len }).collect())
    }

    /// `len` zeros.
    pub fn zeros(len: u64) -> Self {
        static ZEROS: [u8; 1 << 16] = [0; 1 << 16];
        let mut vectors = Vec::new();
        let mut left = len;
        while left > 0 {
            let step = left.min(ZEROS.len() as u64);
            vectors.push(libc::iovec { iov_base: ZEROS.as_ptr().cast_mut().cast(), iov_len: step as usize });
            left -= step;
        }
        Vectors(vectors)
    }
}

/// One call to the host.
#[derive(Clone)]
pub(super) enum Call {
    Read { offset: u64, vectors: Arc<Vectors> },
    Write { offset: u64, vectors: Arc<Vectors>, write_through: bool },
    Flush,
    Allocate { mode: i32, offset: u64, len: u64 },
}

/// One of the two engines.
pub(super) enum Engine {
    Ring(Box<Ring>),
    Threads(Threads),
}

impl Engine {
    /// An engine for up to `depth` calls in flight.
    pub fn new(choice: EngineChoice, file: &File, signal: &Arc<Signal>, depth: u16) -> io::Result<Engine> {
        if choice == EngineChoice::Auto {
            match Ring::new(file, signal, depth) {
                Ok(ring) => return Ok(Engine::Ring(Box::new(ring))),
                Err(error) => tracing::info!(%error, "io_uring is not to be had; disks use threads"),
            }
        }
        Ok(Engine::Threads(Threads::new(file, signal)?))
    }

    /// Queues a call under a token; [`Engine::submit`] sends it off.
    pub fn push(&mut self, token: u64, call: &Call) {
        match self {
            Engine::Ring(ring) => ring.push(token, call),
            Engine::Threads(threads) => threads.push(token, call.clone()),
        }
    }

    /// Sends all queued calls off.
    pub fn submit(&mut self) {
        if let Engine::Ring(ring) = self {
            ring.submit();
        }
    }

    /// Takes what completed: (token, result as of the system call, errors negative).
    pub fn completions(&mut self) -> Vec<(u64, i32)> {
        match self {
            Engine::Ring(ring) => ring.ring.completion().map(|entry| (entry.user_data(), entry.result())).collect(),
            Engine::Threads(threads) => std::mem::take(&mut *lock(&threads.shared.done)),
        }
    }
}

pub(super) struct Ring {
    ring: IoUring,
    file: RawFd,
    /// Kept open for the ring.
    _file: File,
}

impl Ring {
    fn new(file: &File, signal: &Signal, depth: u16) -> io::Result<Self> {
        let ring = IoUring::new(u32::from(depth))?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let needed = [opcode::Readv::CODE, opcode::Writev::CODE, opcode::Fsync::CODE, opcode::Fallocate::CODE];
        if !needed.iter().all(|&code| probe.is_supported(code)) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        ring.submitter().register_eventfd(std::os::fd::AsFd::as_fd(signal).as_raw_fd())?;
        let file = file.try_clone()?;
        Ok(Ring { ring, file: file.as_raw_fd(), _file: file })
    }

    fn push(&mut self, token: u64, call: &Call) {
        let file = types::Fd(self.file);
        let entry = match call {
            Call::Read { offset, vectors } => {
                opcode::Readv::new(file, vectors.0.as_ptr(), vectors.0.len() as u32).offset(*offset).build()
            }
            Call::Write { offset, vectors, write_through } => {
                let flags = if *write_through { libc::RWF_DSYNC } else { 0 };
                opcode::Writev::new(file, vectors.0.as_ptr(), vectors.0.len() as u32)
                    .offset(*offset)
                    .rw_flags(flags)
                    .build()
            }
            Call::Flush => opcode::Fsync::new(file).flags(types::FsyncFlags::DATASYNC).build(),
            Call::Allocate { mode, offset, len } => {
                opcode::Fallocate::new(file, *len).offset(*offset).mode(*mode).build()
            }
        }
        .user_data(token);
        loop {
            // SAFETY: the caller keeps the vectors and the memory behind them alive until the call completes.
            if unsafe { self.ring.submission().push(&entry) }.is_ok() {
                return;
            }
            self.submit();
        }
    }

    fn submit(&mut self) {
        while !self.ring.submission().is_empty() {
            match self.ring.submit() {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // The kernel is short of memory for requests for a moment: nothing signals when that ends.
                Err(_) => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    }
}

struct Jobs {
    waiting: VecDeque<(u64, Call)>,
    stop: bool,
}

struct Pool {
    file: File,
    signal: Arc<Signal>,
    /// Bounded by the worker, which has no more in flight than its queue has entries.
    jobs: Mutex<Jobs>,
    available: Condvar,
    done: Mutex<Vec<(u64, i32)>>,
}

pub(super) struct Threads {
    shared: Arc<Pool>,
    threads: Vec<JoinHandle<()>>,
}

impl Threads {
    fn new(file: &File, signal: &Arc<Signal>) -> io::Result<Self> {
        let shared = Arc::new(Pool {
            file: file.try_clone()?,
            signal: signal.clone(),
            jobs: Mutex::new(Jobs { waiting: VecDeque::new(), stop: false }),
            available: Condvar::new(),
            done: Mutex::new(Vec::new()),
        });
        let mut pool = Threads { shared, threads: Vec::new() };
        for _ in 0..POOL_THREADS {
            let shared = pool.shared.clone();
            let thread = std::thread::Builder::new().name("virtio-block-io".to_owned()).spawn(move || shared.work());
            match thread {
                Ok(thread) => pool.threads.push(thread),
                Err(error) if pool.threads.is_empty() => return Err(error),
                Err(_) => break,
            }
        }
        Ok(pool)
    }

    fn push(&self, token: u64, call: Call) {
        lock(&self.shared.jobs).waiting.push_back((token, call));
        self.shared.available.notify_one();
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        lock(&self.shared.jobs).stop = true;
        self.shared.available.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Pool {
    fn work(&self) {
        let mut jobs = lock(&self.jobs);
        loop {
            if let Some((token, call)) = jobs.waiting.pop_front() {
                drop(jobs);
                let result = run(self.file.as_raw_fd(), &call);
                lock(&self.done).push((token, result));
                self.signal.raise();
                jobs = lock(&self.jobs);
            } else if jobs.stop {
                return;
            } else {
                jobs = self.available.wait(jobs).unwrap_or_else(|poisoned| poisoned.into_inner());
            }
        }
    }
}

fn run(file: RawFd, call: &Call) -> i32 {
    loop {
        let result = match call {
            Call::Read { offset, vectors } => {
                // SAFETY: the vectors and the memory behind them live until the call is done.
                unsafe { libc::preadv(file, vectors.0.as_ptr(), vectors.0.len() as i32, *offset as i64) }
            }
            Call::Write { offset, vectors, write_through } => {
                let flags = if *write_through { libc::RWF_DSYNC } else { 0 };
                // SAFETY: as above.
                unsafe { libc::pwritev2(file, vectors.0.as_ptr(), vectors.0.len() as i32, *offset as i64, flags) }
            }
            // SAFETY: no pointers.
            Call::Flush => unsafe { libc::fdatasync(file) as isize },
            Call::Allocate { mode, offset, len } => {
                // SAFETY: no pointers.
                unsafe { libc::fallocate(file, *mode, *offset as i64, *len as i64) as isize }
            }
        };
        if result >= 0 {
            return result.min(i32::MAX as isize) as i32;
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return -error.raw_os_error().unwrap_or(libc::EIO);
        }
    }
}
