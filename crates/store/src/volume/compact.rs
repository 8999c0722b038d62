//! The thread of a volume: moves what was written into the tree, and keeps the next file of the log ready.
//!
//! It works a generation at a time: chunks are filled, hashed and stored, the tree's nodes after them, then everything is synced, then
//! the head says so. Doing it again after a crash finds the same chunks there already. It holds no lock that a write or a flush waits
//! for, and runs at low priority.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::catalog::SnapshotRow;
use crate::error::{Result, StoreError};
use crate::id::Id;
use crate::name::Name;
use crate::node::{Node, Tree};
use crate::pace::Pace;
use crate::store::{Batch, is_zero};
use crate::tree::reader::TreeReader;
use crate::tree::{self, Root};
use crate::volume::core::Core;
use crate::volume::extent_map::{BLOCK_LEN, ChunkPlace, ExtentMap, LogPlace, Place};
use crate::volume::head::{Head, State};
use crate::volume::layers::{Frozen, lay};
use crate::volume::log_file;
use crate::volume::log_file::LogFile;
use crate::volume::log_record::{Change, Position};

/// How soon a failed move is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// Chunks that are put into the tree at a time.
const CHANGES_MAX: usize = 16 << 10;
/// Niceness of the thread: what it does can wait.
const NICENESS: i32 = 10;
/// Beside writers the log is moved at most so fast, until it is three quarters full: what is moved is written a second time, and flushes
/// wait for the host's disk.
const BYTES_PER_SECOND_BESIDE_WRITERS: u64 = 64 << 20;
/// Bytes of chunks after which the thread looks around.
const STEP_LEN: u64 = 1 << 20;
/// Writers that were seen so recently are still there.
const WRITERS_SEEN: Duration = Duration::from_millis(300);

/// What the thread does until the volume is closed.
pub(crate) fn run(core: &Arc<Core>, head: Head) {
    // SAFETY: no pointers; it concerns this thread only.
    if unsafe { libc::setpriority(libc::PRIO_PROCESS, libc::gettid() as libc::id_t, NICENESS) } != 0 {
        tracing::debug!("the priority of a volume's thread cannot be lowered");
    }
    let mut mover = Mover { core, head, retired: Vec::new(), quiet: Quiet::default() };
    loop {
        make_spare(core);
        match mover.wait() {
            Next::Stop => break,
            Next::Look => continue,
            Next::Move => {}
        }
        let moved = mover.move_generation();
        let mut work = core.work();
        match moved {
            Ok(()) => {
                work.done = mover.head.state.position.sequence;
                work.failure = None;
                core.progress.notify_all();
            }
            // The log keeps what was not moved.
            Err(_) if work.stop => {
                work.failure = Some("the volume is being closed".to_owned());
                core.progress.notify_all();
            }
            Err(error) => {
                tracing::warn!(volume = core.row.name, %error, "what was written cannot be moved into the store");
                let source = std::error::Error::source(&error).map(|source| format!(": {source}")).unwrap_or_default();
                work.failure = Some(format!("{error}{source}"));
                core.progress.notify_all();
                if error.is_no_space() {
                    drop(work);
                    core.wait_for_room_makers();
                } else if !work.stop {
                    drop(core.wake.wait_timeout(work, RETRY).unwrap_or_else(|poisoned| poisoned.into_inner()));
                }
            }
        }
    }
    mover.leave_nothing();
}

/// Sees to it that the log can go on in a file whose blocks are written already.
fn make_spare(core: &Core) {
    if !core.lacks_spare() || core.store.is_room_being_made() {
        return;
    }
    let spares = core.store.spares();
    let made = spares.look().and_then(|()| match core.lacks_spare() && core.is_worth_a_spare() {
        true => spares.make(core.options.log_file_len()),
        false => Ok(()),
    });
    if let Err(error) = made {
        tracing::debug!(volume = core.row.name, %error, "no spare file can be made for the log");
    }
}

enum Next {
    Stop,
    /// Something changed.
    Look,
    Move,
}

/// Since when nothing was written.
#[derive(Default)]
struct Quiet {
    backlog_bytes: u64,
    since: Option<Instant>,
}

struct Mover<'a> {
    core: &'a Arc<Core>,
    head: Head,
    /// Files that readers may still hold.
    retired: Vec<Arc<LogFile>>,
    quiet: Quiet,
}

