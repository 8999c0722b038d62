//! Which blocks are taken. Groups without a block of a file need no bitmap, neither here nor on the disk.

use super::layout::{GROUP_BLOCKS, Layout};
use std::collections::HashMap;

/// The bitmap of a group.
type Bitmap = Box<[u8; GROUP_BLOCKS as usize / 8]>;

/// Blocks in a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) start: u64,
    pub(super) len: u64,
}

/// The block allocator: each search begins where the last one ended.
pub(super) struct Blocks {
    layout: Layout,
    bitmaps: HashMap<u64, Bitmap>,
    free: HashMap<u64, u64>,
    next: u64,
    free_total: u64,
}

impl Blocks {
    pub(super) fn new(layout: &Layout) -> Self {
        let free_total = (0..layout.groups).map(|group| layout.blocks_in(group) - layout.overhead(group)).sum();
        Blocks { layout: layout.clone(), bitmaps: HashMap::new(), free: HashMap::new(), next: 0, free_total }
    }

    /// Free blocks of the whole disk.
    pub(super) fn free_total(&self) -> u64 {
        self.free_total
    }

    /// Free blocks of a group.
    pub(super) fn free_in(&self, group: u64) -> u64 {
        let untouched = self.layout.blocks_in(group) - self.layout.overhead(group);
        self.free.get(&group).copied().unwrap_or(untouched)
    }

    /// The bitmap of a group in which something was taken.
    pub(super) fn touched(&self, group: u64) -> Option<&[u8]> {
        self.bitmaps.get(&group).map(|bitmap| &bitmap[..])
    }

    /// The bitmap that a group has before anything is taken.
    pub(super) fn untouched_bitmap(&self, group: u64) -> Bitmap {
        let mut bitmap: Bitmap = Box::new([0; GROUP_BLOCKS as usize / 8]);
        (0..self.layout.overhead(group)).for_each(|bit| set(&mut bitmap, bit));
        (self.layout.blocks_in(group)..GROUP_BLOCKS).for_each(|bit| set(&mut bitmap, bit));
        bitmap
    }

    /// Takes up to `wanted` blocks in a row; nothing when the disk is full.
    pub(super) fn take(&mut self, wanted: u64) -> Option<Run> {
        if self.free_total == 0 {
            return None;
        }
        // Once around, and the part of the first group before where the search began.
        for step in 0..=self.layout.groups {
            let group = (self.next / GROUP_BLOCKS + step) % self.layout.groups;
            if self.free_in(group) == 0 {
                continue;
            }
            let from = if step == 0 { self.next % GROUP_BLOCKS } else { 0 };
            if let Some(run) = self.take_in(group, from, wanted) {
                self.next = (run.start + run.len) % self.layout.blocks;
                return Some(run);
            }
        }
        None
    }

    fn take_in(&mut self, group: u64, from: u64, wanted: u64) -> Option<Run> {
        let free = self.free_in(group);
        if !self.bitmaps.contains_key(&group) {
            let bitmap = self.untouched_bitmap(group);
            self.bitmaps.insert(group, bitmap);
        }
        let bitmap = self.bitmaps.get_mut(&group).expect("it was made above");
        let first = next_free(bitmap, from)?;
        let mut len = 0;
        while len < wanted && first + len < GROUP_BLOCKS && !is_set(bitmap, first + len) {
            set(bitmap, first + len);
            len += 1;
        }
        self.free.insert(group, free - len);
        self.free_total -= len;
        Some(Run { start: Layout::first_block(group) + first, len })
    }

    /// Gives blocks back.
    pub(super) fn give_back(&mut self, run: Run) {
        for block in run.start..run.start + run.len {
            let group = block / GROUP_BLOCKS;
            let bitmap = self.bitmaps.get_mut(&group).expect("a block that was taken has a bitmap");
            let bit = block % GROUP_BLOCKS;
            assert!(is_set(bitmap, bit), "block {block} is given back twice");
            bitmap[(bit / 8) as usize] &= !(1 << (bit % 8));
            *self.free.get_mut(&group).expect("a group with a bitmap has a count") += 1;
        }
        self.free_total += run.len;
    }
}

fn set(bitmap: &mut Bitmap, bit: u64) {
    bitmap[(bit / 8) as usize] |= 1 << (bit % 8);
}

fn is_set(bitmap: &Bitmap, bit: u64) -> bool {
    bitmap[(bit / 8) as usize] & 1 << (bit % 8) != 0
}

fn next_free(bitmap: &Bitmap, from: u64) -> Option<u64> {
    let mut bit = from;
    while bit < GROUP_BLOCKS {
        if bit.is_multiple_of(8) && bitmap[(bit / 8) as usize] == 0xff {
            bit += 8;
        } else if is_set(bitmap, bit) {
            bit += 1;
        } else {
            return Some(bit);
        }
    }
    None
}
