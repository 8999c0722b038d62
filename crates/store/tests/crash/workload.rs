//! What is done to a volume until something stops it, and the check of what is left.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, RwLock};

use polder_store::format::Source;
use polder_store::{CollectOptions, Content, Store, StoreError, StoreOptions, Tree, TreeSource, Volume, VolumeOptions};

use super::model::{Known, Model, SECTOR_LEN, SECTORS, SNAPSHOTS, sector};
use super::random::Random;

/// Sectors that one thread has to itself, so that it knows what they hold. Not whole blocks: those are shared.
const RUN: usize = 20;
const THREADS: usize = 3;

pub fn options() -> VolumeOptions {
    VolumeOptions {
        log_bytes_max: 1 << 30,
        log_bytes_start: 512 << 10,
        settle: std::time::Duration::from_millis(5),
        stream_bytes: 64 << 10,
        log_file_bytes: 2 << 20,
    }
}

pub fn open_store(folder: &Path) -> Result<Arc<Store>, StoreError> {
    Store::open(folder, StoreOptions { chunk_cache_bytes: 1 << 20, node_cache_bytes: 1 << 20 })
}

/// The store with its volume, made where they are not.
pub fn make(folder: &Path, model: &Model) -> Result<(), StoreError> {
    let store = open_store(folder)?;
    let capacity_bytes = (SECTORS * SECTOR_LEN) as u64;
    model.size_promised.store(capacity_bytes, SeqCst);
    model.size_asked.store(capacity_bytes, SeqCst);
    store.create_volume("disk", &Content::Zeros { capacity_bytes, chunk_len: 16_384 })?;
    Ok(())
}

struct Work<'a> {
    store: &'a Arc<Store>,
    volume: &'a Volume,
    model: &'a Model,
    /// Held for reading by operations on a thread's own sectors, for writing by those on all.
    all: RwLock<()>,
    stop: &'a AtomicBool,
    /// The disk can be full: what does not wait then fails.
    can_be_full: bool,
}

/// Works on the volume in several threads until something fails or `stop` says so. Gives the first failure.
pub fn work(
    store: &Arc<Store>,
    volume: &Volume,
    model: &Model,
    seed: u64,
    stop: &AtomicBool,
) -> Result<(), StoreError> {
    Work { store, volume, model, all: RwLock::new(()), stop, can_be_full: false }.run(seed)
}

/// As [`work`] on a disk that is full now and then.
pub fn work_on_full_disk(
    store: &Arc<Store>,
    volume: &Volume,
    model: &Model,
    seed: u64,
    stop: &AtomicBool,
) -> Result<(), StoreError> {
    Work { store, volume, model, all: RwLock::new(()), stop, can_be_full: true }.run(seed)
}

/// Rounds in which every kind of file of a store is written and read: enough segments that their tables are merged.
pub fn work_on_every_file(store: &Arc<Store>, volume: &Volume, model: &Model, seed: u64) -> Result<(), StoreError> {
    let stop = AtomicBool::new(false);
    let work = Work { store, volume, model, all: RwLock::new(()), stop: &stop, can_be_full: false };
    let mut random = Random::new(seed);
    for round in 0..16 {
        work.write_many(&mut random)?;
        work.flush()?;
        if round % 5 == 0 {
            work.snapshot(&mut random)?;
            work.remove_snapshot(&mut random)?;
        }
        volume.compact()?;
        store.seal()?;
        volume.read_at(0, &mut vec![0; volume.capacity_bytes() as usize])?;
    }
    work.collect()
}

