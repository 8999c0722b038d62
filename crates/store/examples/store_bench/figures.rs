//! Times of operations, and what is told of them.

use std::time::Duration;

use serde_json::{Value, json};

#[derive(Default)]
pub struct Figures {
    nanoseconds: Vec<u64>,
}

impl Figures {
    pub fn add(&mut self, time: Duration) {
        self.nanoseconds.push(time.as_nanos() as u64);
    }

    /// Takes over what another thread timed.
    pub fn extend(&mut self, other: Figures) {
        self.nanoseconds.extend(other.nanoseconds);
    }

    /// Count, rate over `whole`, quantiles and the longest.
    pub fn summary(mut self, whole: Duration) -> Value {
        self.nanoseconds.sort_unstable();
        let count = self.nanoseconds.len();
        let quantile = |share: f64| {
            let at = ((count as f64 * share) as usize).min(count.saturating_sub(1));
            self.nanoseconds.get(at).copied().unwrap_or(0)
        };
        json!({
            "count": count, "per_second": count as f64 / whole.as_secs_f64(),
            "p50_ns": quantile(0.5), "p99_ns": quantile(0.99), "p999_ns": quantile(0.999), "max_ns": quantile(1.0),
        })
    }
}
