//! Guest memory at linear addresses.
//!
//! A hit in the look-up table is one compare and one host instruction. Everything else takes the slow way: a walk, memory-mapped
//! registers, accesses over two pages, alignment checks, data breakpoints. An access over two pages is checked on both before
//! either is touched.

use std::sync::atomic::{AtomicU8, Ordering};

use polder_machine::AccessSize;
use polder_memory::{GuestAddress, PAGE_SIZE, raw};

use crate::cpu::{Cpu, is_canonical};
use crate::fault::{Exception, Fault, vector};
use crate::page_walk::{Access, Privilege, Translation};
use crate::stopwatch::Activity;
use crate::tlb::WATCHED;

/// An integer as wide as a guest access: `u8`, `u16`, `u32` or `u64`.
pub trait GuestInt: Copy + Send + 'static {
    const BYTES: u64;
    /// # Safety
    /// The bytes must be mapped and readable.
    unsafe fn load(pointer: *const u8) -> Self;
    /// # Safety
    /// The bytes must be mapped and writable.
    unsafe fn store(pointer: *mut u8, value: Self);
    fn to_u64(self) -> u64;
    /// Keeps the low bytes.
    fn from_u64(value: u64) -> Self;
}

macro_rules! guest_int {
    ($type:ty, $load:ident, $store:ident) => {
        impl GuestInt for $type {
            const BYTES: u64 = size_of::<$type>() as u64;

            #[inline(always)]
            unsafe fn load(pointer: *const u8) -> Self {
                // SAFETY: passed on from the caller.
                unsafe { raw::$load(pointer) }
            }

            #[inline(always)]
            unsafe fn store(pointer: *mut u8, value: Self) {
                // SAFETY: passed on from the caller.
                unsafe { raw::$store(pointer, value) }
            }

            #[inline(always)]
            fn to_u64(self) -> u64 {
                self as u64
            }

            #[inline(always)]
            fn from_u64(value: u64) -> Self {
                value as $type
            }
        }
    };
}

guest_int!(u8, load_u8, store_u8);
guest_int!(u16, load_u16, store_u16);
guest_int!(u32, load_u32, store_u32);
guest_int!(u64, load_u64, store_u64);

/// A page of a slow access: RAM in the host, or registers.
#[derive(Debug, Clone, Copy)]
pub enum Target {
    Ram { pointer: *mut u8, physical: u64 },
    Registers { physical: u64 },
}

/// A slow access, checked and ready: the whole of it, or its two halves.
#[derive(Debug, Clone, Copy)]
pub struct Checked {
    first: Target,
    /// Bytes in the first page.
    first_len: u64,
    /// The rest in the next page.
    second: Option<Target>,
}

impl Cpu {
    /// Loads from memory with the running code's privilege. `segment` decides between #GP and #SS for non-canonical addresses.
    #[inline(always)]
    pub fn load<T: GuestInt>(&mut self, linear: u64, segment: u8) -> Result<T, Fault> {
        let entry = self.tlb.data_entry(linear);
        if entry.read_tag == self.tlb.tag(linear, T::BYTES) {
            // SAFETY: a matching tag means that the whole access lies in a mapped page of RAM.
            return Ok(unsafe { T::load(entry.addend.wrapping_add(linear) as *const u8) });
        }
        self.load_slow(linear, T::BYTES, segment).map(T::from_u64)
    }

    /// Stores to memory with the running code's privilege.
    #[inline(always)]
    pub fn store<T: GuestInt>(&mut self, linear: u64, value: T, segment: u8) -> Result<(), Fault> {
        let entry = *self.tlb.data_entry(linear);
        if entry.write_tag == self.tlb.tag(linear, T::BYTES) {
            // SAFETY: as in `load`; the note is a byte of the machine's notes.
            unsafe {
                T::store(entry.addend.wrapping_add(linear) as *mut u8, value);
                if (*entry.note.cast::<AtomicU8>()).load(Ordering::Relaxed) != 0 {
                    self.stored_to_noted(entry.addend.wrapping_add(linear) as *mut u8, T::BYTES);
                }
            }
            return Ok(());
        }
        self.store_slow(linear, value.to_u64(), T::BYTES, segment)
    }

    /// Loads a value that the same instruction will store back: faults as a write does.
    #[inline(always)]
    pub fn load_for_update<T: GuestInt>(&mut self, linear: u64, segment: u8) -> Result<T, Fault> {
        let entry = self.tlb.data_entry(linear);
        if entry.write_tag == self.tlb.tag(linear, T::BYTES) {
            // SAFETY: as in `load`.
            return Ok(unsafe { T::load(entry.addend.wrapping_add(linear) as *const u8) });
        }
        let checked = self.check_access(linear, T::BYTES, Access::Write, segment, Privilege::Current)?;
        Ok(T::from_u64(self.perform_load(checked, T::BYTES)))
    }

