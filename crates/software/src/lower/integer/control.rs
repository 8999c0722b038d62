//! Near jumps, calls, returns, loops.

use iced_x86::{Code, ConditionCode, Instruction, OpKind};

use crate::lower::OpBuilder;
use crate::op::Handler;
use crate::ops::branch;

/// A handler for each condition code.
macro_rules! conditions {
    ($function:path) => {{
        use $function as function;
        [
            function::<0> as Handler,
            function::<1>,
            function::<2>,
            function::<3>,
            function::<4>,
            function::<5>,
            function::<6>,
            function::<7>,
            function::<8>,
            function::<9>,
            function::<10>,
            function::<11>,
            function::<12>,
            function::<13>,
            function::<14>,
            function::<15>,
        ]
    }};
}

/// The condition code of a Jcc, SETcc or CMOVcc.
pub fn condition(instruction: &Instruction) -> Option<usize> {
    Some(match instruction.condition_code() {
        ConditionCode::o => 0,
        ConditionCode::no => 1,
        ConditionCode::b => 2,
        ConditionCode::ae => 3,
        ConditionCode::e => 4,
        ConditionCode::ne => 5,
        ConditionCode::be => 6,
        ConditionCode::a => 7,
        ConditionCode::s => 8,
        ConditionCode::ns => 9,
        ConditionCode::p => 10,
        ConditionCode::np => 11,
        ConditionCode::l => 12,
        ConditionCode::ge => 13,
        ConditionCode::le => 14,
        ConditionCode::g => 15,
        ConditionCode::None => return None,
    })
}

pub fn select(instruction: &Instruction, builder: &mut OpBuilder) -> Option<Handler> {
    if instruction.op0_kind() == OpKind::NearBranch64 {
        builder.op.immediate = instruction.near_branch_target().wrapping_sub(builder.context.block_rip);
    }
    let handler = match instruction.code() {
        Code::Jmp_rel8_64 | Code::Jmp_rel32_64 => branch::jump_64 as Handler,
        code if code.is_jcc_short_or_near() && instruction.op0_kind() == OpKind::NearBranch64 => {
            conditions!(branch::jump_if_64)[condition(instruction)?]
        }
        _ => return None,
    };
    builder.ends_block = true;
    Some(handler)
}
