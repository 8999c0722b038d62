//! Near jumps, calls, returns and loops.
//!
//! A relative branch has its target's distance from the block's first byte as the immediate. In 64-bit code such targets are not checked
//! here: one that is not canonical faults when it is fetched. Elsewhere `op.extra2` says what the target is cut to.

use crate::cpu::{BLOCK_RIP, CS, Cpu, RCX, RSP, SS, is_canonical};
use crate::fault::Fault;
use crate::op::{Flow, Op, address};
use crate::ops::alu::Binary;
use crate::ops::operand::{Place, Source, Width};

impl Cpu {
    /// Faults where a near branch's target cannot be.
    #[inline(always)]
    pub fn check_branch(&mut self, target: u64) -> Result<(), Fault> {
        let good = if self.is_64_bit() {
            is_canonical(target, self.linear_bits())
        } else {
            target <= u64::from(self.segments[CS as usize].limit)
        };
        if good { Ok(()) } else { Err(self.raise_gp(0)) }
    }
}

/// Flow of an instruction that has set RIP, or faulted.
#[inline(always)]
fn jumped(result: Result<(), Fault>) -> Flow {
    match result {
        Ok(()) => Flow::Jump,
        Err(_) => Flow::Fault,
    }
}

/// A relative branch's target in 64-bit code.
#[inline(always)]
fn target_64(cpu: &Cpu, op: &Op) -> u64 {
    cpu.gpr[BLOCK_RIP].wrapping_add(op.immediate)
}

/// A relative branch's target in any code.
#[inline(always)]
fn target(cpu: &Cpu, op: &Op) -> u64 {
    let target = cpu.gpr[BLOCK_RIP].wrapping_add(op.immediate);
    match op.extra2 {
        2 => target & 0xffff,
        4 => target & 0xffff_ffff,
        _ => target,
    }
}

/// Goes to the next instruction, in a block that ends here.
#[inline(always)]
fn fall_through(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.rip = cpu.cut_rip(op.next_rip(cpu));
    Flow::Jump
}

#[inline(always)]
fn branch(cpu: &mut Cpu, op: &Op) -> Flow {
    let target = target(cpu, op);
    let result = cpu.check_branch(target);
    if result.is_ok() {
        cpu.rip = target;
    }
    jumped(result)
}

/// JMP rel in 64-bit code.
pub extern "sysv64" fn jump_64(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.rip = target_64(cpu, op);
    Flow::Jump
}

/// Jcc in 64-bit code.
pub extern "sysv64" fn jump_if_64<const CONDITION: u8>(cpu: &mut Cpu, op: &Op) -> Flow {
    let taken = cpu.arithmetic.condition(CONDITION);
    let offset = if taken { op.immediate } else { u64::from(op.next_offset) };
    cpu.rip = cpu.gpr[BLOCK_RIP].wrapping_add(offset);
    Flow::Jump
}

/// JMP rel in other code.
pub extern "sysv64" fn jump(cpu: &mut Cpu, op: &Op) -> Flow {
    branch(cpu, op)
}

/// Jcc in other code.
pub extern "sysv64" fn jump_if<const CONDITION: u8>(cpu: &mut Cpu, op: &Op) -> Flow {
    if cpu.arithmetic.condition(CONDITION) { branch(cpu, op) } else { fall_through(cpu, op) }
}

/// JCXZ, JECXZ, JRCXZ and the LOOPs; the address size is the op's. `op.extra`: 0 LOOPNE, 1 LOOPE, 2 LOOP, 3 JCXZ.
pub extern "sysv64" fn count_loop(cpu: &mut Cpu, op: &Op) -> Flow {
    let mask = match op.address_kind {
        address::FLAT => u64::MAX,
        address::CHECKED_16 => 0xffff,
        _ => 0xffff_ffff,
    };
    let step = u64::from(op.extra != 3);
    let count = cpu.gpr[RCX].wrapping_sub(step) & mask;
    let taken = match op.extra {
        0 => count != 0 && !cpu.arithmetic.zero(),
        1 => count != 0 && cpu.arithmetic.zero(),
        2 => count != 0,
        _ => count == 0,
    };
    let flow = if taken { branch(cpu, op) } else { fall_through(cpu, op) };
    if flow != Flow::Fault && step != 0 {
        match mask {
            0xffff => cpu.set_word(RCX as u8, count as u16),
            _ => cpu.gpr[RCX] = count,
        }
    }
    flow
}

