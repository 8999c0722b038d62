//! A volume that this process writes: its log, what of the log is not in the tree yet, and the tree.
//!
//! A write is appended to the log and laid over the tree in memory; the guest's flush syncs the log. A thread of the volume's own
//! (`compact`) moves what was written into the tree, a generation at a time: the active generation takes new writes, the frozen one
//! is being moved. Reads look into both, then into the tree. A snapshot is a record of the log: its content is what the records before
//! it say, and becomes a tree of its own when the thread comes by.

pub(crate) mod compact;
pub(crate) mod control;
pub(crate) mod core;
mod direct;
pub(crate) mod extent_map;
mod flush;
pub(crate) mod group;
pub(crate) mod head;
pub(crate) mod layers;
pub(crate) mod log;
pub(crate) mod log_file;
pub(crate) mod log_read;
pub(crate) mod log_record;
pub(crate) mod log_seal;
mod snapshot;
pub(crate) mod spares;
pub(crate) mod volumes;

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::catalog::{SnapshotRow, VolumeRow};
use crate::disk::SECTOR_LEN;
use crate::error::{Result, StoreError};
use crate::store::Store;
use crate::volume::control::ControlSocket;
use crate::volume::core::Core;
use crate::volume::extent_map::{BLOCK_LEN, LogPlace};
use crate::volume::head::{Head, State};
use crate::volume::log_record::Position;

/// The largest volume.
pub const CAPACITY_BYTES_MAX: u64 = 64 << 40;

/// How a volume's log is used.
#[derive(Debug, Clone, Copy)]
pub struct VolumeOptions {
    /// Bytes of log at which writers wait.
    pub log_bytes_max: u64,
    /// Bytes of log at which they are moved into the tree.
    pub log_bytes_start: u64,
    /// Without writes for that long, what there is is moved.
    pub settle: Duration,
    /// Bytes written since the last flush after which long writes go straight into segments, and only their names into the log.
    pub stream_bytes: u64,
    /// Bytes of a file of the log, from 2 MiB to 1 GiB.
    pub log_file_bytes: u64,
}

impl Default for VolumeOptions {
    fn default() -> Self {
        VolumeOptions {
            log_bytes_max: 1 << 30,
            log_bytes_start: 512 << 20,
            settle: Duration::from_secs(5),
            stream_bytes: 128 << 20,
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

/// A volume that is open for writing. One process at a time has it.
pub struct Volume {
    core: Arc<Core>,
    control: Option<ControlSocket>,
    thread: Option<JoinHandle<()>>,
    /// Others may open the volume once it is gone.
    lock: Option<std::fs::File>,
}

impl Volume {
    /// Opens a volume for writing. The second process that tries is refused.
    pub fn open(store: &Arc<Store>, name: &str, options: VolumeOptions) -> Result<Volume> {
        let row = store.catalog().volume(name)?;
        // Before anything is changed.
        let domain = store.unlocked(row.domain)?;
        let folder = store.volume_folder(row.id);
        std::fs::create_dir_all(&folder).map_err(StoreError::file("make", &folder))?;
        let lock = volumes::lock(&folder, "volume", name)?;
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
            let spawned = thread.spawn(move || crate::volume::compact::run(&core, head));
            spawned.map_err(|error| StoreError::Refused(format!("cannot start a thread for volume {name}: {error}")))?
        };
        let mut volume = Volume { core, control: None, thread: Some(thread), lock: Some(lock) };
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

    /// As [`close`](Self::close), and nobody opens the volume before what this gives is dropped.
    pub(crate) fn close_and_keep_out(mut self) -> Result<Option<std::fs::File>> {
        // Who asks for a snapshot now would lose it.
        self.control = None;
        let lock = self.lock.take();
        self.close()?;
        Ok(lock)
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        self.core.work().stop = true;
        self.core.wake.notify_all();
        self.core.progress.notify_all();
        // Requests that wait for the thread hear that the volume ends.
        self.control = None;
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
        log_file::sync_folder(volumes)?;
    }
    if !log_file::list(folder)?.is_empty() {
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
        position: Position { place: LogPlace::new(1, log_file::FIRST_OFFSET), sequence: 1, epoch: 0 },
    };
    Head::create(folder, state)
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

#[cfg(test)]
mod crash_rules_tests;
#[cfg(test)]
mod direct_tests;
/// The same for volumes of an encrypted domain.
#[cfg(test)]
#[expect(clippy::duplicate_mod, reason = "the tests look at what their module is called")]
#[path = "tests.rs"]
mod encrypted_tests;
#[cfg(test)]
mod tests;
