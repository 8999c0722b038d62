//! A volume that this process writes: its log, what of the log is not in the tree yet, and the tree.
//!
//! A write is appended to the log and laid over the tree in memory; the guest's flush syncs the log. A thread of the volume's own
//! (`compact`) moves what was written into the tree, a generation at a time: the active generation takes new writes, the frozen one
//! is being moved. Reads look into both, then into the tree. A snapshot is a record of the log: its content is what the records before
//! it say, and becomes a tree of its own when the thread comes by.

use std::collections::BTreeSet;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use prost::Message;

use crate::catalog::{SnapshotRow, VolumeRow, check_name};
use crate::control::ControlSocket;
use crate::disk::SECTOR_LEN;
use crate::domain::Domain;
use crate::error::{Result, StoreError};
use crate::extent_map::{BLOCK_LEN, ExtentMap, LogPlace, Place};
use crate::head::{Head, State};
use crate::id::Id;
use crate::log::{self, Appended, Change, LogFile, LogWriter, PAYLOAD_LEN_MAX, Position, Spare};
use crate::log_seal::{self, LogSealer, Opening, SEALED_BLOCKS_MAX, SealedPart, SealedRecord, salt_of, sealed_len};
use crate::store::Store;
use crate::tree::{self, Root, TreeNode};

/// The largest volume.
pub const CAPACITY_BYTES_MAX: u64 = 64 << 40;

/// How soon a full disk is looked at again.
const SPACE_LOOK: Duration = Duration::from_millis(200);

/// A log that needed its last file longer ago than that is written slowly.
const SLOW_ROTATION: Duration = Duration::from_secs(1);

/// How a volume's log is used.
#[derive(Debug, Clone, Copy)]
pub struct VolumeOptions {
    /// Bytes of log at which writers wait.
    pub log_bytes_max: u64,
    /// Bytes of log at which they are moved into the tree.
    pub log_bytes_start: u64,
    /// Without writes for that long, what there is is moved.
    pub settle: Duration,
    /// Bytes of a file of the log, from 2 MiB to 1 GiB.
    pub log_file_bytes: u64,
}

impl Default for VolumeOptions {
    fn default() -> Self {
        VolumeOptions {
            log_bytes_max: 1 << 30,
            log_bytes_start: 512 << 20,
            settle: Duration::from_secs(5),
            log_file_bytes: log::FILE_LEN_DEFAULT,
        }
    }
}

impl VolumeOptions {
    pub(crate) fn log_file_len(&self) -> u64 {
        let (least, most) = log::FILE_LEN_RANGE;
        self.log_file_bytes.clamp(least, most).next_multiple_of(BLOCK_LEN)
    }
}

/// A record of the log that is not in the tree yet.
pub(crate) struct Pending {
    pub change: Change,
    pub place: LogPlace,
    pub payload_len: u32,
    pub snapshot: Option<Box<SnapshotRow>>,
    /// Who sealed it, if it is sealed.
    pub opening: Option<Arc<Opening>>,
}

/// Records of the log, and what they make of the volume.
#[derive(Default)]
pub(crate) struct Generation {
    pub extents: ExtentMap,
    pub records: Vec<Pending>,
}

impl Generation {
    /// A part of what was written at a place of the log; `skipped` bytes behind it. None if no record is there.
    pub fn piece(&self, files: &[Arc<LogFile>], place: LogPlace, skipped: u64, len: usize) -> Option<Piece> {
        let file = file_of(files, place)?.clone();
        // Records lie in their order.
        let record = &self.records[self.records.partition_point(|record| record.place <= place).checked_sub(1)?];
        let Some(opening) = &record.opening else {
            return Some(Piece::Log { file, offset: place.offset() + skipped, len });
        };
        let (Change::Sealed { offset, number }, Some(blocks)) =
            (record.change, log_seal::blocks_in(record.payload_len))
        else {
            return None;
        };
        let from = place.0 - record.place.0 + skipped;
        let record = SealedRecord { opening: opening.clone(), offset, number, place: record.place, blocks };
        Some(Piece::Sealed(Box::new(SealedPart { file, record, from, len })))
    }
}

/// What a volume is made of at a moment, the newest on top.
pub(crate) struct Layers {
    active: Generation,
    frozen: Option<Arc<Frozen>>,
    /// Files of the log that the generations point into, by their numbers.
    files: Vec<Arc<LogFile>>,
    root: Root,
    /// Of the tree.
    root_capacity: u64,
    capacity_bytes: u64,
}

impl Layers {
    fn log_piece(&self, place: LogPlace, skipped: u64, len: usize) -> Option<Piece> {
        // What is active is behind what is frozen.
        let frozen = self.frozen.as_ref().filter(|frozen| place < frozen.end.place);
        let generation = frozen.map_or(&self.active, |frozen| &frozen.generation);
        generation.piece(&self.files, place, skipped, len)
    }

    /// What of some blocks lies over the tree, in order; the rest as `None`.
    fn parts(&self, blocks: Range<u64>, add: &mut dyn FnMut(Range<u64>, Option<Place>)) {
        for (part, place) in self.active.extents.parts(blocks) {
            match (&place, &self.frozen) {
                (None, Some(frozen)) => {
                    frozen.generation.extents.parts(part).for_each(|(part, place)| add(part, place))
                }
                _ => add(part, place),
            }
        }
    }
}

/// A generation that is being moved into the tree.
pub(crate) struct Frozen {
    pub generation: Generation,
    /// The content of the log's files.
    pub files: Vec<Arc<LogFile>>,
    /// What it lies over.
    pub root: Root,
    pub root_capacity: u64,
    /// Behind its last record.
    pub end: Position,
    pub capacity_bytes: u64,
}

fn file_of(files: &[Arc<LogFile>], place: LogPlace) -> Option<&Arc<LogFile>> {
    files.binary_search_by_key(&place.file(), |file| file.number).ok().map(|at| &files[at])
}

