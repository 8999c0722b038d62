//! REP MOVS and REP STOS in translated code.
//!
//! They go page by page: a look-up for each side, then the host's own instruction for what lies in the pages. RCX, RSI and RDI are exact
//! between the pieces, so that a look-up that misses leaves the rest to the interpreter at the same instruction, as do the
//! direction flag and pages that somebody watches; who begins to watch a page in the middle of a piece hears of it after the piece. Elements that overlap come out as on the host, because they
//! overlap there in the same way.

use std::mem::offset_of;

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::assembler::{Binary, Mem, R9, RAX, RDI, RSI, condition};
use super::frame::{DIRECTION_MASK, JUMP_TABLE, cpu_field, exit, temporary};
use super::generate::{Generator, Use};
use super::guest_code::Item;
use super::registers::{ADDEND, ADDRESS, SPARE};
use crate::cpu::Cpu;

/// The element's size of a REP MOVS or REP STOS with 64-bit addresses and no segment base; and whether it moves.
fn form(instruction: &Instruction) -> Option<(u8, bool)> {
    let (shift, moves) = match instruction.mnemonic() {
        Mnemonic::Movsb => (0, true),
        Mnemonic::Movsw => (1, true),
        Mnemonic::Movsd => (2, true),
        Mnemonic::Movsq => (3, true),
        Mnemonic::Stosb => (0, false),
        Mnemonic::Stosw => (1, false),
        Mnemonic::Stosd => (2, false),
        Mnemonic::Stosq => (3, false),
        _ => return None,
    };
    let repeated = instruction.has_rep_prefix() || instruction.has_repne_prefix();
    let wide =
        instruction.op0_kind() == OpKind::MemoryESRDI && (!moves || instruction.op1_kind() == OpKind::MemorySegRSI);
    let based = moves && matches!(instruction.memory_segment(), Register::FS | Register::GS);
    (repeated && wide && !based).then_some((shift, moves))
}

impl Generator<'_> {
    /// Emits REP MOVS or REP STOS. `false`: it has no such form here.
    pub fn string_form(&mut self, item: &Item) -> bool {
        let Some((shift, moves)) = form(&item.instruction) else { return false };
        let rip = item.instruction.ip();
        let live = item.live_before != 0;
        let bytes = 1 << shift;
        self.require_clear(cpu_field(offset_of!(Cpu, system_flags)), DIRECTION_MASK, rip);
        let (again, done) = (self.asm.label(), self.asm.label());
        let watched = self.leave_label(exit::INTERPRET, rip);
        let attention = self.leave_label(exit::ATTENTION, rip);
        self.asm.mov(SPARE, R9);
        self.asm.jump_unless_rcx_zero(again);
        self.asm.jump(done);
        self.asm.bind(again);
        if moves {
            self.asm.mov(ADDRESS, RSI);
            self.look_up(item, bytes, Use::Read, live);
            self.asm.lea(ADDRESS, Mem::indexed(ADDRESS, ADDEND, 0, 0));
            self.asm.store(temporary(3), ADDRESS);
        }
        self.asm.mov(ADDRESS, RDI);
        self.look_up(item, bytes, Use::Write, live);
        self.asm.store(temporary(0), SPARE);
        self.asm.load_u8(SPARE, Mem::base(SPARE, 0));
        self.asm.jump_unless_rcx_zero(watched);
        if live {
            self.asm.store(temporary(1), RAX);
            self.asm.flags_to_ax();
            self.asm.store(temporary(2), RAX);
        }
        self.asm.lea(ADDRESS, Mem::indexed(ADDRESS, ADDEND, 0, 0));
        // What is left of a page is the negative of an address with all bits above the page set.
        self.asm.mov(SPARE, RDI);
        self.asm.binary_imm(Binary::Or, SPARE, -4096);
        if moves {
            self.asm.mov(ADDEND, RSI);
            self.asm.binary_imm(Binary::Or, ADDEND, -4096);
            self.asm.binary(Binary::Cmp, SPARE, ADDEND);
            self.asm.move_if(condition::BELOW, SPARE, ADDEND);
        }
        self.asm.negate(SPARE);
        if shift != 0 {
            self.asm.shift_right(SPARE, shift);
        }
        self.asm.binary(Binary::Cmp, SPARE, R9);
        self.asm.move_if(condition::ABOVE, SPARE, R9);
        self.asm.binary(Binary::Sub, R9, SPARE);
        self.asm.lea(ADDEND, Mem::indexed(RDI, SPARE, shift, 0));
        self.asm.mov(RDI, ADDRESS);
        if moves {
            self.asm.lea(ADDRESS, Mem::indexed(RSI, SPARE, shift, 0));
            self.asm.load(RSI, temporary(3));
        }
        self.asm.store(temporary(3), RDI);
        if live {
            self.asm.load(RAX, temporary(1));
        }
        // REP, the operand's size, the opcode.
        self.asm.byte(0xf3);
        match shift {
            1 => self.asm.byte(0x66),
            3 => self.asm.byte(0x48),
            _ => {}
        }
        self.asm.byte(if moves { 0xa4 } else { 0xaa } | u8::from(shift != 0));
        self.asm.mov(RDI, ADDEND);
        if moves {
            self.asm.mov(RSI, ADDRESS);
        }
        if live {
            self.asm.load_u16(RAX, temporary(2));
            self.asm.flags_from_ax();
            self.asm.load(RAX, temporary(1));
        }
        self.asm.load(SPARE, temporary(0));
        self.check_page_note(rip, live, temporary(3));
        self.asm.mov(SPARE, R9);
        self.asm.jump_if_rcx_zero(done);
        self.asm.load32(SPARE, JUMP_TABLE);
        self.asm.jump_unless_rcx_zero(again);
        self.asm.jump(attention);
        self.asm.bind(done);
        true
    }

    /// Leaves the instruction at `rip` to the interpreter if any of the mask's bits is set in a field. Uses SPARE, changes no flag.
    pub fn require_clear(&mut self, field: Mem, mask: Mem, rip: u64) {
        let leave = self.leave_label(exit::INTERPRET, rip);
        self.asm.load(SPARE, field);
        self.asm.extract(SPARE, SPARE, mask);
        self.asm.jump_unless_rcx_zero(leave);
    }
}
