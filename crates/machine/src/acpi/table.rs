//! The bytes of a table with the common header (ACPI 6.5, 5.2.6).

/// Address space ids of a generic address structure (ACPI 6.5, 5.2.3.2).
pub(super) const MEMORY_SPACE: u8 = 0;
pub(super) const IO_SPACE: u8 = 1;

const HEADER_LEN: usize = 36;

/// The byte that makes the sum of all bytes, with itself in place of a zero, zero.
pub(super) fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte))
}

/// A table under construction.
pub(super) struct Table(Vec<u8>);

impl Table {
    pub(super) fn new(signature: &[u8; 4], revision: u8) -> Self {
        let mut bytes = signature.to_vec();
        bytes.extend([0; 4]);
        bytes.extend([revision, 0]);
        bytes.extend(b"POLDERMACHINE1");
        bytes.extend(1u32.to_le_bytes());
        bytes.extend(b"PLDR");
        bytes.extend(1u32.to_le_bytes());
        debug_assert_eq!(bytes.len(), HEADER_LEN);
        Table(bytes)
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Fills with zeros up to an offset that the manual gives.
    pub(super) fn at(&mut self, offset: usize) {
        debug_assert!(offset >= self.0.len());
        self.0.resize(offset, 0);
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    pub(super) fn u8(&mut self, value: u8) {
        self.bytes(&[value]);
    }

    pub(super) fn u16(&mut self, value: u16) {
        self.bytes(&value.to_le_bytes());
    }

    pub(super) fn u32(&mut self, value: u32) {
        self.bytes(&value.to_le_bytes());
    }

    pub(super) fn u64(&mut self, value: u64) {
        self.bytes(&value.to_le_bytes());
    }

    /// A generic address structure for a register of one byte.
    pub(super) fn register(&mut self, space: u8, address: u64) {
        self.bytes(&[space, 8, 0, 1]);
        self.u64(address);
    }

    /// The table with its length and checksum.
    pub(super) fn finish(mut self) -> Vec<u8> {
        let len = (self.0.len() as u32).to_le_bytes();
        self.0[4..8].copy_from_slice(&len);
        self.0[9] = 0;
        self.0[9] = checksum(&self.0);
        self.0
    }
}
