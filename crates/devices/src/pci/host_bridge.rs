//! The host bridge: slot 0 of the root bus, a bare header that tells a guest that a PCI bus is there.

use std::sync::Mutex;

use polder_machine::AccessSize;

use super::{BarPlace, ConfigSpace, Identity, PciFunction};
use crate::lock;

/// Function 00:00.0.
pub struct HostBridge {
    config: Mutex<ConfigSpace>,
}

impl Default for HostBridge {
    fn default() -> Self {
        Self::new()
    }
}

impl HostBridge {
    /// A host bridge with the identity of the generic PCI Express host bridge that Linux knows without quirks.
    pub fn new() -> Self {
        let identity = Identity {
            vendor: 0x1b36,
            device: 0x0008,
            revision: 0,
            class: [0x06, 0, 0],
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
        };
        HostBridge { config: Mutex::new(ConfigSpace::new(&identity)) }
    }
}

impl PciFunction for HostBridge {
    fn config_read(&self, offset: u16, size: AccessSize) -> u32 {
        lock(&self.config).read(offset, size)
    }

    fn config_write(&self, offset: u16, size: AccessSize, value: u32) {
        lock(&self.config).write(offset, size, value);
    }

    fn bars(&self) -> Vec<BarPlace> {
        Vec::new()
    }

    fn decodes_memory(&self) -> bool {
        false
    }

    fn place_bar(&self, _index: u8, _address: u64) {}

    fn set_interrupt_line(&self, _line: u8) {}

    fn bar_read(&self, _index: u8, _offset: u64, size: AccessSize) -> u64 {
        size.all_ones()
    }

    fn bar_write(&self, _index: u8, _offset: u64, _size: AccessSize, _value: u64) {}
}
