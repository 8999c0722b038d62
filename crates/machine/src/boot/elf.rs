//! ELF files: segments into guest memory, the entry point, and the PVH note (System V ABI, chapters 4 and 5).

use std::ops::Range;

use polder_basics::ByteSize;
use polder_memory::{GuestAddress, GuestMemory};

use super::BootError;
use super::bytes::{slice, u16_at, u32_at, u64_at};

const SEGMENT_LOAD: u32 = 1;
/// Names the dynamic linker: programs have it, kernels do not.
const SEGMENT_INTERPRETER: u32 = 3;
const SEGMENT_NOTE: u32 = 4;
/// `XEN_ELFNOTE_PHYS32_ENTRY` (Xen, public/elfnote.h): the physical address of the PVH entry.
const NOTE_PHYS32_ENTRY: u32 = 18;
/// Program headers that are looked at; a kernel has fewer than ten.
const SEGMENTS_MAX: usize = 64;

struct Segment<'a> {
    kind: u32,
    virtual_address: u64,
    physical_address: u64,
    file: &'a [u8],
    memory_len: u64,
}

/// A checked ELF file.
pub(super) struct Elf<'a> {
    /// The entry as the header has it.
    pub(super) entry: u64,
    segments: Vec<Segment<'a>>,
}

/// Where a kernel was put.
#[derive(Debug, Clone, Copy)]
pub(super) struct Loaded {
    pub(super) entry: u64,
    /// First byte after all segments.
    pub(super) end: u64,
}

impl<'a> Elf<'a> {
    /// Parses the headers of a 32-bit or 64-bit file. The magic was seen.
    pub(super) fn parse(bytes: &'a [u8]) -> Result<Self, BootError> {
        let bad = |what| BootError::BadElf { what };
        let incomplete = || bad("its header is incomplete");
        let wide = *bytes.get(4).ok_or_else(incomplete)? == 2;
        // Field offsets differ between the two classes.
        let word = |at32: usize, at64: usize| match wide {
            true => u64_at(bytes, at64),
            false => u32_at(bytes, at32).map(u64::from),
        };
        let half = |at32: usize, at64: usize| u16_at(bytes, if wide { at64 } else { at32 }).map(usize::from);
        let entry = word(24, 24).ok_or_else(incomplete)?;
        let table = word(28, 32).ok_or_else(incomplete)?;
        let entry_len = half(42, 54).ok_or_else(incomplete)?;
        let count = half(44, 56).ok_or_else(incomplete)?;
        if entry_len < if wide { 56 } else { 32 } {
            return Err(bad("its program headers are too short"));
        }
        if count == 0 || count > SEGMENTS_MAX {
            return Err(bad("it has no program headers, or too many"));
        }
        let table = slice(bytes, table, (entry_len * count) as u64)
            .ok_or_else(|| bad("its program headers lie outside the file"))?;
        let mut segments = Vec::with_capacity(count);
        for header in table.chunks_exact(entry_len) {
            let word = |at32: usize, at64: usize| match wide {
                true => u64_at(header, at64),
                false => u32_at(header, at32).map(u64::from),
            };
            let fields =
                || Some((u32_at(header, 0)?, word(4, 8)?, word(8, 16)?, word(12, 24)?, word(16, 32)?, word(20, 40)?));
            let (kind, offset, virtual_address, physical_address, file_len, memory_len) =
                fields().ok_or_else(incomplete)?;
            if kind == SEGMENT_INTERPRETER {
                return Err(BootError::UnknownKernel { what: "it is a program that needs an operating system" });
            }
            if kind != SEGMENT_LOAD && kind != SEGMENT_NOTE {
                continue;
            }
            let file = slice(bytes, offset, file_len).ok_or_else(|| bad("a segment's bytes lie outside the file"))?;
            if kind == SEGMENT_LOAD && memory_len < file_len {
                return Err(bad("a segment has more bytes than memory"));
            }
            segments.push(Segment { kind, virtual_address, physical_address, file, memory_len });
        }
        if !segments.iter().any(|segment| segment.kind == SEGMENT_LOAD && segment.memory_len > 0) {
            return Err(bad("it has nothing to load"));
        }
        Ok(Elf { entry, segments })
    }

    /// Copies the loadable segments to their physical addresses, none of them in `reserved`.
    pub(super) fn load(&self, memory: &GuestMemory, reserved: Range<u64>) -> Result<Loaded, BootError> {
        let mut end = 0;
        for segment in self.segments.iter().filter(|segment| segment.kind == SEGMENT_LOAD && segment.memory_len > 0) {
            let start = segment.physical_address;
            let segment_end = start
                .checked_add(segment.memory_len)
                .ok_or(BootError::BadElf { what: "a segment wraps around the end of memory" })?;
            let no_room = || BootError::NoRoomForKernel { start, end: segment_end, ram: ByteSize(memory.len()) };
            if start < reserved.end && segment_end > reserved.start {
                return Err(BootError::BadElf { what: "a segment lies in the memory that the boot structures need" });
            }
            memory.host_range(GuestAddress(start), segment.memory_len).map_err(|_| no_room())?;
            memory.write(GuestAddress(start), segment.file)?;
            let file_len = segment.file.len() as u64;
            memory.fill(GuestAddress(start + file_len), 0, segment.memory_len - file_len)?;
            end = end.max(segment_end);
        }
        Ok(Loaded { entry: self.physical_entry(), end })
    }

    /// The entry as a physical address: Linux gives it so; others give the virtual one, which lies in some segment.
    fn physical_entry(&self) -> u64 {
        let inside = |start: u64, segment: &Segment<'_>| self.entry.wrapping_sub(start) < segment.memory_len;
        let mut segments = self.segments.iter().filter(|segment| segment.kind == SEGMENT_LOAD);
        if segments.clone().any(|segment| inside(segment.physical_address, segment)) {
            return self.entry;
        }
        match segments.find(|segment| inside(segment.virtual_address, segment)) {
            Some(segment) => segment.physical_address.wrapping_add(self.entry - segment.virtual_address),
            None => self.entry,
        }
    }

    /// The PVH entry of the file's notes.
    pub(super) fn pvh_entry(&self) -> Option<u32> {
        self.segments.iter().filter(|segment| segment.kind == SEGMENT_NOTE).find_map(|segment| pvh_note(segment.file))
    }
}

fn pvh_note(mut notes: &[u8]) -> Option<u32> {
    const ALIGNMENT: usize = 4;
    loop {
        let (name_len, descriptor_len, kind) =
            (u32_at(notes, 0)? as usize, u32_at(notes, 4)? as usize, u32_at(notes, 8)?);
        let descriptor_start = 12usize.checked_add(name_len.checked_next_multiple_of(ALIGNMENT)?)?;
        let name = notes.get(12..12usize.checked_add(name_len)?)?;
        if kind == NOTE_PHYS32_ENTRY && name == b"Xen\0" && descriptor_len >= 4 {
            return u32_at(notes, descriptor_start);
        }
        notes = notes.get(descriptor_start.checked_add(descriptor_len.checked_next_multiple_of(ALIGNMENT)?)?..)?;
    }
}
