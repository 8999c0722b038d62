//! One thread's way to a disk of the store.
//!
//! What is in memory, or in the host's page cache, completes at once; small writes wait until the queue is asked for completions, and are
//! carried out together then (`writing`). What has to come from the host's disk goes through io_uring when it
//! is known where it lies, and to a worker thread when it has to be looked up. So the thread that owns the queue never waits for a disk.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use io_uring::{IoUring, opcode, types};
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::ReadWriteFlags;

use crate::disk::open_disk::{OpenDisk, View};
use crate::disk::stream::Run;
use crate::disk::writing::Collected;
use crate::disk::{Buffer, Completion, DiskError, Operation, Queue};
use crate::name::Name;
use crate::records::segment::Location;
use crate::store::{Expected, Read};
use crate::tree::{self, Root, TreeNode};
use crate::volume::layers::Piece;
use crate::volume::log_file::LogFile;

/// Reads that the ring holds; more wait for the next round.
const RING_ENTRIES: u32 = 128;
/// Reads of so many whole chunks are streams: what they read is hardly read again soon, and is not kept.
const STREAM_CHUNKS: usize = 4;

/// A queue of a disk of the store.
pub struct DiskQueue<B: Buffer> {
    pub(super) view: View,
    ring: Option<IoUring>,
    signal: Arc<OwnedFd>,
    ready: VecDeque<Completion<B>>,
    requests: Slots<Request<B>>,
    calls: Slots<Call>,
    /// Calls that wait for room in the ring.
    unsubmitted: bool,
    mailbox: Arc<Mailbox<B>>,
    /// Operations at worker threads.
    at_workers: usize,
    pub(super) collected: Collected<B>,
    pieces: Vec<Piece>,
    pub(super) payload: Vec<u8>,
    /// A record as it was read.
    record: RefCell<Vec<u8>>,
    /// What a part of is wanted.
    content: RefCell<Vec<u8>>,
    /// The thread of the queue may wait for a sync.
    pub(super) may_wait: bool,
    /// How long syncs on this thread take, as a rule.
    pub(super) sync_time: Duration,
    /// When they took long last.
    pub(super) slow_sync: Option<Instant>,
    // Last: what is in flight ends before the disk does.
    _disk: Arc<OpenDisk>,
}

/// Where worker threads leave what they did.
struct Mailbox<B> {
    done: Mutex<Vec<Completion<B>>>,
    len: AtomicUsize,
}

/// An operation of which something is in the ring.
struct Request<B> {
    token: u64,
    buffer: Option<B>,
    offset: u64,
    outstanding: usize,
    /// Something did not go as planned: a worker thread does all of it again.
    again: bool,
}

/// A call in the ring.
struct Call {
    request: usize,
    bytes: Vec<u8>,
    act: Act,
}

enum Act {
    /// Bytes of a log, for the buffer at `at`.
    Log { _file: Arc<LogFile>, at: usize },
    /// A record, of which `len` bytes from `from` on are for the buffer at `at`.
    Record { _file: Arc<File>, name: Name, location: Location, at: usize, from: usize, len: usize },
}

/// Things with a number.
struct Slots<T> {
    slots: Vec<Option<T>>,
    free: Vec<usize>,
}

impl<T> Slots<T> {
    fn new() -> Self {
        Slots { slots: Vec::new(), free: Vec::new() }
    }

    fn insert(&mut self, value: T) -> usize {
        match self.free.pop() {
            Some(slot) => {
                self.slots[slot] = Some(value);
                slot
            }
            None => {
                self.slots.push(Some(value));
                self.slots.len() - 1
            }
        }
    }

    fn get(&mut self, slot: usize) -> Option<&mut T> {
        self.slots.get_mut(slot)?.as_mut()
    }

    fn take(&mut self, slot: usize) -> Option<T> {
        let value = self.slots.get_mut(slot)?.take();
        self.free.extend(value.is_some().then_some(slot));
        value
    }

    fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }
}

/// What became of a piece that was to be had at once.
enum Tried {
    Done,
    /// It has to be read from there.
    Read(Act, u64, usize),
    /// It has to be looked up.
    LookUp,
}

