//! BT BTS BTR BTC, BSF BSR, POPCNT LZCNT TZCNT, and BMI1, BMI2, ADX, CRC32.

use std::arch::asm;

use crate::cpu::Cpu;
use crate::fault::Fault;
use crate::flags::ArithmeticFlags;
use crate::op::{Flow, Op};
use crate::ops::movement::cut_offset;
use crate::ops::operand::{Source, Width, flow};
use crate::page_walk::Access;

impl Cpu {
    /// Sets CF alone.
    #[inline(always)]
    pub fn set_carry(&mut self, carry: bool) {
        self.arithmetic.0 = self.arithmetic.0 & !0x100 | u16::from(carry) << 8;
    }

    /// The address of the word that holds the bit a BT names, and the bit's number in it. A register's number may
    /// lead far away from the operand's own address (SDM vol. 2, BT); an immediate (`op.extra` 0) never does.
    pub fn bit_address<T: Width, S: Source>(&mut self, op: &Op, access: Access) -> Result<(u64, u64), Fault> {
        let number = S::read::<T>(self, op)?;
        let bit = number.to_u64() & u64::from(T::BITS - 1);
        let offset = self.offset(op);
        let words = if op.extra == 0 { 0 } else { number.to_i64() >> T::BITS.trailing_zeros() };
        let offset = cut_offset(op, offset.wrapping_add((words as u64).wrapping_mul(T::BYTES)));
        Ok((self.linear_at(op.segment, offset, T::BYTES, access)?, bit))
    }
}

/// What a bit test does to the bit.
pub trait BitChange {
    const WRITES: bool = true;
    fn change(value: u64, bit: u64) -> u64;
}

/// BT
pub struct Test;
/// BTS
pub struct Set;
/// BTR
pub struct Reset;
/// BTC
pub struct Complement;

impl BitChange for Test {
    const WRITES: bool = false;
    fn change(value: u64, _bit: u64) -> u64 {
        value
    }
}

impl BitChange for Set {
    fn change(value: u64, bit: u64) -> u64 {
        value | 1 << bit
    }
}

impl BitChange for Reset {
    fn change(value: u64, bit: u64) -> u64 {
        value & !(1 << bit)
    }
}

impl BitChange for Complement {
    fn change(value: u64, bit: u64) -> u64 {
        value ^ 1 << bit
    }
}

/// A bit test of a register.
pub extern "sysv64" fn bit_of_register<O: BitChange, T: Width, S: Source>(cpu: &mut Cpu, op: &Op) -> Flow {
    let Ok(number) = S::read::<T>(cpu, op) else { return Flow::Fault };
    let bit = number.to_u64() & u64::from(T::BITS - 1);
    let value = T::register(cpu, op.first).to_u64();
    if O::WRITES {
        T::set_register(cpu, op.first, T::from_u64(O::change(value, bit)));
    }
    cpu.set_carry(value >> bit & 1 != 0);
    Flow::Next
}

/// A bit test of memory.
pub extern "sysv64" fn bit_of_memory<O: BitChange, T: Width, S: Source>(cpu: &mut Cpu, op: &Op) -> Flow {
    flow(bit_in_memory::<O, T, S>(cpu, op))
}

fn bit_in_memory<O: BitChange, T: Width, S: Source>(cpu: &mut Cpu, op: &Op) -> Result<(), Fault> {
    let access = if O::WRITES { Access::Write } else { Access::Read };
    let (linear, bit) = cpu.bit_address::<T, S>(op, access)?;
    let value = if O::WRITES {
        let value = cpu.load_for_update::<T>(linear, op.segment)?.to_u64();
        cpu.store(linear, T::from_u64(O::change(value, bit)), op.segment)?;
        value
    } else {
        cpu.load::<T>(linear, op.segment)?.to_u64()
    };
    cpu.set_carry(value >> bit & 1 != 0);
    Ok(())
}

/// An operation from one operand to a register, done by the host with the target's old value and the flags in place.
pub trait Scan {
    /// The target's new value, all 64 bits.
    fn run<T: Width>(target: u64, source: u64, flags: ArithmeticFlags) -> (u64, ArithmeticFlags);
}

