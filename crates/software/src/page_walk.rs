//! From linear to guest-physical addresses: the guest's page tables (SDM vol. 3, chapter 4).
//!
//! All paging modes: none, 32-bit (with PSE), PAE, 4-level and 5-level, with NX, WP, SMEP, SMAP, protection keys and global pages.
//! Accessed and dirty flags are set with a locked compare-and-exchange, as several vCPUs walk the same tables.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use polder_memory::{GuestAddress, PAGE_SIZE};

use crate::cpu::{Cpu, cr0, cr4, efer};
use crate::cpu_model::Feature;
use crate::fault::Fault;
use crate::flags;
use crate::tlb::Scope;

/// Width of guest-physical addresses that every CPU model reports.
pub const PHYSICAL_BITS: u32 = 40;

const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const GLOBAL: u64 = 1 << 8;
const NO_EXECUTE: u64 = 1 << 63;
const ADDRESS: u64 = ((1 << PHYSICAL_BITS) - 1) & !(PAGE_SIZE - 1);
/// Address bits above the physical width: reserved in every entry.
const TOO_HIGH: u64 = (1 << 52) - (1 << PHYSICAL_BITS);

/// Walks of one translation while other processors change the entries; after that many the page counts as not present, which
/// no guest sees that does not rewrite its tables without pause.
const WALKS_MAX: u32 = 1000;

/// Page-fault error code bits.
pub mod error_code {
    pub const PRESENT: u32 = 1 << 0;
    pub const WRITE: u32 = 1 << 1;
    pub const USER: u32 = 1 << 2;
    pub const RESERVED: u32 = 1 << 3;
    pub const FETCH: u32 = 1 << 4;
    pub const PROTECTION_KEY: u32 = 1 << 5;
}

/// What an access wants to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    Read,
    Write,
    Fetch,
}

/// On whose behalf an access is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Privilege {
    /// The running code's own (CPL).
    Current,
    /// The processor's, for descriptor tables and the TSS: supervisor whatever the CPL is (SDM vol. 3, 4.6).
    Implicit,
    /// User, whatever the CPL is.
    User,
}

/// Where a linear address leads, and what else may be done there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Translation {
    pub physical: u64,
    /// Whether a write would pass too, without setting a dirty flag.
    pub writable: bool,
    /// The page has `1 << shift` bytes.
    pub shift: u32,
    pub scope: Scope,
}

/// One level's entry with where it came from.
struct Entry {
    value: u64,
    at: u64,
}

/// Why a walk ended without a translation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stop {
    /// A page fault; the error code without the bits that depend on the access alone.
    Fault(u32),
    /// Another processor changed an entry between its load and the setting of its accessed flag: walk again.
    Changed,
}

impl Cpu {
    /// Width of linear addresses.
    pub fn linear_bits(&self) -> u32 {
        if self.cr4 & cr4::LA57 != 0 && self.mode.long { 57 } else { 48 }
    }

    /// Width of linear addresses that the processor knows, whatever CR4 says: what base addresses are checked against.
    pub fn base_bits(&self) -> u32 {
        if self.model.has(Feature::La57) { 57 } else { 48 }
    }

