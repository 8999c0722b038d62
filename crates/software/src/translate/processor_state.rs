//! Instructions in translated code that look at the processor's state beside general registers
//! (the direction flag, selectors, the time-stamp counter).

use std::mem::offset_of;

use iced_x86::{Code, Mnemonic, OpKind};

use super::assembler::{Mem, R9, RAX, RDX};
use super::frame::{DIRECTION_MASK, TIME_STAMP_DISABLE, cpu_field};
use super::generate::{Generator, Result};
use super::guest_code::{Item, general_register};
use super::registers::{SPARE, home};
use super::x87::selector;
use crate::cpu::Cpu;
use crate::tlb::USER;

const SYSTEM_FLAGS: Mem = cpu_field(offset_of!(Cpu, system_flags));

impl Generator<'_> {
    /// Emits such an instruction. `false`: it has no form here.
    pub fn state_form(&mut self, item: &Item) -> Result<bool> {
        let instruction = &item.instruction;
        match instruction.mnemonic() {
            // Direction is forward nearly always; if not the interpreter changes it.
            Mnemonic::Cld => self.require_clear(SYSTEM_FLAGS, DIRECTION_MASK, instruction.ip()),
            Mnemonic::Rdtsc | Mnemonic::Rdtscp => self.time_stamp(item),
            Mnemonic::Mov if is_selector_read(instruction.code()) && instruction.op0_kind() == OpKind::Register => {
                let segment = crate::lower::segment_number(instruction.op1_register());
                let Some((number, _)) = general_register(instruction.op0_register()) else { return Ok(false) };
                let to = home(number).unwrap_or(SPARE);
                self.asm.load_u16(to, selector(segment));
                self.set_register(number, to);
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// RDTSC and RDTSCP.
    fn time_stamp(&mut self, item: &Item) {
        if self.context.table == USER {
            self.require_clear(cpu_field(offset_of!(Cpu, cr4)), TIME_STAMP_DISABLE, item.instruction.ip());
        }
        let has_id = item.instruction.mnemonic() == Mnemonic::Rdtscp;
        if has_id {
            // LFENCE: all loads before it have been done.
            self.asm.raw(&[0x0f, 0xae, 0xe8]);
        }
        self.asm.raw(&[0x0f, 0x31]);
        self.asm.rotate_right(RDX, RDX, 32);
        self.asm.load(SPARE, cpu_field(offset_of!(Cpu, tsc_offset)));
        self.asm.lea(RAX, Mem::indexed(RAX, RDX, 0, 0));
        self.asm.lea(RAX, Mem::indexed(RAX, SPARE, 0, 0));
        self.asm.rotate_right(RDX, RAX, 32);
        self.asm.lea32(RDX, Mem::base(RDX, 0));
        self.asm.lea32(RAX, Mem::base(RAX, 0));
        if has_id {
            self.asm.load32(R9, cpu_field(offset_of!(Cpu, tsc_aux)));
        }
    }
}

fn is_selector_read(code: Code) -> bool {
    matches!(code, Code::Mov_r32m16_Sreg | Code::Mov_r64m16_Sreg)
}
