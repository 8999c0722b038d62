//! Long writes that go straight into segments: what the log gets of them is the names of their chunks.
//!
//! A log takes bursts as fast as the host's memory does, but all of it is written a second time when it is moved into the tree. So, once
//! much was written since the last flush, long runs of whole chunks are named, packed and stored at once, and a record of the log says which
//! chunks a range is made of. Moving that into the tree costs its nodes only. The record can reach the disk before the chunks do: a flush
//! makes the chunks stable first, and a record whose chunks are not there after a crash was not promised and does not count. Until the chunks
//! are in the tree the record keeps them: a collection reads the names in the logs of all volumes.

use std::ops::Range;
use std::sync::Arc;

use crate::error::{Result, StoreError};
use crate::name::Name;
use crate::store::Expected;
use crate::volume::core::Core;
use crate::volume::log_record::Change;

/// Shorter runs are not worth a turn in the store's segment.
const DIRECT_CHUNKS_MIN: u64 = 4;
/// Chunks that the log names at which they are moved into the tree: a gigabyte of chunks of 16 KiB.
const NAMED_START: u64 = 64 << 10;
/// Chunks that the log names at most; what is written then goes through the log, which has a bound of its own.
const NAMED_MAX: u64 = 16 * NAMED_START;

impl Core {
    /// The part of a range that a write of it stores straight in segments, if it does now.
    pub fn direct_part(&self, offset: u64, len: u64) -> Option<Range<u64>> {
        let chunk_len = u64::from(self.row.chunk_len);
        let (start, end) = (offset.next_multiple_of(chunk_len), (offset + len) / chunk_len * chunk_len);
        let is_long = end >= start + DIRECT_CHUNKS_MIN * chunk_len;
        let is_stream = || self.log().unflushed_bytes() >= self.options.stream_bytes;
        (is_long && is_stream() && self.named_chunks() < NAMED_MAX).then_some(start..end)
    }

    /// Chunks that the log names and the thread has not begun to move.
    fn named_chunks(&self) -> u64 {
        self.layers().active.named
    }

    /// Whether so many chunks are named that they are to be moved.
    pub fn names_many(&self) -> bool {
        self.named_chunks() >= NAMED_START
    }

    /// Stores whole chunks, and appends a record with their names. Whether that was done: what prevents it, as a full disk or a collection
    /// that is at its end, the log can wait for.
    pub fn write_direct(&self, offset: u64, bytes: &[u8]) -> Result<bool> {
        let Some(mut batch) = self.store.try_batch_in(self.domain.clone())? else { return Ok(false) };
        let failures = batch.failures();
        let names = match batch.put_chunks(bytes.chunks_exact(self.chunk_len())) {
            Ok(names) => names,
            Err(error) => {
                tracing::debug!(volume = self.row.name, %error, "chunks cannot be stored straight away");
                return Ok(false);
            }
        };
        let payload: Vec<u8> = names.iter().flat_map(|name| name.0).collect();
        let change = Change::Chunks { offset, len: bytes.len() as u64 };
        // First: a flush between the two has all chunks before it.
        self.log().owe_chunks(failures);
        match self.append_record(change, &payload, bytes.len(), None) {
            Err(error) if error.is_no_space() => return Ok(false),
            result => drop(result?),
        }
        // The batch was there until the record names the chunks.
        drop(batch);
        if self.names_many() {
            self.wake.notify_all();
        }
        Ok(true)
    }

    /// Makes the chunks stable that records name which are about to be promised. On a full disk it waits for room.
    pub(super) fn sync_chunks(&self, failures: u64) -> Result<()> {
        loop {
            match self.store.sync_records(failures) {
                Err(error) if self.wait_for_space(&error) => {}
                result => return result,
            }
        }
    }

    /// A chunk that the log names.
    pub(super) fn named_chunk(&self, name: &Name) -> Result<Arc<[u8]>> {
        let domain = self.row.domain;
        if let Some(content) = self.store.cached_chunk(name, domain) {
            return Ok(content);
        }
        let content = self.store.read(name, Expected::Data { domain })?.content;
        if content.len() != self.chunk_len() {
            return Err(StoreError::Refused(format!(
                "chunk {name} has {} bytes in a volume of chunks of {}",
                content.len(),
                self.chunk_len()
            )));
        }
        self.store.cache_chunk(name, domain, &content);
        Ok(content)
    }
}
