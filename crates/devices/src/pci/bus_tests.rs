//! The root bus as a guest sees it.

use std::sync::{Arc, Mutex};

use polder_machine::AccessSize::{self, Byte, Dword, Qword, Word};
use polder_machine::layout::{
    ECAM_LEN, ECAM_START, PCI_CONFIG_PORT, PCI_MMIO32_LEN, PCI_MMIO32_START, PCI_MMIO64_START,
};
use polder_machine::{Bus, BusDevice};
use proptest::prelude::*;

use super::*;
use crate::lock;

/// A function with one BAR whose registers all read as its number.
struct Probe {
    number: u64,
    config: Mutex<ConfigSpace>,
}

impl Probe {
    fn new(number: u64, kind: BarKind, len: u64) -> Arc<Self> {
        let identity = Identity {
            vendor: 0x1234,
            device: number as u16,
            revision: 0,
            class: [0xff, 0, 0],
            subsystem_vendor: 0,
            subsystem: 0,
        };
        let mut config = ConfigSpace::new(&identity);
        config.add_bar(0, kind, len);
        Arc::new(Probe { number, config: Mutex::new(config) })
    }
}

impl PciFunction for Probe {
    fn config_read(&self, offset: u16, size: AccessSize) -> u32 {
        lock(&self.config).read(offset, size)
    }

    fn config_write(&self, offset: u16, size: AccessSize, value: u32) {
        lock(&self.config).write(offset, size, value);
    }

    fn bars(&self) -> Vec<BarPlace> {
        lock(&self.config).bars()
    }

    fn decodes_memory(&self) -> bool {
        lock(&self.config).command() & COMMAND_MEMORY != 0
    }

    fn place_bar(&self, index: u8, address: u64) {
        lock(&self.config).place_bar(index, address);
    }

    fn set_interrupt_line(&self, line: u8) {
        lock(&self.config).set_interrupt(1, line);
    }

    fn bar_read(&self, _index: u8, _offset: u64, _size: AccessSize) -> u64 {
        self.number
    }

    fn bar_write(&self, _index: u8, _offset: u64, _size: AccessSize, _value: u64) {}
}

/// Port 0xcf9.
#[derive(Default)]
struct Reset(Mutex<Vec<u64>>);

impl BusDevice for Reset {
    fn read(&self, offset: u64, size: AccessSize) -> u64 {
        assert_eq!((offset, size), (0, Byte));
        0x0e
    }

    fn write(&self, offset: u64, size: AccessSize, value: u64) {
        assert_eq!((offset, size), (0, Byte));
        lock(&self.0).push(value);
    }
}

struct Machine {
    memory_bus: Arc<Bus>,
    ports: Bus,
    reset: Arc<Reset>,
    pci: Arc<PciBus>,
}

/// Slots 1 and 2 have a 32-bit BAR of 4 KiB, slot 3 has a 64-bit one of 16 MiB.
fn machine() -> Machine {
    let memory_bus = Arc::new(Bus::new());
    let pci = PciBus::new(&memory_bus, [Arc::new(()), Arc::new(()), Arc::new(()), Arc::new(())]);
    pci.add(1, Probe::new(1, BarKind::Memory32, 0x1000)).unwrap();
    pci.add(2, Probe::new(2, BarKind::Memory32, 0x1000)).unwrap();
    pci.add(3, Probe::new(3, BarKind::Memory64, 1 << 24)).unwrap();
    memory_bus.insert(ECAM_START, ECAM_LEN, Arc::new(Ecam(pci.clone()))).unwrap();
    let (ports, reset) = (Bus::new(), Arc::new(Reset::default()));
    ports.insert(PCI_CONFIG_PORT, 8, Arc::new(ConfigPorts::new(pci.clone(), reset.clone()))).unwrap();
    Machine { memory_bus, ports, reset, pci }
}

impl Machine {
    fn set(&self, slot: u64, offset: u64, size: AccessSize, value: u64) {
        self.memory_bus.write(ECAM_START + (slot << 15) + offset, size, value);
    }

    fn get(&self, slot: u64, offset: u64, size: AccessSize) -> u64 {
        self.memory_bus.read(ECAM_START + (slot << 15) + offset, size)
    }

    fn at(&self, address: u64) -> u64 {
        self.memory_bus.read(address, Dword)
    }
}

const NOBODY: u64 = 0xffff_ffff;

