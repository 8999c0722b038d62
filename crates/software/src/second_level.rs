//! The second level of the look-up tables for data: larger, hashed, and asked only when the first one misses.
//!
//! Every fill goes into both levels, so that what the first level lost to another page in the same place comes back without a walk of the guest's
//! tables. Each first-level table that is ever filled has a part of its own, as tags of different tables can be the same. Programs reach far more pages than kernels do, so the user's part is larger, and translated code
//! looks there without a call into Rust ([`crate::translate`]'s thunks).

use std::ptr::NonNull;

use polder_memory::PAGE_SIZE;
use rustix::mm::{Advice, madvise};

use crate::tlb::{DataEntry, USER, WATCHED};

/// Entries for the user's table, the first, and for each other one.
pub const USER_ENTRIES: usize = 65536;
const ENTRIES: usize = 16384;
/// Tables that are filled: all but [`WATCHED`], which is the last.
const TABLES: usize = WATCHED;
/// Entries of all.
const ALL: usize = USER_ENTRIES + (TABLES - 1) * ENTRIES;
/// What a page's number is multiplied with; the bits from [`HASH_SHIFT`] on choose its entry.
pub const HASH_FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;
pub const HASH_SHIFT: u8 = 32;

const _: () = assert!(USER == 0);

/// The memory of all entries.
#[repr(C, align(4096))]
pub struct SecondMemory([DataEntry; ALL]);

/// Entries of data pages, by table and a hash of the page.
pub struct SecondLevel {
    entries: NonNull<SecondMemory>,
}

/// Where a page of a table is.
fn place(table: usize, linear: u64) -> usize {
    let hash = ((linear / PAGE_SIZE).wrapping_mul(HASH_FACTOR) >> HASH_SHIFT) as usize;
    if table == USER { hash % USER_ENTRIES } else { USER_ENTRIES + (table - 1) * ENTRIES + hash % ENTRIES }
}

impl SecondLevel {
    /// Empty tables.
    ///
    /// # Safety
    /// Nobody else uses the memory, which lasts longer than the result and lies in whole pages of a private anonymous mapping.
    pub unsafe fn new(entries: NonNull<SecondMemory>) -> SecondLevel {
        let mut level = SecondLevel { entries };
        level.clear();
        level
    }

    fn entries(&self) -> &[DataEntry; ALL] {
        // SAFETY: `new` was promised the memory; all bit patterns are entries.
        unsafe { &self.entries.as_ref().0 }
    }

    fn entries_mut(&mut self) -> &mut [DataEntry; ALL] {
        // SAFETY: as above.
        unsafe { &mut self.entries.as_mut().0 }
    }

    /// The entry that could hold `linear`'s page; nothing for [`WATCHED`].
    pub fn get(&self, table: usize, linear: u64) -> Option<&DataEntry> {
        (table < TABLES).then(|| &self.entries()[place(table, linear)])
    }

    /// Keeps an entry.
    pub fn put(&mut self, table: usize, linear: u64, entry: DataEntry) {
        if table < TABLES {
            self.entries_mut()[place(table, linear)] = entry;
        }
    }

    /// Drops a page from all tables.
    pub fn drop_page(&mut self, linear: u64) {
        for table in 0..TABLES {
            self.entries_mut()[place(table, linear)] = DataEntry::NONE;
        }
    }

    /// Drops all pages of a region of `1 << shift` bytes.
    pub fn drop_region(&mut self, linear: u64, shift: u32) {
        let region = linear >> shift;
        let pages = (1 << shift) / PAGE_SIZE;
        if pages > ENTRIES as u64 {
            for entry in self.entries_mut().iter_mut().filter(|entry| entry.read_tag >> shift == region) {
                *entry = DataEntry::NONE;
            }
            return;
        }
        for page in 0..pages {
            self.drop_page((region << shift) + page * PAGE_SIZE);
        }
    }

    /// Drops everything. The pages go back to the host and read as zeros, which is [`DataEntry::NONE`].
    pub fn clear(&mut self) {
        // SAFETY: whole pages of a mapping for which that holds, as `new` was promised.
        let done = unsafe { madvise(self.entries.as_ptr().cast(), size_of::<SecondMemory>(), Advice::LinuxDontNeed) };
        if done.is_err() {
            self.entries_mut().fill(DataEntry::NONE);
        }
    }
}
