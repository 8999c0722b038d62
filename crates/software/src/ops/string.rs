//! MOVS STOS LODS SCAS CMPS with their repeat prefixes.
//!
//! Repeated forms go page by page with one host instruction where both sides are RAM and the direction is up; otherwise element by element.
//! RCX, RSI and RDI are exact at every fault. After a bounded piece of work an instruction that is not done yet jumps to itself, so that
//! the run loop sees the attention flag.

use std::arch::asm;

use polder_memory::{PAGE_SIZE, raw};

use crate::cpu::{Cpu, ES, RAX, RCX, RDI, RSI};
use crate::fault::Fault;
use crate::flags;
use crate::op::{Flow, Op, address};
use crate::ops::alu::{Binary, Sub};
use crate::ops::operand::Width;
use crate::page_walk::Access;

/// Values of `op.extra`: the repeat prefix.
pub mod repeat {
    pub const NONE: u8 = 0;
    /// F3: REP or REPE.
    pub const EQUAL: u8 = 1;
    /// F2: REPNE.
    pub const NOT_EQUAL: u8 = 2;
}

/// Elements that one call of a handler does one by one.
const ELEMENTS_MAX: u64 = 2048;
/// Pages that one call of a handler does at once.
const PIECES_MAX: u64 = 16;

/// What the address size leaves of an offset or a count.
pub fn offset_mask(op: &Op) -> u64 {
    match op.address_kind {
        address::CHECKED_16 => 0xffff,
        address::FLAT | address::BASED => u64::MAX,
        _ => 0xffff_ffff,
    }
}

/// Writes an index or count register in the address size.
#[inline(always)]
pub fn set_index(cpu: &mut Cpu, mask: u64, register: usize, value: u64) {
    if mask == 0xffff {
        cpu.set_word(register as u8, value as u16);
    } else {
        cpu.gpr[register] = value & mask;
    }
}

/// How far an index moves with each element.
#[inline(always)]
pub fn element_step<T: Width>(cpu: &Cpu) -> u64 {
    if cpu.system_flags & flags::DF != 0 { T::BYTES.wrapping_neg() } else { T::BYTES }
}

/// What one step of a string instruction did.
struct Step {
    elements: u64,
    /// A comparison ended the repetition.
    done: bool,
}

/// Repeats `step` (which moves the index registers itself and does at most the given number of elements) as the prefix says.
#[inline(always)]
fn repeated(cpu: &mut Cpu, op: &Op, mut step: impl FnMut(&mut Cpu, &Op, u64) -> Result<Step, Fault>) -> Flow {
    if op.extra == repeat::NONE {
        return match step(cpu, op, 1) {
            Ok(_) => Flow::Next,
            Err(_) => Flow::Fault,
        };
    }
    let mask = offset_mask(op);
    let (mut pieces, mut elements) = (PIECES_MAX, ELEMENTS_MAX);
    // Single-stepping stops after each element.
    let single = cpu.system_flags & flags::TF != 0;
    loop {
        let count = cpu.gpr[RCX] & mask;
        if count == 0 {
            return Flow::Next;
        }
        if pieces == 0 || elements == 0 {
            cpu.rip = cpu.cut_rip(op.rip(cpu));
            cpu.instructions = cpu.instructions.wrapping_sub(1);
            return Flow::Jump;
        }
        match step(cpu, op, if single { 1 } else { count }) {
            Ok(Step { elements: moved, done }) => {
                set_index(cpu, mask, RCX, count.wrapping_sub(moved));
                if done {
                    return Flow::Next;
                }
                if moved == 1 {
                    elements -= 1;
                } else {
                    pieces -= 1;
                }
                if single {
                    (pieces, elements) = (0, 0);
                }
            }
            Err(_) => return Flow::Fault,
        }
    }
}

/// Elements from `offset` upwards that lie in its page, at most `count`; 0 if not even one does.
fn elements_in_page<T: Width>(linear: u64, offset: u64, mask: u64, count: u64) -> u64 {
    let in_page = (PAGE_SIZE - linear % PAGE_SIZE) / T::BYTES;
    // An offset that wraps within the address size ends the piece too.
    let before_wrap = (mask - offset) / T::BYTES;
    count.min(in_page).min(before_wrap)
}