/// JMP to an address in a register or memory.
pub extern "sysv64" fn jump_indirect<T: Width, S: Source>(cpu: &mut Cpu, op: &Op) -> Flow {
    let Ok(target) = S::read::<T>(cpu, op) else { return Flow::Fault };
    let target = target.to_u64();
    let result = cpu.check_branch(target);
    if result.is_ok() {
        cpu.rip = target;
    }
    jumped(result)
}

/// CALL rel in 64-bit code.
pub extern "sysv64" fn call_64(cpu: &mut Cpu, op: &Op) -> Flow {
    let top = cpu.gpr[RSP].wrapping_sub(8);
    if cpu.store(top, op.next_rip(cpu), SS).is_err() {
        return Flow::Fault;
    }
    cpu.gpr[RSP] = top;
    cpu.rip = target_64(cpu, op);
    Flow::Jump
}

#[inline(always)]
fn call_to<T: Width>(cpu: &mut Cpu, op: &Op, target: u64) -> Flow {
    let back = T::from_u64(op.next_rip(cpu));
    let result = cpu.check_branch(target).and_then(|()| cpu.push_value(back));
    if result.is_ok() {
        cpu.rip = target;
    }
    jumped(result)
}

/// CALL rel in other code.
pub extern "sysv64" fn call<T: Width>(cpu: &mut Cpu, op: &Op) -> Flow {
    let target = target(cpu, op);
    call_to::<T>(cpu, op, target)
}

/// CALL to an address in a register or memory.
pub extern "sysv64" fn call_indirect<T: Width, S: Source>(cpu: &mut Cpu, op: &Op) -> Flow {
    let Ok(target) = S::read::<T>(cpu, op) else { return Flow::Fault };
    call_to::<T>(cpu, op, target.to_u64())
}

/// RET in 64-bit code.
pub extern "sysv64" fn return_64(cpu: &mut Cpu, _op: &Op) -> Flow {
    let top = cpu.gpr[RSP];
    let Ok(target) = cpu.load::<u64>(top, SS) else { return Flow::Fault };
    if !is_canonical(target, cpu.linear_bits()) {
        let _ = cpu.raise_gp(0);
        return Flow::Fault;
    }
    cpu.gpr[RSP] = top.wrapping_add(8);
    cpu.rip = target;
    Flow::Jump
}

/// RET; the immediate is what it takes off the stack beside the return address.
pub extern "sysv64" fn return_near<T: Width>(cpu: &mut Cpu, op: &Op) -> Flow {
    let top = cpu.gpr[RSP];
    let Ok(target) = cpu.load_stack::<T>(top) else { return Flow::Fault };
    let target = target.to_u64();
    let result = cpu.check_branch(target);
    if result.is_ok() {
        cpu.set_stack_pointer(top.wrapping_add(T::BYTES).wrapping_add(op.immediate & 0xffff));
        cpu.rip = target;
    }
    jumped(result)
}

/// Where the op of a fused pair keeps its jump's target.
pub trait Target {
    fn offset(op: &Op) -> u64;
}

/// In the displacement.
pub struct InDisplacement;
/// In the immediate.
pub struct InImmediate;

impl Target for InDisplacement {
    #[inline(always)]
    fn offset(op: &Op) -> u64 {
        op.displacement as i64 as u64
    }
}

impl Target for InImmediate {
    #[inline(always)]
    fn offset(op: &Op) -> u64 {
        op.immediate
    }
}

/// CMP or TEST and the Jcc behind it, in 64-bit code: two instructions.
pub extern "sysv64" fn compare_and_jump<const CONDITION: u8, O: Binary, T: Width, D: Place, S: Source, L: Target>(
    cpu: &mut Cpu,
    op: &Op,
) -> Flow {
    let Ok(operand) = S::read::<T>(cpu, op) else { return Flow::Fault };
    let Ok(value) = D::read::<T>(cpu, op) else { return Flow::Fault };
    let flags = O::run(value, operand, cpu.arithmetic).1;
    cpu.arithmetic = flags;
    cpu.instructions = cpu.instructions.wrapping_add(1);
    let offset = if flags.condition(CONDITION) { L::offset(op) } else { u64::from(op.next_offset) };
    cpu.rip = cpu.gpr[BLOCK_RIP].wrapping_add(offset);
    Flow::Jump
}
