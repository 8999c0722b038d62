//! Operands: registers of a width, memory, immediates.

use crate::access::GuestInt;
use crate::cpu::Cpu;
use crate::fault::Fault;
use crate::op::{Flow, Op};
use crate::page_walk::Access;

/// An operand width: `u8`, `u16`, `u32` or `u64`.
pub trait Width: GuestInt + PartialEq + Default {
    const BITS: u32 = Self::BYTES as u32 * 8;

    /// Reads a register as ops name it: its index, or for bytes an offset (see [`Cpu::byte`]).
    fn register(cpu: &Cpu, register: u8) -> Self;
    /// Writes a register as x86 does: 32 bits clear the upper half, 8 and 16 bits leave the rest.
    fn set_register(cpu: &mut Cpu, register: u8, value: Self);
    /// The value as a signed number.
    fn to_i64(self) -> i64;
}

macro_rules! width {
    ($type:ty, $signed:ty, $get:expr, $set:expr) => {
        impl Width for $type {
            #[inline(always)]
            fn register(cpu: &Cpu, register: u8) -> Self {
                let get: fn(&Cpu, u8) -> $type = $get;
                get(cpu, register)
            }

            #[inline(always)]
            fn set_register(cpu: &mut Cpu, register: u8, value: Self) {
                let set: fn(&mut Cpu, u8, $type) = $set;
                set(cpu, register, value);
            }

            #[inline(always)]
            fn to_i64(self) -> i64 {
                self as $signed as i64
            }
        }
    };
}

width!(u8, i8, |cpu, r| cpu.byte(r), |cpu, r, v| cpu.set_byte(r, v));
width!(u16, i16, |cpu, r| cpu.gpr[usize::from(r) & 31] as u16, |cpu, r, v| cpu.set_word(r, v));
width!(u32, i32, |cpu, r| cpu.gpr[usize::from(r) & 31] as u32, |cpu, r, v| cpu.set_dword(r, v));
width!(u64, i64, |cpu, r| cpu.gpr[usize::from(r) & 31], |cpu, r, v| cpu.gpr[usize::from(r) & 31] = v);

impl Cpu {
    /// Loads the op's memory operand.
    #[inline(always)]
    pub fn load_operand<T: GuestInt>(&mut self, op: &Op) -> Result<T, Fault> {
        let linear = self.linear(op, T::BYTES, Access::Read)?;
        self.load(linear, op.segment)
    }

    /// Stores to the op's memory operand.
    #[inline(always)]
    pub fn store_operand<T: GuestInt>(&mut self, op: &Op, value: T) -> Result<(), Fault> {
        let linear = self.linear(op, T::BYTES, Access::Write)?;
        self.store(linear, value, op.segment)
    }
}

/// The flow of an instruction that can only complete or fault.
#[inline(always)]
pub fn flow(result: Result<(), Fault>) -> Flow {
    match result {
        Ok(()) => Flow::Next,
        Err(_) => Flow::Fault,
    }
}

/// A place that an instruction reads: chosen when it is lowered.
pub trait Source {
    fn read<T: Width>(cpu: &mut Cpu, op: &Op) -> Result<T, Fault>;
}

/// A place that an instruction reads and then writes.
pub trait Place {
    /// Writes what `change` makes of the place's value, if it makes something; flags are the closure's concern and are set
    /// only after the last possible fault, by `commit`.
    fn update<T: Width, R>(
        cpu: &mut Cpu,
        op: &Op,
        change: impl FnOnce(&Cpu, T) -> (T, R),
        commit: impl FnOnce(&mut Cpu, R),
    ) -> Result<(), Fault>;
    fn read<T: Width>(cpu: &mut Cpu, op: &Op) -> Result<T, Fault>;
    fn write<T: Width>(cpu: &mut Cpu, op: &Op, value: T) -> Result<(), Fault>;
}

/// The register `op.first`.
pub struct First;
/// The register `op.second`.
pub struct Second;
/// The register `op.extra`.
pub struct Third;
/// The immediate.
pub struct Immediate;
/// The memory operand.
pub struct Memory;

impl Source for First {
    #[inline(always)]
    fn read<T: Width>(cpu: &mut Cpu, op: &Op) -> Result<T, Fault> {
        Ok(T::register(cpu, op.first))
    }
}

impl Source for Second {
    #[inline(always)]
    fn read<T: Width>(cpu: &mut Cpu, op: &Op) -> Result<T, Fault> {
        Ok(T::register(cpu, op.second))
    }
}

impl Source for Third {
    #[inline(always)]
    fn read<T: Width>(cpu: &mut Cpu, op: &Op) -> Result<T, Fault> {
        Ok(T::register(cpu, op.extra))
    }
}

impl Source for Immediate {
    #[inline(always)]
    fn read<T: Width>(_cpu: &mut Cpu, op: &Op) -> Result<T, Fault> {
        Ok(T::from_u64(op.immediate))
    }
}

impl Source for Memory {
    #[inline(always)]
    fn read<T: Width>(cpu: &mut Cpu, op: &Op) -> Result<T, Fault> {
        cpu.load_operand(op)
    }
}

impl Place for First {
    #[inline(always)]
    fn update<T: Width, R>(
        cpu: &mut Cpu,
        op: &Op,
        change: impl FnOnce(&Cpu, T) -> (T, R),
        commit: impl FnOnce(&mut Cpu, R),
    ) -> Result<(), Fault> {
        let (value, rest) = change(cpu, T::register(cpu, op.first));
        T::set_register(cpu, op.first, value);
        commit(cpu, rest);
        Ok(())
    }

    #[inline(always)]
    fn read<T: Width>(cpu: &mut Cpu, op: &Op) -> Result<T, Fault> {
        Ok(T::register(cpu, op.first))
    }

    #[inline(always)]
    fn write<T: Width>(cpu: &mut Cpu, op: &Op, value: T) -> Result<(), Fault> {
        T::set_register(cpu, op.first, value);
        Ok(())
    }
}

impl Place for Memory {
    #[inline(always)]
    fn update<T: Width, R>(
        cpu: &mut Cpu,
        op: &Op,
        change: impl FnOnce(&Cpu, T) -> (T, R),
        commit: impl FnOnce(&mut Cpu, R),
    ) -> Result<(), Fault> {
        let linear = cpu.linear(op, T::BYTES, Access::Write)?;
        let old = cpu.load_for_update(linear, op.segment)?;
        let (value, rest) = change(cpu, old);
        cpu.store(linear, value, op.segment)?;
        commit(cpu, rest);
        Ok(())
    }

    #[inline(always)]
    fn read<T: Width>(cpu: &mut Cpu, op: &Op) -> Result<T, Fault> {
        cpu.load_operand(op)
    }

    #[inline(always)]
    fn write<T: Width>(cpu: &mut Cpu, op: &Op, value: T) -> Result<(), Fault> {
        cpu.store_operand(op, value)
    }
}