impl<B: Buffer> DiskQueue<B> {
    pub(crate) fn new(disk: Arc<OpenDisk>) -> Result<Self, DiskError> {
        let signal =
            eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).map_err(|error| DiskError::Io(error.into()))?;
        let ring = IoUring::new(RING_ENTRIES).and_then(|ring| {
            ring.submitter().register_eventfd(signal.as_raw_fd())?;
            Ok(ring)
        });
        let ring =
            ring.inspect_err(|error| tracing::info!(%error, "io_uring is not to be had; threads read for the store"));
        let (view, signal) = (disk.view(), Arc::new(signal));
        if let View::Volume(core) = &view {
            core.tell_of_sizes(&signal);
        }
        Ok(DiskQueue {
            view,
            ring: ring.ok(),
            signal,
            ready: VecDeque::new(),
            requests: Slots::new(),
            calls: Slots::new(),
            unsubmitted: false,
            mailbox: Arc::new(Mailbox { done: Mutex::default(), len: AtomicUsize::new(0) }),
            at_workers: 0,
            collected: Collected::default(),
            pieces: Vec::new(),
            payload: Vec::new(),
            record: RefCell::default(),
            content: RefCell::default(),
            may_wait: false,
            sync_time: Duration::ZERO,
            slow_sync: None,
            _disk: disk,
        })
    }

    pub(super) fn complete(&mut self, token: u64, buffer: Option<B>, result: Result<(), DiskError>) {
        self.ready.push_back(Completion { token, buffer, result });
    }

    // Reading

    fn read(&mut self, token: u64, offset: u64, mut buffer: B) {
        if self.collected.overlap(offset, buffer.len()) {
            self.push_out();
        }
        let mut pieces = std::mem::take(&mut self.pieces);
        let planned = self.view.plan(offset, buffer.len(), &mut pieces);
        let root = match planned {
            Ok(root) => root,
            Err(error) => {
                self.pieces = pieces;
                return self.complete(token, Some(buffer), Err(error.into()));
            }
        };
        let mut reads = Vec::new();
        let mut look_up = false;
        let mut at = 0;
        let mut leaf = None;
        let chunk_len = self.view.chunk_len();
        let mut is_stream = buffer.len() >= STREAM_CHUNKS * chunk_len;
        let mut rest = &pieces[..];
        while let [piece, behind @ ..] = rest {
            if is_stream {
                match self.try_run(root, rest, at, &mut buffer, &mut leaf) {
                    Some(0) => {}
                    Some(chunks) => {
                        rest = &rest[chunks..];
                        at += chunks * chunk_len;
                        continue;
                    }
                    // What follows is hardly in memory either, and what is wrong with it is told one by one.
                    None => is_stream = false,
                }
            }
            rest = behind;
            match self.try_piece(root, piece, at, &mut buffer, &mut leaf) {
                Tried::Done => {}
                Tried::Read(act, offset, len) => reads.push((act, offset, len)),
                Tried::LookUp => {
                    look_up = true;
                    break;
                }
            }
            at += piece.len();
        }
        // The pieces hold files of the log, which are used again when nobody does.
        pieces.clear();
        self.pieces = pieces;
        if look_up || !reads.is_empty() && self.ring.is_none() {
            return self.read_by_worker(token, offset, buffer);
        }
        if reads.is_empty() {
            return self.complete(token, Some(buffer), Ok(()));
        }
        let request = self.requests.insert(Request {
            token,
            buffer: Some(buffer),
            offset,
            outstanding: reads.len(),
            again: false,
        });
        for (act, offset, len) in reads {
            let file = match &act {
                Act::Log { _file, .. } => _file.file.as_raw_fd(),
                Act::Record { _file, .. } => _file.as_raw_fd(),
            };
            let call = self.calls.insert(Call { request, bytes: vec![0; len], act });
            let bytes = self.calls.get(call).map_or(std::ptr::null_mut(), |call| call.bytes.as_mut_ptr());
            let entry = opcode::Read::new(types::Fd(file), bytes, len as u32).offset(offset);
            self.push(&entry.build().user_data(call as u64));
        }
    }

    /// Brings a piece into the buffer if that needs no waiting.
    fn try_piece(
        &self,
        root: Root,
        piece: &Piece,
        at: usize,
        buffer: &mut B,
        leaf: &mut Option<(u64, Arc<TreeNode>)>,
    ) -> Tried {
        match piece {
            Piece::Zeros { len } => {
                buffer.put_zeros(at, *len);
                Tried::Done
            }
            Piece::Log { file, offset, len } => {
                let was_read = match buffer.space(at, *len) {
                    Some(space) => read_if_cached(&file.file, space, *offset),
                    None => {
                        let mut bytes = vec![0; *len];
                        let was_read = read_if_cached(&file.file, &mut bytes, *offset);
                        if was_read {
                            buffer.put(at, &bytes);
                        }
                        was_read
                    }
                };
                match was_read {
                    true => Tried::Done,
                    false => Tried::Read(Act::Log { _file: file.clone(), at }, *offset, *len),
                }
            }
            Piece::Sealed(part) => {
                let cached = |bytes: &mut [u8], offset| match read_if_cached(&part.file.file, bytes, offset) {
                    true => Ok(()),
                    false => Err(io::ErrorKind::WouldBlock.into()),
                };
                let was_read = match buffer.space(at, part.len) {
                    Some(space) => part.read_by(space, cached).is_ok(),
                    None => {
                        let mut bytes = vec![0; part.len];
                        let was_read = part.read_by(&mut bytes, cached).is_ok();
                        if was_read {
                            buffer.put(at, &bytes);
                        }
                        was_read
                    }
                };
                // A worker waits for it, and says what is wrong with it.
                if was_read { Tried::Done } else { Tried::LookUp }
            }
            Piece::Named { name, from, len } => match self.view.store().cached_chunk(name, self.view.domain()) {
                Some(content) if content.len() >= from + len => {
                    buffer.put(at, &content[*from..from + len]);
                    Tried::Done
                }
                _ => Tried::LookUp,
            },
            Piece::Chunk { index, from, len } => self.try_chunk(root, *index, *from, *len, at, buffer, leaf),
        }
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "a part of a chunk, its place in the buffer, and the leaf that is kept"
    )]
    fn try_chunk(
        &self,
        root: Root,
        index: u64,
        from: usize,
        len: usize,
        at: usize,
        buffer: &mut B,
        leaf: &mut Option<(u64, Arc<TreeNode>)>,
    ) -> Tried {
        let (store, domain) = (self.view.store(), self.view.domain());
        let (leaf, place) = match self.find_chunk(root, index, leaf) {
            Some(Some(found)) => found,
            Some(None) => {
                buffer.put_zeros(at, len);
                return Tried::Done;
            }
            None => return Tried::LookUp,
        };
        let name = leaf.children[place];
        if let Some(content) = store.cached_chunk(&name, domain)
            && let Some(part) = content.get(from..from + len)
        {
            buffer.put(at, part);
            return Tried::Done;
        }
        let Some(location) = leaf.location(place) else { return Tried::LookUp };
        let Ok(file) = store.file_of(location) else { return Tried::LookUp };
        let mut record = self.record.borrow_mut();
        if record.len() < location.read_len() {
            record.resize(location.read_len(), 0);
        }
        let bytes = &mut record[..location.read_len()];
        let read = read_some_if_cached(&file, bytes, location.offset());
        match read {
            // What is read once is read where it is wanted; what is read again is kept whole.
            Some(read) if !store.was_read_before(&name) => {
                let (bytes, mut content) = (&mut bytes[..read], self.content.borrow_mut());
                match store.part_of(&name, domain, bytes, from..from + len, &mut content) {
                    Some(part) => {
                        buffer.put(at, part);
                        Tried::Done
                    }
                    None => Tried::LookUp,
                }
            }
            Some(read) => match store.content(&name, location, Expected::Data { domain }, &mut bytes[..read]) {
                Ok(Read { content, .. }) if content.len() >= from + len => {
                    store.cache_chunk(&name, domain, &content);
                    buffer.put(at, &content[from..from + len]);
                    Tried::Done
                }
                // The long way finds another copy, or says what is wrong.
                _ => Tried::LookUp,
            },
            None => Tried::Read(
                Act::Record { _file: file, name, location, at, from, len },
                location.offset(),
                location.read_len(),
            ),
        }
    }

    /// The leaf that a chunk is in, which is kept for the next one, and its place there; nothing inside if it is zeros. None if that is not in
    /// memory.
    fn find_chunk<'l>(
        &self,
        root: Root,
        index: u64,
        leaf: &'l mut Option<(u64, Arc<TreeNode>)>,
    ) -> Option<Option<(&'l TreeNode, usize)>> {
        let (store, domain) = (self.view.store(), self.view.domain());
        let place = (index % tree::FAN_OUT as u64) as usize;
        let leaf_index = index / tree::FAN_OUT as u64;
        if leaf.as_ref().is_none_or(|(held, _)| *held != leaf_index) {
            // What is in another domain is for the long way, which says so.
            let node = |name: &Name| store.cached_node(name).filter(|node| node.domain == domain);
            match tree::find_leaf_if(root, index, node)? {
                Some(found) => *leaf = Some((leaf_index, found)),
                None => return Some(None),
            }
        }
        let (_, leaf) = leaf.as_ref()?;
        Some((!leaf.children[place].is_none()).then_some((leaf, place)))
    }

    /// Brings whole chunks that lie one after the other in a segment into the buffer; how many of the first pieces that are. None if there are
    /// some and they are not to be had at once.
    fn try_run(
        &self,
        root: Root,
        pieces: &[Piece],
        at: usize,
        buffer: &mut B,
        leaf: &mut Option<(u64, Arc<TreeNode>)>,
    ) -> Option<usize> {
        let (store, domain, chunk_len) = (self.view.store(), self.view.domain(), self.view.chunk_len());
        let mut run = Run::new(chunk_len, domain);
        for piece in pieces {
            let Piece::Chunk { index, from: 0, len } = piece else { break };
            let Some(Some((leaf, place))) = self.find_chunk(root, *index, leaf).filter(|_| *len == chunk_len) else {
                break;
            };
            let name = leaf.children[place];
            let location = leaf.location(place).filter(|_| store.cached_chunk(&name, domain).is_none());
            if !location.is_some_and(|location| run.add(name, location)) {
                break;
            }
        }
        let Some(start) = run.start() else { return Some(0) };
        let file = store.file_of(start).ok()?;
        let space = buffer.space(at, run.len() * chunk_len)?;
        run.read_if_cached(store, &file, space, &mut self.record.borrow_mut()).then_some(run.len())
    }

    fn read_by_worker(&mut self, token: u64, offset: u64, mut buffer: B) {
        let view = self.view.clone();
        self.by_worker(token, move || {
            let len = buffer.len();
            let result = match buffer.space(0, len) {
                Some(space) => view.read_at(offset, space),
                None => {
                    let mut bytes = vec![0; len];
                    view.read_at(offset, &mut bytes).map(|()| buffer.put(0, &bytes))
                }
            };
            (Some(buffer), result.map_err(DiskError::from))
        });
    }

    /// Has a worker thread carry out an operation.
    pub(super) fn by_worker(
        &mut self,
        token: u64,
        act: impl FnOnce() -> (Option<B>, Result<(), DiskError>) + Send + 'static,
    ) {
        let deliver = self.deliverer();
        self.view.store().workers().run(move || {
            let (buffer, result) = act();
            deliver(Completion { token, buffer, result });
        });
    }

    /// What brings the completion of an operation back that another thread carries out.
    pub(super) fn deliverer(&mut self) -> impl FnOnce(Completion<B>) + Send + use<B> {
        let (mailbox, signal) = (self.mailbox.clone(), self.signal.clone());
        self.at_workers += 1;
        move |completion| {
            mailbox.done.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(completion);
            mailbox.len.fetch_add(1, Ordering::Release);
            // A counter of 2^64 - 1 events cannot overflow.
            let _ = rustix::io::write(&*signal, &1u64.to_ne_bytes());
        }
    }

    // The ring

    fn push(&mut self, entry: &io_uring::squeue::Entry) {
        let Some(ring) = &mut self.ring else { return };
        loop {
            // SAFETY: the buffer and file of the call live in its slot until it completes, and the queue is not dropped before.
            if unsafe { ring.submission().push(entry) }.is_ok() {
                self.unsubmitted = true;
                return;
            }
            submit(ring);
        }
    }

    fn take_from_ring(&mut self) {
        let Some(ring) = &mut self.ring else { return };
        if self.unsubmitted {
            submit(ring);
            self.unsubmitted = false;
        }
        if self.calls.len() == 0 {
            return;
        }
        let mut done = Vec::new();
        loop {
            done.extend(ring.completion().map(|entry| (entry.user_data() as usize, entry.result())));
            // Those that did not fit into the ring come, and signal, when it is entered again.
            if !ring.submission().cq_overflow() || ring.submit().is_err() {
                break;
            }
        }
        for (call, result) in done {
            self.end_call(call, result);
        }
    }

    fn end_call(&mut self, call: usize, result: i32) {
        let Some(mut call) = self.calls.take(call) else { return };
        let (store, domain) = (self.view.store().clone(), self.view.domain());
        let Some(request) = self.requests.get(call.request) else { return };
        let wanted = call.bytes.len();
        let bytes = call.bytes.get_mut(..result.max(0) as usize).unwrap_or_default();
        match call.act {
            Act::Log { at, .. } => match (&mut request.buffer, bytes.len() == wanted) {
                (Some(buffer), true) => buffer.put(at, bytes),
                _ => request.again = true,
            },
            Act::Record { name, location, at, from, len, .. } => {
                match (&mut request.buffer, store.content(&name, location, Expected::Data { domain }, bytes)) {
                    (Some(buffer), Ok(Read { content, .. })) if content.len() >= from + len => {
                        store.cache_chunk(&name, domain, &content);
                        buffer.put(at, &content[from..from + len]);
                    }
                    _ => request.again = true,
                }
            }
        }
        request.outstanding -= 1;
        if request.outstanding == 0 {
            self.end_request(call.request);
        }
    }

    fn end_request(&mut self, request: usize) {
        let Some(request) = self.requests.take(request) else { return };
        match request.buffer {
            Some(buffer) if request.again => self.read_by_worker(request.token, request.offset, buffer),
            buffer => self.complete(request.token, buffer, Ok(())),
        }
    }

    fn take_from_workers(&mut self) {
        if self.mailbox.len.load(Ordering::Acquire) == 0 {
            return;
        }
        let done = std::mem::take(&mut *self.mailbox.done.lock().unwrap_or_else(|poisoned| poisoned.into_inner()));
        self.mailbox.len.fetch_sub(done.len(), Ordering::AcqRel);
        self.at_workers -= done.len();
        self.ready.extend(done);
    }
}

