//! Where everything lies: block groups, their tables, and who keeps copies of the superblock.

use super::super::FormatError;

/// Bytes of a block.
pub(super) const BLOCK_LEN: u64 = 4096;
/// Blocks of a group: what one bitmap counts.
pub(super) const GROUP_BLOCKS: u64 = 8 * BLOCK_LEN;
/// Bytes of an inode.
pub(super) const INODE_LEN: u64 = 256;
/// Inodes in a block of the inode table.
const INODES_PER_BLOCK: u64 = BLOCK_LEN / INODE_LEN;
/// Bytes of a group descriptor.
pub(super) const DESCRIPTOR_LEN: u64 = 64;
/// The smallest disk that becomes a file system, in bytes.
pub(super) const DISK_LEN_MIN: u64 = 4 << 20;
/// Blocks that a last, short group has to have beside its tables, as in mke2fs.
const LAST_GROUP_BLOCKS_MIN: u64 = 50;
/// The largest journal, in blocks: 64 MiB, so that it lies in one group.
const JOURNAL_BLOCKS_MAX: u64 = 16 << 10;

/// The geometry of a file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Layout {
    pub(super) blocks: u64,
    pub(super) groups: u64,
    /// Blocks of the table of group descriptors.
    pub(super) descriptor_blocks: u64,
    pub(super) inodes_per_group: u64,
    pub(super) journal_blocks: u64,
}

impl Layout {
    pub(super) fn new(disk_len: u64, bytes_per_inode: u64) -> Result<Layout, FormatError> {
        let too_small = FormatError::TargetTooSmall { target_len: disk_len, needed_len: DISK_LEN_MIN };
        if disk_len < DISK_LEN_MIN {
            return Err(too_small);
        }
        let mut blocks = disk_len / BLOCK_LEN;
        loop {
            let groups = blocks.div_ceil(GROUP_BLOCKS);
            let inodes = (blocks * BLOCK_LEN / bytes_per_inode.max(1024)).clamp(16, u64::from(u32::MAX) - GROUP_BLOCKS);
            let per_group = inodes.div_ceil(groups).next_multiple_of(INODES_PER_BLOCK).min(GROUP_BLOCKS);
            let layout = Layout {
                blocks,
                groups,
                descriptor_blocks: (groups * DESCRIPTOR_LEN).div_ceil(BLOCK_LEN),
                inodes_per_group: per_group,
                journal_blocks: match blocks {
                    0..8192 => 0,
                    8192..32_768 => 1024,
                    32_768..262_144 => 4096,
                    262_144..524_288 => 8192,
                    _ => JOURNAL_BLOCKS_MAX,
                },
            };
            let last = groups - 1;
            let last_len = blocks - last * GROUP_BLOCKS;
            if last_len >= layout.overhead(last) + LAST_GROUP_BLOCKS_MIN {
                return Ok(layout);
            }
            if last == 0 {
                return Err(too_small);
            }
            // Too short for its own tables: the disk's end stays unused.
            blocks = last * GROUP_BLOCKS;
        }
    }

    /// Whether a group begins with a copy of the superblock and the descriptors: 0, 1 and powers of 3, 5 and 7.
    pub(super) fn has_superblock(group: u64) -> bool {
        let power_of = |base: u64| {
            let mut power = base;
            while power < group {
                power *= base;
            }
            power == group
        };
        group <= 1 || [3, 5, 7].into_iter().any(power_of)
    }

    pub(super) fn first_block(group: u64) -> u64 {
        group * GROUP_BLOCKS
    }

    pub(super) fn blocks_in(&self, group: u64) -> u64 {
        (self.blocks - Self::first_block(group)).min(GROUP_BLOCKS)
    }

    pub(super) fn inode_table_blocks(&self) -> u64 {
        self.inodes_per_group / INODES_PER_BLOCK
    }

    fn copies_in(&self, group: u64) -> u64 {
        if Self::has_superblock(group) { 1 + self.descriptor_blocks } else { 0 }
    }

    /// Blocks at the start of a group that hold its tables.
    pub(super) fn overhead(&self, group: u64) -> u64 {
        self.copies_in(group) + 2 + self.inode_table_blocks()
    }

    pub(super) fn block_bitmap(&self, group: u64) -> u64 {
        Self::first_block(group) + self.copies_in(group)
    }

    pub(super) fn inode_bitmap(&self, group: u64) -> u64 {
        self.block_bitmap(group) + 1
    }

    pub(super) fn inode_table(&self, group: u64) -> u64 {
        self.block_bitmap(group) + 2
    }

    pub(super) fn inodes(&self) -> u64 {
        self.inodes_per_group * self.groups
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_of_the_superblock_are_sparse() {
        let with: Vec<u64> = (0..130).filter(|group| Layout::has_superblock(*group)).collect();
        assert_eq!(with, [0, 1, 3, 5, 7, 9, 25, 27, 49, 81, 125]);
    }

    #[test]
    fn a_last_group_without_room_for_its_tables_is_left_out() {
        let layout = Layout::new((GROUP_BLOCKS + 100) * BLOCK_LEN, 16384).unwrap();
        assert_eq!((layout.blocks, layout.groups), (GROUP_BLOCKS, 1));
        let layout = Layout::new(2 * GROUP_BLOCKS * BLOCK_LEN + 5, 16384).unwrap();
        assert_eq!((layout.blocks, layout.groups, layout.inodes_per_group), (2 * GROUP_BLOCKS, 2, 8192));
        assert!(Layout::new(DISK_LEN_MIN - 1, 16384).is_err());
        assert!(Layout::new(64 << 40, 16384).is_ok());
    }
}
