//! Writing through a queue: small writes are collected, and appended to the volume's log together when the queue is asked for completions and
//! has none.
//!
//! Who has one operation in flight at a time waits no longer for that: it asks right after it handed over. What comes after a write and
//! counts on its place in the order (a flush, a read of the same bytes, zeros, a write that is not collected, the end of the queue) has
//! what was collected carried out first. Guest memory is looked at once, when its write is carried out.

use std::time::{Duration, Instant};

use crate::disk::queue::DiskQueue;
use crate::disk::{Buffer, Completion, DiskError, Durability, Queue};
use crate::volume::extent_map::BLOCK_LEN;
use crate::volume::group::{BlockWrite, Patience};

/// Longer writes are not collected: what a group saves is little beside what they take.
const COLLECTED_LEN_MAX: usize = 64 << 10;
/// Bytes that are collected; with these they are carried out.
const COLLECTED_BYTES_MAX: usize = 512 << 10;
/// Syncs that take no longer than that, as a rule, are not worth another thread when nothing else is going on.
const QUICK_SYNC: Duration = Duration::from_millis(1);
/// Where they take longer the next ones are other threads' for so long.
const SLOW_SYNCS: Duration = Duration::from_millis(200);
/// What a sync counts for in how long they take as a rule: one that is late now and then says nothing of the next.
const SYNC_WEIGHT: u32 = 8;

/// A write that was not carried out yet.
struct CollectedWrite<B> {
    token: u64,
    offset: u64,
    buffer: B,
    durability: Durability,
}

/// Writes of whole blocks that were submitted and not carried out yet, in their order.
pub(super) struct Collected<B> {
    writes: Vec<CollectedWrite<B>>,
    bytes: usize,
}

impl<B> Default for Collected<B> {
    fn default() -> Self {
        Collected { writes: Vec::new(), bytes: 0 }
    }
}

impl<B: Buffer> Collected<B> {
    pub fn len(&self) -> usize {
        self.writes.len()
    }

    /// Whether one of them changes bytes of a range.
    pub fn overlap(&self, offset: u64, len: usize) -> bool {
        let end = offset.saturating_add(len as u64);
        self.writes.iter().any(|write| write.offset < end && offset < write.offset + write.buffer.len() as u64)
    }
}

/// Writes with what they write: of buffers that do not show it that is `taken`, one behind the other.
fn block_writes<'a, B: Buffer>(writes: &'a [CollectedWrite<B>], taken: &'a [u8]) -> Vec<BlockWrite<'a>> {
    let mut rest = taken;
    let mut payload = |buffer: &'a B| {
        buffer.bytes().unwrap_or_else(|| {
            let (payload, behind) = rest.split_at(buffer.len());
            rest = behind;
            payload
        })
    };
    writes.iter().map(|write| BlockWrite { offset: write.offset, payload: payload(&write.buffer) }).collect()
}

/// Bytes that have to be taken of writes.
fn taken_len<B: Buffer>(writes: &[CollectedWrite<B>]) -> usize {
    writes.iter().filter(|write| write.buffer.bytes().is_none()).map(|write| write.buffer.len()).sum()
}

impl<B: Buffer> DiskQueue<B> {
    pub(super) fn write(&mut self, token: u64, offset: u64, buffer: B, durability: Durability) {
        let core = match self.view.volume() {
            Ok(core) => core,
            Err(error) => return self.complete(token, Some(buffer), Err(error)),
        };
        let len = buffer.len();
        if len <= COLLECTED_LEN_MAX && core.is_block_write(offset, len) {
            self.collected.writes.push(CollectedWrite { token, offset, buffer, durability });
            self.collected.bytes += len;
            if self.collected.bytes >= COLLECTED_BYTES_MAX {
                self.push_out();
            }
            return;
        }
        self.push_out();
        self.write_alone(CollectedWrite { token, offset, buffer, durability });
    }

    fn write_alone(&mut self, write: CollectedWrite<B>) {
        let CollectedWrite { token, offset, buffer, durability } = write;
        let Ok(core) = self.view.volume().cloned() else { return };
        let len = buffer.len();
        if buffer.bytes().is_none() {
            self.payload.resize(len.max(self.payload.len()), 0);
            buffer.take(0, &mut self.payload[..len]);
        }
        let whole = offset.is_multiple_of(BLOCK_LEN) && (len as u64).is_multiple_of(BLOCK_LEN);
        // Where much is packed at once several threads do it.
        let is_direct = core.direct_part(offset, len as u64).is_some();
        if !whole || is_direct || !core.has_room_now(len) {
            let taken = buffer.bytes().is_none().then(|| self.payload[..len].to_vec());
            return self.by_worker(token, move || {
                let payload = taken.as_deref().or_else(|| buffer.bytes()).unwrap_or_default();
                let result = core.write_at(offset, payload).and_then(|()| match durability {
                    Durability::Cached => Ok(()),
                    Durability::Stable => core.flush(),
                });
                (Some(buffer), result.map_err(DiskError::from))
            });
        }
        let result = match buffer.bytes() {
            Some(bytes) => core.write_at(offset, bytes),
            None => core.write_at(offset, &self.payload[..len]),
        };
        self.then_flush(token, Some(buffer), result.map_err(DiskError::from), durability);
    }

