//! Directory blocks: linear, each with its checksum at the end.
//!
//! The kernel reads linear directories of any length; `e2fsck -D` or the first rehash gives long ones an index.

use super::checksum::crc32c;
use super::layout::BLOCK_LEN;

/// Bytes of an entry before its name.
const FIXED_LEN: usize = 8;
/// The entry at the end of each block that is no entry but holds the checksum.
const TAIL_LEN: usize = 12;
/// What marks that entry.
const TAIL_TYPE: u8 = 0xde;
const USABLE_LEN: usize = BLOCK_LEN as usize - TAIL_LEN;

/// Puts entries together into blocks.
pub(super) struct DirectoryBlocks {
    inode_seed: u32,
    blocks: Vec<u8>,
    /// Where the last entry begins, and where it would end without filler.
    last: usize,
    end: usize,
}

impl DirectoryBlocks {
    pub(super) fn new(inode_seed: u32) -> Self {
        DirectoryBlocks { inode_seed, blocks: Vec::new(), last: 0, end: 0 }
    }

    /// Adds an entry; `file_type` as the format numbers them.
    pub(super) fn push(&mut self, inode: u32, file_type: u8, name: &[u8]) {
        let needed = (FIXED_LEN + name.len()).next_multiple_of(4);
        let block_end = self.blocks.len().saturating_sub(TAIL_LEN);
        if self.blocks.is_empty() || self.end + needed > block_end {
            self.close_block();
            self.end = self.blocks.len();
            self.blocks.resize(self.blocks.len() + BLOCK_LEN as usize, 0);
        }
        let at = self.end;
        self.blocks[at..at + 4].copy_from_slice(&inode.to_le_bytes());
        self.blocks[at + 4..at + 6].copy_from_slice(&(needed as u16).to_le_bytes());
        self.blocks[at + 6] = name.len() as u8;
        self.blocks[at + 7] = file_type;
        self.blocks[at + FIXED_LEN..at + FIXED_LEN + name.len()].copy_from_slice(name);
        (self.last, self.end) = (at, at + needed);
    }

    /// The last entry reaches to the tail, and the tail gets its checksum.
    fn close_block(&mut self) {
        if self.blocks.is_empty() {
            return;
        }
        let start = self.blocks.len() - BLOCK_LEN as usize;
        let tail = start + USABLE_LEN;
        let record_len = (tail - self.last) as u16;
        self.blocks[self.last + 4..self.last + 6].copy_from_slice(&record_len.to_le_bytes());
        self.blocks[tail + 4..tail + 6].copy_from_slice(&(TAIL_LEN as u16).to_le_bytes());
        self.blocks[tail + 7] = TAIL_TYPE;
        let sum = crc32c(self.inode_seed, &self.blocks[start..tail]);
        self.blocks[tail + 8..tail + 12].copy_from_slice(&sum.to_le_bytes());
    }

    /// The blocks, whole.
    pub(super) fn finish(mut self) -> Vec<u8> {
        self.close_block();
        self.blocks
    }
}
