//! Memory that processes share and that outlives them: a file's.

use std::fs::File;
use std::path::Path;

/// What can lie in shared memory.
///
/// # Safety
///
/// All of it is atomic, and every bit pattern is a value.
pub unsafe trait Shareable {}

/// A value in a file's memory.
pub struct Mapped<T: Shareable> {
    value: *mut T,
}

// SAFETY: everything in it is atomic.
unsafe impl<T: Shareable> Send for Mapped<T> {}
// SAFETY: as above.
unsafe impl<T: Shareable> Sync for Mapped<T> {}

impl<T: Shareable> Mapped<T> {
    /// The value in a file, which is made if it is not there: all zeros.
    pub fn open(path: &Path) -> Self {
        let file = File::options().read(true).write(true).create(true).truncate(false).open(path).unwrap();
        file.set_len(size_of::<T>() as u64).unwrap();
        // SAFETY: a new mapping of a file of that length, which nobody shortens.
        let value = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                size_of::<T>(),
                rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE,
                rustix::mm::MapFlags::SHARED,
                &file,
                0,
            )
        };
        Mapped { value: value.unwrap().cast() }
    }
}

impl<T: Shareable> Drop for Mapped<T> {
    fn drop(&mut self) {
        // SAFETY: mapped in `open`, and nobody has a reference any more.
        let _ = unsafe { rustix::mm::munmap(self.value.cast(), size_of::<T>()) };
    }
}

impl<T: Shareable> std::ops::Deref for Mapped<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: mapped while self lives, page-aligned, and every bit pattern is a value.
        unsafe { &*self.value }
    }
}
