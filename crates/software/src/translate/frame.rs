//! What translated code keeps beside the guest's registers; a part of [`crate::cpu::Cpu`].

use std::mem::offset_of;

use super::arena::{FAR_JUMPS, FAR_SHIFT, JUMPS, RETURNS, frame_offset};
use super::assembler::{Mem, RSP};
use super::groups::SLOTS;
use super::lockstep::Journal;
use super::steady::LIMITS;
use crate::cpu::{Cpu, cr4};
use crate::flags;

/// Why translated code came back. Smaller values are numbers of links (see [`super::cache`]).
pub mod exit {
    /// An indirect jump to code that the jump table does not know; RIP is set.
    pub const INDIRECT: u32 = 0xffff_ffff;
    /// The instruction at RIP is the interpreter's.
    pub const INTERPRET: u32 = 0xffff_fffe;
    /// An instruction raised an exception on the host; `miss_address` is where.
    pub const HOST_FAULT: u32 = 0xffff_fffd;
    /// A handler left.
    pub const CALLOUT: u32 = 0xffff_fffc;
    /// Somebody wants the vCPU's attention; RIP is set.
    pub const ATTENTION: u32 = 0xffff_fffb;
    /// A handler faulted: `cpu.fault`.
    pub const FAULT: u32 = 0xffff_fffa;
}

/// Of so many jumps over links that do not lead to where the address space in use has their target, one aims its link anew.
pub const LINKS_BETWEEN_AIMS: u32 = 64;

/// Fields with a fixed distance from RSP.
#[derive(Debug)]
#[repr(C, align(64))]
pub struct Frame {
    /// Index of the jump table in use; 0 (never filled) while somebody wants attention. Other threads write it.
    pub jump_table: u32,
    /// Where the bytes of the address space in use begin among those of all (see [`super::bindings`]).
    pub space: u32,
    /// Distance of the returns in use from the first, in bytes; stays when somebody wants attention.
    pub returns: u32,
    /// The host's stack pointer outside translated code.
    pub host_stack: u64,
    /// Where to go on in translated code.
    pub target: u64,
    pub exit: u32,
    /// ADDRESS and SPARE at a call into Rust.
    pub miss_address: u64,
    pub argument: u64,
    pub return_address: u64,
    /// ADDEND during a call into Rust.
    pub kept_addend: u64,
    /// RAX and flags while a thunk needs them.
    pub kept_rax: u64,
    pub kept_flags: u64,
    /// Jumps over such links until one is aimed anew.
    pub countdown: u32,
    /// 0: the host's vector registers are the guest's; 1: the guest's are in the processor.
    pub vectors_missing: u64,
    pub vectors_were_missing: u64,
    pub callout_op: u64,
    /// Bits of a linear address that choose an entry of the data tables.
    pub index_mask: u64,
    /// Bits of a linear address that name the page.
    pub page_mask: u64,
    /// Bits of a linear address that choose an entry of a jump table, and of [`super::arena::Jumps`]' table for all address spaces.
    pub jump_mask: u64,
    pub far_mask: u64,
    /// Bits of the guest's RSP that choose an entry of the returns.
    pub return_mask: u64,
    /// All bits but IF and AC, of RFLAGS.
    pub without_interrupts: u64,
    pub without_access: u64,
    /// Not 0: an interrupt waits for IF, or for its turn.
    pub deferred: u32,
    /// Not 0: translated code has changed AC.
    pub tables_stale: u32,
    /// Bits 1 to 16: of an address turned right by 47 and one more, all zero if it is canonical.
    pub canonical_mask: u64,
    pub temporary: [u64; 4],
    /// RFLAGS.DF.
    pub direction_mask: u64,
    /// CR4.TSD.
    pub time_stamp_disable: u64,
    pub bits_31: u64,
    pub bits_63: u64,
    /// The exposed address of the translator while its code runs.
    pub translator: usize,
    /// Host addresses of groups' stretches, and of their pages' notes.
    pub stretches: [u64; SLOTS],
    pub notes: [u64; SLOTS],
    /// Of the registers that move steady groups ([`super::steady`]).
    pub limits: [u64; LIMITS],
    /// Bits 0 to 11, and bit 12.
    pub offset_mask: u64,
    pub next_page_mask: u64,
    /// In lockstep: what translated code has stored to.
    pub journal: Option<Box<Journal>>,
}

