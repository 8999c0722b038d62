use iced_x86::Instruction;

use super::OpBuilder;
use crate::op::Handler;

pub fn select(_instruction: &Instruction, _builder: &mut OpBuilder) -> Option<Handler> {
    None
}
