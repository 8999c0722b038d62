//! LOCK forms, and the instructions that are always atomic here.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::form::{Form, operand_bytes, width_index, widths, widths_from_16};
use crate::lower::OpBuilder;
use crate::op::Handler;
use crate::ops::alu::{Adc, Add, And, Dec, Inc, Neg, Not, Or, Sbb, Sub, Xor};
use crate::ops::atomic::{self, LockedBinary, LockedBit, LockedUnary};
use crate::ops::bits::{Complement, Reset, Set};
use crate::ops::operand::{Immediate, Second};

pub fn select(instruction: &Instruction, builder: &mut OpBuilder) -> Option<Handler> {
    let locked = instruction.has_lock_prefix();
    match instruction.mnemonic() {
        Mnemonic::Xchg => {
            // XCHG's memory operand may come first or second.
            let memory_second = instruction.op1_kind() == OpKind::Memory;
            let width = width_index(operand_bytes(instruction, 0))?;
            builder.set_two_operands(instruction)?;
            if memory_second {
                builder.op.second = builder.op.first;
            }
            Some(widths!(atomic::exchange, [], [])[width])
        }
        Mnemonic::Xadd => {
            let width = width_index(operand_bytes(instruction, 0))?;
            let table = match builder.set_two_operands(instruction)? {
                Form::RegisterRegister => widths!(atomic::exchange_add_registers, [], []),
                _ => widths!(atomic::exchange_add, [], []),
            };
            Some(table[width])
        }
        Mnemonic::Cmpxchg => {
            let width = width_index(operand_bytes(instruction, 0))?;
            let table = match builder.set_two_operands(instruction)? {
                Form::RegisterRegister => widths!(atomic::compare_exchange_registers, [], []),
                _ => widths!(atomic::compare_exchange, [], []),
            };
            Some(table[width])
        }
        Mnemonic::Cmpxchg8b => Some(atomic::compare_exchange_8_bytes),
        Mnemonic::Cmpxchg16b => Some(atomic::compare_exchange_16_bytes),
        Mnemonic::Add if locked => binary::<Add>(instruction, builder),
        Mnemonic::Adc if locked => binary::<Adc>(instruction, builder),
        Mnemonic::Sub if locked => binary::<Sub>(instruction, builder),
        Mnemonic::Sbb if locked => binary::<Sbb>(instruction, builder),
        Mnemonic::And if locked => binary::<And>(instruction, builder),
        Mnemonic::Or if locked => binary::<Or>(instruction, builder),
        Mnemonic::Xor if locked => binary::<Xor>(instruction, builder),
        Mnemonic::Inc if locked => unary::<Inc>(instruction),
        Mnemonic::Dec if locked => unary::<Dec>(instruction),
        Mnemonic::Neg if locked => unary::<Neg>(instruction),
        Mnemonic::Not if locked => unary::<Not>(instruction),
        Mnemonic::Bts if locked => bit::<Set>(instruction, builder),
        Mnemonic::Btr if locked => bit::<Reset>(instruction, builder),
        Mnemonic::Btc if locked => bit::<Complement>(instruction, builder),
        _ => None,
    }
}

fn binary<O: LockedBinary + 'static>(instruction: &Instruction, builder: &mut OpBuilder) -> Option<Handler> {
    let width = width_index(operand_bytes(instruction, 0))?;
    let table = match builder.set_two_operands(instruction)? {
        Form::MemoryRegister => widths!(atomic::binary, [O], [Second]),
        Form::MemoryImmediate => widths!(atomic::binary, [O], [Immediate]),
        _ => return None,
    };
    Some(table[width])
}

fn unary<O: LockedUnary + 'static>(instruction: &Instruction) -> Option<Handler> {
    let width = width_index(operand_bytes(instruction, 0))?;
    (instruction.op0_kind() == OpKind::Memory).then(|| widths!(atomic::unary, [O], [])[width])
}

fn bit<O: LockedBit + 'static>(instruction: &Instruction, builder: &mut OpBuilder) -> Option<Handler> {
    let width = width_index(operand_bytes(instruction, 0))?;
    let form = builder.set_two_operands(instruction)?;
    builder.op.extra = u8::from(form == Form::MemoryRegister);
    match form {
        Form::MemoryRegister => widths_from_16!(atomic::bit, [O], [Second])[width],
        Form::MemoryImmediate => widths_from_16!(atomic::bit, [O], [Immediate])[width],
        _ => None,
    }
}
