//! What front ends, the thread and the control of an open volume share: reading, appending to the log, and handing over what is to be
//! moved into the tree.

use std::collections::BTreeSet;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak};
use std::time::{Duration, Instant};

use crate::catalog::{SnapshotRow, VolumeRow};
use crate::domain::Domain;
use crate::error::{Result, StoreError};
use crate::store::Store;
use crate::tree::Root;
use crate::tree::reader::TreeReader;
use crate::volume::extent_map::{BLOCK_LEN, ExtentMap, LogPlace, Place};
use crate::volume::flush::Syncs;
use crate::volume::head::Head;
use crate::volume::layers::{Frozen, Generation, LayeredPart, Layers, Piece, backlog, chunk_pieces, opening_of};
use crate::volume::log::{self, LogWriter};
use crate::volume::log_file;
use crate::volume::log_file::LogFile;
use crate::volume::log_record::{Change, Entry, PAYLOAD_LEN_MAX, chunk_names};
use crate::volume::log_seal::{LogSealer, SEALED_BLOCKS_MAX, sealed_len};
use crate::volume::snapshot::{SnapshotNames, decode_snapshot};
use crate::volume::{VolumeOptions, check_range};

/// How soon a full disk is looked at again.
const SPACE_LOOK: Duration = Duration::from_millis(200);

/// A log that needed its last file longer ago than that is written slowly.
const SLOW_ROTATION: Duration = Duration::from_secs(1);
/// A log of which no more than that is written between two flushes waits for flushes more than for anything else.
const FLUSHED_BYTES: u64 = 64 << 10;

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
    /// When the log went on in another file last.
    pub last_rotation: Option<Instant>,
}

/// What front ends, the thread and the control of a volume share.
pub(crate) struct Core {
    pub store: Arc<Store>,
    pub row: VolumeRow,
    /// None: the volume is not encrypted.
    pub domain: Option<Arc<Domain>>,
    pub(super) sealer: Option<LogSealer>,
    pub options: VolumeOptions,
    pub folder: PathBuf,
    pub(super) log: Mutex<LogWriter>,
    pub(super) layers: RwLock<Layers>,
    pub(super) syncs: Mutex<Syncs>,
    /// A sync came to its end.
    pub(super) synced: Condvar,
    /// Records up to this sequence number are stable.
    pub(super) stable: AtomicU64,
    /// Bytes of log that are not in the tree.
    pub(super) backlog: AtomicU64,
    /// Bytes that were taken off the backlog for what is moved of the frozen generation, of which the log's files are still there.
    pub(super) moved_ahead: AtomicU64,
    pub work: Mutex<Work>,
    pub wake: Condvar,
    /// The thread got on.
    pub progress: Condvar,
    /// Names of snapshots in the log; whoever makes one has them meanwhile.
    pub(super) snapshot_names: Mutex<SnapshotNames>,
    /// Signals of queues, which hear of another size.
    pub(super) queues: Mutex<Vec<Weak<OwnedFd>>>,
}

