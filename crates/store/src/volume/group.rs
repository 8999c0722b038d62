//! Writes that are appended together: a front end that hands over many small writes at a time takes the log's lock, goes to the host and
//! lays them over the volume once for all of them.
//!
//! Each write has a record and a result of its own, as if it had come alone: one that fails takes none before it along, and those
//! behind it are tried by themselves.

use std::sync::atomic::Ordering;
use std::time::Instant;

use crate::catalog::SnapshotRow;
use crate::error::Result;
use crate::volume::check_range;
use crate::volume::core::Core;
use crate::volume::extent_map::BLOCK_LEN;
use crate::volume::layers::backlog;
use crate::volume::log::LogWriter;
use crate::volume::log_record::{Change, Entry, chunk_names};
use crate::volume::log_seal::sealed_len;

/// A write of whole blocks that fits one record.
#[derive(Clone, Copy)]
pub(crate) struct BlockWrite<'a> {
    pub offset: u64,
    pub payload: &'a [u8],
}

/// Whether whoever writes may wait for room in the log and on the host's disk.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Patience {
    Wait,
    /// What would have to wait is left.
    GoOn,
}

impl Core {
    /// Whether a range can be written as a member of a group: whole blocks, no more than one record takes.
    pub fn is_block_write(&self, offset: u64, len: usize) -> bool {
        let whole = offset.is_multiple_of(BLOCK_LEN) && (len as u64).is_multiple_of(BLOCK_LEN);
        whole && len > 0 && len as u64 <= self.write_len_max()
    }

    /// Writes one behind the other. Gives the results of the first of them, of all with [`Patience::Wait`].
    pub fn write_group(&self, writes: &[BlockWrite], patience: Patience) -> Vec<Result<()>> {
        let mut results = Vec::with_capacity(writes.len());
        while results.len() < writes.len() {
            let had = results.len();
            let rest = &writes[had..];
            if patience == Patience::Wait {
                if let Err(error) = self.wait_for_room() {
                    results.push(Err(error));
                    continue;
                }
            } else if !self.has_room_now(rest[0].payload.len()) {
                break;
            }
            let failure = self.append_group(rest, &mut results).err();
            match failure {
                // Whoever waits for the host's disk writes what is left anew; so does who is told to.
                Some(error) if error.is_no_space() && patience == Patience::GoOn => break,
                Some(error) if self.wait_for_space(&error) => {}
                Some(error) => results.push(Err(error)),
                None => {}
            }
        }
        results
    }

    /// Appends the first of some writes: their results, and why the next one failed.
    fn append_group(&self, writes: &[BlockWrite], results: &mut Vec<Result<()>>) -> Result<()> {
        let Some(sealer) = &self.sealer else {
            let records = writes.iter().map(|write| Entry::new(Change::Write { offset: write.offset }, write.payload));
            return self.append_entries(writes, &records.collect::<Vec<_>>(), results);
        };
        // Anew for each attempt: what an earlier one left of it may be on the disk.
        let mut sealed = Vec::with_capacity(writes.iter().map(|write| sealed_len(write.payload.len())).sum());
        let changes: Vec<Change> =
            writes.iter().map(|write| sealer.seal_onto(write.offset, write.payload, &mut sealed)).collect();
        let mut rest = &sealed[..];
        let entries = writes.iter().zip(changes).map(|(write, change)| {
            let (payload, behind) = rest.split_at(sealed_len(write.payload.len()));
            rest = behind;
            Entry::new(change, payload)
        });
        self.append_entries(writes, &entries.collect::<Vec<_>>(), results)
    }

    /// The same for the records of the writes: those that one file of the log takes.
    fn append_entries(&self, writes: &[BlockWrite], entries: &[Entry], results: &mut Vec<Result<()>>) -> Result<()> {
        let mut log = self.log();
        let capacity_bytes = self.capacity_bytes();
        let check = |write: &BlockWrite| check_range(write.offset, write.payload.len() as u64, capacity_bytes);
        let inside = writes.iter().take_while(|write| check(write).is_ok()).count();
        let Some(first) = entries[..inside].first() else { return writes.first().map_or(Ok(()), check) };
        self.make_fit(&mut log, first.payload.len())?;
        let (count, result) = self.append_fitting(&mut log, &entries[..inside], None);
        results.extend((0..count).map(|_| Ok(())));
        result
    }

    /// Goes on in the log's next file if a record with that payload does not fit into this one.
    pub(super) fn make_fit(&self, log: &mut LogWriter, payload_len: usize) -> Result<()> {
        if log.fits(payload_len) {
            return Ok(());
        }
        let before = log.position().place;
        self.work().last_rotation = Some(Instant::now());
        let spare = self.store.spares().take(self.options.log_file_len());
        let file = log.next_file(spare)?;
        self.layers_mut().files.push(file);
        // The record may fail: what is counted is how far the log is.
        let begin = log.position().place;
        self.backlog.fetch_add(backlog(self.options.log_file_len(), before, begin), Ordering::Relaxed);
        self.wake.notify_all();
        Ok(())
    }

    /// Appends records to the log's file, those that fit and one at least, and lays them over what there was. How many, and why the next one
    /// failed.
    pub(super) fn append_fitting(
        &self,
        log: &mut LogWriter,
        entries: &[Entry],
        mut snapshot: Option<Box<SnapshotRow>>,
    ) -> (usize, Result<()>) {
        let before = log.position().place;
        let mut appended = Vec::with_capacity(entries.len());
        let result = log.append_all(entries, &mut appended);
        let Some(last) = appended.last() else { return (0, result) };
        let end = last.end.place;
        {
            let mut layers = self.layers_mut();
            for (record, entry) in appended.iter().zip(entries) {
                let old_capacity = layers.capacity_bytes;
                let opening = self.sealer.as_ref().filter(|_| matches!(record.change, Change::Sealed { .. }));
                let opening = opening.map(|sealer| sealer.ours().clone());
                let names = chunk_names(entry.change, entry.payload, self.chunk_len() as u64);
                layers.active.add(record, snapshot.take(), opening, names, old_capacity);
                if let Change::Resize { capacity_bytes } = record.change {
                    layers.capacity_bytes = capacity_bytes;
                }
            }
        }
        let more = backlog(self.options.log_file_len(), before, end);
        let had = self.backlog.fetch_add(more, Ordering::Relaxed);
        let crossed = |mark: u64, before: u64, after: u64| before < mark && after >= mark;
        if had == 0
            || crossed(self.options.log_bytes_start, had, had + more)
            || crossed(self.spare_mark(), before.offset(), end.offset())
        {
            self.wake.notify_all();
        }
        (appended.len(), result)
    }
}
