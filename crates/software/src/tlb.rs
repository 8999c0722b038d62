//! The translation look-aside buffers of one vCPU.
//!
//! Data accesses look into one of four direct-mapped tables, chosen by privilege, so that a hit needs no permission check: user,
//! supervisor that may not touch user pages (SMAP), supervisor that may, and one that is never filled and so sends every access the
//! slow way (alignment checks and data breakpoints need to see them all). Instruction fetches have two tables of their own.
//!
//! A tag is the page's linear address with the generation of its address space in the low 12 bits. Switching address spaces and
//! flushing are changes of the generation; nothing is cleared until the 4,095 generations are used up. Generations are handed to
//! process-context identifiers (PCID) from a small least-recently-used list, so that a switch back finds its entries again.
//!
//! The supervisor tables have a generation of their own, which only a flush of everything changes: entries of global pages outlive
//! switches of address spaces (SDM vol. 3, 4.10.2.4). Entries of other pages in these tables (copies to and from user memory, mostly) are noted in
//! a bitmap and dropped one by one at a switch. A guest whose kernel pages are not global would lose by that: after
//! [`LOCAL_KERNEL_PAGES_MAX`] such pages between two switches its supervisor tables follow the address space as the user's does, until everything is flushed.
//!
//! The layout of [`DataEntry`], the place of a page in its table (the lowest bits of its number) and [`Tlb::generations`] are what generated
//! code looks up; nothing else is.
//!
//! Stale entries may stay until the guest flushes, as the architecture allows (SDM vol. 3, 4.10).

use std::mem::offset_of;

use polder_memory::PAGE_SIZE;

use crate::cpu::{Cpu, cr0, cr4};
use crate::flags;

mod data_tables;

use data_tables::LocalEntries;
pub use data_tables::{DATA_ENTRIES, DataEntry, DataMemory, DataTables};

/// Entries in a code table.
pub const CODE_ENTRIES: usize = 1024;
const PAGE_MASK: u64 = !(PAGE_SIZE - 1);
const GENERATION_MAX: u64 = 4095;
/// Address spaces whose entries survive a switch.
const CONTEXTS: usize = 8;
/// Key of no address space.
const NO_KEY: u64 = u64::MAX;
/// Matches no tag: generation 0 is never handed out.
const NO_TAG: u64 = 0;

/// Data table for CPL 3.
pub const USER: usize = 0;
/// Data table for CPL 0-2 with CR4.SMAP and RFLAGS.AC clear.
pub const SUPERVISOR: usize = 1;
/// Data table for CPL 0-2 that may touch user pages.
pub const SUPERVISOR_OPEN: usize = 2;
/// Never filled.
pub const WATCHED: usize = 3;

/// The first of the supervisor tables, which lie side by side.
const SUPERVISOR_TABLES: std::ops::Range<usize> = SUPERVISOR..SUPERVISOR_OPEN + 1;
/// Supervisor pages that are not global, filled between two switches of address spaces, before the guest counts as one without global pages.
const LOCAL_KERNEL_PAGES_MAX: u32 = 64;

/// How long a page's entry lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// In all address spaces.
    Global,
    /// A supervisor page of one address space.
    LocalSupervisor,
    /// A user page of one address space.
    LocalUser,
}

/// Where a page of RAM is in the host, for instruction fetch.
#[derive(Clone, Copy)]
pub struct CodeEntry {
    pub tag: u64,
    /// Guest-physical page number.
    pub page_number: u64,
}

#[derive(Clone, Copy)]
struct Context {
    /// CR3's table address and PCID.
    key: u64,
    generation: u64,
    used: u64,
}

/// What is remembered of instruction fetch at one privilege.
#[derive(Default)]
struct Ways {
    /// Changes whenever a translation that instruction fetch has used may have changed other than by a new generation.
    epoch: u64,
    /// Pages that instruction fetch has used in this epoch, and the regions of large pages that they lie in. A page of data that is taken for one of them costs much: in a new epoch translated code has to find all its
    /// ways again.
    pages: Filter<8192>,
}

impl Ways {
    fn begin_epoch(&mut self) {
        self.epoch += 1;
        self.pages.clear();
    }

