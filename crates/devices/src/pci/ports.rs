//! The old way to configuration space: an address at port 0xcf8, its data at 0xcfc (PCI Local Bus 3.0, 3.2.2.3.2).
//!
//! Byte accesses to 0xcf9 do not belong to it: that is the reset register, which real chip sets decode in between.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use polder_machine::{AccessSize, BusDevice};

use super::PciBus;

const RESET_OFFSET: u64 = 1;
const DATA_OFFSET: u64 = 4;

/// The eight ports from 0xcf8. The address register takes whole double words only; other accesses to it are dropped and read ones.
pub struct ConfigPorts {
    bus: Arc<PciBus>,
    reset: Arc<dyn BusDevice>,
    address: AtomicU32,
}

impl ConfigPorts {
    /// `reset` answers byte accesses to port 0xcf9, at its offset 0.
    pub fn new(bus: Arc<PciBus>, reset: Arc<dyn BusDevice>) -> Self {
        ConfigPorts { bus, reset, address: AtomicU32::new(0) }
    }

    /// The configuration address as ECAM has it, where the address register names bus 0 and is enabled.
    fn target(&self, offset: u64) -> Option<u64> {
        let address = u64::from(self.address.load(Ordering::SeqCst));
        let enabled = address & 1 << 31 != 0;
        let on_root_bus = address & 0x7fff_0000 == 0;
        // Device and function lie in bits 15 to 8, the register in bits 7 to 2; ECAM has a register of 12 bits.
        (enabled && on_root_bus).then(|| (address & 0xff00) << 4 | address & 0xfc | (offset - DATA_OFFSET))
    }
}

impl BusDevice for ConfigPorts {
    fn read(&self, offset: u64, size: AccessSize) -> u64 {
        match (offset, size) {
            (0, AccessSize::Dword) => self.address.load(Ordering::SeqCst).into(),
            (RESET_OFFSET, AccessSize::Byte) => self.reset.read(0, size),
            (DATA_OFFSET..=7, AccessSize::Byte | AccessSize::Word | AccessSize::Dword) => match self.target(offset) {
                Some(address) => self.bus.config_read(address, size),
                None => size.all_ones(),
            },
            _ => size.all_ones(),
        }
    }

    fn write(&self, offset: u64, size: AccessSize, value: u64) {
        match (offset, size) {
            (0, AccessSize::Dword) => self.address.store(value as u32, Ordering::SeqCst),
            (RESET_OFFSET, AccessSize::Byte) => self.reset.write(0, size, value),
            (DATA_OFFSET..=7, AccessSize::Byte | AccessSize::Word | AccessSize::Dword) => {
                if let Some(address) = self.target(offset) {
                    self.bus.config_write(address, size, value);
                }
            }
            _ => {}
        }
    }
}
