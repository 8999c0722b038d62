//! The transport as good, bad and hostile drivers use it.

use std::sync::{Arc, Condvar, Mutex};

use polder_machine::AccessSize::{self, Byte, Dword, Qword, Word};
use polder_memory::GuestAddress;
use proptest::prelude::*;

use super::testing::{COMMON, CONFIG, DATA, Driver, ISR, NOTIFY, RAM_LEN, TABLE};
use super::{ActivateError, Activation, DeviceType, Queue, VirtioDevice, copy_config};
use super::{DeviceInterrupts, FEATURE_EVENT_INDEX, FEATURE_INDIRECT, FEATURE_VERSION_1};
use crate::lock;

#[derive(Default)]
struct Seen {
    activations: usize,
    resets: usize,
    doorbells: Vec<u16>,
    queues: Vec<Option<Queue>>,
    interrupts: Option<Arc<dyn DeviceInterrupts>>,
    config: [u8; 8],
}

/// A device that only remembers what the transport did to it. Its reset waits until it may.
struct Probe {
    seen: Mutex<Seen>,
    held: Mutex<bool>,
    released: Condvar,
}

impl Probe {
    fn new() -> Arc<Self> {
        Arc::new(Probe { seen: Mutex::default(), held: Mutex::new(false), released: Condvar::new() })
    }

    /// Activations and resets.
    fn counts(&self) -> (usize, usize) {
        let seen = lock(&self.seen);
        (seen.activations, seen.resets)
    }

    fn interrupts(&self) -> Arc<dyn DeviceInterrupts> {
        lock(&self.seen).interrupts.clone().unwrap()
    }
}

impl VirtioDevice for Probe {
    fn device_type(&self) -> DeviceType {
        DeviceType::Console
    }

    fn features(&self) -> u64 {
        1 << 5
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![64, 128, 256]
    }

    fn config_read(&self, offset: u64, target: &mut [u8]) {
        copy_config(&lock(&self.seen).config, offset, target);
    }

    fn config_write(&self, offset: u64, source: &[u8]) {
        let config = &mut lock(&self.seen).config;
        for (at, byte) in (offset..).zip(source) {
            if let Some(place) = config.get_mut(at as usize) {
                *place = *byte;
            }
        }
    }

    fn activate(&self, activation: Activation) -> Result<(), ActivateError> {
        let mut seen = lock(&self.seen);
        seen.activations += 1;
        seen.queues = activation.queues;
        seen.interrupts = Some(activation.interrupts);
        Ok(())
    }

    fn notify(&self, queue: u16) {
        lock(&self.seen).doorbells.push(queue);
    }

    fn reset(&self) {
        let held = lock(&self.held);
        drop(self.released.wait_while(held, |held| *held).unwrap());
        let mut seen = lock(&self.seen);
        seen.resets += 1;
        seen.queues.clear();
    }
}

#[test]
fn a_driver_that_follows_the_specification_gets_a_running_device() {
    let probe = Probe::new();
    let driver = Driver::ready(probe.clone(), FEATURE_EVENT_INDEX);
    assert_eq!(driver.status(), 0xf);
    let offered = FEATURE_VERSION_1 | FEATURE_EVENT_INDEX | FEATURE_INDIRECT | 1 << 5;
    assert_eq!(driver.offered(), offered);
    assert_eq!(probe.counts(), (1, 0));
    let seen = lock(&probe.seen);
    assert_eq!(seen.queues.iter().flatten().map(Queue::size).collect::<Vec<_>>(), [64, 128, 256]);
}

#[test]
fn features_that_were_not_offered_are_refused() {
    for wrong in [1 << 6, 1 << 40, 1 << 63] {
        let driver = Driver::new(Probe::new());
        driver.negotiate(wrong);
        assert_eq!(driver.status(), 3, "{wrong:#x}");
    }
    // A bit beyond the 64 that exist, and a driver without VERSION_1.
    let driver = Driver::new(Probe::new());
    driver.set_status(3);
    driver.set_status(0xb);
    assert_eq!(driver.status(), 3);
    driver.write(COMMON + 0x08, Dword, 7);
    driver.write(COMMON + 0x0c, Dword, 1);
    driver.write(COMMON + 0x08, Dword, 1);
    driver.write(COMMON + 0x0c, Dword, 1);
    driver.set_status(0xb);
    assert_eq!(driver.status(), 3);
}

#[test]
fn a_driver_is_not_ready_before_features_are_settled() {
    let probe = Probe::new();
    let driver = Driver::new(probe.clone());
    driver.set_status(7);
    assert_eq!(driver.status(), 3);
    assert_eq!(lock(&probe.seen).activations, 0);
}

