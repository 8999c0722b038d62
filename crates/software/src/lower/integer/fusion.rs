//! Two instructions as one op: a comparison and the conditional jump behind it.
//!
//! The pair is never entered in its middle (a jump there finds a block of its own), and only the comparison can fault, so the op's address is the comparison's. The jump's target lies
//! in whichever of immediate and displacement the comparison leaves free.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::form::{condition, is_immediate, operand_bytes, width_index};
use crate::op::{Handler, Op};
use crate::ops::alu::{And, Sub};
use crate::ops::branch::{self, InDisplacement, InImmediate};
use crate::ops::operand::{First, Immediate, Memory, Second};

/// A table of handlers by width and condition.
macro_rules! table {
    ($operation:ty, $target:ty, $source:ty, $place:ty) => {
        [
            table!(@ $operation, u8, $target, $source, $place),
            table!(@ $operation, u16, $target, $source, $place),
            table!(@ $operation, u32, $target, $source, $place),
            table!(@ $operation, u64, $target, $source, $place),
        ]
    };
    (@ $($types:ty),*) => {
        [
            branch::compare_and_jump::<0, $($types),*> as Handler,
            branch::compare_and_jump::<1, $($types),*>,
            branch::compare_and_jump::<2, $($types),*>,
            branch::compare_and_jump::<3, $($types),*>,
            branch::compare_and_jump::<4, $($types),*>,
            branch::compare_and_jump::<5, $($types),*>,
            branch::compare_and_jump::<6, $($types),*>,
            branch::compare_and_jump::<7, $($types),*>,
            branch::compare_and_jump::<8, $($types),*>,
            branch::compare_and_jump::<9, $($types),*>,
            branch::compare_and_jump::<10, $($types),*>,
            branch::compare_and_jump::<11, $($types),*>,
            branch::compare_and_jump::<12, $($types),*>,
            branch::compare_and_jump::<13, $($types),*>,
            branch::compare_and_jump::<14, $($types),*>,
            branch::compare_and_jump::<15, $($types),*>,
        ]
    };
}

/// The op for both instructions in 64-bit code, if there is one. `jump_op` is what the jump alone was lowered to.
pub fn fuse(comparison: &Instruction, comparison_op: &Op, jump: &Instruction, jump_op: &Op) -> Option<Op> {
    if !jump.code().is_jcc_short_or_near() || jump.op0_kind() != OpKind::NearBranch64 {
        return None;
    }
    let compares = match comparison.mnemonic() {
        Mnemonic::Cmp => true,
        Mnemonic::Test => false,
        _ => return None,
    };
    let width = width_index(operand_bytes(comparison, 0))?;
    let condition = condition(jump)?;
    let mut op = comparison_op.clone();
    let (table, in_displacement) = match (comparison.op0_kind(), comparison.op1_kind()) {
        (OpKind::Register, OpKind::Register) if compares => (&table!(Sub, First, Second, InDisplacement), true),
        (OpKind::Register, OpKind::Register) => (&table!(And, First, Second, InDisplacement), true),
        (OpKind::Register, kind) if is_immediate(kind) && compares => {
            (&table!(Sub, First, Immediate, InDisplacement), true)
        }
        (OpKind::Register, kind) if is_immediate(kind) => (&table!(And, First, Immediate, InDisplacement), true),
        (OpKind::Register, OpKind::Memory) if compares => (&table!(Sub, First, Memory, InImmediate), false),
        (OpKind::Memory, OpKind::Register) if compares => (&table!(Sub, Memory, Second, InImmediate), false),
        _ => return None,
    };
    if in_displacement {
        op.displacement = i32::try_from(jump_op.immediate as i64).ok()?;
    } else {
        op.immediate = jump_op.immediate;
    }
    op.next_offset = jump_op.next_offset;
    op.len += jump_op.len;
    op.handler.set(table[width][condition]);
    Some(op)
}
