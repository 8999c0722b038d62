//! MUL IMUL DIV IDIV.

use std::arch::asm;

use crate::cpu::{Cpu, RAX, RDX};
use crate::fault::{Exception, Fault, vector};
use crate::flags::ArithmeticFlags;
use crate::op::{Flow, Op};
use crate::ops::operand::{Source, Width};

/// MUL or IMUL with a result of double width.
pub trait Multiply {
    /// Low half, high half, flags.
    fn run<T: Width>(a: T, b: T) -> (T, T, ArithmeticFlags);
}

/// One host multiplication of RAX; the product is moved away before the flags go through AX.
macro_rules! host_multiply {
    ($instruction:literal, $register:literal, $a:expr, $b:expr) => {{
        let (a, b): (u64, u64) = ($a, $b);
        let (low, high, flags): (u64, u64, u64);
        // SAFETY: arithmetic on registers.
        unsafe {
            asm!(concat!($instruction, " {b", $register, "}"), "mov {low}, rax", "lahf", "seto al",
                 b = in(reg) b, low = out(reg) low, inout("rax") a => flags, out("rdx") high,
                 options(pure, nomem, nostack));
        }
        (low, high, flags)
    }};
}

macro_rules! multiply {
    ($name:ident, $instruction:literal) => {
        #[doc = $instruction]
        pub struct $name;

        impl Multiply for $name {
            #[inline(always)]
            fn run<T: Width>(a: T, b: T) -> (T, T, ArithmeticFlags) {
                let (a, b) = (a.to_u64(), b.to_u64());
                let (low, high, flags) = match T::BYTES {
                    1 => {
                        let (low, flags): (u64, u64);
                        // SAFETY: arithmetic on registers.
                        unsafe {
                            asm!(concat!($instruction, " {b}"), "mov {low}, rax", "lahf", "seto al",
                                 b = in(reg_byte) b as u8, low = out(reg) low, inout("rax") a => flags,
                                 options(pure, nomem, nostack));
                        }
                        (low, low >> 8, flags)
                    }
                    2 => host_multiply!($instruction, ":x", a, b),
                    4 => host_multiply!($instruction, ":e", a, b),
                    _ => host_multiply!($instruction, ":r", a, b),
                };
                (T::from_u64(low), T::from_u64(high), ArithmeticFlags(flags as u16))
            }
        }
    };
}

multiply!(Mul, "mul");
multiply!(Imul, "imul");

/// Sets AX (for bytes), or DX:AX, EDX:EAX, RDX:RAX.
#[inline(always)]
fn set_double<T: Width>(cpu: &mut Cpu, low: T, high: T) {
    if T::BYTES == 1 {
        cpu.set_word(RAX as u8, (high.to_u64() << 8 | low.to_u64()) as u16);
    } else {
        T::set_register(cpu, RAX as u8, low);
        T::set_register(cpu, RDX as u8, high);
    }
}

/// MUL and IMUL with one operand.
pub extern "sysv64" fn multiply<O: Multiply, T: Width, S: Source>(cpu: &mut Cpu, op: &Op) -> Flow {
    let Ok(operand) = S::read::<T>(cpu, op) else { return Flow::Fault };
    let accumulator = T::from_u64(cpu.gpr[RAX]);
    let (low, high, flags) = O::run(accumulator, operand);
    set_double(cpu, low, high);
    cpu.arithmetic = flags;
    Flow::Next
}

/// A signed product cut to its operands' width; flags.
#[inline(always)]
fn signed_product<T: Width>(a: T, b: T) -> (T, ArithmeticFlags) {
    let (mut value, b) = (a.to_u64(), b.to_u64());
    let flags: u16;
    // SAFETY: arithmetic on registers.
    unsafe {
        match T::BYTES {
            2 => asm!("imul {a:x}, {b:x}", "lahf", "seto al", a = inout(reg) value, b = in(reg) b, out("ax") flags,
                      options(pure, nomem, nostack)),
            4 => asm!("imul {a:e}, {b:e}", "lahf", "seto al", a = inout(reg) value, b = in(reg) b, out("ax") flags,
                      options(pure, nomem, nostack)),
            _ => asm!("imul {a}, {b}", "lahf", "seto al", a = inout(reg) value, b = in(reg) b, out("ax") flags,
                      options(pure, nomem, nostack)),
        }
    }
    (T::from_u64(value), ArithmeticFlags(flags))
}

/// IMUL with two operands.
pub extern "sysv64" fn signed_multiply<T: Width, S: Source>(cpu: &mut Cpu, op: &Op) -> Flow {
    let Ok(operand) = S::read::<T>(cpu, op) else { return Flow::Fault };
    let (value, flags) = signed_product(T::register(cpu, op.first), operand);
    T::set_register(cpu, op.first, value);
    cpu.arithmetic = flags;
    Flow::Next
}

/// IMUL with three operands: the third is the immediate.
pub extern "sysv64" fn signed_multiply_immediate<T: Width, S: Source>(cpu: &mut Cpu, op: &Op) -> Flow {
    let Ok(operand) = S::read::<T>(cpu, op) else { return Flow::Fault };
    let (value, flags) = signed_product(operand, T::from_u64(op.immediate));
    T::set_register(cpu, op.first, value);
    cpu.arithmetic = flags;
    Flow::Next
}