macro_rules! host_scan {
    ($instruction:literal, $register:literal, $target:expr, $source:expr, $flags:expr) => {{
        let mut target: u64 = $target;
        let flags: u16;
        // SAFETY: arithmetic on registers; the first two instructions set the host's flags to the guest's.
        unsafe {
            asm!("add al, 127", "sahf", concat!($instruction, " {t", $register, "}, {s", $register, "}"), "lahf", "seto al",
                 t = inout(reg) target, s = in(reg) $source, inout("ax") $flags.0 => flags, options(pure, nomem, nostack));
        }
        (target, ArithmeticFlags(flags))
    }};
}

macro_rules! scan {
    ($name:ident, $instruction:literal) => {
        #[doc = $instruction]
        pub struct $name;

        impl Scan for $name {
            #[inline(always)]
            fn run<T: Width>(target: u64, source: u64, flags: ArithmeticFlags) -> (u64, ArithmeticFlags) {
                match T::BYTES {
                    2 => host_scan!($instruction, ":x", target, source, flags),
                    4 => host_scan!($instruction, ":e", target, source, flags),
                    _ => host_scan!($instruction, "", target, source, flags),
                }
            }
        }
    };
}

scan!(ForwardScan, "bsf");
scan!(ReverseScan, "bsr");
scan!(CountOnes, "popcnt");
scan!(LeadingZeros, "lzcnt");
scan!(TrailingZeros, "tzcnt");

/// BSF, BSR, POPCNT, LZCNT, TZCNT.
pub extern "sysv64" fn scan<O: Scan, T: Width, S: Source>(cpu: &mut Cpu, op: &Op) -> Flow {
    let Ok(source) = S::read::<T>(cpu, op) else { return Flow::Fault };
    let target = cpu.gpr[usize::from(op.first) & 31];
    let (value, flags) = O::run::<T>(target, source.to_u64(), cpu.arithmetic);
    cpu.gpr[usize::from(op.first) & 31] = value;
    cpu.arithmetic = flags;
    Flow::Next
}

macro_rules! host_three {
    ($instruction:literal, $register:literal, $a:expr, $b:expr) => {{
        let value: u64;
        let flags: u16;
        // SAFETY: arithmetic on registers.
        unsafe {
            asm!(concat!($instruction, " {t", $register, "}, {a", $register, "}, {b", $register, "}"), "lahf", "seto al",
                 t = out(reg) value, a = in(reg) $a, b = in(reg) $b, out("ax") flags, options(pure, nomem, nostack));
        }
        (value, ArithmeticFlags(flags))
    }};
}

macro_rules! host_two {
    ($instruction:literal, $register:literal, $a:expr) => {{
        let value: u64;
        let flags: u16;
        // SAFETY: arithmetic on registers.
        unsafe {
            asm!(concat!($instruction, " {t", $register, "}, {a", $register, "}"), "lahf", "seto al",
                 t = out(reg) value, a = in(reg) $a, out("ax") flags, options(pure, nomem, nostack));
        }
        (value, ArithmeticFlags(flags))
    }};
}

/// A BMI operation on two values; 32 or 64 bits.
pub trait Bmi {
    const SETS_FLAGS: bool;
    fn run<T: Width>(a: u64, b: u64) -> (u64, ArithmeticFlags);
}

macro_rules! bmi_three {
    ($name:ident, $instruction:literal, $flags:literal) => {
        #[doc = $instruction]
        pub struct $name;

        impl Bmi for $name {
            const SETS_FLAGS: bool = $flags;

            #[inline(always)]
            fn run<T: Width>(a: u64, b: u64) -> (u64, ArithmeticFlags) {
                match T::BYTES {
                    4 => host_three!($instruction, ":e", a, b),
                    _ => host_three!($instruction, "", a, b),
                }
            }
        }
    };
}

macro_rules! bmi_two {
    ($name:ident, $instruction:literal) => {
        #[doc = $instruction]
        pub struct $name;

        impl Bmi for $name {
            const SETS_FLAGS: bool = true;

            #[inline(always)]
            fn run<T: Width>(a: u64, _b: u64) -> (u64, ArithmeticFlags) {
                match T::BYTES {
                    4 => host_two!($instruction, ":e", a),
                    _ => host_two!($instruction, "", a),
                }
            }
        }
    };
}

