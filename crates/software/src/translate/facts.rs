//! What translation asks about an instruction more than once: found out when it is decoded.

use iced_x86::{Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register};

use super::forms::{classes, has_same_form, keeps_translations, uses_vectors};
use super::generate::Use;
use super::guest_code::{flag_use, general_register};
use super::x87::{is_x87, uses_mmx};

/// Facts about one instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Facts {
    /// The arithmetic flags that it reads, and those that it surely overwrites.
    pub reads: u32,
    pub kills: u32,
    /// How it uses its memory operand and how many bytes of it; `None` if it has none that one look-up reaches.
    pub memory: Option<(Use, u32)>,
    /// A bit for each general-purpose register that it writes, stack instructions' RSP included.
    pub written: u16,
    /// A bit for each operand that it writes.
    pub written_operands: u8,
    /// As [`classes`].
    pub classes: u8,
    /// As [`has_same_form`], [`keeps_translations`], [`is_x87`], [`uses_vectors`] and [`uses_mmx`].
    pub has_same_form: bool,
    pub keeps_translations: bool,
    pub is_x87: bool,
    pub uses_vectors: bool,
    pub uses_mmx: bool,
}

impl Facts {
    pub fn of(instruction: &Instruction, info: &mut InstructionInfoFactory) -> Facts {
        let (reads, kills) = flag_use(instruction);
        let (memory_access, written, written_operands) =
            simple_accesses(instruction).unwrap_or_else(|| accesses(instruction, info));
        let bytes = instruction.memory_size().size() as u32;
        let reached = bytes != 0 && bytes <= 64 && instruction.mnemonic() != Mnemonic::Lea;
        let uses_vectors = uses_vectors(instruction);
        let uses_mmx = uses_mmx(instruction);
        let has_same_form = has_same_form(instruction);
        let is_x87 = !has_same_form && is_x87(instruction);
        let is_integer = has_same_form && !uses_vectors && !uses_mmx;
        Facts {
            reads,
            kills,
            memory: memory_access.filter(|_| reached).map(|usage| (usage, bytes)),
            written,
            written_operands,
            classes: if is_integer { 0 } else { classes(instruction) },
            has_same_form,
            keeps_translations: has_same_form || is_x87 || keeps_translations(instruction),
            is_x87,
            uses_vectors,
            uses_mmx,
        }
    }
}

type Accesses = (Option<Use>, u16, u8);

fn writes(access: OpAccess) -> bool {
    matches!(access, OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite)
}

fn register_bit(register: Register) -> u16 {
    general_register(register).map_or(0, |(number, _)| 1 << number)
}

/// The use of the memory operand, the registers and the operands that are written.
fn accesses(instruction: &Instruction, info: &mut InstructionInfoFactory) -> Accesses {
    let info = info.info(instruction);
    let mut memory = None;
    let mut written_operands = 0;
    for operand in 0..instruction.op_count() {
        let access = info.op_access(operand);
        written_operands |= u8::from(writes(access)) << operand;
        if memory.is_none() && instruction.op_kind(operand) == OpKind::Memory {
            memory = match access {
                _ if writes(access) => Some(Use::Write),
                OpAccess::Read | OpAccess::CondRead => Some(Use::Read),
                _ => None,
            };
        }
    }
    let used = info.used_registers().iter().filter(|used| writes(used.access()));
    let written = used.fold(0, |written, used| written | register_bit(used.register()));
    (memory, written, written_operands)
}

/// As [`accesses`], for what most code is made of: at most the first operand is written, and no register that is not an operand.
fn simple_accesses(instruction: &Instruction) -> Option<Accesses> {
    use Mnemonic as M;
    let writes_first = match instruction.mnemonic() {
        M::Cmp | M::Test | M::Jo | M::Jno | M::Jb | M::Jae | M::Je | M::Jne | M::Jbe | M::Ja => false,
        M::Js | M::Jns | M::Jp | M::Jnp | M::Jl | M::Jge | M::Jle | M::Jg | M::Jmp => false,
        M::Mov | M::Movzx | M::Movsx | M::Movsxd | M::Lea => true,
        M::Add | M::Sub | M::And | M::Or | M::Xor | M::Adc | M::Sbb | M::Inc | M::Dec | M::Neg | M::Not => true,
        M::Movaps | M::Movups | M::Movdqa | M::Movdqu | M::Movd | M::Movq | M::Pxor | M::Xorps => true,
        M::Seta | M::Setae | M::Setb | M::Setbe | M::Sete | M::Setg | M::Setge | M::Setl | M::Setle | M::Setne => true,
        _ => return None,
    };
    let mut memory = None;
    for operand in 0..instruction.op_count() {
        match instruction.op_kind(operand) {
            OpKind::Memory if instruction.mnemonic() == Mnemonic::Lea => {}
            OpKind::Memory => memory = Some(if writes_first && operand == 0 { Use::Write } else { Use::Read }),
            OpKind::FarBranch16 | OpKind::FarBranch32 => return None,
            _ => {}
        }
    }
    if !writes_first {
        return Some((memory, 0, 0));
    }
    let is_register = instruction.op0_kind() == OpKind::Register;
    let written = if is_register { register_bit(instruction.op0_register()) } else { 0 };
    Some((memory, written, 1))
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions};

    use super::*;
    use crate::ops::against_host::Random;

    #[test]
    fn the_short_way_to_accesses_says_what_the_long_one_does() {
        let mut info = InstructionInfoFactory::new();
        let mut random = Random(7);
        let mut seen = 0;
        for _ in 0..400_000 {
            let mut bytes = [0; 15];
            bytes.fill_with(|| random.next() as u8);
            let instruction = Decoder::with_ip(64, &bytes, 0x1000, DecoderOptions::NONE).decode();
            if let Some(simple) = simple_accesses(&instruction) {
                assert_eq!(simple, accesses(&instruction, &mut info), "{instruction} {bytes:02x?}");
                seen += 1;
            }
        }
        assert!(seen > 50_000, "{seen}");
    }
}
