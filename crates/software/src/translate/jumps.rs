//! Jumps, calls and returns, and the ways out of a unit.

use std::mem::offset_of;

use iced_x86::{Code, FlowControl, Instruction, OpKind};

use super::arena::{RETURNS_AT, Returns, verified_at};
use super::assembler::{self, Binary, Label, Mem, R9, R15, RSP};
use super::bindings::NO_BINDING;
use super::cold::Cold;
use super::frame::{JUMP_TABLE, RETURN_MASK, RETURNS_IN_USE, RIP, SPACE, exit, temporary};
use super::generate::{Generator, GiveUp, LinkSite, Result, Shape, Use};
use super::guest_code::{INSTRUCTION_BYTES_MAX, Item, branch_target, general_register, item_at};
use super::registers::{ADDEND, ADDRESS, SPARE};
use super::thunks;
use super::values::Access;
use crate::lower::condition;
use polder_memory::PAGE_SIZE;

impl Generator<'_> {
    /// Looks for attention before a jump backwards; SPARE is used.
    pub fn poll(&mut self, target: u64, live: bool) {
        let leave = self.leave_label(exit::ATTENTION, target);
        if live {
            let none = self.asm.label();
            self.asm.load32(SPARE, JUMP_TABLE);
            self.asm.jump_unless_rcx_zero(none);
            self.asm.jump(leave);
            self.asm.bind(none);
        } else {
            self.asm.binary32_mem_imm(Binary::Cmp, JUMP_TABLE, 0);
            self.asm.jump_if(assembler::condition::EQUAL, leave);
        }
    }

    /// Whether the code that is run next has another data table than this unit's.
    pub fn is_other_space(&self) -> bool {
        self.context.table != self.entry_table
    }

    /// Whether the instruction at `target` surely lies in this page.
    pub fn is_near(&self, target: u64) -> bool {
        let is_whole = target % PAGE_SIZE <= PAGE_SIZE - INSTRUCTION_BYTES_MAX as u64;
        is_whole && self.items.first().is_some_and(|first| first.instruction.ip() >> 12 == target >> 12)
    }

    /// Jumps to a known address: inside the unit, or by a link.
    pub fn link(&mut self, target: u64, live: bool) {
        let inside = item_at(self.items, target);
        if inside == Some(self.index + 1) {
            // What comes next.
            return;
        }
        if let Some(index) = inside {
            if self.asm.is_bound(self.labels[index]) && self.jump_back_in_loop(index, target) {
                return;
            }
            if self.asm.is_bound(self.labels[index]) {
                self.poll(target, live);
            }
            let label = self.labels[index];
            self.asm.jump(label);
            return;
        }
        if self.is_other_space() {
            let leave = self.leave_label(exit::INDIRECT, target);
            self.asm.jump(leave);
            return;
        }
        let same_page = self.is_near(target);
        let is_backward = self.items.first().is_some_and(|first| target <= first.instruction.ip());
        if is_backward {
            self.poll(target, live);
        }
        let entry = self.asm.label();
        let mut binding_at = None;
        let mut unverified = None;
        if !same_page {
            // The way counts where the target's page leads to the target's bytes. The distance is patched; it is far too great for the short form.
            self.asm.load32(SPARE, SPACE);
            let byte = Mem::indexed(RSP, SPARE, 0, verified_at(NO_BINDING));
            if live {
                self.asm.load_u8(SPARE, byte);
                binding_at = Some(self.asm.position() - 4);
                let label = self.asm.label();
                self.asm.jump_if_rcx_zero(label);
                unverified = Some(label);
            } else {
                self.asm.compare8_imm(byte, 0);
                binding_at = Some(self.asm.position() - 5);
                self.asm.jump_if(assembler::condition::EQUAL, entry);
            }
        }
        self.asm.jump(entry);
        let jump_at = self.asm.position() - 4;
        if let Some(label) = unverified {
            self.asm.bind(label);
            self.asm.jump(entry);
        }
        self.new_link(entry, LinkSite { jump_at, binding_at, ..LinkSite::new(target, Shape::Shared) });
    }

    /// Jumps back to a loop's head where that leads on in another shape of the loop, or to another round of a steady one. `false`: it is a jump as others are.
    fn jump_back_in_loop(&mut self, head: usize, target: u64) -> bool {
        if let Some(steady) = self.steady.clone().filter(|_| head == 0) {
            self.poll(target, false);
            self.next_steady_round(&steady, self.steady_entry, self.labels[0]);
            return true;
        }
        let shape = match self.context.shape {
            // Only the round that met two pages is for this shape.
            Shape::Plain if head == 0 && self.items[0].live_before == 0 => Shape::Shared,
            Shape::Shared | Shape::Steady if self.steady_heads.contains(&head) => Shape::Steady,
            _ => return false,
        };
        if !self.is_near(target) || self.is_other_space() {
            return false;
        }
        self.poll(target, false);
        let entry = self.asm.label();
        self.asm.jump(entry);
        let jump_at = self.asm.position() - 4;
        self.new_link(entry, LinkSite { jump_at, ..LinkSite::new(target, shape) });
        true
    }

    /// Adds a link whose jump leads to `entry`, where its cold code will be; gives its number.
    pub fn new_link(&mut self, entry: Label, site: LinkSite) -> usize {
        let link = self.links.len();
        self.links.push(site);
        self.link_stubs.push(entry);
        self.cold.push(Cold::Link { entry, link });
        link
    }

    /// Jcc to a known address.
    pub fn link_if(&mut self, code: u8, target: u64, live: bool) {
        if let Some(index) = item_at(self.items, target) {
            let label = self.labels[index];
            if !self.asm.is_bound(label) {
                self.asm.jump_if(code, label);
                return;
            }
        } else if !self.is_other_space()
            && self.is_near(target)
            && self.items.first().is_some_and(|first| target > first.instruction.ip())
        {
            let entry = self.asm.label();
            self.asm.jump_if(code, entry);
            let jump_at = self.asm.position() - 4;
            self.new_link(entry, LinkSite { jump_at, ..LinkSite::new(target, Shape::Shared) });
            return;
        }
        let skip = self.asm.label();
        self.asm.jump_if(code ^ 1, skip);
        self.link(target, live);
        self.asm.bind(skip);
    }

    /// Leaves the instruction at `rip` to the interpreter if the address in ADDRESS is not canonical. Uses SPARE, no flags.
    pub fn check_canonical(&mut self, rip: u64) {
        let leave = self.leave_label(exit::INTERPRET, rip);
        self.asm.rotate_right(SPARE, ADDRESS, 47);
        self.asm.lea(SPARE, Mem::base(SPARE, 1));
        self.asm.extract(SPARE, SPARE, super::frame::CANONICAL_MASK);
        self.asm.jump_unless_rcx_zero(leave);
    }

    /// Jumps to the guest address in ADDRESS. `rip`: of the instruction, which has moved RSP by `moved`: it faults itself if the address is not canonical.
    pub fn jump_indirect(&mut self, rip: u64, moved: i32) {
        let miss = self.asm.label();
        self.asm.store(RIP, ADDRESS);
        if self.is_other_space() {
            self.asm.jump(miss);
            let thunk = self.context.thunks.jump_anew;
            self.cold.push(Cold::Indirect { entry: miss, rip, moved, thunk });
            return;
        }
        thunks::find_jump(&mut self.asm, miss);
        self.asm.jump_mem(thunks::found_jump());
        self.cold.push(Cold::Indirect { entry: miss, rip, moved, thunk: self.context.thunks.jump });
    }

    /// Remembers where a call will come back to, for [`Generator::jump_back`]. Uses the scratch registers, no flags.
    fn expect_return(&mut self, next: u64) {
        if !self.is_near(next) || self.is_other_space() {
            return;
        }
        let (entry, to) = (self.asm.label(), self.asm.label());
        let link = self.new_link(to, LinkSite::new(next, Shape::Shared));
        self.cold.push(Cold::Jump { entry, to, link });
        self.asm.extract(ADDEND, R15, RETURN_MASK);
        self.asm.load32(SPARE, RETURNS_IN_USE);
        self.asm.lea(SPARE, Mem::indexed(SPARE, ADDEND, 3, 0));
        let field = |offset: usize| Mem::indexed(RSP, SPARE, 0, RETURNS_AT + offset as i32);
        self.store_linear(field(offset_of!(Returns, linear)), next, ADDRESS);
        self.asm.address_of(ADDRESS, entry);
        self.asm.store(field(offset_of!(Returns, host)), ADDRESS);
    }

    /// Returns to the guest address in ADDRESS, which lay at RSP, and takes `moved` bytes from the stack; as [`Generator::jump_indirect`]. What the last call with that place of the stack has left is in the
    /// host's cache, while the entries of the jump table are many.
    fn jump_back(&mut self, rip: u64, moved: i32) {
        if self.is_other_space() {
            self.asm.lea(R15, Mem::base(R15, moved));
            self.jump_indirect(rip, moved);
            return;
        }
        let miss = self.asm.label();
        self.asm.extract(ADDEND, R15, RETURN_MASK);
        self.asm.lea(R15, Mem::base(R15, moved));
        self.asm.load32(SPARE, JUMP_TABLE);
        self.asm.lea(ADDEND, Mem::indexed(SPARE, ADDEND, 3, 0));
        let field = |offset: usize| Mem::indexed(RSP, ADDEND, 0, RETURNS_AT + offset as i32);
        self.asm.load(SPARE, field(offset_of!(Returns, linear)));
        self.asm.not(SPARE);
        self.asm.lea(SPARE, Mem::indexed(SPARE, ADDRESS, 0, 1));
        self.asm.jump_unless_rcx_zero(miss);
        self.asm.jump_mem(field(offset_of!(Returns, host)));
        self.cold.push(Cold::Indirect { entry: miss, rip, moved, thunk: self.context.thunks.return_missed });
    }

    /// Jumps, calls, returns, and what leaves for the system.
    pub fn transfer(&mut self, item: &Item) -> Result<bool> {
        let instruction = &item.instruction;
        let live = item.live_after != 0;
        let target = branch_target(instruction);
        match (instruction.flow_control(), target) {
            (FlowControl::ConditionalBranch, Some(target)) if instruction.is_jcc_short_or_near() => {
                let Some(code) = condition(instruction) else { return Err(GiveUp) };
                self.link_if(code as u8, target, live);
                self.held = self.held_before;
                return Ok(false);
            }
            (FlowControl::UnconditionalBranch, Some(target)) => {
                self.link(target, live);
            }
            (FlowControl::Call, Some(target)) => {
                self.push_constant(item, instruction.next_ip(), true, Some(target))?;
                self.expect_return(instruction.next_ip());
                self.link(target, live);
            }
            (FlowControl::Return, _) if matches!(instruction.code(), Code::Retnq | Code::Retnq_imm16) => {
                let place = self.reach(item, Access::Pop, 8, Use::Read)?;
                self.asm.load(ADDRESS, place.mem);
                let extra = if instruction.op_count() == 1 { i32::from(instruction.immediate16()) } else { 0 };
                self.jump_back(instruction.ip(), 8 + extra);
            }
            (FlowControl::IndirectBranch | FlowControl::IndirectCall, _)
                if matches!(instruction.code(), Code::Jmp_rm64 | Code::Call_rm64) =>
            {
                self.indirect(item)?;
            }
            (FlowControl::ConditionalBranch, Some(target)) if self.count_branch(instruction, target, live) => {
                return Ok(false);
            }
            _ => {
                let goes_on = instruction.flow_control() == FlowControl::ConditionalBranch;
                if !goes_on {
                    // It comes back here only if it did nothing.
                    self.callout(item);
                }
                self.interpret(instruction.ip());
                return Ok(!goes_on);
            }
        }
        Ok(true)
    }

    /// JRCXZ, JECXZ and LOOP. `false`: another branch.
    pub fn count_branch(&mut self, instruction: &Instruction, target: u64, live: bool) -> bool {
        match instruction.code() {
            Code::Jrcxz_rel8_64 => self.asm.mov(SPARE, R9),
            Code::Jecxz_rel8_64 => self.asm.lea32(SPARE, Mem::base(R9, 0)),
            Code::Loop_rel8_64_RCX => {
                self.asm.lea(R9, Mem::base(R9, -1));
                self.asm.mov(SPARE, R9);
            }
            _ => return false,
        }
        let (zero, end) = (self.asm.label(), self.asm.label());
        self.asm.jump_if_rcx_zero(zero);
        if instruction.code() == Code::Loop_rel8_64_RCX {
            self.link(target, live);
            self.asm.bind(zero);
        } else {
            self.asm.jump(end);
            self.asm.bind(zero);
            self.link(target, live);
        }
        self.asm.bind(end);
        true
    }

    /// JMP and CALL through a register or memory.
    pub fn indirect(&mut self, item: &Item) -> Result<()> {
        let instruction = &item.instruction;
        let is_call = instruction.flow_control() == FlowControl::IndirectCall;
        if instruction.op0_kind() == OpKind::Memory {
            let place = self.reach(item, Access::Operand, 8, Use::Read)?;
            self.asm.load(ADDRESS, place.mem);
        } else {
            let (number, _) = general_register(instruction.op0_register()).ok_or(GiveUp)?;
            let from = self.register(number, ADDRESS);
            self.asm.mov(ADDRESS, from);
        }
        if is_call {
            self.check_canonical(instruction.ip());
            self.asm.store(temporary(1), ADDRESS);
            self.push_constant(item, instruction.next_ip(), true, None)?;
            self.expect_return(instruction.next_ip());
            self.asm.load(ADDRESS, temporary(1));
        }
        self.jump_indirect(instruction.ip(), 0);
        Ok(())
    }
}