    fn add(&mut self, linear: u64) {
        self.pages.add(linear / PAGE_SIZE);
        for shift in [MIDDLE_SHIFT, HUGE_SHIFT] {
            self.pages.add(region(linear, shift));
        }
    }

    /// Begins an epoch if a page or a region may be one of those used; gives whether.
    fn forget(&mut self, number: u64) -> bool {
        let is_used = self.pages.has(number);
        if is_used {
            self.begin_epoch();
        }
        is_used
    }
}

/// All tables of one vCPU.
pub struct Tlb {
    data: DataTables,
    code: Box<[CodeEntry; 2 * CODE_ENTRIES]>,
    /// First entry of the code table in use.
    code_base: usize,
    /// The data table's generation in use: one of `generations`.
    generation: u64,
    /// The generations of the data tables.
    pub generations: [u64; 4],
    /// The generation of the address space in use.
    context_generation: u64,
    last_generation: u64,
    /// Entries of the supervisor tables whose pages are not global.
    local: LocalEntries,
    /// Supervisor pages filled that are not global, since the last switch of address spaces.
    local_kernel_pages: u32,
    /// A way through a page that is not global was remembered for the supervisor in this address space.
    has_local_way: bool,
    /// Key of the address space in use.
    current_key: u64,
    /// Which regions of 4 MiB and of 1 GiB may have entries that come from a large page.
    large: Filter<1024>,
    contexts: [Context; CONTEXTS],
    clock: u64,
    /// Of the supervisor's and of the user's instruction fetch.
    ways: [Ways; 2],
    /// [`crate::cpu::CodeSize`] of the running code.
    code_size: u8,
    /// Equal at two moments only if instruction fetch at every linear address that was possible at the first leads to the same
    /// bytes at the second, decoded in the same size: what a remembered way from a linear address to a block compares.
    pub fetch_tag: u64,
}

// SAFETY: the note pointers point into the machine's `PageNotes`, which every vCPU thread may read.
unsafe impl Send for Tlb {}

impl Tlb {
    /// Empty tables.
    pub fn new(mut data: DataTables) -> Tlb {
        data.select(SUPERVISOR_OPEN);
        let code = CodeEntry { tag: NO_TAG, page_number: 0 };
        Tlb {
            data,
            code: vec![code; 2 * CODE_ENTRIES]
                .into_boxed_slice()
                .try_into()
                .unwrap_or_else(|_| unreachable!("same length")),
            code_base: 0,
            generation: 2,
            generations: [1, 2, 2, 1],
            context_generation: 1,
            last_generation: 2,
            local: LocalEntries::default(),
            local_kernel_pages: 0,
            has_local_way: false,
            current_key: NO_KEY,
            large: Filter::default(),
            contexts: [Context { key: NO_KEY, generation: 0, used: 0 }; CONTEXTS],
            clock: 0,
            ways: [Ways::default(), Ways::default()],
            code_size: 0,
            fetch_tag: 0,
        }
    }
}

/// A set of numbers that may hold more than was put in, but hardly ever does: each number has two bits by two hashes (B. H. Bloom, CACM 13(7), 1970).
struct Filter<const WORDS: usize>(Box<[u64; WORDS]>);

impl<const WORDS: usize> Default for Filter<WORDS> {
    fn default() -> Self {
        let words = vec![0; WORDS].into_boxed_slice();
        Filter(words.try_into().unwrap_or_else(|_| unreachable!("same length")))
    }
}

impl<const WORDS: usize> Filter<WORDS> {
    /// Words and bits of a number.
    fn places(number: u64) -> [(usize, u64); 2] {
        let hash = number.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let place = |hash: u64| ((hash >> 6) as usize % WORDS, 1 << (hash & 63));
        [place(hash >> 40), place((hash ^ hash >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 40)]
    }

    fn add(&mut self, number: u64) {
        for (word, bit) in Self::places(number) {
            self.0[word] |= bit;
        }
    }

    fn has(&self, number: u64) -> bool {
        Self::places(number).iter().all(|&(word, bit)| self.0[word] & bit != 0)
    }

    fn clear(&mut self) {
        self.0.fill(0);
    }
}

/// Regions that large pages of 2 or 4 MiB are noted by.
const MIDDLE_SHIFT: u32 = 22;
/// Regions that pages of 1 GiB are noted by.
const HUGE_SHIFT: u32 = 30;

/// The number of a region in the set of those.
fn region(linear: u64, shift: u32) -> u64 {
    linear >> shift | u64::from(shift) << 58
}

/// Where generated code finds what [`Tlb::data_entry`] and [`Tlb::tag`] look at: offsets in [`Tlb`].
pub struct DataLayout {
    /// The address of the table in use.
    pub table: usize,
    pub generation: usize,
}

pub const DATA_LAYOUT: DataLayout =
    DataLayout { table: offset_of!(Tlb, data) + DataTables::IN_USE_OFFSET, generation: offset_of!(Tlb, generation) };

fn code_index(linear: u64) -> usize {
    (linear / PAGE_SIZE) as usize & (CODE_ENTRIES - 1)
}

impl Tlb {
    /// Where translated code finds the generation of a data table.
    pub(crate) const fn generation_offset(table: usize) -> usize {
        std::mem::offset_of!(Tlb, generations) + table * size_of::<u64>()
    }

