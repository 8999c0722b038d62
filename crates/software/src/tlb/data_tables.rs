//! The first-level tables for data, and the memory that they lie in.
//!
//! They are too large for a stack, and translated code reaches them at a fixed distance from the processor. So they are a part of the processor's arena
//! ([`crate::translate::CpuBox`]), and the processor holds a [`DataTables`]. Fresh memory of the host is zero, which is [`DataEntry::NONE`]: entries that no guest uses cost nothing.

use std::mem::offset_of;
use std::ptr::NonNull;
use std::sync::Arc;

use polder_memory::PAGE_SIZE;

use super::{NO_TAG, SUPERVISOR_TABLES, WATCHED};
use crate::second_level::SecondLevel;
use crate::translate::ArenaMemory;

/// Entries in a data table.
pub const DATA_ENTRIES: usize = 8192;
/// Data tables; [`WATCHED`] is the last.
const TABLES: usize = WATCHED + 1;

/// Where a page of RAM is in the host, for data. An entry never lies in two cache lines: translated shells ran at a quarter of
/// their speed when entries did.
#[derive(Clone, Copy)]
#[repr(C, align(32))]
pub struct DataEntry {
    pub read_tag: u64,
    pub write_tag: u64,
    /// Add to the linear address to get the host address.
    pub addend: u64,
    /// The page's note byte: not zero means that somebody wants to hear of stores.
    pub note: *const u8,
}

impl DataEntry {
    /// Matches nothing.
    pub const NONE: DataEntry = DataEntry { read_tag: NO_TAG, write_tag: NO_TAG, addend: 0, note: std::ptr::null() };

    /// Makes it match nothing.
    pub fn forget(&mut self) {
        self.read_tag = NO_TAG;
        self.write_tag = NO_TAG;
    }
}

/// The memory of all data tables, one after the other.
#[repr(C, align(4096))]
pub struct DataMemory([DataEntry; TABLES * DATA_ENTRIES]);

/// All data tables of one vCPU. Nothing else refers to their memory, translated code apart, which runs while nobody holds a reference to the processor.
pub struct DataTables {
    /// The table in use: one of those from `first` on.
    in_use: NonNull<DataEntry>,
    /// All tables.
    first: NonNull<DataEntry>,
    pub second: SecondLevel,
    /// Keeps the memory.
    _arena: Arc<ArenaMemory>,
}

impl DataTables {
    /// The address of the table in use, for generated code.
    pub const IN_USE_OFFSET: usize = offset_of!(DataTables, in_use);

    /// The tables of an arena, empty.
    ///
    /// # Safety
    /// The arena has no other `DataTables` that is used after this, and its memory is as the host gave it or was left by another one.
    pub unsafe fn new(arena: Arc<ArenaMemory>) -> DataTables {
        let first = arena.data_memory().cast();
        // SAFETY: the caller's promise; the arena is a private anonymous mapping and is kept here.
        let second = unsafe { SecondLevel::new(arena.second_memory()) };
        let mut tables = DataTables { in_use: first, first, second, _arena: arena };
        for entry in
            tables.filled_mut().iter_mut().filter(|entry| entry.read_tag != NO_TAG || entry.write_tag != NO_TAG)
        {
            entry.forget();
        }
        tables
    }

    /// Chooses the table to use.
    ///
    /// # Panics
    /// If there is no such table.
    pub fn select(&mut self, table: usize) {
        assert!(table < TABLES);
        // SAFETY: the memory has so many tables.
        self.in_use = unsafe { self.first.add(table * DATA_ENTRIES) };
    }

    /// Number of the table in use.
    pub fn in_use(&self) -> usize {
        // SAFETY: both point into the same array.
        let entries = unsafe { self.in_use.offset_from(self.first) };
        entries as usize / DATA_ENTRIES
    }

    /// The entry that could hold `linear`'s page in the table in use.
    #[inline(always)]
    pub fn entry(&self, linear: u64) -> &DataEntry {
        // SAFETY: a table has so many entries; `self` owns it.
        unsafe { self.in_use.add(place(linear)).as_ref() }
    }

