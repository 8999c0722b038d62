//! The local APIC of each vCPU, and how interrupts reach it.
//!
//! `local` has the registers and rules, `timer` its timer, `inbox` what other threads may touch, `router` finds the vCPUs
//! that a message is for. Here the processor's sides of it: the memory-mapped page, the x2APIC registers and CR8.

mod inbox;
mod local;
mod router;
#[cfg(test)]
mod tests;
mod timer;

pub use inbox::{EVENT_INIT, EVENT_KICK, EVENT_NMI, EVENT_SECOND_NMI, EVENT_SIPI, EVENT_STOP, Inbox};
pub use local::LocalApic;
pub use router::{Destination, Message, Router, delivery};

use crate::cpu::Cpu;
use crate::fault::Fault;
use crate::time::host_tsc;

/// MSRs of the x2APIC.
pub mod register_range {
    pub const FIRST: u32 = 0x800;
    pub const LAST: u32 = 0x8ff;
}

impl Cpu {
    /// A load from the local APIC's page. Registers are 32 bits wide, 16 bytes apart.
    pub fn load_local_apic(&mut self, offset: u64, bytes: u64) -> u64 {
        self.end_quiet_interrupt();
        let in_register = offset % 16;
        if in_register + bytes > 4 && !(in_register == 0 && bytes == 8) {
            return 0;
        }
        let value = self.apic.read((offset / 16) as u32, host_tsc()).unwrap_or(0) & 0xffff_ffff;
        let value = value >> (8 * in_register);
        if bytes == 8 { value } else { value & ((1 << (8 * bytes)) - 1) }
    }

    /// A store to the local APIC's page; anything but an aligned one of 32 bits is dropped (SDM vol. 3, 11.4.1).
    pub fn store_local_apic(&mut self, offset: u64, value: u64, bytes: u64) {
        self.end_quiet_interrupt();
        if !offset.is_multiple_of(16) || bytes < 4 {
            return;
        }
        if let Ok(Some(vector)) = self.apic.write((offset / 16) as u32, value & 0xffff_ffff, host_tsc()) {
            self.services.eoi.end_of_interrupt(vector);
        }
    }

    pub(crate) fn read_x2apic(&mut self, register: u32) -> Option<u64> {
        if !self.apic.is_x2apic() {
            return None;
        }
        self.end_quiet_interrupt();
        self.apic.read(register, host_tsc()).ok()
    }

    pub(crate) fn write_x2apic(&mut self, register: u32, value: u64) -> Option<()> {
        if !self.apic.is_x2apic() {
            return None;
        }
        self.end_quiet_interrupt();
        if let Some(vector) = self.apic.write(register, value, host_tsc()).ok()? {
            self.services.eoi.end_of_interrupt(vector);
        }
        Some(())
    }

    /// CR8: the high half of the task priority.
    pub fn cr8(&self) -> u64 {
        u64::from(self.apic.tpr() >> 4)
    }

    /// Writes CR8; #GP for reserved bits.
    pub fn set_cr8(&mut self, value: u64) -> Result<(), Fault> {
        if value > 15 {
            return Err(self.raise_gp(0));
        }
        self.apic.set_tpr((value as u8) << 4);
        Ok(())
    }

    /// Follows a change of IA32_APIC_BASE: where the registers are in memory, if they are.
    pub(crate) fn set_apic_page(&mut self) {
        let page = self.apic.page();
        if page != self.apic_page {
            self.apic_page = page;
            self.tlb.flush_all();
        }
    }
}
