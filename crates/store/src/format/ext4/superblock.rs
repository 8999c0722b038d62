//! The superblock, the group descriptors and the empty journal.

use super::checksum::crc32c;
use super::layout::{BLOCK_LEN, DESCRIPTOR_LEN, GROUP_BLOCKS, INODE_LEN, Layout};

/// The inode of the journal.
pub(super) const JOURNAL_INODE: u32 = 8;
/// The first inode that is not reserved: lost+found.
pub(super) const FIRST_INODE: u32 = 11;
/// Where the superblock begins in block 0.
pub(super) const SUPERBLOCK_AT: usize = 1024;

/// has_journal, ext_attr, dir_index.
const COMPATIBLE: u32 = 0x4 | 0x8 | 0x20;
const HAS_JOURNAL: u32 = 0x4;
/// filetype, extents, 64bit.
const INCOMPATIBLE: u32 = 0x2 | 0x40 | 0x80;
/// sparse_super, large_file, huge_file, dir_nlink, extra_isize, metadata_csum.
const READ_ONLY_COMPATIBLE: u32 = 0x1 | 0x2 | 0x8 | 0x20 | 0x40 | 0x400;

/// What the superblock says beyond the layout.
pub(super) struct Facts<'a> {
    pub(super) uuid: [u8; 16],
    pub(super) label: &'a [u8],
    pub(super) time_s: u32,
    pub(super) free_blocks: u64,
    pub(super) free_inodes: u64,
    /// The root of the journal's extents and its length in bytes, if there is one.
    pub(super) journal: Option<([u8; 60], u64)>,
}

/// The 1024 bytes of the superblock in the copy of `group`.
pub(super) fn superblock(layout: &Layout, facts: &Facts<'_>, group: u64) -> Vec<u8> {
    let mut bytes = vec![0; 1024];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    let low = |value: u64| (value as u32).to_le_bytes();
    let high = |value: u64| ((value >> 32) as u32).to_le_bytes();
    put(0x00, &low(layout.inodes()));
    put(0x04, &low(layout.blocks));
    put(0x150, &high(layout.blocks));
    // Five in a hundred are root's, as mke2fs has it.
    let reserved = layout.blocks / 20;
    put(0x08, &low(reserved));
    put(0x154, &high(reserved));
    put(0x0c, &low(facts.free_blocks));
    put(0x158, &high(facts.free_blocks));
    put(0x10, &low(facts.free_inodes));
    let block_bits = BLOCK_LEN.ilog2() - 10;
    put(0x18, &block_bits.to_le_bytes());
    put(0x1c, &block_bits.to_le_bytes());
    put(0x20, &low(GROUP_BLOCKS));
    put(0x24, &low(GROUP_BLOCKS));
    put(0x28, &low(layout.inodes_per_group));
    put(0x30, &facts.time_s.to_le_bytes());
    put(0x36, &u16::MAX.to_le_bytes()); // no check after so many mounts
    put(0x38, &0xef53_u16.to_le_bytes());
    put(0x3a, &1_u16.to_le_bytes()); // clean
    put(0x3c, &1_u16.to_le_bytes()); // go on after errors
    put(0x40, &facts.time_s.to_le_bytes());
    put(0x4c, &1_u32.to_le_bytes()); // inodes of variable length
    put(0x54, &FIRST_INODE.to_le_bytes());
    put(0x58, &(INODE_LEN as u16).to_le_bytes());
    put(0x5a, &(group as u16).to_le_bytes());
    let compatible = if facts.journal.is_some() { COMPATIBLE } else { COMPATIBLE & !HAS_JOURNAL };
    put(0x5c, &compatible.to_le_bytes());
    put(0x60, &INCOMPATIBLE.to_le_bytes());
    put(0x64, &READ_ONLY_COMPATIBLE.to_le_bytes());
    put(0x68, &facts.uuid);
    put(0x78, &facts.label[..facts.label.len().min(16)]);
    put(0xec, &facts.uuid); // the seed of directory hashes
    put(0xfc, &[1]); // half MD4
    put(0xfe, &(DESCRIPTOR_LEN as u16).to_le_bytes());
    put(0x100, &0xc_u32.to_le_bytes()); // mounted with user_xattr and acl
    put(0x108, &facts.time_s.to_le_bytes());
    put(0x15c, &32_u16.to_le_bytes());
    put(0x15e, &32_u16.to_le_bytes());
    put(0x160, &1_u32.to_le_bytes()); // hashes of signed characters
    put(0x175, &[1]); // CRC-32C
    if let Some((root, len)) = &facts.journal {
        put(0xe0, &JOURNAL_INODE.to_le_bytes());
        put(0xfd, &[1]); // a copy of the journal's inode follows
        put(0x10c, root);
        put(0x10c + 60, &high(*len));
        put(0x10c + 64, &low(*len));
    }
    let sum = crc32c(!0, &bytes[..0x3fc]);
    bytes[0x3fc..].copy_from_slice(&sum.to_le_bytes());
    bytes
}

