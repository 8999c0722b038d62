//! RAM regions on one memfd, and checked accesses to them.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use rustix::fs::{FallocateFlags, MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use zerocopy::{FromBytes, IntoBytes};

use crate::page_notes::{CodeWatcher, PageNotes, granules};
use crate::{GuestAddress, PAGE_SIZE, raw};

/// Why an access to guest memory failed, or why memory could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The range is not (wholly) RAM.
    #[error("guest memory has no RAM at {address} for {len} bytes")]
    NotRam { address: GuestAddress, len: u64 },
    /// The layout of regions makes no sense.
    #[error("a RAM region of {len} bytes at {address} is empty, unaligned or overlaps another")]
    BadRegion { address: GuestAddress, len: u64 },
    /// The host gave no memory.
    #[error("the host could not provide {bytes} bytes of memory for the guest")]
    Host {
        bytes: u64,
        #[source]
        source: rustix::io::Errno,
    },
}

/// Host bytes that back a range of guest RAM.
#[derive(Debug, Clone, Copy)]
pub struct HostRange {
    /// First byte; valid as long as the [`GuestMemory`] lives.
    pub pointer: *mut u8,
    /// Length in bytes.
    pub len: usize,
}

/// One page of RAM as an engine's look-up table wants it.
#[derive(Debug, Clone, Copy)]
pub struct RamPage {
    /// Host address of the page's first byte; valid as long as the [`GuestMemory`] lives.
    pub pointer: *mut u8,
    /// The page's note byte; valid as long as the [`GuestMemory`] lives.
    pub note: *const AtomicU8,
    /// Index for [`PageNotes`].
    pub page_index: usize,
}

struct Region {
    start: u64,
    len: u64,
    host: NonNull<u8>,
    /// Index of the region's first page in the notes.
    first_page: usize,
    /// Offset of the region's first byte in the memfd.
    file_offset: u64,
}

struct Inner {
    file: OwnedFd,
    regions: Vec<Region>,
    notes: PageNotes,
    len: u64,
}

// SAFETY: the mappings are shared memory reached only by `raw` accesses; everything else is atomics.
unsafe impl Send for Inner {}
// SAFETY: as above.
unsafe impl Sync for Inner {}

impl Drop for Inner {
    fn drop(&mut self) {
        for region in &self.regions {
            // SAFETY: mapped by `new` with this length; nobody holds the memory any more.
            let _ = unsafe { munmap(region.host.as_ptr().cast(), region.len as usize) };
        }
    }
}

/// A machine's RAM. Cheap to clone; all clones are the same memory.
#[derive(Clone)]
pub struct GuestMemory {
    inner: Arc<Inner>,
}

impl std::fmt::Debug for GuestMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GuestMemory").field("len", &self.inner.len).finish_non_exhaustive()
    }
}

impl GuestMemory {
    /// Makes zeroed RAM of the given regions: (start, length in bytes), page-aligned, in rising order, not overlapping.
    pub fn new(layout: &[(GuestAddress, u64)]) -> Result<Self, MemoryError> {
        let mut end = 0;
        for &(address, len) in layout {
            let aligned = address.0 % PAGE_SIZE == 0 && len % PAGE_SIZE == 0;
            let next_end = address.checked_add(len);
            match next_end {
                Some(next_end) if aligned && len > 0 && address.0 >= end => end = next_end.0,
                _ => return Err(MemoryError::BadRegion { address, len }),
            }
        }
        let total: u64 = layout.iter().map(|&(_, len)| len).sum();
        let host = |source| MemoryError::Host { bytes: total, source };
        let file = memfd_create("polder-guest-memory", MemfdFlags::CLOEXEC).map_err(host)?;
        ftruncate(&file, total).map_err(host)?;
        let mut inner =
            Inner { file, regions: Vec::new(), notes: PageNotes::new((total / PAGE_SIZE) as usize), len: total };
        let mut file_offset = 0;
        for &(address, len) in layout {
            // SAFETY: a fresh mapping chosen by the kernel.
            let host = unsafe {
                mmap(
                    std::ptr::null_mut(),
                    len as usize,
                    ProtFlags::READ | ProtFlags::WRITE,
                    MapFlags::SHARED | MapFlags::NORESERVE,
                    &inner.file,
                    file_offset,
                )
            }
            .map_err(host)?;
            // SAFETY: the range was just mapped; the advice changes no contents.
            let _ = unsafe { rustix::mm::madvise(host, len as usize, rustix::mm::Advice::LinuxHugepage) };
            inner.regions.push(Region {
                start: address.0,
                len,
                host: NonNull::new(host.cast()).expect("mmap never returns null"),
                first_page: (file_offset / PAGE_SIZE) as usize,
                file_offset,
            });
            file_offset += len;
        }
        Ok(GuestMemory { inner: Arc::new(inner) })
    }