/// What the volume's thread is asked, and what it did.
#[derive(Default)]
pub(crate) struct Work {
    pub stop: bool,
    /// Records up to this sequence number are to be in the tree.
    pub wanted: u64,
    /// Records up to this sequence number are.
    pub done: u64,
    /// Why the last attempt failed; it is repeated.
    pub failure: Option<String>,
    /// The file that the log goes on in.
    pub spares: Vec<Spare>,
    /// When the log went on in another file last.
    pub last_rotation: Option<Instant>,
}

/// Syncs of the log come one after the other, and who asks while one runs is covered by the next: that needs fewer of them, and an error
/// that the host reports to one of them cannot be missed by another that runs beside it.
#[derive(Default)]
struct Syncs {
    running: bool,
    /// Who hears of it when everything before a sequence number is stable, or will never be.
    waiting: Vec<(u64, FlushEnd)>,
}

/// What hears of a flush's end.
type FlushEnd = Box<dyn FnOnce(Result<()>) + Send>;

/// What front ends, the thread and the control of a volume share.
pub(crate) struct Core {
    pub store: Arc<Store>,
    pub row: VolumeRow,
    /// None: the volume is not encrypted.
    pub domain: Option<Arc<Domain>>,
    sealer: Option<LogSealer>,
    pub options: VolumeOptions,
    pub folder: PathBuf,
    log: Mutex<LogWriter>,
    layers: RwLock<Layers>,
    syncs: Mutex<Syncs>,
    /// A sync came to its end.
    synced: Condvar,
    /// Records up to this sequence number are stable.
    stable: AtomicU64,
    /// Bytes of log that are not in the tree.
    backlog: AtomicU64,
    pub work: Mutex<Work>,
    pub wake: Condvar,
    /// The thread got on.
    pub progress: Condvar,
    /// Names of snapshots in the log; whoever makes one has them meanwhile.
    pending_names: Mutex<BTreeSet<String>>,
    /// Signals of queues, which hear of another size.
    queues: Mutex<Vec<Weak<OwnedFd>>>,
}

/// A volume that is open for writing. One process at a time has it.
pub struct Volume {
    core: Arc<Core>,
    control: Option<ControlSocket>,
    thread: Option<JoinHandle<()>>,
    _lock: std::fs::File,
}

/// A part of a range: bytes, and what lies there over the tree.
pub(crate) type LayeredPart = (Range<u64>, Option<Place>);

/// A part of what is to be read.
#[derive(Debug, Clone)]
pub(crate) enum Piece {
    Zeros {
        len: usize,
    },
    Log {
        file: Arc<LogFile>,
        offset: u64,
        len: usize,
    },
    /// As `Log`, sealed.
    Sealed(Box<SealedPart>),
    /// `len` bytes from `from` on of a chunk of the tree.
    Chunk {
        index: u64,
        from: usize,
        len: usize,
    },
}

impl std::fmt::Debug for LogFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.path().display())
    }
}

impl Piece {
    pub fn len(&self) -> usize {
        match self {
            Piece::Zeros { len } | Piece::Log { len, .. } | Piece::Chunk { len, .. } => *len,
            Piece::Sealed(part) => part.len,
        }
    }

    /// Reads what is zeros or in the log, waiting for the host's disk.
    pub fn read(&self, bytes: &mut [u8], chunk: impl FnOnce(u64, usize, &mut [u8]) -> Result<()>) -> Result<()> {
        match self {
            Piece::Zeros { .. } => {
                bytes.fill(0);
                Ok(())
            }
            Piece::Log { file, offset, .. } => {
                file.file.read_exact_at(bytes, *offset).map_err(StoreError::file("read", file.path()))
            }
            Piece::Sealed(part) => part.read(bytes),
            Piece::Chunk { index, from, .. } => chunk(*index, *from, bytes),
        }
    }
}

impl Volume {
    /// Opens a volume for writing. The second process that tries is refused.
    pub fn open(store: &Arc<Store>, name: &str, options: VolumeOptions) -> Result<Volume> {
        let row = store.catalog().volume(name)?;
        // Before anything is changed.
        let domain = store.unlocked(row.domain)?;
        let folder = store.volume_folder(row.id);
        std::fs::create_dir_all(&folder).map_err(StoreError::file("make", &folder))?;
        let lock = super::volumes::lock(&folder, "volume", name)?;
        // It may have been removed before we had the lock.
        let row = store.catalog().volume(name).and_then(|now| match now.id == row.id {
            true => store.resolve_origin(now),
            false => Err(StoreError::NotFound { what: "volume", name: name.to_owned() }),
        })?;
        let mut head = open_head(&folder, &row)?;
        // From here on nothing counts that an earlier process still appends.
        head.write(State { epoch: head.state.epoch + 1, ..head.state })?;
        let (core, head) = Core::recover(store, row, domain, options, folder, head)?;
        let core = Arc::new(core);
        let thread = {
            let core = core.clone();
            let thread = std::thread::Builder::new().name("volume".to_owned());
            let spawned = thread.spawn(move || crate::compact::run(&core, head));
            spawned.map_err(|error| StoreError::Refused(format!("cannot start a thread for volume {name}: {error}")))?
        };
        let mut volume = Volume { core, control: None, thread: Some(thread), _lock: lock };
        volume.control = Some(ControlSocket::open(&volume.core)?);
        Ok(volume)
    }

    pub fn name(&self) -> &str {
        &self.core.row.name
    }

    pub fn store(&self) -> &Arc<Store> {
        &self.core.store
    }

    pub(crate) fn core(&self) -> &Arc<Core> {
        &self.core
    }

    pub fn capacity_bytes(&self) -> u64 {
        self.core.layers().capacity_bytes
    }

