//! MOV and its kin.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::form::{
    Form, any_register, condition, conditions, has_offset_operand, operand_bytes, width_index, widths, widths_from_16,
};
use crate::lower::OpBuilder;
use crate::op::{Handler, address};
use crate::ops::movement;
use crate::ops::operand::{First, Immediate, Memory, Second};

pub fn select(instruction: &Instruction, builder: &mut OpBuilder) -> Option<Handler> {
    match instruction.mnemonic() {
        Mnemonic::Mov => mov(instruction, builder),
        Mnemonic::Movzx | Mnemonic::Movsx | Mnemonic::Movsxd => extend(instruction, builder),
        Mnemonic::Movbe => {
            let width = width_index(operand_bytes(instruction, 0))?;
            let table = match builder.set_two_operands(instruction)? {
                Form::RegisterMemory => widths_from_16!(movement::load_swapped, [], []),
                _ => widths_from_16!(movement::store_swapped, [], []),
            };
            table[width]
        }
        Mnemonic::Bswap => {
            let width = width_index(operand_bytes(instruction, 0))?;
            builder.set_one_operand(instruction)?;
            widths_from_16!(movement::byte_swap, [], [])[width]
        }
        Mnemonic::Xchg if instruction.op0_kind() == OpKind::Register && instruction.op1_kind() == OpKind::Register => {
            let width = width_index(operand_bytes(instruction, 0))?;
            builder.set_two_operands(instruction)?;
            Some(widths!(movement::exchange, [], [])[width])
        }
        Mnemonic::Lea => {
            builder.op.first = any_register(instruction.op0_register())?;
            let flat = matches!(builder.op.address_kind, address::FLAT | address::BASED);
            match instruction.op0_register().size() {
                2 => Some(movement::load_address::<u16>),
                4 => Some(movement::load_address::<u32>),
                _ if flat => Some(movement::load_address_flat),
                _ => Some(movement::load_address::<u64>),
            }
        }
        Mnemonic::Xlatb => Some(movement::translate_byte),
        Mnemonic::Cbw => Some(movement::extend_accumulator::<u8, u16>),
        Mnemonic::Cwde => Some(movement::extend_accumulator::<u16, u32>),
        Mnemonic::Cdqe => Some(movement::extend_accumulator::<u32, u64>),
        Mnemonic::Cwd => Some(movement::extend_to_data::<u16>),
        Mnemonic::Cdq => Some(movement::extend_to_data::<u32>),
        Mnemonic::Cqo => Some(movement::extend_to_data::<u64>),
        _ if instruction.code().is_jcc_short_or_near() => None,
        _ if instruction.op_count() == 2 => move_if(instruction, builder),
        _ => set_if(instruction, builder),
    }
}

fn mov(instruction: &Instruction, builder: &mut OpBuilder) -> Option<Handler> {
    if has_offset_operand(instruction) {
        let bytes = operand_bytes(instruction, 0);
        builder.op.immediate = instruction.memory_displacement64();
        builder.op.extra = u8::from(instruction.op0_kind() == OpKind::Memory);
        return Some(widths!(movement::at_offset, [], [])[width_index(bytes)?]);
    }
    let width = width_index(operand_bytes(instruction, 0))?;
    let table = match builder.set_two_operands(instruction)? {
        Form::RegisterRegister => widths!(movement::to_register, [], [Second]),
        Form::RegisterImmediate => widths!(movement::to_register, [], [Immediate]),
        Form::RegisterMemory => widths!(movement::to_register, [], [Memory]),
        Form::MemoryRegister => widths!(movement::to_memory, [], [Second]),
        Form::MemoryImmediate => widths!(movement::to_memory, [], [Immediate]),
    };
    Some(table[width])
}

fn extend(instruction: &Instruction, builder: &mut OpBuilder) -> Option<Handler> {
    let (from, to) = (operand_bytes(instruction, 1), operand_bytes(instruction, 0));
    let is_memory = builder.set_two_operands(instruction)? == Form::RegisterMemory;
    let zero = instruction.mnemonic() == Mnemonic::Movzx;
    macro_rules! pick {
        ($from:ty, $to:ty) => {
            Some(match (zero, is_memory) {
                (true, false) => movement::zero_extend::<$from, $to, Second>,
                (true, true) => movement::zero_extend::<$from, $to, Memory>,
                (false, false) => movement::sign_extend::<$from, $to, Second>,
                (false, true) => movement::sign_extend::<$from, $to, Memory>,
            })
        };
    }
    match (from, to) {
        (1, 2) => pick!(u8, u16),
        (1, 4) => pick!(u8, u32),
        (1, 8) => pick!(u8, u64),
        (2, 2) => pick!(u16, u16),
        (2, 4) => pick!(u16, u32),
        (2, 8) => pick!(u16, u64),
        (4, 4) => pick!(u32, u32),
        (4, 8) => pick!(u32, u64),
        _ => None,
    }
}

/// CMOVcc: the only instructions with a condition code and two operands.
fn move_if(instruction: &Instruction, builder: &mut OpBuilder) -> Option<Handler> {
    let condition = condition(instruction)?;
    if !instruction.op0_register().is_gpr() {
        return None;
    }
    let form = builder.set_two_operands(instruction)?;
    let is_memory = form == Form::RegisterMemory;
    let table = match (instruction.op0_register().size(), is_memory) {
        (2, false) => conditions!(movement::move_if, u16, Second),
        (2, true) => conditions!(movement::move_if, u16, Memory),
        (4, false) => conditions!(movement::move_if, u32, Second),
        (4, true) => conditions!(movement::move_if, u32, Memory),
        (_, false) => conditions!(movement::move_if, u64, Second),
        (_, true) => conditions!(movement::move_if, u64, Memory),
    };
    Some(table[condition])
}

/// SETcc: the only instructions with a condition code and one operand of a byte.
fn set_if(instruction: &Instruction, builder: &mut OpBuilder) -> Option<Handler> {
    let condition = condition(instruction)?;
    let is_byte = match instruction.op0_kind() {
        OpKind::Register => instruction.op0_register().is_gpr8(),
        OpKind::Memory => instruction.op0_register() == Register::None && operand_bytes(instruction, 0) == 1,
        _ => false,
    };
    if !is_byte || instruction.op_count() != 1 {
        return None;
    }
    let table = if builder.set_one_operand(instruction)? {
        conditions!(movement::set_if, Memory)
    } else {
        conditions!(movement::set_if, First)
    };
    Some(table[condition])
}
