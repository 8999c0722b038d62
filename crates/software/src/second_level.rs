//! The second level of the look-up tables for data: larger, hashed, and asked only when the first one misses.
//!
//! Every fill goes into both levels, so that what the first level lost to another page in the same place comes back without a walk of the guest's
//! tables. Each first-level table that is ever filled has a part of its own, as tags of different tables can be the same.

use polder_memory::PAGE_SIZE;

use crate::tlb::{DataEntry, WATCHED};

/// Entries for each table.
const ENTRIES: usize = 16384;
/// Tables that are filled: all but [`WATCHED`], which is the last.
const TABLES: usize = WATCHED;

/// Entries of data pages, by table and a hash of the page.
pub struct SecondLevel {
    entries: Box<[DataEntry]>,
}

impl Default for SecondLevel {
    fn default() -> Self {
        SecondLevel { entries: vec![DataEntry::NONE; TABLES * ENTRIES].into_boxed_slice() }
    }
}

/// Where a page of a table is.
fn place(table: usize, linear: u64) -> usize {
    let hash = (linear / PAGE_SIZE).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    table * ENTRIES + hash as usize % ENTRIES
}

impl SecondLevel {
    /// The entry that could hold `linear`'s page; nothing for [`WATCHED`].
    pub fn get(&self, table: usize, linear: u64) -> Option<&DataEntry> {
        if table < TABLES { Some(&self.entries[place(table, linear)]) } else { None }
    }

    /// Keeps an entry.
    pub fn put(&mut self, table: usize, linear: u64, entry: DataEntry) {
        if table < TABLES {
            self.entries[place(table, linear)] = entry;
        }
    }

    /// Drops a page from all tables.
    pub fn drop_page(&mut self, linear: u64) {
        for table in 0..TABLES {
            self.entries[place(table, linear)] = DataEntry::NONE;
        }
    }

    /// Drops all pages of a region of `1 << shift` bytes.
    pub fn drop_region(&mut self, linear: u64, shift: u32) {
        let region = linear >> shift;
        for entry in self.entries.iter_mut().filter(|entry| entry.read_tag >> shift == region) {
            *entry = DataEntry::NONE;
        }
    }

    /// Drops everything.
    pub fn clear(&mut self) {
        self.entries.fill(DataEntry::NONE);
    }
}