    /// Reads, waiting for the host's disk if need be.
    pub fn read_at(&self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        self.core.read_at(offset, bytes)
    }

    /// Writes; stable after the next [`flush`](Self::flush). Waits while the log is full.
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.core.write_at(offset, bytes)
    }

    /// Makes a range read as zeros.
    pub fn zero(&self, offset: u64, len: u64) -> Result<()> {
        self.core.zero(offset, len)
    }

    /// Makes everything stable that was written before.
    pub fn flush(&self) -> Result<()> {
        self.core.flush()
    }

    /// Takes a snapshot: what was written before belongs to it, and it is stable when this comes back.
    pub fn snapshot(&self, name: &str) -> Result<SnapshotRow> {
        self.core.snapshot(name)
    }

    /// Gives the volume another size, stable when this comes back.
    pub fn resize(&self, capacity_bytes: u64) -> Result<()> {
        self.core.resize(capacity_bytes)
    }

    /// Moves everything that was written before into the tree, and waits for it.
    pub fn compact(&self) -> Result<()> {
        self.core.compact()
    }

    /// Ends with everything stable and in the tree.
    pub fn close(self) -> Result<()> {
        self.flush()?;
        self.compact()?;
        drop(self);
        Ok(())
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        self.control = None;
        self.core.work().stop = true;
        self.core.wake.notify_all();
        self.core.progress.notify_all();
        if let Some(thread) = self.thread.take() {
            // A thread that panicked has said so; the log holds what it did not move.
            let _ = thread.join();
        }
    }
}

/// The head of a volume; a volume that was never open gets one.
fn open_head(folder: &std::path::Path, row: &VolumeRow) -> Result<Head> {
    if let Some(head) = Head::open(folder)? {
        if head.state.volume != row.id {
            return Err(StoreError::Damaged {
                path: folder.join("head"),
                offset: 0,
                what: "it belongs to another volume".to_owned(),
            });
        }
        return Ok(head);
    }
    // The folder is new: what is promised in it is lost with its name.
    if let Some(volumes) = folder.parent() {
        log::sync_folder(volumes)?;
    }
    if !log::list(folder)?.0.is_empty() {
        return Err(StoreError::Damaged {
            path: folder.join("head"),
            offset: 0,
            what: "neither of its pages is whole, and there is a log".to_owned(),
        });
    }
    let state = State {
        volume: row.id,
        epoch: 0,
        root: row.root,
        capacity_bytes: row.capacity_bytes,
        position: Position { place: LogPlace::new(1, 4096), sequence: 1, epoch: 0 },
    };
    Head::create(folder, state)
}

impl Core {
    /// Reads the log of a volume that nobody else has open.
    fn recover(
        store: &Arc<Store>,
        row: VolumeRow,
        domain: Option<Arc<Domain>>,
        options: VolumeOptions,
        folder: PathBuf,
        head: Head,
    ) -> Result<(Core, Head)> {
        let state = head.state;
        let sealer = domain.as_ref().map(|domain| domain.log_sealer(row.id, state.epoch)).transpose()?;
        let start = state.position.place;
        // A volume that was never written or was rolled back has no file yet, and none behind that either.
        let files = log::list(&folder)?.0;
        let begun = start.offset() > 4096 || files.iter().any(|&file| file > start.file());
        if begun && !files.contains(&start.file()) {
            return Err(StoreError::Damaged {
                path: folder.join("head"),
                offset: 0,
                what: format!("file {} of the log is missing", start.file()),
            });
        }
        log::remove_before(&folder, state.position.place.file())?;
        for spare in log::list(&folder)?.1 {
            std::fs::remove_file(&spare).map_err(StoreError::file("remove", &spare))?;
        }
        let mut active = Generation::default();
        let mut capacity_bytes = state.capacity_bytes;
        let mut snapshots = Vec::new();
        let mut damage = None;
        let file_len = options.log_file_len();
        let recovered = log::recover(&folder, row.id, state.epoch, state.position, file_len, |appended, payload| {
            let old_capacity = capacity_bytes;
            let opening = match opening_of(sealer.as_ref(), &active, &appended, payload) {
                Ok(opening) => opening,
                Err(what) => {
                    damage = Some((appended.place, what));
                    return;
                }
            };
            let snapshot = match appended.change {
                Change::Snapshot => match decode_snapshot(payload, &row, capacity_bytes) {
                    Some(snapshot) => Some(Box::new(snapshot)),
                    None => {
                        damage = Some((appended.place, "a snapshot that cannot be read"));
                        return;
                    }
                },
                Change::Resize { capacity_bytes: new } => {
                    capacity_bytes = new;
                    None
                }
                _ => None,
            };
            snapshots.extend(snapshot.as_deref().cloned());
            active.add(&appended, snapshot, opening, old_capacity);
        })?;
        if let Some((place, what)) = damage {
            return Err(StoreError::Damaged {
                path: folder.join(format!("log-{:08}", place.file())),
                offset: place.offset(),
                what: what.to_owned(),
            });
        }
        let mut pending_names = BTreeSet::new();
        for snapshot in snapshots {
            if store.catalog().restore_snapshot(&snapshot)? {
                pending_names.insert(snapshot.name);
            }
        }
        let backlog = backlog(file_len, state.position.place, recovered.writer.position().place);
        let work = Work { done: state.position.sequence, ..Work::default() };
        let core = Core {
            store: store.clone(),
            row,
            domain,
            sealer,
            options,
            folder,
            log: Mutex::new(recovered.writer),
            layers: RwLock::new(Layers {
                active,
                frozen: None,
                files: recovered.files,
                root: state.root,
                root_capacity: state.capacity_bytes,
                capacity_bytes,
            }),
            syncs: Mutex::default(),
            synced: Condvar::new(),
            stable: AtomicU64::new(0),
            backlog: AtomicU64::new(backlog),
            work: Mutex::new(work),
            wake: Condvar::new(),
            progress: Condvar::new(),
            pending_names: Mutex::new(pending_names),
            queues: Mutex::default(),
        };
        Ok((core, head))
    }

