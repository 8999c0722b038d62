//! ADD to XOR, INC to NOT.

use iced_x86::{Instruction, Mnemonic};

use super::form::{Form, operand_bytes, width_index, widths};
use crate::lower::OpBuilder;
use crate::op::Handler;
use crate::ops::alu::{self, Adc, Add, And, Binary, Dec, Inc, Neg, Not, Or, Sbb, Sub, Unary, Xor};
use crate::ops::operand::{First, Immediate, Memory, Second};

pub fn select(instruction: &Instruction, builder: &mut OpBuilder) -> Option<Handler> {
    match instruction.mnemonic() {
        Mnemonic::Add => binary::<Add>(instruction, builder),
        Mnemonic::Adc => binary::<Adc>(instruction, builder),
        Mnemonic::Sub => binary::<Sub>(instruction, builder),
        Mnemonic::Sbb => binary::<Sbb>(instruction, builder),
        Mnemonic::And => binary::<And>(instruction, builder),
        Mnemonic::Or => binary::<Or>(instruction, builder),
        Mnemonic::Xor => binary::<Xor>(instruction, builder),
        Mnemonic::Cmp => compare::<Sub>(instruction, builder),
        Mnemonic::Test => compare::<And>(instruction, builder),
        Mnemonic::Inc => unary::<Inc>(instruction, builder),
        Mnemonic::Dec => unary::<Dec>(instruction, builder),
        Mnemonic::Neg => unary::<Neg>(instruction, builder),
        Mnemonic::Not => unary::<Not>(instruction, builder),
        _ => None,
    }
}

fn binary<O: Binary + 'static>(instruction: &Instruction, builder: &mut OpBuilder) -> Option<Handler> {
    let width = width_index(operand_bytes(instruction, 0))?;
    let form = builder.set_two_operands(instruction)?;
    let clears = matches!(instruction.mnemonic(), Mnemonic::Xor | Mnemonic::Sub)
        && form == Form::RegisterRegister
        && builder.op.first == builder.op.second;
    if clears {
        return Some(widths!(alu::clear, [], [])[width]);
    }
    let table = match form {
        Form::RegisterRegister => widths!(alu::binary, [O], [First, Second]),
        Form::RegisterImmediate => widths!(alu::binary, [O], [First, Immediate]),
        Form::RegisterMemory => widths!(alu::binary, [O], [First, Memory]),
        Form::MemoryRegister => widths!(alu::binary, [O], [Memory, Second]),
        Form::MemoryImmediate => widths!(alu::binary, [O], [Memory, Immediate]),
    };
    Some(table[width])
}

fn compare<O: Binary + 'static>(instruction: &Instruction, builder: &mut OpBuilder) -> Option<Handler> {
    let width = width_index(operand_bytes(instruction, 0))?;
    let table = match builder.set_two_operands(instruction)? {
        Form::RegisterRegister => widths!(alu::compare, [O], [First, Second]),
        Form::RegisterImmediate => widths!(alu::compare, [O], [First, Immediate]),
        Form::RegisterMemory => widths!(alu::compare, [O], [First, Memory]),
        Form::MemoryRegister => widths!(alu::compare, [O], [Memory, Second]),
        Form::MemoryImmediate => widths!(alu::compare, [O], [Memory, Immediate]),
    };
    Some(table[width])
}

fn unary<O: Unary + 'static>(instruction: &Instruction, builder: &mut OpBuilder) -> Option<Handler> {
    let width = width_index(operand_bytes(instruction, 0))?;
    let table = if builder.set_one_operand(instruction)? {
        widths!(alu::unary, [O], [Memory])
    } else {
        widths!(alu::unary, [O], [First])
    };
    Some(table[width])
}
