//! What all connections of a server hold together.

use super::SERVER_HELD_BYTES_MAX;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Less than this is not counted, so that small requests share nothing.
const GRAIN_LEN: usize = 1 << 20;

/// One connection's part of what a server holds. Dropping it gives the part back.
#[derive(Default)]
pub(super) struct Budget {
    total: Arc<AtomicUsize>,
    charged: usize,
}

impl Budget {
    /// A part of `total`, which the connections of a server share.
    pub fn new(total: Arc<AtomicUsize>) -> Self {
        Self { total, charged: 0 }
    }

    /// Whether the connections hold as much as they should.
    pub fn is_exhausted(&self) -> bool {
        self.total.load(Ordering::Relaxed) >= SERVER_HELD_BYTES_MAX
    }

    /// This connection holds so much now.
    pub fn charge(&mut self, held_bytes: usize) {
        let charge = held_bytes / GRAIN_LEN * GRAIN_LEN;
        if charge > self.charged {
            self.total.fetch_add(charge - self.charged, Ordering::Relaxed);
        } else if charge < self.charged {
            self.total.fetch_sub(self.charged - charge, Ordering::Relaxed);
        }
        self.charged = charge;
    }
}

impl Drop for Budget {
    fn drop(&mut self) {
        self.charge(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_connections_hold_is_counted_until_they_go() {
        let total = Arc::new(AtomicUsize::new(0));
        let (mut one, mut other) = (Budget::new(total.clone()), Budget::new(total.clone()));
        one.charge(SERVER_HELD_BYTES_MAX / 2 + GRAIN_LEN - 1);
        other.charge(SERVER_HELD_BYTES_MAX / 2 - 1);
        assert!(!other.is_exhausted());
        other.charge(SERVER_HELD_BYTES_MAX / 2);
        assert!(one.is_exhausted());
        one.charge(100);
        assert!(!one.is_exhausted());
        drop(other);
        assert_eq!(total.load(Ordering::Relaxed), 0);
    }
}
