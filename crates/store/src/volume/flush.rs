//! Flushing a volume: what was appended to its log becomes stable.

use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard};

use crate::error::{Result, StoreError};
use crate::volume::core::Core;

/// Syncs of the log come one after the other, and who asks while one runs is covered by the next: that needs fewer of them, and an error
/// that the host reports to one of them cannot be missed by another that runs beside it.
#[derive(Default)]
pub(super) struct Syncs {
    running: bool,
    /// Who hears of it when everything before a sequence number is stable, or will never be.
    waiting: Vec<(u64, FlushEnd)>,
}

/// What hears of a flush's end.
pub(super) type FlushEnd = Box<dyn FnOnce(Result<()>) + Send>;

impl Core {
    fn syncs(&self) -> MutexGuard<'_, Syncs> {
        self.syncs.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn is_stable(&self, sequence: u64) -> bool {
        self.stable.load(Ordering::Acquire) >= sequence
    }

    /// Makes everything stable that was appended before, on this thread.
    pub fn flush(self: &Arc<Self>) -> Result<()> {
        let wanted = self.log().position().sequence;
        let mut syncs = self.syncs();
        loop {
            if self.is_stable(wanted) {
                return Ok(());
            }
            if !syncs.running {
                break;
            }
            syncs = self.synced.wait(syncs).unwrap_or_else(|poisoned| poisoned.into_inner());
        }
        syncs.running = true;
        drop(syncs);
        let result = self.sync();
        if self.end_sync() {
            self.hand_over_syncs();
        }
        result
    }

    /// As [`flush`](Self::flush), for threads that do not wait: `end` is called on this thread or another.
    pub fn flush_then(self: &Arc<Self>, end: impl FnOnce(Result<()>) + Send + 'static) {
        let wanted = self.log().position().sequence;
        let mut syncs = self.syncs();
        if self.is_stable(wanted) {
            drop(syncs);
            return end(Ok(()));
        }
        syncs.waiting.push((wanted, Box::new(end)));
        if !syncs.running {
            syncs.running = true;
            drop(syncs);
            self.hand_over_syncs();
        }
    }

    /// Whether a flush has more to do than to sync the log.
    pub fn owes_chunks(&self) -> bool {
        self.log().owes_chunks()
    }

    /// Whether a flush has nothing to wait for.
    pub fn all_is_stable(&self) -> bool {
        let wanted = self.log().position().sequence;
        self.is_stable(wanted)
    }

    /// Has a worker thread sync for those who wait. The turn goes with it.
    fn hand_over_syncs(self: &Arc<Self>) {
        let core = self.clone();
        self.store.workers().run(move || {
            loop {
                // Those who wait hear of an error from the log.
                let _ = core.sync();
                if !core.end_sync() {
                    return;
                }
            }
        });
    }

    fn sync(&self) -> Result<()> {
        let flush = self.log().begin_flush()?;
        if let Some(failures) = flush.chunks
            && let Err(error) = self.sync_chunks(failures)
        {
            match error.is_no_space() {
                // The chunks are still in memory.
                true => self.log().owe_chunks(failures),
                false => self.log().end_flush(&flush, &Err(std::io::ErrorKind::Other.into())),
            }
            return Err(error);
        }
        let result = flush.run();
        self.log().end_flush(&flush, &result);
        result.map_err(StoreError::file("write", &self.folder))?;
        self.stable.fetch_max(flush.sequence, Ordering::AcqRel);
        Ok(())
    }

    /// Tells those who wait what came of a sync. Whether others do, whose records came later: then the turn stays taken for them.
    fn end_sync(&self) -> bool {
        let broken = self.log().broken();
        let (ended, more) = {
            let mut syncs = self.syncs();
            let waiting = std::mem::take(&mut syncs.waiting);
            let (ended, rest): (Vec<_>, Vec<_>) =
                waiting.into_iter().partition(|(wanted, _)| broken.is_some() || self.is_stable(*wanted));
            syncs.waiting = rest;
            syncs.running = !syncs.waiting.is_empty();
            (ended, syncs.running)
        };
        self.synced.notify_all();
        for (wanted, end) in ended {
            match &broken {
                Some(path) if !self.is_stable(wanted) => end(Err(StoreError::Broken { path: path.clone() })),
                _ => end(Ok(())),
            }
        }
        more
    }
}
