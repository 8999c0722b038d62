//! Room on the host's disk: what is left of it for whoever makes more.
//!
//! A full disk gets room again by removing volumes and snapshots and collecting, and those need some themselves: for the catalog's log, and
//! for what is copied out of segments. So everything that lets a store grow [leaves](leave) the last 8 MiB, and waits as if the disk were
//! full; what makes room takes from them. Other programs do not know of that and can fill the disk to the last block. Therefore 4 MiB are
//! in a file that is cut shorter where nothing else is left: what it gives back is less than what those who let the store grow leave, so
//! it is for who makes room, whoever writes at that moment.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::{FallocateFlags, FlockOperation, fallocate, fstatvfs};

use crate::error::{Result, StoreError};
use crate::store::Store;

/// The file that is cut shorter.
const RESERVE: &str = "reserve";
const RESERVE_LEN: u64 = 4 << 20;
/// By how much at a time.
const RESERVE_STEP: u64 = 512 << 10;
/// Bytes that are left for who makes room.
const LEFT_LEN: u64 = 2 * RESERVE_LEN;
const ROOM_LOCK: &str = "room.lock";
pub(crate) const COLLECT_LOCK: &str = "collect.lock";

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
fn free_bytes(file: impl AsFd) -> io::Result<Option<u64>> {
    let facts = fstatvfs(file)?;
    // Disks keep some blocks for root.
    let blocks = if rustix::process::geteuid().is_root() { facts.f_bfree } else { facts.f_bavail };
    Ok((facts.f_blocks > 0).then(|| blocks.saturating_mul(facts.f_frsize)))
}

/// Does what makes room; on a full disk with the room that was set aside.
pub(super) fn with_reserve<T>(folder: &Path, act: impl Fn() -> Result<T>) -> Result<T> {
    loop {
        match act() {
            Err(error) if error.is_no_space() && !shorten_reserve(folder) => return Err(error),
            Err(error) if error.is_no_space() => {}
            other => return other,
        }
    }
}

fn create(folder: &Path, name: &str) -> io::Result<File> {
    File::options().create(true).truncate(false).write(true).open(folder.join(name))
}

/// Gives back a part of what was set aside; whether there was any.
fn shorten_reserve(folder: &Path) -> bool {
    let Ok(file) = File::options().write(true).open(folder.join(RESERVE)) else { return false };
    match file.metadata() {
        Ok(facts) if facts.len() > 0 => file.set_len(facts.len().saturating_sub(RESERVE_STEP)).is_ok(),
        _ => false,
    }
}

impl Store {
    /// Sets room aside for what makes room on a full disk, if there is any.
    pub(crate) fn make_reserve(&self) {
        let make = || {
            let file = create(&self.folder, RESERVE)?;
            let len = file.metadata()?.len();
            if len < RESERVE_LEN {
                fallocate(&file, FallocateFlags::empty(), len, RESERVE_LEN - len)?;
            }
            io::Result::Ok(())
        };
        if let Err(error) = make() {
            tracing::debug!(%error, "no room can be set aside");
        }
    }

    /// Does what makes room; on a full disk with the room that was set aside.
    pub(crate) fn with_reserve<T>(&self, act: impl Fn() -> Result<T>) -> Result<T> {
        with_reserve(&self.folder, act)
    }

    /// Sees to it that whoever makes room on a full disk has the files that are locked meanwhile.
    pub(super) fn make_locks(&self) {
        for name in [ROOM_LOCK, COLLECT_LOCK] {
            if let Err(error) = create(&self.folder, name) {
                tracing::debug!(name, %error, "a file that is to be locked cannot be made");
            }
        }
    }

    /// As long as this lock is held, those who wait for room go on waiting. None on a disk that has not even room for its file.
    pub(crate) fn make_room(&self) -> Result<Option<File>> {
        match self.lock_file(ROOM_LOCK, FlockOperation::LockExclusive) {
            Err(error) if error.is_no_space() => Ok(None),
            locked => locked.map(Some),
        }
    }

    /// Whether somebody makes room now.
    pub(crate) fn is_room_being_made(&self) -> bool {
        let lock = self.lock_file(ROOM_LOCK, FlockOperation::NonBlockingLockShared);
        matches!(lock, Err(StoreError::File { source, .. }) if source.kind() == io::ErrorKind::WouldBlock)
    }
}
