//! Places the initrd and the command line.

use std::io::Read;

use polder_basics::ByteSize;
use polder_memory::{GuestAddress, GuestMemory, PAGE_SIZE};

use super::BootError;
use crate::layout;

/// Bytes copied at once from the initrd's file into guest memory.
const CHUNK_LEN: usize = 1 << 20;

/// An initrd, read straight into guest memory.
pub struct Initrd<'a> {
    pub len: u64,
    pub reader: &'a mut dyn Read,
}

/// Where an initrd was put; both zero if there is none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct PlacedInitrd {
    pub(super) start: u64,
    pub(super) len: u64,
}

/// Puts the initrd as high in low RAM as the kernel can reach (`last` is the last byte it may occupy), on a page of its own and
/// above `floor`, the end of the kernel.
pub(super) fn place_initrd(
    memory: &GuestMemory,
    initrd: Option<Initrd<'_>>,
    floor: u64,
    last: u64,
) -> Result<PlacedInitrd, BootError> {
    let Some(initrd) = initrd.filter(|initrd| initrd.len > 0) else {
        return Ok(PlacedInitrd::default());
    };
    let no_room = || BootError::NoRoomForInitrd { initrd: ByteSize(initrd.len), ram: ByteSize(memory.len()) };
    let end = memory.len().min(layout::LOW_RAM_END).min(last.saturating_add(1));
    let start = end.checked_sub(initrd.len).ok_or_else(no_room)? / PAGE_SIZE * PAGE_SIZE;
    if start < floor.max(layout::HIGH_MEMORY_START) {
        return Err(no_room());
    }
    let mut chunk = vec![0; CHUNK_LEN];
    let mut done = 0;
    while done < initrd.len {
        let len = (initrd.len - done).min(CHUNK_LEN as u64) as usize;
        let chunk = &mut chunk[..len];
        initrd.reader.read_exact(chunk).map_err(|error| match error.kind() {
            std::io::ErrorKind::UnexpectedEof => BootError::InitrdTruncated,
            _ => BootError::InitrdRead(error),
        })?;
        memory.write(GuestAddress(start + done), chunk)?;
        done += len as u64;
    }
    Ok(PlacedInitrd { start, len: initrd.len })
}

/// Writes the command line with its NUL. `len_max` counts without the NUL.
pub(super) fn place_command_line(
    memory: &GuestMemory,
    address: u64,
    text: &str,
    len_max: usize,
) -> Result<(), BootError> {
    if text.len() > len_max {
        return Err(BootError::CommandLineTooLong { len: text.len(), max: len_max });
    }
    memory.write(GuestAddress(address), text.as_bytes())?;
    memory.write(GuestAddress(address + text.len() as u64), &[0])?;
    Ok(())
}
