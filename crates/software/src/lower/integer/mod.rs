//! Choice of handlers for general-purpose instructions.

mod arithmetic;
mod control;
mod form;

use iced_x86::Instruction;

use super::OpBuilder;
use crate::op::Handler;

/// The handler for a general-purpose instruction; `None` for all others.
pub fn select(instruction: &Instruction, builder: &mut OpBuilder) -> Option<Handler> {
    arithmetic::select(instruction, builder).or_else(|| control::select(instruction, builder))
}
