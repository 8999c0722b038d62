//! What front ends (virtio-block, NBD) and disks say to each other.
//!
//! A [`Disk`] is shared by all its front ends; each thread that uses it opens a [`Queue`] of its own, gives it operations and
//! takes completions, in any order. Nothing here blocks: what has to wait for the host's disk or for another machine is finished
//! elsewhere and announced through [`Queue::signal`].

pub mod memory;
pub(crate) mod open_disk;
pub(crate) mod queue;
mod stream;
mod writing;

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

/// The unit of all offsets and lengths that a front end may use, in bytes.
pub const SECTOR_LEN: u64 = 512;

/// The memory of one request: a vector of bytes, or ranges of guest memory.
pub trait Buffer: Send + 'static {
    /// Bytes in it.
    fn len(&self) -> usize;
    /// Whether it holds nothing.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// Puts bytes that were read from the disk at `at`; `at + bytes.len()` is at most [`Buffer::len`].
    fn put(&mut self, at: usize, bytes: &[u8]);
    /// Puts `len` zeros at `at`. A disk says so wherever it has nothing stored: NBD sends such parts as holes.
    fn put_zeros(&mut self, at: usize, len: usize);
    /// Takes bytes that are to be written to the disk. Called once for each byte: memory of a guest may change under us.
    fn take(&self, at: usize, bytes: &mut [u8]);
    /// The memory of `len` bytes at `at` itself, for a disk that can read into it instead of calling [`Buffer::put`]. Nothing if the
    /// buffer is more than one piece of memory, or others may change it.
    fn space(&mut self, _at: usize, _len: usize) -> Option<&mut [u8]> {
        None
    }
    /// All bytes themselves, instead of [`Buffer::take`]; nothing where [`Buffer::space`] gives nothing.
    fn bytes(&self) -> Option<&[u8]> {
        None
    }
}

impl Buffer for Vec<u8> {
    fn len(&self) -> usize {
        self.len()
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn put_zeros(&mut self, at: usize, len: usize) {
        self[at..at + len].fill(0);
    }

    fn take(&self, at: usize, bytes: &mut [u8]) {
        bytes.copy_from_slice(&self[at..at + bytes.len()]);
    }

    fn space(&mut self, at: usize, len: usize) -> Option<&mut [u8]> {
        Some(&mut self[at..at + len])
    }

    fn bytes(&self) -> Option<&[u8]> {
        Some(self)
    }
}

/// When a change counts as done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Durability {
    /// In the disk's volatile cache: it survives the process if it can, and the host's power only after a flush.
    #[default]
    Cached,
    /// On stable storage ("force unit access").
    Stable,
}

/// What a front end asks of a disk. Offsets and lengths are whole sectors inside the disk; others fail with
/// [`DiskError::OutOfRange`].
#[derive(Debug)]
pub enum Operation<B> {
    /// Fills the buffer.
    Read { offset: u64, buffer: B },
    /// Writes the buffer.
    Write { offset: u64, buffer: B, durability: Durability },
    /// Makes everything stable whose completion was seen before, on any queue.
    Flush,
    /// The range is not needed any more; it reads as zeros afterwards.
    Discard { offset: u64, len: u64, durability: Durability },
    /// The range reads as zeros afterwards.
    WriteZeroes { offset: u64, len: u64, durability: Durability },
}

/// Why an operation failed.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    #[error("bytes {offset} to {end} are not whole sectors inside the disk of {capacity_bytes} bytes")]
    OutOfRange { offset: u64, end: u64, capacity_bytes: u64 },
    #[error("the disk is read-only")]
    ReadOnly,
    #[error("the host's disk is full")]
    NoSpace,
    /// Another process took the disk over; nothing of this one reaches it any more.
    #[error("another process has opened the disk since")]
    Fenced,
    #[error("the host cannot read or write the disk")]
    Io(#[source] io::Error),
    #[error("the disk is damaged: {what}")]
    Damaged { what: String },
    #[error("the disk has no snapshot {name}")]
    NoSuchSnapshot { name: String },
}

/// An operation that came to its end.
#[derive(Debug)]
pub struct Completion<B> {
    /// What it was submitted under.
    pub token: u64,
    /// The buffer of a read or write, given back whatever happened.
    pub buffer: Option<B>,
    pub result: Result<(), DiskError>,
}

/// Whether front ends may write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    ReadOnly,
    ReadWrite,
}

/// A question about the parts of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Question {
    /// Which parts hold data ([`Extent::set`]) and which read as zeros because nothing is stored for them.
    Allocated,
    /// Which parts differ from the named snapshot of this disk.
    ChangedSince(String),
}

/// A part of a disk and the answer about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    pub offset: u64,
    pub len: u64,
    /// Allocated, or changed.
    pub set: bool,
}

/// A disk as its front ends see it. Callable from any thread.
pub trait Disk: Send + Sync + 'static {
    type Queue<B: Buffer>: Queue<B>;

    /// A way to the disk for one thread.
    fn open_queue<B: Buffer>(self: &Arc<Self>) -> Result<Self::Queue<B>, DiskError>;
    /// Its size now, whole sectors. It changes when the disk is resized.
    fn capacity_bytes(&self) -> u64;
    fn access(&self) -> Access;
    /// The size in bytes of the blocks that are cheapest to write whole.
    fn block_bytes(&self) -> u32;
    /// Answers a question about `len` bytes from `offset`: at most `extents_max` parts, in order and without holes between
    /// them, from `offset` on; neighbours have different answers. May wait for the host's disk. A front end asks about one
    /// sector to learn whether a snapshot is there ([`DiskError::NoSuchSnapshot`]).
    fn extents(&self, question: &Question, offset: u64, len: u64, extents_max: usize)
    -> Result<Vec<Extent>, DiskError>;
    /// The names that [`Question::ChangedSince`] takes, newest first, at most `names_max`.
    fn snapshot_names(&self, names_max: usize) -> Result<Vec<String>, DiskError>;
    /// Gives the disk another size, whole sectors. What lies beyond a smaller one is gone.
    fn resize(&self, capacity_bytes: u64) -> Result<(), DiskError>;
}

/// One thread's way to a disk. Dropping it waits until nothing is in flight.
pub trait Queue<B: Buffer> {
    /// Starts an operation; its completion can be there at once.
    fn submit(&mut self, token: u64, operation: Operation<B>);
    /// Takes a completion, if there is one. Operations that were submitted and did not complete at once reach the host with this call.
    fn next_completion(&mut self) -> Option<Completion<B>>;
    /// Operations whose completion was not taken yet.
    fn in_flight(&self) -> usize;
    /// From now on the caller's thread may wait for a sync that is quick, if nothing else is in flight: that spares the way to another
    /// thread and back. A disk whose syncs are slow makes nobody wait for long.
    fn let_flushes_wait(&mut self) {}
    /// Readable (an eventfd, to be read by the caller) when a completion may be there, or the disk got another size.
    fn signal(&self) -> BorrowedFd<'_>;
}
