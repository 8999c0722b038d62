//! Read-modify-writes that are atomic: LOCK forms, XCHG, XADD, CMPXCHG, CMPXCHG8B and CMPXCHG16B.
//!
//! Each is one locked host instruction on guest memory itself, also when it is misaligned. An operand over two pages gets a mapping of its own in which the two
//! pages lie side by side. Memory-mapped registers cannot be locked: there it is a read and a write.

use std::arch::asm;
use std::sync::Mutex;

use polder_memory::{GuestAddress, PAGE_SIZE};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::cpu::{Cpu, RAX, RBX, RCX, RDX};
use crate::fault::Fault;
use crate::flags::ArithmeticFlags;
use crate::op::{Flow, Op};
use crate::ops::alu::{Adc, Add, And, Binary, Dec, Inc, Neg, Not, Or, Sbb, Sub, Unary, Xor};
use crate::ops::bits::{BitChange, Complement, Reset, Set};
use crate::ops::operand::{Source, Width, flow};
use crate::page_walk::Access;

/// Serialises the read and write halves of locked accesses to memory-mapped registers.
static REGISTERS: Mutex<()> = Mutex::new(());

impl Cpu {
    /// Runs `change` on the host bytes of a guest operand of `bytes` bytes (at most 16) with write access.
    pub fn with_locked<R>(
        &mut self,
        linear: u64,
        bytes: u64,
        segment: u8,
        change: impl FnOnce(*mut u8) -> R,
    ) -> Result<R, Fault> {
        if let Some(pointer) = self.write_pointer(linear, bytes, segment)? {
            let result = change(pointer);
            self.written(linear, pointer, bytes);
            return Ok(result);
        }
        self.with_locked_slow(linear, bytes, segment, change)
    }

    #[cold]
    fn with_locked_slow<R>(
        &mut self,
        linear: u64,
        bytes: u64,
        segment: u8,
        change: impl FnOnce(*mut u8) -> R,
    ) -> Result<R, Fault> {
        let checked = self.check_access(linear, bytes, Access::Write, segment, crate::page_walk::Privilege::Current)?;
        if let Some((first, second)) = checked.two_pages_of_ram()
            && let Some(window) = Window::new(&self.services.memory, first, second)
        {
            // SAFETY: the window holds both pages; the operand starts in the first and ends in the second.
            let result = change(unsafe { window.start.add((first % PAGE_SIZE) as usize) });
            drop(window);
            let in_first = PAGE_SIZE - first % PAGE_SIZE;
            self.stored_to_physical(first, in_first);
            self.stored_to_physical(second, bytes - in_first);
            return Ok(result);
        }
        let _guard = REGISTERS.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        // Sixteen bytes are two registers' worth; every other size is one access.
        let mut copy = [0u64; 2];
        let halves = if bytes == 16 { 2 } else { 1 };
        for (index, half) in (0..).zip(&mut copy[..halves]) {
            *half = self.load_any(linear + 8 * index, bytes.min(8), segment)?;
        }
        let result = change(copy.as_mut_ptr().cast());
        for (index, half) in (0..).zip(&copy[..halves]) {
            self.store_any(linear + 8 * index, *half, bytes.min(8), segment)?;
        }
        Ok(result)
    }

    fn load_any(&mut self, linear: u64, bytes: u64, segment: u8) -> Result<u64, Fault> {
        let checked = self.check_access(linear, bytes, Access::Write, segment, crate::page_walk::Privilege::Current)?;
        Ok(self.perform_load(checked, bytes))
    }

    fn store_any(&mut self, linear: u64, value: u64, bytes: u64, segment: u8) -> Result<(), Fault> {
        let checked = self.check_access(linear, bytes, Access::Write, segment, crate::page_walk::Privilege::Current)?;
        self.perform_store(checked, value, bytes);
        Ok(())
    }
}

/// Two pages of RAM mapped side by side.
struct Window {
    start: *mut u8,
}

