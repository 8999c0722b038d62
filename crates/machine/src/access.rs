//! The sizes that a bus access can have.

/// Bytes in one bus access.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum AccessSize {
    Byte = 1,
    Word = 2,
    Dword = 4,
    Qword = 8,
}

impl AccessSize {
    /// The size of that many bytes, if there is one.
    pub fn from_bytes(bytes: usize) -> Option<Self> {
        match bytes {
            1 => Some(AccessSize::Byte),
            2 => Some(AccessSize::Word),
            4 => Some(AccessSize::Dword),
            8 => Some(AccessSize::Qword),
            _ => None,
        }
    }

    /// Bytes.
    pub fn bytes(self) -> u64 {
        self as u64
    }

    /// A value with all bits of this size set: what an unclaimed read gives.
    pub fn all_ones(self) -> u64 {
        u64::MAX >> (64 - 8 * self.bytes())
    }
}