    fn log(&self) -> MutexGuard<'_, LogWriter> {
        self.log.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    pub fn layers(&self) -> RwLockReadGuard<'_, Layers> {
        self.layers.read().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn layers_mut(&self) -> RwLockWriteGuard<'_, Layers> {
        self.layers.write().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    pub fn work(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    pub fn chunk_len(&self) -> usize {
        self.row.chunk_len as usize
    }

    /// The number of the next record.
    pub fn sequence(&self) -> u64 {
        self.log().position().sequence
    }

    /// Whether somebody waits for the log to be moved, or for the thread to end.
    pub fn is_waited_for(&self) -> bool {
        let work = self.work();
        work.stop || work.wanted > work.done
    }

    /// Whether the volume ends and nobody waits for what the thread does.
    pub fn is_given_up(&self) -> bool {
        let work = self.work();
        work.stop && work.wanted <= work.done
    }

    /// Bytes of log that are not in the tree.
    pub fn backlog_bytes(&self) -> u64 {
        self.backlog.load(Ordering::Relaxed)
    }

    /// Whether a range is whole sectors inside the volume.
    pub fn check_range(&self, offset: u64, len: u64) -> Result<()> {
        check_range(offset, len, self.layers().capacity_bytes)
    }

    // Reading

    /// What a range is made of now, and the tree that its chunks are in.
    pub fn plan(&self, offset: u64, len: usize, pieces: &mut Vec<Piece>) -> Result<Root> {
        pieces.clear();
        let layers = self.layers();
        check_range(offset, len as u64, layers.capacity_bytes)?;
        let end = offset + len as u64;
        let mut add = |blocks: Range<u64>, place: Option<Place>| {
            let start = (blocks.start * BLOCK_LEN).max(offset);
            let len = ((blocks.end * BLOCK_LEN).min(end) - start) as usize;
            let skipped = start - blocks.start * BLOCK_LEN;
            match place {
                Some(Place::Zeros) => pieces.push(Piece::Zeros { len }),
                Some(Place::Log(place)) => match layers.log_piece(place, skipped, len) {
                    Some(piece) => pieces.push(piece),
                    None => unreachable!("the files and records of both generations are kept"),
                },
                None => chunk_pieces(start, len, self.chunk_len(), pieces),
            }
        };
        let blocks = offset / BLOCK_LEN..end.div_ceil(BLOCK_LEN);
        for (part, place) in layers.active.extents.parts(blocks) {
            match (&place, &layers.frozen) {
                (None, Some(frozen)) => {
                    frozen.generation.extents.parts(part).for_each(|(part, place)| add(part, place))
                }
                _ => add(part, place),
            }
        }
        Ok(layers.root)
    }

    /// The parts of a range that lie over the tree, in bytes, and the tree.
    pub fn layered(&self, range: Range<u64>) -> (Vec<LayeredPart>, Root) {
        let layers = self.layers();
        let mut parts = Vec::new();
        let mut add = |blocks: Range<u64>, place| {
            let bytes = (blocks.start * BLOCK_LEN).max(range.start)..(blocks.end * BLOCK_LEN).min(range.end);
            parts.push((bytes, place));
        };
        layers.parts(range.start / BLOCK_LEN..range.end.div_ceil(BLOCK_LEN), &mut add);
        (parts, layers.root)
    }

    pub fn read_at(&self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        let mut pieces = Vec::new();
        let root = self.plan(offset, bytes.len(), &mut pieces)?;
        let mut rest = bytes;
        let mut reader = TreeReader::new(&self.store, root, self.chunk_len());
        for piece in &pieces {
            let (part, behind) = rest.split_at_mut(piece.len());
            piece.read(part, |index, from, part| reader.read(index, from, part))?;
            rest = behind;
        }
        Ok(())
    }

    // Writing

    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.check_range(offset, bytes.len() as u64)?;
        let end = offset + bytes.len() as u64;
        let mut at = offset;
        while at < end {
            // Records end where payloads of whole blocks do.
            let stop = ((at / BLOCK_LEN * BLOCK_LEN) + self.write_len_max()).min(end);
            let part = &bytes[(at - offset) as usize..(stop - offset) as usize];
            if at.is_multiple_of(BLOCK_LEN) && stop.is_multiple_of(BLOCK_LEN) {
                self.wait_for_room()?;
                self.append(Change::Write { offset: at }, part, None)?;
            } else {
                self.write_parts_of_blocks(at, part)?;
            }
            at = stop;
        }
        Ok(())
    }

    /// Bytes that a record takes at most.
    fn write_len_max(&self) -> u64 {
        match self.sealer {
            Some(_) => SEALED_BLOCKS_MAX as u64 * BLOCK_LEN,
            None => PAYLOAD_LEN_MAX as u64,
        }
    }

    /// Writes that begin or end inside a block: the rest of the block is read, and the write is repeated if somebody else changed
    /// it meanwhile.
    fn write_parts_of_blocks(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        let end = offset + bytes.len() as u64;
        let blocks = offset / BLOCK_LEN..end.div_ceil(BLOCK_LEN);
        let start = blocks.start * BLOCK_LEN;
        let mut whole = vec![0; ((blocks.end - blocks.start) * BLOCK_LEN) as usize];
        loop {
            self.wait_for_room()?;
            let seen = self.edges(&blocks);
            let capacity_bytes = self.layers().capacity_bytes;
            let last = (blocks.end - 1) * BLOCK_LEN;
            for block in [start, last] {
                let len = BLOCK_LEN.min(capacity_bytes.saturating_sub(block)) as usize;
                let at = (block - start) as usize;
                self.read_at(block, &mut whole[at..at + len])?;
            }
            whole[(offset - start) as usize..(end - start) as usize].copy_from_slice(bytes);
            if self.append(Change::Write { offset: start }, &whole, Some(&|| self.edges(&blocks) == seen))? {
                return Ok(());
            }
        }
    }

