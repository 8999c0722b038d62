//! virtio-balloon (5.5): memory that the guest lends back to the host.
//!
//! Pages in the balloon and pages that the guest reports as free are given back by punching holes into the memory's memfd;
//! they come back as zeros when the guest uses them again. One worker thread serves all queues.
//!
//! Queues: 0 inflate, 1 deflate, then statistics and free page reporting as far as they were negotiated. (Section 5.5.2 gives them
//! fixed numbers; Linux counts only the negotiated ones, and nothing of what we leave out lies between.)

use std::sync::{Arc, Mutex};

use polder_memory::{GuestAddress, GuestMemory, PAGE_SIZE};

use super::{
    ActivateError, Activation, Buffers, Chain, DeviceInterrupts, DeviceType, Queue, QueueError, Signal, VirtioDevice,
    Worker, WorkerSlot, copy_config,
};
use crate::lock;

const FEATURE_STATISTICS: u64 = 1 << 1;
const FEATURE_DEFLATE_ON_OOM: u64 = 1 << 2;
const FEATURE_REPORTING: u64 = 1 << 5;

const QUEUE_SIZE: u16 = 128;
const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
/// Page numbers taken at once from a request; between two batches the worker looks whether it is to end.
const BATCH_LEN: usize = 1024;
/// Statistics kept of one report; what comes after is ignored.
pub const STATISTICS_MAX: usize = 32;
const STATISTIC_LEN: usize = 10;

/// Statistics as (tag, value); tags as in 5.5.6.3: 0 swapped in, 1 swapped out, 2 major faults, 3 minor faults, 4 free
/// memory, 5 total memory, 6 available memory, 7 caches, 8 and 9 huge page allocations.
pub type Statistics = Vec<(u16, u64)>;

#[derive(Default)]
struct State {
    target_pages: u32,
    actual_pages: u32,
    statistics: Statistics,
    statistics_wanted: bool,
    interrupts: Option<Arc<dyn DeviceInterrupts>>,
}

/// A memory balloon.
#[derive(Default)]
pub struct Balloon {
    state: Arc<Mutex<State>>,
    worker: WorkerSlot,
}

impl Balloon {
    /// An empty balloon.
    pub fn new() -> Self {
        Self::default()
    }

    /// Asks the guest to bring the balloon to this many pages of 4 KiB.
    pub fn set_target(&self, pages: u32) {
        let mut state = lock(&self.state);
        state.target_pages = pages;
        if let Some(interrupts) = &state.interrupts {
            interrupts.config_changed();
        }
    }

    /// What was asked for last.
    pub fn target_pages(&self) -> u32 {
        lock(&self.state).target_pages
    }

    /// Whether there is a driver.
    pub fn has_driver(&self) -> bool {
        lock(&self.state).interrupts.is_some()
    }

    /// The pages in the balloon, as the guest last said.
    pub fn actual_pages(&self) -> u32 {
        lock(&self.state).actual_pages
    }

    /// Asks the guest for new statistics; [`Balloon::statistics`] has them when it has answered.
    pub fn request_statistics(&self) {
        lock(&self.state).statistics_wanted = true;
        self.notify(0);
    }

    /// The statistics that the guest sent last.
    pub fn statistics(&self) -> Statistics {
        lock(&self.state).statistics.clone()
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> DeviceType {
        DeviceType::Balloon
    }

    fn features(&self) -> u64 {
        FEATURE_STATISTICS | FEATURE_DEFLATE_ON_OOM | FEATURE_REPORTING
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 4]
    }

    fn config_read(&self, offset: u64, target: &mut [u8]) {
        let state = lock(&self.state);
        let mut config = [0; 8];
        config[..4].copy_from_slice(&state.target_pages.to_le_bytes());
        config[4..].copy_from_slice(&state.actual_pages.to_le_bytes());
        copy_config(&config, offset, target);
    }

    fn config_write(&self, offset: u64, source: &[u8]) {
        if let (4, Ok(bytes)) = (offset, <[u8; 4]>::try_from(source)) {
            lock(&self.state).actual_pages = u32::from_le_bytes(bytes);
        }
    }