    /// The host address of `bytes` bytes (at most a page) for reading, if they lie in one page of RAM; fills the look-up table.
    /// `None` means that the caller goes by way of a copy ([`Cpu::load_bytes`]).
    #[inline(always)]
    pub fn read_pointer(&mut self, linear: u64, bytes: u64, segment: u8) -> Result<Option<*const u8>, Fault> {
        let entry = self.tlb.data_entry(linear);
        if entry.read_tag == self.tlb.tag(linear, bytes) {
            return Ok(Some(entry.addend.wrapping_add(linear) as *const u8));
        }
        let checked = self.check_access(linear, bytes, Access::Read, segment, Privilege::Current)?;
        Ok(checked.pointer().map(<*mut u8>::cast_const))
    }

    /// The host address of `bytes` bytes (at most a page) for writing, if they lie in one page of RAM. Whoever writes there calls
    /// [`Cpu::written`] afterwards. `None` means that the caller goes by way of a copy ([`Cpu::store_bytes`]).
    #[inline(always)]
    pub fn write_pointer(&mut self, linear: u64, bytes: u64, segment: u8) -> Result<Option<*mut u8>, Fault> {
        let entry = self.tlb.data_entry(linear);
        if entry.write_tag == self.tlb.tag(linear, bytes) {
            return Ok(Some(entry.addend.wrapping_add(linear) as *mut u8));
        }
        let checked = self.check_access(linear, bytes, Access::Write, segment, Privilege::Current)?;
        Ok(checked.pointer())
    }

    /// Reports that `bytes` bytes at `pointer` were written, which [`Cpu::write_pointer`] gave for `linear`.
    #[inline(always)]
    pub fn written(&mut self, linear: u64, pointer: *mut u8, bytes: u64) {
        let entry = *self.tlb.data_entry(linear);
        let is_quiet = entry.write_tag == self.tlb.tag(linear, bytes)
            && entry.addend.wrapping_add(linear) == pointer as u64
            // SAFETY: the note is a byte of the machine's notes.
            && unsafe { (*entry.note.cast::<AtomicU8>()).load(Ordering::Relaxed) } == 0;
        if !is_quiet {
            self.stored_to_noted(pointer, bytes);
        }
    }

    /// Checks that an access of `bytes` bytes would pass, without making it.
    pub fn probe(&mut self, linear: u64, bytes: u64, access: Access, segment: u8) -> Result<(), Fault> {
        self.check_access(linear, bytes, access, segment, Privilege::Current).map(|_| ())
    }

    /// Copies up to a page out of the guest with the running code's privilege.
    pub fn load_bytes(&mut self, linear: u64, target: &mut [u8], segment: u8) -> Result<(), Fault> {
        let checked = self.check_access(linear, target.len() as u64, Access::Read, segment, Privilege::Current)?;
        for (index, byte) in (0..).zip(target) {
            *byte = self.perform_load(checked.byte(index), 1) as u8;
        }
        Ok(())
    }

    /// Copies up to a page into the guest with the running code's privilege; checks all of it first.
    pub fn store_bytes(&mut self, linear: u64, source: &[u8], segment: u8) -> Result<(), Fault> {
        let checked = self.check_access(linear, source.len() as u64, Access::Write, segment, Privilege::Current)?;
        for (index, &byte) in (0..).zip(source) {
            self.perform_store(checked.byte(index), u64::from(byte), 1);
        }
        Ok(())
    }

    /// Loads on the processor's own behalf (descriptor tables, TSS).
    pub fn load_implicit<T: GuestInt>(&mut self, linear: u64) -> Result<T, Fault> {
        let checked = self.check_access(linear, T::BYTES, Access::Read, crate::cpu::DS, Privilege::Implicit)?;
        Ok(T::from_u64(self.perform_load(checked, T::BYTES)))
    }

    /// Stores on the processor's own behalf.
    pub fn store_implicit<T: GuestInt>(&mut self, linear: u64, value: T) -> Result<(), Fault> {
        let checked = self.check_access(linear, T::BYTES, Access::Write, crate::cpu::DS, Privilege::Implicit)?;
        self.perform_store(checked, value.to_u64(), T::BYTES);
        Ok(())
    }