#[cold]
fn divide_error(cpu: &mut Cpu) -> Fault {
    cpu.raise(Exception { vector: vector::DIVIDE_ERROR, error_code: None, detail: 0 })
}

/// DIV. The flags stay (undefined).
pub extern "sysv64" fn divide<T: Width, S: Source>(cpu: &mut Cpu, op: &Op) -> Flow {
    let Ok(divisor) = S::read::<T>(cpu, op) else { return Flow::Fault };
    let divisor = divisor.to_u64();
    let result = if T::BYTES == 8 {
        divide_128(cpu.gpr[RDX], cpu.gpr[RAX], divisor)
    } else {
        let dividend = double_accumulator::<T>(cpu);
        dividend
            .checked_div(divisor)
            .filter(|quotient| quotient >> T::BITS == 0)
            .map(|quotient| (quotient, dividend % divisor))
    };
    match result {
        Some((quotient, remainder)) => {
            set_double(cpu, T::from_u64(quotient), T::from_u64(remainder));
            Flow::Next
        }
        None => {
            let _ = divide_error(cpu);
            Flow::Fault
        }
    }
}

/// AX, DX:AX or EDX:EAX.
#[inline(always)]
fn double_accumulator<T: Width>(cpu: &Cpu) -> u64 {
    match T::BYTES {
        1 => cpu.gpr[RAX] & 0xffff,
        2 => (cpu.gpr[RDX] & 0xffff) << 16 | cpu.gpr[RAX] & 0xffff,
        _ => cpu.gpr[RDX] << 32 | cpu.gpr[RAX] & 0xffff_ffff,
    }
}

fn divide_128(high: u64, low: u64, divisor: u64) -> Option<(u64, u64)> {
    if high >= divisor {
        return None;
    }
    let (quotient, remainder): (u64, u64);
    // SAFETY: the quotient fits, as the high half is below the divisor.
    unsafe {
        asm!("div {d}", d = in(reg) divisor, inout("rax") low => quotient, inout("rdx") high => remainder,
             options(pure, nomem, nostack));
    }
    Some((quotient, remainder))
}

/// IDIV. The flags stay (undefined).
pub extern "sysv64" fn signed_divide<T: Width, S: Source>(cpu: &mut Cpu, op: &Op) -> Flow {
    let Ok(divisor) = S::read::<T>(cpu, op) else { return Flow::Fault };
    let divisor = divisor.to_i64();
    let result = if T::BYTES == 8 {
        signed_divide_128(cpu.gpr[RDX], cpu.gpr[RAX], divisor)
    } else {
        let dividend = match T::BYTES {
            1 => i64::from(cpu.gpr[RAX] as i16),
            2 => i64::from(double_accumulator::<T>(cpu) as i32),
            _ => double_accumulator::<T>(cpu) as i64,
        };
        let limit = 1i64 << (T::BITS - 1);
        dividend
            .checked_div(divisor)
            .filter(|quotient| (-limit..limit).contains(quotient))
            .map(|quotient| (quotient, dividend.wrapping_rem(divisor)))
    };
    match result {
        Some((quotient, remainder)) => {
            set_double(cpu, T::from_u64(quotient as u64), T::from_u64(remainder as u64));
            Flow::Next
        }
        None => {
            let _ = divide_error(cpu);
            Flow::Fault
        }
    }
}

fn signed_divide_128(high: u64, low: u64, divisor: i64) -> Option<(i64, i64)> {
    if high == (low as i64 >> 63) as u64 {
        let dividend = low as i64;
        return dividend.checked_div(divisor).map(|quotient| (quotient, dividend.wrapping_rem(divisor)));
    }
    let dividend = (u128::from(high) << 64 | u128::from(low)) as i128;
    let quotient = i64::try_from(dividend.checked_div(i128::from(divisor))?).ok()?;
    Some((quotient, (dividend % i128::from(divisor)) as i64))
}

/// MULX: product of RDX and the operand without flags; `op.first` gets the high half, `op.extra` the low one.
pub extern "sysv64" fn multiply_without_flags<T: Width, S: Source>(cpu: &mut Cpu, op: &Op) -> Flow {
    if !cpu.mode.protected {
        // VEX encodings do not exist in real and virtual-8086 mode (SDM vol. 2, 2.6.14).
        return crate::lower::undefined(cpu, op);
    }
    let Ok(operand) = S::read::<T>(cpu, op) else { return Flow::Fault };
    let product = u128::from(T::register(cpu, RDX as u8).to_u64()) * u128::from(operand.to_u64());
    T::set_register(cpu, op.extra, T::from_u64(product as u64));
    // If both are the same register it holds the high half.
    T::set_register(cpu, op.first, T::from_u64((product >> T::BITS) as u64));
    Flow::Next
}

/// AAM: AH and AL are the quotient and the remainder of AL by the immediate.
pub extern "sysv64" fn adjust_after_multiply(cpu: &mut Cpu, op: &Op) -> Flow {
    let al = cpu.gpr[RAX] as u8;
    let divisor = op.immediate as u8;
    let (Some(quotient), Some(remainder)) = (al.checked_div(divisor), al.checked_rem(divisor)) else {
        let _ = divide_error(cpu);
        return Flow::Fault;
    };
    cpu.set_word(RAX as u8, u16::from(quotient) << 8 | u16::from(remainder));
    cpu.arithmetic = crate::ops::decimal::sign_zero_parity(remainder);
    Flow::Next
}
