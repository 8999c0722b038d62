//! One byte of notes for every page of RAM, asked after each write.
//!
//! Two parties want to know that a page was written: whoever keeps decoded guest code of it, and whoever logs dirty pages. A
//! writer looks at the page's note *after* its store; zero (the usual case) means nobody asks.
//!
//! The order that makes this safe without a lock or a fence in the writer: the party that starts to watch sets the note, then makes
//! every other thread pass a full barrier ([`PageNotes::publish`], `membarrier(2)`), then reads the page. A store that is not yet
//! visible at that moment belongs to a writer that has not looked at the note yet, and so will see it.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering, fence};
use std::sync::{Arc, OnceLock};

/// The page holds bytes that some engine keeps in decoded form.
pub const NOTE_CODE: u8 = 1;
/// The page is clean in the dirty log that is running.
pub const NOTE_LOG: u8 = 2;

/// Told that decoded code went stale. Called on the writer's thread, after the write.
pub trait CodeWatcher: Send + Sync {
    /// `granules` has a bit for each 64-byte granule of page `page_number` that was written and held code.
    fn code_written(&self, page_number: u64, granules: u64);
}

/// The notes of all pages of one machine's RAM, indexed by RAM page index (not by guest page number).
pub struct PageNotes {
    notes: Box<[AtomicU8]>,
    code_granules: Box<[AtomicU64]>,
    dirty: Box<[AtomicU64]>,
    watcher: OnceLock<Arc<dyn CodeWatcher>>,
}

impl std::fmt::Debug for PageNotes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PageNotes").field("pages", &self.notes.len()).finish_non_exhaustive()
    }
}

impl PageNotes {
    pub(crate) fn new(pages: usize) -> Self {
        PageNotes {
            notes: zeroed_notes(pages),
            code_granules: zeroed_words(pages),
            dirty: zeroed_words(pages.div_ceil(64)),
            watcher: OnceLock::new(),
        }
    }

    /// The note byte of a page. Writers test it for zero.
    #[inline(always)]
    pub fn note(&self, page_index: usize) -> &AtomicU8 {
        &self.notes[page_index]
    }

    pub(crate) fn set_watcher(&self, watcher: Arc<dyn CodeWatcher>) {
        // One engine drives a machine; a second watcher is a bug.
        assert!(self.watcher.set(watcher).is_ok(), "a machine has one code watcher");
    }

    /// Notes that decoded code of the granules is about to be kept. Returns whether the page is newly watched, in which case
    /// the caller calls [`PageNotes::publish`] *before* it reads the bytes (only where other threads can write).
    pub fn watch_code(&self, page_index: usize, granules: u64) -> bool {
        self.code_granules[page_index].fetch_or(granules, Ordering::SeqCst);
        self.notes[page_index].fetch_or(NOTE_CODE, Ordering::SeqCst) & NOTE_CODE == 0
    }

    /// Makes every thread of the process pass a full memory barrier.
    pub fn publish() {
        // SAFETY: membarrier takes no pointers.
        let result = unsafe { libc::syscall(libc::SYS_membarrier, libc::MEMBARRIER_CMD_PRIVATE_EXPEDITED, 0, 0) };
        if result != 0 {
            // Not registered yet (the first call of the process): register and try again.
            // SAFETY: as above.
            unsafe {
                libc::syscall(libc::SYS_membarrier, libc::MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED, 0, 0);
                libc::syscall(libc::SYS_membarrier, libc::MEMBARRIER_CMD_PRIVATE_EXPEDITED, 0, 0);
            }
        }
    }

