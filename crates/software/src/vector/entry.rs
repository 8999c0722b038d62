//! Entries: what makes a handler of a stub.
//!
//! The frequent forms (SSE and AVX, registers alone or a memory operand that is read, in 64-bit code without a segment base) need no
//! Rust code around their stub: an entry checks that the instruction may run, finds the operand's host address as [`Cpu::linear`] and
//! [`Cpu::read_pointer`] would, and falls into the stub. Whatever is not as usual (the class is switched off, the guest has control bits of its own in MXCSR,
//! the operand is misaligned or its page is not in the look-up table) goes to the Rust handler, from the beginning.

use std::mem::offset_of;

use super::VectorState;
use super::stub::{Emitter, MXCSR_SHARED};
use crate::cpu::Cpu;
use crate::op::{Handler, Op};
use crate::tlb::{DATA_ENTRIES, DATA_LAYOUT, DataEntry};

const ENABLED: u32 = (offset_of!(Cpu, vector) + offset_of!(VectorState, enabled)) as u32;
const TABLE: u32 = (offset_of!(Cpu, tlb) + DATA_LAYOUT.table) as u32;
const GENERATION: u32 = (offset_of!(Cpu, tlb) + DATA_LAYOUT.generation) as u32;
const _: () = assert!(size_of::<DataEntry>() == 32);

const ZERO: u8 = 4;
const NOT_ZERO: u8 = 5;

/// What an entry does.
pub struct Entry {
    /// One bit of [`super::class`].
    pub class: u8,
    /// Bytes of the memory operand, 0 for none.
    pub bytes: u8,
    /// The memory operand must be aligned to its size.
    pub aligned: bool,
    /// The same instruction's handler in Rust.
    pub slow: Handler,
}

impl Emitter {
    /// The entry: from (RDI, RSI) = (CPU, op) to a stub's (RDI, RSI, RDX) = (CPU, operand, op). Gives the jumps to the slow handler.
    pub(super) fn enter(&mut self, entry: &Entry, computes: bool) -> Vec<usize> {
        let mut to_slow = Vec::new();
        // mov rdx, rsi; test byte [enabled], class
        self.bytes(&[0x48, 0x89, 0xf2]);
        self.with_displacement(&[0xf6, 0x87], ENABLED);
        self.bytes(&[entry.class]);
        to_slow.push(self.jump_if(ZERO));
        if computes {
            // cmp dword [shared], 0
            self.with_displacement(&[0x83, 0xbf], MXCSR_SHARED);
            self.bytes(&[0]);
            to_slow.push(self.jump_if(ZERO));
        }
        if entry.bytes == 0 {
            return to_slow;
        }
        let last = entry.bytes - 1;
        // movzx eax, byte [rdx + base]; mov rsi, [rdi + rax * 8]
        self.bytes(&[0x0f, 0xb6, 0x42, offset_of!(Op, base) as u8, 0x48, 0x8b, 0x34, 0xc7]);
        // movzx eax, byte [rdx + index]; mov r8, [rdi + rax * 8]
        self.bytes(&[0x0f, 0xb6, 0x42, offset_of!(Op, index) as u8, 0x4c, 0x8b, 0x04, 0xc7]);
        // movzx ecx, byte [rdx + scale]; shl r8, cl
        self.bytes(&[0x0f, 0xb6, 0x4a, offset_of!(Op, scale) as u8, 0x49, 0xd3, 0xe0]);
        // movsxd rax, dword [rdx + displacement]; add rsi, r8; add rsi, rax
        self.bytes(&[0x48, 0x63, 0x42, offset_of!(Op, displacement) as u8, 0x4c, 0x01, 0xc6, 0x48, 0x01, 0xc6]);
        if entry.aligned {
            // test sil, bytes - 1
            self.bytes(&[0x40, 0xf6, 0xc6, last]);
            to_slow.push(self.jump_if(NOT_ZERO));
        }
        // The entry: mov eax, esi; shr eax, 12; and eax, entries - 1; shl rax, 5; add rax, [table]
        self.bytes(&[0x89, 0xf0, 0xc1, 0xe8, 12, 0x25]);
        self.bytes(&(DATA_ENTRIES as u32 - 1).to_le_bytes());
        self.bytes(&[0x48, 0xc1, 0xe0, 5]);
        self.with_displacement(&[0x48, 0x03, 0x87], TABLE);
        // The tag: lea r8, [rsi + bytes - 1]; and r8, -4096; or r8, [generation]; cmp r8, [rax + read_tag]
        self.bytes(&[0x4c, 0x8d, 0x46, last, 0x49, 0x81, 0xe0, 0x00, 0xf0, 0xff, 0xff]);
        self.with_displacement(&[0x4c, 0x0b, 0x87], GENERATION);
        self.bytes(&[0x4c, 0x3b, 0x40, offset_of!(DataEntry, read_tag) as u8]);
        to_slow.push(self.jump_if(NOT_ZERO));
        // add rsi, [rax + addend]
        self.bytes(&[0x48, 0x03, 0x70, offset_of!(DataEntry, addend) as u8]);
        to_slow
    }
}
