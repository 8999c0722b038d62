//! Room on the host's disk: what is left of it for whoever makes more.
//!
//! A full disk gets room again by removing volumes and snapshots and collecting, and those need some themselves: for the catalog's log, and
//! for what is copied out of segments. So everything that lets a store grow [leaves](leave) the last 8 MiB, and waits as if the disk were
//! full; what makes room takes from them.

use std::io;
use std::os::fd::AsFd;

use rustix::fs::fstatvfs;

/// Bytes that are left for who makes room.
pub(crate) const LEFT_LEN: u64 = 8 << 20;

/// Whether somebody makes room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// What grows leaves room for those who make some.
    Grow,
    MakeRoom,
}

/// Fails, as on a full disk, if so many more bytes in this file would be of the room that is left for who makes more.
pub(crate) fn leave(file: impl AsFd, more: u64) -> io::Result<()> {
    match free_bytes(file)? {
        Some(free) if free < LEFT_LEN.saturating_add(more) => Err(io::Error::new(
            io::ErrorKind::StorageFull,
            format!("No space left on device, but {} MiB for what makes room", LEFT_LEN >> 20),
        )),
        _ => Ok(()),
    }
}

/// Bytes that this process may use on a file's disk; none if the disk does not say.
pub(crate) fn free_bytes(file: impl AsFd) -> io::Result<Option<u64>> {
    let facts = fstatvfs(file)?;
    // Disks keep some blocks for root.
    let blocks = if rustix::process::geteuid().is_root() { facts.f_bfree } else { facts.f_bavail };
    Ok((facts.f_blocks > 0).then(|| blocks.saturating_mul(facts.f_frsize)))
}