    /// Translates a linear address for an access, sets accessed and dirty flags, or raises #PF. Canonical form is the caller's concern.
    pub fn translate(&mut self, linear: u64, access: Access, privilege: Privilege) -> Result<Translation, Fault> {
        if self.cr0 & cr0::PG == 0 {
            return Ok(Translation { physical: linear & 0xffff_ffff, writable: true, shift: 12, scope: Scope::Global });
        }
        let user = match privilege {
            Privilege::Current => self.mode.cpl == 3,
            Privilege::Implicit => false,
            Privilege::User => true,
        };
        let mut result = Err(0);
        for _ in 0..WALKS_MAX {
            match self.walk(linear, access, user, privilege) {
                Ok(translation) => result = Ok(translation),
                Err(Stop::Fault(code)) => result = Err(code),
                Err(Stop::Changed) => continue,
            }
            break;
        }
        match result {
            Ok(translation) => {
                if translation.shift > 12 {
                    self.tlb.note_large(linear, translation.shift);
                }
                Ok(translation)
            }
            Err(code) => {
                // A page fault drops the page's entries (SDM vol. 3, 4.10.4.1), so that a handler may change what they came from and return.
                self.tlb.drop_data(linear);
                let write = if access == Access::Write { error_code::WRITE } else { 0 };
                let user = if user { error_code::USER } else { 0 };
                let fetch_reported = self.efer & efer::NXE != 0 && self.is_pae() || self.cr4 & cr4::SMEP != 0;
                let fetch = if access == Access::Fetch && fetch_reported { error_code::FETCH } else { 0 };
                Err(self.raise_page_fault(linear, code | write | user | fetch))
            }
        }
    }

    fn is_pae(&self) -> bool {
        self.cr4 & cr4::PAE != 0
    }

    /// Walks the tables once.
    fn walk(&self, linear: u64, access: Access, user: bool, privilege: Privilege) -> Result<Translation, Stop> {
        if self.is_pae() {
            self.walk_wide(linear, access, user, privilege)
        } else {
            self.walk_32(linear, access, user, privilege)
        }
    }

    /// PAE, 4-level and 5-level paging: entries of 64 bits.
    fn walk_wide(&self, linear: u64, access: Access, user: bool, privilege: Privilege) -> Result<Translation, Stop> {
        let no_execute_enabled = self.efer & efer::NXE != 0;
        let reserved = TOO_HIGH | if no_execute_enabled { 0 } else { NO_EXECUTE };
        // (shift of the level's index, table address, rights so far)
        let (mut shift, mut table, mut rights) = if self.mode.long {
            let top = if self.cr4 & cr4::LA57 != 0 { 48 } else { 39 };
            (top, self.cr3 & ADDRESS, WRITABLE | USER)
        } else {
            let pointer = self.pae_pointers[(linear >> 30 & 3) as usize];
            if pointer & PRESENT == 0 {
                return Err(Stop::Fault(0));
            }
            (21, pointer & ADDRESS, WRITABLE | USER)
        };
        let reserved = if self.mode.long { reserved } else { reserved | 0x7ff0_0000_0000_0000 };
        let mut execute = true;
        loop {
            let at = table + (linear >> shift & 0x1ff) * 8;
            let entry = Entry { value: self.load_entry(at), at };
            if entry.value & PRESENT == 0 {
                return Err(Stop::Fault(0));
            }
            let is_leaf = shift == 12 || entry.value & LARGE != 0 && shift <= 30;
            let mut level_reserved = reserved;
            if shift > 30 {
                level_reserved |= LARGE;
            }
            if is_leaf && shift > 12 {
                // Address bits below the page size; bit 12 is PAT.
                level_reserved |= (1 << shift) - (1 << 13);
            }
            if entry.value & level_reserved != 0 {
                return Err(Stop::Fault(error_code::PRESENT | error_code::RESERVED));
            }
            rights &= entry.value;
            execute &= entry.value & NO_EXECUTE == 0;
            if is_leaf {
                let mask = (1u64 << shift) - 1;
                let physical = entry.value & ADDRESS & !mask | linear & mask;
                let key = (entry.value >> 59 & 15) as u32;
                self.check(access, user, privilege, rights, execute, key)?;
                let writable = self.finish(&entry, access, user, privilege, rights, key, true)?;
                return Ok(Translation { physical, writable, shift, scope: self.scope(entry.value, rights) });
            }
            self.set_bits_64(&entry, ACCESSED)?;
            table = entry.value & ADDRESS;
            shift -= 9;
        }
    }