    /// What the first and last of some blocks are made of.
    fn edges(&self, blocks: &Range<u64>) -> ([Option<Place>; 4], Root) {
        let layers = self.layers();
        let at = |extents: &ExtentMap, block| extents.parts(block..block + 1).next().and_then(|(_, place)| place);
        let frozen = |block| layers.frozen.as_ref().and_then(|frozen| at(&frozen.generation.extents, block));
        let (first, last) = (blocks.start, blocks.end - 1);
        let places = [at(&layers.active.extents, first), at(&layers.active.extents, last), frozen(first), frozen(last)];
        (places, layers.root)
    }

    pub fn zero(&self, offset: u64, len: u64) -> Result<()> {
        self.check_range(offset, len)?;
        let end = offset + len;
        let (first, last) = (offset.next_multiple_of(BLOCK_LEN), end / BLOCK_LEN * BLOCK_LEN);
        let capacity_bytes = self.capacity_bytes();
        // The last block of a volume may be shorter than others.
        let last = if end == capacity_bytes { end.next_multiple_of(BLOCK_LEN) } else { last };
        let zeros = [0; BLOCK_LEN as usize];
        if first >= last {
            return self.write_at(offset, &vec![0; len as usize]);
        }
        if offset < first {
            self.write_at(offset, &zeros[..(first - offset) as usize])?;
        }
        self.wait_for_room()?;
        self.append(Change::Zeros { offset: first, len: last - first }, &[], None)?;
        if last < end {
            self.write_at(last, &zeros[..(end - last) as usize])?;
        }
        Ok(())
    }

    fn capacity_bytes(&self) -> u64 {
        self.layers().capacity_bytes
    }

    /// Whether a write need not wait: the log has room, and a file to go on in.
    pub fn has_room_now(&self, len: usize) -> bool {
        let len = if self.sealer.is_some() { sealed_len(len) } else { len };
        self.backlog_bytes() < self.options.log_bytes_max && (self.log().fits(len) || !self.work().spares.is_empty())
    }