    /// The entry that could hold `linear`'s page in the table in use.
    #[inline(always)]
    pub fn data_entry(&self, linear: u64) -> &DataEntry {
        self.data.entry(linear)
    }

    /// What the entry's tag must equal for an access of `bytes` bytes at `linear` to hit; an access that crosses into another page
    /// never does.
    #[inline(always)]
    pub fn tag(&self, linear: u64, bytes: u64) -> u64 {
        linear.wrapping_add(bytes - 1) & PAGE_MASK | self.generation
    }

    /// The guest-physical page number for an instruction fetch at `linear`, if it is known.
    #[inline(always)]
    pub fn code_page(&self, linear: u64) -> Option<u64> {
        let entry = &self.code[(self.code_base + code_index(linear)) & (2 * CODE_ENTRIES - 1)];
        let page = linear & PAGE_MASK;
        let hit = entry.tag == page | self.context_generation || entry.tag == page | self.code_generation(true);
        hit.then_some(entry.page_number)
    }

    /// The generation of code entries for the running privilege.
    #[inline(always)]
    fn code_generation(&self, global: bool) -> u64 {
        if global && self.code_base == 0 { self.generations[SUPERVISOR] } else { self.context_generation }
    }

    /// Fills a data table's entry. Without `writable` the next store takes the slow way.
    pub fn fill_data(
        &mut self,
        table: usize,
        linear: u64,
        host: *mut u8,
        note: *const u8,
        writable: bool,
        scope: Scope,
    ) {
        if SUPERVISOR_TABLES.contains(&table) {
            if scope == Scope::LocalSupervisor && !self.supervisor_follows() {
                self.local_kernel_pages += 1;
                if self.supervisor_follows() {
                    self.set_context_generation(self.context_generation);
                    self.retag();
                }
            }
            let place = (table - SUPERVISOR) * DATA_ENTRIES + data_tables::place(linear);
            if scope == Scope::Global {
                self.local.remove(place);
            } else {
                self.local.insert(place);
            }
        }
        let tag = linear & PAGE_MASK | self.generations[table];
        let entry = DataEntry {
            read_tag: tag,
            write_tag: if writable { tag } else { NO_TAG },
            addend: (host as u64).wrapping_sub(linear & PAGE_MASK),
            note,
        };
        *self.data.entry_mut(table, linear) = entry;
        // What a switch drops one by one is not looked for in the second level.
        if table == USER || scope == Scope::Global || self.supervisor_follows() {
            self.data.second.put(table, linear, entry);
        }
    }

    /// Brings `linear`'s entry back from the second level to the table in use, if it allows the access; gives the host address.
    pub fn refill(&mut self, linear: u64, write: bool) -> Option<*mut u8> {
        let table = self.data_table();
        let entry = *self.data.second.get(table, linear)?;
        let tag = if write { entry.write_tag } else { entry.read_tag };
        if tag != linear & PAGE_MASK | self.generation {
            return None;
        }
        if SUPERVISOR_TABLES.contains(&table) {
            let place = (table - SUPERVISOR) * DATA_ENTRIES + data_tables::place(linear);
            self.local.remove(place);
        }
        *self.data.entry_mut(table, linear) = entry;
        Some(entry.addend.wrapping_add(linear) as *mut u8)
    }