#[test]
fn a_device_initialised_twice_is_activated_once_for_each_reset() {
    let probe = Probe::new();
    let mut driver = Driver::ready(probe.clone(), 0);
    // DRIVER_OK again, with queues rewritten and enabled again in between.
    for queue in &driver.queues {
        driver.set_up_queue(queue);
    }
    driver.set_status(0xf);
    driver.set_status(4);
    assert_eq!(lock(&probe.seen).activations, 1);
    assert_eq!(driver.status(), 0xf);
    driver.initialise(0);
    assert_eq!(probe.counts(), (2, 1));
    assert_eq!(driver.status(), 0xf);
}

#[test]
fn an_enabled_queue_keeps_its_place_whatever_is_written_in_whatever_order() {
    let probe = Probe::new();
    let mut driver = Driver::new(probe.clone());
    driver.negotiate(0);
    driver.lay_out_queues();
    for queue in driver.queues.iter().rev() {
        driver.set_up_queue(queue);
        for (offset, size) in [(0x18, Word), (0x20, Dword), (0x24, Dword), (0x28, Qword), (0x30, Dword), (0x1c, Word)] {
            driver.write(COMMON + offset, size, 0);
        }
        assert_eq!(driver.read(COMMON + 0x18, Word), u64::from(queue.size));
        assert_eq!(driver.read(COMMON + 0x1c, Word), 1);
        assert_eq!(driver.read(COMMON + 0x20, Qword), queue.descriptors);
        assert_eq!(driver.read(COMMON + 0x28, Qword), queue.available);
        assert_eq!(driver.read(COMMON + 0x34, Dword) << 32 | driver.read(COMMON + 0x30, Dword), queue.used);
    }
    driver.set_status(0xf);
    assert_eq!(lock(&probe.seen).activations, 1);
}

#[test]
fn queues_outside_memory_or_of_wrong_size_make_the_device_ask_for_a_reset() {
    for (size, descriptors, available, used) in [
        (64, RAM_LEN, 0x4000, 0x8000),
        (64, 0x1000, u64::MAX - 1, 0x8000),
        (64, 0x1000, 0x4000, RAM_LEN - 8),
        (64, 0x1008, 0x4000, 0x8000),
        (63, 0x1000, 0x4000, 0x8000),
        (128, 0x1000, 0x4000, 0x8000),
        (0, 0x1000, 0x4000, 0x8000),
    ] {
        let probe = Probe::new();
        let mut driver = Driver::new(probe.clone());
        driver.enable_msix();
        driver.negotiate(0);
        driver.write(COMMON + 0x10, Word, 0);
        driver.lay_out_queues();
        let mut queue = driver.queues.remove(0);
        (queue.size, queue.descriptors, queue.available, queue.used) = (size, descriptors, available, used);
        driver.set_up_queue(&queue);
        driver.set_status(0xf);
        assert_eq!(driver.status(), 0x4f);
        assert_eq!(lock(&probe.seen).activations, 0);
        // The driver hears of it, and can start over.
        assert_eq!(driver.msi.count(0), 1);
        driver.initialise(0);
        assert_eq!(driver.status(), 0xf);
    }
}

#[test]
fn a_queue_that_does_not_exist_reads_zero_and_takes_nothing() {
    let driver = Driver::new(Probe::new());
    driver.negotiate(0);
    for select in [3, 4, 0x7fff, 0xffff] {
        driver.write(COMMON + 0x16, Word, select);
        for offset in [0x18, 0x1c, 0x20, 0x28, 0x30] {
            driver.write(COMMON + offset, if offset < 0x20 { Word } else { Qword }, 1);
        }
        driver.write(COMMON + 0x1a, Word, 0);
        assert_eq!(driver.read(COMMON + 0x16, Word), select);
        for offset in [0x18, 0x1c, 0x1e, 0x20, 0x28, 0x30] {
            assert_eq!(driver.read(COMMON + offset, Word), 0, "register {offset:#x} of queue {select}");
        }
        assert_eq!(driver.read(COMMON + 0x1a, Word), 0xffff);
    }
}

#[test]
fn a_vector_that_does_not_exist_reads_back_as_none() {
    let driver = Driver::new(Probe::new());
    driver.write(COMMON + 0x10, Word, 4);
    assert_eq!(driver.read(COMMON + 0x10, Word), 0xffff);
    driver.write(COMMON + 0x10, Word, 3);
    assert_eq!(driver.read(COMMON + 0x10, Word), 3);
    driver.write(COMMON + 0x1a, Word, 4);
    assert_eq!(driver.read(COMMON + 0x1a, Word), 0xffff);
}

