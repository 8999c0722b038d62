//! Which volumes there are: making, cloning, removing, rolling back, comparing.
//!
//! Making and cloning are one record in the catalog; a volume's folder comes when it is opened first.

use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};

use crate::catalog::{DomainRow, SnapshotRow, VolumeRow, check_name};
use crate::domain::OPEN_DOMAIN;
use crate::error::{Result, StoreError};
use crate::id::Id;
use crate::name::Name;
use crate::node::{Tree, is_chunk_len};
use crate::store::Store;
use crate::tree::{self, Root};
use crate::volume::extent_map::LogPlace;
use crate::volume::head::{Head, State};
use crate::volume::log_file;
use crate::volume::log_read;
use crate::volume::log_record::{Change, Position, chunk_names};
use crate::volume::snapshot::decode_snapshot;
use crate::volume::{Volume, VolumeOptions, check_capacity, now_ns};

/// How long whoever only looks has a volume's lock at most, on a busy host.
const LOOK_TIME: Duration = Duration::from_millis(20);

/// Bytes of a chunk unless another size is asked for.
pub const CHUNK_LEN_DEFAULT: u32 = 16 << 10;

/// What a volume begins as.
#[derive(Debug, Clone)]
pub enum Content<'a> {
    Zeros {
        capacity_bytes: u64,
        chunk_len: u32,
    },
    /// A snapshot of a volume.
    Snapshot(&'a SnapshotRow),
    /// The first disk of an image.
    Image(&'a str),
}

/// A volume as lists show it.
#[derive(Debug, Clone)]
pub struct VolumeFacts {
    pub row: VolumeRow,
    pub capacity_bytes: u64,
    pub snapshots: usize,
    /// The process that has it open.
    pub user: Option<String>,
}

impl Store {
    pub(crate) fn volume_folder(&self, id: Id) -> PathBuf {
        self.folder().join("volumes").join(id.to_string())
    }

    /// Makes a volume. One record, whatever its size and however long its history.
    pub fn create_volume(self: &Arc<Self>, name: &str, content: &Content<'_>) -> Result<VolumeRow> {
        self.create_volume_in(name, content, None)
    }

    /// Makes a volume in a domain. What begins as something else is in the domain of that.
    pub fn create_volume_in(
        self: &Arc<Self>,
        name: &str,
        content: &Content<'_>,
        domain: Option<&str>,
    ) -> Result<VolumeRow> {
        let domain = domain.map(|domain| self.usable_domain(domain)).transpose()?;
        check_name("volume", name)?;
        let mut row = VolumeRow {
            id: Id::random(),
            name: name.to_owned(),
            created_ns: now_ns(),
            domain: domain.as_ref().map_or(OPEN_DOMAIN, |domain| domain.id),
            chunk_len: CHUNK_LEN_DEFAULT,
            capacity_bytes: 0,
            root: Root::empty(0),
            origin: None,
        };
        match content {
            Content::Zeros { capacity_bytes, chunk_len } => {
                check_capacity(*capacity_bytes)?;
                if !is_chunk_len(*chunk_len) {
                    return Err(StoreError::Refused(format!(
                        "chunks of {chunk_len} bytes are not possible: 4096, 16384 and 65536 are"
                    )));
                }
                row.capacity_bytes = *capacity_bytes;
                row.chunk_len = *chunk_len;
                row.root = Root::empty(capacity_bytes.div_ceil(u64::from(*chunk_len)));
                self.catalog().add_volume(&row)?;
            }
            Content::Snapshot(snapshot) => {
                let cloned = self.catalog().add_clone(name, snapshot.id, |snapshot| {
                    take_domain(&mut row, domain.as_ref(), snapshot.domain)?;
                    row.chunk_len = snapshot.chunk_len;
                    row.capacity_bytes = snapshot.capacity_bytes;
                    match snapshot.root {
                        Some(root) => row.root = root,
                        None => row.origin = Some(snapshot.id),
                    }
                    Ok(row)
                })?;
                self.added_to_catalog();
                return cloned.ok_or_else(|| StoreError::NotFound { what: "snapshot", name: snapshot.name.clone() });
            }
            Content::Image(image) => {
                // It is not collected between looking it up and the volume's record.
                let _kept = self.batch()?;
                let tree = self.first_disk(image)?;
                check_capacity(tree.len_bytes)?;
                take_domain(&mut row, domain.as_ref(), tree.domain)?;
                row.chunk_len = tree.chunk_len;
                row.capacity_bytes = tree.len_bytes;
                row.root = tree.root;
                self.catalog().add_volume(&row)?;
            }
        }
        Ok(row)
    }

    pub fn volume(&self, name: &str) -> Result<VolumeRow> {
        self.catalog().volume(name)
    }

    /// All volumes, by name.
    pub fn volumes(&self) -> Result<Vec<VolumeFacts>> {
        let rows = self.catalog().volumes()?;
        rows.into_iter()
            .map(|row| {
                let folder = self.volume_folder(row.id);
                let head = Head::peek(&folder)?;
                Ok(VolumeFacts {
                    capacity_bytes: head.map_or(row.capacity_bytes, |head| head.capacity_bytes),
                    snapshots: self.catalog().snapshots(Some(row.id))?.len(),
                    user: user(&folder),
                    row,
                })
            })
            .collect()
    }

    /// Removes a volume with its snapshots. What clones and images need of it stays.
    pub fn remove_volume(self: &Arc<Self>, name: &str) -> Result<()> {
        let row = self.catalog().volume(name)?;
        let folder = self.volume_folder(row.id);
        let lock = folder.exists().then(|| self.with_reserve(|| lock(&folder, "volume", name))).transpose()?;
        // Clones of snapshots that are in the log only need them in the tree.
        let pending = self.catalog().snapshots(Some(row.id))?.into_iter().filter(|snapshot| snapshot.root.is_none());
        let origins: Vec<Id> = self.catalog().volumes()?.into_iter().filter_map(|other| other.origin).collect();
        // Of an erased domain nobody reads them either way.
        let is_erased = self.domains()?.iter().any(|domain| domain.id == row.domain && domain.is_erased);
        if !is_erased && pending.into_iter().any(|snapshot| origins.contains(&snapshot.id)) {
            drop(lock);
            self.settle(row.id)?;
            return self.remove_volume(name);
        }
        let making_room = self.make_room()?;
        self.with_reserve(|| self.catalog().remove_volume(row.id))?;
        drop(making_room);
        match std::fs::remove_dir_all(&folder) {
            // A volume that was never open has none; and a collection may have been quicker.
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(StoreError::file("remove", &folder)(error));
            }
            _ => {}
        }
        drop(lock);
        Ok(())
    }

    pub fn rename_volume(&self, name: &str, new_name: &str) -> Result<()> {
        let row = self.catalog().volume(name)?;
        self.catalog().rename_volume(row.id, new_name)
    }

    /// The snapshots of a volume, oldest first.
    pub fn snapshots(&self, volume: &str) -> Result<Vec<SnapshotRow>> {
        let row = self.catalog().volume(volume)?;
        self.find_snapshots(&row)?;
        self.catalog().snapshots(Some(row.id))
    }

    pub fn snapshot(&self, volume: &str, name: &str) -> Result<SnapshotRow> {
        let row = self.catalog().volume(volume)?;
        match self.catalog().snapshot(row.id, name) {
            Err(StoreError::NotFound { .. }) => {
                self.find_snapshots(&row)?;
                self.catalog().snapshot(row.id, name)
            }
            found => found,
        }
    }

    /// Brings snapshots into the catalog that a crash left in the log of a volume only. Whoever opens the volume does so as well: here
    /// it stays closed, and nothing of it is changed.
    fn find_snapshots(&self, row: &VolumeRow) -> Result<()> {
        let folder = self.volume_folder(row.id);
        let Some(state) = Head::peek(&folder)?.filter(|_| user(&folder).is_none()) else { return Ok(()) };
        let found = match log_snapshots(self, &folder, row, &state) {
            Ok(found) if found.is_empty() => return Ok(()),
            // Those that are known are still of use.
            Err(error @ StoreError::Damaged { .. }) => {
                tracing::warn!(volume = row.name, %error, "snapshots that are in its log only are not known");
                return Ok(());
            }
            other => other?,
        };
        // Who has opened it meanwhile has found them too.
        let Ok(_lock) = lock(&folder, "volume", &row.name) else { return Ok(()) };
        if Head::peek(&folder)? == Some(state) {
            for snapshot in found {
                self.catalog().restore_snapshot(&snapshot)?;
            }
        }
        Ok(())
    }

    /// Makes a volume that begins as a snapshot of another, or as what that is now.
    pub fn clone_volume(self: &Arc<Self>, volume: &str, snapshot: Option<&str>, name: &str) -> Result<VolumeRow> {
        check_name("volume", name)?;
        match snapshot {
            Some(snapshot) => self.create_volume(name, &Content::Snapshot(&self.snapshot(volume, snapshot)?)),
            None => {
                let taken = self.take_snapshot(volume, &format!("for-{name}-{}", Id::random()))?;
                let clone = self.create_volume(name, &Content::Snapshot(&taken));
                // The clone keeps what it needs.
                self.remove_snapshot(volume, &taken.name)?;
                clone
            }
        }
    }

    /// What a volume is now, or was at a snapshot, as a tree that holds all of it.
    pub fn settled_disk(self: &Arc<Self>, volume: &str, snapshot: Option<&str>) -> Result<Tree> {
        let row = self.catalog().volume(volume)?;
        if let Some(snapshot) = snapshot {
            let snapshot = self.catalog().snapshot(row.id, snapshot)?;
            let root = self.settled_root(&snapshot)?;
            let name = volume.to_owned();
            let (len_bytes, chunk_len, domain) = (snapshot.capacity_bytes, snapshot.chunk_len, snapshot.domain);
            return Ok(Tree { name, root, len_bytes, chunk_len, domain });
        }
        self.settle(row.id)?;
        let row = self.resolve_origin(self.catalog().volume(volume)?)?;
        let head = Head::peek(&self.volume_folder(row.id))?;
        let (root, len_bytes) = head.map_or((row.root, row.capacity_bytes), |head| (head.root, head.capacity_bytes));
        Ok(Tree { name: row.name, root, len_bytes, chunk_len: row.chunk_len, domain: row.domain })
    }

    /// Takes a snapshot of a volume, whoever has it open.
    pub fn take_snapshot(self: &Arc<Self>, volume: &str, name: &str) -> Result<SnapshotRow> {
        let row = self.catalog().volume(volume)?;
        match Volume::open(self, volume, VolumeOptions::default()) {
            Ok(volume) => volume.snapshot(name).map(drop)?,
            Err(StoreError::InUse { .. }) => crate::volume::control::snapshot(&self.volume_folder(row.id), name)?,
            Err(error) => return Err(error),
        }
        self.catalog().snapshot(row.id, name)
    }

    /// Gives a volume another size, whoever has it open.
    pub fn resize_volume(self: &Arc<Self>, volume: &str, capacity_bytes: u64) -> Result<()> {
        let row = self.catalog().volume(volume)?;
        match Volume::open(self, volume, VolumeOptions::default()) {
            Ok(volume) => volume.resize(capacity_bytes),
            Err(StoreError::InUse { .. }) => {
                crate::volume::control::resize(&self.volume_folder(row.id), capacity_bytes)
            }
            Err(error) => Err(error),
        }
    }

    /// Removes a snapshot; one that is still only in its volume's log is moved into the tree first.
    pub fn remove_snapshot(self: &Arc<Self>, volume: &str, name: &str) -> Result<()> {
        let snapshot = self.snapshot(volume, name)?;
        if snapshot.root.is_none() {
            self.settle(snapshot.volume)?;
        }
        let _making_room = self.make_room()?;
        self.with_reserve(|| self.catalog().remove_snapshot(snapshot.id))
    }

    /// Makes a volume what it was at a snapshot. It must not be open; what was written since is gone, later snapshots stay.
    pub fn roll_back(self: &Arc<Self>, volume: &str, name: &str) -> Result<()> {
        let snapshot = self.snapshot(volume, name)?;
        // The log goes, and snapshots may be nowhere else: all of it is in the tree before, and nobody adds to it meanwhile.
        let _lock = Volume::open(self, volume, VolumeOptions::default())?.close_and_keep_out()?;
        let missing = || StoreError::NotFound { what: "snapshot", name: name.to_owned() };
        let snapshot = self.catalog().snapshot_by_id(snapshot.id)?.ok_or_else(missing)?;
        let root = snapshot.root.ok_or_else(missing)?;
        let folder = self.volume_folder(snapshot.volume);
        let mut head = Head::open(&folder)?.ok_or_else(missing)?;
        let files = log_file::list(&folder)?;
        let next = files.last().copied().unwrap_or(0).max(head.state.position.place.file()) + 1;
        let epoch = head.state.epoch + 1;
        let sequence = head.state.position.sequence + (1 << 32);
        let position = Position { place: LogPlace::new(next, log_file::FIRST_OFFSET), sequence, epoch };
        head.write(State { root, capacity_bytes: snapshot.capacity_bytes, position, epoch, ..head.state })?;
        log_file::remove_before(&folder, next)
    }

    /// The root of a snapshot, which is in the tree afterwards.
    pub fn settled_root(self: &Arc<Self>, snapshot: &SnapshotRow) -> Result<Root> {
        if let Some(root) = snapshot.root {
            return Ok(root);
        }
        self.settle(snapshot.volume)?;
        let settled = self.catalog().snapshot_by_id(snapshot.id)?.and_then(|snapshot| snapshot.root);
        settled.ok_or_else(|| StoreError::NotFound { what: "snapshot", name: snapshot.name.clone() })
    }

    /// Sees to it that everything a volume's log holds now is in the tree.
    fn settle(self: &Arc<Self>, id: Id) -> Result<()> {
        let row = self.catalog().volumes()?.into_iter().find(|row| row.id == id);
        let row = row.ok_or_else(|| StoreError::NotFound { what: "volume", name: id.to_string() })?;
        match Volume::open(self, &row.name, VolumeOptions::default()) {
            Ok(volume) => volume.close(),
            Err(StoreError::InUse { .. }) => crate::volume::control::compact(&self.volume_folder(id)),
            Err(error) => Err(error),
        }
    }

    /// A volume that began as a snapshot gets that one's root.
    pub(crate) fn resolve_origin(self: &Arc<Self>, mut row: VolumeRow) -> Result<VolumeRow> {
        if let Some(origin) = row.origin {
            let snapshot = self.catalog().snapshot_by_id(origin)?;
            let snapshot =
                snapshot.ok_or_else(|| StoreError::NotFound { what: "snapshot", name: origin.to_string() })?;
            row.root = self.settled_root(&snapshot)?;
            row.origin = None;
            self.catalog().set_volume_root(row.id, row.root)?;
        }
        Ok(row)
    }

    /// The parts of two trees that differ, in bytes, in order, neighbours joined.
    pub fn differences(
        &self,
        trees: [Root; 2],
        chunk_len: u32,
        range: Range<u64>,
        differs: &mut dyn FnMut(Range<u64>) -> Result<()>,
    ) -> Result<()> {
        let chunk_len = u64::from(chunk_len);
        let mut pending: Option<Range<u64>> = None;
        let chunks = range.start / chunk_len..range.end.div_ceil(chunk_len);
        tree::differences(self, trees, chunks, &mut |chunk, _: [Name; 2]| {
            let start = chunk * chunk_len;
            match &mut pending {
                Some(pending) if pending.end == start => pending.end += chunk_len,
                _ => {
                    if let Some(done) = pending.replace(start..start + chunk_len) {
                        differs(done)?;
                    }
                }
            }
            Ok(())
        })?;
        pending.map_or(Ok(()), differs)
    }
}

