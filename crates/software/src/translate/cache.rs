//! Memory for translated code: shared memory, mapped twice, never writable and executable at one address.

use std::ffi::c_void;
use std::io;

use rustix::mm::{MapFlags, MprotectFlags, MremapFlags, ProtFlags, mmap_anonymous, mprotect, mremap_fixed, munmap};

/// The host's large pages.
const LARGE_PAGE: usize = 2 << 20;

/// A vCPU's translated code.
#[derive(Debug)]
pub struct CodeCache {
    writable: *mut u8,
    executable: *const u8,
    len: usize,
    used: usize,
    /// Code has been written up to here.
    filled: usize,
    /// The host was asked for large pages up to here.
    asked: usize,
    /// The addresses that both mappings lie in.
    reserved: *mut c_void,
    reserved_len: usize,
}

// SAFETY: the pointers are to mappings of this object's own; writes go through `&mut self` only.
unsafe impl Send for CodeCache {}

impl CodeCache {
    /// Both mappings are of one anonymous object: `perf` looks into its map for such memory only, not for a memfd's.
    pub fn new(len: usize) -> io::Result<Self> {
        // Large pages need addresses that are multiples of their size.
        let apart = len.next_multiple_of(LARGE_PAGE);
        let reserved_len = 2 * apart + LARGE_PAGE;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let reserved = unsafe { mmap_anonymous(std::ptr::null_mut(), reserved_len, ProtFlags::empty(), flags)? };
        let at = reserved.map_addr(|address| address.next_multiple_of(LARGE_PAGE));
        let cache = CodeCache {
            writable: at.cast(),
            executable: at.wrapping_byte_add(apart).cast(),
            len,
            used: 0,
            filled: 0,
            asked: 0,
            reserved,
            reserved_len,
        };
        let rights = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: `len` bytes from both addresses on lie in the reservation, which nobody uses yet. An old length of zero maps shared memory a second time and leaves the
        // first alone (mremap(2)); the second mapping's rights are changed before anybody knows of it.
        unsafe {
            mmap_anonymous(at, len, rights, MapFlags::SHARED | MapFlags::FIXED)?;
            let to = cache.executable.cast_mut().cast();
            mremap_fixed(at, 0, len, MremapFlags::MAYMOVE, to)?;
            mprotect(to, len, MprotectFlags::READ | MprotectFlags::EXEC)?;
        }
        Ok(cache)
    }

    /// Asks the host for large pages up to `end`: python in a guest takes an eighth longer with small ones, and each small one costs two page faults.
    /// The host gives none to shared memory by itself.
    fn ask_for_large_pages(&mut self, end: usize) {
        while self.asked < end && self.asked + LARGE_PAGE <= self.len {
            // SAFETY: the large page lies in the mapping, and no code was written to it yet. The advice changes no contents.
            unsafe {
                let page = self.writable.add(self.asked);
                // One whose memory nobody has touched has nothing that could be made large.
                page.write_volatile(0);
                // Without it everything goes on as well, so an error is no matter.
                let _ = libc::madvise(page.cast(), LARGE_PAGE, libc::MADV_COLLAPSE);
            }
            self.asked += LARGE_PAGE;
        }
    }

    /// Where the next code goes, as a distance from the start.
    pub fn position(&self) -> usize {
        self.used
    }

    /// The cache's size in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    pub fn free(&self) -> usize {
        self.len - self.used
    }

    /// Appends code. The caller has checked that it fits; what does not is left out.
    pub fn add(&mut self, code: &[u8]) {
        if code.len() <= self.free() {
            self.ask_for_large_pages(self.used + code.len());
            // SAFETY: the bytes lie inside the mapping, and no code that runs lies there any more.
            unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), self.writable.add(self.used), code.len()) };
            self.used = (self.used + code.len()).next_multiple_of(16).min(self.len);
            self.filled = self.filled.max(self.used);
        }
    }

    /// Code goes to `position` next, where code may lie that nobody comes to any more.
    pub fn start_over(&mut self, position: usize) {
        self.used = position.min(self.used);
    }

    /// Code that is there.
    pub fn bytes(&self, range: std::ops::Range<usize>) -> &[u8] {
        if range.start > range.end || range.end > self.len {
            return &[];
        }
        // SAFETY: inside the mapping; writes go through `&mut self`.
        unsafe { std::slice::from_raw_parts(self.writable.add(range.start), range.len()) }
    }

    /// Replaces the 32-bit number at `at`.
    pub fn patch(&mut self, at: usize, value: i32) {
        if at + 4 <= self.filled {
            // SAFETY: inside the mapping; only the thread that patches runs this code, and not now.
            unsafe { self.writable.add(at).cast::<i32>().write_unaligned(value) };
        }
    }

    /// Adds to the 64-bit number at `at`.
    pub fn add_to(&mut self, at: usize, value: u64) {
        if at + 8 <= self.filled {
            // SAFETY: as in `patch`.
            unsafe {
                let number = self.writable.add(at).cast::<u64>();
                number.write_unaligned(number.read_unaligned().wrapping_add(value));
            }
        }
    }

    /// Makes the relative jump whose distance is at `at` lead to `target`.
    pub fn aim(&mut self, at: usize, target: usize) {
        self.patch(at, (target as i64 - (at as i64 + 4)) as i32);
    }

    /// Where code is executed.
    pub fn address(&self, position: usize) -> u64 {
        self.executable as u64 + position as u64
    }

    /// The distance from the start of code that is executed at `address`.
    pub fn position_of(&self, address: u64) -> Option<usize> {
        let position = address.wrapping_sub(self.executable as u64) as usize;
        (position < self.len).then_some(position)
    }

    pub fn executable_range(&self) -> std::ops::Range<u64> {
        self.executable as u64..self.executable as u64 + self.len as u64
    }
}

impl Drop for CodeCache {
    fn drop(&mut self) {
        // SAFETY: nothing runs this code or points at it any more: its vCPU goes too. Failing would only leak.
        let _ = unsafe { munmap(self.reserved, self.reserved_len) };
    }
}