    /// Carries out what was collected. What would have to wait for room is left to a worker thread.
    pub(super) fn push_out(&mut self) {
        if self.collected.writes.is_empty() {
            return;
        }
        let mut writes = std::mem::take(&mut self.collected.writes);
        self.collected.bytes = 0;
        if writes.len() == 1 {
            writes.drain(..).for_each(|write| self.write_alone(write));
            self.collected.writes = writes;
            return;
        }
        let Ok(core) = self.view.volume().cloned() else { return };
        let mut taken = std::mem::take(&mut self.payload);
        taken.resize(taken.len().max(taken_len(&writes)), 0);
        let mut rest = &mut taken[..];
        for write in writes.iter().filter(|write| write.buffer.bytes().is_none()) {
            let (payload, behind) = rest.split_at_mut(write.buffer.len());
            write.buffer.take(0, payload);
            rest = behind;
        }
        let results = core.write_group(&block_writes(&writes, &taken), Patience::GoOn);
        if results.len() < writes.len() {
            let left = writes.split_off(results.len());
            let start = taken_len(&writes);
            self.write_group_by_worker(left, &taken[start..]);
        }
        self.payload = taken;
        for (write, result) in writes.drain(..).zip(results) {
            self.then_flush(write.token, Some(write.buffer), result.map_err(DiskError::from), write.durability);
        }
        self.collected.writes = writes;
    }

    fn write_group_by_worker(&mut self, writes: Vec<CollectedWrite<B>>, taken: &[u8]) {
        let Ok(core) = self.view.volume().cloned() else { return };
        let taken = taken[..taken_len(&writes)].to_vec();
        let deliverers: Vec<_> = writes.iter().map(|_| self.deliverer()).collect();
        self.view.store().workers().run(move || {
            let results = core.write_group(&block_writes(&writes, &taken), Patience::Wait);
            for ((write, result), deliver) in writes.into_iter().zip(results).zip(deliverers) {
                let result = result.and_then(|()| match write.durability {
                    Durability::Cached => Ok(()),
                    Durability::Stable => core.flush(),
                });
                let (token, buffer) = (write.token, Some(write.buffer));
                deliver(Completion { token, buffer, result: result.map_err(DiskError::from) });
            }
        });
    }

    pub(super) fn zero(&mut self, token: u64, offset: u64, len: u64, durability: Durability) {
        let core = match self.view.volume() {
            Ok(core) => core.clone(),
            Err(error) => return self.complete(token, None, Err(error)),
        };
        self.push_out();
        let whole = offset.is_multiple_of(BLOCK_LEN) && len.is_multiple_of(BLOCK_LEN);
        if !whole || !core.has_room_now(0) {
            return self.by_worker(token, move || {
                let result = core.zero(offset, len).and_then(|()| match durability {
                    Durability::Cached => Ok(()),
                    Durability::Stable => core.flush(),
                });
                (None, result.map_err(DiskError::from))
            });
        }
        let result = core.zero(offset, len);
        self.then_flush(token, None, result.map_err(DiskError::from), durability);
    }

    fn then_flush(&mut self, token: u64, buffer: Option<B>, result: Result<(), DiskError>, durability: Durability) {
        match durability {
            Durability::Stable if result.is_ok() => self.flush(token, buffer),
            _ => self.complete(token, buffer, result),
        }
    }

    pub(super) fn flush(&mut self, token: u64, buffer: Option<B>) {
        let core = match self.view.volume() {
            Ok(core) => core.clone(),
            // Nothing of a disk that never changes can be lost.
            Err(_) => return self.complete(token, buffer, Ok(())),
        };
        self.push_out();
        if core.all_is_stable() {
            return self.complete(token, buffer, Ok(()));
        }
        // Another thread's turn costs two wake-ups. While it lasts nobody else of this queue waits, unless something comes just now.
        let alone = self.may_wait && self.in_flight() == 0 && !core.owes_chunks();
        if alone && self.slow_sync.is_none_or(|slow| slow.elapsed() > SLOW_SYNCS) {
            let begin = Instant::now();
            let result = core.flush();
            self.sync_time = (self.sync_time * (SYNC_WEIGHT - 1) + begin.elapsed()) / SYNC_WEIGHT;
            self.slow_sync = (self.sync_time > QUICK_SYNC).then(Instant::now);
            return self.complete(token, buffer, result.map_err(DiskError::from));
        }
        let deliver = self.deliverer();
        core.flush_then(move |result| {
            deliver(Completion { token, buffer, result: result.map_err(DiskError::from) });
        });
    }
}

#[cfg(test)]
#[path = "writing_tests.rs"]
mod tests;
