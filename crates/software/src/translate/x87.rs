//! x87 and MMX in translated code.
//!
//! The guest's x87 registers live in the host's while the vCPU's thread runs, so that these instructions are emitted as themselves.
//! An exception that the guest has unmasked raises SIGFPE at the next instruction that waits, as it should; the
//! interpreter takes over there. Only the pointers to the last instruction and its operand are kept by hand (SDM vol. 1, 8.1.8): a
//! row of x87 instructions stores them once, after its last one, and so do the ways out in between.

use std::mem::offset_of;

use iced_x86::{CpuidFeature, Instruction, Mnemonic, OpKind, Register};

use super::assembler::Mem;
use super::forms::{has_wide_address, set_memory};
use super::frame::cpu_field;
use super::generate::{Generator, Result, Use};
use super::guest_code::Item;
use super::memory::LOOKED_UP;
use super::registers::{ADDRESS, SPARE};
use crate::cpu::{CS, CodeSize, Cpu, DS, SS};
use crate::lower::{x87_leaves_pointers, x87_opcode};
use crate::vector::{Pointers, VectorState};

/// An x87 instruction, as the pointers name it.
#[derive(Debug, Clone, Copy)]
pub struct X87Site {
    pub rip: u64,
    opcode: u16,
    /// The segment register of its memory operand, whose address is stored already.
    segment: Option<u8>,
}

/// A field of the guest's x87 pointers.
const fn pointer(field: usize) -> Mem {
    cpu_field(offset_of!(Cpu, vector) + offset_of!(VectorState, pointers) + field)
}

/// The selector of a segment register.
pub fn selector(segment: u8) -> Mem {
    use polder_machine::state::SegmentState;
    cpu_field(
        offset_of!(Cpu, segments)
            + usize::from(segment) * size_of::<SegmentState>()
            + offset_of!(SegmentState, selector),
    )
}

/// Whether it is an instruction of the x87 unit.
pub fn is_x87(instruction: &Instruction) -> bool {
    instruction
        .cpuid_features()
        .iter()
        .any(|feature| matches!(feature, CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387))
}

/// Whether an instruction is emitted as itself and leaves its address in the pointers.
pub fn leaves_pointers(instruction: &Instruction) -> bool {
    is_x87(instruction)
        && has_form(instruction)
        && instruction.mnemonic() != Mnemonic::Wait
        && x87_leaves_pointers(instruction)
}

/// x87 instructions that only the interpreter knows: those that take environments, and relics.
fn has_form(instruction: &Instruction) -> bool {
    use Mnemonic::*;
    !matches!(
        instruction.mnemonic(),
        Fninit | Fnstenv | Fldenv | Fnsave | Frstor | Fneni | Fndisi | Fnsetpm | Frstpm | Fstdw | Fstsg
    )
}

/// Whether MMX registers are involved.
pub fn uses_mmx(instruction: &Instruction) -> bool {
    instruction.mnemonic() == Mnemonic::Emms
        || (0..instruction.op_count())
            .any(|operand| instruction.op_kind(operand) == OpKind::Register && instruction.op_register(operand).is_mm())
}

impl Generator<'_> {
    /// Emits an x87 instruction as itself. `false`: it has no such form here.
    pub fn x87_form(&mut self, item: &Item) -> Result<bool> {
        let guest = &item.instruction;
        if !item.facts.is_x87 || !has_form(guest) {
            return Ok(false);
        }
        let leaves_pointers = leaves_pointers(guest);
        let live = item.live_before != 0;
        let memory = (0..guest.op_count()).any(|operand| guest.op_kind(operand) == OpKind::Memory);
        if !memory {
            self.need_x87(live);
            self.may_fault(guest.ip());
            self.encode(guest)?;
            if leaves_pointers {
                self.last_x87 = Some(site(guest, None));
            }
            return Ok(true);
        }
        let segment = guest.memory_segment();
        if !has_wide_address(guest) || matches!(segment, Register::FS | Register::GS) {
            self.store_x87_pointers();
            return Ok(false);
        }
        let bytes = guest.memory_size().size() as u32;
        let usage = item.facts.memory.map_or(Use::Write, |(usage, _)| usage);
        self.need_x87(live);
        self.memory_address(item)?;
        self.look_up(item, bytes, usage, live);
        let mut host = *guest;
        set_memory(&mut host, LOOKED_UP.mem);
        self.may_fault(guest.ip());
        self.encode(&host)?;
        if leaves_pointers {
            self.asm.store(pointer(offset_of!(Pointers, data)), ADDRESS);
            self.last_x87 = Some(site(guest, Some(segment)));
        }
        if usage == Use::Write {
            self.check_note(item, bytes, LOOKED_UP, Some(guest.next_ip()));
        }
        Ok(true)
    }

    /// Stores the pointers of the last x87 instruction, if that is still to be done. Uses SPARE, changes no flag.
    pub fn store_x87_pointers(&mut self) {
        if let Some(site) = self.last_x87.take() {
            self.store_pointers_of(site);
        }
    }

    /// Stores the pointers of an x87 instruction. Uses SPARE, changes no flag.
    pub fn store_pointers_of(&mut self, site: X87Site) {
        self.store_linear(pointer(offset_of!(Pointers, instruction)), site.rip, SPARE);
        self.asm.store16_imm(pointer(offset_of!(Pointers, opcode)), site.opcode);
        self.asm.load_u16(SPARE, selector(CS));
        self.asm.store16(pointer(offset_of!(Pointers, code_selector)), SPARE);
        match site.segment {
            Some(segment) => {
                self.asm.load_u16(SPARE, selector(segment));
                self.asm.store16(pointer(offset_of!(Pointers, data_selector)), SPARE);
            }
            None => {
                self.asm.store16_imm(pointer(offset_of!(Pointers, data_selector)), 0);
                self.asm.store_imm(pointer(offset_of!(Pointers, data)), 0);
            }
        }
    }
}

fn site(guest: &Instruction, segment: Option<Register>) -> X87Site {
    // Other segments than FS and GS mean nothing here: the base decides (SDM vol. 1, 3.7.4).
    let segment = segment.map(|_| match guest.memory_base() {
        Register::RSP | Register::RBP => SS,
        _ => DS,
    });
    X87Site { rip: guest.ip(), opcode: x87_opcode(guest, CodeSize::Bits64), segment }
}

impl Cpu {
    /// Remembers an x87 instruction after which the host faulted before code had stored its pointers.
    pub(super) fn remember_x87(&mut self, site: X87Site) {
        let pointers = &mut self.vector.pointers;
        pointers.instruction = site.rip;
        pointers.opcode = site.opcode;
        pointers.code_selector = self.segments[usize::from(CS)].selector;
        match site.segment {
            Some(segment) => pointers.data_selector = self.segments[usize::from(segment)].selector,
            None => (pointers.data, pointers.data_selector) = (0, 0),
        }
    }
}