impl Window {
    fn new(memory: &polder_memory::GuestMemory, first: u64, second: u64) -> Option<Window> {
        let len = 2 * PAGE_SIZE as usize;
        let reserve = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a fresh reservation chosen by the kernel.
        let start =
            unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, ProtFlags::empty(), reserve) }.ok()?;
        let window = Window { start: start.cast() };
        for (index, physical) in [first, second].into_iter().enumerate() {
            let offset = memory.file_offset(GuestAddress(physical & !(PAGE_SIZE - 1)))?;
            let access = ProtFlags::READ | ProtFlags::WRITE;
            // SAFETY: replaces a page of the reservation above, which nobody else knows.
            unsafe {
                let page = window.start.add(index * PAGE_SIZE as usize).cast();
                mmap(page, PAGE_SIZE as usize, access, MapFlags::SHARED | MapFlags::FIXED, memory.file(), offset)
                    .ok()?;
            }
        }
        Some(window)
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: reserved by `new` with this length; its user is done.
        let _ = unsafe { munmap(self.start.cast(), 2 * PAGE_SIZE as usize) };
    }
}

/// A binary operation as a locked host instruction on memory.
pub trait LockedBinary: Binary {
    /// # Safety
    /// `T::BYTES` bytes at the pointer are mapped and writable.
    unsafe fn run_locked<T: Width>(pointer: *mut u8, operand: T, flags: ArithmeticFlags) -> ArithmeticFlags;
}

/// A unary operation as a locked host instruction on memory.
pub trait LockedUnary: Unary {
    /// # Safety
    /// `T::BYTES` bytes at the pointer are mapped and writable.
    unsafe fn run_locked<T: Width>(pointer: *mut u8, flags: ArithmeticFlags) -> ArithmeticFlags;
}

macro_rules! host_locked {
    ($instruction:literal, $size:literal, $register:literal, $class:ident, $pointer:expr, $operand:expr, $flags:expr) => {{
        let flags: u16;
        asm!("add al, 127", "sahf", concat!("lock ", $instruction, " ", $size, " ptr [{p}], {b", $register, "}"),
             "lahf", "seto al",
             p = in(reg) $pointer, b = in($class) $operand, inout("ax") $flags.0 => flags, options(nostack));
        ArithmeticFlags(flags)
    }};
}

macro_rules! locked_binary {
    ($name:ident, $instruction:literal) => {
        impl LockedBinary for $name {
            #[inline(always)]
            unsafe fn run_locked<T: Width>(pointer: *mut u8, operand: T, flags: ArithmeticFlags) -> ArithmeticFlags {
                let b = operand.to_u64();
                // SAFETY: the caller promises the bytes.
                unsafe {
                    match T::BYTES {
                        1 => host_locked!($instruction, "byte", "", reg_byte, pointer, b as u8, flags),
                        2 => host_locked!($instruction, "word", ":x", reg, pointer, b, flags),
                        4 => host_locked!($instruction, "dword", ":e", reg, pointer, b, flags),
                        _ => host_locked!($instruction, "qword", "", reg, pointer, b, flags),
                    }
                }
            }
        }
    };
}

locked_binary!(Add, "add");
locked_binary!(Adc, "adc");
locked_binary!(Sub, "sub");
locked_binary!(Sbb, "sbb");
locked_binary!(And, "and");
locked_binary!(Or, "or");
locked_binary!(Xor, "xor");

macro_rules! host_locked_unary {
    ($instruction:literal, $size:literal, $pointer:expr, $flags:expr) => {{
        let flags: u16;
        asm!("add al, 127", "sahf", concat!("lock ", $instruction, " ", $size, " ptr [{p}]"), "lahf", "seto al",
             p = in(reg) $pointer, inout("ax") $flags.0 => flags, options(nostack));
        ArithmeticFlags(flags)
    }};
}

macro_rules! locked_unary {
    ($name:ident, $instruction:literal) => {
        impl LockedUnary for $name {
            #[inline(always)]
            unsafe fn run_locked<T: Width>(pointer: *mut u8, flags: ArithmeticFlags) -> ArithmeticFlags {
                // SAFETY: the caller promises the bytes.
                unsafe {
                    match T::BYTES {
                        1 => host_locked_unary!($instruction, "byte", pointer, flags),
                        2 => host_locked_unary!($instruction, "word", pointer, flags),
                        4 => host_locked_unary!($instruction, "dword", pointer, flags),
                        _ => host_locked_unary!($instruction, "qword", pointer, flags),
                    }
                }
            }
        }
    };
}