/// The linear address of the source's next element.
#[inline(always)]
fn source<T: Width>(cpu: &mut Cpu, op: &Op, mask: u64) -> Result<u64, Fault> {
    let offset = cpu.gpr[RSI] & mask;
    cpu.linear_at(op.segment, offset, T::BYTES, Access::Read)
}

/// The linear address of the target's next element.
#[inline(always)]
fn target<T: Width>(cpu: &mut Cpu, mask: u64, access: Access) -> Result<u64, Fault> {
    let offset = cpu.gpr[RDI] & mask;
    cpu.linear_at(ES, offset, T::BYTES, access)
}

/// MOVS
pub extern "sysv64" fn move_string<T: Width>(cpu: &mut Cpu, op: &Op) -> Flow {
    repeated(cpu, op, move_step::<T>)
}

fn move_step<T: Width>(cpu: &mut Cpu, op: &Op, count: u64) -> Result<Step, Fault> {
    let mask = offset_mask(op);
    let from = source::<T>(cpu, op, mask)?;
    let to = target::<T>(cpu, mask, Access::Write)?;
    let (from_offset, to_offset) = (cpu.gpr[RSI] & mask, cpu.gpr[RDI] & mask);
    if count > 1 && cpu.system_flags & flags::DF == 0 {
        let elements = elements_in_page::<T>(from, from_offset, mask, count);
        let elements = elements_in_page::<T>(to, to_offset, mask, elements);
        let bytes = elements * T::BYTES;
        if elements > 1 && range_passes(cpu, op.segment, from_offset, to_offset, bytes) {
            let read = cpu.read_pointer(from, bytes, op.segment)?;
            let write = cpu.write_pointer(to, bytes, ES)?;
            if let (Some(read), Some(write)) = (read, write) {
                let overlaps_upwards = (write as usize).wrapping_sub(read as usize) < bytes as usize;
                if !overlaps_upwards {
                    // SAFETY: both pointers are good for `bytes` bytes; the ranges do not overlap in a way that matters.
                    unsafe { raw::copy(read, write, bytes as usize) };
                    cpu.written(to, write, bytes);
                    set_index(cpu, mask, RSI, from_offset.wrapping_add(bytes));
                    set_index(cpu, mask, RDI, to_offset.wrapping_add(bytes));
                    return Ok(Step { elements, done: false });
                }
            }
        }
    }
    let value: T = cpu.load(from, op.segment)?;
    cpu.store(to, value, ES)?;
    let step = element_step::<T>(cpu);
    set_index(cpu, mask, RSI, from_offset.wrapping_add(step));
    set_index(cpu, mask, RDI, to_offset.wrapping_add(step));
    Ok(Step { elements: 1, done: false })
}

/// Whether whole ranges pass the segments' checks; outside 64-bit mode there are limits.
fn range_passes(cpu: &mut Cpu, segment: u8, from: u64, to: u64, bytes: u64) -> bool {
    cpu.is_64_bit()
        || cpu.linear_at(segment, from, bytes, Access::Read).is_ok()
            && cpu.linear_at(ES, to, bytes, Access::Write).is_ok()
}

/// STOS
pub extern "sysv64" fn store_string<T: Width>(cpu: &mut Cpu, op: &Op) -> Flow {
    repeated(cpu, op, store_step::<T>)
}

fn store_step<T: Width>(cpu: &mut Cpu, op: &Op, count: u64) -> Result<Step, Fault> {
    let mask = offset_mask(op);
    let to = target::<T>(cpu, mask, Access::Write)?;
    let offset = cpu.gpr[RDI] & mask;
    let value = T::from_u64(cpu.gpr[RAX]);
    if count > 1 && cpu.system_flags & flags::DF == 0 {
        let elements = elements_in_page::<T>(to, offset, mask, count);
        let bytes = elements * T::BYTES;
        let passes = elements > 1 && (cpu.is_64_bit() || cpu.linear_at(ES, offset, bytes, Access::Write).is_ok());
        if passes && let Some(write) = cpu.write_pointer(to, bytes, ES)? {
            // SAFETY: the pointer is good for `bytes` bytes.
            unsafe { fill(write, value, elements) };
            cpu.written(to, write, bytes);
            set_index(cpu, mask, RDI, offset.wrapping_add(bytes));
            return Ok(Step { elements, done: false });
        }
    }
    cpu.store(to, value, ES)?;
    let step = element_step::<T>(cpu);
    set_index(cpu, mask, RDI, offset.wrapping_add(step));
    Ok(Step { elements: 1, done: false })
}