impl Mover<'_> {
    /// Waits until there is something to do.
    fn wait(&mut self) -> Next {
        let options = &self.core.options;
        let backlog_bytes = self.core.backlog_bytes();
        let now = Instant::now();
        if backlog_bytes != self.quiet.backlog_bytes || self.quiet.since.is_none() {
            self.quiet = Quiet { backlog_bytes, since: Some(now) };
        }
        let settled = self.quiet.since.map(|since| since + options.settle);
        let work = self.core.work();
        let waited_for = work.wanted > work.done && work.failure.is_none();
        if work.stop && !waited_for {
            return Next::Stop;
        }
        if waited_for || backlog_bytes >= options.log_bytes_start || self.core.names_many() {
            return Next::Move;
        }
        if work.failure.is_some() || backlog_bytes > 0 && settled.is_some_and(|settled| settled <= now) {
            return Next::Move;
        }
        let patience = match settled {
            Some(settled) if backlog_bytes > 0 => settled.saturating_duration_since(now).max(Duration::from_millis(1)),
            // Writers wake the thread when there is something again.
            _ => Duration::from_secs(3600),
        };
        drop(self.core.wake.wait_timeout(work, patience).unwrap_or_else(|poisoned| poisoned.into_inner()));
        Next::Look
    }

    fn move_generation(&mut self) -> Result<()> {
        let Some(frozen) = self.core.freeze() else { return Ok(()) };
        self.core.moved_none();
        // Only what is stable is moved. What a sync failed to write can be read as it was meant for a while, and then as what was there
        // before; and a file that the head points into is to be there after a power cut.
        self.core.flush()?;
        let mut batch = self.core.store.batch_in(self.core.domain.clone())?;
        let Made { root, snapshots } = Making::new(self.core, &frozen, &mut batch).all()?;
        let added = batch.sync()?;
        if !snapshots.is_empty() {
            self.core.store.catalog().set_snapshot_roots(&snapshots)?;
        }
        let before = self.head.state;
        self.head.write(State { root, capacity_bytes: frozen.capacity_bytes, position: frozen.end, ..before })?;
        drop(batch);
        self.core.store.catalog().forget_removed_snapshots(self.core.row.id)?;
        tracing::debug!(volume = self.core.row.name, ?added, "moved what was written into the store");
        self.retired.extend(self.core.thaw(&frozen, root, before.position.place));
        drop(frozen);
        self.reuse_files();
        self.core.store.tidy()
    }

    /// Leaves files that nobody reads any more to whoever needs one next.
    fn reuse_files(&mut self) {
        let mut free = Vec::new();
        for file in std::mem::take(&mut self.retired) {
            match Arc::try_unwrap(file) {
                Ok(file) => free.push(file),
                Err(file) => self.retired.push(file),
            }
        }
        self.give(&free);
    }

    fn give(&self, files: &[LogFile]) {
        if let Err(error) = self.core.store.spares().give(files, self.core.options.log_file_len()) {
            tracing::warn!(%error, "files of a volume's log cannot be used again");
        }
    }

    /// A volume of which everything is in the tree keeps no log: the next opening begins another file.
    fn leave_nothing(&mut self) {
        self.reuse_files();
        let Some(file) = self.core.take_empty_log() else { return };
        let before = self.head.state;
        let place = LogPlace::new(file.number + 1, log_file::FIRST_OFFSET);
        let position = Position { place, ..before.position };
        match self.head.write(State { position, ..before }) {
            Ok(()) => self.give(std::slice::from_ref(&file)),
            // The file stays, as the head says.
            Err(error) => tracing::warn!(volume = self.core.row.name, %error, "a volume keeps its log"),
        }
    }
}

/// What came of a generation.
struct Made {
    root: Root,
    /// The snapshots in it, with their trees and nodes.
    snapshots: Vec<(SnapshotRow, Root, Name)>,
}

/// Keeps the thread from being in the way of those who write and flush.
struct Manners {
    /// Bytes of chunks since the last look.
    bytes: u64,
    /// Bytes of the log in them.
    log_bytes: u64,
    /// Where the log ended then.
    sequence: u64,
    writers_seen: Option<Instant>,
    pace: Pace,
}

impl Manners {
    fn new(core: &Core) -> Self {
        Manners {
            bytes: 0,
            log_bytes: 0,
            sequence: core.sequence(),
            writers_seen: None,
            pace: Pace::new(BYTES_PER_SECOND_BESIDE_WRITERS),
        }
    }