/// What a group descriptor says beyond the layout.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct GroupFacts {
    pub(super) free_blocks: u64,
    pub(super) free_inodes: u64,
    pub(super) directories: u64,
    /// Inodes at the end of the table that were never used.
    pub(super) unused_inodes: u64,
    /// The checksum of the block bitmap, if it was written.
    pub(super) block_bitmap_sum: Option<u32>,
    /// The checksum of the inode bitmap, if it was written.
    pub(super) inode_bitmap_sum: Option<u32>,
}

/// The descriptor of a group.
pub(super) fn descriptor(layout: &Layout, group: u64, facts: &GroupFacts, seed: u32) -> Vec<u8> {
    const INODE_BITMAP_UNWRITTEN: u16 = 1;
    const BLOCK_BITMAP_UNWRITTEN: u16 = 2;
    /// What was not written of the table reads as zeros.
    const INODE_TABLE_ZEROED: u16 = 4;
    let mut bytes = vec![0; DESCRIPTOR_LEN as usize];
    let mut flags = INODE_TABLE_ZEROED;
    if facts.inode_bitmap_sum.is_none() {
        flags |= INODE_BITMAP_UNWRITTEN;
    }
    if facts.block_bitmap_sum.is_none() {
        flags |= BLOCK_BITMAP_UNWRITTEN;
    }
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    for (at, block) in
        [(0x00, layout.block_bitmap(group)), (0x04, layout.inode_bitmap(group)), (0x08, layout.inode_table(group))]
    {
        put(at, &(block as u32).to_le_bytes());
        put(at + 0x20, &((block >> 32) as u32).to_le_bytes());
    }
    let halves = [
        (0x0c, 0x2c, facts.free_blocks as u32),
        (0x0e, 0x2e, facts.free_inodes as u32),
        (0x10, 0x30, facts.directories as u32),
        (0x1c, 0x32, facts.unused_inodes as u32),
        (0x18, 0x38, facts.block_bitmap_sum.unwrap_or(0)),
        (0x1a, 0x3a, facts.inode_bitmap_sum.unwrap_or(0)),
    ];
    for (low_at, high_at, value) in halves {
        put(low_at, &(value as u16).to_le_bytes());
        put(high_at, &((value >> 16) as u16).to_le_bytes());
    }
    put(0x12, &flags.to_le_bytes());
    let sum = crc32c(crc32c(seed, &(group as u32).to_le_bytes()), &bytes);
    bytes[0x1e..0x20].copy_from_slice(&(sum as u16).to_le_bytes());
    bytes
}

/// The first block of a journal with nothing in it. What follows may be anything.
pub(super) fn empty_journal(blocks: u64, uuid: [u8; 16]) -> Vec<u8> {
    let mut bytes = vec![0; BLOCK_LEN as usize];
    let mut put = |at: usize, value: u32| bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
    put(0x00, 0xc03b_3998);
    put(0x04, 4); // a superblock of version 2
    put(0x0c, BLOCK_LEN as u32);
    put(0x10, blocks as u32);
    put(0x14, 1); // the first block of the log
    put(0x18, 1); // the first transaction that is expected
    put(0x40, 1); // file systems that use it
    bytes[0x30..0x40].copy_from_slice(&uuid);
    bytes
}