impl Default for Frame {
    fn default() -> Self {
        Frame {
            jump_table: 0,
            space: 0,
            returns: 0,
            host_stack: 0,
            target: 0,
            exit: exit::INDIRECT,
            miss_address: 0,
            argument: 0,
            return_address: 0,
            kept_addend: 0,
            kept_rax: 0,
            kept_flags: 0,
            countdown: LINKS_BETWEEN_AIMS,
            vectors_missing: 1,
            vectors_were_missing: 1,
            callout_op: 0,
            index_mask: (crate::tlb::DATA_ENTRIES as u64 - 1) << 12,
            page_mask: !0xfff,
            jump_mask: JUMPS as u64 - 1,
            return_mask: (RETURNS as u64 - 1) << 3,
            far_mask: (FAR_JUMPS as u64 - 1) << FAR_SHIFT,
            without_interrupts: !crate::flags::IF,
            without_access: !crate::flags::AC,
            deferred: 0,
            tables_stale: 0,
            canonical_mask: 0x1_fffe,
            temporary: [0; 4],
            direction_mask: flags::DF,
            time_stamp_disable: cr4::TSD,
            bits_31: 31,
            bits_63: 63,
            translator: 0,
            stretches: [0; SLOTS],
            notes: [0; SLOTS],
            limits: [0; LIMITS],
            offset_mask: 0xfff,
            next_page_mask: 0x1000,
            journal: None,
        }
    }
}

/// A memory operand for a field of the processor.
pub const fn cpu_field(offset: usize) -> Mem {
    Mem::base(RSP, offset as i32)
}

macro_rules! fields {
    ($($name:ident = $field:ident;)*) => {
        $(pub const $name: Mem = Mem::base(RSP, frame_offset(offset_of!(Frame, $field)));)*
    };
}

fields! {
    JUMP_TABLE = jump_table;
    SPACE = space;
    RETURNS_IN_USE = returns;
    RETURN_MASK = return_mask;
    HOST_STACK = host_stack;
    TARGET = target;
    EXIT = exit;
    ARGUMENT = argument;
    MISS_ADDRESS = miss_address;
    RETURN_ADDRESS = return_address;
    KEPT_ADDEND = kept_addend;
    KEPT_RAX = kept_rax;
    KEPT_FLAGS = kept_flags;
    JOURNAL = journal;
    COUNTDOWN = countdown;
    VECTORS_MISSING = vectors_missing;
    VECTORS_WERE_MISSING = vectors_were_missing;
    CALLOUT_OP = callout_op;
    INDEX_MASK = index_mask;
    PAGE_MASK = page_mask;
    JUMP_MASK = jump_mask;
    FAR_MASK = far_mask;
    WITHOUT_INTERRUPTS = without_interrupts;
    WITHOUT_ACCESS = without_access;
    DEFERRED = deferred;
    TABLES_STALE = tables_stale;
    CANONICAL_MASK = canonical_mask;
    DIRECTION_MASK = direction_mask;
    TIME_STAMP_DISABLE = time_stamp_disable;
    OFFSET_MASK = offset_mask;
    NEXT_PAGE_MASK = next_page_mask;
    BITS_31 = bits_31;
    BITS_63 = bits_63;
}

pub const RIP: Mem = cpu_field(offset_of!(Cpu, rip));
pub const ARITHMETIC: Mem = cpu_field(offset_of!(Cpu, arithmetic));

/// One of the places for values that wait while the scratch registers are in use.
pub const fn temporary(index: usize) -> Mem {
    Mem::base(RSP, frame_offset(offset_of!(Frame, temporary) + 8 * index))
}

/// Where a group keeps the host address of its stretch.
pub const fn stretch_slot(slot: usize) -> Mem {
    Mem::base(RSP, frame_offset(offset_of!(Frame, stretches) + 8 * slot))
}

/// Where a group that is stored to keeps the address of its page's note.
pub const fn note_slot(slot: usize) -> Mem {
    Mem::base(RSP, frame_offset(offset_of!(Frame, notes) + 8 * slot))
}

/// Where the limit of a register in a steady loop is.
pub const fn limit_slot(slot: usize) -> Mem {
    Mem::base(RSP, frame_offset(offset_of!(Frame, limits) + 8 * slot))
}

/// The slot of a guest register in [`Cpu::gpr`].
pub const fn register_slot(register: u8) -> Mem {
    cpu_field(offset_of!(Cpu, gpr) + 8 * register as usize)
}