/// A volume is in the domain of what it begins as.
fn take_domain(row: &mut VolumeRow, wanted: Option<&DomainRow>, origin: u32) -> Result<()> {
    match wanted {
        Some(wanted) if wanted.id != origin => Err(StoreError::Refused(format!(
            "volume {} cannot be in domain {}: what it begins as is not, and is shared with it",
            row.name, wanted.name
        ))),
        _ => {
            row.domain = origin;
            Ok(())
        }
    }
}

/// The snapshots in the log of a volume that nobody has open, stable.
fn log_snapshots(store: &Store, folder: &Path, row: &VolumeRow, state: &State) -> Result<Vec<SnapshotRow>> {
    let mut capacity_bytes = state.capacity_bytes;
    let mut found = Vec::new();
    log_read::read(folder, row.id, state.position, |appended, payload| {
        match appended.change {
            Change::Snapshot => found.extend(decode_snapshot(payload, row, capacity_bytes)),
            Change::Resize { capacity_bytes: new } => capacity_bytes = new,
            Change::Chunks { .. } => {
                return match chunk_names(appended.change, payload, row.chunk_len.into()) {
                    Some(names) => store.holds_chunks(&names),
                    // Who opens the volume says what is wrong.
                    None => Ok(false),
                };
            }
            _ => {}
        }
        Ok(true)
    })?;
    if !found.is_empty() {
        log_file::sync_folder(folder)?;
    }
    Ok(found)
}

