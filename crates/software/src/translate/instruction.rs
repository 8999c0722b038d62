//! Which host code an instruction becomes.

use std::mem::offset_of;

use iced_x86::{Code, EncodingKind, FlowControl, Mnemonic, OpAccess, OpKind, Register};

use super::assembler::{Mem, R9, RCX, Reg};
use super::forms::{
    has_wide_address, is_implied_count, is_known_integer, is_plain, may_raise, renamed, set_operand_register,
    turned_homes, uses_vectors, writes_rcx,
};
use super::frame::{register_slot, temporary};
use super::generate::{Generator, GiveUp, Result, Use};
use super::guest_code::{Item, general_register, is_of_model};
use super::registers::{ADDEND, ADDRESS, SPARE, home};

impl Generator<'_> {
    /// Generates one instruction; tells whether control never goes on behind it.
    pub fn instruction(&mut self, item: &Item) -> Result<bool> {
        let instruction = &item.instruction;
        if !is_of_model(self.context.model, instruction) {
            self.interpret(instruction.ip());
            return Ok(true);
        }
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
            | Mnemonic::Prefetchw => return Ok(()),
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
        if !is_plain(guest) {
            return Ok(false);
        }
        let vector = uses_vectors(guest);
        let mmx = super::x87::uses_mmx(guest);
        if guest.encoding() == EncodingKind::Legacy && !vector && !mmx && !is_known_integer(guest) {
            return Ok(false);
        }
        let memory = (0..guest.op_count()).find(|&operand| guest.op_kind(operand) == OpKind::Memory);
        if memory.is_some() && !has_wide_address(guest) {
            return Ok(false);
        }
        let accesses = self.info.info(guest);
        let access = |operand: u32| accesses.op_access(operand);
        let mut usage = None;
        let is_address_only = guest.mnemonic() == Mnemonic::Lea;
        if let Some(operand) = memory {
            usage = match access(operand) {
                _ if is_address_only => None,
                OpAccess::Read | OpAccess::CondRead => Some(Use::Read),
                OpAccess::Write | OpAccess::ReadWrite | OpAccess::CondWrite | OpAccess::ReadCondWrite => {
                    Some(Use::Write)
                }
                _ => return Ok(false),
            };
        }
        let bytes = if memory.is_some() { guest.memory_size().size() as u32 } else { 0 };
        if memory.is_some() && (bytes == 0 || bytes > 64) {
            return Ok(false);
        }
        // Which registers are operands, and which of them live in memory.
        let mut slots: Vec<(u32, u8, OpAccess)> = Vec::new();
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
                slots.push((operand, number, access(operand)));
            }
        }
        let turned = match (has_high_byte && needs_prefix).then(|| turned_homes(guest)) {
            Some(None) => return Ok(false),
            Some(Some(homes)) => homes,
            None => Vec::new(),
        };
        let is_exchange_16 = matches!(guest.mnemonic(), Mnemonic::Cmpxchg16b | Mnemonic::Cmpxchg8b);
        let wants_rcx = shifts_by_rcx || is_exchange_16;
        if wants_rcx && memory.is_some() && !is_exchange_16 {
            return Ok(false);
        }
        let live = item.live_before != 0;
        if mmx {
            self.need_x87(live);
        }
        let mut host = *guest;
        // Scratch registers that operands may be put into.
        let mut free: Vec<Reg> = Vec::new();
        let mut collapsed = false;
        match (memory, usage) {
            (Some(_), Some(usage)) => {
                self.memory_address(item, ADDRESS)?;
                if vector {
                    self.need_vectors(live);
                }
                self.look_up(item, bytes, usage, live);
                let spares = usize::from(usage == Use::Read && !wants_rcx);
                if slots.len() > spares {
                    self.asm.lea(ADDRESS, Mem::indexed(ADDRESS, ADDEND, 0, 0));
                    collapsed = true;
                    free.push(ADDEND);
                }
                if usage == Use::Read && !wants_rcx {
                    free.push(SPARE);
                }
                host.set_memory_base(Register::R10);
                host.set_memory_index(if collapsed { Register::None } else { Register::R11 });
                host.set_memory_index_scale(1);
                host.set_memory_displacement64(0);
                host.set_memory_displ_size(0);
                host.set_segment_prefix(Register::None);
            }
            _ => {
                if vector {
                    self.need_vectors(live);
                }
                free.extend([ADDRESS, ADDEND]);
                if !wants_rcx {
                    free.push(SPARE);
                }
            }
        }
        // One scratch register for each guest register in memory, however often it is named.
        let mut placed: Vec<(u8, Reg, bool)> = Vec::new();
        for &(_, number, access) in &slots {
            let writes =
                !matches!(access, OpAccess::Read | OpAccess::CondRead | OpAccess::None | OpAccess::NoMemAccess);
            match placed.iter_mut().find(|placed| placed.0 == number) {
                Some(placed) => placed.2 |= writes,
                None => {
                    let Some(scratch) = free.pop() else { return Err(GiveUp) };
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
        if wants_rcx {
            if is_exchange_16 {
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
        if is_exchange_16 {
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
        if usage == Some(Use::Write) {
            // After the instruction: its own flags may be live.
            if collapsed && placed.iter().any(|&(_, scratch, _)| scratch == ADDRESS) {
                return Err(GiveUp);
            }
            self.check_note(item, bytes, collapsed, Some(guest.next_ip()));
        }
        Ok(true)
    }
}

const _: () = assert!(offset_of!(crate::cpu::Cpu, gpr) == 0);