#[test]
fn writes_that_are_not_one_register_are_dropped() {
    let driver = Driver::new(Probe::new());
    driver.write(COMMON + 0x16, Word, 2);
    for (offset, size) in [(0x16, Byte), (0x15, Word), (0x14, Dword), (0x16, Dword), (0x10, Qword), (0x17, Qword)] {
        driver.write(COMMON + offset, size, size.all_ones());
    }
    assert_eq!(driver.read(COMMON + 0x16, Word), 2);
    assert_eq!(driver.status(), 0);
    assert_eq!(driver.read(COMMON + 0x17, Dword), driver.read(COMMON + 0x14, Qword) >> 24 & 0xffff_ffff);
    assert_eq!(driver.read(COMMON + 0x3c, Qword), 0);
    assert_eq!(driver.read(COMMON + 0xfff, Dword), 0);
}

#[test]
fn a_slow_reset_shows_in_the_status_until_it_is_done() {
    let probe = Probe::new();
    let mut driver = Driver::ready(probe.clone(), 0);
    *lock(&probe.held) = true;
    driver.set_status(0);
    assert_eq!(driver.status(), 0xf);
    // Nothing counts meanwhile, not even a second reset.
    driver.ring(0);
    driver.set_status(0);
    driver.set_status(0xf);
    driver.write(COMMON + 0x16, Word, 1);
    assert!(lock(&probe.seen).doorbells.is_empty());
    *lock(&probe.held) = false;
    probe.released.notify_all();
    driver.msi.wait_until("the reset", || driver.status() == 0);
    assert_eq!(lock(&probe.seen).resets, 1);
    assert_eq!(driver.read(COMMON + 0x16, Word), 0);
    driver.initialise(0);
    assert_eq!(lock(&probe.seen).activations, 2);
}

#[test]
fn doorbells_reach_the_device_only_for_its_queues_and_while_it_runs() {
    let probe = Probe::new();
    let mut driver = Driver::new(probe.clone());
    driver.ring(0);
    driver.initialise(0);
    for queue in [2, 3, 1023] {
        driver.ring(queue);
    }
    driver.write(NOTIFY + 4, Dword, 77);
    driver.set_status(0);
    driver.ring(1);
    assert_eq!(lock(&probe.seen).doorbells, [2, 1]);
}

#[test]
fn without_msix_the_wire_and_the_isr_register_are_used() {
    let probe = Probe::new();
    let mut driver = Driver::new(probe.clone());
    driver.negotiate(0);
    driver.lay_out_queues();
    for queue in &driver.queues {
        driver.set_up_queue(queue);
    }
    driver.set_status(0xf);
    let interrupts = probe.interrupts();
    assert_eq!((driver.config(0x3d, Byte), driver.config(0x3c, Byte)), (1, 19));
    interrupts.queue_used(1);
    assert!(driver.line.level());
    assert_eq!(driver.config(0x06, Word) & 8, 8);
    interrupts.config_changed();
    assert_eq!(driver.read(ISR, Byte), 3);
    assert!(!driver.line.level());
    assert_eq!((driver.read(ISR, Byte), driver.config(0x06, Word) & 8), (0, 0));
    // The command register's disable bit holds the wire down; MSI-X takes over from it.
    driver.set_config(0x04, Word, 0x406);
    interrupts.queue_used(0);
    assert!(!driver.line.level());
    driver.set_config(0x04, Word, 0x6);
    assert!(driver.line.level());
    driver.enable_msix();
    assert!(!driver.line.level());
    driver.set_status(0);
    assert_eq!(driver.read(ISR, Byte), 0);
    interrupts.queue_used(0);
    assert!(!driver.line.level());
}

#[test]
fn interrupts_use_the_vectors_of_their_queues() {
    let probe = Probe::new();
    let driver = Driver::ready(probe.clone(), 0);
    let interrupts = probe.interrupts();
    interrupts.queue_used(2);
    interrupts.config_changed();
    assert_eq!((driver.msi.count(0), driver.msi.count(3)), (1, 1));
    // A vector that is taken away, and one that is masked.
    driver.write(COMMON + 0x16, Word, 2);
    driver.write(COMMON + 0x1a, Word, 0xffff);
    interrupts.queue_used(2);
    driver.write(TABLE + 16 + 12, Dword, 1);
    interrupts.queue_used(0);
    assert_eq!((driver.msi.count(1), driver.msi.count(3)), (0, 1));
    assert_eq!(driver.read(TABLE + 0x800, Byte), 2);
    driver.write(TABLE + 16 + 12, Dword, 0);
    assert_eq!(driver.msi.count(1), 1);
}