/// # Safety
/// `elements` elements at the pointer are mapped and writable.
unsafe fn fill<T: Width>(target: *mut u8, value: T, elements: u64) {
    let value = value.to_u64();
    // SAFETY: the caller promises the range; the direction flag is clear in Rust code.
    unsafe {
        match T::BYTES {
            1 => {
                asm!("rep stosb", inout("rcx") elements => _, inout("rdi") target => _, in("rax") value, options(nostack, preserves_flags))
            }
            2 => {
                asm!("rep stosw", inout("rcx") elements => _, inout("rdi") target => _, in("rax") value, options(nostack, preserves_flags))
            }
            4 => {
                asm!("rep stosd", inout("rcx") elements => _, inout("rdi") target => _, in("rax") value, options(nostack, preserves_flags))
            }
            _ => {
                asm!("rep stosq", inout("rcx") elements => _, inout("rdi") target => _, in("rax") value, options(nostack, preserves_flags))
            }
        }
    }
}

/// LODS
pub extern "sysv64" fn load_string<T: Width>(cpu: &mut Cpu, op: &Op) -> Flow {
    repeated(cpu, op, |cpu, op, _| {
        let mask = offset_mask(op);
        let from = source::<T>(cpu, op, mask)?;
        let value: T = cpu.load(from, op.segment)?;
        T::set_register(cpu, RAX as u8, value);
        let next = cpu.gpr[RSI].wrapping_add(element_step::<T>(cpu));
        set_index(cpu, mask, RSI, next);
        Ok(Step { elements: 1, done: false })
    })
}

/// Whether a comparison's outcome ends a repetition.
fn ends(cpu: &Cpu, op: &Op) -> bool {
    match op.extra {
        repeat::EQUAL => !cpu.arithmetic.zero(),
        repeat::NOT_EQUAL => cpu.arithmetic.zero(),
        _ => true,
    }
}

/// SCAS
pub extern "sysv64" fn scan_string<T: Width>(cpu: &mut Cpu, op: &Op) -> Flow {
    repeated(cpu, op, |cpu, op, _| {
        let mask = offset_mask(op);
        let at = target::<T>(cpu, mask, Access::Read)?;
        let value: T = cpu.load(at, ES)?;
        let accumulator = T::from_u64(cpu.gpr[RAX]);
        cpu.arithmetic = Sub::run(accumulator, value, cpu.arithmetic).1;
        let next = cpu.gpr[RDI].wrapping_add(element_step::<T>(cpu));
        set_index(cpu, mask, RDI, next);
        Ok(Step { elements: 1, done: ends(cpu, op) })
    })
}

/// CMPS
pub extern "sysv64" fn compare_strings<T: Width>(cpu: &mut Cpu, op: &Op) -> Flow {
    repeated(cpu, op, |cpu, op, _| {
        let mask = offset_mask(op);
        let from = source::<T>(cpu, op, mask)?;
        let first: T = cpu.load(from, op.segment)?;
        let at = target::<T>(cpu, mask, Access::Read)?;
        let second: T = cpu.load(at, ES)?;
        cpu.arithmetic = Sub::run(first, second, cpu.arithmetic).1;
        let step = element_step::<T>(cpu);
        let (next_source, next_target) = (cpu.gpr[RSI].wrapping_add(step), cpu.gpr[RDI].wrapping_add(step));
        set_index(cpu, mask, RSI, next_source);
        set_index(cpu, mask, RDI, next_target);
        Ok(Step { elements: 1, done: ends(cpu, op) })
    })
}