locked_unary!(Inc, "inc");
locked_unary!(Dec, "dec");
locked_unary!(Neg, "neg");
locked_unary!(Not, "not");

fn locked_operand<T: Width, R>(cpu: &mut Cpu, op: &Op, change: impl FnOnce(*mut u8) -> R) -> Result<R, Fault> {
    let linear = cpu.linear(op, T::BYTES, Access::Write)?;
    cpu.with_locked(linear, T::BYTES, op.segment, change)
}

/// LOCK with a binary operation.
pub extern "sysv64" fn binary<O: LockedBinary, T: Width, S: Source>(cpu: &mut Cpu, op: &Op) -> Flow {
    let Ok(operand) = S::read::<T>(cpu, op) else { return Flow::Fault };
    let flags = cpu.arithmetic;
    // SAFETY: `with_locked` gives a pointer to the whole operand.
    match locked_operand::<T, _>(cpu, op, |pointer| unsafe { O::run_locked(pointer, operand, flags) }) {
        Ok(flags) => {
            cpu.arithmetic = flags;
            Flow::Next
        }
        Err(_) => Flow::Fault,
    }
}

/// LOCK with a unary operation.
pub extern "sysv64" fn unary<O: LockedUnary, T: Width>(cpu: &mut Cpu, op: &Op) -> Flow {
    let flags = cpu.arithmetic;
    // SAFETY: as in `binary`.
    match locked_operand::<T, _>(cpu, op, |pointer| unsafe { O::run_locked::<T>(pointer, flags) }) {
        Ok(flags) => {
            cpu.arithmetic = flags;
            Flow::Next
        }
        Err(_) => Flow::Fault,
    }
}

/// XCHG with memory, which is always locked.
pub extern "sysv64" fn exchange<T: Width>(cpu: &mut Cpu, op: &Op) -> Flow {
    let mut value = T::register(cpu, op.second).to_u64();
    let result = locked_operand::<T, _>(cpu, op, |pointer| {
        // SAFETY: `with_locked` gives a pointer to the whole operand.
        unsafe {
            match T::BYTES {
                1 => {
                    let mut byte = value as u8;
                    asm!("xchg byte ptr [{p}], {v}", p = in(reg) pointer, v = inout(reg_byte) byte, options(nostack, preserves_flags));
                    value = u64::from(byte);
                }
                2 => {
                    asm!("xchg word ptr [{p}], {v:x}", p = in(reg) pointer, v = inout(reg) value, options(nostack, preserves_flags))
                }
                4 => {
                    asm!("xchg dword ptr [{p}], {v:e}", p = in(reg) pointer, v = inout(reg) value, options(nostack, preserves_flags))
                }
                _ => {
                    asm!("xchg qword ptr [{p}], {v}", p = in(reg) pointer, v = inout(reg) value, options(nostack, preserves_flags))
                }
            }
        }
        value
    });
    match result {
        Ok(value) => {
            T::set_register(cpu, op.second, T::from_u64(value));
            Flow::Next
        }
        Err(_) => Flow::Fault,
    }
}

/// LOCK XADD, and XADD with memory.
pub extern "sysv64" fn exchange_add<T: Width>(cpu: &mut Cpu, op: &Op) -> Flow {
    let operand = T::register(cpu, op.second);
    let result = locked_operand::<T, _>(cpu, op, |pointer| {
        let mut value = operand.to_u64();
        // SAFETY: as in `exchange`.
        unsafe {
            match T::BYTES {
                1 => {
                    let mut byte = value as u8;
                    asm!("lock xadd byte ptr [{p}], {v}", p = in(reg) pointer, v = inout(reg_byte) byte, options(nostack));
                    value = u64::from(byte);
                }
                2 => {
                    asm!("lock xadd word ptr [{p}], {v:x}", p = in(reg) pointer, v = inout(reg) value, options(nostack))
                }
                4 => {
                    asm!("lock xadd dword ptr [{p}], {v:e}", p = in(reg) pointer, v = inout(reg) value, options(nostack))
                }
                _ => {
                    asm!("lock xadd qword ptr [{p}], {v}", p = in(reg) pointer, v = inout(reg) value, options(nostack))
                }
            }
        }
        T::from_u64(value)
    });
    match result {
        Ok(old) => {
            cpu.arithmetic = Add::run(old, operand, cpu.arithmetic).1;
            T::set_register(cpu, op.second, old);
            Flow::Next
        }
        Err(_) => Flow::Fault,
    }
}

