//! Lowering: from bytes to ops.
//!
//! iced-x86 decodes; [`lower`] checks the instruction against the CPU model, resolves its memory operand, and asks the
//! families in turn for a handler. An instruction that nobody takes raises #UD.
//!
//! Families: `integer` (general-purpose instructions), `system` (privileged, segments, far transfers, interrupts), `vector` (x87, MMX, SSE,
//! AVX and the XSAVE family). Each has a `select` that looks at the instruction's code and fills the op's operands.

mod integer;
mod system;
mod vector;

pub use integer::fuse;
pub(crate) use integer::{condition, has_offset_operand, is_immediate};
pub(crate) use vector::{classes as vector_classes, leaves_pointers as x87_leaves_pointers, x87_opcode};

use iced_x86::{Instruction, OpKind, Register};

use crate::cpu::{BLOCK_RIP, CodeSize, Cpu, ZERO};
use crate::cpu_model::CpuModel;
use crate::op::{Flow, Op, address};

/// What the meaning of bytes depends on beside the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CodeContext {
    pub code: CodeSize,
    /// Instruction pointer of the block's first instruction.
    pub block_rip: u64,
}

/// An op in the making.
pub struct OpBuilder {
    pub op: Op,
    pub context: CodeContext,
    /// Set by families: the block ends after this op.
    pub ends_block: bool,
}

/// Turns one decoded instruction (its `ip` set) into an op; tells whether it ends the block.
pub fn lower(instruction: &Instruction, context: CodeContext) -> (Op, bool) {
    let next_offset = instruction.next_ip().wrapping_sub(context.block_rip) as u16;
    let mut builder = OpBuilder {
        op: Op { next_offset, len: instruction.len() as u8, ..Op::empty(undefined) },
        context,
        ends_block: false,
    };
    if (0..instruction.op_count()).any(|operand| instruction.op_kind(operand) == OpKind::Memory) {
        builder.set_memory(instruction);
    }
    let handler = integer::select(instruction, &mut builder)
        .or_else(|| system::select(instruction, &mut builder))
        .or_else(|| vector::select(instruction, &mut builder));
    match handler {
        Some(handler) => builder.op.handler.set(handler),
        None => builder.ends_block = true,
    }
    (builder.op, builder.ends_block)
}

/// Whether an instruction belongs to the general-purpose family.
#[cfg(test)]
pub fn general_purpose(instruction: &Instruction, context: CodeContext) -> bool {
    let mut builder = OpBuilder { op: Op::empty(undefined), context, ends_block: false };
    integer::select(instruction, &mut builder).is_some()
}

/// As [`lower`] for a processor of this model: instructions that it lacks are undefined.
pub fn lower_for(model: &CpuModel, instruction: &Instruction, context: CodeContext) -> (Op, bool) {
    if instruction.cpuid_features().iter().all(|&kind| model.supports(kind)) {
        return lower(instruction, context);
    }
    let next_offset = instruction.next_ip().wrapping_sub(context.block_rip) as u16;
    (Op { next_offset, len: instruction.len() as u8, ..Op::empty(undefined) }, true)
}

/// Handler of everything that is not an instruction of this processor.
pub extern "sysv64" fn undefined(cpu: &mut Cpu, _op: &Op) -> Flow {
    let _ = cpu.raise_ud();
    Flow::Fault
}

impl OpBuilder {
    /// Resolves the instruction's memory operand (at most one has the form of a ModRM operand).
    fn set_memory(&mut self, instruction: &Instruction) {
        let wide = self.context.code == CodeSize::Bits64;
        let base = instruction.memory_base();
        self.op.segment = match segment_number(instruction.memory_segment()) {
            segment if !wide || segment >= crate::cpu::FS => segment,
            // 64-bit mode ignores the other override prefixes (SDM vol. 1, 3.3.7.1): the base alone decides between #SS and #GP.
            _ if matches!(base, Register::RSP | Register::RBP | Register::ESP | Register::EBP) => crate::cpu::SS,
            _ => crate::cpu::DS,
        };
        let address_bits = address_bits(instruction, self.context.code);
        self.op.address_kind = match (wide, address_bits) {
            (true, 64) if self.op.segment >= crate::cpu::FS => address::BASED,
            (true, 64) => address::FLAT,
            (true, _) => address::CUT,
            (false, 16) => address::CHECKED_16,
            (false, _) => address::CHECKED_32,
        };
        self.op.base = register_number(base).unwrap_or(ZERO as u8);
        self.op.index = register_number(instruction.memory_index()).unwrap_or(ZERO as u8);
        self.op.scale = instruction.memory_index_scale().trailing_zeros() as u8;
        if matches!(base, Register::RIP | Register::EIP) {
            let target = instruction.memory_displacement64();
            let from_block = target.wrapping_sub(self.context.block_rip) as i64;
            self.op.base = BLOCK_RIP as u8;
            match (i32::try_from(from_block), address_bits) {
                (Ok(displacement), 64) => self.op.displacement = displacement,
                (_, 64) => {
                    // Too far from the block's first byte for 32 bits: keep the distance from the next instruction.
                    self.op.displacement = target.wrapping_sub(instruction.next_ip()) as i32;
                    self.op.address_kind = address::NEXT_RIP;
                }
                // Cut to 32 bits afterwards, so only the low 32 bits matter.
                _ => self.op.displacement = from_block as i32,
            }
        } else {
            // A 64-bit displacement exists only in MOV's offset form, which has an operand kind of its own.
            self.op.displacement = instruction.memory_displacement64() as i32;
        }
    }
}

/// The number of a general-purpose register in `cpu.gpr`, for 16, 32 and 64 bits.
pub fn register_number(register: Register) -> Option<u8> {
    (register.is_gpr16() || register.is_gpr32() || register.is_gpr64()).then(|| register.full_register().number() as u8)
}

/// The number of a byte register for [`Cpu::byte`].
pub fn byte_register(register: Register) -> Option<u8> {
    let high = matches!(register, Register::AH | Register::CH | Register::DH | Register::BH);
    register.is_gpr8().then(|| register.full_register().number() as u8 * 8 + u8::from(high))
}

/// The number of a segment register; DS for none.
pub fn segment_number(register: Register) -> u8 {
    match register {
        Register::ES => crate::cpu::ES,
        Register::CS => crate::cpu::CS,
        Register::SS => crate::cpu::SS,
        Register::FS => crate::cpu::FS,
        Register::GS => crate::cpu::GS,
        _ => crate::cpu::DS,
    }
}

/// Address size of the memory operand in bits.
pub fn address_bits(instruction: &Instruction, code: CodeSize) -> u32 {
    let by_register = |register: Register| match register.size() {
        2 => Some(16),
        4 => Some(32),
        8 => Some(64),
        _ => None,
    };
    by_register(instruction.memory_base()).or_else(|| by_register(instruction.memory_index())).unwrap_or_else(|| {
        match instruction.memory_displ_size() {
            2 => 16,
            4 if code == CodeSize::Bits64 => 32,
            4 => 32,
            8 => 64,
            _ if code == CodeSize::Bits64 => 64,
            _ => 32,
        }
    })
}