    /// Waits while the log is as long as it may be.
    fn wait_for_room(&self) -> Result<()> {
        if self.backlog_bytes() < self.options.log_bytes_max {
            return Ok(());
        }
        let mut work = self.work();
        while self.backlog_bytes() >= self.options.log_bytes_max && !work.stop {
            self.wake.notify_all();
            work = self.progress.wait(work).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
        Ok(())
    }

    /// Appends a record whose range is whole blocks, and lays it over what there was. With `unless_changed`, only if that still holds;
    /// whether it did.
    fn append(&self, change: Change, payload: &[u8], unchanged: Option<&dyn Fn() -> bool>) -> Result<bool> {
        loop {
            match self.try_append(change, payload, unchanged) {
                Err(error) if self.wait_for_space(&error) => {}
                result => return result,
            }
        }
    }

    fn try_append(&self, change: Change, payload: &[u8], unchanged: Option<&dyn Fn() -> bool>) -> Result<bool> {
        match (change, &self.sealer) {
            // Anew for each attempt: what an earlier one left of it may be on the disk.
            (Change::Write { offset }, Some(sealer)) => sealer
                .seal(offset, payload, |change, sealed| self.append_record(change, sealed, payload.len(), unchanged)),
            _ => self.append_record(change, payload, payload.len(), unchanged),
        }
    }

    /// Appends a record whose payload holds `written` bytes of the volume.
    fn append_record(
        &self,
        change: Change,
        payload: &[u8],
        written: usize,
        unchanged: Option<&dyn Fn() -> bool>,
    ) -> Result<bool> {
        let checksum = crc32c::crc32c(payload);
        let mut log = self.log();
        let range = match change {
            Change::Write { offset } | Change::Sealed { offset, .. } => Some((offset, written as u64)),
            Change::Zeros { offset, len } => Some((offset, len)),
            Change::Snapshot | Change::Resize { .. } => None,
        };
        if let Some((offset, len)) = range {
            // It may have shrunk since it was looked at.
            check_range(offset, len, self.capacity_bytes().next_multiple_of(BLOCK_LEN))?;
        }
        if unchanged.is_some_and(|unchanged| !unchanged()) {
            return Ok(false);
        }
        self.append_locked(&mut log, change, payload, checksum, None)?;
        Ok(true)
    }

    /// Whether an operation failed because the host's disk is full, and is to be tried again: a guest waits then, as it would for a
    /// slow disk, until somebody makes room.
    fn wait_for_space(&self, error: &StoreError) -> bool {
        if !error.is_no_space() {
            return false;
        }
        tracing::warn!(volume = self.row.name, "the host's disk is full; writes wait");
        let work = self.work();
        let (work, _) = self.progress.wait_timeout(work, SPACE_LOOK).unwrap_or_else(|poisoned| poisoned.into_inner());
        !work.stop
    }

    fn append_locked(
        &self,
        log: &mut LogWriter,
        change: Change,
        payload: &[u8],
        checksum: u32,
        snapshot: Option<Box<SnapshotRow>>,
    ) -> Result<()> {
        let mut before = log.position().place;
        if !log.fits(payload.len()) {
            let spare = {
                let mut work = self.work();
                work.last_rotation = Some(Instant::now());
                work.spares.pop()
            };
            let file = log.next_file(spare)?;
            self.layers_mut().files.push(file);
            // The record may fail: what is counted is how far the log is.
            let begin = log.position().place;
            self.backlog.fetch_add(backlog(self.options.log_file_len(), before, begin), Ordering::Relaxed);
            before = begin;
            self.wake.notify_all();
        }
        let appended = log.append(change, payload, checksum)?;
        {
            let mut layers = self.layers_mut();
            let old_capacity = layers.capacity_bytes;
            let opening = self.sealer.as_ref().filter(|_| matches!(change, Change::Sealed { .. }));
            let opening = opening.map(|sealer| sealer.ours().clone());
            layers.active.add(&appended, snapshot, opening, old_capacity);
            if let Change::Resize { capacity_bytes } = change {
                layers.capacity_bytes = capacity_bytes;
            }
        }
        let more = backlog(self.options.log_file_len(), before, appended.end.place);
        let had = self.backlog.fetch_add(more, Ordering::Relaxed);
        let half = self.options.log_file_len() / 2;
        let crossed = |mark: u64, before: u64, after: u64| before < mark && after >= mark;
        if had == 0
            || crossed(self.options.log_bytes_start, had, had + more)
            || crossed(half, before.offset(), appended.end.place.offset())
        {
            self.wake.notify_all();
        }
        Ok(())
    }

    // Flushing

    fn syncs(&self) -> MutexGuard<'_, Syncs> {
        self.syncs.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn is_stable(&self, sequence: u64) -> bool {
        self.stable.load(Ordering::Acquire) >= sequence
    }

    /// Makes everything stable that was appended before, on this thread.
    pub fn flush(self: &Arc<Self>) -> Result<()> {
        let wanted = self.log().position().sequence;
        let mut syncs = self.syncs();
        loop {
            if self.is_stable(wanted) {
                return Ok(());
            }
            if !syncs.running {
                break;
            }
            syncs = self.synced.wait(syncs).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
        syncs.running = true;
        drop(syncs);
        let result = self.sync();
        if self.end_sync() {
            self.hand_over_syncs();
        }
        result
    }

    /// As [`flush`](Self::flush), for threads that do not wait: `end` is called on this thread or another.
    pub fn flush_then(self: &Arc<Self>, end: impl FnOnce(Result<()>) + Send + 'static) {
        let wanted = self.log().position().sequence;
        let mut syncs = self.syncs();
        if self.is_stable(wanted) {
            drop(syncs);
            return end(Ok(()));
        }
        syncs.waiting.push((wanted, Box::new(end)));
        if !syncs.running {
            syncs.running = true;
            drop(syncs);
            self.hand_over_syncs();
        }
    }

    /// Whether a flush has nothing to wait for.
    pub fn all_is_stable(&self) -> bool {
        let wanted = self.log().position().sequence;
        self.is_stable(wanted)
    }

    /// Has a worker thread sync for those who wait. The turn goes with it.
    fn hand_over_syncs(self: &Arc<Self>) {
        let core = self.clone();
        self.store.workers().run(move || {
            loop {
                // Those who wait hear of an error from the log.
                let _ = core.sync();
                if !core.end_sync() {
                    return;
                }
            }
        });
    }

    fn sync(&self) -> Result<()> {
        let flush = self.log().begin_flush()?;
        let result = flush.run();
        self.log().end_flush(&flush, &result);
        result.map_err(StoreError::file("write", &self.folder))?;
        self.stable.fetch_max(flush.sequence, Ordering::AcqRel);
        Ok(())
    }

    /// Tells those who wait what came of a sync. Whether others do, whose records came later: then the turn stays taken for them.
    fn end_sync(&self) -> bool {
        let broken = self.log().broken();
        let (ended, more) = {
            let mut syncs = self.syncs();
            let waiting = std::mem::take(&mut syncs.waiting);
            let (ended, rest): (Vec<_>, Vec<_>) =
                waiting.into_iter().partition(|(wanted, _)| broken.is_some() || self.is_stable(*wanted));
            syncs.waiting = rest;
            syncs.running = !syncs.waiting.is_empty();
            (ended, syncs.running)
        };
        self.synced.notify_all();
        for (wanted, end) in ended {
            match &broken {
                Some(path) if !self.is_stable(wanted) => end(Err(StoreError::Broken { path: path.clone() })),
                _ => end(Ok(())),
            }
        }
        more
    }

    // Snapshots and size

    pub fn snapshot(self: &Arc<Self>, name: &str) -> Result<SnapshotRow> {
        check_name("snapshot", name)?;
        // Nobody else makes snapshots of this volume: who has the turn knows which names are taken. A name that is in the log and did
        // not get into the catalog gets there later.
        let mut pending = self.pending_names();
        if pending.contains(name) || self.store.catalog().snapshot(self.row.id, name).is_ok() {
            return Err(StoreError::Exists { what: "snapshot", name: name.to_owned() });
        }
        let mut snapshot = SnapshotRow {
            id: Id::random(),
            volume: self.row.id,
            name: name.to_owned(),
            created_ns: now_ns(),
            domain: self.row.domain,
            chunk_len: self.row.chunk_len,
            capacity_bytes: 0,
            root: None,
            node: None,
        };
        let payload = encode_snapshot(&snapshot);
        {
            let mut log = self.log();
            snapshot.capacity_bytes = self.capacity_bytes();
            let checksum = crc32c::crc32c(&payload);
            self.append_locked(&mut log, Change::Snapshot, &payload, checksum, Some(Box::new(snapshot.clone())))?;
            pending.insert(name.to_owned());
        }
        self.flush()?;
        self.store.catalog().add_snapshot(&snapshot)?;
        Ok(snapshot)
    }

    fn pending_names(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.pending_names.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    pub fn resize(self: &Arc<Self>, capacity_bytes: u64) -> Result<()> {
        check_capacity(capacity_bytes)?;
        let old = self.capacity_bytes();
        if capacity_bytes > old && !old.is_multiple_of(BLOCK_LEN) {
            self.clear_tail(old)?;
        }
        {
            let mut log = self.log();
            if self.capacity_bytes() == capacity_bytes {
                return Ok(());
            }
            self.append_locked(&mut log, Change::Resize { capacity_bytes }, &[], crc32c::crc32c(&[]), None)?;
        }
        self.flush()?;
        self.tell_queues();
        Ok(())
    }

    /// A queue's signal is raised from now on when the volume gets another size.
    pub fn tell_of_sizes(&self, signal: &Arc<OwnedFd>) {
        let mut queues = self.queues.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        queues.retain(|queue| queue.strong_count() > 0);
        queues.push(Arc::downgrade(signal));
    }

    fn tell_queues(&self) {
        let queues = self.queues.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        for signal in queues.iter().filter_map(Weak::upgrade) {
            // A counter at its maximum wakes as well.
            let _ = rustix::io::write(&*signal, &1u64.to_ne_bytes());
        }
    }

    /// Zeros behind the end of a volume whose last block is not whole, before it grows.
    fn clear_tail(&self, capacity_bytes: u64) -> Result<()> {
        let block = capacity_bytes / BLOCK_LEN * BLOCK_LEN;
        let mut tail = vec![0; (capacity_bytes - block) as usize];
        self.read_at(block, &mut tail)?;
        self.write_at(block, &tail)
    }

    // Moving into the tree

    pub fn compact(&self) -> Result<()> {
        let wanted = self.log().position().sequence;
        let mut work = self.work();
        work.wanted = work.wanted.max(wanted);
        work.failure = None;
        self.wake.notify_all();
        while work.done < wanted {
            if let Some(failure) = &work.failure {
                return Err(StoreError::Refused(format!(
                    "what was written to volume {} cannot be moved into the store: {failure}",
                    self.row.name
                )));
            }
            if work.stop {
                return Err(StoreError::Refused(format!("volume {} is being closed", self.row.name)));
            }
            work = self.progress.wait(work).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
        Ok(())
    }

    /// Freezes what was written until now, unless there is a frozen generation: what is to be moved, if there is anything.
    pub fn freeze(&self) -> Option<Arc<Frozen>> {
        let log = self.log();
        let mut layers = self.layers_mut();
        if layers.frozen.is_none() && !layers.active.records.is_empty() {
            let generation = std::mem::take(&mut layers.active);
            layers.frozen = Some(Arc::new(Frozen {
                generation,
                files: layers.files.clone(),
                root: layers.root,
                root_capacity: layers.root_capacity,
                end: log.position(),
                capacity_bytes: layers.capacity_bytes,
            }));
        }
        layers.frozen.clone()
    }

    /// The frozen generation is in the tree. Gives the log files that nothing points into any more.
    pub fn thaw(&self, frozen: &Frozen, root: Root, moved_from: LogPlace) -> Vec<Arc<LogFile>> {
        let mut layers = self.layers_mut();
        layers.root = root;
        layers.root_capacity = frozen.capacity_bytes;
        let done = layers.frozen.take();
        let keep = frozen.end.place.file();
        let at = layers.files.partition_point(|file| file.number < keep);
        let old = layers.files.drain(..at).collect();
        drop(layers);
        // Large maps take their time to go, and readers do not wait for it.
        drop(done);
        let moved = backlog(self.options.log_file_len(), moved_from, frozen.end.place);
        self.backlog.fetch_sub(moved, Ordering::Relaxed);
        let snapshots = frozen.generation.records.iter().filter_map(|record| record.snapshot.as_deref());
        let names: Vec<&str> = snapshots.map(|snapshot| snapshot.name.as_str()).collect();
        if !names.is_empty() {
            let mut pending = self.pending_names();
            pending.retain(|name| !names.contains(&name.as_str()));
        }
        old
    }

    /// Whether a spare is worth making now: the log is about to need one, and is written slowly enough for its flushes to matter.
    pub fn wants_spare(&self) -> bool {
        let offset = self.log().position().place.offset();
        let work = self.work();
        let slow = work.last_rotation.is_none_or(|last| last.elapsed() > SLOW_ROTATION);
        work.spares.is_empty() && slow && offset >= self.options.log_file_len() / 2
    }
}

impl Generation {
    /// Adds a record that was appended to a volume of `capacity_bytes`.
    fn add(
        &mut self,
        appended: &Appended,
        snapshot: Option<Box<SnapshotRow>>,
        opening: Option<Arc<Opening>>,
        capacity_bytes: u64,
    ) {
        let change = appended.change;
        lay(&mut self.extents, change, appended.place, appended.payload_len, capacity_bytes);
        let pending = Pending { change, place: appended.place, payload_len: appended.payload_len, snapshot, opening };
        self.records.push(pending);
    }
}

/// Who sealed a record that was found in the log of a volume, or why the record cannot be.
fn opening_of(
    sealer: Option<&LogSealer>,
    before: &Generation,
    appended: &Appended,
    payload: &[u8],
) -> Result<Option<Arc<Opening>>, &'static str> {
    match (appended.change, sealer) {
        (Change::Sealed { .. }, Some(sealer)) if log_seal::blocks_in(appended.payload_len).is_some() => {
            let before = before.records.iter().rev().find_map(|record| record.opening.as_ref());
            Ok(sealer.opening(appended.end.epoch, salt_of(payload), before))
        }
        (Change::Sealed { .. }, Some(_)) => Err("a sealed record of impossible length"),
        (Change::Sealed { .. }, None) => Err("a sealed record in the log of a volume that is not encrypted"),
        (Change::Write { .. }, Some(_)) => Err("a record that is not sealed in the log of an encrypted volume"),
        _ => Ok(None),
    }
}

/// Lays a change of a volume of `capacity_bytes` over what was there.
pub(crate) fn lay(extents: &mut ExtentMap, change: Change, place: LogPlace, payload_len: u32, capacity_bytes: u64) {
    match change {
        Change::Write { offset } => {
            let block = offset / BLOCK_LEN;
            extents.insert(block..block + u64::from(payload_len) / BLOCK_LEN, Place::Log(place));
        }
        Change::Sealed { offset, .. } => {
            let block = offset / BLOCK_LEN;
            let blocks = log_seal::blocks_in(payload_len).unwrap_or_default();
            extents.insert(block..block + blocks, Place::Log(place));
        }
        Change::Zeros { offset, len } => {
            extents.insert(offset / BLOCK_LEN..(offset + len) / BLOCK_LEN, Place::Zeros);
        }
        // What lies behind the end of a smaller volume is zeros should it grow again.
        Change::Resize { capacity_bytes: new } if new < capacity_bytes => {
            extents.insert(new.div_ceil(BLOCK_LEN)..capacity_bytes.div_ceil(BLOCK_LEN), Place::Zeros);
        }
        Change::Snapshot | Change::Resize { .. } => {}
    }
}

/// Bytes of log between two places, as if its files followed one another without a gap.
fn backlog(file_len: u64, from: LogPlace, to: LogPlace) -> u64 {
    let linear = |place: LogPlace| u64::from(place.file()) * file_len + place.offset();
    linear(to).saturating_sub(linear(from))
}

pub(crate) fn chunk_pieces(start: u64, len: usize, chunk_len: usize, pieces: &mut Vec<Piece>) {
    let (mut at, end) = (start, start + len as u64);
    while at < end {
        let index = at / chunk_len as u64;
        let from = (at % chunk_len as u64) as usize;
        let len = (chunk_len - from).min((end - at) as usize);
        pieces.push(Piece::Chunk { index, from, len });
        at += len as u64;
    }
}

/// Reads chunks of a tree one after the other.
pub(crate) struct TreeReader<'a> {
    store: &'a Store,
    root: Root,
    chunk_len: usize,
    /// The leaf of the last chunk.
    leaf: Option<(u64, Option<Arc<TreeNode>>)>,
}

impl<'a> TreeReader<'a> {
    pub fn new(store: &'a Store, root: Root, chunk_len: usize) -> Self {
        TreeReader { store, root, chunk_len, leaf: None }
    }

    /// The content of a chunk; none if it is zeros.
    pub fn chunk(&mut self, index: u64) -> Result<Option<Arc<[u8]>>> {
        let (leaf_index, place) = (index / tree::FAN_OUT as u64, (index % tree::FAN_OUT as u64) as usize);
        if self.leaf.as_ref().is_none_or(|(held, _)| *held != leaf_index) {
            let leaf = tree::find_leaf(self.store, self.root, index)?;
            self.leaf = Some((leaf_index, leaf));
        }
        let Some((_, Some(leaf))) = &self.leaf else { return Ok(None) };
        if leaf.children[place].is_none() {
            return Ok(None);
        }
        let content = self.store.chunk_of(leaf, place)?;
        if content.len() != self.chunk_len {
            return Err(StoreError::Refused(format!(
                "chunk {} has {} bytes in a tree of chunks of {}",
                leaf.children[place],
                content.len(),
                self.chunk_len
            )));
        }
        Ok(Some(content))
    }

    /// Reads a part of a chunk.
    pub fn read(&mut self, index: u64, from: usize, bytes: &mut [u8]) -> Result<()> {
        match self.chunk(index)? {
            Some(content) => bytes.copy_from_slice(&content[from..from + bytes.len()]),
            None => bytes.fill(0),
        }
        Ok(())
    }
}

pub(crate) fn check_range(offset: u64, len: u64, capacity_bytes: u64) -> Result<()> {
    let end = offset.checked_add(len);
    if end.is_none_or(|end| end > capacity_bytes)
        || !offset.is_multiple_of(SECTOR_LEN)
        || !len.is_multiple_of(SECTOR_LEN)
    {
        return Err(StoreError::OutOfRange { offset, end: offset.saturating_add(len), capacity_bytes });
    }
    Ok(())
}

/// Whether a volume can have that size.
pub(crate) fn check_capacity(bytes: u64) -> Result<()> {
    let why = match bytes {
        0 => "it would hold nothing",
        _ if !bytes.is_multiple_of(SECTOR_LEN) => "a size is whole sectors of 512 bytes",
        _ if bytes > CAPACITY_BYTES_MAX => "64 TiB is the largest",
        _ => return Ok(()),
    };
    Err(StoreError::BadSize { bytes, why })
}

/// Nanoseconds since 1970-01-01 00:00 UTC.
pub(crate) fn now_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64)
}

