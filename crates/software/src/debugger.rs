//! A debugger's breakpoints, watchpoints and steps in this engine.
//!
//! A breakpoint is exact because code around it is cut: no block and no translated unit holds a breakpoint's address other than as
//! its end, and none that begins there is remembered anywhere. So whoever comes to the address comes by way of the slow look-up
//! ([`crate::block_cache`]), which raises [`vector::DEBUGGER`] there. All other code runs as ever. Addresses stay cut while a debugger takes its
//! breakpoints away for a step and puts them back; only new ones cost a flush of all decoded and translated code.
//!
//! Watchpoints send every data access the slow way, as the guest's own data breakpoints do, and the vCPU runs instruction by
//! instruction. So does a step.

use polder_machine::{DebugEvent, DebugOrders, DebugVcpu, VcpuState, VectorRegisters, WatchedAccess};

use crate::block_cache::{code_page, linear_rip};
use crate::cpu::{Cpu, FS, GS};
use crate::fault::vector;
use crate::page_walk::Access;
use crate::vcpu::SoftwareVcpu;

/// Flags that a debugger may set: all but VM, VIF, VIP and those that do not exist.
const SETTABLE_FLAGS: u64 = 0x25_7fd5;

/// What one processor looks out for. Without a debugger everything here is empty.
#[derive(Debug, Default)]
pub struct Debugger {
    orders: DebugOrders,
    /// Addresses where code is cut: the breakpoints, and those that were there before the step that is under way. Sorted.
    cuts: Vec<u64>,
    event: Option<DebugEvent>,
}

impl Debugger {
    /// Takes new orders; whether code that is kept may hold a breakpoint's address now and is to be dropped.
    fn set_orders(&mut self, orders: &DebugOrders) -> bool {
        self.orders.clone_from(orders);
        self.event = None;
        let is_new = self.orders.breakpoints.iter().any(|address| self.cuts.binary_search(address).is_err());
        if orders.step {
            self.cuts.extend(&orders.breakpoints);
        } else {
            self.cuts.clone_from(&orders.breakpoints);
        }
        self.cuts.sort_unstable();
        self.cuts.dedup();
        is_new
    }

    /// Cuts code at addresses where no breakpoint is, for the test bench; the caller drops the code that is kept.
    #[cfg(any(test, feature = "testbench"))]
    pub fn set_cuts(&mut self, addresses: &[u64]) {
        self.cuts = addresses.to_vec();
    }

    /// Sets breakpoints where no code is kept.
    #[cfg(test)]
    pub fn break_at(&mut self, addresses: &[u64]) {
        self.set_orders(&DebugOrders { breakpoints: addresses.to_vec(), ..DebugOrders::default() });
    }

    /// Whether instructions must run one by one.
    #[inline]
    pub fn needs_single_step(&self) -> bool {
        self.orders.step || !self.orders.watchpoints.is_empty()
    }

    /// Whether the vCPU is to come back after one instruction.
    #[inline]
    pub fn steps(&self) -> bool {
        self.orders.step
    }

    /// Whether data accesses are watched.
    #[inline]
    pub fn watches(&self) -> bool {
        !self.orders.watchpoints.is_empty()
    }

    /// Whether code at a linear address is never remembered.
    #[inline]
    pub fn cuts_at(&self, linear: u64) -> bool {
        !self.cuts.is_empty() && self.cuts.binary_search(&linear).is_ok()
    }

    /// How many of `bytes` bytes at a linear address come before the next cut behind the first byte.
    #[inline]
    pub fn uncut(&self, linear: u64, bytes: usize) -> usize {
        if self.cuts.is_empty() {
            return bytes;
        }
        let next = self.cuts.partition_point(|&cut| cut <= linear);
        match self.cuts.get(next) {
            Some(cut) => bytes.min(usize::try_from(cut - linear).unwrap_or(usize::MAX)),
            None => bytes,
        }
    }

    /// Whether to come back before the instruction at a linear address.
    pub fn stops_at(&self, linear: u64) -> bool {
        !self.orders.step && self.orders.breakpoints.contains(&linear)
    }

    /// Notes an access to data.
    pub fn note_access(&mut self, linear: u64, bytes: u64, access: Access) {
        let hit = self.orders.watchpoints.iter().find(|point| {
            let wanted = match access {
                Access::Read => point.access != WatchedAccess::Write,
                Access::Write => point.access != WatchedAccess::Read,
                Access::Fetch => false,
            };
            wanted && (point.address.wrapping_sub(linear) < bytes || linear.wrapping_sub(point.address) < point.len)
        });
        if let Some(&point) = hit {
            self.event = Some(DebugEvent::Watchpoint(point));
        }
    }

    pub fn note(&mut self, event: DebugEvent) {
        self.event.get_or_insert(event);
    }

    /// The instruction did not complete: what it touched does not count.
    pub fn forget_event(&mut self) {
        self.event = None;
    }

    #[inline]
    pub fn take_event(&mut self) -> Option<DebugEvent> {
        self.event.take()
    }
}

impl Cpu {
    /// Whether the next instruction is at a breakpoint, and its page is there; notes it.
    pub(crate) fn is_at_breakpoint(&mut self) -> bool {
        let address = linear_rip(self);
        let met = self.debugger.stops_at(address) && code_page(self, address).is_ok();
        if met {
            self.debugger.note(DebugEvent::Breakpoint { address });
        }
        met
    }

    /// Whether the exception that was raised is no exception of the architecture but a breakpoint of the debugger's; notes it.
    pub(crate) fn met_breakpoint(&mut self) -> bool {
        let met = self.fault.vector == vector::DEBUGGER;
        if met {
            let address = linear_rip(self);
            self.debugger.note(DebugEvent::Breakpoint { address });
        }
        met
    }
}

impl DebugVcpu for SoftwareVcpu {
    fn vector_registers(&self) -> VectorRegisters {
        let vector = &self.cpu().vector;
        let mut ymm_high = [0; 16];
        for (high, register) in ymm_high.iter_mut().zip(&vector.ymm) {
            *high = u128::from(register.0[3]) << 64 | u128::from(register.0[2]);
        }
        VectorRegisters { fxsave: vector.resting_fxsave(), ymm_high }
    }

    fn set_registers(&mut self, state: &VcpuState, vector: &VectorRegisters) {
        let cpu = self.cpu_mut();
        cpu.gpr[..16].copy_from_slice(&state.gpr);
        let rip = cpu.cut_rip(state.rip);
        if rip != cpu.rip {
            cpu.rip = rip;
            cpu.halted = false;
        }
        cpu.set_rflags(cpu.rflags() & !SETTABLE_FLAGS | state.rflags & SETTABLE_FLAGS);
        for segment in [FS, GS] {
            cpu.segments[usize::from(segment)].base = state.segments[usize::from(segment)].base;
        }
        cpu.set_resting_fxsave(&vector.fxsave);
        for (register, high) in cpu.vector.ymm.iter_mut().zip(vector.ymm_high) {
            register.0[2] = high as u64;
            register.0[3] = (high >> 64) as u64;
        }
    }

    fn set_orders(&mut self, orders: &DebugOrders) {
        let is_new = self.cpu_mut().debugger.set_orders(orders);
        if is_new {
            self.flush_code();
        }
        // Watchpoints choose the table that sends every access the slow way.
        self.cpu_mut().update_mode();
    }
}

#[cfg(test)]
mod tests;
