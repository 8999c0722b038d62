//! A disk in memory: what tests and fuzz targets of the front ends serve, and what the front ends are measured with.
//!
//! It keeps every promise of [`Disk`], and it can be told to fail ([`MemoryDisk::fail_when`]) and to take its time
//! ([`MemoryDisk::hold`]).

use crate::disk::{
    Access, Buffer, Completion, Disk, DiskError, Durability, Extent, Operation, Question, Queue, SECTOR_LEN,
};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak};

/// The unit of allocation and of changes since a snapshot, in bytes.
pub const CHUNK_LEN: usize = 16 * 1024;

type Chunk = [u8; CHUNK_LEN];
type Chunks = Vec<Option<Arc<Chunk>>>;

/// What kind of operation is about to run; the argument of [`MemoryDisk::fail_when`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OperationKind {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes,
}

/// Decides about one operation: its kind, offset and length.
type Fault = dyn Fn(OperationKind, u64, u64) -> Option<DiskError> + Send + Sync;

/// A disk in memory.
pub struct MemoryDisk {
    contents: RwLock<Contents>,
    access: Access,
    faulty: AtomicBool,
    fault: Mutex<Option<Box<Fault>>>,
    held: AtomicBool,
    held_operations: AtomicUsize,
    lagging: AtomicBool,
    signals: Mutex<Vec<Weak<OwnedFd>>>,
    flushes: AtomicU64,
    stable_writes: AtomicU64,
}

struct Contents {
    capacity_bytes: u64,
    chunks: Chunks,
    /// The newest last.
    snapshots: Vec<(String, Chunks)>,
}

impl MemoryDisk {
    /// A disk full of zeros; `capacity_bytes` is whole sectors.
    pub fn new(capacity_bytes: u64) -> Self {
        Self::with_access(capacity_bytes, Access::ReadWrite)
    }

    /// A disk full of zeros that may not be writable.
    pub fn with_access(capacity_bytes: u64, access: Access) -> Self {
        assert_eq!(capacity_bytes % SECTOR_LEN, 0, "a disk has whole sectors");
        let chunks = vec![None; chunks_for(capacity_bytes)];
        Self {
            contents: RwLock::new(Contents { capacity_bytes, chunks, snapshots: Vec::new() }),
            access,
            faulty: AtomicBool::new(false),
            fault: Mutex::new(None),
            held: AtomicBool::new(false),
            held_operations: AtomicUsize::new(0),
            lagging: AtomicBool::new(false),
            signals: Mutex::new(Vec::new()),
            flushes: AtomicU64::new(0),
            stable_writes: AtomicU64::new(0),
        }
    }

    /// From now on an operation fails if `fault` says so.
    pub fn fail_when(&self, fault: impl Fn(OperationKind, u64, u64) -> Option<DiskError> + Send + Sync + 'static) {
        *lock(&self.fault) = Some(Box::new(fault));
        self.faulty.store(true, Ordering::Release);
    }

    /// From now on nothing completes, until [`MemoryDisk::release`].
    pub fn hold(&self) {
        self.held.store(true, Ordering::Release);
    }

    /// What is held completes, the last first, and everything else at once again.
    pub fn release(&self) {
        self.held.store(false, Ordering::Release);
        for signal in lock(&self.signals).iter().filter_map(Weak::upgrade) {
            ring(&signal);
        }
    }

    /// Operations that wait for [`MemoryDisk::release`].
    pub fn held_operations(&self) -> usize {
        self.held_operations.load(Ordering::Acquire)
    }

    /// From now on no operation completes before its queue was asked once in vain; then all do, the last first.
    pub fn lag(&self) {
        self.lagging.store(true, Ordering::Release);
    }

    /// Remembers what the disk holds now under a name.
    pub fn snapshot(&self, name: &str) {
        let mut contents = self.contents_mut();
        let chunks = contents.chunks.clone();
        contents.snapshots.push((name.to_owned(), chunks));
    }

    /// Flushes that succeeded.
    pub fn flushes(&self) -> u64 {
        self.flushes.load(Ordering::Relaxed)
    }

    /// Changes that succeeded and were to be stable at once.
    pub fn stable_writes(&self) -> u64 {
        self.stable_writes.load(Ordering::Relaxed)
    }

