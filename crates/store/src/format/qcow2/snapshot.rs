//! Snapshots inside an image.

use super::super::error::{FormatError, printable};
use super::super::{RawSource, Source, VIRTUAL_LEN_MAX};
use super::header::Header;
use super::{be16, be32, be64};

/// Bytes of the snapshot table that are read, at most.
pub const SNAPSHOT_TABLE_LEN_MAX: u64 = 16 << 20;
/// Snapshots that an image may have, as in QEMU.
const SNAPSHOTS_MAX: u32 = 65536;
/// Bytes of an entry before its variable part.
const FIXED_LEN: usize = 40;
/// Bytes of extra data that an entry may have, as in QEMU.
const EXTRA_LEN_MAX: usize = 1024;

/// A snapshot inside an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// The number that QEMU gave it.
    pub id: String,
    /// The name that its maker gave it, made printable.
    pub name: String,
    /// When it was made: seconds since 1970.
    pub time_s: u32,
    /// Bytes of the virtual disk then.
    pub virtual_len: u64,
    /// Bytes of machine state that lie beside the disk; polder does not read them.
    pub machine_state_len: u64,
    pub(super) l1_offset: u64,
    pub(super) l1_entries: u32,
}

/// Reads the table; also gives its length in the file.
pub(super) fn read_all(file: &RawSource, header: &Header) -> Result<(Vec<Snapshot>, u64), FormatError> {
    let name = file.name();
    let count = header.snapshot_count;
    if count == 0 {
        return Ok((Vec::new(), 0));
    }
    if count > SNAPSHOTS_MAX {
        let what = "the number of snapshots";
        let (value, limit) = (u64::from(count), u64::from(SNAPSHOTS_MAX));
        return Err(FormatError::TooLarge { file: name.to_owned(), what, value, limit });
    }
    let start = header.snapshots_offset;
    if start == 0 || !start.is_multiple_of(header.cluster_len()) || start >= file.len() {
        let problem = format!("it is said to lie at {start:#x}, and the file has {:#x} bytes", file.len());
        return Err(FormatError::malformed(name, "snapshot table", problem));
    }
    let mut table = vec![0; (file.len() - start).min(SNAPSHOT_TABLE_LEN_MAX) as usize];
    file.read_at(start, &mut table)?;
    let mut snapshots = Vec::new();
    let mut at = 0;
    for index in 0..count {
        let place = || format!("snapshot table, entry {index}");
        let cut_off = || {
            FormatError::malformed(name, place(), format!("the file or the table of {} bytes ends in it", table.len()))
        };
        let entry = table.get(at..at + FIXED_LEN).ok_or_else(cut_off)?;
        let (id_len, name_len) = (usize::from(be16(entry, 12)), usize::from(be16(entry, 14)));
        let extra_len = be32(entry, 36) as usize;
        if extra_len > EXTRA_LEN_MAX {
            let problem = format!("it has {extra_len} bytes of extra data; at most {EXTRA_LEN_MAX} are read");
            return Err(FormatError::malformed(name, place(), problem));
        }
        let (id_at, end) = (FIXED_LEN + extra_len, FIXED_LEN + extra_len + id_len + name_len);
        let whole = table.get(at..at + end).ok_or_else(cut_off)?;
        let extra = &whole[FIXED_LEN..id_at];
        let virtual_len = if extra.len() >= 16 { be64(extra, 8) } else { header.virtual_len };
        if virtual_len > VIRTUAL_LEN_MAX {
            let what = "the size of a snapshot's disk in bytes";
            return Err(FormatError::TooLarge {
                file: name.to_owned(),
                what,
                value: virtual_len,
                limit: VIRTUAL_LEN_MAX,
            });
        }
        snapshots.push(Snapshot {
            id: printable(&whole[id_at..id_at + id_len]),
            name: printable(&whole[id_at + id_len..]),
            time_s: be32(whole, 16),
            virtual_len,
            machine_state_len: if extra.len() >= 8 { be64(extra, 0) } else { u64::from(be32(whole, 32)) },
            l1_offset: be64(whole, 0),
            l1_entries: be32(whole, 8),
        });
        at += end.next_multiple_of(8);
    }
    Ok((snapshots, at as u64))
}