    /// The slow half of a write: bytes `offset..offset + len` of the page were written and its note was not zero.
    #[cold]
    pub fn written(&self, page_index: usize, page_number: u64, offset: u64, len: u64) {
        // The store must be visible before the granules are read, or code decoded meanwhile from the old bytes would stay.
        fence(Ordering::SeqCst);
        let note = self.notes[page_index].load(Ordering::SeqCst);
        if note & NOTE_LOG != 0 {
            // In this order: the other way round a round that begins between the two would leave the page neither clean nor dirty.
            self.notes[page_index].fetch_and(!NOTE_LOG, Ordering::SeqCst);
            self.dirty[page_index / 64].fetch_or(1 << (page_index % 64), Ordering::SeqCst);
        }
        if note & NOTE_CODE != 0 {
            let hit = granules(offset, len) & self.code_granules[page_index].load(Ordering::SeqCst);
            if hit != 0 {
                // Cleared before the watcher drops its code: who decodes anew from here on watches anew.
                let left = self.code_granules[page_index].fetch_and(!hit, Ordering::SeqCst) & !hit;
                if left == 0 {
                    self.notes[page_index].fetch_and(!NOTE_CODE, Ordering::SeqCst);
                    // A granule watched between the two steps above must not lose its note.
                    if self.code_granules[page_index].load(Ordering::SeqCst) != 0 {
                        self.notes[page_index].fetch_or(NOTE_CODE, Ordering::SeqCst);
                    }
                }
                if let Some(watcher) = self.watcher.get() {
                    watcher.code_written(page_number, hit);
                }
            }
        }
    }

    /// Starts a dirty log: all pages are clean from here on. Touches the notes of all RAM.
    pub fn start_dirty_log(&self) {
        for word in &self.dirty {
            word.store(0, Ordering::SeqCst);
        }
        for note in &self.notes {
            note.fetch_or(NOTE_LOG, Ordering::SeqCst);
        }
        Self::publish();
    }

    /// Ends a round of the dirty log and begins the next: gives the pages that were written since it began, by their indices in rising order, and they are clean
    /// from here on. A store that a page read after this does not show makes the page dirty in the next round. One thread at a time starts the log and takes from it.
    ///
    /// The cost is that of the pages that were written, and a look at a bit of each other one.
    pub fn take_dirty(&self) -> Vec<usize> {
        let mut taken = Vec::new();
        for (word_index, word) in self.dirty.iter().enumerate() {
            if word.load(Ordering::SeqCst) == 0 {
                continue;
            }
            let mut bits = word.swap(0, Ordering::SeqCst);
            while bits != 0 {
                let page_index = word_index * 64 + bits.trailing_zeros() as usize;
                bits &= bits - 1;
                // A page that is not dirty has its note already, or a writer that has just cleared it is about to make the page dirty.
                self.notes[page_index].fetch_or(NOTE_LOG, Ordering::SeqCst);
                taken.push(page_index);
            }
        }
        Self::publish();
        taken
    }

    /// Whether the page was written since the log's round began.
    pub fn is_dirty(&self, page_index: usize) -> bool {
        self.dirty[page_index / 64].load(Ordering::SeqCst) & (1 << (page_index % 64)) != 0
    }
}

/// The bit mask of the 64-byte granules that `len` bytes from `offset` in a page touch. The range lies inside the page.
pub(crate) fn granules(offset: u64, len: u64) -> u64 {
    if len == 0 {
        return 0;
    }
    let first = offset / 64;
    let last = (offset + len - 1).min(4095) / 64;
    (u64::MAX >> (63 - last)) & (u64::MAX << first)
}

fn zeroed_notes(len: usize) -> Box<[AtomicU8]> {
    // A zeroed vector comes from fresh pages, so notes of untouched RAM cost no memory.
    let bytes = vec![0u8; len].into_boxed_slice();
    // SAFETY: AtomicU8 has the size, alignment and bit validity of u8.
    unsafe { Box::from_raw(Box::into_raw(bytes) as *mut [AtomicU8]) }
}

fn zeroed_words(len: usize) -> Box<[AtomicU64]> {
    let words = vec![0u64; len].into_boxed_slice();
    // SAFETY: AtomicU64 has the size, alignment and bit validity of u64 on x86-64.
    unsafe { Box::from_raw(Box::into_raw(words) as *mut [AtomicU64]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn granules_cover_exactly_the_touched_lines() {
        assert_eq!(granules(0, 1), 1);
        assert_eq!(granules(63, 2), 0b11);
        assert_eq!(granules(4095, 1), 1 << 63);
        assert_eq!(granules(0, 4096), u64::MAX);
        assert_eq!(granules(128, 0), 0);
    }
}