    /// Checks an access of up to a page with an explicit privilege; [`Cpu::perform_load`] and [`Cpu::perform_store`] then make it.
    #[cold]
    pub fn check_access(
        &mut self,
        linear: u64,
        bytes: u64,
        access: Access,
        segment: u8,
        privilege: Privilege,
    ) -> Result<Checked, Fault> {
        let wraps_at_4g = self.mode.code != crate::cpu::CodeSize::Bits64 && !self.mode.long;
        let cut = |address: u64| if wraps_at_4g { address & 0xffff_ffff } else { address };
        let linear = cut(linear);
        let last = cut(linear.wrapping_add(bytes - 1));
        if privilege == Privilege::Current
            && access != Access::Fetch
            && linear / PAGE_SIZE == last / PAGE_SIZE
            && let Some(pointer) = self.tlb.refill(linear, access == Access::Write)
            && let Some(physical) = self.services.memory.address_of(pointer)
        {
            let first = Target::Ram { pointer, physical: physical.0 };
            return Ok(Checked { first, first_len: bytes, second: None });
        }
        if self.mode.long {
            let bits = self.linear_bits();
            if !is_canonical(linear, bits) || !is_canonical(last, bits) {
                return Err(self.raise_segment_fault(segment));
            }
        }
        self.check_alignment(linear, bytes, privilege)?;
        let first = self.translate_and_fill(linear, access, privilege)?;
        let first_target = self.target(first);
        let checked = if linear / PAGE_SIZE == last / PAGE_SIZE {
            Checked { first: first_target, first_len: bytes, second: None }
        } else {
            let second_start = last & !(PAGE_SIZE - 1);
            let second = self.translate_and_fill(second_start, access, privilege)?;
            let second_target = self.target(second);
            Checked { first: first_target, first_len: PAGE_SIZE - linear % PAGE_SIZE, second: Some(second_target) }
        };
        if self.tlb.data_table() == WATCHED {
            self.note_data_breakpoint(linear, bytes, access);
        }
        Ok(checked)
    }

    /// #AC for misaligned user accesses while CR0.AM and RFLAGS.AC are set.
    fn check_alignment(&mut self, linear: u64, bytes: u64, privilege: Privilege) -> Result<(), Fault> {
        let enabled = self.mode.cpl == 3
            && privilege == Privilege::Current
            && self.cr0 & crate::cpu::cr0::AM != 0
            && self.system_flags & crate::flags::AC != 0;
        if enabled && bytes.is_power_of_two() && bytes <= 8 && !linear.is_multiple_of(bytes) {
            return Err(self.raise(Exception { vector: vector::ALIGNMENT_CHECK, error_code: Some(0), detail: 0 }));
        }
        Ok(())
    }

    fn translate_and_fill(&mut self, linear: u64, access: Access, privilege: Privilege) -> Result<Translation, Fault> {
        let translation = self.translate(linear, access, privilege)?;
        let table = self.tlb.data_table();
        if privilege == Privilege::Current && access != Access::Fetch && table != WATCHED {
            let page_number = translation.physical / PAGE_SIZE;
            if page_number != self.apic_page
                && let Some(page) = self.services.memory.page(page_number)
            {
                let note = page.note.cast();
                self.tlb.fill_data(table, linear, page.pointer, note, translation.writable, translation.scope);
            }
        }
        Ok(translation)
    }

    fn target(&self, translation: Translation) -> Target {
        let physical = translation.physical;
        let page_number = physical / PAGE_SIZE;
        match self.services.memory.page(page_number) {
            Some(page) if page_number != self.apic_page => {
                // SAFETY: the offset lies inside the page.
                let pointer = unsafe { page.pointer.add((physical % PAGE_SIZE) as usize) };
                Target::Ram { pointer, physical }
            }
            _ => Target::Registers { physical },
        }
    }

    #[cold]
    fn load_slow(&mut self, linear: u64, bytes: u64, segment: u8) -> Result<u64, Fault> {
        let checked = self.check_access(linear, bytes, Access::Read, segment, Privilege::Current)?;
        Ok(self.perform_load(checked, bytes))
    }

    #[cold]
    fn store_slow(&mut self, linear: u64, value: u64, bytes: u64, segment: u8) -> Result<(), Fault> {
        let checked = self.check_access(linear, bytes, Access::Write, segment, Privilege::Current)?;
        self.perform_store(checked, value, bytes);
        Ok(())
    }

    /// Makes a checked load of 1, 2, 4 or 8 bytes.
    pub fn perform_load(&mut self, checked: Checked, bytes: u64) -> u64 {
        if checked.second.is_some() {
            return (0..bytes).fold(0, |value, index| value | self.perform_load(checked.byte(index), 1) << (8 * index));
        }
        match checked.first {
            // SAFETY: a checked target is mapped RAM for its length.
            Target::Ram { pointer, .. } => unsafe {
                match bytes {
                    1 => u64::from(raw::load_u8(pointer)),
                    2 => u64::from(raw::load_u16(pointer)),
                    4 => u64::from(raw::load_u32(pointer)),
                    _ => raw::load_u64(pointer),
                }
            },
            Target::Registers { physical } => self.load_registers(physical, bytes),
        }
    }

