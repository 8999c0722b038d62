//! Accesses to devices whose registers are single bytes.
//!
//! An ISA device of eight-bit registers sees a wider access as one byte access per register, in rising order, as the chipset's
//! bus splits it. This holds for every size and alignment that a guest can choose.

use polder_machine::AccessSize;

/// Reads one byte register after the other and joins them, the lowest offset in the lowest byte.
pub(crate) fn read(offset: u64, size: AccessSize, mut read_byte: impl FnMut(u64) -> u8) -> u64 {
    (0..size.bytes()).fold(0, |value, index| value | u64::from(read_byte(offset.wrapping_add(index))) << (8 * index))
}

/// Writes one byte register after the other, the lowest byte at the lowest offset.
pub(crate) fn write(offset: u64, size: AccessSize, value: u64, mut write_byte: impl FnMut(u64, u8)) {
    for index in 0..size.bytes() {
        write_byte(offset.wrapping_add(index), (value >> (8 * index)) as u8);
    }
}