    /// The entry that could hold `linear`'s page in one of the tables that are filled.
    pub fn entry_mut(&mut self, table: usize, linear: u64) -> &mut DataEntry {
        &mut self.filled_mut()[table * DATA_ENTRIES + place(linear)]
    }

    /// All entries of the tables that are filled: of all but [`WATCHED`].
    pub fn filled_mut(&mut self) -> &mut [DataEntry] {
        // SAFETY: `self` owns that many entries from there on; all bit patterns are entries.
        unsafe { std::slice::from_raw_parts_mut(self.first.as_ptr(), WATCHED * DATA_ENTRIES) }
    }
}

/// Number of the entry of `linear`'s page in a data table.
pub fn place(linear: u64) -> usize {
    (linear / PAGE_SIZE) as usize & (DATA_ENTRIES - 1)
}

/// Entries of the supervisor tables.
const LOCAL: usize = (SUPERVISOR_TABLES.end - SUPERVISOR_TABLES.start) * DATA_ENTRIES;
/// Words of the bitmap that one bit of its summary stands for.
const WORDS_A_BIT: usize = LOCAL / 64 / 64;
const _: () = assert!(WORDS_A_BIT * 64 * 64 == LOCAL);

/// A set of entries of the supervisor tables, by their numbers from the first of these tables on. Few entries are taken out quickly, however large the tables are.
pub struct LocalEntries {
    words: [u64; LOCAL / 64],
    /// A bit for [`WORDS_A_BIT`] words that may not be zero.
    summary: u64,
}

impl Default for LocalEntries {
    fn default() -> Self {
        LocalEntries { words: [0; LOCAL / 64], summary: 0 }
    }
}

impl LocalEntries {
    pub fn insert(&mut self, number: usize) {
        self.words[number / 64] |= 1 << (number % 64);
        self.summary |= 1 << (number / 64 / WORDS_A_BIT);
    }

    pub fn remove(&mut self, number: usize) {
        self.words[number / 64] &= !(1 << (number % 64));
    }

    pub fn clear(&mut self) {
        self.take_each(|_| ());
    }

    /// Empties the set.
    pub fn take_each(&mut self, mut take: impl FnMut(usize)) {
        while self.summary != 0 {
            let start = self.summary.trailing_zeros() as usize * WORDS_A_BIT;
            self.summary &= self.summary - 1;
            for (word, bits) in (start..).zip(&mut self.words[start..start + WORDS_A_BIT]) {
                while *bits != 0 {
                    take(word * 64 + bits.trailing_zeros() as usize);
                    *bits &= *bits - 1;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_of_local_entries_gives_each_once_and_is_empty_then() {
        let mut set = LocalEntries::default();
        let numbers = [0, 1, 63, 64, DATA_ENTRIES - 1, DATA_ENTRIES, LOCAL - 65, LOCAL - 1];
        for number in numbers {
            set.insert(number);
            set.insert(number);
        }
        set.insert(700);
        set.remove(700);
        let mut taken = Vec::new();
        set.take_each(|number| taken.push(number));
        assert_eq!(taken, numbers);
        set.take_each(|number| panic!("{number}"));
        set.insert(5);
        set.clear();
        set.take_each(|number| panic!("{number}"));
    }

    #[test]
    fn fresh_memory_holds_no_entry_and_an_arena_s_next_tables_are_empty() {
        let arena = Arc::new(ArenaMemory::new().unwrap());
        // SAFETY: one after the other.
        let mut tables = unsafe { DataTables::new(arena.clone()) };
        assert!(tables.filled_mut().iter().all(|entry| (entry.read_tag, entry.write_tag) == (NO_TAG, NO_TAG)));
        tables.entry_mut(1, 0x5000).read_tag = 0x5001;
        tables.entry_mut(2, 0x6000).write_tag = 0x6001;
        tables.select(1);
        assert_eq!((tables.in_use(), tables.entry(0x5000).read_tag), (1, 0x5001));
        drop(tables);
        // SAFETY: the first is gone.
        let mut tables = unsafe { DataTables::new(arena) };
        assert!(tables.filled_mut().iter().all(|entry| (entry.read_tag, entry.write_tag) == (NO_TAG, NO_TAG)));
    }
}
