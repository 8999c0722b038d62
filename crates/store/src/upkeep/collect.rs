//! Garbage collection: finds what nothing needs, and gives its room back, while the store is in use.
//!
//! There are no reference counts. Marking takes no lock. Segments with little in them that is needed are then rewritten without the rest.
//! Only at the end are batches kept out for a moment: what they made reachable since is marked as well, and the old segments leave the
//! catalog. Readers that still look for a record there find it by its name.
//!
//! Where the disk has little room, only as many segments are rewritten at a time as there is room for what is needed of them; each lot that goes
//! makes room for the next one.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::catalog::SegmentRow;
use crate::domain::is_sealed;
use crate::error::{Result, StoreError};
use crate::name::Kind;
use crate::pace::Pace;
use crate::records::record::Packing;
use crate::records::segment::{self, Entry, Found, SegmentNumber};
use crate::room;
use crate::store::Store;
use crate::store::reserve::COLLECT_LOCK;
use crate::upkeep::copier::{Copier, Repack};
use crate::upkeep::mark::{Lost, Marks};

/// Smaller segments are joined.
const SEGMENT_LEN_SMALL: u64 = 4 << 20;
/// What copies take beside the records and their entries, for each segment that they come from at most: header, trailer, and the ends of blocks.
const COPY_EXTRA_LEN: u64 = 16 << 10;

/// How a collection goes about it.
#[derive(Debug, Clone, Copy)]
pub struct CollectOptions {
    /// Bytes that are read and written a second at most.
    pub bytes_per_second: u64,
    /// A segment is rewritten if less than this share of it is needed, in percent.
    pub needed_percent_min: u64,
    /// What lies in segments that were sealed that long ago is packed tighter, and such segments are rewritten for that alone. It takes
    /// longer to read then.
    pub tighten_after: Option<Duration>,
}

impl Default for CollectOptions {
    fn default() -> Self {
        CollectOptions { bytes_per_second: 100 << 20, needed_percent_min: 50, tighten_after: None }
    }
}

/// What a store holds, and what of it is of use.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Usage {
    pub segments: u64,
    pub records: u64,
    /// Bytes of all segments.
    pub stored_bytes: u64,
    /// Bytes of records that something needs.
    pub needed_bytes: u64,
    pub needed_records: u64,
    /// Bytes of volumes, snapshots and images without zeros, what they share counted for each.
    pub used_bytes: u64,
    /// Records that something needs and that are not there.
    pub lost: Vec<Lost>,
}

impl Usage {
    pub fn reclaimable_bytes(&self) -> u64 {
        self.stored_bytes.saturating_sub(self.needed_bytes)
    }
}

/// What a collection did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Collected {
    pub before: Usage,
    pub removed_segments: u64,
    pub freed_bytes: u64,
    pub rewritten_bytes: u64,
    /// How long batches were kept out.
    pub pause: Duration,
}

/// How far something is that takes long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Step {
    pub what: &'static str,
    pub done: u64,
    pub total: u64,
}

/// Who hears of the steps of something long; an error ends it.
pub type Watcher<'a> = &'a mut dyn FnMut(Step) -> Result<()>;

impl Store {
    /// Looks at everything that is kept: what the store holds, and what of it is needed.
    pub fn usage(&self, watcher: Watcher<'_>) -> Result<Usage> {
        let mut marks = self.mark(watcher)?;
        self.usage_of(&mut marks, &self.catalog().segments()?)
    }

    fn mark(&self, watcher: Watcher<'_>) -> Result<Marks> {
        self.index().refresh(self.catalog())?;
        let mut marks = Marks::default();
        let roots = self.roots(&mut marks.logs)?;
        let mut done = 0;
        marks.add(self, &roots, &mut || {
            done += 1;
            watcher(Step { what: "marking", done, total: 0 })
        })?;
        Ok(marks)
    }

    fn usage_of(&self, marks: &mut Marks, segments: &[SegmentRow]) -> Result<Usage> {
        let mut usage = Usage { used_bytes: marks.used_bytes, lost: marks.lost.clone(), ..Usage::default() };
        for row in segments {
            usage.segments += 1;
            usage.records += u64::from(row.records);
            usage.stored_bytes += row.bytes;
            let needed = marks.needed(row.number);
            usage.needed_records += needed.len() as u64;
            if needed.len() as u64 == u64::from(row.records) {
                usage.needed_bytes += row.bytes;
            } else if !needed.is_empty() {
                usage.needed_bytes += self.needed_bytes(row, needed)?;
            }
        }
        Ok(usage)
    }

    /// Bytes of the needed records of a segment, by their headers.
    fn needed_bytes(&self, row: &SegmentRow, needed: &[u32]) -> Result<u64> {
        let mut bytes = 0;
        self.scan_segment(row, |found| {
            if needed.binary_search(&((found.location.offset() / 64) as u32)).is_ok() {
                bytes += found.header.record_len() as u64;
            }
        })?;
        Ok(bytes)
    }