    /// Fills a code table's entry.
    pub fn fill_code(&mut self, linear: u64, page_number: u64, scope: Scope) {
        let tag = linear & PAGE_MASK | self.code_generation(scope == Scope::Global);
        self.code[self.code_base + code_index(linear)] = CodeEntry { tag, page_number };
    }

    /// Whether the supervisor tables are flushed with the address space.
    fn supervisor_follows(&self) -> bool {
        self.local_kernel_pages >= LOCAL_KERNEL_PAGES_MAX
    }

    /// Makes `generation` that of the address space in use.
    fn set_context_generation(&mut self, generation: u64) {
        self.context_generation = generation;
        self.generations[USER] = generation;
        self.generations[WATCHED] = generation;
        if self.supervisor_follows() {
            self.generations[SUPERVISOR_TABLES].fill(generation);
        }
        self.generation = self.generations[self.data_table()];
    }

    /// Begins to use an address space with this generation, or anew: entries of pages that are not global go.
    fn enter_context(&mut self, generation: u64) {
        if self.supervisor_follows() {
            // These entries have the generation of their address space.
            self.local.clear();
        } else {
            // A few such pages are no reason, however often they are filled.
            self.local_kernel_pages = 0;
        }
        let data = self.data.filled_mut();
        self.local.take_each(|place| data[SUPERVISOR * DATA_ENTRIES + place].forget());
        self.has_local_way = false;
        self.set_context_generation(generation);
    }

    /// Notes that a translation came from a page of `1 << shift` bytes, more than 4 KiB: entries hold parts of it.
    pub fn note_large(&mut self, linear: u64, shift: u32) {
        self.large.add(region(linear, if shift > MIDDLE_SHIFT { HUGE_SHIFT } else { MIDDLE_SHIFT }));
    }

    /// Drops one page from all tables, whatever address space its entries belong to; of a large page, all its parts.
    pub fn invalidate_page(&mut self, linear: u64) {
        let mut is_new = self.forget_ways(linear / PAGE_SIZE);
        for shift in [MIDDLE_SHIFT, HUGE_SHIFT] {
            if self.large.has(region(linear, shift)) {
                self.invalidate_region(linear, shift);
                // A heap of large pages is no reason to find all code again.
                is_new |= self.forget_ways(region(linear, shift));
            }
        }
        // Most invalidated pages hold data: ways to blocks stay.
        if is_new {
            self.retag();
        }
        self.drop_data(linear);
        for table in 0..2 {
            self.code[table * CODE_ENTRIES + code_index(linear)].tag = NO_TAG;
        }
    }

    /// Drops one page's entries for data.
    pub fn drop_data(&mut self, linear: u64) {
        for table in 0..WATCHED {
            self.data.entry_mut(table, linear).forget();
        }
        self.data.second.drop_page(linear);
    }

    #[cold]
    fn invalidate_region(&mut self, linear: u64, shift: u32) {
        self.data.second.drop_region(linear, shift);
        let region = linear >> shift;
        for entry in self.data.filled_mut() {
            if entry.read_tag >> shift == region {
                entry.read_tag = NO_TAG;
            }
            if entry.write_tag >> shift == region {
                entry.write_tag = NO_TAG;
            }
        }
        for entry in self.code.iter_mut().filter(|entry| entry.tag >> shift == region) {
            entry.tag = NO_TAG;
        }
    }

    /// Drops everything of all address spaces.
    pub fn flush_all(&mut self) {
        self.forget_contexts();
        let supervisor = self.new_generation();
        let context = self.new_generation();
        // The counter may have begun anew between the two, which has dropped everything already and taken numbers of its own.
        if supervisor < context {
            self.generations[SUPERVISOR_TABLES].fill(supervisor);
        }
        self.local_kernel_pages = 0;
        self.enter_context(context);
        self.remember(self.current_key);
        self.retag();
    }

    /// Drops the entries of the address space with this key, whether it is in use or not.
    pub fn flush_context(&mut self, key: u64) {
        if key == self.current_key {
            let generation = self.new_generation();
            self.enter_context(generation);
            self.remember(key);
        } else if let Some(context) = self.contexts.iter_mut().find(|context| context.key == key) {
            context.key = NO_KEY;
        }
        self.retag();
    }