impl Work<'_> {
    fn run(&self, seed: u64) -> Result<(), StoreError> {
        let work = self;
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS)
                .map(|thread| {
                    scope.spawn(move || {
                        let mut random = Random::new(seed ^ (thread as u64) << 56);
                        while !work.stop.load(SeqCst) {
                            if let Err(error) = work.one(thread, &mut random) {
                                work.stop.store(true, SeqCst);
                                return Err(error);
                            }
                        }
                        Ok(())
                    })
                })
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Result<Vec<_>, _>>().map(drop)
        })
    }

    fn one(&self, thread: usize, random: &mut Random) -> Result<(), StoreError> {
        let choice = random.below(1000);
        let result = self.choice(choice, thread, random);
        match (choice, result) {
            // What can wait is tried again by whoever asked; writes and flushes never fail for want of room.
            (930..993, Err(error)) if self.can_be_full && is_full(&error) => Ok(()),
            (_, result) => result,
        }
    }

    fn choice(&self, choice: u64, thread: usize, random: &mut Random) -> Result<(), StoreError> {
        match choice {
            0..600 => self.write_own(thread, random),
            600..700 => self.zero_own(thread, random),
            700..880 => self.flush(),
            880..930 => self.write_many(random),
            930..945 => self.volume.compact(),
            945..970 => self.snapshot(random),
            970..980 => self.remove_snapshot(random),
            980..985 if !self.can_be_full => self.resize(random),
            985..990 => self.collect(),
            990..993 => self.store.seal(),
            _ => {
                std::thread::sleep(std::time::Duration::from_micros(random.below(2000)));
                Ok(())
            }
        }
    }

    fn sectors(&self) -> usize {
        (self.volume.capacity_bytes() / SECTOR_LEN as u64) as usize
    }

    /// Some sectors of a thread's own.
    fn own(&self, thread: usize, random: &mut Random) -> Option<std::ops::Range<usize>> {
        let runs = self.sectors() / RUN / THREADS;
        let first = (random.below(runs.max(1) as u64) as usize * THREADS + thread) * RUN;
        let from = first + random.below(RUN as u64) as usize;
        let end = from + 1 + random.below((first + RUN - from) as u64) as usize;
        (end <= self.sectors()).then_some(from..end)
    }

    fn issue(&self, range: std::ops::Range<usize>) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(range.len() * SECTOR_LEN);
        for index in range {
            let version = self.model.sectors[index].issued.fetch_add(1, SeqCst) + 1;
            bytes.extend_from_slice(&sector(index, version));
        }
        bytes
    }

    fn done(&self, range: std::ops::Range<usize>) {
        for index in range {
            let model = &self.model.sectors[index];
            model.done.store(model.issued.load(SeqCst), SeqCst);
        }
    }

    fn write(&self, range: std::ops::Range<usize>) -> Result<(), StoreError> {
        let bytes = self.issue(range.clone());
        self.volume.write_at((range.start * SECTOR_LEN) as u64, &bytes)?;
        self.done(range);
        Ok(())
    }

    fn write_own(&self, thread: usize, random: &mut Random) -> Result<(), StoreError> {
        let _shared = self.all.read().unwrap();
        self.own(thread, random).map_or(Ok(()), |range| self.write(range))
    }

    /// Enough that the log soon goes on in another file.
    fn write_many(&self, random: &mut Random) -> Result<(), StoreError> {
        let _alone = self.all.write().unwrap();
        let len = 1 + random.below(1000) as usize;
        let from = random.below(self.sectors().saturating_sub(len).max(1) as u64) as usize;
        self.write(from..(from + len).min(self.sectors()))
    }

    fn zero_own(&self, thread: usize, random: &mut Random) -> Result<(), StoreError> {
        let _shared = self.all.read().unwrap();
        let Some(range) = self.own(thread, random) else { return Ok(()) };
        self.issue_zeros(range.clone());
        self.volume.zero((range.start * SECTOR_LEN) as u64, (range.len() * SECTOR_LEN) as u64)?;
        self.done(range);
        Ok(())
    }

    fn issue_zeros(&self, range: std::ops::Range<usize>) {
        for index in range {
            let model = &self.model.sectors[index];
            // First the zeros: between the two, both are right.
            model.newest_zero.store(model.issued.load(SeqCst) + 1, SeqCst);
            model.issued.fetch_add(1, SeqCst);
        }
    }

    /// What was completed on any thread before the flush began is promised when it ends.
    fn flush(&self) -> Result<(), StoreError> {
        let done: Vec<u32> = self.model.sectors.iter().map(|sector| sector.done.load(SeqCst)).collect();
        self.volume.flush()?;
        self.promise(&done);
        Ok(())
    }

    fn promise(&self, done: &[u32]) {
        for (sector, &done) in self.model.sectors.iter().zip(done) {
            sector.promised.fetch_max(done, SeqCst);
        }
        self.model.promises.fetch_add(1, SeqCst);
    }

    fn snapshot(&self, random: &mut Random) -> Result<(), StoreError> {
        let _alone = self.all.write().unwrap();
        let slot = random.below(SNAPSHOTS as u64) as usize;
        let snapshot = &self.model.snapshots[slot];
        if !matches!(snapshot.known(), Known::Nothing | Known::Gone) {
            return Ok(());
        }
        snapshot.sectors.store(self.sectors() as u64, SeqCst);
        let done: Vec<u32> = self.model.sectors.iter().map(|sector| sector.done.load(SeqCst)).collect();
        for (index, version) in done.iter().enumerate() {
            snapshot.versions[index].store(*version, SeqCst);
            snapshot.zeros[index].store(u32::from(self.model.is_zero(index)), SeqCst);
        }
        snapshot.set(Known::Asked);
        self.volume.snapshot(&Model::snapshot_name(slot))?;
        snapshot.set(Known::There);
        self.promise(&done);
        Ok(())
    }

    fn remove_snapshot(&self, random: &mut Random) -> Result<(), StoreError> {
        let _alone = self.all.write().unwrap();
        let slot = random.below(SNAPSHOTS as u64) as usize;
        let snapshot = &self.model.snapshots[slot];
        if snapshot.known() != Known::There {
            return Ok(());
        }
        snapshot.set(Known::Removing);
        self.store.remove_snapshot("disk", &Model::snapshot_name(slot))?;
        snapshot.set(Known::Gone);
        Ok(())
    }

    fn resize(&self, random: &mut Random) -> Result<(), StoreError> {
        let _alone = self.all.write().unwrap();
        let old = self.sectors();
        let sectors = SECTORS / 2 + random.below((SECTORS / 2) as u64 + 1) as usize;
        let bytes = (sectors * SECTOR_LEN) as u64;
        if sectors < old {
            self.issue_zeros(sectors..SECTORS);
        }
        self.model.size_asked.store(bytes, SeqCst);
        self.volume.resize(bytes)?;
        if sectors < old {
            self.done(sectors..SECTORS);
        }
        self.model.size_promised.store(bytes, SeqCst);
        self.model.promises.fetch_add(1, SeqCst);
        Ok(())
    }

    fn collect(&self) -> Result<(), StoreError> {
        match self
            .store
            .collect(CollectOptions { bytes_per_second: u64::MAX, ..CollectOptions::default() }, &mut |_| Ok(()))
        {
            // Another thread's.
            Err(StoreError::Refused(why)) if why.contains("another") => Ok(()),
            other => other.map(drop),
        }
    }
}