    /// 32-bit paging: entries of 32 bits, two levels.
    fn walk_32(&self, linear: u64, access: Access, user: bool, privilege: Privilege) -> Result<Translation, Stop> {
        let at = (self.cr3 & 0xffff_f000) + (linear >> 22 & 0x3ff) * 4;
        let directory = Entry { value: self.load_entry_32(at), at };
        if directory.value & PRESENT == 0 {
            return Err(Stop::Fault(0));
        }
        let mut rights = directory.value;
        if directory.value & LARGE != 0 && self.cr4 & cr4::PSE != 0 {
            // PSE-36: bits 13-20 are address bits 32-39, bit 21 is reserved.
            if directory.value & 1 << 21 != 0 {
                return Err(Stop::Fault(error_code::PRESENT | error_code::RESERVED));
            }
            let high = (directory.value >> 13 & 0xff) << 32;
            let physical = directory.value & 0xffc0_0000 | high | linear & 0x3f_ffff;
            self.check(access, user, privilege, rights, true, 0)?;
            let writable = self.finish(&directory, access, user, privilege, rights, 0, false)?;
            let scope = self.scope(directory.value, rights);
            return Ok(Translation { physical: physical & ((1 << PHYSICAL_BITS) - 1), writable, shift: 22, scope });
        }
        let at = (directory.value & 0xffff_f000) + (linear >> 12 & 0x3ff) * 4;
        let page = Entry { value: self.load_entry_32(at), at };
        if page.value & PRESENT == 0 {
            return Err(Stop::Fault(0));
        }
        self.set_bits_32(&directory, ACCESSED)?;
        rights &= page.value;
        self.check(access, user, privilege, rights, true, 0)?;
        let writable = self.finish(&page, access, user, privilege, rights, 0, false)?;
        let scope = self.scope(page.value, rights);
        Ok(Translation { physical: page.value & 0xffff_f000 | linear & 0xfff, writable, shift: 12, scope })
    }

    /// Global pages (SDM vol. 3, 4.10.2.4). `leaf` is the entry that maps the page.
    fn scope(&self, leaf: u64, rights: u64) -> Scope {
        if leaf & GLOBAL != 0 && self.cr4 & cr4::PGE != 0 {
            Scope::Global
        } else if rights & USER != 0 {
            Scope::LocalUser
        } else {
            Scope::LocalSupervisor
        }
    }

    /// The access rights (SDM vol. 3, 4.6).
    fn check(
        &self,
        access: Access,
        user: bool,
        privilege: Privilege,
        rights: u64,
        execute: bool,
        key: u32,
    ) -> Result<(), Stop> {
        let user_page = rights & USER != 0;
        let denied = match access {
            Access::Fetch if user => !user_page || !execute,
            Access::Fetch => !execute || user_page && self.cr4 & cr4::SMEP != 0,
            _ if user => !user_page || access == Access::Write && rights & WRITABLE == 0,
            _ => {
                let smap_denies = user_page
                    && self.cr4 & cr4::SMAP != 0
                    && (privilege == Privilege::Implicit || self.system_flags & flags::AC == 0);
                smap_denies || access == Access::Write && rights & WRITABLE == 0 && self.cr0 & cr0::WP != 0
            }
        };
        // The key is reported whenever it denies, whatever else does (SDM vol. 3, 4.7).
        let key_denied = user_page && access != Access::Fetch && self.key_denies(key, access == Access::Write, user);
        let reported = if key_denied { error_code::PROTECTION_KEY } else { 0 };
        if denied || key_denied {
            return Err(Stop::Fault(error_code::PRESENT | reported));
        }
        Ok(())
    }

    /// Protection keys of user pages (SDM vol. 3, 4.6.2).
    fn key_denies(&self, key: u32, write: bool, user: bool) -> bool {
        if self.cr4 & cr4::PKE == 0 || !self.mode.long {
            return false;
        }
        let access_disabled = self.pkru >> (2 * key) & 1 != 0;
        let write_disabled = self.pkru >> (2 * key + 1) & 1 != 0;
        access_disabled || write && write_disabled && (user || self.cr0 & cr0::WP != 0)
    }