#[test]
fn bars_answer_only_while_memory_is_decoded() {
    let machine = machine();
    let first = machine.get(1, 0x10, Dword);
    assert_eq!(first, PCI_MMIO32_START);
    assert_eq!(machine.at(first), NOBODY);
    machine.set(1, 4, Word, 2);
    assert_eq!(machine.at(first), 1);
    machine.set(1, 4, Word, 0);
    assert_eq!(machine.at(first), NOBODY);
    // Large 64-bit BARs start in the high window.
    assert_eq!(machine.get(3, 0x10, Qword), PCI_MMIO64_START | 4);
    machine.set(3, 4, Byte, 2);
    assert_eq!(machine.at(PCI_MMIO64_START + (1 << 24) - 4), 3);
}

#[test]
fn a_moved_bar_answers_at_its_new_place_only() {
    let machine = machine();
    machine.set(1, 4, Word, 2);
    machine.set(1, 0x10, Dword, PCI_MMIO32_START + 0x10_0000);
    assert_eq!(machine.at(PCI_MMIO32_START), NOBODY);
    assert_eq!(machine.at(PCI_MMIO32_START + 0x10_0ffc), 1);
    machine.set(3, 4, Word, 2);
    machine.set(3, 0x14, Dword, 0);
    machine.set(3, 0x10, Dword, PCI_MMIO32_START + 0x100_0000);
    assert_eq!(machine.at(PCI_MMIO32_START + 0x100_0000), 3);
    assert_eq!(machine.at(PCI_MMIO64_START), NOBODY);
}

#[test]
fn a_bar_moved_out_of_the_windows_is_claimed_nowhere() {
    let machine = machine();
    machine.set(1, 4, Word, 2);
    let end = PCI_MMIO32_START + PCI_MMIO32_LEN;
    for address in [0, 0x1000, ECAM_START, ECAM_START - 0x1000, end, 0xfee0_0000, 0xffff_f000] {
        machine.set(1, 0x10, Dword, address);
        assert_ne!(machine.at(address + 0x100), 1, "{address:#x}");
    }
    assert_eq!(machine.get(1, 0, Word), 0x1234);
    machine.set(1, 0x10, Dword, end - 0x1000);
    assert_eq!(machine.at(end - 4), 1);
    machine.set(3, 4, Word, 2);
    machine.set(3, 0x14, Dword, 0xffff_ffff);
    machine.set(3, 0x10, Dword, 0xffff_ffff);
    assert_eq!(machine.at(u64::MAX - 3), NOBODY);
}

#[test]
fn a_bar_on_top_of_another_waits_until_that_one_has_moved() {
    let machine = machine();
    machine.set(1, 4, Word, 2);
    machine.set(2, 4, Word, 2);
    machine.set(2, 0x10, Dword, PCI_MMIO32_START);
    assert_eq!(machine.at(PCI_MMIO32_START), 1);
    machine.set(1, 0x10, Dword, PCI_MMIO32_START + 0x8000);
    assert_eq!((machine.at(PCI_MMIO32_START), machine.at(PCI_MMIO32_START + 0x8000)), (2, 1));
}

#[test]
fn absent_functions_read_as_ones() {
    let machine = machine();
    for (slot, function) in [(4, 0), (31, 0), (1, 1), (1, 7), (0, 1)] {
        assert_eq!(machine.get(slot, function << 12, Dword), NOBODY, "{slot}.{function}");
        machine.set(slot, function << 12, Dword, 0);
    }
    assert_eq!(machine.get(0, 0x0a, Word), 0x0600);
    // Bus 1 does not exist in ECAM.
    assert_eq!(machine.memory_bus.read(ECAM_START + ECAM_LEN, Dword), NOBODY);
    assert_eq!(machine.pci.add(0, Probe::new(9, BarKind::Memory32, 16)), Err(PciError::Slot { slot: 0 }));
    assert_eq!(machine.pci.add(32, Probe::new(9, BarKind::Memory32, 16)), Err(PciError::Slot { slot: 32 }));
    let len = 1 << 31;
    assert_eq!(machine.pci.add(9, Probe::new(9, BarKind::Memory32, len)), Err(PciError::NoRoom { len }));
}

