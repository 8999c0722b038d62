//! System instructions that kernels run so often that a call of their handler would show: PUSHFQ, CLI, STI, CLAC, STAC, SWAPGS.
//!
//! They are emitted for privilege level 0 only. They change no arithmetic flag, so the code here is made of instructions that leave flags alone.

use std::mem::offset_of;

use iced_x86::{FlowControl, Instruction, Mnemonic};

use super::assembler::{Mem, RAX};
use super::frame::{
    ARITHMETIC, DEFERRED, TABLES_STALE, WITHOUT_ACCESS, WITHOUT_INTERRUPTS, cpu_field, exit, temporary,
};
use super::generate::{Generator, Result};
use super::guest_code::{Item, branch_target, item_at};
use super::memory::segment_base;
use super::registers::{ADDEND, ADDRESS, SPARE};
use crate::cpu::{Cpu, GS, SystemCallRegisters};
use crate::flags;
use crate::tlb::{SUPERVISOR, SUPERVISOR_OPEN, USER};

const SYSTEM_FLAGS: Mem = cpu_field(offset_of!(Cpu, system_flags));
const KERNEL_GS_BASE: Mem = cpu_field(offset_of!(Cpu, system_call) + offset_of!(SystemCallRegisters, kernel_gs_base));

/// The data table after an instruction that was run with `table`.
fn table_after(instruction: &Instruction, table: usize) -> usize {
    match instruction.mnemonic() {
        Mnemonic::Stac => SUPERVISOR_OPEN,
        Mnemonic::Clac => SUPERVISOR,
        _ => table,
    }
}

/// The data table in use at each instruction, if STAC and CLAC are translated: only where it is the same on all ways to an instruction.
pub fn tables(items: &[Item], first: usize, guards_user_pages: bool) -> Option<Vec<usize>> {
    let switches = items.iter().any(|item| matches!(item.instruction.mnemonic(), Mnemonic::Stac | Mnemonic::Clac));
    if !switches || !guards_user_pages || first == USER {
        return None;
    }
    let mut tables: Vec<Option<usize>> = vec![None; items.len()];
    tables[0] = Some(first);
    for index in 0..items.len() {
        // Behind an instruction that never goes on nothing is reached but by jumps from above.
        let table = tables[index].unwrap_or(first);
        tables[index] = Some(table);
        let instruction = &items[index].instruction;
        let after = table_after(instruction, table);
        let inside = branch_target(instruction).and_then(|target| item_at(items, target));
        let next = matches!(instruction.flow_control(), FlowControl::Next | FlowControl::ConditionalBranch)
            .then_some(index + 1)
            .filter(|&next| next < items.len());
        for to in [inside, next].into_iter().flatten() {
            match tables[to] {
                None => tables[to] = Some(after),
                Some(known) if known != after => return None,
                Some(_) => {}
            }
        }
    }
    Some(tables.into_iter().map(|table| table.unwrap_or(first)).collect())
}

impl Generator<'_> {
    /// Emits a system instruction that has a translation; `false`: it has none.
    pub fn system(&mut self, item: &Item) -> Result<bool> {
        if self.context.table == USER {
            return Ok(false);
        }
        let is_open = match item.instruction.mnemonic() {
            Mnemonic::Pushfq => {
                self.push_flags(item)?;
                return Ok(true);
            }
            Mnemonic::Cli => {
                self.change_flag(WITHOUT_INTERRUPTS, 0);
                return Ok(true);
            }
            // Between STI and the next instruction nobody gets in, but a unit's end is a place to come back.
            Mnemonic::Sti if self.is_last(item) => return Ok(false),
            Mnemonic::Sti => {
                // Whoever waits for this gets in after one more instruction: the interpreter knows how.
                let wait = self.leave_label(exit::INTERPRET, item.instruction.ip());
                self.asm.load32(SPARE, DEFERRED);
                self.asm.jump_unless_rcx_zero(wait);
                self.change_flag(WITHOUT_INTERRUPTS, flags::IF as i32);
                return Ok(true);
            }
            Mnemonic::Swapgs => {
                self.asm.load(ADDRESS, segment_base(GS));
                self.asm.load(ADDEND, KERNEL_GS_BASE);
                self.asm.store(KERNEL_GS_BASE, ADDRESS);
                self.asm.store(segment_base(GS), ADDEND);
                return Ok(true);
            }
            Mnemonic::Stac => true,
            Mnemonic::Clac => false,
            _ => return Ok(false),
        };
        if !self.switches_tables() {
            return Ok(false);
        }
        self.change_flag(WITHOUT_ACCESS, if is_open { flags::AC as i32 } else { 0 });
        self.asm.store32_imm(TABLES_STALE, 1);
        self.context.table = if is_open { SUPERVISOR_OPEN } else { SUPERVISOR };
        Ok(true)
    }

    /// Clears the flag that `mask` lacks, then adds `set`.
    fn change_flag(&mut self, mask: Mem, set: i32) {
        self.asm.load(SPARE, SYSTEM_FLAGS);
        self.asm.extract(SPARE, SPARE, mask);
        self.asm.deposit(SPARE, SPARE, mask);
        if set != 0 {
            self.asm.lea(SPARE, Mem::base(SPARE, set));
        }
        self.asm.store(SYSTEM_FLAGS, SPARE);
    }

    fn push_flags(&mut self, item: &Item) -> Result<()> {
        // All flags put together while the arithmetic ones are safe in AX.
        self.asm.store(temporary(2), RAX);
        self.asm.flags_to_ax();
        self.asm.store16(ARITHMETIC, RAX);
        self.asm.compose_flags(SPARE, ADDEND, SYSTEM_FLAGS);
        self.asm.store(temporary(3), SPARE);
        self.asm.flags_from_ax();
        self.asm.load(RAX, temporary(2));
        self.push_field(item, temporary(3), Some(item.instruction.next_ip()))?;
        Ok(())
    }
}
