//! PUSH POP PUSHA POPA PUSHF POPF ENTER LEAVE.
//!
//! The stack pointer has the size of the stack (`cpu.mode.stack`); it changes only after the last access.

use crate::access::GuestInt;
use crate::cpu::{CodeSize, Cpu, RBP, RSP, SS};
use crate::fault::Fault;
use crate::flags::{self, ArithmeticFlags};
use crate::op::{Flow, Op};
use crate::ops::operand::{Source, Width, flow};
use crate::page_walk::Access;

impl Cpu {
    /// An offset in the stack segment, cut to the stack's size.
    #[inline(always)]
    pub fn cut_to_stack(&self, offset: u64) -> u64 {
        match self.mode.stack {
            CodeSize::Bits64 => offset,
            CodeSize::Bits32 => offset & 0xffff_ffff,
            CodeSize::Bits16 => offset & 0xffff,
        }
    }

    /// Stores at an offset in the stack segment.
    #[inline(always)]
    pub fn store_stack<T: GuestInt>(&mut self, offset: u64, value: T) -> Result<(), Fault> {
        if self.is_64_bit() {
            return self.store(offset, value, SS);
        }
        let offset = self.cut_to_stack(offset);
        let linear = self.linear_at(SS, offset, T::BYTES, Access::Write)?;
        self.store(linear, value, SS)
    }

    /// Loads from an offset in the stack segment.
    #[inline(always)]
    pub fn load_stack<T: GuestInt>(&mut self, offset: u64) -> Result<T, Fault> {
        if self.is_64_bit() {
            return self.load(offset, SS);
        }
        let offset = self.cut_to_stack(offset);
        let linear = self.linear_at(SS, offset, T::BYTES, Access::Read)?;
        self.load(linear, SS)
    }

    /// Pushes a value.
    #[inline(always)]
    pub fn push_value<T: GuestInt>(&mut self, value: T) -> Result<(), Fault> {
        let top = self.gpr[RSP].wrapping_sub(T::BYTES);
        self.store_stack(top, value)?;
        self.set_stack_pointer(top);
        Ok(())
    }

    /// Pops a value.
    #[inline(always)]
    pub fn pop_value<T: GuestInt>(&mut self) -> Result<T, Fault> {
        let top = self.gpr[RSP];
        let value = self.load_stack(top)?;
        self.set_stack_pointer(top.wrapping_add(T::BYTES));
        Ok(value)
    }
}

/// PUSH
pub extern "sysv64" fn push<T: Width, S: Source>(cpu: &mut Cpu, op: &Op) -> Flow {
    let Ok(value) = S::read::<T>(cpu, op) else { return Flow::Fault };
    flow(cpu.push_value(value))
}

/// PUSH of a 64-bit register in 64-bit code.
pub extern "sysv64" fn push_register_64(cpu: &mut Cpu, op: &Op) -> Flow {
    let top = cpu.gpr[RSP].wrapping_sub(8);
    let value = cpu.gpr[usize::from(op.first) & 31];
    let result = cpu.store(top, value, SS);
    if result.is_ok() {
        cpu.gpr[RSP] = top;
    }
    flow(result)
}

/// POP to a 64-bit register in 64-bit code.
pub extern "sysv64" fn pop_register_64(cpu: &mut Cpu, op: &Op) -> Flow {
    let top = cpu.gpr[RSP];
    let Ok(value) = cpu.load(top, SS) else { return Flow::Fault };
    cpu.gpr[RSP] = top.wrapping_add(8);
    cpu.gpr[usize::from(op.first) & 31] = value;
    Flow::Next
}

/// POP to a register.
pub extern "sysv64" fn pop_register<T: Width>(cpu: &mut Cpu, op: &Op) -> Flow {
    let Ok(value) = cpu.pop_value::<T>() else { return Flow::Fault };
    T::set_register(cpu, op.first, value);
    Flow::Next
}

/// POP to memory: its address is computed with the stack pointer as it is after the pop.
pub extern "sysv64" fn pop_memory<T: Width>(cpu: &mut Cpu, op: &Op) -> Flow {
    let old = cpu.gpr[RSP];
    let result = cpu.pop_value::<T>().and_then(|value| cpu.store_operand(op, value));
    if result.is_err() {
        cpu.gpr[RSP] = old;
    }
    flow(result)
}

/// PUSH of a segment register (`op.first`): zero-extended.
pub extern "sysv64" fn push_segment<T: Width>(cpu: &mut Cpu, op: &Op) -> Flow {
    let selector = cpu.segments[usize::from(op.first) % 6].selector;
    flow(cpu.push_value(T::from_u64(u64::from(selector))))
}

/// PUSHA: eight registers, the old stack pointer among them.
pub extern "sysv64" fn push_all<T: Width>(cpu: &mut Cpu, _op: &Op) -> Flow {
    let old = cpu.gpr[RSP];
    let lowest = old.wrapping_sub(8 * T::BYTES);
    // All eight are checked before the first is stored.
    for number in 0..8 {
        let offset = cpu.cut_to_stack(lowest.wrapping_add(number * T::BYTES));
        let checked = cpu
            .linear_at(SS, offset, T::BYTES, Access::Write)
            .and_then(|linear| cpu.probe(linear, T::BYTES, Access::Write, SS));
        if checked.is_err() {
            return Flow::Fault;
        }
    }
    for number in 0..8u64 {
        let value = T::from_u64(cpu.gpr[7 - number as usize]);
        if cpu.store_stack(lowest.wrapping_add(number * T::BYTES), value).is_err() {
            return Flow::Fault;
        }
    }
    cpu.set_stack_pointer(lowest);
    Flow::Next
}