    /// Makes a checked store of 1, 2, 4 or 8 bytes.
    pub fn perform_store(&mut self, checked: Checked, value: u64, bytes: u64) {
        if checked.second.is_some() {
            for index in 0..bytes {
                self.perform_store(checked.byte(index), value >> (8 * index) & 0xff, 1);
            }
            return;
        }
        match checked.first {
            Target::Ram { pointer, physical } => {
                // SAFETY: a checked target is mapped RAM for its length.
                unsafe {
                    match bytes {
                        1 => raw::store_u8(pointer, value as u8),
                        2 => raw::store_u16(pointer, value as u16),
                        4 => raw::store_u32(pointer, value as u32),
                        _ => raw::store_u64(pointer, value),
                    }
                }
                self.stored_to_physical(physical, bytes);
            }
            Target::Registers { physical } => self.store_registers(physical, value, bytes),
        }
    }

    /// Memory-mapped registers: the local APIC's own page, or the machine's.
    fn load_registers(&mut self, physical: u64, bytes: u64) -> u64 {
        if physical / PAGE_SIZE == self.apic_page {
            self.counters.apic += 1;
            return self.load_local_apic(physical % PAGE_SIZE, bytes);
        }
        self.counters.mmio += 1;
        self.vector.pause_floats();
        let before = self.stopwatch.turn_to(Activity::Devices);
        let value = match AccessSize::from_bytes(bytes as usize) {
            Some(size) => self.services.mmio.read(physical, size),
            None => u64::MAX,
        };
        self.stopwatch.turn_to(before);
        self.vector.resume_floats();
        value
    }

    fn store_registers(&mut self, physical: u64, value: u64, bytes: u64) {
        if physical / PAGE_SIZE == self.apic_page {
            self.counters.apic += 1;
            self.store_local_apic(physical % PAGE_SIZE, value, bytes);
        } else if let Some(size) = AccessSize::from_bytes(bytes as usize) {
            self.counters.mmio += 1;
            self.vector.pause_floats();
            let before = self.stopwatch.turn_to(Activity::Devices);
            self.services.mmio.write(physical, size, value);
            self.stopwatch.turn_to(before);
            self.vector.resume_floats();
        }
    }

    /// The slow half of a store through the look-up table: somebody wants to hear of it.
    #[cold]
    pub(crate) fn stored_to_noted(&mut self, pointer: *mut u8, bytes: u64) {
        // Not by another walk: the guest's tables may say something else by now, the bytes are where they are.
        if let Some(address) = self.services.memory.address_of(pointer) {
            self.stored_to_physical(address.0, bytes);
        }
    }

    /// Tells whoever watches the page that `bytes` bytes at `physical` (inside one page) were written.
    pub(crate) fn stored_to_physical(&mut self, physical: u64, bytes: u64) {
        if let Some(page) = self.services.memory.page(physical / PAGE_SIZE) {
            // SAFETY: the note lives as long as the memory.
            let note = unsafe { (*page.note).load(Ordering::Relaxed) };
            if note != 0 {
                self.services.memory.mark_written(GuestAddress(physical), bytes);
                if note & polder_memory::NOTE_CODE != 0 {
                    self.abandon_block(physical, bytes);
                }
            }
        }
    }
}

impl Checked {
    fn byte(self, index: u64) -> Checked {
        let at = |target: Target, offset: u64| match target {
            Target::Ram { pointer, physical } => {
                // SAFETY: the offset lies inside the checked access.
                Target::Ram { pointer: unsafe { pointer.add(offset as usize) }, physical: physical + offset }
            }
            Target::Registers { physical } => Target::Registers { physical: physical + offset },
        };
        let first = match self.second {
            Some(second) if index >= self.first_len => at(second, index - self.first_len),
            _ => at(self.first, index),
        };
        Checked { first, first_len: 1, second: None }
    }

    /// The guest-physical addresses of the two halves, if the access lies in two pages of RAM.
    pub fn two_pages_of_ram(self) -> Option<(u64, u64)> {
        match (self.first, self.second) {
            (Target::Ram { physical: first, .. }, Some(Target::Ram { physical: second, .. })) => Some((first, second)),
            _ => None,
        }
    }

    /// The host address, if the access lies in one page of RAM.
    pub fn pointer(self) -> Option<*mut u8> {
        match (self.first, self.second) {
            (Target::Ram { pointer, .. }, None) => Some(pointer),
            _ => None,
        }
    }
}