bmi_three!(Andn, "andn", true);
bmi_three!(Bextr, "bextr", true);
bmi_three!(Bzhi, "bzhi", true);
bmi_three!(Pdep, "pdep", false);
bmi_three!(Pext, "pext", false);
bmi_three!(Sarx, "sarx", false);
bmi_three!(Shlx, "shlx", false);
bmi_three!(Shrx, "shrx", false);
bmi_two!(Blsi, "blsi");
bmi_two!(Blsr, "blsr");
bmi_two!(Blsmsk, "blsmsk");

/// A BMI operation: `op.first` gets what it makes of `A` and `B`.
pub extern "sysv64" fn bmi<O: Bmi, T: Width, A: Source, B: Source>(cpu: &mut Cpu, op: &Op) -> Flow {
    if !cpu.mode.protected {
        // VEX encodings do not exist in real and virtual-8086 mode (SDM vol. 2, 2.6.14).
        return crate::lower::undefined(cpu, op);
    }
    let Ok(a) = A::read::<T>(cpu, op) else { return Flow::Fault };
    let Ok(b) = B::read::<T>(cpu, op) else { return Flow::Fault };
    let (value, flags) = O::run::<T>(a.to_u64(), b.to_u64());
    T::set_register(cpu, op.first, T::from_u64(value));
    if O::SETS_FLAGS {
        cpu.arithmetic = flags;
    }
    Flow::Next
}

/// RORX
pub extern "sysv64" fn rotate_right<T: Width, S: Source>(cpu: &mut Cpu, op: &Op) -> Flow {
    if !cpu.mode.protected {
        // VEX encodings do not exist in real and virtual-8086 mode (SDM vol. 2, 2.6.14).
        return crate::lower::undefined(cpu, op);
    }
    let Ok(value) = S::read::<T>(cpu, op) else { return Flow::Fault };
    let count = op.immediate as u32;
    let value = if T::BYTES == 4 {
        u64::from((value.to_u64() as u32).rotate_right(count & 31))
    } else {
        value.to_u64().rotate_right(count & 63)
    };
    T::set_register(cpu, op.first, T::from_u64(value));
    Flow::Next
}

/// ADCX (`OVERFLOW` false) and ADOX: an addition with carry that knows one flag only.
pub extern "sysv64" fn add_with_one_flag<const OVERFLOW: bool, T: Width, S: Source>(cpu: &mut Cpu, op: &Op) -> Flow {
    let Ok(operand) = S::read::<T>(cpu, op) else { return Flow::Fault };
    let carry = if OVERFLOW { cpu.arithmetic.overflow() } else { cpu.arithmetic.carry() };
    let a = T::register(cpu, op.first);
    let sum = u128::from(a.to_u64()) + u128::from(operand.to_u64()) + u128::from(carry);
    T::set_register(cpu, op.first, T::from_u64(sum as u64));
    let carry = sum >> T::BITS != 0;
    if OVERFLOW {
        cpu.arithmetic.0 = cpu.arithmetic.0 & !1 | u16::from(carry);
    } else {
        cpu.set_carry(carry);
    }
    Flow::Next
}

/// CRC32 (SSE4.2) of a value of width `T`; the target is a 32-bit register, or a 64-bit one whose upper half is cleared.
pub extern "sysv64" fn crc32<T: Width, S: Source>(cpu: &mut Cpu, op: &Op) -> Flow {
    let Ok(value) = S::read::<T>(cpu, op) else { return Flow::Fault };
    let value = value.to_u64();
    let mut crc = cpu.gpr[usize::from(op.first) & 31];
    // SAFETY: arithmetic on registers; the CPU model has CRC32 only where the host has.
    unsafe {
        match T::BYTES {
            1 => asm!("crc32 {c:e}, {v}", c = inout(reg) crc, v = in(reg_byte) value as u8,
                      options(pure, nomem, nostack, preserves_flags)),
            2 => asm!("crc32 {c:e}, {v:x}", c = inout(reg) crc, v = in(reg) value,
                      options(pure, nomem, nostack, preserves_flags)),
            4 => asm!("crc32 {c:e}, {v:e}", c = inout(reg) crc, v = in(reg) value,
                      options(pure, nomem, nostack, preserves_flags)),
            _ => asm!("crc32 {c}, {v}", c = inout(reg) crc, v = in(reg) value,
                      options(pure, nomem, nostack, preserves_flags)),
        }
    }
    cpu.gpr[usize::from(op.first) & 31] = crc & 0xffff_ffff;
    Flow::Next
}