/// POPA: eight registers; the stack pointer's value is skipped.
pub extern "sysv64" fn pop_all<T: Width>(cpu: &mut Cpu, _op: &Op) -> Flow {
    let old = cpu.gpr[RSP];
    let mut values = [T::default(); 8];
    for (number, value) in (0..).zip(&mut values) {
        match cpu.load_stack(old.wrapping_add(number * T::BYTES)) {
            Ok(loaded) => *value = loaded,
            Err(_) => return Flow::Fault,
        }
    }
    for (number, value) in (0..).zip(values) {
        let register = 7 - number;
        if usize::from(register) != RSP {
            T::set_register(cpu, register, value);
        }
    }
    cpu.set_stack_pointer(old.wrapping_add(8 * T::BYTES));
    Flow::Next
}

/// #GP(0) for PUSHF and POPF in virtual-8086 mode with an I/O privilege level below 3.
fn check_virtual_8086(cpu: &mut Cpu) -> Result<(), Fault> {
    if cpu.mode.virtual_8086 && cpu.iopl() < 3 { Err(cpu.raise_gp(0)) } else { Ok(()) }
}

/// PUSHF: VM and RF read as zero.
pub extern "sysv64" fn push_flags<T: Width>(cpu: &mut Cpu, _op: &Op) -> Flow {
    let value = cpu.rflags() & !(flags::VM | flags::RF);
    flow(check_virtual_8086(cpu).and_then(|()| cpu.push_value(T::from_u64(value))))
}

/// POPF: what may change depends on the privilege (SDM vol. 2, POPF).
pub extern "sysv64" fn pop_flags<T: Width>(cpu: &mut Cpu, op: &Op) -> Flow {
    let Ok(value) = check_virtual_8086(cpu).and_then(|()| cpu.pop_value::<T>()) else { return Flow::Fault };
    let value = value.to_u64();
    let mut changeable = flags::TF | flags::DF | flags::NT;
    if T::BYTES > 2 {
        changeable |= flags::AC | flags::ID;
    }
    if cpu.mode.cpl == 0 {
        changeable |= flags::IOPL;
    }
    if cpu.mode.cpl <= cpu.iopl() {
        changeable |= flags::IF;
    }
    let cleared = if T::BYTES > 2 { flags::RF } else { 0 };
    let old = cpu.system_flags;
    let new = old & !changeable & !cleared | value & changeable;
    cpu.arithmetic = ArithmeticFlags::from_rflags(value);
    cpu.system_flags = new;
    if (old ^ new) & flags::AC != 0 {
        cpu.update_mode();
    }
    // The outer loop looks at interrupts and at the trap flag.
    if new & !old & flags::IF != 0 || new & flags::TF != 0 {
        cpu.rip = cpu.cut_rip(op.next_rip(cpu));
        return Flow::Leave;
    }
    Flow::Next
}

/// ENTER: the frame's size is the immediate, its nesting level `op.extra`.
pub extern "sysv64" fn enter<T: Width>(cpu: &mut Cpu, op: &Op) -> Flow {
    flow(enter_frame::<T>(cpu, op))
}

fn enter_frame<T: Width>(cpu: &mut Cpu, op: &Op) -> Result<(), Fault> {
    let level = u64::from(op.extra & 31);
    let old = cpu.gpr[RSP];
    let frame = old.wrapping_sub(T::BYTES);
    let mut top = frame;
    let mut display = [T::default(); 32];
    for number in 1..level {
        display[number as usize] = cpu.load_stack(cpu.gpr[RBP].wrapping_sub(number * T::BYTES))?;
    }
    cpu.store_stack(frame, T::from_u64(cpu.gpr[RBP]))?;
    for number in 1..level {
        top = top.wrapping_sub(T::BYTES);
        cpu.store_stack(top, display[number as usize])?;
    }
    if level > 0 {
        top = top.wrapping_sub(T::BYTES);
        cpu.store_stack(top, T::from_u64(frame))?;
    }
    top = top.wrapping_sub(op.immediate & 0xffff);
    // The new top must be writable (SDM vol. 2, ENTER).
    let last = cpu.cut_to_stack(top);
    let linear = cpu.linear_at(SS, last, T::BYTES, Access::Write)?;
    cpu.probe(linear, T::BYTES, Access::Write, SS)?;
    T::set_register(cpu, RBP as u8, T::from_u64(frame));
    cpu.set_stack_pointer(top);
    Ok(())
}

/// LEAVE
pub extern "sysv64" fn leave<T: Width>(cpu: &mut Cpu, _op: &Op) -> Flow {
    let frame = cpu.gpr[RBP];
    let Ok(value) = cpu.load_stack::<T>(frame) else { return Flow::Fault };
    cpu.set_stack_pointer(frame.wrapping_add(T::BYTES));
    T::set_register(cpu, RBP as u8, value);
    Flow::Next
}