    fn contents(&self) -> RwLockReadGuard<'_, Contents> {
        self.contents.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn contents_mut(&self) -> RwLockWriteGuard<'_, Contents> {
        self.contents.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn run<B: Buffer>(&self, token: u64, operation: Operation<B>) -> Completion<B> {
        match operation {
            Operation::Read { offset, mut buffer } => {
                let result = self.check(OperationKind::Read, offset, buffer.len() as u64).and_then(|()| {
                    let contents = self.contents();
                    contents.check(offset, buffer.len() as u64)?;
                    contents.read(offset, &mut buffer);
                    Ok(())
                });
                Completion { token, buffer: Some(buffer), result }
            }
            Operation::Write { offset, buffer, durability } => {
                let result = self.check(OperationKind::Write, offset, buffer.len() as u64).and_then(|()| {
                    let mut contents = self.contents_mut();
                    contents.check(offset, buffer.len() as u64)?;
                    contents.write(offset, &buffer);
                    self.count(durability);
                    Ok(())
                });
                Completion { token, buffer: Some(buffer), result }
            }
            Operation::Flush => {
                let result = self.check(OperationKind::Flush, 0, 0);
                if result.is_ok() {
                    self.flushes.fetch_add(1, Ordering::Relaxed);
                }
                Completion { token, buffer: None, result }
            }
            Operation::Discard { offset, len, durability } => {
                let result = self.zero(OperationKind::Discard, offset, len, durability);
                Completion { token, buffer: None, result }
            }
            Operation::WriteZeroes { offset, len, durability } => {
                let result = self.zero(OperationKind::WriteZeroes, offset, len, durability);
                Completion { token, buffer: None, result }
            }
        }
    }

    fn zero(&self, kind: OperationKind, offset: u64, len: u64, durability: Durability) -> Result<(), DiskError> {
        self.check(kind, offset, len)?;
        let mut contents = self.contents_mut();
        contents.check(offset, len)?;
        contents.zero(offset, len);
        self.count(durability);
        Ok(())
    }

    fn check(&self, kind: OperationKind, offset: u64, len: u64) -> Result<(), DiskError> {
        if self.access == Access::ReadOnly && !matches!(kind, OperationKind::Read | OperationKind::Flush) {
            return Err(DiskError::ReadOnly);
        }
        if self.faulty.load(Ordering::Acquire)
            && let Some(fault) = lock(&self.fault).as_ref()
            && let Some(error) = fault(kind, offset, len)
        {
            return Err(error);
        }
        Ok(())
    }

