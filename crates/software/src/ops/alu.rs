//! ADD ADC SUB SBB CMP AND OR XOR TEST, INC DEC NEG NOT.

use std::arch::asm;

use crate::cpu::Cpu;
use crate::flags::ArithmeticFlags;
use crate::op::{Flow, Op};
use crate::ops::operand::{Place, Source, Width, flow};

/// An operation on two values that gives a value and flags.
pub trait Binary {
    fn run<T: Width>(a: T, b: T, flags: ArithmeticFlags) -> (T, ArithmeticFlags);
}

/// An operation on one value.
pub trait Unary {
    /// NOT leaves the flags alone.
    const SETS_FLAGS: bool = true;
    fn run<T: Width>(a: T, flags: ArithmeticFlags) -> (T, ArithmeticFlags);
}

/// One host instruction on two registers of a width; flags out.
macro_rules! host_binary {
    (no_carry, $instruction:literal, $register:literal, $class:ident, $a:expr, $b:expr, $flags:expr) => {{
        let (mut value, operand) = ($a, $b);
        let flags: u16;
        // SAFETY: arithmetic on registers.
        unsafe {
            asm!(concat!($instruction, " {a", $register, "}, {b", $register, "}"), "lahf", "seto al",
                 a = inout($class) value, b = in($class) operand, out("ax") flags, options(pure, nomem, nostack));
        }
        (u64::from(value), ArithmeticFlags(flags))
    }};
    (carry, $instruction:literal, $register:literal, $class:ident, $a:expr, $b:expr, $flags:expr) => {{
        let (mut value, operand) = ($a, $b);
        let flags: u16;
        // SAFETY: as above. Bit 8 of our flags is CF.
        unsafe {
            asm!("bt ax, 8", concat!($instruction, " {a", $register, "}, {b", $register, "}"), "lahf", "seto al",
                 a = inout($class) value, b = in($class) operand, inout("ax") $flags.0 => flags,
                 options(pure, nomem, nostack));
        }
        (u64::from(value), ArithmeticFlags(flags))
    }};
}

/// A type whose [`Binary`] is the host's instruction of that name.
macro_rules! binary {
    ($name:ident, $instruction:literal, $carry:ident, $doc:literal) => {
        #[doc = $doc]
        pub struct $name;

        impl Binary for $name {
            #[inline(always)]
            fn run<T: Width>(a: T, b: T, _flags: ArithmeticFlags) -> (T, ArithmeticFlags) {
                let (a, b) = (a.to_u64(), b.to_u64());
                let (value, flags) = match T::BYTES {
                    1 => host_binary!($carry, $instruction, "", reg_byte, a as u8, b as u8, _flags),
                    2 => host_binary!($carry, $instruction, ":x", reg, a as u16, b as u16, _flags),
                    4 => host_binary!($carry, $instruction, ":e", reg, a as u32, b as u32, _flags),
                    _ => host_binary!($carry, $instruction, ":r", reg, a, b, _flags),
                };
                (T::from_u64(value), flags)
            }
        }
    };
}

binary!(Add, "add", no_carry, "ADD");
binary!(Sub, "sub", no_carry, "SUB and CMP");
binary!(Adc, "adc", carry, "ADC");
binary!(Sbb, "sbb", carry, "SBB");
binary!(And, "and", no_carry, "AND and TEST");
binary!(Or, "or", no_carry, "OR");
binary!(Xor, "xor", no_carry, "XOR");

/// INC: ADD of one that leaves CF alone.
pub struct Inc;
/// DEC: SUB of one that leaves CF alone.
pub struct Dec;
/// NEG: SUB from zero.
pub struct Neg;
/// NOT
pub struct Not;

fn with_carry_of(flags: ArithmeticFlags, carry: ArithmeticFlags) -> ArithmeticFlags {
    ArithmeticFlags(flags.0 & !0x100 | carry.0 & 0x100)
}

impl Unary for Inc {
    #[inline(always)]
    fn run<T: Width>(a: T, flags: ArithmeticFlags) -> (T, ArithmeticFlags) {
        let (value, new) = Add::run(a, T::from_u64(1), flags);
        (value, with_carry_of(new, flags))
    }
}

impl Unary for Dec {
    #[inline(always)]
    fn run<T: Width>(a: T, flags: ArithmeticFlags) -> (T, ArithmeticFlags) {
        let (value, new) = Sub::run(a, T::from_u64(1), flags);
        (value, with_carry_of(new, flags))
    }
}

impl Unary for Neg {
    #[inline(always)]
    fn run<T: Width>(a: T, flags: ArithmeticFlags) -> (T, ArithmeticFlags) {
        Sub::run(T::from_u64(0), a, flags)
    }
}

impl Unary for Not {
    const SETS_FLAGS: bool = false;

    #[inline(always)]
    fn run<T: Width>(a: T, flags: ArithmeticFlags) -> (T, ArithmeticFlags) {
        (T::from_u64(!a.to_u64()), flags)
    }
}

/// A binary operation whose result goes to its first operand.
pub extern "sysv64" fn binary<O: Binary, T: Width, D: Place, S: Source>(cpu: &mut Cpu, op: &Op) -> Flow {
    let Ok(operand) = S::read::<T>(cpu, op) else { return Flow::Fault };
    flow(D::update(
        cpu,
        op,
        |cpu, value: T| O::run(value, operand, cpu.arithmetic),
        |cpu, flags| cpu.arithmetic = flags,
    ))
}

/// CMP and TEST: flags only.
pub extern "sysv64" fn compare<O: Binary, T: Width, D: Place, S: Source>(cpu: &mut Cpu, op: &Op) -> Flow {
    let Ok(operand) = S::read::<T>(cpu, op) else { return Flow::Fault };
    let Ok(value) = D::read::<T>(cpu, op) else { return Flow::Fault };
    cpu.arithmetic = O::run(value, operand, cpu.arithmetic).1;
    Flow::Next
}

/// A unary operation.
pub extern "sysv64" fn unary<O: Unary, T: Width, D: Place>(cpu: &mut Cpu, op: &Op) -> Flow {
    flow(D::update(
        cpu,
        op,
        |cpu, value: T| O::run(value, cpu.arithmetic),
        |cpu, flags| {
            if O::SETS_FLAGS {
                cpu.arithmetic = flags;
            }
        },
    ))
}

/// XOR or SUB of a register with itself: zero, and the flags of zero.
pub extern "sysv64" fn clear<T: Width>(cpu: &mut Cpu, op: &Op) -> Flow {
    T::set_register(cpu, op.first, T::default());
    cpu.arithmetic = ArithmeticFlags(0x4600);
    Flow::Next
}
