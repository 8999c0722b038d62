//! Memory operands: from a guest address to a host address.

use std::mem::offset_of;

use iced_x86::{Instruction, Register};
use polder_memory::PAGE_SIZE;

use super::arena::DATA;
use super::assembler::{Binary, Label, Mem, R15, RBP, RSP, Reg, condition};
use super::cold::{Cold, Split};
use super::frame::{INDEX_MASK, PAGE_MASK, cpu_field, exit, note_slot, stretch_slot, temporary};
use super::generate::{Generator, GiveUp, LinkSite, Result, Shape, Use};
use super::guest_code::Item;
use super::registers::{ADDEND, ADDRESS, SPARE};
use super::values::{Access, Address};
use crate::cpu::Cpu;
use crate::tlb::{DATA_ENTRIES, DataEntry, Tlb};

/// Where an access is in the host.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    pub mem: Mem,
    /// The slot with the address of the page's note; `None`: SPARE has it.
    pub note: Option<Mem>,
}

/// Where a look-up leads.
pub const LOOKED_UP: Place = Place { mem: Mem::indexed(ADDRESS, ADDEND, 0, 0), note: None };
/// The same after both were added in ADDRESS.
pub const COLLAPSED: Place = Place { mem: Mem::base(ADDRESS, 0), note: None };

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

    /// Puts the address that registers make, and `start` more, into ADDRESS. Uses SPARE and ADDEND, no flags.
    pub fn key_address(&mut self, address: &Address, start: i32) {
        if let Some(page) = address.page {
            self.asm.linear_constant(ADDRESS, (page * PAGE_SIZE).wrapping_add_signed(start.into()));
            return;
        }
        let base = address.base.map(|base| self.register(base, ADDRESS));
        let index = address.index.map(|(index, shift)| (self.register(index, ADDEND), shift));
        self.asm.lea(ADDRESS, Mem { base, index, displacement: start });
        self.add_base_of(address.segment);
    }

    /// Adds the base of the segment register, if it is FS or GS, to ADDRESS. Uses SPARE.
    pub fn add_base_of(&mut self, segment: Register) {
        let segment = match segment {
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
        self.look_up_stretch(item, bytes, usage, live, false);
    }

    /// As [`Generator::look_up`]. With `splits` what lies in two pages goes on in the plain form.
    pub fn look_up_stretch(&mut self, item: &Item, bytes: u32, usage: Use, live: bool, splits: bool) {
        let rip = item.instruction.ip();
        let split = splits.then(|| self.split(rip));
        let retry = self.asm.label();
        let entry = self.asm.label();
        if self.context.keeps_journal && usage == Use::Write {
            self.asm.jump(entry);
        }
        self.asm.bind(retry);
        if !live {
            self.probe(bytes, usage, entry);
        } else {
            self.asm.store(temporary(0), ADDRESS);
            self.asm.extract(ADDEND, ADDRESS, INDEX_MASK);
            self.asm.lea(ADDEND, Mem { base: None, index: Some((ADDEND, 3)), displacement: 0 });
            self.asm.lea(SPARE, Mem::base(ADDRESS, bytes as i32 - 1));
            self.asm.extract(SPARE, SPARE, PAGE_MASK);
            self.asm.rotate_right(SPARE, SPARE, 52);
            self.asm.load(ADDRESS, self.generation());
            self.asm.lea(SPARE, Mem::indexed(SPARE, ADDRESS, 0, 0));
            self.asm.load(ADDRESS, Mem { index: Some((ADDEND, 2)), ..self.entry_tag(usage) });
            self.asm.not(ADDRESS);
            self.asm.lea(SPARE, Mem::indexed(SPARE, ADDRESS, 0, 1));
            self.asm.load(ADDRESS, temporary(0));
            self.asm.jump_unless_rcx_zero(entry);
            self.asm.lea(ADDEND, Mem { base: None, index: Some((ADDEND, 2)), displacement: 0 });
        }
        if usage == Use::Write {
            self.asm.load(SPARE, self.entry_note());
        }
        self.asm.load(ADDEND, self.entry_addend());
        self.cold.push(Cold::Miss { entry, retry, bytes, usage, rip, split, x87: self.last_x87 });
    }

    /// Puts the place of the entry of the guest address in ADDRESS into ADDEND, and jumps away if it has not the page of `bytes` bytes there. Uses SPARE and flags.
    pub fn probe(&mut self, bytes: u32, usage: Use, missing: Label) {
        self.asm.mov(ADDEND, ADDRESS);
        self.asm.shift_right(ADDEND, 12 - ENTRY_SHIFT);
        self.asm.binary32_imm(Binary::And, ADDEND, ((DATA_ENTRIES - 1) << ENTRY_SHIFT) as i32);
        self.asm.lea(SPARE, Mem::base(ADDRESS, bytes as i32 - 1));
        self.asm.binary_imm(Binary::And, SPARE, -4096);
        self.asm.binary_mem(Binary::Or, SPARE, self.generation());
        self.asm.binary_mem(Binary::Cmp, SPARE, self.entry_tag(usage));
        self.asm.jump_if(condition::NOT_EQUAL, missing);
    }

    /// The generation of the data table in use.
    fn generation(&self) -> Mem {
        cpu_field(offset_of!(Cpu, tlb) + Tlb::generation_offset(self.context.table))
    }

    /// A field of the entry whose place is in ADDEND.
    fn entry_field(&self, offset: usize) -> Mem {
        let table = DATA + self.context.table * DATA_ENTRIES * size_of::<DataEntry>();
        Mem::indexed(RSP, ADDEND, 0, (table + offset) as i32)
    }

    fn entry_tag(&self, usage: Use) -> Mem {
        self.entry_field(match usage {
            Use::Read => offset_of!(DataEntry, read_tag),
            Use::Write => offset_of!(DataEntry, write_tag),
        })
    }

    /// The address of the page's note, in the entry whose place is in ADDEND.
    pub fn entry_note(&self) -> Mem {
        self.entry_field(offset_of!(DataEntry, note))
    }

    /// What leads to the host address, in the entry whose place is in ADDEND.
    pub fn entry_addend(&self) -> Mem {
        self.entry_field(offset_of!(DataEntry, addend))
    }

    /// A way to the plain form of the unit from `rip` on.
    fn split(&mut self, rip: u64) -> Split {
        if self.context.keeps_journal {
            // Lockstep compares what starts elsewhere than the last piece.
            return Split { entry: self.leave_label(exit::INTERPRET, rip), link: None };
        }
        let entry = self.asm.label();
        // The jump is emitted with the look-up's cold code.
        let link = self.new_link(entry, LinkSite::new(rip, Shape::Plain));
        Split { entry, link: Some(link) }
    }

    /// Looks at the page's note after a store.
    pub fn check_note(&mut self, item: &Item, bytes: u32, place: Place, next: Option<u64>) {
        let resume = self.asm.label();
        let entry = self.asm.label();
        if let Some(note) = place.note {
            self.asm.load(SPARE, note);
        }
        self.jump_if_set(Mem::base(SPARE, 0), item.live_after != 0, entry);
        self.asm.bind(resume);
        self.cold.push(Cold::Noted { entry, resume, bytes, next, host: place.mem, x87: self.last_x87 });
    }

    /// Looks at the note whose address is in SPARE after stores to one page; `host` has the host address of one of them.
    pub fn check_page_note(&mut self, rip: u64, live: bool, host: Mem) {
        let resume = self.asm.label();
        let entry = self.asm.label();
        self.jump_if_set(Mem::base(SPARE, 0), live, entry);
        self.asm.bind(resume);
        self.cold.push(Cold::PageNoted { entry, resume, rip, host });
    }

    /// Finds the host address of an access: by the look-up of its group or by its own. Uses all scratch registers; afterwards a place outside of
    /// a group lies at [`LOOKED_UP`], one in a group at ADDEND, plus another register in a steady one.
    pub fn reach(&mut self, item: &Item, access: Access, bytes: u32, usage: Use) -> Result<Place> {
        let held = self.held.take().or(self.held_before.take());
        if self.ahead.take() == Some((self.index, access)) {
            return Ok(LOOKED_UP);
        }
        let share = self.plan.share(self.index, access);
        let Some(share) = share.filter(|share| share.is_head || self.plan.groups[share.group].is_ready) else {
            self.linear_address(item, access, 0)?;
            self.look_up(item, bytes, usage, item.live_before != 0);
            return Ok(LOOKED_UP);
        };
        let group = self.plan.groups[share.group];
        let note = note_slot(group.slot);
        // A head's look-up may have been ahead of it.
        if !share.is_head || group.is_ready {
            if held != Some(share.group) {
                self.asm.load(ADDEND, stretch_slot(group.slot));
            }
            self.held = Some(share.group);
            let index = share.varying.map(|(register, shift)| (self.register(register, ADDRESS), shift));
            let mem = Mem { base: Some(ADDEND), index, displacement: share.offset };
            return Ok(Place { mem, note: (usage == Use::Write).then_some(note) });
        }
        self.linear_address(item, access, group.lead)?;
        self.look_up_stretch(item, group.len, usage, item.live_before != 0, group.len > bytes);
        self.keep_stretch(share.group, usage);
        Ok(Place { mem: Mem::base(ADDEND, share.offset), note: None })
    }

    /// Keeps what the look-up of a group's head has found.
    pub fn keep_stretch(&mut self, group: usize, usage: Use) {
        let slot = self.plan.groups[group].slot;
        self.asm.lea(ADDEND, LOOKED_UP.mem);
        self.asm.store(stretch_slot(slot), ADDEND);
        if usage == Use::Write {
            self.asm.store(note_slot(slot), SPARE);
        }
        self.plan.groups[group].is_ready = true;
        self.held = Some(group);
    }

    /// Puts the address of an access and `lead` into ADDRESS.
    fn linear_address(&mut self, item: &Item, access: Access, lead: i32) -> Result<()> {
        match access {
            Access::Operand => {
                self.memory_address(item)?;
                if lead != 0 {
                    self.asm.lea(ADDRESS, Mem::base(ADDRESS, lead));
                }
            }
            Access::Push => self.asm.lea(ADDRESS, Mem::base(R15, lead - 8)),
            Access::Pop if lead == 0 => self.asm.mov(ADDRESS, R15),
            Access::Pop => self.asm.lea(ADDRESS, Mem::base(R15, lead)),
            Access::Frame => self.asm.lea(ADDRESS, Mem::base(RBP, lead)),
        }
        Ok(())
    }

    /// Puts the linear address of the instruction's memory operand into ADDRESS.
    pub fn memory_address(&mut self, item: &Item) -> Result<()> {
        self.effective_address(&item.instruction, ADDRESS)?;
        self.add_base_of(item.instruction.memory_segment());
        Ok(())
    }
}

/// Shift of an entry's size.
pub const ENTRY_SHIFT: u8 = size_of::<DataEntry>().trailing_zeros() as u8;

/// The base of a segment register.
pub fn segment_base(segment: u8) -> Mem {
    cpu_field(
        offset_of!(Cpu, segments)
            + usize::from(segment) * size_of::<polder_machine::state::SegmentState>()
            + offset_of!(polder_machine::state::SegmentState, base),
    )
}