    fn count(&self, durability: Durability) {
        if durability == Durability::Stable {
            self.stable_writes.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Contents {
    fn check(&self, offset: u64, len: u64) -> Result<(), DiskError> {
        let end = offset.saturating_add(len);
        if end > self.capacity_bytes || !offset.is_multiple_of(SECTOR_LEN) || !len.is_multiple_of(SECTOR_LEN) {
            return Err(DiskError::OutOfRange { offset, end, capacity_bytes: self.capacity_bytes });
        }
        Ok(())
    }

    fn read<B: Buffer>(&self, offset: u64, buffer: &mut B) {
        for part in parts(offset, buffer.len()) {
            match &self.chunks[part.chunk] {
                Some(chunk) => buffer.put(part.at, &chunk[part.from..part.from + part.len]),
                None => buffer.put_zeros(part.at, part.len),
            }
        }
    }

    fn write<B: Buffer>(&mut self, offset: u64, buffer: &B) {
        for part in parts(offset, buffer.len()) {
            let chunk = self.chunks[part.chunk].get_or_insert_with(empty_chunk);
            buffer.take(part.at, &mut Arc::make_mut(chunk)[part.from..part.from + part.len]);
        }
    }

    fn zero(&mut self, offset: u64, len: u64) {
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let (index, from) = ((at / CHUNK_LEN as u64) as usize, (at % CHUNK_LEN as u64) as usize);
            let part_len = (CHUNK_LEN - from).min((end - at) as usize);
            if part_len == CHUNK_LEN {
                self.chunks[index] = None;
            } else if let Some(chunk) = &mut self.chunks[index] {
                Arc::make_mut(chunk)[from..from + part_len].fill(0);
            }
            at += part_len as u64;
        }
    }
}

/// The part of a request that lies in one chunk.
struct Part {
    chunk: usize,
    from: usize,
    /// Where it is in the request's buffer.
    at: usize,
    len: usize,
}

fn parts(offset: u64, len: usize) -> impl Iterator<Item = Part> {
    let mut at = 0;
    std::iter::from_fn(move || {
        if at == len {
            return None;
        }
        let position = offset + at as u64;
        let from = (position % CHUNK_LEN as u64) as usize;
        let part =
            Part { chunk: (position / CHUNK_LEN as u64) as usize, from, at, len: (CHUNK_LEN - from).min(len - at) };
        at += part.len;
        Some(part)
    })
}

fn chunks_for(capacity_bytes: u64) -> usize {
    capacity_bytes.div_ceil(CHUNK_LEN as u64) as usize
}

fn empty_chunk() -> Arc<Chunk> {
    Arc::new([0; CHUNK_LEN])
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn ring(signal: &OwnedFd) {
    // A full counter is readable as well.
    let _ = rustix::io::write(signal, &1u64.to_ne_bytes());
}

impl Disk for MemoryDisk {
    type Queue<B: Buffer> = MemoryQueue<B>;

    fn open_queue<B: Buffer>(self: &Arc<Self>) -> Result<MemoryQueue<B>, DiskError> {
        let signal = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map(Arc::new)
            .map_err(|error| DiskError::Io(error.into()))?;
        let mut signals = lock(&self.signals);
        signals.retain(|signal| signal.strong_count() > 0);
        signals.push(Arc::downgrade(&signal));
        Ok(MemoryQueue { disk: self.clone(), signal, held: Vec::new(), completed: VecDeque::new(), asked: false })
    }

    fn capacity_bytes(&self) -> u64 {
        self.contents().capacity_bytes
    }

    fn access(&self) -> Access {
        self.access
    }

    fn block_bytes(&self) -> u32 {
        4096
    }

    fn extents(
        &self,
        question: &Question,
        offset: u64,
        len: u64,
        extents_max: usize,
    ) -> Result<Vec<Extent>, DiskError> {
        let contents = self.contents();
        contents.check(offset, len)?;
        let before = match question {
            Question::Allocated => None,
            Question::ChangedSince(name) => Some(
                contents
                    .snapshots
                    .iter()
                    .find(|(snapshot, _)| snapshot == name)
                    .map(|(_, chunks)| chunks)
                    .ok_or_else(|| DiskError::NoSuchSnapshot { name: name.clone() })?,
            ),
        };
        let is_set = |index: usize| {
            let now = &contents.chunks[index];
            match before {
                None => now.is_some(),
                Some(before) => match (before.get(index).and_then(Option::as_ref), now) {
                    (None, None) => false,
                    (Some(before), Some(now)) => !Arc::ptr_eq(before, now) && before != now,
                    _ => true,
                },
            }
        };
        let mut extents: Vec<Extent> = Vec::new();
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let index = (at / CHUNK_LEN as u64) as usize;
            let part_len = (CHUNK_LEN as u64 - at % CHUNK_LEN as u64).min(end - at);
            let set = is_set(index);
            if let Some(last) = extents.last_mut().filter(|last| last.set == set) {
                last.len += part_len;
            } else if extents.len() == extents_max {
                break;
            } else {
                extents.push(Extent { offset: at, len: part_len, set });
            }
            at += part_len;
        }
        Ok(extents)
    }

    fn snapshot_names(&self, names_max: usize) -> Result<Vec<String>, DiskError> {
        Ok(self.contents().snapshots.iter().rev().take(names_max).map(|(name, _)| name.clone()).collect())
    }

    fn resize(&self, capacity_bytes: u64) -> Result<(), DiskError> {
        let mut contents = self.contents_mut();
        let old_bytes = contents.capacity_bytes;
        if !capacity_bytes.is_multiple_of(SECTOR_LEN) {
            return Err(DiskError::OutOfRange { offset: 0, end: capacity_bytes, capacity_bytes: old_bytes });
        }
        if capacity_bytes < old_bytes {
            contents.zero(capacity_bytes, old_bytes - capacity_bytes);
        }
        contents.chunks.resize(chunks_for(capacity_bytes), None);
        contents.capacity_bytes = capacity_bytes;
        Ok(())
    }
}

/// One thread's way to a [`MemoryDisk`].
pub struct MemoryQueue<B> {
    disk: Arc<MemoryDisk>,
    signal: Arc<OwnedFd>,
    held: Vec<(u64, Operation<B>)>,
    completed: VecDeque<Completion<B>>,
    /// Whether it was asked for a completion since something is held.
    asked: bool,
}

impl<B: Buffer> Queue<B> for MemoryQueue<B> {
    fn submit(&mut self, token: u64, operation: Operation<B>) {
        let waits = self.disk.held.load(Ordering::Acquire);
        if waits || self.disk.lagging.load(Ordering::Acquire) {
            self.held.push((token, operation));
            self.disk.held_operations.fetch_add(1, Ordering::Release);
            self.asked = false;
        } else {
            self.completed.push_back(self.disk.run(token, operation));
        }
        if !waits && !self.held.is_empty() {
            ring(&self.signal);
        }
    }

    fn next_completion(&mut self) -> Option<Completion<B>> {
        if !self.held.is_empty() && !self.disk.held.load(Ordering::Acquire) {
            if !self.asked && self.disk.lagging.load(Ordering::Acquire) {
                self.asked = true;
                ring(&self.signal);
                return self.completed.pop_front();
            }
            while let Some((token, operation)) = self.held.pop() {
                self.disk.held_operations.fetch_sub(1, Ordering::Release);
                self.completed.push_back(self.disk.run(token, operation));
            }
        }
        self.completed.pop_front()
    }

    fn in_flight(&self) -> usize {
        self.held.len() + self.completed.len()
    }

    fn signal(&self) -> BorrowedFd<'_> {
        self.signal.as_fd()
    }
}

impl<B> Drop for MemoryQueue<B> {
    fn drop(&mut self) {
        self.disk.held_operations.fetch_sub(self.held.len(), Ordering::Release);
        // Who holds the disk releases it; until then the operations are in flight.
        while !self.held.is_empty() && self.disk.held.load(Ordering::Acquire) {
            let mut fds = [PollFd::new(&*self.signal, PollFlags::IN)];
            let _ = poll(&mut fds, None);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn complete<B: Buffer>(queue: &mut MemoryQueue<B>, operation: Operation<B>) -> Completion<B> {
        queue.submit(7, operation);
        queue.next_completion().expect("nothing is held")
    }

    #[test]
    fn extents_and_changes_follow_what_is_written() {
        let disk = Arc::new(MemoryDisk::new(8 * CHUNK_LEN as u64));
        let mut queue = disk.open_queue::<Vec<u8>>().unwrap();
        let write = |offset| Operation::Write { offset, buffer: vec![5; 512], durability: Durability::Cached };
        complete(&mut queue, write(CHUNK_LEN as u64 + 512)).result.unwrap();
        disk.snapshot("one");
        complete(&mut queue, write(4 * CHUNK_LEN as u64)).result.unwrap();
        let len = disk.capacity_bytes();
        let set = |question| -> Vec<(u64, u64)> {
            let extents = disk.extents(&question, 0, len, 100).unwrap();
            assert_eq!(extents.iter().map(|extent| extent.len).sum::<u64>(), len);
            extents.iter().filter(|extent| extent.set).map(|extent| (extent.offset, extent.len)).collect()
        };
        let chunk = CHUNK_LEN as u64;
        assert_eq!(set(Question::Allocated), [(chunk, chunk), (4 * chunk, chunk)]);
        assert_eq!(set(Question::ChangedSince("one".into())), [(4 * chunk, chunk)]);
        let unknown = disk.extents(&Question::ChangedSince("two".into()), 0, 512, 1);
        assert!(matches!(unknown, Err(DiskError::NoSuchSnapshot { .. })));
        assert_eq!(disk.extents(&Question::Allocated, 0, len, 2).unwrap().len(), 2);
    }

    #[test]
    fn what_is_held_completes_after_its_release_the_last_first() {
        let disk = Arc::new(MemoryDisk::new(1 << 20));
        let mut queue = disk.open_queue::<Vec<u8>>().unwrap();
        disk.hold();
        queue.submit(1, Operation::Flush);
        queue.submit(2, Operation::Flush);
        assert!(queue.next_completion().is_none());
        assert_eq!(queue.in_flight(), 2);
        assert_eq!(disk.held_operations(), 2);
        disk.release();
        let mut fds = [PollFd::from_borrowed_fd(queue.signal(), PollFlags::IN)];
        assert_eq!(poll(&mut fds, None).unwrap(), 1);
        assert_eq!(queue.next_completion().map(|completion| completion.token), Some(2));
        assert_eq!(queue.next_completion().map(|completion| completion.token), Some(1));
        assert_eq!(disk.flushes(), 2);
    }

    #[test]
    fn a_disk_that_lags_completes_when_it_is_asked_again() {
        let disk = Arc::new(MemoryDisk::new(1 << 20));
        let mut queue = disk.open_queue::<Vec<u8>>().unwrap();
        disk.lag();
        for token in 1..=2 {
            queue.submit(token, Operation::Flush);
        }
        assert!(queue.next_completion().is_none());
        let mut fds = [PollFd::from_borrowed_fd(queue.signal(), PollFlags::IN)];
        assert_eq!(poll(&mut fds, None).unwrap(), 1);
        assert_eq!(queue.next_completion().map(|completion| completion.token), Some(2));
        assert_eq!(queue.next_completion().map(|completion| completion.token), Some(1));
        assert_eq!(queue.in_flight(), 0);
    }
}
