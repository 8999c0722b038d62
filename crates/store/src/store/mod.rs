//! A store: a folder that any number of processes of a host use at once.
//!
//! Reading needs no lock. Whoever adds records does so in a [`Batch`]: from the first look whether a record is there already until
//! the root that needs it is stable, the batch holds the store's shared lock, so that a garbage collection, which takes that lock alone
//! for a moment before it removes anything, sees either the root or no use of the record.

mod batch;
mod reading;
pub(crate) mod reserve;

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, RwLock};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};

use crate::catalog::Catalog;
use crate::domain::{Domain, Keyring};
use crate::error::{Result, StoreError};
use crate::id::Id;
use crate::name::{Kind, Name, Namer};
use crate::records::behind::{Writers, Writing};
use crate::records::cache::{Cache, ReadOnce};
use crate::records::index::{Index, IndexFigures};
use crate::records::record::{self, HEADER_LEN, Header};
use crate::records::segment::{Location, SegmentFolder, SegmentNumber};
use crate::records::segment_writer::SegmentWriter;
use crate::tree::{NODE_LEN, TreeNode};
use crate::volume::log_file::sync_folder;
use crate::volume::spares::Spares;
use crate::workers::Workers;

use crate::room::Purpose;
pub use batch::Added;
pub(crate) use batch::{Batch, is_zero};
pub(crate) use reading::{Expected, InDomain, Local, Read};

/// How long batches are kept from beginning at a time, while those that run end.
const GATE_TIME: Duration = Duration::from_millis(500);
/// How soon a lock is looked at again.
const LOCK_LOOK: Duration = Duration::from_millis(1);
/// Memory of a node in the cache: names and locations.
const NODE_WEIGHT: usize = NODE_LEN + 128 * 8;

/// How much memory a process spends on a store.
#[derive(Debug, Clone, Copy)]
pub struct StoreOptions {
    /// Chunks that were read.
    pub chunk_cache_bytes: usize,
    /// Nodes of trees.
    pub node_cache_bytes: usize,
}

impl Default for StoreOptions {
    fn default() -> Self {
        StoreOptions { chunk_cache_bytes: 64 << 20, node_cache_bytes: 32 << 20 }
    }
}

/// A store that this process has open.
pub struct Store {
    folder: PathBuf,
    id: Id,
    catalog: Catalog,
    index: Index,
    segments: SegmentFolder,
    namer: Namer,
    /// The segment that this process writes.
    writer: Mutex<Option<SegmentWriter>>,
    /// What writes segments: a disk that does not answer is not to hold those up who wait for other workers.
    writers: Writers,
    /// Segments of this process that could not be made stable.
    failures: AtomicU64,
    files: Mutex<VecDeque<(SegmentNumber, Arc<File>)>>,
    /// With the domains that they were read in.
    chunks: Cache<(u32, Arc<[u8]>)>,
    /// Chunks that were read and not kept.
    chunks_read: ReadOnce,
    nodes: Cache<Arc<TreeNode>>,
    workers: Workers,
    spares: Spares,
    origins: RwLock<Vec<Arc<dyn Origin>>>,
    keyring: RwLock<Keyring>,
}

/// Where records come from that are not in the store.
pub(crate) trait Origin: Send + Sync {
    /// Brings a record into the store, waiting for it if it must; whether it is there now.
    fn bring(&self, store: &Store, name: &Name) -> Result<bool>;
}

impl Store {
    /// Opens the store in a folder, and makes it if there is none.
    pub fn open(folder: &Path, options: StoreOptions) -> Result<Arc<Self>> {
        let segments = SegmentFolder(folder.join("segments"));
        let index_folder = folder.join("index");
        let volumes = folder.join("volumes");
        let spares = folder.join("spares");
        let is_new = !volumes.exists();
        for path in [folder, &segments.0, &index_folder, &spares, &volumes] {
            // What guests have on their disks is nobody else's business.
            let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
            made.map_err(StoreError::file("make", path))?;
        }
        if is_new {
            // What is promised in a folder is lost with its name.
            sync_folder(folder)?;
            sync_folder(&folder.join(".."))?;
        }
        let catalog = reserve::with_reserve(folder, || Catalog::open(&folder.join("catalog.db")))?;
        let store = Store {
            folder: folder.to_path_buf(),
            id: catalog.store_id()?,
            index: Index::new(segments.clone(), index_folder),
            catalog,
            segments,
            namer: Namer::open(),
            writer: Mutex::default(),
            writers: Writers::default(),
            failures: AtomicU64::new(0),
            files: Mutex::default(),
            chunks: Cache::new(options.chunk_cache_bytes),
            chunks_read: ReadOnce::default(),
            nodes: Cache::new(options.node_cache_bytes),
            workers: Workers::default(),
            spares: Spares::new(spares),
            origins: RwLock::default(),
            keyring: RwLock::default(),
        };
        store.finish_dead_segments()?;
        // On a full disk they could not be made.
        store.make_locks();
        store.make_reserve();
        Ok(Arc::new(store))
    }

