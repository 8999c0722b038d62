//! MOV to and from DRn (SDM vol. 3, 18.2).

use super::debug::DR6_BD;
use crate::cpu::{Cpu, cr4};
use crate::fault::{Exception, Fault, vector};
use crate::op::{Flow, Op};

const DR6_FIXED: u64 = 0xffff_0ff0;
const DR6_WRITABLE: u64 = 0xe00f;
const DR7_FIXED: u64 = 0x400;
const DR7_WRITABLE: u64 = 0xffff_23ff;
/// DR7: general detect.
const DR7_GD: u64 = 1 << 13;

impl Cpu {
    /// Which of `Cpu::debug` a debug register is; DR4 and DR5 are DR6 and DR7 unless CR4.DE is set.
    fn debug_index(&mut self, op: &Op) -> Result<usize, Fault> {
        let index = match op.first {
            0..=3 => usize::from(op.first),
            4 | 5 if self.cr4 & cr4::DE == 0 => usize::from(op.first),
            6 | 7 => usize::from(op.first) - 2,
            _ => return Err(self.raise_ud()),
        };
        self.require_cpl_0()?;
        if self.debug[5] & DR7_GD != 0 {
            return Err(self.raise(Exception { vector: vector::DEBUG, error_code: None, detail: DR6_BD }));
        }
        Ok(index)
    }

    /// MOV r, DRn. `first`: debug register; `second`: register; `extra2`: operand size.
    pub(crate) fn op_mov_from_debug(&mut self, op: &Op) -> Result<Flow, Fault> {
        let index = self.debug_index(op)?;
        self.set_register(op.second, self.debug[index], u64::from(op.extra2));
        Ok(Flow::Next)
    }

    /// MOV DRn, r; operands as above.
    pub(crate) fn op_mov_to_debug(&mut self, op: &Op) -> Result<Flow, Fault> {
        let index = self.debug_index(op)?;
        let mut value = self.gpr[usize::from(op.second) % 16];
        if op.extra2 == 4 {
            value &= 0xffff_ffff;
        }
        if index >= 4 && value >> 32 != 0 {
            return Err(self.raise_gp(0));
        }
        self.debug[index] = match index {
            4 => DR6_FIXED | value & DR6_WRITABLE,
            5 => DR7_FIXED | value & DR7_WRITABLE,
            _ => value,
        };
        self.update_mode();
        Ok(self.leave(op))
    }
}