impl<B: Buffer> Queue<B> for DiskQueue<B> {
    fn submit(&mut self, token: u64, operation: Operation<B>) {
        match operation {
            Operation::Read { offset, buffer } => self.read(token, offset, buffer),
            Operation::Write { offset, buffer, durability } => self.write(token, offset, buffer, durability),
            Operation::Flush => self.flush(token, None),
            Operation::Discard { offset, len, durability } | Operation::WriteZeroes { offset, len, durability } => {
                self.zero(token, offset, len, durability);
            }
        }
    }

    fn next_completion(&mut self) -> Option<Completion<B>> {
        if self.ready.is_empty() {
            self.push_out();
        }
        if self.ready.is_empty() || self.unsubmitted {
            self.take_from_ring();
            self.take_from_workers();
        }
        self.ready.pop_front()
    }

    fn let_flushes_wait(&mut self) {
        self.may_wait = true;
    }

    fn in_flight(&self) -> usize {
        self.collected.len() + self.requests.len() + self.at_workers + self.ready.len()
    }

    fn signal(&self) -> BorrowedFd<'_> {
        self.signal.as_fd()
    }
}

impl<B: Buffer> Drop for DiskQueue<B> {
    fn drop(&mut self) {
        self.push_out();
        // The kernel writes into buffers that go with the queue: their calls end first.
        let Some(ring) = &mut self.ring else { return };
        while self.calls.len() > 0 {
            if ring.submit_and_wait(1).is_err_and(|error| error.kind() != io::ErrorKind::Interrupted) {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            let ended: Vec<usize> = ring.completion().map(|entry| entry.user_data() as usize).collect();
            ended.into_iter().for_each(|call| drop(self.calls.take(call)));
        }
    }
}

fn submit(ring: &mut IoUring) {
    while !ring.submission().is_empty() {
        match ring.submit() {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // The kernel is short of memory for a moment, or completions have to be taken first: nothing signals when that ends.
            Err(_) => std::thread::sleep(std::time::Duration::from_millis(1)),
        }
    }
}

/// Reads what the host has in its page cache; how much that is, if it is anything.
fn read_some_if_cached(file: &File, bytes: &mut [u8], offset: u64) -> Option<usize> {
    let wanted = bytes.len();
    let read = rustix::io::preadv2(file, &mut [IoSliceMut::new(bytes)], offset, ReadWriteFlags::NOWAIT).ok()?;
    if read == wanted {
        return Some(read);
    }
    // The rest may lie behind the end of the file, or not be in the cache: only a whole record counts, and that is checked.
    (read >= 64).then_some(read)
}

fn read_if_cached(file: &File, bytes: &mut [u8], offset: u64) -> bool {
    let wanted = bytes.len();
    rustix::io::preadv2(file, &mut [IoSliceMut::new(bytes)], offset, ReadWriteFlags::NOWAIT) == Ok(wanted)
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
