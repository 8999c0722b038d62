//! Configuration space by ECAM and by ports, BARs moved at random, and the BARs' registers.
//!
//! Holds: no panic, and no BAR ever covers what is not a PCI window.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use polder_basics::SystemClock;
use polder_devices::pci::{ConfigPorts, Ecam, PciBus};
use polder_devices::virtio::VirtioPciFunction;
use polder_devices::virtio::balloon::Balloon;
use polder_devices::virtio::rng::Rng;
use polder_machine::layout::{ECAM_LEN, ECAM_START, PCI_CONFIG_PORT, PCI_MMIO32_START};
use polder_machine::{AccessSize, Bus, BusDevice, MsiMessage, MsiSink};
use polder_memory::{GuestAddress, GuestMemory};

struct Nothing;

impl MsiSink for Nothing {
    fn send(&self, _message: MsiMessage) {}
}

impl BusDevice for Nothing {
    fn read(&self, _offset: u64, _size: AccessSize) -> u64 {
        0
    }

    fn write(&self, _offset: u64, _size: AccessSize, _value: u64) {}
}

fuzz_target!(|input: &[u8]| {
    let memory = GuestMemory::new(&[(GuestAddress(0), 0x1_0000)]).expect("the host has memory");
    let bus = Arc::new(Bus::new());
    let ports = Bus::new();
    let pci = PciBus::new(&bus, [Arc::new(()), Arc::new(()), Arc::new(()), Arc::new(())]);
    let rng = Arc::new(Rng::new(Arc::new(SystemClock)));
    for (slot, device) in [(1, rng as Arc<_>), (2, Arc::new(Balloon::new()) as Arc<_>)] {
        let line = pci.interrupt_line(slot);
        pci.add(slot, VirtioPciFunction::new(device, memory.clone(), Arc::new(Nothing), line))
            .expect("the slot is free");
    }
    bus.insert(ECAM_START, ECAM_LEN, Arc::new(Ecam(pci.clone()))).expect("the range is free");
    ports.insert(PCI_CONFIG_PORT, 8, Arc::new(ConfigPorts::new(pci.clone(), Arc::new(Nothing)))).expect("free");
    // Each step: where and how (1 byte), offset (2), value (4).
    for step in input.as_chunks::<7>().0 {
        let [how, low, high, value @ ..] = *step;
        let size = [AccessSize::Byte, AccessSize::Word, AccessSize::Dword, AccessSize::Qword][(how & 3) as usize];
        let offset = u64::from(u16::from_le_bytes([low, high]));
        let value = u64::from(u32::from_le_bytes(value)) & size.all_ones();
        match how >> 2 & 3 {
            0 => {
                bus.write(ECAM_START + 0x8000 + offset, size, value);
                bus.read(ECAM_START + 0x8000 + offset, size);
            }
            1 => {
                ports.write(PCI_CONFIG_PORT + offset % 8, size, value);
                ports.read(PCI_CONFIG_PORT + offset % 8, size);
            }
            2 => bus.write(PCI_MMIO32_START + offset, size, value),
            _ => {
                bus.read(PCI_MMIO32_START + offset, size);
            }
        }
    }
    for address in [0, ECAM_START - 0x1000, 0xfec0_0000, 0xfee0_0000, 1 << 32] {
        assert!(!bus.is_claimed(address));
    }
});