    fn activate(&self, mut activation: Activation) -> Result<(), ActivateError> {
        let inflate = activation.take_queue(INFLATE)?;
        let deflate = activation.take_queue(DEFLATE)?;
        let features = activation.features;
        let mut rest = activation.queues.drain(..).skip(2);
        let statistics = if features & FEATURE_STATISTICS != 0 { rest.next().flatten() } else { None };
        let reporting = if features & FEATURE_REPORTING != 0 { rest.next().flatten() } else { None };
        drop(rest);
        let interrupts = activation.interrupts;
        lock(&self.state).interrupts = Some(interrupts.clone());
        let mut queues = Queues {
            memory: activation.memory,
            interrupts,
            state: self.state.clone(),
            inflate,
            deflate,
            statistics,
            reporting,
            held: None,
        };
        let worker = Worker::spawn("virtio-balloon", move |signal| {
            if let Err(error) = queues.work(&signal) {
                tracing::warn!(%error, "a balloon queue is broken");
                queues.interrupts.needs_reset();
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
        let mut state = lock(&self.state);
        state.interrupts = None;
        state.actual_pages = 0;
        state.statistics_wanted = false;
    }
}

struct Queues {
    memory: GuestMemory,
    interrupts: Arc<dyn DeviceInterrupts>,
    state: Arc<Mutex<State>>,
    inflate: Queue,
    deflate: Queue,
    statistics: Option<Queue>,
    reporting: Option<Queue>,
    /// The head of the statistics buffer, which the device keeps until it wants new ones (5.5.6.3).
    held: Option<u16>,
}

impl Queues {
    fn work(&mut self, signal: &Signal) -> Result<(), QueueError> {
        loop {
            let mut more = self.serve_pages(signal)?;
            more |= self.serve_statistics()?;
            more |= self.serve_reports(signal)?;
            if !more && !signal.wait() || signal.is_stopped() {
                return Ok(());
            }
        }
    }

    fn serve_pages(&mut self, signal: &Signal) -> Result<bool, QueueError> {
        while let Some(chain) = self.inflate.pop()? {
            give_back_pages(&self.memory, &chain.readable, signal);
            self.inflate.add_used(chain.head, 0);
        }
        self.inflate.tell(&*self.interrupts);
        // Pages that leave the balloon need nothing: they are zeros until they are written.
        while let Some(chain) = self.deflate.pop()? {
            self.deflate.add_used(chain.head, 0);
        }
        self.deflate.tell(&*self.interrupts);
        Ok(self.inflate.enable_notifications()? | self.deflate.enable_notifications()?)
    }

    fn serve_statistics(&mut self) -> Result<bool, QueueError> {
        let Some(queue) = &mut self.statistics else { return Ok(false) };
        if lock(&self.state).statistics_wanted
            && let Some(head) = self.held.take()
        {
            lock(&self.state).statistics_wanted = false;
            queue.add_used(head, 0);
        }
        while let Some(chain) = queue.pop()? {
            // A driver has one buffer. If it sends another, the older one goes back, so that it may send again.
            if let Some(head) = self.held.replace(chain.head) {
                queue.add_used(head, 0);
            }
            lock(&self.state).statistics = parse_statistics(&chain);
        }
        queue.tell(&*self.interrupts);
        queue.enable_notifications()
    }

    fn serve_reports(&mut self, signal: &Signal) -> Result<bool, QueueError> {
        let Some(queue) = &mut self.reporting else { return Ok(false) };
        while let Some(chain) = queue.pop()? {
            for (start, len) in chain.writable.guest_ranges() {
                if signal.is_stopped() {
                    return Ok(false);
                }
                let first = start.0.next_multiple_of(PAGE_SIZE);
                let end = (start.0 + len) / PAGE_SIZE * PAGE_SIZE;
                punch(&self.memory, first, end.saturating_sub(first));
            }
            queue.add_used(chain.head, 0);
        }
        queue.tell(&*self.interrupts);
        queue.enable_notifications()
    }
}

/// Reads at most [`STATISTICS_MAX`] statistics, however long the buffer is.
fn parse_statistics(chain: &Chain) -> Statistics {
    let mut bytes = [0; STATISTICS_MAX * STATISTIC_LEN];
    let len = (chain.readable.len() as usize).min(bytes.len());
    if chain.readable.read(0, &mut bytes[..len]).is_err() {
        return Statistics::new();
    }
    let entry = |bytes: &[u8; STATISTIC_LEN]| {
        let [a, b, value @ ..] = *bytes;
        (u16::from_le_bytes([a, b]), u64::from_le_bytes(value))
    };
    bytes[..len].as_chunks().0.iter().map(entry).collect()
}

/// Punches holes for an array of 32-bit page numbers. Those outside RAM are ignored: the guest lends what it has not.
fn give_back_pages(memory: &GuestMemory, numbers: &Buffers, signal: &Signal) {
    let mut offset = 0;
    let mut bytes = [0; 4 * BATCH_LEN];
    while offset < numbers.len() && !signal.is_stopped() {
        let len = (numbers.len() - offset).min(bytes.len() as u64) as usize;
        if numbers.read(offset, &mut bytes[..len]).is_err() {
            return;
        }
        offset += len as u64;
        let mut pages: Vec<u64> =
            bytes[..len].as_chunks().0.iter().map(|&number| u64::from(u32::from_le_bytes(number))).collect();
        pages.sort_unstable();
        // Neighbours become one hole: Linux sends 256 page numbers at once, often of one block.
        for run in pages.chunk_by(|&first, &second| second - first <= 1) {
            if let (Some(first), Some(last)) = (run.first(), run.last()) {
                punch(memory, first * PAGE_SIZE, (last - first + 1) * PAGE_SIZE);
            }
        }
    }
}

fn punch(memory: &GuestMemory, start: u64, len: u64) {
    // Where there is no RAM, or the host cannot, the memory just stays.
    if let Err(error) = memory.punch_hole(GuestAddress(start), len) {
        tracing::debug!(%error, "a page range stays with the guest");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::{CONFIG, DATA, Driver, RAM_LEN};
    use polder_machine::AccessSize;

    const ALL: u64 = FEATURE_STATISTICS | FEATURE_DEFLATE_ON_OOM | FEATURE_REPORTING;

    fn host_bytes(driver: &Driver) -> i64 {
        rustix::fs::fstat(driver.memory.file()).unwrap().st_blocks * 512
    }

    fn put_pages(driver: &Driver, address: u64, pages: &[u32]) -> u32 {
        let bytes: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
        driver.put(address, &bytes);
        bytes.len() as u32
    }

    #[test]
    fn inflated_pages_go_back_to_the_host() {
        let mut driver = Driver::ready(Arc::new(Balloon::new()), ALL);
        driver.memory.fill(GuestAddress(0x80_0000), 1, 0x40_0000).unwrap();
        let pages: Vec<u32> = (0x800..0xc00).rev().collect();
        let len = put_pages(&driver, DATA, &pages);
        let before = host_bytes(&driver);
        driver.send(INFLATE, &[(DATA, len, false)]);
        driver.wait_used(INFLATE);
        assert_eq!(before - host_bytes(&driver), 0x40_0000);
        driver.send(DEFLATE, &[(DATA, len, false)]);
        driver.wait_used(DEFLATE);
        assert_eq!(driver.bytes(0x80_0000, 0x1000), vec![0; 0x1000]);
    }

    #[test]
    fn page_numbers_outside_memory_are_ignored() {
        let mut driver = Driver::ready(Arc::new(Balloon::new()), ALL);
        driver.memory.fill(GuestAddress(RAM_LEN - 0x1000), 1, 0x1000).unwrap();
        let last = (RAM_LEN / PAGE_SIZE) as u32 - 1;
        // A run that leaves memory is dropped whole, single pages elsewhere too; an odd tail is no page number.
        let len = put_pages(&driver, DATA, &[u32::MAX, last, last + 1, 0xb0000]) + 3;
        driver.send(INFLATE, &[(DATA, len, false)]);
        driver.wait_used(INFLATE);
        assert_eq!(driver.status(), 0xf);
    }

    #[test]
    fn reported_free_pages_go_back_to_the_host() {
        let mut driver = Driver::ready(Arc::new(Balloon::new()), ALL);
        driver.memory.fill(GuestAddress(0x80_0000), 1, 0x40_0000).unwrap();
        let before = host_bytes(&driver);
        driver.send(3, &[(0x80_0000, 0x20_0000, true), (0xa0_0800, 0x2000, true)]);
        driver.wait_used(3);
        // Of the second range only the whole page inside it.
        assert_eq!(before - host_bytes(&driver), 0x20_1000);
        assert_eq!(driver.bytes(0xa0_0fff, 2), [1, 0]);
    }

    #[test]
    fn oversized_statistics_are_cut_and_stall_nothing() {
        let balloon = Arc::new(Balloon::new());
        let mut driver = Driver::ready(balloon.clone(), ALL);
        let entry: Vec<u8> = [&4u16.to_le_bytes()[..], &77u64.to_le_bytes()].concat();
        driver.put(DATA, &entry.repeat(4096));
        driver.send(2, &[(DATA, 8 << 20, false)]);
        driver.msi.clone().wait_until("statistics", || !balloon.statistics().is_empty());
        assert_eq!(balloon.statistics(), vec![(4, 77); STATISTICS_MAX]);
        let len = put_pages(&driver, DATA, &[0x900]);
        driver.send(INFLATE, &[(DATA, len, false)]);
        driver.wait_used(INFLATE);
        // The buffer is held until new statistics are wanted.
        assert_eq!(driver.take_used(2), None);
        balloon.request_statistics();
        driver.wait_used(2);
        driver.send(2, &[(DATA, 0, false)]);
        driver.msi.clone().wait_until("no statistics", || balloon.statistics().is_empty());
    }

    #[test]
    fn a_new_target_interrupts_and_shows_in_the_configuration() {
        let balloon = Arc::new(Balloon::new());
        let driver = Driver::ready(balloon.clone(), ALL);
        let generation = driver.read(0x15, AccessSize::Byte);
        balloon.set_target(512);
        driver.msi.wait_until("the interrupt", || driver.msi.count(0) == 1);
        assert_eq!(driver.read(CONFIG, AccessSize::Dword), 512);
        assert_ne!(driver.read(0x15, AccessSize::Byte), generation);
        driver.write(CONFIG + 4, AccessSize::Dword, 100);
        driver.write(CONFIG + 4, AccessSize::Word, 7);
        driver.write(CONFIG, AccessSize::Dword, 7);
        assert_eq!(balloon.actual_pages(), 100);
        assert_eq!(driver.read(CONFIG, AccessSize::Qword), 100 << 32 | 512);
    }
}