    /// Hears of a chunk that was stored, and how much of it came from the log.
    fn stored(&mut self, core: &Core, batch: &mut Batch, bytes: u64, log_bytes: u64) -> Result<()> {
        self.bytes += bytes;
        self.log_bytes += log_bytes;
        if self.bytes < STEP_LEN {
            return Ok(());
        }
        if core.is_given_up() {
            return Err(StoreError::Refused("the volume is being closed".to_owned()));
        }
        let moved = std::mem::take(&mut self.bytes);
        core.moved_some(std::mem::take(&mut self.log_bytes));
        make_spare(core);
        let sequence = core.sequence();
        let now = Instant::now();
        if std::mem::replace(&mut self.sequence, sequence) != sequence {
            if self.writers_seen.is_none() {
                self.pace = Pace::new(BYTES_PER_SECOND_BESIDE_WRITERS);
            }
            self.writers_seen = Some(now);
        }
        self.writers_seen = self.writers_seen.filter(|seen| now - *seen < WRITERS_SEEN);
        let urgent = core.backlog_bytes() >= core.options.log_bytes_max / 4 * 3 || core.is_waited_for();
        if self.writers_seen.is_some() && !urgent {
            // In small steps, so that the host's disk has no long row of our writes before a flush of theirs.
            batch.sync()?;
            self.pace.spend(moved);
        }
        Ok(())
    }
}

/// A tree in the making, from what a generation says.
struct Making<'a> {
    core: &'a Core,
    frozen: &'a Frozen,
    batch: &'a mut Batch,
    root: Root,
    capacity_bytes: u64,
    changes: Vec<(u64, Name)>,
    chunk: Vec<u8>,
    manners: Manners,
    parent: Option<Name>,
    nodes: Vec<(SnapshotRow, Root, Name)>,
}

impl<'a> Making<'a> {
    fn new(core: &'a Core, frozen: &'a Frozen, batch: &'a mut Batch) -> Self {
        Making {
            core,
            frozen,
            batch,
            root: frozen.root,
            capacity_bytes: frozen.root_capacity,
            changes: Vec::new(),
            chunk: vec![0; core.chunk_len()],
            manners: Manners::new(core),
            parent: None,
            nodes: Vec::new(),
        }
    }

    /// The tree after the generation, and the snapshots in between.
    fn all(mut self) -> Result<Made> {
        let records = &self.frozen.generation.records;
        let cut = |change| matches!(change, Change::Snapshot | Change::Resize { .. });
        if !records.iter().any(|record| cut(record.change)) {
            self.apply(&self.frozen.generation.extents)?;
            return Ok(Made { root: self.root, snapshots: self.nodes });
        }
        // A move that is repeated after a crash may find its own: then it would be its own parent, and another node.
        let ours: BTreeSet<Id> =
            records.iter().filter_map(|record| record.snapshot.as_ref().map(|row| row.id)).collect();
        self.parent = self.core.store.catalog().newest_node(self.core.row.id, &ours)?;
        let mut extents = ExtentMap::default();
        for record in records {
            lay(&mut extents, record.change, record.place, record.payload_len, self.capacity_bytes);
            if cut(record.change) {
                self.apply(&extents)?;
                extents = ExtentMap::default();
            }
            match (record.change, &record.snapshot) {
                (Change::Snapshot, Some(snapshot)) => {
                    let node = self.node(snapshot.created_ns).put(self.batch)?;
                    self.parent = Some(node);
                    self.nodes.push((snapshot.as_ref().clone(), self.root, node));
                }
                (Change::Resize { capacity_bytes }, _) => {
                    let chunks = capacity_bytes.div_ceil(self.chunk.len() as u64);
                    self.root = tree::resize(self.batch, self.root, chunks)?;
                    self.capacity_bytes = capacity_bytes;
                }
                _ => {}
            }
        }
        self.apply(&extents)?;
        Ok(Made { root: self.root, snapshots: self.nodes })
    }

    fn node(&self, created_ns: u64) -> Node {
        let disk = Tree {
            name: self.core.row.name.clone(),
            root: self.root,
            len_bytes: self.capacity_bytes,
            chunk_len: self.core.row.chunk_len,
            domain: self.core.row.domain,
        };
        Node { disks: vec![disk], parent: self.parent, created_ns, ..Node::default() }
    }

