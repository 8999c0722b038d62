//! The 64-bit Linux boot protocol (Linux, Documentation/arch/x86/boot.rst and zero-page.rst).
//!
//! A bzImage is unpacked on the host and entered where its ELF file says, `startup_64` of the unpacked kernel; the guest never runs the
//! unpacker. The kernel stays at the address that it was linked for.

use polder_memory::{GuestAddress, GuestMemory};

use super::bytes::{slice, u16_at, u32_at};
use super::elf::{Elf, Loaded};
use super::image::HEADER_MAGIC;
use super::place::{place_command_line, place_initrd};
use super::{Boot, BootError, decompress, entry};
use crate::memory_map::memory_map;
use crate::{VcpuState, layout};

/// Offsets in a bzImage and, for those of the header, in the zero page.
const SETUP_SECTORS: usize = 0x1f1;
const HEADER_END: usize = 0x201;
const VERSION: usize = 0x206;
const TYPE_OF_LOADER: usize = 0x210;
const LOAD_FLAGS: usize = 0x211;
const INITRD_START: usize = 0x218;
const INITRD_LEN: usize = 0x21c;
const COMMAND_LINE_POINTER: usize = 0x228;
const INITRD_LAST: usize = 0x22c;
const EXTENDED_LOAD_FLAGS: usize = 0x236;
const COMMAND_LINE_LEN: usize = 0x238;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LEN: usize = 0x24c;
/// Offsets in the zero page alone.
const RSDP: usize = 0x70;
const MAP_COUNT: usize = 0x1e8;
const MAP: usize = 0x2d0;
const MAP_ENTRY_LEN: usize = 20;

const ZERO_PAGE_LEN: usize = 4096;
const LOADER_UNDEFINED: u8 = 0xff;
const LOADED_HIGH: u8 = 1;
const KERNEL_IS_64_BIT: u16 = 1;
/// Version 2.08 brought the payload's offset and length.
const VERSION_MIN: u16 = 0x208;
/// What an unpacked kernel, which has no header, takes: the values of a current bzImage.
const DEFAULT_COMMAND_LINE_LEN: usize = 2047;
const DEFAULT_INITRD_LAST: u64 = 0x7fff_ffff;
/// Boot structures lie below this address, kernels above.
pub(super) const KERNEL_FLOOR: u64 = layout::COMMAND_LINE_START + layout::COMMAND_LINE_LEN_MAX;

/// The zero page under construction.
struct ZeroPage([u8; ZERO_PAGE_LEN]);

impl ZeroPage {
    fn put(&mut self, offset: usize, bytes: &[u8]) {
        self.0[offset..offset + bytes.len()].copy_from_slice(bytes);
    }
}

/// Loads a bzImage.
pub(super) fn load_bzimage(memory: &GuestMemory, boot: Boot<'_>) -> Result<VcpuState, BootError> {
    let file = boot.kernel;
    let truncated = || BootError::BadBzImage { what: "its header is incomplete" };
    let version = u16_at(file, VERSION).ok_or_else(truncated)?;
    if version < VERSION_MIN {
        return Err(BootError::OldBzImage { major: (version >> 8) as u8, minor: version as u8 });
    }
    // Bit 0 of the extended flags came with 2.12, long after 64-bit kernels; only from there on does zero mean 32-bit.
    let extended = u16_at(file, EXTENDED_LOAD_FLAGS).ok_or_else(truncated)?;
    if version >= 0x20c && extended & KERNEL_IS_64_BIT == 0 {
        return Err(BootError::ForeignKernel { what: "a 32-bit PC".to_owned() });
    }
    let setup_sectors = match file.get(SETUP_SECTORS).copied().ok_or_else(truncated)? {
        0 => 4,
        sectors => u64::from(sectors),
    };
    let payload_offset = u32_at(file, PAYLOAD_OFFSET).ok_or_else(truncated)?;
    let payload_len = u32_at(file, PAYLOAD_LEN).ok_or_else(truncated)?;
    let payload = slice(file, (setup_sectors + 1) * 512 + u64::from(payload_offset), payload_len.into())
        .filter(|payload| !payload.is_empty())
        .ok_or(BootError::BadBzImage { what: "its payload lies outside the file" })?;

    let header_end = HEADER_MAGIC + usize::from(*file.get(HEADER_END).ok_or_else(truncated)?);
    let header = file.get(SETUP_SECTORS..header_end).ok_or_else(truncated)?;
    let mut page = ZeroPage([0; ZERO_PAGE_LEN]);
    page.put(SETUP_SECTORS, header);
    let command_line_len = u32_at(file, COMMAND_LINE_LEN).ok_or_else(truncated)? as usize;
    let initrd_last = u32_at(file, INITRD_LAST).ok_or_else(truncated)?;

    let loaded = {
        let unpacked = decompress::unpack(payload)?;
        if !unpacked.starts_with(b"\x7fELF\x02") {
            return Err(BootError::BadBzImage { what: "its payload is not a 64-bit ELF file" });
        }
        Elf::parse(&unpacked)?.load(memory, 0..KERNEL_FLOOR)?
    };
    finish(memory, page, loaded, boot, command_line_len, initrd_last.into())
}

/// Loads an unpacked kernel.
pub(super) fn load_vmlinux(memory: &GuestMemory, elf: &Elf<'_>, boot: Boot<'_>) -> Result<VcpuState, BootError> {
    let loaded = elf.load(memory, 0..KERNEL_FLOOR)?;
    let mut page = ZeroPage([0; ZERO_PAGE_LEN]);
    page.put(super::image::BOOT_FLAG, &[0x55, 0xaa]);
    page.put(HEADER_MAGIC, b"HdrS");
    page.put(VERSION, &0x20fu16.to_le_bytes());
    finish(memory, page, loaded, boot, DEFAULT_COMMAND_LINE_LEN, DEFAULT_INITRD_LAST)
}

fn finish(
    memory: &GuestMemory,
    mut page: ZeroPage,
    loaded: Loaded,
    boot: Boot<'_>,
    command_line_len: usize,
    initrd_last: u64,
) -> Result<VcpuState, BootError> {
    let initrd = place_initrd(memory, boot.initrd, loaded.end, initrd_last)?;
    let command_line_len = command_line_len.min(layout::COMMAND_LINE_LEN_MAX as usize - 1);
    place_command_line(memory, layout::COMMAND_LINE_START, boot.command_line, command_line_len)?;
    page.put(TYPE_OF_LOADER, &[LOADER_UNDEFINED]);
    page.0[LOAD_FLAGS] |= LOADED_HIGH;
    // Both lie in low RAM, so 32 bits hold them.
    page.put(INITRD_START, &(initrd.start as u32).to_le_bytes());
    page.put(INITRD_LEN, &(initrd.len as u32).to_le_bytes());
    page.put(COMMAND_LINE_POINTER, &(layout::COMMAND_LINE_START as u32).to_le_bytes());
    page.put(RSDP, &boot.rsdp.to_le_bytes());
    let map = memory_map(memory.len());
    page.put(MAP_COUNT, &[map.len() as u8]);
    for (index, range) in map.iter().enumerate() {
        let offset = MAP + index * MAP_ENTRY_LEN;
        page.put(offset, &range.start.to_le_bytes());
        page.put(offset + 8, &range.len.to_le_bytes());
        page.put(offset + 16, &(range.kind as u32).to_le_bytes());
    }
    memory.write(GuestAddress(layout::BOOT_PARAMETERS_START), &page.0)?;
    Ok(entry::long_mode(memory, loaded.entry, layout::BOOT_PARAMETERS_START)?)
}
