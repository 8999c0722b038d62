//! Memory operands: from a guest address to a host address.

use std::mem::offset_of;

use iced_x86::{Instruction, Register};

use super::assembler::{Binary, Mem, RSP, Reg, condition};
use super::frame::{INDEX_MASK, PAGE_MASK, cpu_field, temporary};
use super::generate::{Cold, Generator, GiveUp, MISS_WRITE, Result, Use};
use super::guest_code::Item;
use super::registers::{ADDEND, ADDRESS, SPARE};
use crate::cpu::Cpu;
use crate::tlb::{DATA_ENTRIES, DataEntry, Tlb};

const TLB: usize = offset_of!(Cpu, tlb) + Tlb::DATA_OFFSET;

impl Generator<'_> {
    /// Puts the effective address of the instruction's memory operand into `to`, without a segment's base. Uses ADDRESS and ADDEND.
    pub fn effective_address(&mut self, instruction: &Instruction, to: Reg) -> Result<()> {
        let base = instruction.memory_base();
        let index = instruction.memory_index();
        let displacement = instruction.memory_displacement64();
        if base == Register::RIP {
            self.asm.linear_constant(to, displacement);
            return Ok(());
        }
        if base == Register::None && index == Register::None {
            self.asm.constant(to, displacement);
            return Ok(());
        }
        let number = |register: Register| (register.is_gpr64()).then(|| register.full_register().number() as u8);
        let base = match base {
            Register::None => None,
            base => Some(self.register(number(base).ok_or(GiveUp)?, ADDRESS)),
        };
        let index = match index {
            Register::None => None,
            index => {
                let register = self.register(number(index).ok_or(GiveUp)?, ADDEND);
                Some((register, instruction.memory_index_scale().trailing_zeros() as u8))
            }
        };
        let displacement = i32::try_from(displacement as i64).map_err(|_| GiveUp)?;
        match (base, index) {
            (Some(base), None) if displacement == 0 => self.asm.mov(to, base),
            _ => self.asm.lea(to, Mem { base, index, displacement }),
        }
        Ok(())
    }

    /// Adds the base of FS or GS to ADDRESS. Uses SPARE.
    pub fn add_segment_base(&mut self, instruction: &Instruction) {
        let segment = match instruction.memory_segment() {
            Register::FS => crate::cpu::FS,
            Register::GS => crate::cpu::GS,
            _ => return,
        };
        self.asm.load(SPARE, segment_base(segment));
        self.asm.lea(ADDRESS, Mem::indexed(ADDRESS, SPARE, 0, 0));
    }

    /// The look-up of the guest address in ADDRESS: afterwards ADDRESS + ADDEND is the host address of `bytes` bytes; after one for writing
    /// SPARE is the address of the page's note.
    pub fn look_up(&mut self, item: &Item, bytes: u32, usage: Use, live: bool) {
        let retry = self.asm.label();
        let entry = self.asm.label();
        let table = (TLB + self.context.table * DATA_ENTRIES * size_of::<DataEntry>()) as i32;
        let tag = match usage {
            Use::Read => offset_of!(DataEntry, read_tag),
            Use::Write => offset_of!(DataEntry, write_tag),
        } as i32;
        let field = |offset: i32| Mem::indexed(RSP, ADDEND, 0, table + offset);
        let generation = cpu_field(offset_of!(Cpu, tlb) + Tlb::generation_offset(self.context.table));
        if self.context.keeps_journal && usage == Use::Write {
            self.asm.jump(entry);
        }
        self.asm.bind(retry);
        if !live {
            self.asm.mov(ADDEND, ADDRESS);
            self.asm.shift_right(ADDEND, 12 - ENTRY_SHIFT);
            self.asm.binary32_imm(Binary::And, ADDEND, ((DATA_ENTRIES - 1) << ENTRY_SHIFT) as i32);
            self.asm.lea(SPARE, Mem::base(ADDRESS, bytes as i32 - 1));
            self.asm.binary_imm(Binary::And, SPARE, -4096);
            self.asm.binary_mem(Binary::Or, SPARE, generation);
            self.asm.binary_mem(Binary::Cmp, SPARE, field(tag));
            self.asm.jump_if(condition::NOT_EQUAL, entry);
        } else {
            self.asm.store(temporary(0), ADDRESS);
            self.asm.extract(ADDEND, ADDRESS, INDEX_MASK);
            self.asm.lea(ADDEND, Mem { base: None, index: Some((ADDEND, 3)), displacement: 0 });
            self.asm.lea(SPARE, Mem::base(ADDRESS, bytes as i32 - 1));
            self.asm.extract(SPARE, SPARE, PAGE_MASK);
            self.asm.rotate_right(SPARE, SPARE, 52);
            self.asm.load(ADDRESS, generation);
            self.asm.lea(SPARE, Mem::indexed(SPARE, ADDRESS, 0, 0));
            self.asm.load(ADDRESS, Mem::indexed(RSP, ADDEND, 2, table + tag));
            self.asm.not(ADDRESS);
            self.asm.lea(SPARE, Mem::indexed(SPARE, ADDRESS, 0, 1));
            self.asm.load(ADDRESS, temporary(0));
            self.asm.jump_unless_rcx_zero(entry);
            self.asm.lea(ADDEND, Mem { base: None, index: Some((ADDEND, 2)), displacement: 0 });
        }
        if usage == Use::Write {
            self.asm.load(SPARE, field(offset_of!(DataEntry, note) as i32));
        }
        self.asm.load(ADDEND, field(offset_of!(DataEntry, addend) as i32));
        let write = if usage == Use::Write { MISS_WRITE } else { 0 };
        self.cold.push(Cold::Miss {
            entry,
            retry,
            miss: bytes | write,
            rip: item.instruction.ip(),
            x87: self.last_x87,
        });
    }

    /// Looks at the note after a store, whose address is in SPARE.
    pub fn check_note(&mut self, item: &Item, bytes: u32, collapsed: bool, next: Option<u64>) {
        let entry = self.asm.label();
        let resume = self.asm.label();
        if item.live_after == 0 {
            self.asm.compare8_imm(Mem::base(SPARE, 0), 0);
            self.asm.jump_if(condition::NOT_EQUAL, entry);
        } else {
            self.asm.load_u8(SPARE, Mem::base(SPARE, 0));
            self.asm.jump_if_rcx_zero(resume);
            self.asm.jump(entry);
        }
        self.asm.bind(resume);
        self.cold.push(Cold::Noted { entry, resume, bytes, next, collapsed, x87: self.last_x87 });
    }

    /// The linear address of the instruction's memory operand, in `to` (ADDRESS).
    pub fn memory_address(&mut self, item: &Item, to: Reg) -> Result<()> {
        self.effective_address(&item.instruction, to)?;
        self.add_segment_base(&item.instruction);
        Ok(())
    }
}

/// Shift of an entry's size.
const ENTRY_SHIFT: u8 = size_of::<DataEntry>().trailing_zeros() as u8;

/// The base of a segment register.
pub fn segment_base(segment: u8) -> Mem {
    cpu_field(
        offset_of!(Cpu, segments)
            + usize::from(segment) * size_of::<polder_machine::state::SegmentState>()
            + offset_of!(polder_machine::state::SegmentState, base),
    )
}