#[test]
fn the_structures_are_where_the_capabilities_say() {
    let driver = Driver::new(Probe::new());
    let starts: Vec<(u64, u64)> = (0..5)
        .map(|nth| {
            let at = driver.capability(0x09, nth);
            (driver.config(at + 3, Byte), driver.config(at + 8, Dword))
        })
        .collect();
    assert_eq!(starts, [(1, COMMON), (3, ISR), (4, CONFIG), (2, NOTIFY), (5, 0)]);
    assert_eq!(driver.config(driver.capability(0x09, 3) + 16, Dword), 4);
    assert_eq!(driver.config(driver.capability(0x10, 0) + 2, Word) >> 4, 9);
    assert_eq!(driver.config(0x00, Dword), 0x1043_1af4);
}

#[test]
fn the_configuration_access_capability_reaches_the_registers() {
    let driver = Driver::new(Probe::new());
    let at = driver.capability(0x09, 4);
    let aim = |offset: u64, len: u64| {
        driver.set_config(at + 8, Dword, offset);
        driver.set_config(at + 12, Dword, len);
    };
    aim(COMMON + 0x14, 1);
    driver.set_config(at + 16, Byte, 3);
    assert_eq!(driver.status(), 3);
    assert_eq!(driver.config(at + 16, Byte), 3);
    aim(COMMON + 0x12, 2);
    assert_eq!(driver.config(at + 16, Dword), 3);
    // Nonsense reaches nothing.
    for (offset, len) in
        [(0x14, 3), (0x14, 8), (0x14, 0), (u64::from(u32::MAX), 1), (0x7fff, 4), (0x8000, 4), (0x15, 2)]
    {
        aim(offset, len);
        driver.set_config(at + 16, Dword, 0);
        driver.config(at + 16, Dword);
    }
    assert_eq!(driver.status(), 3);
    driver.set_config(at + 4, Byte, 1);
    aim(COMMON + 0x14, 1);
    driver.set_config(at + 16, Byte, 0);
    assert_eq!(driver.status(), 3);
}

#[test]
fn the_device_configuration_is_written_only_after_features() {
    let probe = Probe::new();
    let driver = Driver::new(probe.clone());
    driver.write(CONFIG, Dword, 0x55);
    assert_eq!(driver.read(CONFIG, Dword), 0);
    driver.negotiate(0);
    driver.write(CONFIG + 6, Dword, 0x0403_0201);
    assert_eq!(driver.read(CONFIG, Qword), 0x0201_0000_0000_0000);
    assert_eq!(driver.read(CONFIG + 7, Dword), 2);
    assert_eq!(driver.read(CONFIG + 0xfff, Dword), 0);
}

fn access() -> impl Strategy<Value = (bool, u64, AccessSize, u64)> {
    let bar = prop_oneof![
        0..0x40u64,
        Just(0x14u64),
        0x1000..0x1004u64,
        0x2000..0x2010u64,
        0x3000..0x3010u64,
        0x4000..0x4040u64,
        0x47f8..0x4810u64,
        0..0x8000u64
    ];
    let config = prop_oneof![0..0x100u64, 0x40..0xd0u64, 0..0x1000u64];
    let value = prop_oneof![0..16u64, any::<u64>(), Just(DATA), Just(0xffff_ffff)];
    let size = prop::sample::select(vec![Byte, Word, Dword, Qword]);
    (any::<bool>(), bar, config, size, value)
        .prop_map(|(in_bar, bar, config, size, value)| (in_bar, if in_bar { bar } else { config }, size, value))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]
    #[test]
    fn after_any_register_accesses_the_device_can_be_initialised(
        accesses in prop::collection::vec(access(), 1..200),
    ) {
        let probe = Probe::new();
        let mut driver = Driver::new(probe);
        let bar = driver.bar;
        for (in_bar, offset, size, value) in accesses {
            if in_bar {
                driver.read(offset, size);
                driver.write(offset, size, value & size.all_ones());
            } else {
                driver.config(offset, size);
                driver.set_config(offset, size, value & size.all_ones());
            }
        }
        driver.set_config(0x04, Word, 0);
        driver.set_config(0x10, Dword, bar);
        driver.set_config(0x14, Dword, bar >> 32);
        driver.set_config(0x04, Word, 6);
        driver.set_status(0);
        driver.msi.wait_until("the reset", || driver.status() == 0);
        driver.initialise(0);
        prop_assert_eq!(driver.status(), 0xf);
        prop_assert_eq!(driver.bytes(GuestAddress(DATA).0, 64), vec![0; 64]);
    }
}
