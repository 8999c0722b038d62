//! Operands of system instructions, and how their handlers end.
//!
//! Conventions: `extra` is [`MEMORY`] where the operand that may be either is in memory, else it is the register `second`; `extra2` is the
//! operand size in bytes.

use crate::cpu::{CodeSize, Cpu};
use crate::fault::Fault;
use crate::op::{Flow, Op};
use crate::page_walk::Access;

/// `Op::extra`: the operand is in memory.
pub const MEMORY: u8 = 1;

impl Cpu {
    /// Cuts an instruction pointer to the size of the running code.
    pub(crate) fn cut_ip(&self, ip: u64) -> u64 {
        match self.mode.code {
            CodeSize::Bits16 => ip & 0xffff,
            CodeSize::Bits32 => ip & 0xffff_ffff,
            CodeSize::Bits64 => ip,
        }
    }

    /// The address of the instruction after `op`. Ask before anything changes the mode.
    pub(crate) fn following_ip(&self, op: &Op) -> u64 {
        self.cut_ip(op.next_rip(self))
    }

    /// Ends an instruction after which the outer loop looks around.
    pub(crate) fn leave(&mut self, op: &Op) -> Flow {
        self.rip = self.following_ip(op);
        Flow::Leave
    }

    /// #GP(0) unless CPL is 0.
    pub(crate) fn require_cpl_0(&mut self) -> Result<(), Fault> {
        if self.cpl() != 0 { Err(self.raise_gp(0)) } else { Ok(()) }
    }

    /// Loads 1, 2, 4 or 8 bytes.
    pub(crate) fn load_sized(&mut self, linear: u64, bytes: u64, segment: u8) -> Result<u64, Fault> {
        Ok(match bytes {
            1 => u64::from(self.load::<u8>(linear, segment)?),
            2 => u64::from(self.load::<u16>(linear, segment)?),
            4 => u64::from(self.load::<u32>(linear, segment)?),
            _ => self.load::<u64>(linear, segment)?,
        })
    }

    /// Stores 1, 2, 4 or 8 bytes.
    pub(crate) fn store_sized(&mut self, linear: u64, value: u64, bytes: u64, segment: u8) -> Result<(), Fault> {
        match bytes {
            1 => self.store::<u8>(linear, value as u8, segment),
            2 => self.store::<u16>(linear, value as u16, segment),
            4 => self.store::<u32>(linear, value as u32, segment),
            _ => self.store::<u64>(linear, value, segment),
        }
    }

    /// Writes 2, 4 or 8 bytes of a register, as the architecture extends them.
    pub(crate) fn set_register(&mut self, register: u8, value: u64, bytes: u64) {
        match bytes {
            2 => self.set_word(register % 16, value as u16),
            4 => self.set_dword(register % 16, value as u32),
            _ => self.gpr[usize::from(register % 16)] = value,
        }
    }

    /// Reads a 16-bit operand from the register `second` or from memory.
    pub(crate) fn operand_u16(&mut self, op: &Op) -> Result<u16, Fault> {
        if op.extra == MEMORY {
            let linear = self.linear(op, 2, Access::Read)?;
            self.load::<u16>(linear, op.segment)
        } else {
            Ok(self.gpr[usize::from(op.second) % 16] as u16)
        }
    }

    /// Writes a value to the register `second` in the operand size, or `memory_bytes` of it to memory.
    pub(crate) fn store_operand_or_register(&mut self, op: &Op, value: u64, memory_bytes: u64) -> Result<(), Fault> {
        if op.extra == MEMORY {
            let linear = self.linear(op, memory_bytes, Access::Write)?;
            self.store_sized(linear, value, memory_bytes, op.segment)
        } else {
            self.set_register(op.second, value, u64::from(op.extra2));
            Ok(())
        }
    }
}
