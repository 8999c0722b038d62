//! A decoded instruction, ready to run.
//!
//! One instruction becomes one [`Op`]: 32 bytes with a handler that knows the exact form (operation, width, register or memory),
//! and operands resolved as far as they can be. A block is a run of ops; all of them know where they are relative to the
//! block's first byte, so RIP is written only at the end of a block.

use std::cell::Cell;

use crate::cpu::{BLOCK_RIP, Cpu, DS, ZERO};

/// What the run loop does after a handler.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Flow {
    /// Go on with the next op of the block.
    Next = 0,
    /// The block is over; `cpu.rip` holds the next instruction's address.
    Jump = 1,
    /// As `Jump`, and something changed that the outer loop looks at: mode, interrupt flag, a halt, an interrupt shadow.
    Leave = 2,
    /// An exception was raised; the instruction left no trace. The run loop sets RIP to the op's own address.
    Fault = 3,
}

/// Runs one instruction. With a C calling convention, so that generated code can be one and can call one.
pub type Handler = extern "sysv64" fn(&mut Cpu, &Op) -> Flow;

/// How a memory operand's linear address comes about.
pub mod address {
    /// 64-bit code, 64-bit offset, no base: the offset is the linear address.
    pub const FLAT: u8 = 0;
    /// 64-bit code, 64-bit offset, plus the base of FS or GS.
    pub const BASED: u8 = 1;
    /// 64-bit code with a 32-bit address size: the offset is cut to 32 bits; the base of FS or GS is added.
    pub const CUT: u8 = 2;
    /// 16- or 32-bit code with 32-bit offsets: base, limit and type are checked.
    pub const CHECKED_32: u8 = 3;
    /// 16- or 32-bit code with 16-bit offsets: base, limit and type are checked.
    pub const CHECKED_16: u8 = 4;
    /// 64-bit code: relative to the next instruction (where the block's first byte is too far away for 32 bits).
    pub const NEXT_RIP: u8 = 5;
}

/// One decoded instruction.
#[derive(Clone)]
#[repr(C)]
pub struct Op {
    /// Replaced by [`abandon`]'s handler when the block goes stale while it runs.
    pub handler: Cell<Handler>,
    /// Immediate operand, already extended; or whatever else the handler wants (a stub's index, a far selector).
    pub immediate: u64,
    /// Displacement of the memory operand. For RIP-relative operands it is relative to the block's first byte and `base` is `BLOCK_RIP`.
    pub displacement: i32,
    /// Offset of the *next* instruction from the block's first byte.
    pub next_offset: u16,
    /// Bytes of this instruction.
    pub len: u8,
    /// First register operand: an index into `cpu.gpr`, or for bytes an offset into its bytes (see [`Cpu::byte`]).
    pub first: u8,
    /// Second register operand, same forms.
    pub second: u8,
    /// Base register of the memory operand, an index into `cpu.gpr` (`ZERO` if absent, `BLOCK_RIP` for RIP-relative).
    pub base: u8,
    /// Index register, same (`ZERO` if absent).
    pub index: u8,
    /// Left shift of the index: 0 to 3.
    pub scale: u8,
    /// Segment register of the memory operand (ES CS SS DS FS GS = 0..5).
    pub segment: u8,
    /// One of [`address`].
    pub address_kind: u8,
    /// For the handler: a condition code, a count, a form.
    pub extra: u8,
    /// For the handler.
    pub extra2: u8,
}

const _: () = assert!(size_of::<Op>() == 32);

impl Op {
    /// An op without operands.
    pub fn empty(handler: Handler) -> Op {
        Op {
            handler: Cell::new(handler),
            immediate: 0,
            displacement: 0,
            next_offset: 0,
            len: 0,
            first: ZERO as u8,
            second: ZERO as u8,
            base: ZERO as u8,
            index: ZERO as u8,
            scale: 0,
            segment: DS,
            address_kind: address::FLAT,
            extra: 0,
            extra2: 0,
        }
    }

    /// The address of this instruction.
    #[inline]
    pub fn rip(&self, cpu: &Cpu) -> u64 {
        self.next_rip(cpu).wrapping_sub(u64::from(self.len))
    }

    /// The address of the next instruction, not cut to the code size.
    #[inline]
    pub fn next_rip(&self, cpu: &Cpu) -> u64 {
        cpu.gpr[BLOCK_RIP].wrapping_add(u64::from(self.next_offset))
    }
}

impl Cpu {
    /// Cuts an instruction pointer to what the code size can hold.
    #[inline(always)]
    pub fn cut_rip(&self, rip: u64) -> u64 {
        if self.is_64_bit() { rip } else { rip & 0xffff_ffff }
    }
}

impl std::fmt::Debug for Op {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Op").field("len", &self.len).field("next_offset", &self.next_offset).finish_non_exhaustive()
    }
}

/// Handler that leaves a block before the op's own instruction runs.
pub extern "sysv64" fn abandon(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.rip = cpu.cut_rip(op.rip(cpu));
    cpu.instructions = cpu.instructions.wrapping_sub(1);
    Flow::Leave
}

/// Handler of the op after a block's last instruction, where that one does not end the block itself. Its `len` is 0.
pub extern "sysv64" fn end_block(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.rip = cpu.cut_rip(op.next_rip(cpu));
    cpu.instructions = cpu.instructions.wrapping_sub(1);
    Flow::Jump
}