impl Core {
    /// Reads the log of a volume that nobody else has open.
    pub(super) fn recover(
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
        let files = log_file::list(&folder)?;
        let begun = start.offset() > u64::from(log_file::FIRST_OFFSET) || files.iter().any(|&file| file > start.file());
        if begun && !files.contains(&start.file()) {
            return Err(StoreError::Damaged {
                path: folder.join("head"),
                offset: 0,
                what: format!("file {} of the log is missing", start.file()),
            });
        }
        log_file::remove_before(&folder, state.position.place.file())?;
        let mut active = Generation::default();
        let mut capacity_bytes = state.capacity_bytes;
        let mut snapshots = Vec::new();
        let mut damage = None;
        let file_len = options.log_file_len();
        let spare = || store.spares().take(file_len);
        let recovered =
            log::recover(&folder, row.id, state.epoch, state.position, file_len, spare, |appended, payload| {
                let old_capacity = capacity_bytes;
                let names = chunk_names(appended.change, payload, row.chunk_len.into());
                match (&names, appended.change) {
                    // Chunks that nobody promised may have been lost.
                    (Some(names), _) if !store.holds_chunks(names)? => return Ok(false),
                    (None, Change::Chunks { .. }) => {
                        damage = Some((appended.place, "a record of chunks that cannot be"));
                        return Ok(true);
                    }
                    _ => {}
                }
                let opening = match opening_of(sealer.as_ref(), &active, &appended, payload) {
                    Ok(opening) => opening,
                    Err(what) => {
                        damage = Some((appended.place, what));
                        return Ok(true);
                    }
                };
                let snapshot = match appended.change {
                    Change::Snapshot => match decode_snapshot(payload, &row, capacity_bytes) {
                        Some(snapshot) => Some(Box::new(snapshot)),
                        None => {
                            damage = Some((appended.place, "a snapshot that cannot be read"));
                            return Ok(true);
                        }
                    },
                    Change::Resize { capacity_bytes: new } => {
                        capacity_bytes = new;
                        None
                    }
                    _ => None,
                };
                snapshots.extend(snapshot.as_deref().cloned());
                active.add(&appended, snapshot, opening, names, old_capacity);
                Ok(true)
            })?;
        if let Some((place, what)) = damage {
            return Err(StoreError::Damaged {
                path: folder.join(format!("log-{:08}", place.file())),
                offset: place.offset(),
                what: what.to_owned(),
            });
        }
        if !snapshots.is_empty() {
            // What the catalog says is there is not to be gone with the name of its file.
            log_file::sync_folder(&folder)?;
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
            moved_ahead: AtomicU64::new(0),
            work: Mutex::new(work),
            wake: Condvar::new(),
            progress: Condvar::new(),
            snapshot_names: Mutex::new(SnapshotNames::in_log(pending_names)),
            queues: Mutex::default(),
        };
        Ok((core, head))
    }

