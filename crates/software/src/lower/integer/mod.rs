//! Choice of handlers for general-purpose instructions.

mod arithmetic;
mod atomic;
mod bits;
mod control;
mod form;
mod fusion;
mod misc;
mod movement;
mod stack;
mod string;

use iced_x86::{Code, Instruction};

pub(crate) use form::{condition, has_offset_operand, is_immediate};
pub use fusion::fuse;

use super::OpBuilder;
use crate::op::Handler;

/// The handler for a general-purpose instruction; `None` for all others.
pub fn select(instruction: &Instruction, builder: &mut OpBuilder) -> Option<Handler> {
    if instruction.code() == Code::INVALID {
        return None;
    }
    if instruction.has_lock_prefix() {
        return atomic::select(instruction, builder);
    }
    arithmetic::select(instruction, builder)
        .or_else(|| movement::select(instruction, builder))
        .or_else(|| control::select(instruction, builder))
        .or_else(|| stack::select(instruction, builder))
        .or_else(|| bits::select(instruction, builder))
        .or_else(|| string::select(instruction, builder))
        .or_else(|| atomic::select(instruction, builder))
        .or_else(|| misc::select(instruction, builder))
}
