//! A block: a run of ops that is entered at its first byte only.
//!
//! A block lies in one page; only a block of a single instruction may reach into the next. It is a function of the bytes, their
//! guest-physical place and the code size, never of the linear address: ops know their places relative to the block's first byte.

use std::cell::Cell;
use std::ptr;

use polder_memory::PAGE_SIZE;

use crate::cpu::{CodeSize, Cpu};
use crate::op::{Op, abandon};

/// [`Block::heat`] of a block that stays with the interpreter.
pub const COLD_FOR_EVER: u32 = u32::MAX;

/// Where a block lies and where its ops are. Owned by [`crate::block_cache::Blocks`].
pub struct Block {
    /// The first op; the last one of a block never returns `Flow::Next`.
    pub ops: *const Op,
    pub op_count: u32,
    /// Bytes of all instructions.
    pub bytes: u32,
    /// Guest-physical address of the first byte.
    pub physical: u64,
    /// Guest-physical page number of the last byte.
    pub last_page: u64,
    pub code: CodeSize,
    /// Cleared when the bytes may have changed.
    pub valid: Cell<bool>,
    /// Times it ran while something counts; [`COLD_FOR_EVER`] if it has no translation.
    pub heat: Cell<u32>,
    /// Next block in the same bucket of the look-up by physical address.
    pub next: Cell<u32>,
    /// Whether the first op stands for two instructions.
    pub starts_fused: bool,
    /// Whether the same way out leads to few places: not after a return or an indirect branch.
    pub chains: bool,
    /// Where the last two different ways out led.
    pub successors: [Cell<Successor>; 2],
}

/// A remembered way from a linear address to a block. It counts only while the fetch tag is what it was and the block is valid.
#[derive(Clone, Copy)]
pub struct Successor {
    pub linear: u64,
    pub fetch_tag: u64,
    pub block: *const Block,
}

impl Successor {
    /// Leads nowhere: no fetch tag is zero.
    pub const NONE: Successor = Successor { linear: 0, fetch_tag: 0, block: ptr::null() };
}

impl Block {
    /// Guest-physical page number of the first byte.
    pub fn first_page(&self) -> u64 {
        self.physical / PAGE_SIZE
    }

    /// The 64-byte granules of a page that the block's bytes lie in.
    pub fn granules(&self, page_number: u64) -> u64 {
        let offset = self.physical % PAGE_SIZE;
        let bytes = u64::from(self.bytes);
        let in_first = bytes.min(PAGE_SIZE - offset);
        let mut granules = 0;
        if page_number == self.first_page() {
            granules |= polder_memory::GuestMemory::granules(offset, in_first);
        }
        if in_first < bytes && page_number == self.last_page {
            granules |= polder_memory::GuestMemory::granules(0, bytes - in_first);
        }
        granules
    }
}

/// The block that a vCPU is running, or none.
#[derive(Clone, Copy)]
pub(crate) struct RunningBlock {
    block: *const Block,
    /// The running block's instructions after the one that runs are abandoned; the block is to be dropped.
    pub abandoned: bool,
}

// SAFETY: the pointer is set only inside `Blocks::run` and `Blocks::run_one`, on whatever thread runs them.
unsafe impl Send for RunningBlock {}

impl Default for RunningBlock {
    fn default() -> Self {
        RunningBlock { block: ptr::null(), abandoned: false }
    }
}

impl RunningBlock {
    /// Notes the block that runs next. The caller clears it ([`RunningBlock::clear`]) before the block's memory goes.
    #[inline(always)]
    pub fn set(&mut self, block: *const Block) {
        self.block = block;
    }

    pub fn block(&self) -> *const Block {
        self.block
    }

    pub fn clear(&mut self) {
        self.block = ptr::null();
    }
}

impl Cpu {
    /// `bytes` bytes at `physical` were written and may be code: if the running block has bytes there, it ends after the current instruction.
    #[cold]
    pub fn abandon_block(&mut self, physical: u64, bytes: u64) {
        if self.running.block.is_null() {
            return;
        }
        // SAFETY: set by the run loop to a block that lives until it is cleared there.
        let block = unsafe { &*self.running.block };
        let offset = physical % PAGE_SIZE;
        let in_page = bytes.min(PAGE_SIZE - offset);
        let page_number = physical / PAGE_SIZE;
        let hit = block.granules(page_number) & polder_memory::GuestMemory::granules(offset, in_page)
            | block.granules(page_number + 1)
                & polder_memory::GuestMemory::granules(0, (bytes - in_page).min(PAGE_SIZE));
        if hit != 0 {
            for index in 0..block.op_count as usize {
                // SAFETY: the block has that many ops. The handler is a cell: nobody holds a reference into it.
                unsafe { (*block.ops.add(index)).handler.set(abandon) };
            }
            self.running.abandoned = true;
        }
    }
}
