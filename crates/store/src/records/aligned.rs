//! Memory for reads and writes past the host's page cache.

use std::ops::{Deref, DerefMut};

/// What goes past the host's page cache is whole blocks of this size, in the file and in memory: no disk has longer sectors.
pub(crate) const DIRECT_LEN: usize = 4096;

/// Bytes that begin at a multiple of [`DIRECT_LEN`] in memory.
#[derive(Debug, Default)]
pub(crate) struct Aligned {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Aligned {
    /// So many zeros.
    pub fn zeros(len: usize) -> Self {
        let bytes = vec![0; len + DIRECT_LEN];
        let start = bytes.as_ptr().align_offset(DIRECT_LEN);
        Aligned { bytes, start, len }
    }
}

impl Deref for Aligned {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[self.start..][..self.len]
    }
}

impl DerefMut for Aligned {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..][..self.len]
    }
}
