//! Copies what is needed out of segments that are to go.

use std::collections::{BTreeMap, BTreeSet};

use crate::catalog::SegmentRow;
use crate::error::{Result, StoreError};
use crate::pace::Pace;
use crate::records::behind::Writing;
use crate::records::record::{self, HEADER_LEN};
use crate::records::segment::SegmentNumber;
use crate::records::segment_writer::SegmentWriter;
use crate::records::tight::TightPacker;
use crate::room::Purpose;
use crate::store::Store;

/// How records are packed where they go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Repack {
    No,
    /// Tighter than before, where that gains something.
    Tight,
}

/// Copies needed records out of segments that are to go.
pub(super) struct Copier<'a> {
    store: &'a Store,
    /// Made when something is to be packed again first.
    tight: Option<TightPacker>,
    /// What was copied of each segment.
    copied: BTreeMap<SegmentNumber, BTreeSet<u32>>,
    /// Bytes of all copies.
    bytes: u64,
    target: Option<SegmentWriter>,
    /// What of `copied` only the target has: segments, offsets, and bytes.
    unfinished: Vec<(SegmentNumber, u32, u64)>,
}

impl<'a> Copier<'a> {
    pub fn new(store: &'a Store) -> Self {
        Copier { store, tight: None, copied: BTreeMap::new(), bytes: 0, target: None, unfinished: Vec::new() }
    }

    /// Bytes of all copies that were made, but for those that were given up.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Copies those of the records that were not copied before.
    pub fn copy(&mut self, row: &SegmentRow, needed: &[u32], repack: Repack, pace: &mut Pace) -> Result<()> {
        let copied = self.copied.entry(row.number).or_default();
        let missing: Vec<u32> = needed.iter().copied().filter(|offset| !copied.contains(offset)).collect();
        if missing.is_empty() {
            return Ok(());
        }
        let path = self.store.segments().sealed(row.number);
        let bytes = std::fs::read(&path).map_err(StoreError::file("read", &path))?;
        let mut total = 0;
        for offset in missing {
            let at = u64::from(offset) * HEADER_LEN as u64;
            let damaged = |what| StoreError::Damaged { path: path.clone(), offset: at, what };
            let record = bytes.get(at as usize..).unwrap_or_default();
            let (header, packed) = record::split(record).map_err(damaged)?;
            if self.target.as_ref().is_some_and(SegmentWriter::is_full) {
                self.finish()?;
            }
            let target = match &mut self.target {
                Some(target) => target,
                none => {
                    let new = || self.store.new_segment(Writing::Cached, Purpose::MakeRoom);
                    none.insert(self.store.with_reserve(new)?)
                }
            };
            let tight = match repack {
                Repack::No => None,
                Repack::Tight if self.tight.is_none() => {
                    self.tight = TightPacker::new();
                    self.tight.as_mut()
                }
                Repack::Tight => self.tight.as_mut(),
            };
            let (header, packed) = tight.and_then(|tight| tight.pack(&header, packed)).unwrap_or((header, packed));
            target.append(&header, packed)?;
            let len = header.record_len() as u64;
            self.copied.entry(row.number).or_default().insert(offset);
            self.unfinished.push((row.number, offset, len));
            self.bytes += len;
            total += len;
        }
        pace.spend(bytes.len() as u64 + total);
        Ok(())
    }

    /// Ends the segment that is being written: from now on its copies are found.
    pub fn finish(&mut self) -> Result<()> {
        let Some(target) = &mut self.target else { return Ok(()) };
        let catalog = self.store.catalog();
        if target.seal(|summary| self.store.with_reserve(|| catalog.add_segment(summary)))?.is_some() {
            self.store.index().refresh_segments(catalog)?;
        }
        self.target = None;
        self.unfinished.clear();
        Ok(())
    }

    /// Gives up the segment that is being written: there is no room for it. What it holds is copied anew if it is asked for again.
    pub fn abandon(&mut self) {
        // One that may be known already is ended, and is finished with what comes next.
        if self.target.as_ref().is_some_and(SegmentWriter::is_published) {
            return;
        }
        if let Some(target) = self.target.take()
            && let Err(error) = target.remove()
        {
            tracing::warn!(%error, "a segment that was not finished cannot be removed");
        }
        for (segment, offset, len) in self.unfinished.drain(..) {
            self.copied.entry(segment).or_default().remove(&offset);
            self.bytes -= len;
        }
    }

    /// The segment is gone, and is not asked for again.
    pub fn forget(&mut self, segment: SegmentNumber) {
        self.copied.remove(&segment);
    }
}

impl Drop for Copier<'_> {
    fn drop(&mut self) {
        // Copies that nobody knows are of no use, and the disk may be full.
        self.abandon();
    }
}