    /// Sets the leaf's accessed and dirty flags; tells whether a write needs no more work.
    #[expect(clippy::too_many_arguments, reason = "one step of the walk, called from its two forms")]
    fn finish(
        &self,
        entry: &Entry,
        access: Access,
        user: bool,
        privilege: Privilege,
        rights: u64,
        key: u32,
        wide: bool,
    ) -> Result<bool, Stop> {
        let bits = if access == Access::Write { ACCESSED | DIRTY } else { ACCESSED };
        if wide {
            self.set_bits_64(entry, bits)?;
        } else {
            self.set_bits_32(entry, bits)?;
        }
        let dirty = access == Access::Write || entry.value & DIRTY != 0;
        Ok(dirty && self.check(Access::Write, user, privilege, rights, true, key).is_ok())
    }

    fn load_entry(&self, at: u64) -> u64 {
        self.services.memory.load_u64(GuestAddress(at)).unwrap_or(u64::MAX)
    }

    fn load_entry_32(&self, at: u64) -> u64 {
        self.services.memory.load_u32(GuestAddress(at)).map_or(0xffff_ffff, u64::from)
    }

    /// Sets flags in an entry. If another processor changed the entry meanwhile, its new value decides: the walk starts again.
    fn set_bits_64(&self, entry: &Entry, bits: u64) -> Result<(), Stop> {
        if entry.value & bits == bits {
            return Ok(());
        }
        let Ok(range) = self.services.memory.host_range(GuestAddress(entry.at), 8) else { return Ok(()) };
        // SAFETY: eight mapped bytes, aligned because tables are and entries are eight bytes; shared with guests as atomics.
        let atomic = unsafe { AtomicU64::from_ptr(range.pointer.cast()) };
        let mut old = entry.value;
        while let Err(now) = atomic.compare_exchange(old, old | bits, Ordering::SeqCst, Ordering::SeqCst) {
            if (now ^ entry.value) & !(ACCESSED | DIRTY) != 0 {
                return Err(Stop::Changed);
            }
            old = now;
        }
        self.services.memory.mark_written(GuestAddress(entry.at), 8);
        Ok(())
    }

    fn set_bits_32(&self, entry: &Entry, bits: u64) -> Result<(), Stop> {
        if entry.value & bits == bits {
            return Ok(());
        }
        let Ok(range) = self.services.memory.host_range(GuestAddress(entry.at), 4) else { return Ok(()) };
        // SAFETY: four mapped bytes, aligned because tables are and entries are four bytes; shared with guests as atomics.
        let atomic = unsafe { AtomicU32::from_ptr(range.pointer.cast()) };
        let mut old = entry.value as u32;
        while let Err(now) = atomic.compare_exchange(old, old | bits as u32, Ordering::SeqCst, Ordering::SeqCst) {
            if u64::from(now ^ entry.value as u32) & !(ACCESSED | DIRTY) != 0 {
                return Err(Stop::Changed);
            }
            old = now;
        }
        self.services.memory.mark_written(GuestAddress(entry.at), 4);
        Ok(())
    }

    /// Loads the four page-directory pointers of PAE paging from CR3; `false` if a present one has reserved bits set.
    pub fn load_pae_pointers(&mut self) -> bool {
        let table = self.cr3 & 0xffff_ffe0;
        let mut pointers = [0; 4];
        for (index, pointer) in (0..).zip(&mut pointers) {
            *pointer = self.load_entry(table + 8 * index);
            if *pointer & PRESENT != 0 && *pointer & (TOO_HIGH | 0xfff0_0000_0000_01e6) != 0 {
                return false;
            }
        }
        self.pae_pointers = pointers;
        true
    }
}
