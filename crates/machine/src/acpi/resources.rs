//! Resource descriptors, the contents of `_CRS` buffers (ACPI 6.5, 6.4).

use super::aml::{Aml, buffer};

/// Who uses an address range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Window {
    /// A bridge hands it to its children.
    Produced,
    /// The device itself decodes it.
    Consumed,
}

const MIN_AND_MAX_FIXED: u8 = 1 << 2 | 1 << 3;

impl Window {
    fn general_flags(self) -> u8 {
        MIN_AND_MAX_FIXED | u8::from(self == Window::Consumed)
    }
}

/// The whole buffer of a `_CRS`: the descriptors and the end tag (6.4.2.9) with no checksum.
pub fn template(descriptors: &[Vec<u8>]) -> Aml {
    buffer(&[descriptors.concat(), vec![0x79, 0]].concat())
}

/// I/O ports, decoded with 16 bits (6.4.2.5).
pub fn ports(start: u16, len: u8) -> Vec<u8> {
    let start = start.to_le_bytes();
    vec![0x47, 1, start[0], start[1], start[0], start[1], 1, len]
}

/// An edge-triggered, active-high interrupt of the ISA kind (6.4.2.1).
pub fn isa_interrupt(pin: u8) -> Vec<u8> {
    let mask = (1u16 << pin).to_le_bytes();
    vec![0x22, mask[0], mask[1]]
}

/// A level-triggered, active-high, exclusive interrupt (6.4.3.6).
pub fn level_interrupt(pin: u8) -> Vec<u8> {
    let mut bytes = vec![0x89, 6, 0, 1, 1];
    bytes.extend(u32::from(pin).to_le_bytes());
    bytes
}

/// A fixed range of 32-bit memory, writable (6.4.3.4).
pub fn memory32(start: u32, len: u32) -> Vec<u8> {
    let mut bytes = vec![0x86, 9, 0, 1];
    bytes.extend(start.to_le_bytes());
    bytes.extend(len.to_le_bytes());
    bytes
}

/// Bus numbers of a host bridge (6.4.3.5.3).
pub fn bus_numbers(first: u16, last: u16) -> Vec<u8> {
    word_window(2, 0, first, last)
}

/// I/O ports that a host bridge forwards (6.4.3.5.3).
pub fn port_window(first: u16, last: u16) -> Vec<u8> {
    const ENTIRE_RANGE: u8 = 3;
    word_window(1, ENTIRE_RANGE, first, last)
}

fn word_window(kind: u8, specific_flags: u8, first: u16, last: u16) -> Vec<u8> {
    let mut bytes = vec![0x88, 13, 0, kind, Window::Produced.general_flags(), specific_flags];
    for value in [0, first, last, 0, last - first + 1] {
        bytes.extend(value.to_le_bytes());
    }
    bytes
}

/// Memory that a host bridge forwards, or that a device decodes, below or above 4 GiB (6.4.3.5.1): not cacheable, writable.
pub fn memory_window(window: Window, start: u64, len: u64) -> Vec<u8> {
    const WRITABLE: u8 = 1;
    let mut bytes = vec![0x8a, 43, 0, 0, window.general_flags(), WRITABLE];
    for value in [0, start, start + (len - 1), 0, len] {
        bytes.extend(value.to_le_bytes());
    }
    bytes
}