    /// Opens a store that must be there.
    pub fn open_existing(folder: &Path, options: StoreOptions) -> Result<Arc<Self>> {
        if !folder.join("catalog.db").exists() {
            return Err(StoreError::NotFound { what: "store", name: folder.display().to_string() });
        }
        Store::open(folder, options)
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    pub fn id(&self) -> Id {
        self.id
    }

    pub(crate) fn catalog(&self) -> &Catalog {
        &self.catalog
    }

    /// Threads for what has to wait.
    pub(crate) fn workers(&self) -> &Workers {
        &self.workers
    }

    /// Files for logs to go on in.
    pub(crate) fn spares(&self) -> &Spares {
        &self.spares
    }

    pub(crate) fn index(&self) -> &Index {
        &self.index
    }

    pub(crate) fn segments(&self) -> &SegmentFolder {
        &self.segments
    }

    pub(crate) fn namer(&self) -> &Namer {
        &self.namer
    }

    pub(crate) fn keyring(&self) -> &RwLock<Keyring> {
        &self.keyring
    }

    pub fn index_figures(&self) -> IndexFigures {
        self.index.figures()
    }

    fn writer(&self) -> MutexGuard<'_, Option<SegmentWriter>> {
        self.writer.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn batch_lock(&self) -> Result<File> {
        // Who waits for the lock alone holds the gate: batches that begin one after the other do not keep it out for ever.
        let _gate = self.lock_file("gate.lock", FlockOperation::LockShared)?;
        self.lock_file("batch.lock", FlockOperation::LockShared)
    }

    /// The lock that keeps batches out; waits for those that run. Others do not wait for it for long: who has a batch may need another
    /// before it ends.
    pub(crate) fn lock_out_batches(&self) -> Result<File> {
        loop {
            let gate = self.lock_file("gate.lock", FlockOperation::LockExclusive)?;
            let begin = Instant::now();
            while begin.elapsed() < GATE_TIME {
                if let Some(lock) = self.try_lock("batch.lock")? {
                    return Ok(lock);
                }
                std::thread::sleep(LOCK_LOOK);
            }
            drop(gate);
            std::thread::sleep(GATE_TIME);
        }
    }

    /// A lock that one process at most has. It ends with the file, and so with the process.
    pub(crate) fn try_lock(&self, name: &str) -> Result<Option<File>> {
        self.lock_unless_taken(name, FlockOperation::NonBlockingLockExclusive)
    }

    fn lock_unless_taken(&self, name: &str, operation: FlockOperation) -> Result<Option<File>> {
        match self.lock_file(name, operation) {
            Ok(file) => Ok(Some(file)),
            Err(StoreError::File { source, .. }) if source.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn lock_file(&self, name: &str, operation: FlockOperation) -> Result<File> {
        let path = self.folder.join(name);
        let file = File::options().create(true).truncate(false).write(true).open(&path);
        let file = file.map_err(StoreError::file("open", &path))?;
        loop {
            match flock(&file, operation) {
                Ok(()) => return Ok(file),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(StoreError::file("lock", &path)(error.into())),
            }
        }
    }

    /// Whether a record is here already, so that it can be used without being stored again. The index knows a part of each name only, of
    /// which two that are equal can be made on purpose: so the record itself says.
    pub(crate) fn find_for_reuse(&self, name: &Name) -> Result<Option<Location>> {
        let Some(location) = self.index.find_for_reuse(name)? else { return Ok(None) };
        let is_it = |bytes: &[u8]| Header::from_bytes(bytes).is_ok_and(|header| header.name == *name);
        let mut header = [0; HEADER_LEN];
        // What cannot be read is no reason not to store it once more.
        let read = self.read_bytes(location, &mut header);
        Ok((matches!(read, Ok(HEADER_LEN)) && is_it(&header)).then_some(location))
    }

    /// Begins to add records that are not encrypted.
    pub(crate) fn batch(self: &Arc<Self>) -> Result<Batch> {
        self.batch_in(None)
    }

    /// Begins to add records of a domain.
    pub(crate) fn batch_in(self: &Arc<Self>, domain: Option<Arc<Domain>>) -> Result<Batch> {
        let lock = self.batch_lock()?;
        self.begin_batch(lock, domain)
    }

    /// As [`batch_in`](Self::batch_in), if a collection does not keep batches out just now.
    pub(crate) fn try_batch_in(self: &Arc<Self>, domain: Option<Arc<Domain>>) -> Result<Option<Batch>> {
        let shared = FlockOperation::NonBlockingLockShared;
        let Some(_gate) = self.lock_unless_taken("gate.lock", shared)? else { return Ok(None) };
        let Some(lock) = self.lock_unless_taken("batch.lock", shared)? else { return Ok(None) };
        self.begin_batch(lock, domain).map(Some)
    }

    fn begin_batch(self: &Arc<Self>, lock: File, domain: Option<Arc<Domain>>) -> Result<Batch> {
        // What a collection removed before we had the lock is not to be used again.
        self.refresh_segments()?;
        let failures = self.failures.load(Ordering::SeqCst);
        Ok(Batch::new(lock, self.clone(), domain, failures))
    }

    /// Looks at which segments there are. Files of those that are gone are closed: their room is nobody's before.
    pub(crate) fn refresh_segments(&self) -> Result<()> {
        let known = self.index.generation();
        self.index.refresh_segments(&self.catalog)?;
        if self.index.generation() != known {
            let live = self.index.live();
            self.files().retain(|(number, _)| live.contains(number));
        }
        Ok(())
    }

    /// Makes everything stable that this process added; `failures` is how often that had failed before it was.
    pub(crate) fn sync_records(&self, failures: u64) -> Result<()> {
        let mut writer = self.writer();
        let synced = writer.as_mut().map_or(Ok(()), SegmentWriter::sync);
        synced.inspect_err(|_| self.drop_broken(&mut writer))?;
        if self.failures.load(Ordering::SeqCst) != failures {
            return Err(StoreError::Refused(
                "the host's disk failed to keep what was added to the store meanwhile".to_owned(),
            ));
        }
        Ok(())
    }

    /// Whether chunks are here, whole, and stay if the host's power is cut. Those that a process which died wrote are made to.
    pub(crate) fn holds_chunks(&self, names: &[Name]) -> Result<bool> {
        let mut looked_around = false;
        for name in names.iter().filter(|name| !name.is_none()) {
            if self.holds_chunk(name)? {
                continue;
            }
            if std::mem::replace(&mut looked_around, true) {
                return Ok(false);
            }
            self.finish_dead_segments()?;
            if !self.holds_chunk(name)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn holds_chunk(&self, name: &Name) -> Result<bool> {
        let Some(location) = self.index.find_for_reuse(name)? else { return Ok(false) };
        let mut bytes = vec![0; location.read_len()];
        let len = self.read_bytes(location, &mut bytes)?;
        Ok(record::split(&bytes[..len]).is_ok_and(|(header, _)| header.name == *name && header.kind == Kind::Data))
    }

    /// Finishes the segments of processes that died, and looks at what there is then.
    fn finish_dead_segments(&self) -> Result<()> {
        // A collection that runs may have taken segments out of the catalog whose files are still there.
        let _lock = self.batch_lock()?;
        self.recover_segments()?;
        self.index.refresh(&self.catalog)
    }

    /// A snapshot or a clone was added to the catalog, whose log does not grow without end: a thread that may wait writes it back.
    pub(crate) fn added_to_catalog(self: &Arc<Self>) {
        if self.catalog.wants_checkpoint() {
            let store = Arc::downgrade(self);
            self.workers().run(move || {
                let done = store.upgrade().map_or(Ok(()), |store| store.catalog.checkpoint());
                if let Err(error) = done {
                    tracing::info!(%error, "the catalog's log was not written back; it will be later");
                }
            });
        }
    }

    /// Merges the index where it has many parts, and writes the catalog's log back. For a thread that may wait.
    pub(crate) fn tidy(&self) -> Result<()> {
        if let Some(_lock) = self.try_lock("index.lock")? {
            self.index.refresh(&self.catalog)?;
            while self.index.merge(&self.catalog)? {}
        }
        self.catalog.checkpoint()
    }

    /// Ends the segment that is being written, if there is one: others can build on what it holds.
    pub fn seal(&self) -> Result<()> {
        self.seal_segment(&mut self.writer())
    }

    fn seal_segment(&self, writer: &mut Option<SegmentWriter>) -> Result<()> {
        let Some(segment) = writer else { return Ok(()) };
        let number = segment.number();
        let sealed = segment.seal(|summary| self.catalog.add_segment(summary));
        let sealed = sealed.inspect_err(|_| self.drop_broken(writer))?;
        // The file's name changed, not what is open.
        let file = writer.take().map(|segment| segment.file().clone());
        if let (Some(summary), Some(file)) = (sealed, file) {
            self.index.sealed(&summary, self.catalog.generation()?)?;
            self.keep_file(number, file);
        }
        Ok(())
    }

    /// The file of the segment that is being written.
    #[cfg(test)]
    pub(crate) fn writing_file(&self) -> Option<Arc<File>> {
        self.writer().as_ref().map(|segment| segment.file().clone())
    }

    /// Gives up a segment whose sync failed. Batches that run may have built on it, and fail.
    fn drop_broken(&self, writer: &mut Option<SegmentWriter>) {
        if let Some(segment) = writer.take_if(|segment| segment.is_broken()) {
            self.index.forget_ours(segment.number());
            self.failures.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// A new segment, of a number that was never used.
    pub(crate) fn new_segment(&self, writing: Writing, purpose: Purpose) -> Result<SegmentWriter> {
        loop {
            let number = self.catalog.new_segment()?;
            if let Some(segment) = SegmentWriter::create(&self.segments, number, writing, purpose, &self.writers)? {
                return Ok(segment);
            }
        }
    }

    /// Finishes segments whose processes died, and takes in files that the catalog does not know.
    pub(crate) fn recover_segments(&self) -> Result<()> {
        self.index.recover(&self.catalog, &|| self.new_segment(Writing::Direct, Purpose::MakeRoom))
    }

    /// Appends a record to the segment that this process writes. Without a batch nothing keeps it from the next collection but what
    /// needs it already.
    pub(crate) fn append(&self, header: &Header, packed: &[u8]) -> Result<Location> {
        let mut writer = self.writer();
        let segment = self.segment_with_room(&mut writer, &mut Vec::new())?;
        let location = segment.append(header, packed)?;
        self.index.add_ours(&[(header.name, location)]);
        Ok(location)
    }

    /// As [`append`](Self::append) for several at a time: threads that store much get into each other's way less often. `appended` hears where
    /// each lies; after an error the rest is not appended.
    pub(crate) fn append_all<'a>(
        &self,
        records: impl Iterator<Item = (&'a Header, &'a [u8])>,
        mut appended: impl FnMut(&Header, Location),
    ) -> Result<()> {
        let mut writer = self.writer();
        // Those of the segment that is being written which the index does not know yet.
        let mut new: Vec<(Name, Location)> = Vec::new();
        let result = (|| {
            for (header, packed) in records {
                let location = self.segment_with_room(&mut writer, &mut new)?.append(header, packed)?;
                new.push((header.name, location));
                appended(header, location);
            }
            Ok(())
        })();
        self.index.add_ours(&new);
        result
    }

    /// The segment that this process writes, or another if that is full: then the index hears first of those of its records that it does not
    /// know yet.
    fn segment_with_room<'a>(
        &self,
        writer: &'a mut Option<SegmentWriter>,
        unknown: &mut Vec<(Name, Location)>,
    ) -> Result<&'a mut SegmentWriter> {
        if writer.as_ref().is_some_and(SegmentWriter::is_full) {
            self.index.add_ours(&std::mem::take(unknown));
            self.seal_segment(writer)?;
        }
        match writer {
            Some(segment) => Ok(segment),
            none => Ok(none.insert(self.new_segment(Writing::Direct, Purpose::Grow)?)),
        }
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        // A segment that cannot be sealed is found and finished by whoever opens the store next.
        if let Err(error) = self.seal() {
            tracing::warn!(%error, "the store's segment could not be finished");
        }
    }
}

#[cfg(test)]
mod tests;
