//! Room that is set aside on the host's disk, for whoever makes more.
//!
//! What lets a store grow [leaves](crate::room) the last 8 MiB of the disk, but other programs do not know of that and can fill it to the
//! last block. Therefore 4 MiB are in a file that is cut shorter where nothing else is left: what it gives back is less than what those who
//! let the store grow leave, so it is for who makes room, whoever writes at that moment.

use std::fs::File;
use std::io;
use std::path::Path;

use rustix::fs::{FallocateFlags, FlockOperation, fallocate};

use crate::error::{Result, StoreError};
use crate::room::LEFT_LEN;
use crate::store::Store;

/// The file that is cut shorter.
const RESERVE: &str = "reserve";
const RESERVE_LEN: u64 = LEFT_LEN / 2;
/// By how much at a time.
const RESERVE_STEP: u64 = 512 << 10;
/// What copies leave of it for the catalog: without that nothing comes of them.
const RESERVE_FOR_CATALOG: u64 = 1 << 20;
const ROOM_LOCK: &str = "room.lock";
pub(crate) const COLLECT_LOCK: &str = "collect.lock";

/// Does what makes room; on a full disk with the room that was set aside.
pub(super) fn with_reserve<T>(folder: &Path, act: impl Fn() -> Result<T>) -> Result<T> {
    loop {
        match act() {
            Err(error) if error.is_no_space() && !shorten_reserve(folder, RESERVE_STEP, 0) => return Err(error),
            Err(error) if error.is_no_space() => {}
            other => return other,
        }
    }
}

fn create(folder: &Path, name: &str) -> io::Result<File> {
    File::options().create(true).truncate(false).write(true).open(folder.join(name))
}

/// Gives back so much of what was set aside, and leaves so much; whether there was more than that.
fn shorten_reserve(folder: &Path, by: u64, left: u64) -> bool {
    let Ok(file) = File::options().write(true).open(folder.join(RESERVE)) else { return false };
    match file.metadata() {
        Ok(facts) if facts.len() > left => file.set_len(facts.len().saturating_sub(by).max(left)).is_ok(),
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

    /// Gives back what can be spared of what was set aside, for copies that make more room; whether there was any.
    pub(crate) fn spare_reserve_for_copies(&self) -> bool {
        shorten_reserve(&self.folder, u64::MAX, RESERVE_FOR_CATALOG)
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