#[test]
fn ports_and_ecam_show_the_same_space() {
    let machine = machine();
    let (ports, address, data) = (&machine.ports, PCI_CONFIG_PORT, PCI_CONFIG_PORT + 4);
    ports.write(address, Dword, 0x8000_0000 | 2 << 11 | 0x10);
    assert_eq!(ports.read(address, Dword), 0x8000_1010);
    assert_eq!(ports.read(data, Dword), machine.get(2, 0x10, Dword));
    assert_eq!(ports.read(data + 1, Byte), machine.get(2, 0x11, Byte));
    assert_eq!(ports.read(data + 2, Word), machine.get(2, 0x12, Word));
    assert_eq!(ports.read(data + 1, Word), machine.get(2, 0x11, Word));
    ports.write(data + 2, Word, 0xc123);
    assert_eq!(machine.get(2, 0x10, Dword), 0xc123_1000);
    // Not enabled, another bus, another function.
    for wrong in [2 << 11, 0x8001_0000 | 2 << 11, 0x8000_0000 | 2 << 11 | 1 << 8] {
        ports.write(address, Dword, wrong);
        assert_eq!(ports.read(data, Dword), NOBODY, "{wrong:#x}");
        ports.write(data, Dword, 0);
    }
    assert_eq!(machine.get(2, 0, Word), 0x1234);
}

#[test]
fn the_address_port_takes_double_words_and_leaves_the_reset_port_alone() {
    let machine = machine();
    let ports = &machine.ports;
    ports.write(PCI_CONFIG_PORT, Dword, 0x8000_0800);
    for (offset, size) in [(0, Byte), (2, Byte), (3, Byte), (0, Word), (2, Word), (1, Word), (0, Qword)] {
        ports.write(PCI_CONFIG_PORT + offset, size, 0);
        assert_eq!(ports.read(PCI_CONFIG_PORT + offset, size) & 0xff, 0xff);
    }
    ports.write(PCI_CONFIG_PORT + 1, Byte, 6);
    assert_eq!(ports.read(PCI_CONFIG_PORT + 1, Byte), 0x0e);
    assert_eq!(*lock(&machine.reset.0), [6]);
    assert_eq!(ports.read(PCI_CONFIG_PORT, Dword), 0x8000_0800);
    // An access over the end of the data port is bytes.
    assert_eq!(ports.read(PCI_CONFIG_PORT + 6, Dword) & 0xffff_0000, 0xffff_0000);
}

#[test]
fn misaligned_and_wide_accesses_are_the_same_bytes() {
    let machine = machine();
    let bytes: Vec<u64> = (0..16).map(|offset| machine.get(1, offset, Byte)).collect();
    let joined = |start: usize, len: usize| {
        bytes[start..start + len].iter().enumerate().fold(0, |value, (index, byte)| value | byte << (8 * index))
    };
    assert_eq!(machine.get(1, 1, Word), joined(1, 2));
    assert_eq!(machine.get(1, 3, Dword), joined(3, 4));
    assert_eq!(machine.get(1, 0, Qword), joined(0, 8));
    assert_eq!(machine.get(1, 5, Qword), joined(5, 8));
    // Over the end of a function's space lies the next function, which is absent.
    assert_eq!(machine.get(1, 0xffe, Dword), 0xffff_0000);
}

#[test]
fn the_lines_of_slots_are_spread_over_four_pins() {
    assert_eq!([0, 1, 2, 3, 4, 31].map(PciBus::interrupt_gsi), [16, 17, 18, 19, 16, 19]);
    let machine = machine();
    assert_eq!(machine.get(2, 0x3c, Word), 0x0112);
}

proptest! {
    #[test]
    fn after_any_configuration_writes_each_bar_is_claimed_at_most_once_and_in_a_window(
        writes in prop::collection::vec(
            (0..5u64, prop_oneof![0..0x40u64, Just(4u64), Just(0x10u64), Just(0x14u64)], 0..4usize,
             prop_oneof![any::<u64>(), Just(PCI_MMIO32_START), Just(PCI_MMIO32_START + 0x1000), 0..16u64]),
            1..64,
        ),
    ) {
        let machine = machine();
        for (slot, offset, size, value) in writes {
            let size = [Byte, Word, Dword, Qword][size];
            machine.set(slot, offset, size, value & size.all_ones());
            machine.ports.write(PCI_CONFIG_PORT + (offset & 7), size, value & size.all_ones());
        }
        // RAM, ECAM and the interrupt controllers are never covered.
        for address in [0, 0xb000_0000 - 0x1000, 0xfec0_0000, 0xfee0_0000, 1 << 32] {
            prop_assert!(!machine.memory_bus.is_claimed(address));
        }
        // Whatever was written, a guest can put everything back.
        for slot in 1..4 {
            machine.set(slot, 4, Word, 0);
            machine.set(slot, 0x10, Dword, PCI_MMIO32_START + (slot << 24));
            machine.set(slot, 0x14, Dword, 0);
            machine.set(slot, 4, Word, 2);
        }
        for slot in 1..4 {
            prop_assert_eq!(machine.at(PCI_MMIO32_START + (slot << 24)), slot);
        }
    }
}
