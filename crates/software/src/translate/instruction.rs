//! Which host code an instruction becomes.

use std::mem::offset_of;

use iced_x86::{Code, FlowControl, Mnemonic, OpKind, Register};

use super::assembler::{Mem, R9, RCX, Reg};
use super::forms::{
    has_wide_address, is_implied_count, may_raise, renamed, set_memory, set_operand_register, turned_homes, writes_rcx,
};
use super::frame::{register_slot, temporary};
use super::generate::{Generator, GiveUp, Result, Use};
use super::guest_code::{Item, general_register, is_of_model};
use super::memory::{COLLAPSED, Place};
use super::registers::{ADDEND, ADDRESS, SPARE, home};
use super::values::Access;

impl Generator<'_> {
    /// Generates one instruction; tells whether control never goes on behind it.
    pub fn instruction(&mut self, item: &Item) -> Result<bool> {
        let instruction = &item.instruction;
        if !is_of_model(self.context.model, instruction) || item.facts.classes & !self.context.enabled != 0 {
            self.interpret(instruction.ip());
            return Ok(true);
        }
        self.held_before = self.held.take();
        match instruction.flow_control() {
            FlowControl::Next => {
                self.straight(item)?;
                Ok(false)
            }
            _ => self.transfer(item),
        }
    }

    /// An instruction that goes on to the next.
    fn straight(&mut self, item: &Item) -> Result<()> {
        let instruction = &item.instruction;
        match instruction.mnemonic() {
            Mnemonic::Nop
            | Mnemonic::Endbr64
            | Mnemonic::Endbr32
            | Mnemonic::Prefetchnta
            | Mnemonic::Prefetcht0
            | Mnemonic::Prefetcht1
            | Mnemonic::Prefetcht2
            | Mnemonic::Prefetchw => {
                self.held = self.held_before;
                return Ok(());
            }
            Mnemonic::Lea if instruction.memory_base() == Register::RIP || has_wide_address(instruction) => {
                return self.load_address(item);
            }
            Mnemonic::Push => return self.push(item),
            Mnemonic::Pop => return self.pop(item),
            Mnemonic::Leave if instruction.code() == Code::Leaveq => return self.leave_frame(item),
            _ => {}
        }
        // The clock goes on between the two runs of a comparison, and strings stop wherever attention finds them.
        let is_incomparable =
            instruction.is_string_instruction() || matches!(instruction.mnemonic(), Mnemonic::Rdtsc | Mnemonic::Rdtscp);
        if self.context.keeps_journal && is_incomparable {
            self.callout(item);
            return Ok(());
        }
        if self.system(item)?
            || self.x87_form(item)?
            || self.string_form(item)
            || self.bit_form(item)?
            || self.state_form(item)?
            || self.same_form(item)?
        {
            return Ok(());
        }
        self.callout(item);
        Ok(())
    }

    /// LEA with 64-bit addresses.
    fn load_address(&mut self, item: &Item) -> Result<()> {
        let instruction = &item.instruction;
        let Some((to, _)) = general_register(instruction.op0_register()) else { return Err(GiveUp) };
        let host = home(to).unwrap_or(SPARE);
        match instruction.op0_register().size() {
            8 => {
                self.effective_address(instruction, host)?;
            }
            4 => {
                self.effective_address(instruction, SPARE)?;
                self.asm.lea32(host, Mem::base(SPARE, 0));
            }
            _ => {
                self.callout(item);
                return Ok(());
            }
        }
        self.set_register(to, host);
        Ok(())
    }

    /// Emits the instruction as itself, registers renamed and memory looked up. `false`: it has no such form here.
    fn same_form(&mut self, item: &Item) -> Result<bool> {
        let guest = &item.instruction;
        let facts = &item.facts;
        if !facts.has_same_form {
            return Ok(false);
        }
        let (vector, mmx) = (facts.uses_vectors, facts.uses_mmx);
        let memory = (0..guest.op_count()).find(|&operand| guest.op_kind(operand) == OpKind::Memory);
        let is_address_only = guest.mnemonic() == Mnemonic::Lea;
        let access = facts.memory;
        if memory.is_some() && (!has_wide_address(guest) || access.is_none() && !is_address_only) {
            return Ok(false);
        }
        // Which registers are operands, and which of them live in memory.
        let mut slots: Vec<(u8, bool)> = Vec::new();
        let mut has_high_byte = false;
        let mut needs_prefix = memory.is_some();
        let shifts_by_rcx = (0..guest.op_count())
            .any(|operand| guest.op_register(operand) == Register::CL && is_implied_count(guest, operand));
        for operand in 0..guest.op_count() {
            if guest.op_kind(operand) != OpKind::Register {
                continue;
            }
            let register = guest.op_register(operand);
            let Some((number, high)) = general_register(register) else { continue };
            if shifts_by_rcx && is_implied_count(guest, operand) {
                continue;
            }
            has_high_byte |= high;
            needs_prefix |= home(number) != Some(Reg(number)) || number >= 4;
            if home(number).is_none() {
                slots.push((number, facts.written_operands >> operand & 1 != 0));
            }
        }
        let turned = match (has_high_byte && needs_prefix).then(|| turned_homes(guest)) {
            Some(None) => return Ok(false),
            Some(Some(homes)) => homes,
            None => Vec::new(),
        };
        let is_exchange_16 = matches!(guest.mnemonic(), Mnemonic::Cmpxchg16b | Mnemonic::Cmpxchg8b);
        let wants_rcx = shifts_by_rcx || is_exchange_16;
        let live = item.live_before != 0;
        if mmx {
            self.need_x87(live);
        }
        let mut host = *guest;
        // Scratch registers that operands may be put into.
        let mut free = Free::default();
        if vector {
            self.need_vectors(live);
        }
        let mut place = None;
        match access {
            Some((usage, bytes)) => {
                let mut reached = self.reach(item, Access::Operand, bytes, usage)?;
                let has_spare = !wants_rcx && (usage == Use::Read || reached.note.is_some());
                if !reached.mem.names(ADDRESS) {
                    free.push(ADDRESS);
                } else if slots.len() > usize::from(has_spare) {
                    self.asm.lea(ADDRESS, reached.mem);
                    reached.mem = COLLAPSED.mem;
                    free.push(ADDEND);
                }
                if has_spare {
                    free.push(SPARE);
                }
                set_memory(&mut host, reached.mem);
                place = Some((usage, bytes, reached));
            }
            None => {
                free.push(ADDEND);
                free.push(ADDRESS);
                if !wants_rcx {
                    free.push(SPARE);
                }
                self.held = self.held_before;
            }
        }
        // One scratch register for each guest register in memory, however often it is named.
        let mut placed: Vec<(u8, Reg, bool)> = Vec::new();
        for &(number, writes) in &slots {
            match placed.iter_mut().find(|placed| placed.0 == number) {
                Some(placed) => placed.2 |= writes,
                None => {
                    let Some(scratch) = free.pop() else { return Err(GiveUp) };
                    if scratch == ADDEND {
                        self.held = None;
                    }
                    self.asm.load(scratch, register_slot(number));
                    placed.push((number, scratch, writes));
                }
            }
        }
        for operand in 0..guest.op_count() {
            if guest.op_kind(operand) != OpKind::Register || shifts_by_rcx && is_implied_count(guest, operand) {
                continue;
            }
            let register = guest.op_register(operand);
            let Some((number, _)) = general_register(register) else { continue };
            let to = home(number)
                .or_else(|| placed.iter().find(|placed| placed.0 == number).map(|placed| placed.1))
                .ok_or(GiveUp)?;
            if to != Reg(number) || !turned.is_empty() {
                set_operand_register(&mut host, operand, renamed(register, to));
            }
        }
        // The note's address, while RCX is the guest's.
        let note_waits = wants_rcx && matches!(place, Some((Use::Write, _, Place { note: None, .. })));
        if wants_rcx {
            if note_waits {
                self.asm.store(temporary(0), SPARE);
            }
            self.asm.mov(RCX, R9);
        }
        for &home in &turned {
            self.asm.rotate_right(home, home, 8);
        }
        if may_raise(guest) || mmx || memory.is_some() && vector {
            self.may_fault(guest.ip());
        }
        self.encode(&host)?;
        for &home in &turned {
            self.asm.rotate_right(home, home, 56);
        }
        if note_waits {
            self.asm.load(SPARE, temporary(0));
        }
        if writes_rcx(guest) {
            self.asm.mov(R9, RCX);
        }
        for &(number, scratch, writes) in &placed {
            if writes {
                self.asm.store(register_slot(number), scratch);
            }
        }
        if let Some((Use::Write, bytes, place)) = place {
            // After the instruction: its own flags may be live.
            self.check_note(item, bytes, place, Some(guest.next_ip()));
        }
        Ok(true)
    }
}

/// Scratch registers that nobody uses at the moment.
#[derive(Default)]
struct Free {
    registers: [Option<Reg>; 3],
}

impl Free {
    fn push(&mut self, register: Reg) {
        if let Some(place) = self.registers.iter_mut().find(|place| place.is_none()) {
            *place = Some(register);
        }
    }

    /// The one that was pushed last.
    fn pop(&mut self) -> Option<Reg> {
        self.registers.iter_mut().rev().find_map(Option::take)
    }
}

const _: () = assert!(offset_of!(crate::cpu::Cpu, gpr) == 0);