/// XADD of two registers.
pub extern "sysv64" fn exchange_add_registers<T: Width>(cpu: &mut Cpu, op: &Op) -> Flow {
    let (old, operand) = (T::register(cpu, op.first), T::register(cpu, op.second));
    let (sum, flags) = Add::run(old, operand, cpu.arithmetic);
    T::set_register(cpu, op.second, old);
    T::set_register(cpu, op.first, sum);
    cpu.arithmetic = flags;
    Flow::Next
}

/// CMPXCHG of two registers.
pub extern "sysv64" fn compare_exchange_registers<T: Width>(cpu: &mut Cpu, op: &Op) -> Flow {
    let (expected, old) = (T::from_u64(cpu.gpr[RAX]), T::register(cpu, op.first));
    cpu.arithmetic = Sub::run(expected, old, cpu.arithmetic).1;
    if expected == old {
        let new = T::register(cpu, op.second);
        T::set_register(cpu, op.first, new);
    } else {
        T::set_register(cpu, RAX as u8, old);
    }
    Flow::Next
}

/// CMPXCHG with memory, locked or not: it is done locked in both cases.
pub extern "sysv64" fn compare_exchange<T: Width>(cpu: &mut Cpu, op: &Op) -> Flow {
    let (expected, new) = (T::from_u64(cpu.gpr[RAX]), T::register(cpu, op.second).to_u64());
    let result = locked_operand::<T, _>(cpu, op, |pointer| {
        let mut old = expected.to_u64();
        // SAFETY: as in `exchange`.
        unsafe {
            match T::BYTES {
                1 => {
                    asm!("lock cmpxchg byte ptr [{p}], {n}", p = in(reg) pointer, n = in(reg_byte) new as u8, inout("rax") old,
                          options(nostack))
                }
                2 => asm!("lock cmpxchg word ptr [{p}], {n:x}", p = in(reg) pointer, n = in(reg) new, inout("rax") old,
                          options(nostack)),
                4 => {
                    asm!("lock cmpxchg dword ptr [{p}], {n:e}", p = in(reg) pointer, n = in(reg) new, inout("rax") old,
                          options(nostack))
                }
                _ => asm!("lock cmpxchg qword ptr [{p}], {n}", p = in(reg) pointer, n = in(reg) new, inout("rax") old,
                          options(nostack)),
            }
        }
        T::from_u64(old)
    });
    match result {
        Ok(old) => {
            cpu.arithmetic = Sub::run(expected, old, cpu.arithmetic).1;
            if old != expected {
                T::set_register(cpu, RAX as u8, old);
            }
            Flow::Next
        }
        Err(_) => Flow::Fault,
    }
}

fn set_zero_flag(cpu: &mut Cpu, zero: bool) {
    cpu.arithmetic.0 = cpu.arithmetic.0 & !0x4000 | u16::from(zero) << 14;
}

/// CMPXCHG8B
pub extern "sysv64" fn compare_exchange_8_bytes(cpu: &mut Cpu, op: &Op) -> Flow {
    let pair = |high: u64, low: u64| high << 32 | low & 0xffff_ffff;
    let expected = pair(cpu.gpr[RDX], cpu.gpr[RAX]);
    let new = pair(cpu.gpr[RCX], cpu.gpr[RBX]);
    let result = locked_operand::<u64, _>(cpu, op, |pointer| {
        let mut old = expected;
        // SAFETY: as in `exchange`.
        unsafe {
            asm!("lock cmpxchg qword ptr [{p}], {n}", p = in(reg) pointer, n = in(reg) new, inout("rax") old, options(nostack));
        }
        old
    });
    let Ok(old) = result else { return Flow::Fault };
    set_zero_flag(cpu, old == expected);
    if old != expected {
        cpu.set_dword(RAX as u8, old as u32);
        cpu.set_dword(RDX as u8, (old >> 32) as u32);
    }
    Flow::Next
}

