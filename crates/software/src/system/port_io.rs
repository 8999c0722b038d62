//! IN, OUT, INS, OUTS and who may use which port (SDM vol. 1, chapter 19).

use polder_machine::AccessSize;

use super::descriptor::is_32_bit_tss;
use crate::cpu::{Cpu, DS, ES, RAX, RCX, RDI, RDX, RSI};
use crate::fault::Fault;
use crate::flags;
use crate::op::{Flow, Op};
use crate::page_walk::{Access, Privilege};
use crate::stopwatch::Activity;

/// Iterations of a repeated string instruction before interrupts are looked at.
const REPEAT_MAX: u32 = 256;

/// `Op::immediate` of INS and OUTS with a REP prefix.
pub const REPEAT: u64 = 1;

impl Cpu {
    /// #GP(0) unless the running code may use `bytes` ports from `port` on.
    fn check_port(&mut self, port: u16, bytes: u64) -> Result<(), Fault> {
        let free = !self.mode.virtual_8086 && (!self.mode.protected || self.cpl() <= self.iopl());
        if free {
            return Ok(());
        }
        let limit = u64::from(self.tr.limit);
        if !is_32_bit_tss(self.tr.attributes) || limit < 103 {
            return Err(self.raise_gp(0));
        }
        let map = u64::from(self.load_implicit::<u16>(self.tr.base.wrapping_add(102))?);
        let at = map + u64::from(port / 8);
        if at + 1 > limit {
            return Err(self.raise_gp(0));
        }
        let bits = self.load_implicit::<u16>(self.tr.base.wrapping_add(at))?;
        let mask = ((1u16 << bytes) - 1) << (port % 8);
        if bits & mask != 0 {
            return Err(self.raise_gp(0));
        }
        Ok(())
    }

    fn port_size(bytes: u64) -> AccessSize {
        match bytes {
            1 => AccessSize::Byte,
            2 => AccessSize::Word,
            _ => AccessSize::Dword,
        }
    }

    fn read_port(&mut self, port: u16, bytes: u64) -> u64 {
        self.counters.port += 1;
        self.note_port_breakpoint(port, bytes);
        self.vector.pause_floats();
        let before = self.stopwatch.turn_to(Activity::Devices);
        let value = self.services.ports.read(u64::from(port), Self::port_size(bytes));
        self.stopwatch.turn_to(before);
        self.vector.resume_floats();
        value
    }

    fn write_port(&mut self, port: u16, bytes: u64, value: u64) {
        self.counters.port += 1;
        self.note_port_breakpoint(port, bytes);
        let size = Self::port_size(bytes);
        self.vector.pause_floats();
        let before = self.stopwatch.turn_to(Activity::Devices);
        self.services.ports.write(u64::from(port), size, value & size.all_ones());
        self.stopwatch.turn_to(before);
        self.vector.resume_floats();
    }

    /// The port: `immediate`, or DX with [`MEMORY`](super::operand::MEMORY) in `extra`.
    fn port(&self, op: &Op) -> u16 {
        if op.extra != 0 { self.gpr[RDX] as u16 } else { op.immediate as u16 & 0xff }
    }

    /// IN. `extra`: port in DX; `extra2`: operand size.
    pub(crate) fn op_in(&mut self, op: &Op) -> Result<Flow, Fault> {
        let bytes = u64::from(op.extra2);
        let port = self.port(op);
        self.check_port(port, bytes)?;
        let value = self.read_port(port, bytes);
        match bytes {
            1 => self.set_byte(0, value as u8),
            2 => self.set_word(0, value as u16),
            _ => self.set_dword(0, value as u32),
        }
        Ok(Flow::Next)
    }

    /// OUT; operands as for IN.
    pub(crate) fn op_out(&mut self, op: &Op) -> Result<Flow, Fault> {
        let bytes = u64::from(op.extra2);
        let port = self.port(op);
        self.check_port(port, bytes)?;
        self.write_port(port, bytes, self.gpr[RAX]);
        // The device may have stopped the machine or changed a page that this block came from.
        Ok(self.leave(op))
    }

    /// INS. `extra`: address size in bytes; `extra2`: operand size; `immediate`: [`REPEAT`] or 0.
    pub(crate) fn op_in_string(&mut self, op: &Op) -> Result<Flow, Fault> {
        self.repeat(op, |cpu| {
            let bytes = u64::from(op.extra2);
            let port = cpu.gpr[RDX] as u16;
            cpu.check_port(port, bytes)?;
            let offset = cpu.string_offset(op, RDI);
            let linear = cpu.linear_at(ES, offset, bytes, Access::Write)?;
            let checked = cpu.check_access(linear, bytes, Access::Write, ES, Privilege::Current)?;
            let value = cpu.read_port(port, bytes);
            cpu.perform_store(checked, value, bytes);
            cpu.advance(op, RDI);
            Ok(())
        })
    }

    /// OUTS; operands as for INS.
    pub(crate) fn op_out_string(&mut self, op: &Op) -> Result<Flow, Fault> {
        self.repeat(op, |cpu| {
            let bytes = u64::from(op.extra2);
            let port = cpu.gpr[RDX] as u16;
            cpu.check_port(port, bytes)?;
            let segment = if op.segment < 6 { op.segment } else { DS };
            let offset = cpu.string_offset(op, RSI);
            let linear = cpu.linear_at(segment, offset, bytes, Access::Read)?;
            let value = cpu.load_sized(linear, bytes, segment)?;
            cpu.write_port(port, bytes, value);
            cpu.advance(op, RSI);
            Ok(())
        })
    }

    fn string_offset(&self, op: &Op, register: usize) -> u64 {
        cut(self.gpr[register], op.extra)
    }

    fn set_counted(&mut self, op: &Op, register: usize, value: u64) {
        self.set_register(register as u8, value, u64::from(op.extra));
    }

    fn advance(&mut self, op: &Op, register: usize) {
        let step = u64::from(op.extra2);
        let step = if self.system_flags & flags::DF != 0 { step.wrapping_neg() } else { step };
        self.set_counted(op, register, self.gpr[register].wrapping_add(step));
    }

    fn repeat(&mut self, op: &Op, mut once: impl FnMut(&mut Cpu) -> Result<(), Fault>) -> Result<Flow, Fault> {
        if op.immediate != REPEAT {
            once(self)?;
            return Ok(self.leave(op));
        }
        let stepping = self.needs_single_step();
        for _ in 0..REPEAT_MAX {
            let count = cut(self.gpr[RCX], op.extra);
            if count == 0 {
                return Ok(self.leave(op));
            }
            once(self)?;
            self.set_counted(op, RCX, count.wrapping_sub(1));
            if count > 1 && stepping {
                break;
            }
        }
        if cut(self.gpr[RCX], op.extra) == 0 {
            return Ok(self.leave(op));
        }
        // Not finished: the instruction starts again with what is left.
        self.rip = self.cut_ip(op.rip(self));
        Ok(Flow::Leave)
    }
}

/// The low `bytes` bytes of a register.
fn cut(value: u64, bytes: u8) -> u64 {
    match bytes {
        2 => value & 0xffff,
        4 => value & 0xffff_ffff,
        _ => value,
    }
}
