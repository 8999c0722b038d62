//! Keeps to a number of bytes a second.

use std::time::{Duration, Instant};

pub(crate) struct Pace {
    begin: Instant,
    bytes: u64,
    bytes_per_second: u64,
}

impl Pace {
    pub fn new(bytes_per_second: u64) -> Self {
        Pace { begin: Instant::now(), bytes: 0, bytes_per_second: bytes_per_second.max(1) }
    }

    /// At the full speed if there is no limit.
    pub fn limited(bytes_per_second: Option<u64>) -> Self {
        Pace::new(bytes_per_second.unwrap_or(u64::MAX))
    }

    /// Counts bytes, and sleeps if they were too many.
    pub fn spend(&mut self, bytes: u64) {
        if self.bytes_per_second == u64::MAX {
            return;
        }
        self.bytes += bytes;
        let due = Duration::from_secs_f64(self.bytes as f64 / self.bytes_per_second as f64);
        let ahead = due.saturating_sub(self.begin.elapsed());
        if ahead > Duration::from_millis(2) {
            std::thread::sleep(ahead.min(Duration::from_secs(1)));
        }
    }
}
