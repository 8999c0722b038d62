//! Near jumps, calls and returns.

use crate::cpu::{BLOCK_RIP, CS, Cpu, is_canonical};
use crate::fault::Fault;
use crate::op::{Flow, Op};

impl Cpu {
    /// Sets RIP to a near branch's target; faults where the target cannot be.
    #[inline(always)]
    pub fn branch_to(&mut self, target: u64) -> Result<(), Fault> {
        let good = if self.is_64_bit() {
            is_canonical(target, self.linear_bits())
        } else {
            target <= u64::from(self.segments[CS as usize].limit)
        };
        if !good {
            return Err(self.raise_gp(0));
        }
        self.rip = target;
        Ok(())
    }
}

/// The target of a relative branch: `op.immediate` is its distance from the block's first byte, `op.extra2` says what it is cut to.
#[inline(always)]
fn target(cpu: &Cpu, op: &Op) -> u64 {
    cpu.gpr[BLOCK_RIP].wrapping_add(op.immediate)
}

/// JMP rel in 64-bit code. Targets near the canonical boundary fault when they are fetched.
pub fn jump_64(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.rip = target(cpu, op);
    Flow::Jump
}

/// Jcc in 64-bit code.
pub fn jump_if_64<const CONDITION: u8>(cpu: &mut Cpu, op: &Op) -> Flow {
    let taken = cpu.arithmetic.condition(CONDITION);
    let offset = if taken { op.immediate } else { u64::from(op.next_offset) };
    cpu.rip = cpu.gpr[BLOCK_RIP].wrapping_add(offset);
    Flow::Jump
}
