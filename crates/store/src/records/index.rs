//! The index: from names to where their records lie.
//!
//! It is made of runs (sealed segments' tables, and run files into which many of those were merged), of the entries of the
//! segment that this process writes, and of what other processes' open segments hold, which is read from those when a name is
//! not found elsewhere. It holds nothing that cannot be read from the segments again, and points only at what is stable.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use crate::catalog::{Catalog, SegmentRow};
use crate::error::{Result, StoreError};
use crate::name::Name;
use crate::records::cache::NameMap;
use crate::records::record::Header;
use crate::records::run::{self, Run};
use crate::records::segment::{self, Entry, Location, SegmentFolder, SegmentNumber, State, Summary};
use crate::records::segment_writer::SegmentWriter;
use crate::room;

/// More runs than this are merged.
const RUNS_MAX: usize = 12;

type Prefix = [u8; Name::PREFIX_LEN];

#[derive(Default)]
struct Contents {
    generation: i64,
    /// Of the segments in the catalog. Entries of others are of no account.
    live: BTreeSet<SegmentNumber>,
    runs: BTreeMap<RunKey, Arc<Run>>,
    /// The segments whose entries are in a run file.
    covered: BTreeMap<u32, Vec<SegmentNumber>>,
    /// Run files that are damaged: their segments' own tables serve instead.
    damaged: BTreeSet<u32>,
    /// The open segments of this process.
    ours: NameMap<Prefix, Location>,
    our_segments: BTreeSet<SegmentNumber>,
    /// The open segments of others, and up to where each was read.
    theirs: NameMap<Prefix, Location>,
    read_up_to: BTreeMap<SegmentNumber, u64>,
}

/// A run by what it comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum RunKey {
    File(u32),
    Segment(SegmentNumber),
}

/// Which copies of a record are looked for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Copies {
    /// One that can be used, or several of which one can.
    Any,
    All,
}

impl Contents {
    /// Copies in sealed segments.
    fn find_sealed(&self, prefix: &Prefix, copies: Copies) -> Result<Vec<Location>, (RunKey, io::Error)> {
        let mut found = Vec::new();
        for (key, run) in &self.runs {
            run.find(prefix, &mut found).map_err(|error| (*key, error))?;
            if copies == Copies::Any && found.iter().any(|entry| self.live.contains(&entry.location.segment())) {
                break;
            }
        }
        let locations = found.into_iter().map(|entry| entry.location);
        Ok(locations.filter(|location| self.live.contains(&location.segment())).collect())
    }
}

/// What the index costs and covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct IndexFigures {
    pub entries: u64,
    pub runs: usize,
    /// In this process.
    pub memory_bytes: usize,
    /// On disk, and so in the host's page cache at most.
    pub file_bytes: u64,
}

pub(crate) struct Index {
    segments: SegmentFolder,
    folder: PathBuf,
    contents: RwLock<Contents>,
    /// Held from a look at the catalog or a segment until what was found is in the contents, which serve others meanwhile: none puts in what
    /// was there before another's change.
    changes: Mutex<()>,
}

impl Index {
    pub fn new(segments: SegmentFolder, folder: PathBuf) -> Self {
        Index { segments, folder, contents: RwLock::default(), changes: Mutex::default() }
    }