/// CMPXCHG16B: #GP(0) unless aligned to 16 bytes.
pub extern "sysv64" fn compare_exchange_16_bytes(cpu: &mut Cpu, op: &Op) -> Flow {
    let Ok(linear) = cpu.linear(op, 16, Access::Write) else { return Flow::Fault };
    if !linear.is_multiple_of(16) {
        let _ = cpu.raise_gp(0);
        return Flow::Fault;
    }
    let (low, high) = (cpu.gpr[RAX], cpu.gpr[RDX]);
    let (new_low, new_high) = (cpu.gpr[RBX], cpu.gpr[RCX]);
    let result = cpu.with_locked(linear, 16, op.segment, |pointer| {
        let (mut old_low, mut old_high) = (low, high);
        // SAFETY: sixteen bytes; RBX is the compiler's own, so it is swapped in and out. The bounce buffer of memory-mapped
        // registers may be misaligned, RAM is not: the address is aligned and pages are.
        unsafe {
            if (pointer as usize).is_multiple_of(16) {
                asm!("xchg {n}, rbx", "lock cmpxchg16b [{p}]", "mov rbx, {n}", p = in(reg) pointer, n = inout(reg) new_low => _,
                     in("rcx") new_high, inout("rax") old_low, inout("rdx") old_high, options(nostack));
            } else {
                let words: *mut u64 = pointer.cast();
                old_low = words.read();
                old_high = words.add(1).read();
                if (old_low, old_high) == (low, high) {
                    words.write(new_low);
                    words.add(1).write(new_high);
                }
            }
        }
        (old_low, old_high)
    });
    let Ok(old) = result else { return Flow::Fault };
    set_zero_flag(cpu, old == (low, high));
    if old != (low, high) {
        (cpu.gpr[RAX], cpu.gpr[RDX]) = old;
    }
    Flow::Next
}

/// A bit operation as a locked host instruction on memory.
pub trait LockedBit: BitChange {
    /// Changes bit `bit` (below the width) and returns what it was.
    ///
    /// # Safety
    /// `T::BYTES` bytes at the pointer are mapped and writable.
    unsafe fn run_locked<T: Width>(pointer: *mut u8, bit: u64) -> bool;
}

macro_rules! locked_bit {
    ($name:ident, $instruction:literal) => {
        impl LockedBit for $name {
            #[inline(always)]
            unsafe fn run_locked<T: Width>(pointer: *mut u8, bit: u64) -> bool {
                let old: u8;
                // SAFETY: the caller promises the bytes; the bit lies in them.
                unsafe {
                    match T::BYTES {
                        2 => asm!(concat!("lock ", $instruction, " word ptr [{p}], {b:x}"), "setc {o}",
                                  p = in(reg) pointer, b = in(reg) bit, o = out(reg_byte) old, options(nostack)),
                        4 => asm!(concat!("lock ", $instruction, " dword ptr [{p}], {b:e}"), "setc {o}",
                                  p = in(reg) pointer, b = in(reg) bit, o = out(reg_byte) old, options(nostack)),
                        _ => asm!(concat!("lock ", $instruction, " qword ptr [{p}], {b}"), "setc {o}",
                                  p = in(reg) pointer, b = in(reg) bit, o = out(reg_byte) old, options(nostack)),
                    }
                }
                old != 0
            }
        }
    };
}

locked_bit!(Set, "bts");
locked_bit!(Reset, "btr");
locked_bit!(Complement, "btc");

/// LOCK BTS, BTR, BTC.
pub extern "sysv64" fn bit<O: LockedBit, T: Width, S: Source>(cpu: &mut Cpu, op: &Op) -> Flow {
    let result = cpu.bit_address::<T, S>(op, Access::Write).and_then(|(linear, bit)| {
        // SAFETY: `with_locked` gives a pointer to the whole operand.
        cpu.with_locked(linear, T::BYTES, op.segment, |pointer| unsafe { O::run_locked::<T>(pointer, bit) })
    });
    flow(result.map(|old| cpu.set_carry(old)))
}
