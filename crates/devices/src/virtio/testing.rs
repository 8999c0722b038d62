//! A machine with one virtio function, and a small guest driver that writes rings into RAM and pokes registers through the bus.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use polder_machine::layout::{ECAM_LEN, ECAM_START};
use polder_machine::{AccessSize, Bus, MsiMessage, MsiSink};
use polder_memory::{GuestAddress, GuestMemory};

use super::{VirtioDevice, VirtioPciFunction};
use crate::pci::{Ecam, PciBus};
use crate::test_support::RecordingLine;

pub(crate) const RAM_LEN: u64 = 32 << 20;
/// Where tests put their buffers.
pub(crate) const DATA: u64 = 0x10_0000;
const SLOT: u8 = 3;
const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) const COMMON: u64 = 0;
pub(crate) const ISR: u64 = 0x1000;
pub(crate) const CONFIG: u64 = 0x2000;
pub(crate) const NOTIFY: u64 = 0x3000;
pub(crate) const TABLE: u64 = 0x4000;

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

#[derive(Default)]
pub(crate) struct MsiRecorder {
    counts: Mutex<HashMap<u32, u64>>,
    arrived: Condvar,
}

impl MsiSink for MsiRecorder {
    fn send(&self, message: MsiMessage) {
        *self.counts.lock().unwrap().entry(message.data).or_default() += 1;
        self.arrived.notify_all();
    }
}

impl MsiRecorder {
    pub(crate) fn count(&self, data: u32) -> u64 {
        self.counts.lock().unwrap().get(&data).copied().unwrap_or(0)
    }

    /// All messages so far.
    pub(crate) fn total(&self) -> u64 {
        self.counts.lock().unwrap().values().sum()
    }

    /// Waits until a condition holds, looking again after each message.
    pub(crate) fn wait_until(&self, what: &str, mut holds: impl FnMut() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let before = self.total();
            if holds() {
                return;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "timed out waiting for {what}");
            // Some conditions come without a message; those are found at the next look.
            let counts = self.counts.lock().unwrap();
            let look_again = left.min(Duration::from_millis(20));
            let unchanged = |counts: &mut HashMap<u32, u64>| counts.values().sum::<u64>() == before;
            drop(self.arrived.wait_timeout_while(counts, look_again, unchanged).unwrap());
        }
    }
}

/// The driver's end of a queue.
pub(crate) struct DriverQueue {
    pub(crate) index: u16,
    pub(crate) size: u16,
    pub(crate) descriptors: u64,
    pub(crate) available: u64,
    pub(crate) used: u64,
    next_available: u16,
    seen_used: u16,
    next_descriptor: u16,
}

pub(crate) struct Driver {
    pub(crate) bus: Arc<Bus>,
    /// Kept for its slots: the memory bus holds only what is decoded.
    _pci: Arc<PciBus>,
    pub(crate) memory: GuestMemory,
    pub(crate) msi: Arc<MsiRecorder>,
    pub(crate) line: Arc<RecordingLine>,
    pub(crate) bar: u64,
    pub(crate) queues: Vec<DriverQueue>,
    features: u64,
}

impl Driver {
    /// A machine whose slot 3 holds the device, decoded and with bus mastering on, otherwise untouched.
    pub(crate) fn new(device: Arc<dyn VirtioDevice>) -> Self {
        let memory = GuestMemory::new(&[(GuestAddress(0), RAM_LEN), (GuestAddress(1 << 32), 1 << 20)]).unwrap();
        let bus = Arc::new(Bus::new());
        let line = Arc::new(RecordingLine::default());
        // Slot 3 uses the last of the four wires.
        let pci = PciBus::new(&bus, [Arc::new(()), Arc::new(()), Arc::new(()), line.clone()]);
        let msi = Arc::new(MsiRecorder::default());
        let function = VirtioPciFunction::new(device, memory.clone(), msi.clone(), pci.interrupt_line(SLOT));
        pci.add(SLOT, function).unwrap();
        bus.insert(ECAM_START, ECAM_LEN, Arc::new(Ecam(pci.clone()))).unwrap();
        let mut driver = Driver { bus, _pci: pci, memory, msi, line, bar: 0, queues: Vec::new(), features: 0 };
        driver.set_config(0x04, AccessSize::Word, 0x6);
        driver.bar = driver.config(0x10, AccessSize::Dword) & !0xf | driver.config(0x14, AccessSize::Dword) << 32;
        driver
    }