    fn change(&self) -> MutexGuard<'_, ()> {
        self.changes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, Contents> {
        self.contents.read().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, Contents> {
        self.contents.write().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn run_path(&self, run: u32) -> PathBuf {
        self.folder.join(format!("{run:08}.run"))
    }

    /// Where copies of a record lie, those that are surest to stay first.
    pub fn find(&self, name: &Name) -> Result<Vec<Location>> {
        let prefix = name.prefix();
        self.look(|contents| {
            if let Some(&location) = contents.ours.get(&prefix) {
                return Ok(vec![location]);
            }
            let mut locations = contents.find_sealed(&prefix, Copies::Any)?;
            locations.extend(contents.theirs.get(&prefix));
            Ok(locations)
        })
    }

    /// Every copy of a record: those in sealed segments first, the oldest of them at the front.
    pub fn find_all(&self, name: &Name) -> Result<Vec<Location>> {
        let prefix = name.prefix();
        self.look(|contents| {
            let mut locations = contents.find_sealed(&prefix, Copies::All)?;
            locations.sort_unstable();
            locations.extend(contents.ours.get(&prefix));
            locations.extend(contents.theirs.get(&prefix));
            locations.dedup();
            Ok(locations)
        })
    }

    /// Of each of some names, which come in order, the copy of its record that [`find_all`](Self::find_all) has at the front.
    pub fn first_copies(&self, names: &[Name]) -> Result<Vec<Option<Location>>> {
        let prefixes: Vec<Prefix> = names.iter().map(|name| name.prefix()).collect();
        self.look(|contents| {
            let mut first: Vec<Option<Location>> = vec![None; names.len()];
            for (key, run) in &contents.runs {
                let found = run.find_each(prefixes.iter(), |at, Entry { location, .. }| {
                    if contents.live.contains(&location.segment()) {
                        first[at] = Some(first[at].map_or(location, |other| other.min(location)));
                    }
                });
                found.map_err(|error| (*key, error))?;
            }
            for (first, prefix) in first.iter_mut().zip(&prefixes) {
                *first = first.or_else(|| contents.ours.get(prefix).or_else(|| contents.theirs.get(prefix)).copied());
            }
            Ok(first)
        })
    }

    /// Looks into the contents; a run that is found to be damaged on the way is replaced by what its segments say.
    fn look<T>(&self, find: impl Fn(&Contents) -> Result<T, (RunKey, io::Error)>) -> Result<T> {
        loop {
            // The lock is free again before a run is replaced.
            let found = find(&self.read());
            match found {
                Ok(found) => return Ok(found),
                Err((key, error)) if error.kind() == io::ErrorKind::InvalidData => self.replace(key)?,
                Err((_, error)) => return Err(StoreError::file("read the index in", &self.folder)(error)),
            }
        }
    }

    /// Replaces a damaged run by what is found in the segments themselves.
    fn replace(&self, key: RunKey) -> Result<()> {
        let _change = self.change();
        if !self.read().runs.contains_key(&key) {
            return Ok(());
        }
        tracing::warn!(run = ?key, "a part of the index is damaged; the segments themselves serve instead");
        let numbers = match key {
            RunKey::Segment(number) => vec![number],
            RunKey::File(run) => self.read().covered.get(&run).cloned().unwrap_or_default(),
        };
        let mut found = Vec::new();
        for number in numbers {
            let run = match key {
                RunKey::Segment(_) => self.scan_segment(number)?,
                RunKey::File(_) => self.open_segment(number)?,
            };
            found.extend(run.map(|run| (RunKey::Segment(number), run)));
        }
        let mut contents = self.write();
        contents.runs.remove(&key);
        contents.runs.extend(found);
        if let RunKey::File(run) = key {
            contents.damaged.insert(run);
        }
        Ok(())
    }

    /// Reads all run files. Gives those that are damaged, and what is wrong with them.
    pub fn check(&self) -> Result<Vec<(PathBuf, String)>> {
        let mut found: Vec<(PathBuf, String)> = Vec::new();
        let runs: Vec<(RunKey, Arc<Run>)> = self.read().runs.iter().map(|(key, run)| (*key, run.clone())).collect();
        for (key, run) in runs {
            let RunKey::File(number) = key else { continue };
            let path = self.run_path(number);
            match run.check() {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::InvalidData => found.push((path, error.to_string())),
                Err(error) => return Err(StoreError::file("read", &path)(error)),
            }
        }
        Ok(found)
    }

    /// Does without a run file from now on.
    pub fn give_up(&self, path: &Path, catalog: &Catalog) -> Result<()> {
        let runs: BTreeSet<u32> = catalog.segments()?.iter().filter_map(|row| row.run).collect();
        for run in runs.into_iter().filter(|&run| self.run_path(run) == path) {
            catalog.forget_run(run)?;
            self.remove_runs(&[run])?;
        }
        self.refresh(catalog)
    }

    /// Whether a name can be used without storing its record again: only what this process wrote and what is sealed counts.
    pub fn find_for_reuse(&self, name: &Name) -> Result<Option<Location>> {
        let locations = self.find(name)?;
        let contents = self.read();
        Ok(locations.into_iter().find(|location| {
            contents.live.contains(&location.segment()) || contents.our_segments.contains(&location.segment())
        }))
    }

    /// Records of this process's open segment.
    pub fn add_ours(&self, records: &[(Name, Location)]) {
        let mut contents = self.write();
        for (name, location) in records {
            contents.our_segments.insert(location.segment());
            contents.ours.insert(name.prefix(), *location);
        }
    }

    /// Our segment is sealed and in the catalog: its table serves from now on.
    pub fn sealed(&self, summary: &Summary, generation: i64) -> Result<()> {
        let _change = self.change();
        let run = self.open_segment(summary.number)?;
        let mut contents = self.write();
        contents.live.insert(summary.number);
        if let Some(run) = run {
            contents.runs.insert(RunKey::Segment(summary.number), run);
        }
        contents.our_segments.remove(&summary.number);
        contents.ours.retain(|_, location| location.segment() != summary.number);
        // Others may have changed the catalog as well; then the next refresh looks.
        if contents.generation + 1 == generation {
            contents.generation = generation;
        }
        Ok(())
    }

    /// The segment is of no use any more: nothing that was written to it counts.
    pub fn forget_ours(&self, segment: SegmentNumber) {
        let mut contents = self.write();
        contents.our_segments.remove(&segment);
        contents.ours.retain(|_, location| location.segment() != segment);
    }

    fn open_segment(&self, number: SegmentNumber) -> Result<Option<Arc<Run>>> {
        let path = self.segments.sealed(number);
        // It is known a moment before it has its name.
        let opened =
            File::open(&path).or_else(|_| File::open(self.segments.open(number))).or_else(|_| File::open(&path));
        let file = match opened {
            Ok(file) => file,
            // Removed since by a garbage collection.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(StoreError::file("open", &path)(error)),
        };
        match segment::summary(&self.segments, number, &file) {
            Ok(summary) => {
                let run = Run::of_segment(file, summary.bytes, summary.records, summary.table_checksum);
                match run.map_err(StoreError::file("read", &path))? {
                    Some(run) => Ok(Some(Arc::new(run))),
                    None => self.scan_segment(number),
                }
            }
            Err(StoreError::Damaged { .. }) => self.scan_segment(number),
            Err(error) => Err(error),
        }
    }

    /// The entries of a segment whose table is damaged.
    fn scan_segment(&self, number: SegmentNumber) -> Result<Option<Arc<Run>>> {
        let path = self.segments.sealed(number);
        let file = match File::open(&path).or_else(|_| File::open(self.segments.open(number))) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(StoreError::file("open", &path)(error)),
        };
        tracing::warn!(segment = %path.display(), "its table is damaged; its records are listed by reading it");
        let mut entries = Vec::new();
        segment::scan(&file, number, 0, u64::MAX, |found| entries.push(found.entry()))
            .map_err(StoreError::file("read", &path))?;
        Ok(Some(Arc::new(Run::of_entries(entries))))
    }

    /// Looks at what others changed.
    pub fn refresh(&self, catalog: &Catalog) -> Result<()> {
        loop {
            self.refresh_segments(catalog)?;
            self.read_open_segments()?;
            // A segment that was sealed between the two steps was in the catalog before its open file was gone.
            if catalog.generation()? == self.read().generation {
                return Ok(());
            }
        }
    }

    /// Looks at which segments there are.
    pub fn refresh_segments(&self, catalog: &Catalog) -> Result<()> {
        if self.is_old(catalog.generation()?) {
            let _change = self.change();
            while !self.reload(catalog)? {}
        }
        Ok(())
    }

    fn is_old(&self, generation: i64) -> bool {
        let contents = self.read();
        contents.generation != generation || !contents.damaged.is_empty()
    }

    /// Which state of the catalog is known.
    pub fn generation(&self) -> i64 {
        self.read().generation
    }

    /// The segments that are in the catalog.
    pub fn live(&self) -> BTreeSet<SegmentNumber> {
        self.read().live.clone()
    }

    /// Whether that is done; it is to be done again else.
    fn reload(&self, catalog: &Catalog) -> Result<bool> {
        let generation = catalog.generation()?;
        if !self.is_old(generation) {
            return Ok(true);
        }
        // What was found to be damaged others are told of.
        let damaged = std::mem::take(&mut self.write().damaged);
        for &run in &damaged {
            catalog.forget_run(run)?;
        }
        if !damaged.is_empty() {
            return Ok(false);
        }
        let rows = catalog.segments()?;
        let key = |row: &SegmentRow| row.run.map_or(RunKey::Segment(row.number), RunKey::File);
        let wanted: BTreeSet<RunKey> = rows.iter().map(key).collect();
        let had: BTreeSet<RunKey> = self.read().runs.keys().copied().collect();
        let mut opened = Vec::new();
        for &key in wanted.difference(&had) {
            let run = match key {
                RunKey::Segment(number) => self.open_segment(number)?,
                RunKey::File(run) => {
                    let path = self.run_path(run);
                    match Run::open(&path) {
                        Ok(run) => Some(Arc::new(run)),
                        // A run that was merged into another meanwhile: the generation has changed again.
                        Err(_) if catalog.generation()? != generation => return Ok(false),
                        Err(error @ StoreError::UnknownFormat { .. }) => return Err(error),
                        Err(error) => {
                            tracing::warn!(%error, "the segments' own tables serve instead");
                            catalog.forget_run(run)?;
                            return Ok(false);
                        }
                    }
                }
            };
            opened.extend(run.map(|run| (key, run)));
        }
        let mut contents = self.write();
        contents.runs.retain(|key, _| wanted.contains(key));
        contents.runs.extend(opened);
        contents.live = rows.iter().map(|row| row.number).collect();
        contents.covered.clear();
        for row in &rows {
            if let Some(run) = row.run {
                contents.covered.entry(run).or_default().push(row.number);
            }
        }
        contents.generation = generation;
        Ok(true)
    }

    /// Reads what other processes appended to their open segments.
    fn read_open_segments(&self) -> Result<()> {
        let listed = self.segments.list()?;
        for (number, state) in listed.iter().copied() {
            let (ours, from) = {
                let contents = self.read();
                (contents.our_segments.contains(&number), contents.read_up_to.get(&number).copied().unwrap_or(0))
            };
            if state == State::Sealed || ours {
                continue;
            }
            let Ok(file) = File::open(self.segments.open(number)) else { continue };
            let mut entries = Vec::new();
            // A record that is not whole yet ends the reading; the next time it begins there.
            let (end, _) = segment::scan(&file, number, from, u64::MAX, |found| {
                entries.push(found.entry());
            })
            .map_err(StoreError::file("read", &self.segments.open(number)))?;
            let mut contents = self.write();
            contents.theirs.extend(entries.into_iter().map(|entry| (entry.prefix, entry.location)));
            contents.read_up_to.insert(number, end);
        }
        // What was sealed since is found through its table.
        let mut contents = self.write();
        let gone: Vec<SegmentNumber> =
            contents.read_up_to.keys().copied().filter(|number| !listed.contains(&(*number, State::Open))).collect();
        for number in gone {
            contents.read_up_to.remove(&number);
            contents.theirs.retain(|_, location| location.segment() != number);
        }
        Ok(())
    }

    /// Finishes segments whose processes died, and takes in files that the catalog does not know. Records that have to go elsewhere go into
    /// a new segment.
    pub fn recover(&self, catalog: &Catalog, new_segment: &dyn Fn() -> Result<SegmentWriter>) -> Result<()> {
        let known: BTreeSet<SegmentNumber> = catalog.segments()?.iter().map(|row| row.number).collect();
        for (number, state) in self.segments.list()? {
            if known.contains(&number) && state == State::Sealed || self.read().our_segments.contains(&number) {
                continue;
            }
            let publish = |summary: &Summary| {
                catalog.skip_segments(number)?;
                catalog.add_segment(summary)
            };
            let rescue = |records: Vec<(Header, Vec<u8>)>| {
                let mut segment = new_segment()?;
                for (header, packed) in &records {
                    segment.append(header, packed)?;
                }
                segment.seal(|summary| catalog.add_segment(summary)).map(drop)
            };
            match state {
                State::Open => segment::adopt(&self.segments, number, rescue, publish)?,
                State::Sealed => {
                    let path = self.segments.sealed(number);
                    let Ok(file) = File::open(&path) else { continue };
                    match segment::summary(&self.segments, number, &file) {
                        Ok(summary) => publish(&summary)?,
                        Err(StoreError::Damaged { .. }) => {
                            // Its records are as good as those of a segment that was never finished.
                            let open = self.segments.open(number);
                            std::fs::rename(&path, open).map_err(StoreError::file("rename", &path))?;
                            segment::adopt(&self.segments, number, rescue, publish)?;
                        }
                        Err(error) => return Err(error),
                    }
                }
            }
        }
        Ok(())
    }

    /// Merges runs where there are many: the smaller ones, so that each entry is rewritten a few times at most as the store grows.
    /// Whether something was merged.
    pub fn merge(&self, catalog: &Catalog) -> Result<bool> {
        let mut runs: Vec<(RunKey, Arc<Run>)> = self.read().runs.iter().map(|(key, run)| (*key, run.clone())).collect();
        if runs.len() <= RUNS_MAX {
            return Ok(false);
        }
        runs.sort_by_key(|(_, run)| run.entries());
        let mut count = RUNS_MAX / 2;
        let mut entries: u64 = runs[..count].iter().map(|(_, run)| run.entries()).sum();
        while count < runs.len() && runs[count].1.entries() <= 2 * entries {
            entries += runs[count].1.entries();
            count += 1;
        }
        // It only makes look-ups quicker: on a disk that is nearly full it can wait.
        let folder = File::open(&self.folder).map_err(StoreError::file("open", &self.folder))?;
        if room::leave(folder, entries * Entry::LEN as u64).is_err() {
            return Ok(false);
        }
        let merged = &runs[..count];
        let keys: BTreeSet<RunKey> = merged.iter().map(|(key, _)| *key).collect();
        let covered: Vec<SegmentNumber> = catalog
            .segments()?
            .iter()
            .filter(|row| keys.contains(&row.run.map_or(RunKey::Segment(row.number), RunKey::File)))
            .map(|row| row.number)
            .collect();
        let live: BTreeSet<SegmentNumber> = covered.iter().copied().collect();
        let number = catalog.new_run()?;
        let path = self.run_path(number);
        let sources: Vec<&Run> = merged.iter().map(|(_, run)| run.as_ref()).collect();
        let count = match run::merge(&sources, |segment| live.contains(&segment), &path) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                for (key, run) in merged.iter().filter(|(_, run)| run.check().is_err()) {
                    tracing::debug!(entries = run.entries(), "a run is not merged");
                    self.replace(*key)?;
                }
                // The next refresh tells the catalog.
                return Ok(false);
            }
            Err(error) => return Err(StoreError::file("write", &path)(error)),
        };
        let unused = catalog.set_run(number, count, &covered)?;
        self.remove_runs(&unused)?;
        self.refresh(catalog)?;
        Ok(true)
    }

    /// Removes the files of runs that are of no use any more.
    pub fn remove_runs(&self, runs: &[u32]) -> Result<()> {
        for run in runs {
            let path = self.run_path(*run);
            if let Err(error) = std::fs::remove_file(&path)
                && error.kind() != io::ErrorKind::NotFound
            {
                return Err(StoreError::file("remove", &path)(error));
            }
        }
        Ok(())
    }

    pub fn figures(&self) -> IndexFigures {
        let contents = self.read();
        let entries: u64 = contents.runs.values().map(|run| run.entries()).sum();
        let own = contents.ours.len() + contents.theirs.len();
        IndexFigures {
            entries: entries + own as u64,
            runs: contents.runs.len(),
            memory_bytes: contents.runs.values().map(|run| run.memory_bytes()).sum::<usize>()
                + own * (size_of::<Prefix>() + size_of::<Location>()) * 8 / 7,
            file_bytes: entries * Entry::LEN as u64,
        }
    }
}
