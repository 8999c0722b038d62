//! What the firmware tells a guest of its memory: the map that e820, PVH and multiboot carry in their own encodings.

use crate::layout;

/// What a range of guest-physical memory is (ACPI 6.5, table 15.2; the numbers are those of e820).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum MemoryKind {
    Ram = 1,
    Reserved = 2,
}

/// A range of the map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryRange {
    pub start: u64,
    pub len: u64,
    pub kind: MemoryKind,
}

/// Ranges that a machine's map has at most.
pub const MEMORY_RANGES_MAX: usize = 5;

/// The map of a machine with `ram_bytes` of RAM: RAM up to the EBDA, the reserved BIOS area, RAM to the hole, the reserved
/// configuration space, RAM above 4 GiB. Sorted, not overlapping, without empty ranges.
pub fn memory_map(ram_bytes: u64) -> Vec<MemoryRange> {
    let mut ranges = Vec::with_capacity(MEMORY_RANGES_MAX);
    let mut add = |start: u64, end: u64, kind| {
        if end > start {
            ranges.push(MemoryRange { start, len: end - start, kind });
        }
    };
    let low_end = ram_bytes.min(layout::LOW_RAM_END);
    add(0, layout::EBDA_START.min(low_end), MemoryKind::Ram);
    add(layout::EBDA_START, layout::HIGH_MEMORY_START, MemoryKind::Reserved);
    add(layout::HIGH_MEMORY_START, low_end, MemoryKind::Ram);
    add(layout::ECAM_START, layout::ECAM_START + layout::ECAM_LEN, MemoryKind::Reserved);
    add(layout::HIGH_RAM_START, layout::HIGH_RAM_START + (ram_bytes - low_end), MemoryKind::Ram);
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;
    use polder_basics::{GIB, MIB};

    #[test]
    fn ranges_are_sorted_and_cover_the_usable_ram() {
        for ram_bytes in [64 * MIB, 2 * GIB, layout::LOW_RAM_END, 3 * GIB, 5 * GIB, 16 * GIB] {
            let map = memory_map(ram_bytes);
            assert!(map.len() <= MEMORY_RANGES_MAX);
            assert!(map.windows(2).all(|pair| pair[0].start + pair[0].len <= pair[1].start));
            let ram: u64 = map.iter().filter(|range| range.kind == MemoryKind::Ram).map(|range| range.len).sum();
            assert_eq!(ram, ram_bytes - (layout::HIGH_MEMORY_START - layout::EBDA_START));
        }
    }
}
