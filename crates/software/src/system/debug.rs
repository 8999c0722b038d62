//! Debugging: single steps and breakpoints (SDM vol. 3, chapter 18).
//!
//! While anything of it is enabled, the outer loop runs one instruction at a time:
//!
//! ```text
//! if cpu.trap_pending() { cpu.deliver_trap() }           // before interrupts are looked at
//! if cpu.needs_single_step() {
//!     match cpu.before_step() { Err(_) => cpu.deliver_exception(), Ok(()) => run_one }
//!     cpu.after_step(...)                                // only if the instruction did not fault
//! }
//! ```

use super::exception_delivery::Delivery;
use crate::cpu::Cpu;
use crate::fault::{Exception, Fault, vector};
use crate::flags;
use crate::page_walk::Access;

/// DR6: the single-step flag.
pub const DR6_BS: u64 = 1 << 14;
/// DR6: a task switch into a task with its T bit set.
pub const DR6_BT: u64 = 1 << 15;
/// DR6: a debug register was touched while DR7.GD was set.
pub const DR6_BD: u64 = 1 << 13;

/// What [`Cpu::before_step`] noted for [`Cpu::after_step`].
#[derive(Debug, Clone, Copy)]
pub struct Step {
    trap_flag: bool,
    resume_flag: bool,
}

impl Cpu {
    /// Whether instructions must run one by one: RFLAGS.TF or RF is set, a breakpoint is enabled, or a debugger steps or watches.
    #[inline]
    pub fn needs_single_step(&self) -> bool {
        self.system_flags & (flags::TF | flags::RF) != 0
            || self.debug[5] & 0xff != 0
            || self.stack_shadow
            || self.debugger.needs_single_step()
    }

    /// Whether a debug trap, or a fault after a task switch, waits to be delivered before the next instruction.
    #[inline]
    pub fn trap_pending(&self) -> bool {
        self.pending_debug != 0 && !self.stack_shadow || self.late_fault
    }

    /// Delivers what [`Cpu::trap_pending`] told of. `rip` is the next instruction's address.
    pub fn deliver_trap(&mut self) -> Delivery {
        if self.late_fault {
            self.late_fault = false;
            if self.fault.vector == vector::DEBUG {
                // INT1 after MOV SS: the traps that the shadow held back come in the same exception.
                self.fault.detail |= std::mem::take(&mut self.pending_debug);
            }
            return self.deliver_exception();
        }
        let detail = std::mem::take(&mut self.pending_debug);
        let _ = self.raise(Exception { vector: vector::DEBUG, error_code: None, detail });
        self.deliver_exception()
    }

    /// Before one instruction at `rip`: instruction breakpoints raise #DB unless RFLAGS.RF is set.
    pub fn before_step(&mut self) -> Result<Step, Fault> {
        let resume_flag = self.system_flags & flags::RF != 0;
        let shadowed = std::mem::take(&mut self.stack_shadow);
        self.step_consumed = false;
        // MOV SS and POP SS hold instruction breakpoints off too.
        if !resume_flag && !shadowed {
            let linear = self.segments[usize::from(crate::cpu::CS)].base;
            let linear = if self.is_64_bit() { self.rip } else { linear.wrapping_add(self.rip) & 0xffff_ffff };
            let hit = self.breakpoints(linear, 1, |kind| kind == 0);
            if hit.enabled {
                return Err(self.raise(Exception { vector: vector::DEBUG, error_code: None, detail: hit.bits }));
            }
        }
        Ok(Step { trap_flag: self.system_flags & flags::TF != 0, resume_flag })
    }

    /// After an instruction that completed (it did not fault): clears RF, notes the single-step trap. None comes after instructions
    /// that went through the interrupt table themselves (INT n), nor after those that shadow it (MOV SS).
    pub fn after_step(&mut self, step: Step) {
        if step.resume_flag && !std::mem::take(&mut self.resume_set) {
            self.system_flags &= !flags::RF;
        }
        if step.trap_flag && !self.step_consumed && !self.stack_shadow {
            self.pending_debug |= DR6_BS;
        }
    }

    /// Notes that a data access may have met an enabled breakpoint.
    pub fn note_data_breakpoint(&mut self, linear: u64, bytes: u64, access: Access) {
        self.debugger.note_access(linear, bytes, access);
        let hit = self.breakpoints(linear, bytes, |kind| kind == 3 || kind == 1 && access == Access::Write);
        if hit.enabled {
            self.pending_debug |= hit.bits;
        }
    }

    /// Notes that an access to I/O ports may have met an enabled breakpoint (with CR4.DE).
    pub fn note_port_breakpoint(&mut self, port: u16, bytes: u64) {
        if self.debug[5] & 0xff != 0 && self.cr4 & crate::cpu::cr4::DE != 0 {
            let hit = self.breakpoints(u64::from(port), bytes, |kind| kind == 2);
            if hit.enabled {
                self.pending_debug |= hit.bits;
            }
        }
    }

    /// The breakpoints whose kind is wanted and whose range meets `bytes` bytes at `address`.
    fn breakpoints(&self, address: u64, bytes: u64, wanted: impl Fn(u64) -> bool) -> Hit {
        let control = self.debug[5];
        let mut hit = Hit { bits: 0, enabled: false };
        for number in 0..4 {
            let kind = control >> (16 + 4 * number) & 3;
            if !wanted(kind) {
                continue;
            }
            let len = match control >> (18 + 4 * number) & 3 {
                0 => 1,
                1 => 2,
                2 => 8,
                _ => 4,
            };
            let start = self.debug[number] & !(len - 1);
            if start.wrapping_sub(address) < bytes || address.wrapping_sub(start) < len {
                hit.bits |= 1 << number;
                hit.enabled |= control >> (2 * number) & 3 != 0;
            }
        }
        hit
    }
}

/// Breakpoints that an access met; DR6 shows also those that are not enabled.
struct Hit {
    bits: u64,
    enabled: bool,
}
