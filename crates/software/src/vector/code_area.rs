//! Executable memory for stubs.
//!
//! One memfd, mapped twice: once to write, once to execute; no mapping is both. Code is only ever added, so whoever holds an
//! address of it may run it for ever. One area serves the process: stubs depend on the instruction alone, not on the machine.

use std::io;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap};

/// Bytes for stubs. All normalised forms of all instructions together need less than half (see the test in `lower::vector`); entries go into the rest.
pub const AREA_BYTES: usize = 32 << 20;

/// Memory that is written at one address and executed at another.
pub struct CodeArea {
    writable: *mut u8,
    executable: *const u8,
    used: usize,
}

// SAFETY: the pointers are to mappings that are never unmapped; writes go through `&mut self` only.
unsafe impl Send for CodeArea {}

impl CodeArea {
    pub fn new() -> io::Result<Self> {
        let file = memfd_create("polder-stubs", MemfdFlags::CLOEXEC)?;
        ftruncate(&file, AREA_BYTES as u64)?;
        let map = |protection| {
            // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
            unsafe { mmap(std::ptr::null_mut(), AREA_BYTES, protection, MapFlags::SHARED, &file, 0) }
        };
        let executable = map(ProtFlags::READ | ProtFlags::EXEC)?.cast::<u8>().cast_const();
        let writable = map(ProtFlags::READ | ProtFlags::WRITE)?.cast();
        Ok(CodeArea { writable, executable, used: 0 })
    }

    /// Adds code; tells where it can be executed, or `None` if it does not fit.
    pub fn add(&mut self, code: &[u8]) -> Option<u64> {
        let start = self.used.next_multiple_of(16);
        let end = start.checked_add(code.len())?;
        if end > AREA_BYTES {
            return None;
        }
        // SAFETY: start..end lies inside the writable mapping, and no code that runs lies there yet.
        unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), self.writable.add(start), code.len()) };
        self.used = end;
        Some(self.executable as u64 + start as u64)
    }

    /// Bytes in use.
    pub fn used(&self) -> usize {
        self.used
    }

    /// The addresses at which code of this area is executed.
    pub fn executable_range(&self) -> std::ops::Range<u64> {
        self.executable as u64..self.executable as u64 + AREA_BYTES as u64
    }
}