    /// Switches to the address space with this key (its PCID); with `keep` its older entries stay valid.
    pub fn switch_context(&mut self, key: u64, keep: bool) {
        self.clock += 1;
        self.current_key = key;
        let found = self.contexts.iter().find(|context| context.key == key);
        let generation = match found.filter(|_| keep) {
            Some(context) => context.generation,
            None => self.new_generation(),
        };
        self.enter_context(generation);
        self.remember(key);
        self.retag();
    }

    /// Notes that the address space's generation is that of `key`, in place of the context that was used least recently.
    fn remember(&mut self, key: u64) {
        let found = self.contexts.iter().position(|context| context.key == key);
        let slot = found.unwrap_or_else(|| {
            let oldest = self.contexts.iter().enumerate().min_by_key(|(_, context)| context.used);
            oldest.map_or(0, |(slot, _)| slot)
        });
        self.contexts[slot] = Context { key, generation: self.context_generation, used: self.clock };
    }

    fn forget_contexts(&mut self) {
        self.large.clear();
        self.contexts = [Context { key: NO_KEY, generation: 0, used: 0 }; CONTEXTS];
    }

    /// Begins an epoch wherever instruction fetch has used a page or a region; gives whether.
    fn forget_ways(&mut self, number: u64) -> bool {
        let [supervisor, user] = &mut self.ways;
        supervisor.forget(number) | user.forget(number)
    }

    fn begin_epochs(&mut self) {
        self.ways.iter_mut().for_each(Ways::begin_epoch);
    }

    /// Notes that a way to a block is remembered, with the fetch tag as it is, for an address in the page of `linear`.
    ///
    /// The supervisor's fetch tag has the supervisor tables' generation as long as all its ways lead through global pages, and that of the address
    /// space otherwise; so this may change it.
    pub fn note_way(&mut self, linear: u64) {
        self.ways[usize::from(self.code_base != 0)].add(linear);
        if self.code_base == 0 && !self.has_local_way {
            let entry = &self.code[code_index(linear)];
            if entry.tag != linear & PAGE_MASK | self.generations[SUPERVISOR] {
                self.has_local_way = true;
                self.retag();
            }
        }
    }

    fn retag(&mut self) {
        let user = u64::from(self.code_base != 0);
        let generation = self.code_generation(!self.has_local_way);
        self.fetch_tag = self.ways[user as usize].epoch << 16 | generation << 4 | user << 2 | u64::from(self.code_size);
    }

    /// A generation that no entry has. When they run out, everything is cleared; the caller makes the result the current one.
    fn new_generation(&mut self) -> u64 {
        if self.last_generation == GENERATION_MAX {
            self.data.filled_mut().iter_mut().for_each(DataEntry::forget);
            for entry in self.code.iter_mut() {
                entry.tag = NO_TAG;
            }
            self.data.second.clear();
            self.forget_contexts();
            self.begin_epochs();
            self.local.clear();
            self.generations[SUPERVISOR_TABLES].fill(1);
            self.last_generation = 1;
        }
        self.last_generation += 1;
        self.last_generation
    }

    /// The data table in use.
    pub fn data_table(&self) -> usize {
        self.data.in_use()
    }
}

impl Cpu {
    /// Chooses the look-up tables for the mode; part of [`Cpu::update_mode`].
    pub(crate) fn select_tables(&mut self) {
        let user = self.mode.cpl == 3;
        let alignment = user && self.cr0 & cr0::AM != 0 && self.system_flags & flags::AC != 0;
        // Data breakpoints: DR7 enables one whose type is a write or an access.
        let watched = self.debug[5] & 0xff != 0
            && (0..4).any(|n| self.debug[5] >> (2 * n) & 3 != 0 && self.debug[5] >> (16 + 4 * n) & 3 != 0);
        let table = if alignment || watched || self.debugger.watches() {
            WATCHED
        } else if user {
            USER
        } else if self.cr4 & cr4::SMAP != 0 && self.system_flags & flags::AC == 0 {
            SUPERVISOR
        } else {
            SUPERVISOR_OPEN
        };
        self.tlb.data.select(table);
        self.tlb.generation = self.tlb.generations[table];
        self.tlb.code_base = usize::from(user) * CODE_ENTRIES;
        self.tlb.code_size = self.mode.code as u8;
        self.tlb.retag();
    }
}

#[cfg(test)]
mod tests;