    /// Puts what some extents say into the tree.
    fn apply(&mut self, extents: &ExtentMap) -> Result<()> {
        let blocks_of_chunk = self.chunk.len() as u64 / BLOCK_LEN;
        let mut next_chunk = 0;
        for (blocks, place) in extents.iter() {
            // Chunks that lie whole in a range of zeros go without being looked at.
            let whole = blocks.start.div_ceil(blocks_of_chunk)..blocks.end / blocks_of_chunk;
            let clear = place == Place::Zeros && !whole.is_empty();
            let (first, last) = (blocks.start / blocks_of_chunk, (blocks.end - 1) / blocks_of_chunk);
            let parts = match clear {
                true => [first..whole.start, whole.end..last + 1],
                false => [first..last + 1, 0..0],
            };
            for chunk in parts[0].start.max(next_chunk)..parts[0].end {
                self.make_chunk(extents, chunk)?;
            }
            next_chunk = next_chunk.max(parts[0].end);
            if clear {
                self.flush_changes()?;
                self.root = tree::clear(self.batch, self.root, whole.clone())?;
                next_chunk = next_chunk.max(whole.end);
            }
            for chunk in parts[1].start.max(next_chunk)..parts[1].end {
                self.make_chunk(extents, chunk)?;
                next_chunk = chunk + 1;
            }
        }
        self.flush_changes()
    }

    fn flush_changes(&mut self) -> Result<()> {
        if !self.changes.is_empty() {
            self.root = tree::update(self.batch, self.root, &self.changes)?;
            self.changes.clear();
        }
        Ok(())
    }

    /// Fills a chunk from the log, and from the tree where it was not written, and stores it.
    fn make_chunk(&mut self, extents: &ExtentMap, index: u64) -> Result<()> {
        let blocks_of_chunk = self.chunk.len() as u64 / BLOCK_LEN;
        let first = index * blocks_of_chunk;
        let blocks = first..first + blocks_of_chunk;
        // A whole chunk that is in the store already only gets into the tree.
        let mut parts = extents.parts(blocks.clone());
        if let Some((part, Some(Place::Chunks(place)))) = parts.next()
            && part == blocks
        {
            let (name, from) = self.named_chunk(place);
            if from == 0 {
                return self.change(index, name);
            }
        }
        let range =
            |part: &Range<u64>| ((part.start - first) * BLOCK_LEN) as usize..((part.end - first) * BLOCK_LEN) as usize;
        if extents.parts(blocks.clone()).any(|(_, place)| place.is_none()) {
            let mut reader = TreeReader::new(&self.core.store, self.root, self.chunk.len(), self.core.row.domain);
            match reader.chunk(index)? {
                Some(content) => self.chunk.copy_from_slice(&content),
                None => self.chunk.fill(0),
            }
        }
        let mut log_bytes = 0;
        for (part, place) in extents.parts(blocks) {
            match place {
                None => {}
                Some(Place::Zeros) => self.chunk[range(&part)].fill(0),
                Some(Place::Log(place)) => {
                    let bytes = &mut self.chunk[range(&part)];
                    log_bytes += bytes.len() as u64;
                    let piece = self.frozen.generation.piece(&self.frozen.files, place, 0, bytes.len());
                    let piece = piece.unwrap_or_else(|| unreachable!("files and records are kept with a generation"));
                    piece.read(bytes, |_, _| unreachable!("it lies in the log"))?;
                }
                Some(Place::Chunks(place)) => {
                    let (name, from) = self.named_chunk(place);
                    let bytes = &mut self.chunk[range(&part)];
                    match name.is_none() {
                        true => bytes.fill(0),
                        false => bytes.copy_from_slice(&self.core.named_chunk(&name)?[from..from + bytes.len()]),
                    }
                }
            }
        }
        let name = if is_zero(&self.chunk) { Name::NONE } else { self.batch.put_chunk(&self.chunk)? };
        self.manners.stored(self.core, self.batch, self.chunk.len() as u64, log_bytes)?;
        self.change(index, name)
    }

    fn change(&mut self, index: u64, name: Name) -> Result<()> {
        self.changes.push((index, name));
        match self.changes.len() >= CHANGES_MAX {
            true => self.flush_changes(),
            false => Ok(()),
        }
    }

    /// A chunk that the log names, and how far into it a place is.
    fn named_chunk(&self, place: ChunkPlace) -> (Name, usize) {
        let named = self.frozen.generation.named_chunk(place, self.chunk.len());
        named.unwrap_or_else(|| unreachable!("records are kept with a generation"))
    }
}
