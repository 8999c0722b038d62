//! Multiboot 1 (Multiboot Specification 0.6.96): small test kernels in ELF or flat files, such as kvm-unit-tests'.

use polder_memory::{GuestAddress, GuestMemory};

use super::bytes::{slice, u32_at};
use super::elf::{Elf, Loaded};
use super::place::{place_command_line, place_initrd};
use super::{Boot, BootError, entry};
use crate::memory_map::memory_map;
use crate::{VcpuState, layout};

const HEADER_MAGIC: u32 = 0x1bad_b002;
const ENTRY_MAGIC: u32 = 0x2bad_b002;
/// The header lies in the first 8 KiB, on a multiple of 4 (3.1).
const SEARCH_LEN: usize = 8192;

/// Header flags (3.1.2).
const WANTS_VIDEO: u32 = 1 << 2;
const HAS_ADDRESSES: u32 = 1 << 16;
const MANDATORY: u32 = 0xffff;
const MANDATORY_KNOWN: u32 = 0b11;

/// Information flags (3.3): memory sizes, command line, modules, memory map, loader's name.
const INFO_FLAGS: u32 = 1 << 0 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9;
const INFO_LEN: usize = 120;

/// The structures lie below the EBDA, out of the way of kernels that load themselves very low.
const STRUCTURES_START: u64 = 0x9_0000;
const MODULE_START: u64 = STRUCTURES_START + 0x100;
const MAP_START: u64 = STRUCTURES_START + 0x200;
const LOADER_NAME_START: u64 = STRUCTURES_START + 0x400;
const MODULE_NAME_START: u64 = STRUCTURES_START + 0x500;
const LINE_START: u64 = STRUCTURES_START + 0x1000;
const LINE_LEN_MAX: usize = (layout::EBDA_START - LINE_START - 1) as usize;

/// The offset of the header in a file.
pub(super) fn find_header(file: &[u8]) -> Option<usize> {
    let searched = &file[..file.len().min(SEARCH_LEN)];
    (0..searched.len()).step_by(4).find(|&offset| {
        let word = |index: usize| u32_at(searched, offset + 4 * index);
        match (word(0), word(1), word(2)) {
            (Some(HEADER_MAGIC), Some(flags), Some(checksum)) => {
                HEADER_MAGIC.wrapping_add(flags).wrapping_add(checksum) == 0
            }
            _ => false,
        }
    })
}

/// Loads a multiboot kernel; an initrd becomes its module.
pub(super) fn load(memory: &GuestMemory, boot: Boot<'_>) -> Result<VcpuState, BootError> {
    let file = boot.kernel;
    let bad = |what| BootError::BadMultiboot { what };
    let header = find_header(file).ok_or(bad("it is gone"))?;
    let flags = u32_at(file, header + 4).ok_or(bad("it is cut off"))?;
    if flags & WANTS_VIDEO != 0 {
        return Err(bad("it asks for a video mode, and the machine has no display"));
    }
    if flags & MANDATORY & !MANDATORY_KNOWN != 0 {
        return Err(bad("it asks for something unknown"));
    }
    let loaded = if file.starts_with(b"\x7fELF") {
        Elf::parse(file)?.load(memory, STRUCTURES_START..layout::EBDA_START)?
    } else if flags & HAS_ADDRESSES != 0 {
        load_flat(memory, file, header)?
    } else {
        return Err(bad("the file is not ELF, and the header does not say where to load it"));
    };
    let entry_point = u32::try_from(loaded.entry).map_err(|_| bad("the entry point lies above 4 GiB"))?;

    let initrd = place_initrd(memory, boot.initrd, loaded.end, u32::MAX.into())?;
    let line = format!("{} {}", boot.kernel_name, boot.command_line);
    place_command_line(memory, LINE_START, &line, LINE_LEN_MAX)?;
    place_command_line(memory, LOADER_NAME_START, "polder", usize::MAX)?;
    place_command_line(memory, MODULE_NAME_START, "initrd", usize::MAX)?;

    let mut map = Vec::new();
    for range in memory_map(memory.len()) {
        map.extend(20u32.to_le_bytes());
        map.extend(range.start.to_le_bytes());
        map.extend(range.len.to_le_bytes());
        map.extend((range.kind as u32).to_le_bytes());
    }
    memory.write(GuestAddress(MAP_START), &map)?;
    let module = [initrd.start as u32, (initrd.start + initrd.len) as u32, MODULE_NAME_START as u32, 0];
    let module: Vec<u8> = module.iter().flat_map(|value| value.to_le_bytes()).collect();
    memory.write(GuestAddress(MODULE_START), &module)?;

    let mut info = [0; INFO_LEN];
    let mut put = |offset: usize, value: u64| {
        info[offset..offset + 4].copy_from_slice(&(value as u32).to_le_bytes());
    };
    let upper_end = memory.len().min(layout::LOW_RAM_END);
    put(0, INFO_FLAGS.into());
    put(4, layout::EBDA_START / 1024);
    put(8, upper_end.saturating_sub(layout::HIGH_MEMORY_START) / 1024);
    put(16, LINE_START);
    put(20, u64::from(initrd.len > 0));
    put(24, MODULE_START);
    put(44, map.len() as u64);
    put(48, MAP_START);
    put(64, LOADER_NAME_START);
    memory.write(GuestAddress(STRUCTURES_START), &info)?;
    Ok(entry::protected_mode(memory, entry_point, ENTRY_MAGIC, STRUCTURES_START as u32)?)
}

/// Loads a file as the header's addresses say (3.1.3).
fn load_flat(memory: &GuestMemory, file: &[u8], header: usize) -> Result<Loaded, BootError> {
    let bad = |what| BootError::BadMultiboot { what };
    let word = |index: usize| u32_at(file, header + 4 * index).map(u64::from).ok_or(bad("it is cut off"));
    let (header_address, load, load_end, bss_end, entry) = (word(3)?, word(4)?, word(5)?, word(6)?, word(7)?);
    let outside = || bad("its addresses lie outside the file");
    let file_start =
        (header as u64).checked_sub(header_address.checked_sub(load).ok_or_else(outside)?).ok_or_else(outside)?;
    let len = match load_end {
        0 => (file.len() as u64).checked_sub(file_start).ok_or_else(outside)?,
        end => end.checked_sub(load).ok_or_else(outside)?,
    };
    let bytes = slice(file, file_start, len).ok_or_else(outside)?;
    let end = bss_end.max(load + len);
    let no_room = || BootError::NoRoomForKernel { start: load, end, ram: polder_basics::ByteSize(memory.len()) };
    if load < layout::EBDA_START && end > STRUCTURES_START {
        return Err(bad("its addresses cover the memory that the boot structures need"));
    }
    memory.host_range(GuestAddress(load), end - load).map_err(|_| no_room())?;
    memory.write(GuestAddress(load), bytes)?;
    memory.fill(GuestAddress(load + len), 0, end - (load + len))?;
    Ok(Loaded { entry, end })
}
