//! virtio-rng (5.4): the host's random bytes for the guest.
//!
//! The rate is bounded, so that a guest that asks without end costs the host little; a request gets at most
//! [`REQUEST_LEN_MAX`] bytes however much room it has, as the specification allows.

use std::sync::Arc;
use std::time::Duration;

use polder_basics::Clock;

use super::{
    ActivateError, Activation, Chain, DeviceInterrupts, DeviceType, Queue, QueueError, Signal, VirtioDevice, Worker,
    WorkerSlot,
};

/// The most bytes that one request gets.
pub const REQUEST_LEN_MAX: u64 = 4096;
/// Bytes a second in the long run.
pub const BYTES_PER_SECOND: u64 = 1 << 20;
/// Bytes that may be taken at once after a pause.
pub const BURST_LEN: u64 = 64 << 10;
const QUEUE_SIZE: u16 = 64;

/// A token bucket: pure, told the time.
#[derive(Debug)]
struct Bucket {
    tokens: u64,
    filled_ns: u64,
}

impl Bucket {
    fn new(now_ns: u64) -> Self {
        Bucket { tokens: BURST_LEN, filled_ns: now_ns }
    }

    /// Takes tokens, or says how long to wait until there are enough. `bytes` is at most [`BURST_LEN`].
    fn take(&mut self, now_ns: u64, bytes: u64) -> Result<(), Duration> {
        let passed_ns = now_ns.saturating_sub(self.filled_ns).min(1_000_000_000);
        let new = passed_ns * BYTES_PER_SECOND / 1_000_000_000;
        if new > 0 {
            self.tokens = (self.tokens + new).min(BURST_LEN);
            self.filled_ns = now_ns;
        }
        match self.tokens.checked_sub(bytes) {
            Some(left) => {
                self.tokens = left;
                Ok(())
            }
            None => Err(Duration::from_nanos((bytes - self.tokens) * 1_000_000_000 / BYTES_PER_SECOND + 1)),
        }
    }
}

/// An entropy device.
pub struct Rng {
    clock: Arc<dyn Clock>,
    worker: WorkerSlot,
}

impl Rng {
    /// A device whose rate is measured by `clock`.
    pub fn new(clock: Arc<dyn Clock>) -> Self {
        Rng { clock, worker: WorkerSlot::default() }
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> DeviceType {
        DeviceType::Rng
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE]
    }

    fn config_read(&self, _offset: u64, target: &mut [u8]) {
        target.fill(0);
    }

    fn activate(&self, mut activation: Activation) -> Result<(), ActivateError> {
        let mut queue = activation.take_queue(0)?;
        let interrupts = activation.interrupts;
        let clock = self.clock.clone();
        let worker = Worker::spawn("virtio-rng", move |signal| {
            if let Err(error) = work(&mut queue, &*interrupts, &signal, &*clock) {
                tracing::warn!(%error, "the rng queue is broken");
                interrupts.needs_reset();
            }
        })?;
        self.worker.fill(worker);
        Ok(())
    }

    fn notify(&self, _queue: u16) {
        self.worker.raise();
    }

    fn reset(&self) {
        self.worker.empty();
    }
}

fn work(
    queue: &mut Queue,
    interrupts: &dyn DeviceInterrupts,
    signal: &Signal,
    clock: &dyn Clock,
) -> Result<(), QueueError> {
    let mut bucket = Bucket::new(clock.monotonic_ns());
    loop {
        queue.disable_notifications();
        while let Some(chain) = queue.pop()? {
            let len = chain.writable.len().min(REQUEST_LEN_MAX);
            while let Err(wait) = bucket.take(clock.monotonic_ns(), len) {
                // What is done so far is told before sleeping.
                queue.tell(interrupts);
                if !signal.wait_at_most(wait) {
                    return Ok(());
                }
            }
            let written = fill(&chain, len);
            queue.add_used(chain.head, written);
        }
        queue.tell(interrupts);
        if !queue.enable_notifications()? && !signal.wait() {
            return Ok(());
        }
    }
}

/// Fills the first `len` bytes of a chain; how many the host gave.
fn fill(chain: &Chain, len: u64) -> u32 {
    let mut bytes = [0; REQUEST_LEN_MAX as usize];
    let mut done = 0;
    let wanted = (len as usize).min(bytes.len());
    while done < wanted {
        match rustix::rand::getrandom(&mut bytes[done..wanted], rustix::rand::GetRandomFlags::empty()) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => break,
        }
    }
    match chain.writable.write(0, &bytes[..done]) {
        Ok(()) => done as u32,
        Err(_) => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::{DATA, Driver, RAM_LEN, WRITE};
    use polder_basics::{ManualClock, SystemClock};

    fn driver() -> Driver {
        Driver::ready(Arc::new(Rng::new(Arc::new(SystemClock))), 0)
    }

    #[test]
    fn a_request_is_filled_with_random_bytes() {
        let mut driver = driver();
        let head = driver.send(0, &[(DATA, 64, true), (DATA + 0x1000, 64, true)]);
        assert_eq!(driver.wait_used(0), (head, 128));
        assert!(driver.bytes(DATA, 64) != vec![0; 64] && driver.bytes(DATA + 0x1000, 64) != vec![0; 64]);
        driver.send(0, &[(DATA + 0x2000, 1 << 20, true)]);
        assert_eq!(driver.wait_used(0).1, REQUEST_LEN_MAX as u32);
        assert_eq!(driver.bytes(DATA + 0x2000 + REQUEST_LEN_MAX, 64), vec![0; 64]);
    }

    #[test]
    fn a_request_without_room_comes_back_empty() {
        let mut driver = driver();
        driver.send(0, &[(DATA, 64, false)]);
        assert_eq!(driver.wait_used(0).1, 0);
    }

    #[test]
    fn a_descriptor_larger_than_guest_memory_is_refused() {
        let mut driver = driver();
        let table = driver.queues[0].descriptors;
        driver.put_descriptor(table, 0, DATA, u32::MAX, WRITE, 0);
        driver.offer(0, 0);
        driver.ring(0);
        driver.wait_needs_reset();
        assert_eq!(driver.bytes(DATA, 4096), vec![0; 4096]);
        assert_eq!(driver.bytes(RAM_LEN - 4096, 4096), vec![0; 4096]);
    }

    #[test]
    fn a_guest_that_asks_without_end_is_held_to_the_rate() {
        let clock = Arc::new(ManualClock::new(0));
        let mut driver = Driver::ready(Arc::new(Rng::new(clock.clone())), 0);
        let requests = BURST_LEN / REQUEST_LEN_MAX;
        for _ in 0..requests + 1 {
            driver.add_chain(0, &[(DATA, REQUEST_LEN_MAX as u32, true)]);
        }
        driver.ring(0);
        for _ in 0..requests {
            driver.wait_used(0);
        }
        assert_eq!(driver.take_used(0), None);
        clock.advance_ns(1_000_000_000);
        driver.wait_used(0);
    }

    #[test]
    fn the_bucket_fills_with_time_and_never_beyond_its_burst() {
        let mut bucket = Bucket::new(0);
        bucket.take(0, BURST_LEN).unwrap();
        let wait = bucket.take(0, 1024).unwrap_err();
        assert!(bucket.take(wait.as_nanos() as u64 / 2, 1024).is_err());
        bucket.take(wait.as_nanos() as u64 + 1000, 1024).unwrap();
        bucket.take(u64::MAX, BURST_LEN).unwrap();
        assert!(bucket.take(u64::MAX, BURST_LEN / 8).is_err());
    }
}