    fn scan_segment(&self, row: &SegmentRow, found: impl FnMut(Found)) -> Result<()> {
        let path = self.segments().sealed(row.number);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(StoreError::file("open", &path)(error)),
        };
        segment::scan(&file, row.number, 0, row.bytes, found).map_err(StoreError::file("read", &path))?;
        Ok(())
    }

    /// Collects what nothing needs. One collection at a time; the store can be used meanwhile.
    pub fn collect(self: &Arc<Self>, options: CollectOptions, watcher: Watcher<'_>) -> Result<Collected> {
        let Some(_lock) = self.try_lock(COLLECT_LOCK)? else {
            return Err(StoreError::Refused("another garbage collection is running".to_owned()));
        };
        let making_room = self.make_room()?;
        self.remove_leftovers()?;
        self.spares().clear()?;
        // What was sealed later is not looked at: nothing in it can be old.
        let segments = self.catalog().segments()?;
        let mut marks = self.mark(watcher)?;
        let before = self.usage_of(&mut marks, &segments)?;
        if let Some(lost) = before.lost.first() {
            return Err(StoreError::Refused(format!(
                "{} needs {}, which cannot be read ({}): nothing is removed until `polder store repair` was run",
                lost.owner, lost.name, lost.why
            )));
        }
        let mut collected = Collected { before, ..Collected::default() };
        let mut victims = self.victims(&mut marks, &segments, &options)?;
        // What makes most room for least comes first.
        victims.sort_by_key(|victim| victim.copies_len);
        let mut taking = Taking {
            store: self,
            marks,
            copier: Copier::new(self),
            pace: Pace::new(options.bytes_per_second),
            done: 0,
            total: victims.iter().map(|victim| victim.row.bytes).sum(),
        };
        let mut rest = &victims[..];
        let mut together_max = victims.len();
        while !rest.is_empty() {
            let (now, later) = rest.split_at(self.together(rest).min(together_max));
            match taking.take_out(now, &mut collected, watcher) {
                Ok(()) => {
                    rest = later;
                    together_max = together_max.saturating_mul(2);
                }
                // The disk did not say how much room it has, or somebody else was quicker.
                Err(error) if error.is_no_space() && (now.len() > 1 || self.spare_reserve_for_copies()) => {
                    taking.copier.abandon();
                    together_max = (now.len() / 2).max(1);
                }
                Err(error) if error.is_no_space() && collected.freed_bytes > 0 => {
                    tracing::warn!(%error, "a part of the collection is left for the next one");
                    break;
                }
                Err(error) => return Err(error),
            }
        }
        collected.rewritten_bytes = taking.copier.bytes();
        drop(taking);
        self.make_reserve();
        drop(making_room);
        match self.tidy() {
            // What was freed is freed, and somebody else has it already.
            Err(error) if error.is_no_space() => {
                tracing::warn!(%error, "the index and the catalog are left as they are")
            }
            tidied => tidied?,
        }
        Ok(collected)
    }

    /// How many of these victims go together: all of which nothing is needed, or as many as what is needed of them takes no more than half
    /// of what is free. Others write to the disk as well.
    fn together(&self, victims: &[Victim]) -> usize {
        let dead = victims.partition_point(|victim| victim.copies_len == 0);
        if dead > 0 {
            return dead;
        }
        // Some disks do not say.
        let free = File::open(self.folder()).and_then(room::free_bytes).ok().flatten();
        let room = free.map_or(u64::MAX, |free| free / 2);
        let mut copies_len = 0;
        let fits = |victim: &&Victim| {
            copies_len += victim.copies_len;
            copies_len <= room
        };
        victims.iter().take_while(fits).count().max(1)
    }

    /// Removes what a collection or the removal of a volume left behind when its process was killed.
    fn remove_leftovers(&self) -> Result<()> {
        let list = |folder: &Path| -> Result<Vec<PathBuf>> {
            let entries = std::fs::read_dir(folder).map_err(StoreError::file("list", folder))?;
            Ok(entries.filter_map(|entry| Some(entry.ok()?.path())).collect())
        };
        for path in list(&self.segments().0)? {
            if path.extension().is_some_and(|extension| extension == "dead") {
                std::fs::remove_file(&path).map_err(StoreError::file("remove", &path))?;
            }
        }
        // A volume is in the catalog before it has a folder.
        let folders = list(&self.folder().join("volumes"))?;
        let known: BTreeSet<PathBuf> =
            self.catalog().volumes()?.into_iter().map(|row| self.volume_folder(row.id)).collect();
        for folder in folders.iter().filter(|folder| !known.contains(*folder)) {
            // Somebody may still be removing it: who gets there first does not matter.
            if let Err(error) = std::fs::remove_dir_all(folder) {
                tracing::debug!(folder = %folder.display(), %error, "the folder of a removed volume is still there");
            }
        }
        Ok(())
    }

    /// Segments that are to go.
    fn victims(&self, marks: &mut Marks, segments: &[SegmentRow], options: &CollectOptions) -> Result<Vec<Victim>> {
        let mut victims = Vec::new();
        let mut small = Vec::new();
        for row in segments {
            let needed = marks.needed(row.number);
            let bytes = match needed.len() as u64 == u64::from(row.records) {
                true => row.bytes,
                false => self.needed_bytes(row, needed)?,
            };
            let copies_len = match needed.len() as u64 {
                0 => 0,
                count => bytes + count * Entry::LEN as u64 + COPY_EXTRA_LEN,
            };
            let is_old = options.tighten_after.is_some_and(|age| self.is_older(row, age));
            let repack = if is_old { Repack::Tight } else { Repack::No };
            let victim = Victim { row: *row, copies_len, repack };
            if bytes * 100 < row.bytes * options.needed_percent_min || is_old && self.is_loose(row)? {
                victims.push(victim);
            } else if row.bytes < SEGMENT_LEN_SMALL {
                small.push(victim);
            }
        }
        // One small segment alone would only be copied.
        if small.len() > 1 {
            victims.extend(small);
        }
        Ok(victims)
    }

    /// Whether a segment was sealed that long ago, by the time of its file.
    fn is_older(&self, row: &SegmentRow, age: Duration) -> bool {
        let sealed = std::fs::metadata(self.segments().sealed(row.number)).and_then(|facts| facts.modified());
        sealed.is_ok_and(|sealed| sealed.elapsed().is_ok_and(|elapsed| elapsed >= age))
    }

    /// Whether half of a segment is chunks that may be packed tighter.
    fn is_loose(&self, row: &SegmentRow) -> Result<bool> {
        let mut loose = 0;
        self.scan_segment(row, |Found { header, .. }| {
            if header.kind == Kind::Data && header.packing != Packing::Zstd && !is_sealed(&header) {
                loose += header.record_len() as u64;
            }
        })?;
        Ok(loose * 2 > row.bytes)
    }

    /// Takes a segment's file out of the way of whoever looks for segments that the catalog does not know.
    fn bury(&self, number: SegmentNumber) -> Result<std::path::PathBuf> {
        let path = self.segments().sealed(number);
        let dead = path.with_extension("dead");
        std::fs::rename(&path, &dead).map_err(StoreError::file("rename", &path))?;
        Ok(dead)
    }
}