/// Takes the lock of a volume's folder, and writes who has it. Whoever only looks has it for a moment.
pub(crate) fn lock(folder: &Path, what: &'static str, name: &str) -> Result<File> {
    let path = folder.join("lock");
    let file = File::options().create(true).truncate(false).read(true).write(true).open(&path);
    let mut file = file.map_err(StoreError::file("open", &path))?;
    let begin = Instant::now();
    let locked = loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Err(rustix::io::Errno::WOULDBLOCK) if begin.elapsed() < LOOK_TIME => std::thread::sleep(LOOK_TIME / 20),
            locked => break locked,
        }
    };
    match locked {
        Ok(()) => {
            let process = std::process::id().to_string();
            // On a full disk a file that is made empty first may get nothing any more.
            file.write_all_at(process.as_bytes(), 0)
                .and_then(|()| file.set_len(process.len() as u64))
                .map_err(StoreError::file("write", &path))?;
            Ok(file)
        }
        Err(rustix::io::Errno::WOULDBLOCK) => {
            let mut process = String::new();
            let _ = file.read_to_string(&mut process);
            Err(StoreError::InUse { what, name: name.to_owned(), process })
        }
        Err(error) => Err(StoreError::file("lock", &path)(error.into())),
    }
}

/// The process that has a volume open, if there is one.
fn user(folder: &Path) -> Option<String> {
    let mut file = File::open(folder.join("lock")).ok()?;
    if flock(&file, FlockOperation::NonBlockingLockShared).is_ok() {
        return None;
    }
    let mut process = String::new();
    file.read_to_string(&mut process).ok()?;
    Some(process)
}