    /// The same, with the driver's initialisation done and every queue set up.
    pub(crate) fn ready(device: Arc<dyn VirtioDevice>, features: u64) -> Self {
        let mut driver = Self::new(device);
        driver.initialise(features);
        driver
    }

    pub(crate) fn config(&self, offset: u64, size: AccessSize) -> u64 {
        self.bus.read(ECAM_START + (u64::from(SLOT) << 15) + offset, size)
    }

    pub(crate) fn set_config(&self, offset: u64, size: AccessSize, value: u64) {
        self.bus.write(ECAM_START + (u64::from(SLOT) << 15) + offset, size, value);
    }

    pub(crate) fn read(&self, offset: u64, size: AccessSize) -> u64 {
        self.bus.read(self.bar + offset, size)
    }

    pub(crate) fn write(&self, offset: u64, size: AccessSize, value: u64) {
        self.bus.write(self.bar + offset, size, value);
    }

    pub(crate) fn status(&self) -> u64 {
        self.read(COMMON + 0x14, AccessSize::Byte)
    }

    pub(crate) fn set_status(&self, status: u64) {
        self.write(COMMON + 0x14, AccessSize::Byte, status);
    }

    /// Finds a capability by its id, the nth of that id.
    pub(crate) fn capability(&self, id: u64, nth: usize) -> u64 {
        let mut at = self.config(0x34, AccessSize::Byte);
        let mut seen = 0;
        while at != 0 {
            if self.config(at, AccessSize::Byte) == id {
                if seen == nth {
                    return at;
                }
                seen += 1;
            }
            at = self.config(at + 1, AccessSize::Byte);
        }
        panic!("no capability {id:#x}");
    }

    /// Turns MSI-X on with every vector sending its own number as data.
    pub(crate) fn enable_msix(&self) {
        let capability = self.capability(0x11, 0);
        let vectors = (self.config(capability + 2, AccessSize::Word) & 0x7ff) + 1;
        for vector in 0..vectors {
            self.write(TABLE + 16 * vector, AccessSize::Qword, 0xfee0_0000);
            self.write(TABLE + 16 * vector + 8, AccessSize::Qword, vector);
        }
        self.set_config(capability + 2, AccessSize::Word, 0x8000);
    }

    pub(crate) fn negotiate(&self, features: u64) {
        self.set_status(0);
        self.set_status(1);
        self.set_status(3);
        for (select, half) in [(0, features & 0xffff_ffff), (1, features >> 32 | 1)] {
            self.write(COMMON + 0x08, AccessSize::Dword, select);
            self.write(COMMON + 0x0c, AccessSize::Dword, half);
        }
        self.set_status(0xb);
    }

    pub(crate) fn offered(&self) -> u64 {
        let half = |select| {
            self.write(COMMON, AccessSize::Dword, select);
            self.read(COMMON + 4, AccessSize::Dword)
        };
        half(0) | half(1) << 32
    }

    /// Writes the registers of one queue and enables it.
    pub(crate) fn set_up_queue(&self, queue: &DriverQueue) {
        self.write(COMMON + 0x16, AccessSize::Word, queue.index.into());
        self.write(COMMON + 0x18, AccessSize::Word, queue.size.into());
        self.write(COMMON + 0x1a, AccessSize::Word, u64::from(queue.index) + 1);
        for (offset, address) in [(0x20, queue.descriptors), (0x28, queue.available), (0x30, queue.used)] {
            self.write(COMMON + offset, AccessSize::Dword, address & 0xffff_ffff);
            self.write(COMMON + offset + 4, AccessSize::Dword, address >> 32);
        }
        self.write(COMMON + 0x1c, AccessSize::Word, 1);
    }

    /// Lays out a queue for each that the device has, in clean memory.
    pub(crate) fn lay_out_queues(&mut self) {
        let count = self.read(COMMON + 0x12, AccessSize::Word) as u16;
        self.queues = (0..count)
            .map(|index| {
                self.write(COMMON + 0x16, AccessSize::Word, index.into());
                let size = self.read(COMMON + 0x18, AccessSize::Word) as u16;
                let start = 0x1_0000 + 0x8000 * u64::from(index);
                self.memory.fill(GuestAddress(start), 0, 0x8000).unwrap();
                DriverQueue {
                    index,
                    size,
                    descriptors: start,
                    available: start + 0x4000,
                    used: start + 0x5000,
                    next_available: 0,
                    seen_used: 0,
                    next_descriptor: 0,
                }
            })
            .collect();
    }