/// A segment that is to go.
struct Victim {
    row: SegmentRow,
    /// Bytes that what is needed of it takes elsewhere; 0 if nothing is.
    copies_len: u64,
    repack: Repack,
}

/// Takes segments out of a store.
struct Taking<'a> {
    store: &'a Arc<Store>,
    marks: Marks,
    copier: Copier<'a>,
    pace: Pace,
    /// Bytes of the segments that are gone, and of all that are to go.
    done: u64,
    total: u64,
}

impl Taking<'_> {
    /// Removes segments; what is needed of them is copied first.
    fn take_out(&mut self, victims: &[Victim], collected: &mut Collected, watcher: Watcher<'_>) -> Result<()> {
        let store = self.store;
        let (marks, copier) = (&mut self.marks, &mut self.copier);
        let mut done = self.done;
        for Victim { row, repack, .. } in victims {
            copier.copy(row, marks.needed(row.number), *repack, &mut self.pace)?;
            done += row.bytes;
            watcher(Step { what: "rewriting", done, total: self.total })?;
        }
        copier.finish()?;

        let begin = Instant::now();
        let alone = store.lock_out_batches()?;
        store.index().refresh(store.catalog())?;
        let roots = store.roots(&mut marks.logs)?;
        marks.add(store, &roots, &mut || Ok(()))?;
        let mut at_once = Pace::new(u64::MAX);
        for Victim { row, repack, .. } in victims {
            copier.copy(row, marks.needed(row.number), *repack, &mut at_once)?;
        }
        copier.finish()?;
        let numbers: Vec<SegmentNumber> = victims.iter().map(|victim| victim.row.number).collect();
        let runs = store.with_reserve(|| store.catalog().remove_segments(&numbers))?;
        let dead = numbers.iter().map(|&number| store.bury(number)).collect::<Result<Vec<_>>>()?;
        drop(alone);
        collected.pause = collected.pause.max(begin.elapsed());

        store.index().refresh(store.catalog())?;
        store.forget_segments(&numbers);
        store.index().remove_runs(&runs)?;
        for (Victim { row, .. }, path) in victims.iter().zip(&dead) {
            std::fs::remove_file(path).map_err(StoreError::file("remove", path))?;
            collected.freed_bytes += row.bytes;
            copier.forget(row.number);
        }
        self.done = done;
        collected.removed_segments += victims.len() as u64;
        Ok(())
    }
}