    /// Bytes of RAM.
    pub fn len(&self) -> u64 {
        self.inner.len
    }

    /// Whether there is no RAM at all.
    pub fn is_empty(&self) -> bool {
        self.inner.len == 0
    }

    /// The regions: (start, length in bytes), in rising order.
    pub fn regions(&self) -> impl Iterator<Item = (GuestAddress, u64)> + '_ {
        self.inner.regions.iter().map(|region| (GuestAddress(region.start), region.len))
    }

    /// The memfd behind the RAM and the offset of the region that starts at `start` in it.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.inner.file.as_fd()
    }

    /// The offset in the memfd of a RAM address.
    pub fn file_offset(&self, address: GuestAddress) -> Option<u64> {
        self.region(address.0, 1).map(|region| region.file_offset + (address.0 - region.start))
    }

    #[inline]
    fn region(&self, start: u64, len: u64) -> Option<&Region> {
        self.inner.regions.iter().find(|region| {
            let offset = start.wrapping_sub(region.start);
            offset < region.len && len <= region.len - offset
        })
    }

    fn range(&self, address: GuestAddress, len: u64) -> Result<(&Region, u64), MemoryError> {
        match self.region(address.0, len) {
            Some(region) => Ok((region, address.0 - region.start)),
            None => Err(MemoryError::NotRam { address, len }),
        }
    }

    /// The host bytes behind a range of RAM, for I/O straight to or from guest memory. Never make a reference of them. Who
    /// writes through the range calls [`GuestMemory::mark_written`] when the bytes have changed.
    pub fn host_range(&self, address: GuestAddress, len: u64) -> Result<HostRange, MemoryError> {
        let (region, offset) = self.range(address, len)?;
        // SAFETY: offset + len lies inside the mapping, checked by `range`.
        let pointer = unsafe { region.host.as_ptr().add(offset as usize) };
        Ok(HostRange { pointer, len: len as usize })
    }

    /// The RAM page with this number (guest-physical address / 4096), or `None` where there is no RAM.
    #[inline]
    pub fn page(&self, page_number: u64) -> Option<RamPage> {
        let start = page_number.checked_mul(PAGE_SIZE)?;
        let region = self.region(start, PAGE_SIZE)?;
        let offset = start - region.start;
        let page_index = region.first_page + (offset / PAGE_SIZE) as usize;
        Some(RamPage {
            // SAFETY: the page lies inside the mapping.
            pointer: unsafe { region.host.as_ptr().add(offset as usize) },
            note: std::ptr::from_ref(self.inner.notes.note(page_index)),
            page_index,
        })
    }

    /// The guest-physical address of a byte of RAM in the host.
    pub fn address_of(&self, pointer: *const u8) -> Option<GuestAddress> {
        self.inner.regions.iter().find_map(|region| {
            let offset = (pointer as u64).wrapping_sub(region.host.as_ptr() as u64);
            (offset < region.len).then(|| GuestAddress(region.start + offset))
        })
    }

    /// The notes that writers look at.
    pub fn notes(&self) -> &PageNotes {
        &self.inner.notes
    }

    /// Sets the party that hears of writes to pages with decoded code. Once in a machine's life.
    pub fn set_code_watcher(&self, watcher: Arc<dyn CodeWatcher>) {
        self.inner.notes.set_watcher(watcher);
    }

    /// Copies `target.len()` bytes out of the guest.
    pub fn read(&self, address: GuestAddress, target: &mut [u8]) -> Result<(), MemoryError> {
        let range = self.host_range(address, target.len() as u64)?;
        // SAFETY: the source is mapped RAM of that length; the target is an exclusive slice.
        unsafe { raw::copy(range.pointer, target.as_mut_ptr(), range.len) };
        Ok(())
    }

    /// Copies bytes into the guest.
    pub fn write(&self, address: GuestAddress, source: &[u8]) -> Result<(), MemoryError> {
        let range = self.host_range(address, source.len() as u64)?;
        // SAFETY: the target is mapped RAM of that length.
        unsafe { raw::copy(source.as_ptr(), range.pointer, range.len) };
        self.mark_written(address, source.len() as u64);
        Ok(())
    }

    /// Fills a range with a byte.
    pub fn fill(&self, address: GuestAddress, byte: u8, len: u64) -> Result<(), MemoryError> {
        let range = self.host_range(address, len)?;
        // SAFETY: the target is mapped RAM of that length.
        unsafe { raw::fill(range.pointer, byte, range.len) };
        self.mark_written(address, len);
        Ok(())
    }

    /// Gives the pages of a range back to the host; they read as zeros afterwards. The range is whole pages.
    pub fn punch_hole(&self, address: GuestAddress, len: u64) -> Result<(), MemoryError> {
        let (region, offset) = self.range(address, len)?;
        if !address.0.is_multiple_of(PAGE_SIZE) || !len.is_multiple_of(PAGE_SIZE) {
            return Err(MemoryError::NotRam { address, len });
        }
        if len == 0 {
            return Ok(());
        }
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&self.inner.file, mode, region.file_offset + offset, len)
            .map_err(|source| MemoryError::Host { bytes: len, source })?;
        self.mark_written(address, len);
        Ok(())
    }

    /// Copies a plain structure out of the guest.
    pub fn read_value<T: FromBytes + IntoBytes>(&self, address: GuestAddress) -> Result<T, MemoryError> {
        let mut value = T::new_zeroed();
        self.read(address, value.as_mut_bytes())?;
        Ok(value)
    }

    /// Copies a plain structure into the guest.
    pub fn write_value<T: IntoBytes + zerocopy::Immutable>(
        &self,
        address: GuestAddress,
        value: &T,
    ) -> Result<(), MemoryError> {
        self.write(address, value.as_bytes())
    }

    /// Loads a 16-bit value in one access; later accesses are not moved before it (x86 loads are ordered).
    pub fn load_u16(&self, address: GuestAddress) -> Result<u16, MemoryError> {
        let range = self.host_range(address, 2)?;
        // SAFETY: two mapped bytes.
        Ok(unsafe { raw::load_u16(range.pointer) })
    }

    /// Stores a 16-bit value in one access, after all earlier stores (x86 stores are ordered).
    pub fn store_u16(&self, address: GuestAddress, value: u16) -> Result<(), MemoryError> {
        let range = self.host_range(address, 2)?;
        // SAFETY: two mapped bytes.
        unsafe { raw::store_u16(range.pointer, value) };
        self.mark_written(address, 2);
        Ok(())
    }

    /// Loads a 32-bit value in one access.
    pub fn load_u32(&self, address: GuestAddress) -> Result<u32, MemoryError> {
        let range = self.host_range(address, 4)?;
        // SAFETY: four mapped bytes.
        Ok(unsafe { raw::load_u32(range.pointer) })
    }

    /// Loads a 64-bit value in one access.
    pub fn load_u64(&self, address: GuestAddress) -> Result<u64, MemoryError> {
        let range = self.host_range(address, 8)?;
        // SAFETY: eight mapped bytes.
        Ok(unsafe { raw::load_u64(range.pointer) })
    }

    /// Reports that a range of RAM was written through a host pointer. Ranges outside RAM are ignored.
    pub fn mark_written(&self, address: GuestAddress, len: u64) {
        let Some(region) = self.region(address.0, len) else { return };
        let mut offset = address.0 - region.start;
        let end = offset + len;
        while offset < end {
            let page_index = region.first_page + (offset / PAGE_SIZE) as usize;
            let in_page = offset % PAGE_SIZE;
            let step = (PAGE_SIZE - in_page).min(end - offset);
            if self.inner.notes.note(page_index).load(Ordering::Relaxed) != 0 {
                self.inner.notes.written(page_index, (region.start + offset) / PAGE_SIZE, in_page, step);
            }
            offset += step;
        }
    }

    /// The 64-byte granules, as a bit mask, that a range inside one page touches.
    pub fn granules(offset_in_page: u64, len: u64) -> u64 {
        granules(offset_in_page, len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    fn memory() -> GuestMemory {
        GuestMemory::new(&[(GuestAddress(0), 0x10000), (GuestAddress(0x20000), 0x4000)]).unwrap()
    }

    #[test]
    fn bytes_come_back_as_they_were_written() {
        let memory = memory();
        memory.write(GuestAddress(0xfff0), &[7; 16]).unwrap();
        let mut bytes = [0; 16];
        memory.read(GuestAddress(0xfff0), &mut bytes).unwrap();
        assert_eq!(bytes, [7; 16]);
        memory.store_u16(GuestAddress(0x20001), 0xabcd).unwrap();
        assert_eq!(memory.load_u16(GuestAddress(0x20001)).unwrap(), 0xabcd);
    }

    #[test]
    fn a_hole_gives_pages_back_and_reads_as_zeros() {
        let memory = memory();
        memory.fill(GuestAddress(0x20000), 7, 0x4000).unwrap();
        memory.punch_hole(GuestAddress(0x21000), 0x2000).unwrap();
        // Before anything reads the hole: a read through a mapping gives it pages again.
        let blocks = rustix::fs::fstat(memory.file()).unwrap().st_blocks;
        assert_eq!(blocks * 512, 0x2000);
        let mut bytes = [1; 0x4000];
        memory.read(GuestAddress(0x20000), &mut bytes).unwrap();
        assert!(bytes[0x1000..0x3000].iter().all(|&byte| byte == 0));
        assert!(bytes[..0x1000].iter().chain(&bytes[0x3000..]).all(|&byte| byte == 7));
        assert!(memory.punch_hole(GuestAddress(0x20800), 0x1000).is_err());
        assert!(memory.punch_hole(GuestAddress(0xf000), 0x2000).is_err());
    }

    #[test]
    fn a_range_that_leaves_its_region_is_refused() {
        let memory = memory();
        assert!(memory.write(GuestAddress(0xfff1), &[0; 16]).is_err());
        assert!(memory.read(GuestAddress(0x10000), &mut [0]).is_err());
        assert!(memory.read(GuestAddress(u64::MAX), &mut [0; 2]).is_err());
        assert!(memory.page(0x10).is_none());
        assert!(memory.page(u64::MAX).is_none());
        assert!(memory.page(0x20).is_some());
    }

    #[test]
    fn a_host_byte_of_ram_knows_its_address() {
        let memory = memory();
        let range = memory.host_range(GuestAddress(0x21234), 1).unwrap();
        assert_eq!(memory.address_of(range.pointer), Some(GuestAddress(0x21234)));
        assert_eq!(memory.address_of(std::ptr::null()), None);
    }

    #[test]
    fn overlapping_unaligned_or_empty_regions_are_refused() {
        for layout in [
            &[(GuestAddress(0), 0x2000), (GuestAddress(0x1000), 0x1000)][..],
            &[(GuestAddress(0x10), 0x1000)],
            &[(GuestAddress(0), 0)],
            &[(GuestAddress(u64::MAX - 0xfff), 0x2000)],
        ] {
            assert!(GuestMemory::new(layout).is_err());
        }
    }

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u64, u64)>>);

    impl CodeWatcher for Recorder {
        fn code_written(&self, page_number: u64, granules: u64) {
            self.0.lock().unwrap().push((page_number, granules));
        }
    }

    #[test]
    fn a_write_to_watched_code_is_reported_once_and_only_there() {
        let memory = memory();
        let recorder = Arc::new(Recorder::default());
        memory.set_code_watcher(recorder.clone());
        let page = memory.page(0x21).unwrap();
        assert!(memory.notes().watch_code(page.page_index, 0b10));
        assert!(!memory.notes().watch_code(page.page_index, 0b10));
        memory.write(GuestAddress(0x21000), &[1; 64]).unwrap();
        memory.write(GuestAddress(0x21040), &[1; 8]).unwrap();
        memory.write(GuestAddress(0x21040), &[1; 8]).unwrap();
        assert_eq!(*recorder.0.lock().unwrap(), [(0x21, 0b10)]);
    }

    #[test]
    fn the_dirty_log_names_the_written_pages() {
        let memory = memory();
        memory.notes().start_dirty_log();
        memory.write(GuestAddress(0x2fff), &[1, 2]).unwrap();
        let dirty: Vec<usize> = (0..20).filter(|&page| memory.notes().is_dirty(page)).collect();
        assert_eq!(dirty, [2, 3]);
    }

    #[test]
    fn each_round_of_the_dirty_log_names_the_pages_written_in_it() {
        let memory = memory();
        let notes = memory.notes();
        memory.write(GuestAddress(0), &[1]).unwrap();
        assert!(notes.take_dirty().is_empty(), "no log runs");
        notes.start_dirty_log();
        for _ in 0..3 {
            memory.write(GuestAddress(0x2fff), &[1, 2]).unwrap();
            memory.write(GuestAddress(0x23ff8), &[1]).unwrap();
            assert_eq!(notes.take_dirty(), [2, 3, 19]);
            assert!(!notes.is_dirty(2) && notes.take_dirty().is_empty());
            memory.write(GuestAddress(0x3000), &[1]).unwrap();
            memory.write(GuestAddress(0x3000), &[1]).unwrap();
            assert_eq!(notes.take_dirty(), [3]);
        }
        memory.write(GuestAddress(0), &[1]).unwrap();
        notes.start_dirty_log();
        assert!(notes.take_dirty().is_empty());
    }

    /// Writers and rounds at the same time: who copies the pages that each round names has a copy of the memory in the end.
    #[test]
    fn no_store_is_lost_between_two_rounds_of_the_dirty_log() {
        const WRITERS: u64 = 3;
        let memory = memory();
        memory.notes().start_dirty_log();
        let mut copy = vec![0u8; 0x10000];
        let take = |copy: &mut [u8]| {
            for page in memory.notes().take_dirty() {
                let start = page * PAGE_SIZE as usize;
                memory.read(GuestAddress(start as u64), &mut copy[start..start + PAGE_SIZE as usize]).unwrap();
            }
        };
        std::thread::scope(|scope| {
            let mut writers = Vec::new();
            for writer in 0..WRITERS {
                let memory = memory.clone();
                writers.push(scope.spawn(move || {
                    for value in 1..=500_000u64 {
                        // All write to the same two pages, each to words of its own.
                        let address = GuestAddress((value & 1) * PAGE_SIZE + 64 * writer);
                        memory.write(address, &value.to_le_bytes()).unwrap();
                    }
                }));
            }
            while writers.iter().any(|writer| !writer.is_finished()) {
                take(&mut copy);
            }
        });
        take(&mut copy);
        let mut now = vec![0; copy.len()];
        memory.read(GuestAddress(0), &mut now).unwrap();
        assert!(now == copy);
    }
}
