//! The local APIC. (Owner: helper `apic`.)

use crate::cpu::Cpu;

impl Cpu {
    /// A load from the local APIC's page.
    pub fn load_local_apic(&mut self, _offset: u64, _bytes: u64) -> u64 {
        0
    }

    /// A store to the local APIC's page.
    pub fn store_local_apic(&mut self, _offset: u64, _value: u64, _bytes: u64) {}
}