    pub(super) fn log(&self) -> MutexGuard<'_, LogWriter> {
        self.log.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    pub fn layers(&self) -> RwLockReadGuard<'_, Layers> {
        self.layers.read().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    pub(super) fn layers_mut(&self) -> RwLockWriteGuard<'_, Layers> {
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
                Some(Place::Chunks(place)) => {
                    match layers.named_pieces(place, skipped, len, self.chunk_len(), pieces) {
                        Some(()) => {}
                        None => unreachable!("the records of both generations are kept"),
                    }
                }
                None => chunk_pieces(start, len, self.chunk_len(), pieces),
            }
        };
        let blocks = offset / BLOCK_LEN..end.div_ceil(BLOCK_LEN);
        layers.parts(blocks, &mut add);
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
        let mut reader = TreeReader::new(&self.store, root, self.chunk_len(), self.row.domain);
        for piece in &pieces {
            let (part, behind) = rest.split_at_mut(piece.len());
            piece.read(part, |piece, part| match piece {
                Piece::Chunk { index, from, .. } => reader.read(*index, *from, part),
                Piece::Named { name, from, .. } => {
                    part.copy_from_slice(&self.named_chunk(name)?[*from..*from + part.len()]);
                    Ok(())
                }
                _ => unreachable!("it does not lie in the log"),
            })?;
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
            let mut stop = ((at / BLOCK_LEN * BLOCK_LEN) + self.write_len_max()).min(end);
            match self.direct_part(at, stop - at) {
                Some(direct) if direct.start > at => stop = direct.start,
                Some(direct) => {
                    self.wait_for_room()?;
                    if self.write_direct(at, &bytes[(at - offset) as usize..(direct.end - offset) as usize])? {
                        at = direct.end;
                        continue;
                    }
                }
                None => {}
            }
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
    pub(super) fn write_len_max(&self) -> u64 {
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

    pub(super) fn capacity_bytes(&self) -> u64 {
        self.layers().capacity_bytes
    }

    /// Whether a write need not wait: the log has room, and a file to go on in.
    pub fn has_room_now(&self, len: usize) -> bool {
        let len = if self.sealer.is_some() { sealed_len(len) } else { len };
        self.backlog_bytes() < self.options.log_bytes_max
            && (self.log().fits(len) || self.store.spares().has(self.options.log_file_len()))
    }

    /// Waits while the log is as long as it may be.
    pub(super) fn wait_for_room(&self) -> Result<()> {
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
    pub(super) fn append_record(
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
            Change::Zeros { offset, len } | Change::Chunks { offset, len } => Some((offset, len)),
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
    pub(super) fn wait_for_space(&self, error: &StoreError) -> bool {
        if !error.is_no_space() {
            return false;
        }
        tracing::warn!(volume = self.row.name, "the host's disk is full; writes wait");
        if let Err(error) = self.store.refresh_segments() {
            tracing::warn!(%error, "files that a collection removed cannot be closed");
        }
        if let Err(error) = self.store.spares().clear() {
            tracing::warn!(%error, "files that are kept for logs cannot be removed");
        }
        self.wait_for_room_makers()
    }

    /// Waits a while for room on the host's disk, and as long as somebody makes some: what little there is belongs to them. Whether the
    /// volume goes on.
    pub fn wait_for_room_makers(&self) -> bool {
        loop {
            let work = self.work();
            let waited = self.progress.wait_timeout(work, SPACE_LOOK);
            let (work, _) = waited.unwrap_or_else(|poisoned| poisoned.into_inner());
            if work.stop {
                return false;
            }
            drop(work);
            if !self.store.is_room_being_made() {
                return true;
            }
        }
    }

    pub(super) fn append_locked(
        &self,
        log: &mut LogWriter,
        change: Change,
        payload: &[u8],
        checksum: u32,
        snapshot: Option<Box<SnapshotRow>>,
    ) -> Result<()> {
        self.make_fit(log, payload.len())?;
        self.append_fitting(log, &[Entry { change, payload, checksum }], snapshot).1
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

    /// Some of the frozen generation was moved: who waits for room goes on as fast as that is, and not when all of it is in the tree. So
    /// the files of the log take up to twice what the log holds.
    pub fn moved_some(&self, bytes: u64) {
        self.moved_ahead.fetch_add(bytes, Ordering::Relaxed);
        self.backlog.fetch_sub(bytes, Ordering::Relaxed);
        drop(self.work());
        self.progress.notify_all();
    }

    /// The frozen generation is moved once more, from its beginning.
    pub fn moved_none(&self) {
        let ahead = self.moved_ahead.swap(0, Ordering::Relaxed);
        self.backlog.fetch_add(ahead, Ordering::Relaxed);
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
        let ahead = self.moved_ahead.swap(0, Ordering::Relaxed);
        self.backlog.fetch_sub(moved.saturating_sub(ahead), Ordering::Relaxed);
        let snapshots = frozen.generation.records.iter().filter_map(|record| record.snapshot.as_deref());
        let names: Vec<&str> = snapshots.map(|snapshot| snapshot.name.as_str()).collect();
        if !names.is_empty() {
            self.snapshot_names().settled(&names);
        }
        old
    }

    /// The file of the log, if all that was ever written is in the tree. For when nothing is written any more.
    pub fn take_empty_log(&self) -> Option<Arc<LogFile>> {
        let log = self.log();
        let layers = self.layers();
        let is_empty = layers.active.records.is_empty() && layers.frozen.is_none() && log.broken().is_none();
        is_empty.then(|| log.file().clone())
    }

    /// Whether the log is about to need another file and none is known to be there to be used again.
    pub fn lacks_spare(&self) -> bool {
        let offset = self.log().position().place.offset();
        offset >= self.spare_mark() && !self.store.spares().has(self.options.log_file_len())
    }

    /// Whether the log's flushes matter more than what it costs to write its next file twice.
    pub fn is_worth_a_spare(&self) -> bool {
        let (offset, flushes) = {
            let log = self.log();
            (log.position().place.offset(), log.flushes())
        };
        let slow = self.work().last_rotation.is_none_or(|last| last.elapsed() > SLOW_ROTATION);
        slow || flushes * FLUSHED_BYTES >= offset
    }

    /// The bytes of a log's file after which the next one is made ready.
    pub(super) fn spare_mark(&self) -> u64 {
        self.options.log_file_len() / 4
    }
}
