//! Which parts of a file with holes lie in the archive.

/// Parts of one file, at most.
pub(super) const PARTS_MAX: usize = 1 << 20;

/// Parts in ascending order, none on another.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct SparseMap(Vec<(u64, u64)>);

impl SparseMap {
    /// Adds a part; nothing if it is not behind the last one, or one too many.
    pub(super) fn push(&mut self, offset: u64, len: u64) -> Option<()> {
        let end = self.0.last().map_or(0, |(offset, len)| offset + len);
        offset.checked_add(len)?;
        if offset < end || self.0.len() >= PARTS_MAX {
            return None;
        }
        if len > 0 {
            self.0.push((offset, len));
        }
        Some(())
    }

    pub(super) fn whole(len: u64) -> Self {
        SparseMap(if len > 0 { vec![(0, len)] } else { Vec::new() })
    }

    pub(super) fn parts(&self) -> &[(u64, u64)] {
        &self.0
    }

    /// Bytes that lie in the archive, and where the last part ends.
    pub(super) fn stored_len(&self) -> (u64, u64) {
        let stored = self.0.iter().map(|(_, len)| len).sum();
        (stored, self.0.last().map_or(0, |(offset, len)| offset + len))
    }
}
