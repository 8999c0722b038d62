//! Near jumps, calls, returns, loops.

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use super::form::{any_register, condition, conditions};
use crate::cpu::CodeSize;
use crate::lower::OpBuilder;
use crate::op::{Handler, address};
use crate::ops::branch;
use crate::ops::operand::{Memory, Second};

pub fn select(instruction: &Instruction, builder: &mut OpBuilder) -> Option<Handler> {
    let handler = match instruction.op0_kind() {
        OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => relative(instruction, builder)?,
        _ => indirect(instruction, builder)?,
    };
    builder.ends_block = true;
    Some(handler)
}

fn relative(instruction: &Instruction, builder: &mut OpBuilder) -> Option<Handler> {
    builder.op.immediate = instruction.near_branch_target().wrapping_sub(builder.context.block_rip);
    let (wide, bytes) = match instruction.op0_kind() {
        OpKind::NearBranch16 => (false, 2),
        OpKind::NearBranch32 => (false, 4),
        _ => (true, 8),
    };
    builder.op.extra2 = bytes;
    let code = instruction.code();
    if code.is_jcc_short_or_near() {
        let table = if wide { conditions!(branch::jump_if_64) } else { conditions!(branch::jump_if) };
        return Some(table[condition(instruction)?]);
    }
    if code.is_jmp_short_or_near() {
        return Some(if wide { branch::jump_64 } else { branch::jump });
    }
    if code.is_call_near() {
        return Some(match bytes {
            2 => branch::call::<u16>,
            4 => branch::call::<u32>,
            _ => branch::call_64,
        });
    }
    let (kind, counter) = match instruction.mnemonic() {
        Mnemonic::Loopne => (0, loop_counter_bytes(code)),
        Mnemonic::Loope => (1, loop_counter_bytes(code)),
        Mnemonic::Loop => (2, loop_counter_bytes(code)),
        Mnemonic::Jcxz => (3, 2),
        Mnemonic::Jecxz => (3, 4),
        Mnemonic::Jrcxz => (3, 8),
        _ => return None,
    };
    builder.op.extra = kind;
    builder.op.address_kind = match counter {
        2 => address::CHECKED_16,
        4 => address::CHECKED_32,
        _ => address::FLAT,
    };
    Some(branch::count_loop)
}

/// The size of the register that a LOOP counts in.
fn loop_counter_bytes(code: Code) -> u32 {
    use Code::*;
    match code {
        Loopne_rel8_16_CX | Loopne_rel8_32_CX | Loope_rel8_16_CX | Loope_rel8_32_CX | Loop_rel8_16_CX
        | Loop_rel8_32_CX => 2,
        Loopne_rel8_16_ECX | Loopne_rel8_32_ECX | Loopne_rel8_64_ECX | Loope_rel8_16_ECX | Loope_rel8_32_ECX
        | Loope_rel8_64_ECX | Loop_rel8_16_ECX | Loop_rel8_32_ECX | Loop_rel8_64_ECX => 4,
        _ => 8,
    }
}

fn indirect(instruction: &Instruction, builder: &mut OpBuilder) -> Option<Handler> {
    let wide = builder.context.code == CodeSize::Bits64;
    if instruction.op0_kind() == OpKind::Register
        && (instruction.is_jmp_near_indirect() || instruction.is_call_near_indirect())
    {
        builder.op.second = any_register(instruction.op0_register())?;
    }
    Some(match instruction.code() {
        Code::Jmp_rm16 if is_register(instruction) => branch::jump_indirect::<u16, Second>,
        Code::Jmp_rm32 if is_register(instruction) => branch::jump_indirect::<u32, Second>,
        Code::Jmp_rm64 if is_register(instruction) => branch::jump_indirect::<u64, Second>,
        Code::Jmp_rm16 => branch::jump_indirect::<u16, Memory>,
        Code::Jmp_rm32 => branch::jump_indirect::<u32, Memory>,
        Code::Jmp_rm64 => branch::jump_indirect::<u64, Memory>,
        Code::Call_rm16 if is_register(instruction) => branch::call_indirect::<u16, Second>,
        Code::Call_rm32 if is_register(instruction) => branch::call_indirect::<u32, Second>,
        Code::Call_rm64 if is_register(instruction) => branch::call_indirect::<u64, Second>,
        Code::Call_rm16 => branch::call_indirect::<u16, Memory>,
        Code::Call_rm32 => branch::call_indirect::<u32, Memory>,
        Code::Call_rm64 => branch::call_indirect::<u64, Memory>,
        Code::Retnw => branch::return_near::<u16>,
        Code::Retnd => branch::return_near::<u32>,
        Code::Retnq if wide => branch::return_64,
        Code::Retnw_imm16 | Code::Retnd_imm16 | Code::Retnq_imm16 => {
            builder.op.immediate = instruction.immediate(0);
            match instruction.code() {
                Code::Retnw_imm16 => branch::return_near::<u16>,
                Code::Retnd_imm16 => branch::return_near::<u32>,
                _ => branch::return_near::<u64>,
            }
        }
        _ => return None,
    })
}

fn is_register(instruction: &Instruction) -> bool {
    instruction.op0_kind() == OpKind::Register
}
