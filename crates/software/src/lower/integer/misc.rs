//! Flags, fences, hints and the rest.

use iced_x86::{Code, Instruction, Mnemonic};

use super::form::{any_register, operand_bytes, width_index, widths_from_16};
use crate::lower::OpBuilder;
use crate::op::Handler;
use crate::ops::misc;

pub fn select(instruction: &Instruction, builder: &mut OpBuilder) -> Option<Handler> {
    match instruction.mnemonic() {
        // PREFETCHW's opcode with a register: processors that know PREFETCHW raise #UD.
        Mnemonic::Reservednop if is_prefetch_of_register(instruction.code()) => None,
        // Hints of processors that this model does not name do nothing, as their encodings say.
        Mnemonic::Nop
        | Mnemonic::Reservednop
        | Mnemonic::Endbr32
        | Mnemonic::Endbr64
        | Mnemonic::Rdsspd
        | Mnemonic::Rdsspq
        | Mnemonic::Cldemote
        | Mnemonic::Prefetch
        | Mnemonic::Prefetchnta
        | Mnemonic::Prefetcht0
        | Mnemonic::Prefetcht1
        | Mnemonic::Prefetcht2
        | Mnemonic::Prefetchit0
        | Mnemonic::Prefetchit1
        | Mnemonic::Prefetchw
        | Mnemonic::Prefetchwt1 => Some(misc::nothing),
        Mnemonic::Pause => Some(misc::pause),
        Mnemonic::Mfence => Some(misc::full_fence),
        Mnemonic::Lfence => Some(misc::load_fence),
        Mnemonic::Sfence => Some(misc::store_fence),
        Mnemonic::Clflush | Mnemonic::Clflushopt | Mnemonic::Clwb => Some(misc::flush_line),
        Mnemonic::Clc => Some(misc::change_carry),
        Mnemonic::Stc => {
            builder.op.extra = 1;
            Some(misc::change_carry)
        }
        Mnemonic::Cmc => {
            builder.op.extra = 2;
            Some(misc::change_carry)
        }
        Mnemonic::Cld => Some(misc::clear_direction),
        Mnemonic::Std => Some(misc::set_direction),
        Mnemonic::Lahf => Some(misc::load_flags),
        Mnemonic::Sahf => Some(misc::store_flags),
        Mnemonic::Salc => Some(misc::set_al_on_carry),
        Mnemonic::Rdrand | Mnemonic::Rdseed => {
            builder.op.first = any_register(instruction.op0_register())?;
            builder.op.extra = u8::from(instruction.mnemonic() == Mnemonic::Rdseed);
            widths_from_16!(misc::random, [], [])[width_index(operand_bytes(instruction, 0))?]
        }
        Mnemonic::Rdpid => {
            builder.op.first = any_register(instruction.op0_register())?;
            Some(misc::read_processor_id)
        }
        Mnemonic::Bound => {
            builder.op.first = any_register(instruction.op0_register())?;
            Some(if instruction.op0_register().size() == 2 { misc::bound::<u16> } else { misc::bound::<u32> })
        }
        _ => None,
    }
}

fn is_prefetch_of_register(code: Code) -> bool {
    matches!(code, Code::Reservednop_rm16_r16_0F0D | Code::Reservednop_rm32_r32_0F0D | Code::Reservednop_rm64_r64_0F0D)
}
