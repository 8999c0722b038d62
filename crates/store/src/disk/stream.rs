//! Reads of many whole chunks: what lies one after the other in a segment is read with one call, and what is not packed straight to where it
//! is wanted.
//!
//! A record says by its length whether it can be packed: what is not is one header longer than a chunk, and a seal if it is encrypted. It is
//! compared with its checksum, or opened where it lies, like any other before anybody is told that it is there.

use std::fs::File;
use std::io::IoSliceMut;

use rustix::io::ReadWriteFlags;

use crate::domain::{OPEN_DOMAIN, SEAL_LEN};
use crate::name::Name;
use crate::records::record::HEADER_LEN;
use crate::records::segment::Location;
use crate::store::Store;

/// Chunks of a run at most: what was read is still in the processor's cache when it is checked and unpacked.
const RUN_CHUNKS_MAX: usize = 8;

/// Records of chunks that lie one after the other in a segment.
pub(super) struct Run {
    chunk_len: usize,
    domain: u32,
    records: Vec<(Name, Location)>,
}

impl Run {
    pub fn new(chunk_len: usize, domain: u32) -> Self {
        Run { chunk_len, domain, records: Vec::with_capacity(RUN_CHUNKS_MAX) }
    }

    pub fn len(&self) -> usize {
        self.records.len()
    }

    /// Where the first record lies.
    pub fn start(&self) -> Option<Location> {
        self.records.first().map(|(_, location)| *location)
    }

    /// Adds a chunk if its record lies behind the last; whether it does.
    pub fn add(&mut self, name: Name, location: Location) -> bool {
        let follows = match self.records.last() {
            Some((_, last)) => self.records.len() < RUN_CHUNKS_MAX && record_len(*last, location).is_some(),
            None => true,
        };
        if follows {
            self.records.push((name, location));
        }
        follows
    }

    /// Bytes before a chunk that is not packed.
    fn front_len(&self) -> usize {
        HEADER_LEN + if self.domain == OPEN_DOMAIN { 0 } else { SEAL_LEN }
    }

    /// The longest record that comes next, and whether its chunk is read straight to its place.
    fn shape(&self, index: usize) -> (usize, bool) {
        let location = self.records[index].1;
        let next = self.records.get(index + 1).and_then(|(_, next)| record_len(location, *next));
        let unpacked_len = (self.front_len() + self.chunk_len).next_multiple_of(HEADER_LEN);
        let is_unpacked = next.is_none_or(|len| len == unpacked_len)
            && location == Location::new(location.segment(), location.offset(), unpacked_len);
        (if is_unpacked { unpacked_len } else { next.unwrap_or(location.read_len()) }, is_unpacked)
    }

    /// Reads the chunks to `content`, one after the other, if the host has them in its page cache. Whether all are there, and are what they
    /// should be. `scratch` is room that is used again.
    pub fn read_if_cached(&self, store: &Store, file: &File, content: &mut [u8], scratch: &mut Vec<u8>) -> bool {
        let Some(start) = self.start() else { return true };
        let shapes: Vec<(usize, bool)> = (0..self.records.len()).map(|index| self.shape(index)).collect();
        let in_scratch = |&(len, is_unpacked): &(usize, bool)| if is_unpacked { len - self.chunk_len } else { len };
        let scratch_len: usize = shapes.iter().map(in_scratch).sum();
        if scratch.len() < scratch_len {
            scratch.resize(scratch_len, 0);
        }
        let mut slices = Vec::with_capacity(3 * shapes.len());
        let mut rest = &mut scratch[..scratch_len];
        for (shape, chunk) in shapes.iter().zip(content.chunks_exact_mut(self.chunk_len)) {
            let (record, behind) = rest.split_at_mut(in_scratch(shape));
            rest = behind;
            if shape.1 {
                let (front, padding) = record.split_at_mut(self.front_len());
                slices.extend([front, chunk, padding].map(IoSliceMut::new));
            } else {
                slices.push(IoSliceMut::new(record));
            }
        }
        let wanted: usize = shapes.iter().map(|(len, _)| len).sum();
        let read = rustix::io::preadv2(file, &mut slices, start.offset(), ReadWriteFlags::NOWAIT);
        // The length of the last record is known to a header's length only, and a file may end with it.
        let missing = wanted - read.unwrap_or(0).min(wanted);
        if missing > HEADER_LEN {
            return false;
        }
        let mut rest = &mut scratch[..scratch_len];
        let parts = self.records.iter().zip(&shapes).zip(content.chunks_exact_mut(self.chunk_len));
        for (index, (((name, _), shape), chunk)) in parts.enumerate() {
            let (record, behind) = std::mem::take(&mut rest).split_at_mut(in_scratch(shape));
            rest = behind;
            let end = record.len() - if index + 1 == shapes.len() { missing } else { 0 };
            let is_whole = match shape.1 {
                true => missing == 0 && store.is_chunk(name, self.domain, &record[..self.front_len()], chunk),
                false => store.content_into(name, self.domain, &mut record[..end], chunk),
            };
            if !is_whole {
                return false;
            }
        }
        true
    }
}

/// Bytes of the record at a place, if the next one follows on it.
fn record_len(location: Location, next: Location) -> Option<usize> {
    let len = next.offset().checked_sub(location.offset())? as usize;
    let fits = location.segment() == next.segment() && len > location.read_len() - 2 * HEADER_LEN;
    (fits && len <= location.read_len()).then_some(len)
}
