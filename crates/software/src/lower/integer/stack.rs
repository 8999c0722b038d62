//! PUSH, POP and their kin.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::form::{any_register, is_immediate, width_index, widths_from_16};
use crate::cpu::CodeSize;
use crate::lower::{OpBuilder, segment_number};
use crate::op::Handler;
use crate::ops::operand::{Immediate, Memory, Second};
use crate::ops::stack;

pub fn select(instruction: &Instruction, builder: &mut OpBuilder) -> Option<Handler> {
    let bytes = instruction.stack_pointer_increment().unsigned_abs() as usize;
    match instruction.mnemonic() {
        Mnemonic::Push => push(instruction, builder, width_index(bytes)?),
        Mnemonic::Pop => pop(instruction, builder, width_index(bytes)?),
        Mnemonic::Pushf => Some(stack::push_flags::<u16>),
        Mnemonic::Pushfd => Some(stack::push_flags::<u32>),
        Mnemonic::Pushfq => Some(stack::push_flags::<u64>),
        Mnemonic::Popf => Some(stack::pop_flags::<u16>),
        Mnemonic::Popfd => Some(stack::pop_flags::<u32>),
        Mnemonic::Popfq => Some(stack::pop_flags::<u64>),
        Mnemonic::Pusha => Some(stack::push_all::<u16>),
        Mnemonic::Pushad => Some(stack::push_all::<u32>),
        Mnemonic::Popa => Some(stack::pop_all::<u16>),
        Mnemonic::Popad => Some(stack::pop_all::<u32>),
        Mnemonic::Enter => {
            builder.op.immediate = u64::from(instruction.immediate16());
            builder.op.extra = instruction.immediate8_2nd() & 31;
            let operand_bytes = match instruction.code() {
                iced_x86::Code::Enterw_imm16_imm8 => 2,
                iced_x86::Code::Enterd_imm16_imm8 => 4,
                _ => 8,
            };
            widths_from_16!(stack::enter, [], [])[width_index(operand_bytes)?]
        }
        Mnemonic::Leave => {
            let operand_bytes = match instruction.code() {
                iced_x86::Code::Leavew => 2,
                iced_x86::Code::Leaved => 4,
                _ => 8,
            };
            widths_from_16!(stack::leave, [], [])[width_index(operand_bytes)?]
        }
        _ => None,
    }
}

fn push(instruction: &Instruction, builder: &mut OpBuilder, width: usize) -> Option<Handler> {
    match instruction.op0_kind() {
        OpKind::Register if instruction.op0_register().is_segment_register() => {
            builder.op.first = segment_number(instruction.op0_register());
            widths_from_16!(stack::push_segment, [], [])[width]
        }
        OpKind::Register => {
            let register = any_register(instruction.op0_register())?;
            (builder.op.first, builder.op.second) = (register, register);
            if builder.context.code == CodeSize::Bits64 && width == 3 {
                return Some(stack::push_register_64);
            }
            widths_from_16!(stack::push, [], [Second])[width]
        }
        OpKind::Memory => widths_from_16!(stack::push, [], [Memory])[width],
        kind if is_immediate(kind) => {
            builder.op.immediate = instruction.immediate(0);
            widths_from_16!(stack::push, [], [Immediate])[width]
        }
        _ => None,
    }
}

fn pop(instruction: &Instruction, builder: &mut OpBuilder, width: usize) -> Option<Handler> {
    match instruction.op0_kind() {
        // Loads of segment registers belong to the system instructions.
        OpKind::Register if instruction.op0_register().is_segment_register() => None,
        OpKind::Register => {
            builder.op.first = any_register(instruction.op0_register())?;
            if builder.context.code == CodeSize::Bits64 && width == 3 {
                return Some(stack::pop_register_64);
            }
            widths_from_16!(stack::pop_register, [], [])[width]
        }
        OpKind::Memory => widths_from_16!(stack::pop_memory, [], [])[width],
        _ => None,
    }
}
