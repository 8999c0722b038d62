//! The PVH entry: 32-bit protected mode with a start info structure (Xen, public/arch-x86/hvm/start_info.h, and
//! docs/misc/pvh.pandoc).

use polder_memory::{GuestAddress, GuestMemory};

use super::elf::Elf;
use super::linux64::KERNEL_FLOOR;
use super::place::{place_command_line, place_initrd};
use super::{Boot, BootError, entry};
use crate::memory_map::memory_map;
use crate::{VcpuState, layout};

const MAGIC: u32 = 0x336e_c578;
const VERSION: u32 = 1;
const START_INFO_LEN: u64 = 56;
const MODULE_LEN: u64 = 32;

/// Loads an ELF kernel whose note gives `pvh_entry`.
pub(super) fn load(
    memory: &GuestMemory,
    elf: &Elf<'_>,
    pvh_entry: u32,
    boot: Boot<'_>,
) -> Result<VcpuState, BootError> {
    let loaded = elf.load(memory, 0..KERNEL_FLOOR)?;
    let initrd = place_initrd(memory, boot.initrd, loaded.end, u32::MAX.into())?;
    place_command_line(
        memory,
        layout::COMMAND_LINE_START,
        boot.command_line,
        layout::COMMAND_LINE_LEN_MAX as usize - 1,
    )?;

    let start_info = layout::BOOT_PARAMETERS_START;
    let module = start_info + START_INFO_LEN.next_multiple_of(16);
    let map_start = module + MODULE_LEN;
    let map = memory_map(memory.len());

    let mut bytes = Vec::new();
    let modules = u32::from(initrd.len > 0);
    [MAGIC, VERSION, 0, modules].iter().for_each(|value| bytes.extend(value.to_le_bytes()));
    let module_pointer = if modules > 0 { module } else { 0 };
    for value in [module_pointer, layout::COMMAND_LINE_START, boot.rsdp, map_start] {
        bytes.extend(value.to_le_bytes());
    }
    [map.len() as u32, 0].iter().for_each(|value| bytes.extend(value.to_le_bytes()));
    debug_assert_eq!(bytes.len() as u64, START_INFO_LEN);
    memory.write(GuestAddress(start_info), &bytes)?;

    // The initrd is the only module; it has no command line.
    let module_bytes: Vec<u8> = [initrd.start, initrd.len, 0, 0].iter().flat_map(|value| value.to_le_bytes()).collect();
    memory.write(GuestAddress(module), &module_bytes)?;

    let mut map_bytes = Vec::new();
    for range in &map {
        map_bytes.extend(range.start.to_le_bytes());
        map_bytes.extend(range.len.to_le_bytes());
        map_bytes.extend((range.kind as u32).to_le_bytes());
        map_bytes.extend([0; 4]);
    }
    memory.write(GuestAddress(map_start), &map_bytes)?;
    Ok(entry::protected_mode(memory, pvh_entry, 0, start_info as u32)?)
}
