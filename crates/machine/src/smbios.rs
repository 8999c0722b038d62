//! SMBIOS tables (DMTF DSP0134, version 3.0 entry point): what `dmidecode` shows and what Linux knows a machine by.

use polder_memory::{GuestAddress, GuestMemory, MemoryError};

use crate::layout;
use crate::memory_map::{MemoryKind, memory_map};

/// What the tables depend on.
#[derive(Debug, Clone, Copy)]
pub struct SmbiosConfig {
    pub cpus: u32,
    pub ram_bytes: u64,
    /// Shown as the machine's UUID, in RFC 4122 byte order.
    pub uuid: [u8; 16],
}

const ENTRY_LEN: usize = 24;

/// Handles, one a structure.
const SYSTEM: u16 = 0x0100;
const CHASSIS: u16 = 0x0300;
const PROCESSOR: u16 = 0x0400;
const MEMORY_ARRAY: u16 = 0x1000;
const MEMORY_DEVICE: u16 = 0x1100;
const MEMORY_RANGE: u16 = 0x1300;
const BOOT: u16 = 0x2000;
const END: u16 = 0x7f00;
const NONE: u16 = 0xfffe;

/// Writes the entry point and the structures into the BIOS area.
pub fn write_tables(memory: &GuestMemory, config: &SmbiosConfig) -> Result<(), MemoryError> {
    let structures = structures(config);
    let table = layout::SMBIOS_START + ENTRY_LEN.next_multiple_of(16) as u64;
    // 7.2.2: anchor, checksum, length, version 3.0, revision, reserved, table's maximum length and address.
    let mut entry = b"_SM3_\0\x18\x03\x00\x00\x01\0".to_vec();
    entry.extend((structures.len() as u32).to_le_bytes());
    entry.extend(table.to_le_bytes());
    entry[5] = entry.iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte));
    debug_assert_eq!(entry.len(), ENTRY_LEN);
    memory.write(GuestAddress(layout::SMBIOS_START), &entry)?;
    memory.write(GuestAddress(table), &structures)
}

/// One structure: header, formatted area, strings.
fn structure(kind: u8, handle: u16, formatted: &[u8], strings: &[&str]) -> Vec<u8> {
    let mut bytes = vec![kind, formatted.len() as u8 + 4];
    bytes.extend(handle.to_le_bytes());
    bytes.extend(formatted);
    for string in strings {
        bytes.extend(string.bytes());
        bytes.push(0);
    }
    if strings.is_empty() {
        bytes.push(0);
    }
    bytes.push(0);
    bytes
}

