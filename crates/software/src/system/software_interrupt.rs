//! INT n, INT3, INTO and INT1 (SDM vol. 2, INT n; vol. 3, 6.4 and 21.3).

use super::exception_delivery::Event;
use crate::cpu::Cpu;
use crate::fault::{Exception, Fault, vector};
use crate::op::{Flow, Op};

/// DR6: none of the causes; INT1 sets no bit.
const NO_CAUSE: u64 = 0;

impl Cpu {
    /// INT n; the vector is `immediate`.
    pub(crate) fn op_interrupt(&mut self, op: &Op) -> Result<Flow, Fault> {
        if self.mode.virtual_8086 && self.iopl() < 3 {
            return Err(self.raise_gp(0));
        }
        self.software_interrupt(op, op.immediate as u8)
    }

    /// INT3
    pub(crate) fn op_breakpoint(&mut self, op: &Op) -> Result<Flow, Fault> {
        self.software_interrupt(op, vector::BREAKPOINT)
    }

    /// INTO
    pub(crate) fn op_overflow(&mut self, op: &Op) -> Result<Flow, Fault> {
        if !self.arithmetic.overflow() {
            return Ok(Flow::Next);
        }
        self.software_interrupt(op, vector::OVERFLOW)
    }

    fn software_interrupt(&mut self, op: &Op, vector: u8) -> Result<Flow, Fault> {
        let return_rip = self.following_ip(op);
        let resume = self.system_flags & crate::flags::RF != 0;
        self.enter(Event { vector, error_code: None, software: true, return_rip, resume })?;
        Ok(Flow::Leave)
    }

    /// INT1: a debug trap that no privilege check holds up.
    pub(crate) fn op_debug_trap(&mut self, op: &Op) -> Result<Flow, Fault> {
        self.rip = self.following_ip(op);
        let _ = self.raise(Exception { vector: vector::DEBUG, error_code: None, detail: NO_CAUSE });
        self.late_fault = true;
        self.step_consumed = true;
        Ok(Flow::Leave)
    }
}
