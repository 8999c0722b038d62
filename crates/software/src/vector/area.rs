//! Save areas in guest memory: checked whole, then filled or read piece by piece.

use polder_memory::{PAGE_SIZE, raw};

use crate::cpu::Cpu;
use crate::fault::Fault;
use crate::page_walk::Access;

/// A range of guest memory of at most a page that passed all checks.
pub struct SaveArea {
    linear: u64,
    len: u64,
    segment: u8,
    /// Host address and length of the part in the first page, and in the second. No address: registers, not RAM.
    parts: [(Option<*mut u8>, u64); 2],
}

impl SaveArea {
    /// Checks `len` bytes at `linear` for an access.
    pub fn new(cpu: &mut Cpu, linear: u64, len: u64, access: Access, segment: u8) -> Result<Self, Fault> {
        let len = len.min(PAGE_SIZE);
        let first_len = len.min(PAGE_SIZE - linear % PAGE_SIZE);
        let mut parts = [(None, first_len), (None, len - first_len)];
        let mut start = linear;
        for (pointer, bytes) in &mut parts {
            if *bytes != 0 {
                *pointer = match access {
                    Access::Write => cpu.write_pointer(start, *bytes, segment)?,
                    _ => cpu.read_pointer(start, *bytes, segment)?.map(<*const u8>::cast_mut),
                };
                start = start.wrapping_add(*bytes);
            }
        }
        Ok(SaveArea { linear, len, segment, parts })
    }

    /// The part of `at..at + len` in each page: part, offset in it, offset in the range, bytes.
    fn split(&self, at: u64, len: usize) -> [(Option<*mut u8>, u64, usize, usize); 2] {
        let at = at.min(self.len);
        let len = len.min((self.len - at) as usize);
        let [(first, first_len), (second, _)] = self.parts;
        let in_first = len.min(first_len.saturating_sub(at) as usize);
        [(first, at, 0, in_first), (second, at.saturating_sub(first_len), in_first, len - in_first)]
    }

    /// Reads the area's bytes from `at` on.
    pub fn get(&self, cpu: &mut Cpu, at: u64, target: &mut [u8]) -> Result<(), Fault> {
        for (pointer, offset, start, len) in self.split(at, target.len()) {
            let Some(part) = target.get_mut(start..start + len).filter(|part| !part.is_empty()) else { continue };
            match pointer {
                // SAFETY: `new` checked that the part is mapped RAM, and `split` keeps inside it.
                Some(pointer) => unsafe {
                    raw::copy(pointer.add(offset as usize), part.as_mut_ptr(), len);
                },
                None => cpu.load_bytes(self.linear.wrapping_add(at + start as u64), part, self.segment)?,
            }
        }
        Ok(())
    }

    /// Writes the area's bytes from `at` on; [`SaveArea::finish`] follows.
    pub fn put(&self, cpu: &mut Cpu, at: u64, source: &[u8]) -> Result<(), Fault> {
        for (pointer, offset, start, len) in self.split(at, source.len()) {
            let Some(part) = source.get(start..start + len).filter(|part| !part.is_empty()) else { continue };
            match pointer {
                // SAFETY: as in `get`; the area was checked for writing.
                Some(pointer) => unsafe {
                    raw::copy(part.as_ptr(), pointer.add(offset as usize), len);
                },
                None => cpu.store_bytes(self.linear.wrapping_add(at + start as u64), part, self.segment)?,
            }
        }
        Ok(())
    }

    /// Tells whoever watches that the area was written.
    pub fn finish(&self, cpu: &mut Cpu) {
        let mut start = self.linear;
        for (pointer, bytes) in self.parts {
            if let Some(pointer) = pointer {
                cpu.written(start, pointer, bytes);
            }
            start = start.wrapping_add(bytes);
        }
    }
}