fn structures(config: &SmbiosConfig) -> Vec<u8> {
    let kib = config.ram_bytes / 1024;
    // 7.18: sizes below 32 GiB - 1 MiB fit in MiB; larger ones go to the extended field.
    let mib = config.ram_bytes >> 20;
    let short_mib = if mib < 0x7fff { mib as u16 } else { 0x7fff };
    let mut uuid = config.uuid;
    // 7.2.1: the first three fields are little-endian.
    uuid[0..4].reverse();
    uuid[4..6].reverse();
    uuid[6..8].reverse();
    let cores = config.cpus.min(0xff) as u8;
    let mut all = vec![
        // 7.1: vendor, version, start segment, date, ROM size; "characteristics not supported"; virtual machine.
        structure(
            0,
            0,
            &[&[1, 2, 0, 0xe8, 3, 0][..], &8u64.to_le_bytes(), &[0, 0x1c, 0xff, 0xff, 0xff, 0xff]].concat(),
            &["polder", env!("CARGO_PKG_VERSION"), "01/01/2026"],
        ),
        // 7.2: maker, product, version, serial, UUID, wake-up by power switch, SKU, family.
        structure(
            1,
            SYSTEM,
            &[&[1, 2, 3, 0][..], &uuid, &[6, 0, 1]].concat(),
            &["polder", "polder machine", env!("CARGO_PKG_VERSION")],
        ),
        // 7.4: maker, type "other", no version, serial, asset tag; all states safe, security none.
        structure(3, CHASSIS, &[1, 1, 0, 0, 0, 3, 3, 3, 3, 0, 0, 0, 0, 0, 1, 0, 0], &["polder"]),
        // 7.5: socket, CPU, other family, maker; one socket with all vCPUs as cores.
        structure(
            4,
            PROCESSOR,
            &[
                &[1, 3, 1, 2][..],
                &[0; 8],
                &[2, 0],
                &[0; 6],
                &[0x41, 1],
                &[0xff; 6],
                &[0, 0, 0, cores, cores, cores, 4, 0, 1, 0],
            ]
            .concat(),
            &["CPU 0", "polder"],
        ),
        // 7.17: system board, system memory, no correction, capacity, no error, one device, extended capacity.
        structure(
            16,
            MEMORY_ARRAY,
            &[&[3, 3, 3][..], &(kib as u32).to_le_bytes(), &NONE.to_le_bytes(), &[1, 0], &[0; 8]].concat(),
            &[],
        ),
        // 7.18: array, no error, widths unknown, size, DIMM, no set, locator, RAM.
        structure(
            17,
            MEMORY_DEVICE,
            &[
                &MEMORY_ARRAY.to_le_bytes()[..],
                &NONE.to_le_bytes(),
                &[0xff; 4],
                &short_mib.to_le_bytes(),
                &[9, 0, 1, 0, 7, 2, 0, 0, 0, 0, 0, 0, 0, 0],
                &(mib as u32).to_le_bytes(),
                &[0; 8],
            ]
            .concat(),
            &["DIMM 0"],
        ),
    ];
    for (index, (start, end)) in ram_ends(config.ram_bytes).into_iter().enumerate() {
        // 7.20: addresses in KiB unless they are too large, then the extended ones in bytes.
        let short = |address: u64| if address >> 10 < 0xffff_ffff { (address >> 10) as u32 } else { u32::MAX };
        let formatted = [
            &short(start).to_le_bytes()[..],
            &short(end - 1024).to_le_bytes(),
            &MEMORY_ARRAY.to_le_bytes(),
            &[1],
            &[0; 16],
        ]
        .concat();
        all.push(structure(19, MEMORY_RANGE + index as u16, &formatted, &[]));
    }
    // 7.33: no error at boot. 7.45: end of table.
    all.push(structure(32, BOOT, &[0; 7], &[]));
    all.push(structure(127, END, &[], &[]));
    all.concat()
}

/// RAM below and above the hole as (start, end); the BIOS area counts as RAM, as on a PC.
fn ram_ends(ram_bytes: u64) -> Vec<(u64, u64)> {
    let mut ends: Vec<(u64, u64)> = Vec::new();
    for range in memory_map(ram_bytes) {
        match range.kind {
            MemoryKind::Ram if range.start >= layout::HIGH_RAM_START => {
                ends.push((range.start, range.start + range.len));
            }
            MemoryKind::Ram => match ends.first_mut() {
                Some(first) => first.1 = range.start + range.len,
                None => ends.push((range.start, range.start + range.len)),
            },
            MemoryKind::Reserved => {}
        }
    }
    ends
}

#[cfg(test)]
mod tests {
    use super::*;
    use polder_basics::{GIB, MIB};

    #[test]
    fn the_structures_walk_to_the_end_and_the_entry_sums_to_zero() {
        for ram_bytes in [64 * MIB, 5 * GIB] {
            let memory = GuestMemory::new(&layout::ram_regions(ram_bytes)).unwrap();
            write_tables(&memory, &SmbiosConfig { cpus: 8, ram_bytes, uuid: [7; 16] }).unwrap();
            let mut entry = [0; ENTRY_LEN];
            memory.read(GuestAddress(layout::SMBIOS_START), &mut entry).unwrap();
            assert_eq!(entry.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0);
            let len = u32::from_le_bytes(entry[12..16].try_into().unwrap()) as usize;
            let mut table = vec![0; len];
            memory.read(GuestAddress(u64::from_le_bytes(entry[16..24].try_into().unwrap())), &mut table).unwrap();
            let mut kinds = Vec::new();
            let mut rest = &table[..];
            while let [kind, formatted_len, ..] = *rest {
                kinds.push(kind);
                let strings = &rest[formatted_len as usize..];
                let end = strings.windows(2).position(|pair| pair == [0, 0]).unwrap();
                rest = &strings[end + 2..];
            }
            assert_eq!(kinds.first(), Some(&0));
            assert_eq!(kinds.last(), Some(&127));
            assert_eq!(kinds.iter().filter(|kind| **kind == 19).count(), if ram_bytes > 4 * GIB { 2 } else { 1 });
        }
    }
}
