//! String instructions.

use iced_x86::{Code, Instruction, OpKind};

use super::form::{width_index, widths};
use crate::cpu::{CodeSize, FS};
use crate::lower::{OpBuilder, segment_number};
use crate::op::{Handler, address};
use crate::ops::string::{self, repeat};

pub fn select(instruction: &Instruction, builder: &mut OpBuilder) -> Option<Handler> {
    use Code::*;
    let (table, bytes) = match instruction.code() {
        Movsb_m8_m8 => (widths!(string::move_string, [], []), 1),
        Movsw_m16_m16 => (widths!(string::move_string, [], []), 2),
        Movsd_m32_m32 => (widths!(string::move_string, [], []), 4),
        Movsq_m64_m64 => (widths!(string::move_string, [], []), 8),
        Stosb_m8_AL => (widths!(string::store_string, [], []), 1),
        Stosw_m16_AX => (widths!(string::store_string, [], []), 2),
        Stosd_m32_EAX => (widths!(string::store_string, [], []), 4),
        Stosq_m64_RAX => (widths!(string::store_string, [], []), 8),
        Lodsb_AL_m8 => (widths!(string::load_string, [], []), 1),
        Lodsw_AX_m16 => (widths!(string::load_string, [], []), 2),
        Lodsd_EAX_m32 => (widths!(string::load_string, [], []), 4),
        Lodsq_RAX_m64 => (widths!(string::load_string, [], []), 8),
        Scasb_AL_m8 => (widths!(string::scan_string, [], []), 1),
        Scasw_AX_m16 => (widths!(string::scan_string, [], []), 2),
        Scasd_EAX_m32 => (widths!(string::scan_string, [], []), 4),
        Scasq_RAX_m64 => (widths!(string::scan_string, [], []), 8),
        Cmpsb_m8_m8 => (widths!(string::compare_strings, [], []), 1),
        Cmpsw_m16_m16 => (widths!(string::compare_strings, [], []), 2),
        Cmpsd_m32_m32 => (widths!(string::compare_strings, [], []), 4),
        Cmpsq_m64_m64 => (widths!(string::compare_strings, [], []), 8),
        _ => return None,
    };
    set_string_operands(instruction, builder);
    Some(table[width_index(bytes)?])
}

/// Fills segment, address kind and repeat prefix (`extra`) of a string instruction.
pub fn set_string_operands(instruction: &Instruction, builder: &mut OpBuilder) {
    builder.op.segment = segment_number(instruction.memory_segment());
    let kinds = [instruction.op0_kind(), instruction.op1_kind()];
    let is_16 = |kind: &OpKind| matches!(kind, OpKind::MemorySegSI | OpKind::MemoryESDI | OpKind::MemorySegDI);
    let is_32 = |kind: &OpKind| matches!(kind, OpKind::MemorySegESI | OpKind::MemoryESEDI | OpKind::MemorySegEDI);
    let wide = builder.context.code == CodeSize::Bits64;
    builder.op.address_kind = if kinds.iter().any(is_16) {
        address::CHECKED_16
    } else if kinds.iter().any(is_32) {
        if wide { address::CUT } else { address::CHECKED_32 }
    } else if builder.op.segment >= FS {
        address::BASED
    } else {
        address::FLAT
    };
    builder.op.extra = if instruction.has_repne_prefix() {
        repeat::NOT_EQUAL
    } else if instruction.has_rep_prefix() {
        repeat::EQUAL
    } else {
        repeat::NONE
    };
}