fn is_full(error: &StoreError) -> bool {
    error.is_no_space() || error.to_string().contains("No space left") || error.to_string().contains("disk is full")
}

/// An error with what caused it.
pub fn explain(error: &StoreError) -> String {
    let source = std::error::Error::source(error).map(|source| format!(": {source}")).unwrap_or_default();
    format!("{error}{source}")
}

/// Opens the store after a crash and checks everything that it holds.
pub fn check(folder: &Path, model: &Model) -> Result<(), String> {
    let text = |error: StoreError| explain(&error);
    let store = open_store(folder).map_err(text)?;
    let volume = Volume::open(&store, "disk", options()).map_err(text)?;
    let mut content = vec![0; volume.capacity_bytes() as usize];
    volume.read_at(0, &mut content).map_err(text)?;
    model.check(&content)?;
    // What is moved into the tree reads the same as what was in the log.
    volume.close().map_err(text)?;
    let there = store.snapshots("disk").map_err(text)?;
    for (slot, snapshot) in model.snapshots.iter().enumerate() {
        let name = Model::snapshot_name(slot);
        let row = there.iter().find(|row| row.name == name);
        snapshot.check_presence(row.is_some()).map_err(|what| format!("snapshot {name} is {what}"))?;
        let Some(row) = row else { continue };
        let tree = Tree {
            name,
            root: store.settled_root(row).map_err(text)?,
            len_bytes: row.capacity_bytes,
            chunk_len: row.chunk_len,
            domain: row.domain,
        };
        let mut bytes = vec![0; tree.len_bytes as usize];
        TreeSource::new(&store, &tree).read_at(0, &mut bytes).map_err(|error| format!("{error:?}"))?;
        snapshot.check(&bytes).map_err(|what| format!("snapshot {}: {what}", tree.name))?;
    }
    let volume = Volume::open(&store, "disk", options()).map_err(text)?;
    let mut again = vec![0; volume.capacity_bytes() as usize];
    volume.read_at(0, &mut again).map_err(text)?;
    if again != content {
        return Err("the tree holds something else than the log".to_owned());
    }
    drop(volume);
    store.seal().map_err(text)?;
    let verified = store.verify(&mut |_| Ok(())).map_err(text)?;
    match verified.damages.is_empty() && verified.lost.is_empty() {
        true => Ok(()),
        false => Err(format!("{verified:?}")),
    }
}
