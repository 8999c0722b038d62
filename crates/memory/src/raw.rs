//! Accesses to memory that the guest changes at the same time.
//!
//! Each function is one host instruction (or one `rep movsb`/`rep stosb`), so an access of 1, 2, 4 or 8 bytes has just the
//! atomicity and ordering that the x86 memory model gives the same access of a guest (SDM vol. 3, 9.1.1 and 9.2), aligned or not.
//! Inline assembly is opaque to the compiler: it neither tears, repeats nor reorders these accesses, and no Rust reference
//! to shared bytes ever exists.

use std::arch::asm;

macro_rules! accesses {
    ($load:ident, $store:ident, $type:ty, $class:ident, $modifier:literal, $width:literal) => {
        /// Loads a value from `pointer`, which need not be aligned.
        ///
        /// # Safety
        /// `pointer` must be mapped and readable for the size of the value.
        #[inline(always)]
        pub unsafe fn $load(pointer: *const u8) -> $type {
            let value: $type;
            // SAFETY: the caller promises that the bytes are mapped; the instruction touches nothing else.
            unsafe {
                asm!(concat!("mov {value", $modifier, "}, ", $width, " ptr [{pointer}]"),
                     pointer = in(reg) pointer, value = lateout($class) value,
                     options(nostack, preserves_flags, readonly));
            }
            value
        }

        /// Stores `value` at `pointer`, which need not be aligned.
        ///
        /// # Safety
        /// `pointer` must be mapped and writable for the size of the value.
        #[inline(always)]
        pub unsafe fn $store(pointer: *mut u8, value: $type) {
            // SAFETY: the caller promises that the bytes are mapped; the instruction touches nothing else.
            unsafe {
                asm!(concat!("mov ", $width, " ptr [{pointer}], {value", $modifier, "}"),
                     pointer = in(reg) pointer, value = in($class) value,
                     options(nostack, preserves_flags));
            }
        }
    };
}

accesses!(load_u8, store_u8, u8, reg_byte, "", "byte");
accesses!(load_u16, store_u16, u16, reg, ":x", "word");
accesses!(load_u32, store_u32, u32, reg, ":e", "dword");
accesses!(load_u64, store_u64, u64, reg, "", "qword");

/// Copies `len` bytes; either side may be guest memory. The ranges do not overlap.
///
/// # Safety
/// Both ranges must be mapped for `len` bytes, the target writable.
#[inline]
pub unsafe fn copy(source: *const u8, target: *mut u8, len: usize) {
    // SAFETY: the caller promises mapped ranges; the direction flag is clear in Rust code.
    unsafe {
        asm!("rep movsb", inout("rcx") len => _, inout("rsi") source => _, inout("rdi") target => _,
             options(nostack, preserves_flags));
    }
}

/// Fills `len` bytes with `byte`.
///
/// # Safety
/// The range must be mapped and writable for `len` bytes.
#[inline]
pub unsafe fn fill(target: *mut u8, byte: u8, len: usize) {
    // SAFETY: the caller promises a mapped range; the direction flag is clear in Rust code.
    unsafe {
        asm!("rep stosb", inout("rcx") len => _, inout("rdi") target => _, in("al") byte,
             options(nostack, preserves_flags));
    }
}
