//! ADD to XOR, INC to NOT, shifts, multiplications and divisions, decimal adjustments.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::form::{Form, operand_bytes, width_index, widths, widths_from_16};
use crate::lower::OpBuilder;
use crate::op::Handler;
use crate::ops::alu::{self, Adc, Add, And, Binary, Dec, Inc, Neg, Not, Or, Sbb, Sub, Unary, Xor};
use crate::ops::decimal;
use crate::ops::multiply::{self, Imul, Mul, Multiply};
use crate::ops::operand::{First, Immediate, Memory, Second};
use crate::ops::shift::{self, DoubleShift, Rcl, Rcr, Rol, Ror, Sar, Shift, Shl, Shld, Shr, Shrd};

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
        Mnemonic::Shl | Mnemonic::Sal => shift::<Shl>(instruction, builder),
        Mnemonic::Shr => shift::<Shr>(instruction, builder),
        Mnemonic::Sar => shift::<Sar>(instruction, builder),
        Mnemonic::Rol => shift::<Rol>(instruction, builder),
        Mnemonic::Ror => shift::<Ror>(instruction, builder),
        Mnemonic::Rcl => shift::<Rcl>(instruction, builder),
        Mnemonic::Rcr => shift::<Rcr>(instruction, builder),
        Mnemonic::Shld => double_shift::<Shld>(instruction, builder),
        Mnemonic::Shrd => double_shift::<Shrd>(instruction, builder),
        Mnemonic::Mul => multiply::<Mul>(instruction, builder),
        Mnemonic::Imul if instruction.op_count() == 1 => multiply::<Imul>(instruction, builder),
        Mnemonic::Imul => signed_multiply(instruction, builder),
        Mnemonic::Div => divide(instruction, builder, Division::Unsigned),
        Mnemonic::Idiv => divide(instruction, builder, Division::Signed),
        Mnemonic::Aaa => Some(decimal::aaa),
        Mnemonic::Aas => Some(decimal::aas),
        Mnemonic::Daa => Some(decimal::daa),
        Mnemonic::Das => Some(decimal::das),
        Mnemonic::Aam | Mnemonic::Aad => {
            builder.op.immediate = instruction.immediate(0);
            let multiplies = instruction.mnemonic() == Mnemonic::Aam;
            Some(if multiplies { multiply::adjust_after_multiply } else { decimal::aad })
        }
        _ => None,
    }
}

fn shift<O: Shift + 'static>(instruction: &Instruction, builder: &mut OpBuilder) -> Option<Handler> {
    let width = width_index(operand_bytes(instruction, 0))?;
    let is_memory = builder.set_one_operand(instruction)?;
    let by_cl = instruction.op1_kind() == OpKind::Register;
    if !by_cl {
        builder.op.immediate = instruction.immediate(1);
    }
    let table = match (by_cl, is_memory) {
        (false, false) => widths!(shift::by_immediate, [O], [First]),
        (false, true) => widths!(shift::by_immediate, [O], [Memory]),
        (true, false) => widths!(shift::by_cl, [O], [First]),
        (true, true) => widths!(shift::by_cl, [O], [Memory]),
    };
    Some(table[width])
}

fn double_shift<O: DoubleShift + 'static>(instruction: &Instruction, builder: &mut OpBuilder) -> Option<Handler> {
    let width = width_index(operand_bytes(instruction, 0))?;
    let form = builder.set_two_operands(instruction)?;
    if instruction.op2_kind() == OpKind::Register {
        builder.op.extra = 1;
    } else {
        builder.op.immediate = instruction.immediate(2);
    }
    let table = match form {
        Form::RegisterRegister => widths_from_16!(shift::double, [O], [First]),
        _ => widths_from_16!(shift::double, [O], [Memory]),
    };
    table[width]
}

fn multiply<O: Multiply + 'static>(instruction: &Instruction, builder: &mut OpBuilder) -> Option<Handler> {
    let width = width_index(operand_bytes(instruction, 0))?;
    let table = if builder.set_one_operand(instruction)? {
        widths!(multiply::multiply, [O], [Memory])
    } else {
        widths!(multiply::multiply, [O], [First])
    };
    Some(table[width])
}

fn signed_multiply(instruction: &Instruction, builder: &mut OpBuilder) -> Option<Handler> {
    let width = width_index(operand_bytes(instruction, 0))?;
    let form = builder.set_two_operands(instruction)?;
    let three = instruction.op_count() == 3;
    if three {
        builder.op.immediate = instruction.immediate(2);
    }
    let table = match (three, form) {
        (false, Form::RegisterRegister) => widths_from_16!(multiply::signed_multiply, [], [Second]),
        (false, _) => widths_from_16!(multiply::signed_multiply, [], [Memory]),
        (true, Form::RegisterRegister) => widths_from_16!(multiply::signed_multiply_immediate, [], [Second]),
        (true, _) => widths_from_16!(multiply::signed_multiply_immediate, [], [Memory]),
    };
    table[width]
}

enum Division {
    Signed,
    Unsigned,
}

fn divide(instruction: &Instruction, builder: &mut OpBuilder, division: Division) -> Option<Handler> {
    let width = width_index(operand_bytes(instruction, 0))?;
    let is_memory = builder.set_one_operand(instruction)?;
    let table = match (division, is_memory) {
        (Division::Unsigned, false) => widths!(multiply::divide, [], [First]),
        (Division::Unsigned, true) => widths!(multiply::divide, [], [Memory]),
        (Division::Signed, false) => widths!(multiply::signed_divide, [], [First]),
        (Division::Signed, true) => widths!(multiply::signed_divide, [], [Memory]),
    };
    Some(table[width])
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
