//! A driver's request, from bytes to a checked operation (5.2.6). Pure: no file is touched here.

use std::fs::File;
use std::sync::Arc;

use polder_store::OpenDisk;
use polder_store::disk::Disk as _;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::{DiskAccess, SECTOR_LEN, SERIAL_LEN};
use crate::virtio::{Buffers, Chain};

/// Sectors that one discard may name: 1 GiB.
pub(super) const DISCARD_SECTORS_MAX: u32 = 1 << 21;
/// Sectors that one write-zeroes may name: 8 MiB, because a host file system may have to write them all.
pub(super) const WRITE_ZEROES_SECTORS_MAX: u32 = 1 << 14;

const TYPE_IN: u32 = 0;
const TYPE_OUT: u32 = 1;
const TYPE_FLUSH: u32 = 4;
const TYPE_GET_ID: u32 = 8;
const TYPE_DISCARD: u32 = 11;
const TYPE_WRITE_ZEROES: u32 = 13;
const HEADER_LEN: u64 = 16;
const FLAG_UNMAP: u32 = 1;

/// What is behind a virtio disk.
pub(super) struct Disk {
    pub medium: Medium,
    pub access: DiskAccess,
    pub serial: [u8; SERIAL_LEN],
}

/// Where the bytes of a disk are.
pub(super) enum Medium {
    /// A file or block device of so many sectors.
    File(File, u64),
    Store(Arc<OpenDisk>),
}

impl Disk {
    /// The size now: a disk of the store can be given another.
    pub fn sectors(&self) -> u64 {
        match &self.medium {
            Medium::File(_, sectors) => *sectors,
            Medium::Store(disk) => disk.capacity_bytes() / SECTOR_LEN,
        }
    }
}

/// A request's outcome as the driver reads it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

/// What the host is to do. Offsets and lengths are in bytes, whole sectors, and inside the disk.
#[derive(Debug)]
pub(super) enum Operation {
    Read { offset: u64, data: Buffers },
    Write { offset: u64, data: Buffers },
    Flush,
    Discard { offset: u64, len: u64 },
    WriteZeroes { offset: u64, len: u64, unmap: bool },
}

/// A request after parsing.
#[derive(Debug)]
pub(super) struct Request {
    pub head: u16,
    /// The one byte that the driver reads the outcome from.
    pub status: Buffers,
    /// Bytes before the status byte that the request writes.
    pub data_len: u32,
    /// What to do, or what to answer at once.
    pub action: Result<Operation, Status>,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Header {
    request_type: u32,
    reserved: u32,
    sector: u64,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Segment {
    sector: u64,
    sectors: u32,
    flags: u32,
}

impl Request {
    /// Parses a chain; `None` if it has no room for even the status, so that nobody could be told.
    pub fn parse(chain: &Chain, disk: &Disk) -> Option<Request> {
        let data_len = chain.writable.len().checked_sub(1)?;
        let status = chain.writable.slice(data_len, 1).ok()?;
        let action = operation(chain, disk, data_len);
        Some(Request { head: chain.head, status, data_len: data_len as u32, action })
    }
}

fn operation(chain: &Chain, disk: &Disk, writable_len: u64) -> Result<Operation, Status> {
    let header: Header = chain.readable.read_value(0).map_err(|_| Status::IoError)?;
    let readable_len = chain.readable.len() - HEADER_LEN;
    let changes = matches!(header.request_type, TYPE_OUT | TYPE_DISCARD | TYPE_WRITE_ZEROES);
    if changes && disk.access == DiskAccess::ReadOnly {
        return Err(Status::IoError);
    }
    match header.request_type {
        TYPE_IN => {
            let offset = extent(disk, header.sector, writable_len)?;
            let data = chain.writable.slice(0, writable_len).map_err(|_| Status::IoError)?;
            Ok(Operation::Read { offset, data })
        }
        TYPE_OUT => {
            let offset = extent(disk, header.sector, readable_len)?;
            let data = chain.readable.slice(HEADER_LEN, readable_len).map_err(|_| Status::IoError)?;
            Ok(Operation::Write { offset, data })
        }
        TYPE_FLUSH => Ok(Operation::Flush),
        TYPE_GET_ID => {
            let len = writable_len.min(SERIAL_LEN as u64) as usize;
            chain.writable.write(0, &disk.serial[..len]).map_err(|_| Status::IoError)?;
            Err(Status::Ok)
        }
        TYPE_DISCARD | TYPE_WRITE_ZEROES => {
            if readable_len != size_of::<Segment>() as u64 {
                return Err(Status::IoError);
            }
            let segment: Segment = chain.readable.read_value(HEADER_LEN).map_err(|_| Status::IoError)?;
            let len = u64::from(segment.sectors) * SECTOR_LEN;
            let discard = header.request_type == TYPE_DISCARD;
            // 5.2.6.2: unknown flags are unsupported; unmap has no meaning for a discard.
            if segment.flags & !FLAG_UNMAP != 0 || discard && segment.flags != 0 {
                return Err(Status::Unsupported);
            }
            if segment.sectors > if discard { DISCARD_SECTORS_MAX } else { WRITE_ZEROES_SECTORS_MAX } {
                return Err(Status::IoError);
            }
            let offset = extent(disk, segment.sector, len)?;
            Ok(if discard {
                Operation::Discard { offset, len }
            } else {
                Operation::WriteZeroes { offset, len, unmap: segment.flags & FLAG_UNMAP != 0 }
            })
        }
        _ => Err(Status::Unsupported),
    }
}

/// The byte offset of `len` bytes from a sector, if they are some whole sectors inside the disk.
fn extent(disk: &Disk, sector: u64, len: u64) -> Result<u64, Status> {
    let sectors = len / SECTOR_LEN;
    let end = sector.checked_add(sectors).ok_or(Status::IoError)?;
    if len == 0 || !len.is_multiple_of(SECTOR_LEN) || end > disk.sectors() {
        return Err(Status::IoError);
    }
    Ok(sector * SECTOR_LEN)
}