/// A snapshot as a volume's log holds it.
#[derive(Clone, PartialEq, prost::Message)]
struct SnapshotRecord {
    #[prost(bytes = "vec", tag = "1")]
    id: Vec<u8>,
    #[prost(string, tag = "2")]
    name: String,
    #[prost(uint64, tag = "3")]
    created_ns: u64,
}

fn encode_snapshot(snapshot: &SnapshotRow) -> Vec<u8> {
    let record =
        SnapshotRecord { id: snapshot.id.0.to_vec(), name: snapshot.name.clone(), created_ns: snapshot.created_ns };
    record.encode_to_vec()
}

fn decode_snapshot(payload: &[u8], volume: &VolumeRow, capacity_bytes: u64) -> Option<SnapshotRow> {
    let record = SnapshotRecord::decode(payload).ok()?;
    Some(SnapshotRow {
        id: Id(record.id.try_into().ok()?),
        volume: volume.id,
        name: record.name,
        created_ns: record.created_ns,
        domain: volume.domain,
        chunk_len: volume.chunk_len,
        capacity_bytes,
        root: None,
        node: None,
    })
}

/// The same for volumes of an encrypted domain.
#[cfg(test)]
#[expect(clippy::duplicate_mod, reason = "the tests look at what their module is called")]
#[path = "volume_tests.rs"]
mod encrypted_tests;
#[cfg(test)]
#[path = "volume_tests.rs"]
mod tests;