    pub(crate) fn initialise(&mut self, features: u64) {
        self.enable_msix();
        self.features = features;
        self.negotiate(features);
        assert_eq!(self.status() & 8, 8, "the device took the features");
        self.write(COMMON + 0x10, AccessSize::Word, 0);
        self.lay_out_queues();
        for queue in &self.queues {
            self.set_up_queue(queue);
        }
        self.set_status(0xf);
    }

    pub(crate) fn put_descriptor(&self, table: u64, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[0..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..16].copy_from_slice(&next.to_le_bytes());
        self.memory.write(GuestAddress(table + 16 * u64::from(index)), &bytes).unwrap();
    }

    /// Makes a head available without ringing.
    pub(crate) fn offer(&mut self, queue: u16, head: u16) {
        let queue = &mut self.queues[queue as usize];
        let slot = u64::from(queue.next_available % queue.size);
        self.memory.store_u16(GuestAddress(queue.available + 4 + 2 * slot), head).unwrap();
        queue.next_available = queue.next_available.wrapping_add(1);
        self.memory.store_u16(GuestAddress(queue.available + 2), queue.next_available).unwrap();
    }

    pub(crate) fn ring(&self, queue: u16) {
        self.write(NOTIFY + 4 * u64::from(queue), AccessSize::Word, queue.into());
    }

    /// Writes a chain of (address, len, writable) and makes it available without ringing; its head.
    pub(crate) fn add_chain(&mut self, queue: u16, parts: &[(u64, u32, bool)]) -> u16 {
        let (table, size, first) = {
            let queue = &mut self.queues[queue as usize];
            let first = queue.next_descriptor;
            queue.next_descriptor = (first + parts.len() as u16) % queue.size;
            (queue.descriptors, queue.size, first)
        };
        for (position, &(address, len, writable)) in parts.iter().enumerate() {
            let index = (first + position as u16) % size;
            let more = position + 1 < parts.len();
            let flags = if writable { WRITE } else { 0 } | if more { NEXT } else { 0 };
            self.put_descriptor(table, index, address, len, flags, (index + 1) % size);
        }
        self.offer(queue, first);
        first
    }

    /// Sends a chain, and rings only if the device wants to hear of it, as Linux does.
    pub(crate) fn send(&mut self, queue: u16, parts: &[(u64, u32, bool)]) -> u16 {
        let head = self.add_chain(queue, parts);
        let place = &self.queues[queue as usize];
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        let wanted = if self.features & super::FEATURE_EVENT_INDEX != 0 {
            let event = self.memory.load_u16(GuestAddress(place.used + 4 + 8 * u64::from(place.size))).unwrap();
            event == place.next_available.wrapping_sub(1)
        } else {
            self.memory.load_u16(GuestAddress(place.used)).unwrap() & 1 == 0
        };
        if wanted {
            self.ring(queue);
        }
        head
    }

    /// The next used entry, if there is one: (head, written).
    pub(crate) fn take_used(&mut self, queue: u16) -> Option<(u16, u32)> {
        let queue = &mut self.queues[queue as usize];
        let used_index = self.memory.load_u16(GuestAddress(queue.used + 2)).unwrap();
        if used_index == queue.seen_used {
            return None;
        }
        let slot = u64::from(queue.seen_used % queue.size);
        let entry = self.memory.load_u64(GuestAddress(queue.used + 4 + 8 * slot)).unwrap();
        queue.seen_used = queue.seen_used.wrapping_add(1);
        Some((entry as u16, (entry >> 32) as u32))
    }

    /// Waits for the next used entry.
    pub(crate) fn wait_used(&mut self, queue: u16) -> (u16, u32) {
        let msi = self.msi.clone();
        let mut entry = None;
        msi.wait_until("a used entry", || {
            // With event indices the device interrupts for the entry that we name.
            let event = self.queues[queue as usize].seen_used;
            let place = &self.queues[queue as usize];
            let address = GuestAddress(place.available + 4 + 2 * u64::from(place.size));
            self.memory.store_u16(address, event).unwrap();
            std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
            entry = self.take_used(queue);
            entry.is_some()
        });
        entry.unwrap()
    }

    pub(crate) fn wait_needs_reset(&self) {
        self.msi.wait_until("DEVICE_NEEDS_RESET", || self.status() & 64 != 0);
    }

    pub(crate) fn bytes(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.read(GuestAddress(address), &mut bytes).unwrap();
        bytes
    }

    pub(crate) fn put(&self, address: u64, bytes: &[u8]) {
        self.memory.write(GuestAddress(address), bytes).unwrap();
    }
}
