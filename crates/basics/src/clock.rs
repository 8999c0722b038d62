//! The injected clock.
//!
//! Whoever needs time takes a `&dyn Clock` or an `Arc<dyn Clock>`; nothing reads the system's clock on its own.

use std::sync::atomic::{AtomicU64, Ordering};

use rustix::time::{ClockId, clock_gettime};

/// A source of monotonic and wall-clock time, in nanoseconds. Callable from any thread.
pub trait Clock: Send + Sync {
    /// Nanoseconds since an arbitrary fixed point; never goes back.
    fn monotonic_ns(&self) -> u64;
    /// Nanoseconds since 1970-01-01 00:00 UTC; may jump.
    fn wall_ns(&self) -> u64;
}

/// The host's clock: `CLOCK_MONOTONIC` and `CLOCK_REALTIME`.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn monotonic_ns(&self) -> u64 {
        nanoseconds(ClockId::Monotonic)
    }

    fn wall_ns(&self) -> u64 {
        nanoseconds(ClockId::Realtime)
    }
}

fn nanoseconds(id: ClockId) -> u64 {
    let time = clock_gettime(id);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// A clock that moves only when it is told to; for tests and simulators.
#[derive(Debug, Default)]
pub struct ManualClock {
    monotonic_ns: AtomicU64,
    wall_ns: AtomicU64,
}

impl ManualClock {
    /// A clock that reads `wall_ns` as the wall time and zero as the monotonic time.
    pub fn new(wall_ns: u64) -> Self {
        ManualClock { monotonic_ns: AtomicU64::new(0), wall_ns: AtomicU64::new(wall_ns) }
    }

    /// Moves both times forward.
    pub fn advance_ns(&self, by_ns: u64) {
        self.monotonic_ns.fetch_add(by_ns, Ordering::SeqCst);
        self.wall_ns.fetch_add(by_ns, Ordering::SeqCst);
    }
}

impl Clock for ManualClock {
    fn monotonic_ns(&self) -> u64 {
        self.monotonic_ns.load(Ordering::SeqCst)
    }

    fn wall_ns(&self) -> u64 {
        self.wall_ns.load(Ordering::SeqCst)
    }
}
