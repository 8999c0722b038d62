//! Guest-physical memory: RAM on a memfd, reached only through checked accesses.
//!
//! One [`GuestMemory`] belongs to one machine and is shared by its vCPU and device threads. The guest writes to the same
//! bytes at the same time, so nothing here hands out a Rust reference into RAM: bytes are copied by single host
//! instructions ([`raw`]) and the copy is what the caller looks at.
//!
//! Invariants:
//! - Every access names a range that lies whole inside one RAM region, or fails with [`MemoryError`].
//! - Whoever changes RAM reports it: [`GuestMemory::write`] and its kin do so themselves; who writes through
//!   [`GuestMemory::host_range`] calls [`GuestMemory::mark_written`] afterwards. Only so do cached guest code
//!   and dirty logs stay true ([`PageNotes`]).
//!
//! Modules: `address` (the address type), `guest_memory` (regions and accesses), `page_notes` (a byte of notes a page:
//! holds code, dirty log), `raw` (accesses of 1 to 8 bytes as one host instruction).

mod address;
mod guest_memory;
mod page_notes;
pub mod raw;

pub use address::{GuestAddress, PAGE_SIZE};
pub use guest_memory::{GuestMemory, HostRange, MemoryError, RamPage};
pub use page_notes::{CodeWatcher, NOTE_CODE, NOTE_LOG, PageNotes};
