//! Extents: which blocks of a file lie where, in the inode or in a tree of blocks.

use super::checksum::crc32c;
use super::layout::BLOCK_LEN;

/// Bytes of a header and of an entry.
const ENTRY_LEN: usize = 12;
/// Entries in the inode itself.
const ROOT_ENTRIES: usize = 4;
/// Entries of a block; behind them its checksum.
const BLOCK_ENTRIES: usize = (BLOCK_LEN as usize - ENTRY_LEN - 4) / ENTRY_LEN;
const MAGIC: u16 = 0xf30a;
/// Blocks of one extent.
pub(super) const EXTENT_BLOCKS_MAX: u64 = 32_768;

/// Blocks in a row, in the file and on the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Extent {
    /// The first block of the file.
    pub(super) logical: u32,
    /// The first block of the disk.
    pub(super) start: u64,
    pub(super) len: u64,
}

/// Adds blocks to a list of extents, joined with the last one where possible.
pub(super) fn push(extents: &mut Vec<Extent>, next: Extent) {
    match extents.last_mut() {
        Some(last)
            if u64::from(last.logical) + last.len == u64::from(next.logical)
                && last.start + last.len == next.start
                && last.len + next.len <= EXTENT_BLOCKS_MAX =>
        {
            last.len += next.len;
        }
        _ => extents.push(next),
    }
}

fn header(entries: usize, entries_max: usize, depth: u16) -> [u8; ENTRY_LEN] {
    let mut bytes = [0; ENTRY_LEN];
    bytes[0..2].copy_from_slice(&MAGIC.to_le_bytes());
    bytes[2..4].copy_from_slice(&(entries as u16).to_le_bytes());
    bytes[4..6].copy_from_slice(&(entries_max as u16).to_le_bytes());
    bytes[6..8].copy_from_slice(&depth.to_le_bytes());
    bytes
}

fn leaf(extent: &Extent) -> [u8; ENTRY_LEN] {
    let mut bytes = [0; ENTRY_LEN];
    bytes[0..4].copy_from_slice(&extent.logical.to_le_bytes());
    bytes[4..6].copy_from_slice(&(extent.len as u16).to_le_bytes());
    bytes[6..8].copy_from_slice(&((extent.start >> 32) as u16).to_le_bytes());
    bytes[8..12].copy_from_slice(&(extent.start as u32).to_le_bytes());
    bytes
}

fn index(logical: u32, block: u64) -> [u8; ENTRY_LEN] {
    let mut bytes = [0; ENTRY_LEN];
    bytes[0..4].copy_from_slice(&logical.to_le_bytes());
    bytes[4..8].copy_from_slice(&(block as u32).to_le_bytes());
    bytes[8..10].copy_from_slice(&((block >> 32) as u16).to_le_bytes());
    bytes
}

/// Blocks that the tree of so many extents takes beside the inode.
pub(super) fn tree_blocks(extents: usize) -> u64 {
    let (mut entries, mut blocks) = (extents, 0);
    while entries > ROOT_ENTRIES {
        entries = entries.div_ceil(BLOCK_ENTRIES);
        blocks += entries as u64;
    }
    blocks
}

/// The tree: what stands in the inode, and its blocks with their places, taken from `places`, which has [`tree_blocks`].
pub(super) fn tree(extents: &[Extent], inode_seed: u32, places: &[u64]) -> ([u8; 60], Vec<(u64, Vec<u8>)>) {
    let mut places = places.iter();
    let mut blocks = Vec::new();
    let mut depth = 0;
    let mut entries: Vec<(u32, [u8; ENTRY_LEN])> = extents.iter().map(|one| (one.logical, leaf(one))).collect();
    while entries.len() > ROOT_ENTRIES {
        let mut above = Vec::new();
        for chunk in entries.chunks(BLOCK_ENTRIES) {
            let place = *places.next().expect("as many places as tree_blocks says");
            let mut block = header(chunk.len(), BLOCK_ENTRIES, depth).to_vec();
            chunk.iter().for_each(|(_, entry)| block.extend_from_slice(entry));
            block.resize(BLOCK_LEN as usize - 4, 0);
            let sum = crc32c(inode_seed, &block);
            block.extend_from_slice(&sum.to_le_bytes());
            above.push((chunk[0].0, index(chunk[0].0, place)));
            blocks.push((place, block));
        }
        entries = above;
        depth += 1;
    }
    let mut root = [0; 60];
    root[..ENTRY_LEN].copy_from_slice(&header(entries.len(), ROOT_ENTRIES, depth));
    for (entry, into) in entries.iter().zip(root[ENTRY_LEN..].chunks_exact_mut(ENTRY_LEN)) {
        into.copy_from_slice(&entry.1);
    }
    (root, blocks)
}
