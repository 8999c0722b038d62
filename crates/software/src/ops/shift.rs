//! SHL SHR SAR ROL ROR RCL RCR SHLD SHRD.
//!
//! The host executes the same instruction with the same masked count, so a zero count leaves the flags alone here too. Shifts by
//! a count that is not zero overwrite all flags and need not load them before.

use std::arch::asm;

use crate::cpu::{Cpu, RCX};
use crate::flags::ArithmeticFlags;
use crate::op::{Flow, Op};
use crate::ops::operand::{Place, Width, flow};

/// A shift or rotation.
pub trait Shift {
    /// A count that is not zero sets all flags.
    const SETS_ALL_FLAGS: bool;
    /// `count` is masked already.
    fn run<T: Width>(value: T, count: u8, flags: ArithmeticFlags) -> (T, ArithmeticFlags);
    /// For counts other than zero, where [`Shift::SETS_ALL_FLAGS`].
    fn run_without_flags<T: Width>(value: T, count: u8) -> (T, ArithmeticFlags);
}

macro_rules! host_shift {
    ($instruction:literal, $register:literal, $class:ident, $value:expr, $count:expr, $flags:expr) => {{
        let mut value = $value;
        let flags: u16;
        // SAFETY: arithmetic on registers; the first two instructions set the host's flags to the guest's.
        unsafe {
            asm!("add al, 127", "sahf", concat!($instruction, " {v", $register, "}, cl"), "lahf", "seto al",
                 v = inout($class) value, in("cl") $count, inout("ax") $flags.0 => flags, options(pure, nomem, nostack));
        }
        (u64::from(value), ArithmeticFlags(flags))
    }};
    ($instruction:literal, $register:literal, $class:ident, $value:expr, $count:expr) => {{
        let mut value = $value;
        let flags: u16;
        // SAFETY: arithmetic on registers.
        unsafe {
            asm!(concat!($instruction, " {v", $register, "}, cl"), "lahf", "seto al",
                 v = inout($class) value, in("cl") $count, out("ax") flags, options(pure, nomem, nostack));
        }
        (u64::from(value), ArithmeticFlags(flags))
    }};
}

macro_rules! shift {
    ($name:ident, $instruction:literal, $all:literal) => {
        #[doc = $instruction]
        pub struct $name;

        impl Shift for $name {
            const SETS_ALL_FLAGS: bool = $all;

            #[inline(always)]
            fn run<T: Width>(value: T, count: u8, flags: ArithmeticFlags) -> (T, ArithmeticFlags) {
                let value = value.to_u64();
                let (value, flags) = match T::BYTES {
                    1 => host_shift!($instruction, "", reg_byte, value as u8, count, flags),
                    2 => host_shift!($instruction, ":x", reg, value as u16, count, flags),
                    4 => host_shift!($instruction, ":e", reg, value as u32, count, flags),
                    _ => host_shift!($instruction, ":r", reg, value, count, flags),
                };
                (T::from_u64(value), flags)
            }

            #[inline(always)]
            fn run_without_flags<T: Width>(value: T, count: u8) -> (T, ArithmeticFlags) {
                let value = value.to_u64();
                let (value, flags) = match T::BYTES {
                    1 => host_shift!($instruction, "", reg_byte, value as u8, count),
                    2 => host_shift!($instruction, ":x", reg, value as u16, count),
                    4 => host_shift!($instruction, ":e", reg, value as u32, count),
                    _ => host_shift!($instruction, ":r", reg, value, count),
                };
                (T::from_u64(value), flags)
            }
        }
    };
}

shift!(Shl, "shl", true);
shift!(Shr, "shr", true);
shift!(Sar, "sar", true);
shift!(Rol, "rol", false);
shift!(Ror, "ror", false);
shift!(Rcl, "rcl", false);
shift!(Rcr, "rcr", false);

/// What a count is masked with.
#[inline(always)]
fn mask<T: Width>() -> u8 {
    if T::BYTES == 8 { 63 } else { 31 }
}

#[inline(always)]
fn shift<O: Shift, T: Width, D: Place>(cpu: &mut Cpu, op: &Op, count: u8) -> Flow {
    let count = count & mask::<T>();
    flow(D::update(
        cpu,
        op,
        |cpu, value: T| {
            if O::SETS_ALL_FLAGS && count != 0 {
                O::run_without_flags(value, count)
            } else {
                O::run(value, count, cpu.arithmetic)
            }
        },
        |cpu, flags| cpu.arithmetic = flags,
    ))
}

/// By CL.
pub extern "sysv64" fn by_cl<O: Shift, T: Width, D: Place>(cpu: &mut Cpu, op: &Op) -> Flow {
    let count = cpu.gpr[RCX] as u8;
    shift::<O, T, D>(cpu, op, count)
}

/// By an immediate, or by one.
pub extern "sysv64" fn by_immediate<O: Shift, T: Width, D: Place>(cpu: &mut Cpu, op: &Op) -> Flow {
    shift::<O, T, D>(cpu, op, op.immediate as u8)
}

/// SHLD or SHRD.
pub trait DoubleShift {
    fn run<T: Width>(value: T, filler: T, count: u8, flags: ArithmeticFlags) -> (T, ArithmeticFlags);
}

macro_rules! host_double {
    ($instruction:literal, $register:literal, $value:expr, $filler:expr, $count:expr, $flags:expr) => {{
        let mut value = $value;
        let filler = $filler;
        let flags: u16;
        // SAFETY: arithmetic on registers; the first two instructions set the host's flags to the guest's.
        unsafe {
            asm!("add al, 127", "sahf",
                 concat!($instruction, " {v", $register, "}, {f", $register, "}, cl"), "lahf", "seto al",
                 v = inout(reg) value, f = in(reg) filler, in("cl") $count, inout("ax") $flags.0 => flags,
                 options(pure, nomem, nostack));
        }
        (u64::from(value), ArithmeticFlags(flags))
    }};
}

macro_rules! double_shift {
    ($name:ident, $instruction:literal) => {
        #[doc = $instruction]
        pub struct $name;

        impl DoubleShift for $name {
            #[inline(always)]
            fn run<T: Width>(value: T, filler: T, count: u8, flags: ArithmeticFlags) -> (T, ArithmeticFlags) {
                let (value, filler) = (value.to_u64(), filler.to_u64());
                let (value, flags) = match T::BYTES {
                    2 => host_double!($instruction, ":x", value as u16, filler as u16, count, flags),
                    4 => host_double!($instruction, ":e", value as u32, filler as u32, count, flags),
                    _ => host_double!($instruction, ":r", value, filler, count, flags),
                };
                (T::from_u64(value), flags)
            }
        }
    };
}

double_shift!(Shld, "shld");
double_shift!(Shrd, "shrd");

/// SHLD and SHRD by an immediate (`op.extra` 0) or by CL (1).
pub extern "sysv64" fn double<O: DoubleShift, T: Width, D: Place>(cpu: &mut Cpu, op: &Op) -> Flow {
    let count = if op.extra == 0 { op.immediate as u8 } else { cpu.gpr[RCX] as u8 } & mask::<T>();
    let filler = T::register(cpu, op.second);
    flow(D::update(
        cpu,
        op,
        |cpu, value: T| O::run(value, filler, count, cpu.arithmetic),
        |cpu, flags| cpu.arithmetic = flags,
    ))
}
