//! Kernels of every kind, made here, and files that are almost kernels.

use std::io::Write as _;

use polder_basics::MIB;
use polder_memory::GuestAddress;
use proptest::prelude::*;

use super::*;
use crate::layout;

const LOAD: u64 = 0x100_0000;
const CODE: &[u8] = b"the kernel's first bytes";

fn memory() -> GuestMemory {
    GuestMemory::new(&layout::ram_regions(64 * MIB)).unwrap()
}

fn bytes_at(memory: &GuestMemory, address: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    memory.read(GuestAddress(address), &mut bytes).unwrap();
    bytes
}

/// A 64-bit ELF file with one loadable segment at `LOAD` and, if asked, a PVH note.
fn elf64(pvh_entry: Option<u32>) -> Vec<u8> {
    let mut note = Vec::new();
    if let Some(entry) = pvh_entry {
        for value in [4u32, 4, 1] {
            note.extend(value.to_le_bytes());
        }
        note.extend(b"GNU\0abcd");
        for value in [4u32, 4, 18] {
            note.extend(value.to_le_bytes());
        }
        note.extend(b"Xen\0");
        note.extend(entry.to_le_bytes());
    }
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    file.extend(2u16.to_le_bytes());
    file.extend(62u16.to_le_bytes());
    file.extend(1u32.to_le_bytes());
    for value in [LOAD + 4, 64, 0] {
        file.extend(value.to_le_bytes());
    }
    file.extend([0; 4]);
    for value in [64u16, 56, 2, 0, 0, 0] {
        file.extend(value.to_le_bytes());
    }
    let data = 64 + 2 * 56u64;
    let segments =
        [(1u32, data, LOAD, CODE.len() as u64, 0x2000u64), (4, data + CODE.len() as u64, 0, note.len() as u64, 0)];
    for (kind, offset, address, file_len, memory_len) in segments {
        file.extend(kind.to_le_bytes());
        file.extend(5u32.to_le_bytes());
        for value in [offset, 0xffff_ffff_8000_0000 + address, address, file_len, memory_len, 0x1000] {
            file.extend(value.to_le_bytes());
        }
    }
    file.extend(CODE);
    file.extend(note);
    file
}

fn bzimage(payload: &[u8]) -> Vec<u8> {
    let mut file = vec![0; 3 * 512];
    file[0x1f1] = 2;
    file[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    file[0x201] = 0x6a;
    file[0x202..0x206].copy_from_slice(b"HdrS");
    file[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
    file[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
    file[0x236] = 1;
    file[0x238..0x23c].copy_from_slice(&2047u32.to_le_bytes());
    file[0x248..0x24c].copy_from_slice(&16u32.to_le_bytes());
    file[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
    file.extend([0; 16]);
    file.extend(payload);
    file
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// A flat multiboot file loaded at 4 MiB.
fn multiboot() -> Vec<u8> {
    let flags = 1u32 << 16 | 3;
    let load = 0x40_0000u32;
    let mut file = vec![0x90; 64];
    let magic = 0x1bad_b002u32;
    for value in
        [magic, flags, 0u32.wrapping_sub(magic).wrapping_sub(flags), load + 64, load, 0, load + 0x3000, load + 96]
    {
        file.extend(value.to_le_bytes());
    }
    file.extend(CODE);
    file
}

fn boot<'a>(kernel: &'a [u8], initrd: Option<Initrd<'a>>) -> Boot<'a> {
    Boot { kernel, kernel_name: "kernel", initrd, command_line: "console=ttyS0", rsdp: layout::RSDP_START }
}

fn load_with_initrd(memory: &GuestMemory, kernel: &[u8], initrd: &[u8]) -> Result<VcpuState, BootError> {
    let mut reader = initrd;
    load(memory, boot(kernel, Some(Initrd { len: initrd.len() as u64, reader: &mut reader })))
}

#[test]
fn a_bzimage_is_entered_in_64_bit_mode_with_a_zero_page() {
    let memory = memory();
    let initrd = vec![0x5a; 10_000];
    let state = load_with_initrd(&memory, &bzimage(&gzip(&elf64(Some(1)))), &initrd).unwrap();
    assert_eq!((state.rip, state.gpr[6]), (LOAD + 4, layout::BOOT_PARAMETERS_START));
    assert_eq!((state.efer, state.cr3), (0x500, layout::BOOT_PAGE_TABLES_START));
    assert_eq!(bytes_at(&memory, LOAD, CODE.len()), CODE);
    let page = bytes_at(&memory, layout::BOOT_PARAMETERS_START, 4096);
    assert_eq!(&page[0x202..0x206], b"HdrS");
    assert_eq!(page[0x210], 0xff);
    let word = |offset: usize| u32::from_le_bytes(page[offset..offset + 4].try_into().unwrap());
    assert_eq!(word(0x21c) as usize, initrd.len());
    assert_eq!(bytes_at(&memory, word(0x218).into(), initrd.len()), initrd);
    assert_eq!(bytes_at(&memory, word(0x228).into(), 14), b"console=ttyS0\0");
    assert_eq!(page[0x1e8], 4);
    assert_eq!(word(0x70), layout::RSDP_START as u32);
}

#[test]
fn an_elf_kernel_with_a_note_is_entered_by_pvh() {
    let memory = memory();
    let state = load_with_initrd(&memory, &elf64(Some(LOAD as u32 + 8)), b"initrd").unwrap();
    assert_eq!((state.rip, state.cr0, state.efer), (LOAD + 8, 0x11, 0));
    let info = state.gpr[3];
    assert_eq!(memory.load_u32(GuestAddress(info)).unwrap(), 0x336e_c578);
    let module = memory.load_u64(GuestAddress(info + 16)).unwrap();
    let start = memory.load_u64(GuestAddress(module)).unwrap();
    assert_eq!(bytes_at(&memory, start, 6), b"initrd");
    let line = memory.load_u64(GuestAddress(info + 24)).unwrap();
    assert_eq!(bytes_at(&memory, line, 14), b"console=ttyS0\0");
}

#[test]
fn an_elf_kernel_without_a_note_is_entered_in_64_bit_mode() {
    let memory = memory();
    let state = load(&memory, boot(&elf64(None), None)).unwrap();
    assert_eq!((state.rip, state.cr0), (LOAD + 4, 0x8000_0011));
}

#[test]
fn a_multiboot_file_finds_its_magic_line_and_map() {
    let memory = memory();
    let state = load_with_initrd(&memory, &multiboot(), b"initrd").unwrap();
    assert_eq!((state.rip, state.gpr[0]), (0x40_0060, 0x2bad_b002));
    assert_eq!(bytes_at(&memory, 0x40_0060, CODE.len()), CODE);
    let info = state.gpr[3];
    let word = |offset: u64| memory.load_u32(GuestAddress(info + offset)).unwrap();
    assert_eq!(bytes_at(&memory, word(16).into(), 21), b"kernel console=ttyS0\0");
    assert_eq!((word(4), word(8)), (639, 63 * 1024));
    assert_eq!((word(20), word(44)), (1, 4 * 24));
    let module = memory.load_u32(GuestAddress(word(24).into())).unwrap();
    assert_eq!(bytes_at(&memory, module.into(), 6), b"initrd");
}

#[test]
fn what_does_not_fit_is_refused_with_the_sizes() {
    let memory = memory();
    let error = load_with_initrd(&memory, &elf64(None), &vec![0; 60 << 20]).unwrap_err().to_string();
    assert!(error.contains("60 MiB") && error.contains("64 MiB"), "{error}");
    let mut far = elf64(None);
    far[64 + 24..64 + 32].copy_from_slice(&0x4000_0000u64.to_le_bytes());
    assert!(matches!(load(&memory, boot(&far, None)), Err(BootError::NoRoomForKernel { .. })));
    let mut low = elf64(None);
    low[64 + 24..64 + 32].copy_from_slice(&0x7000u64.to_le_bytes());
    assert!(matches!(load(&memory, boot(&low, None)), Err(BootError::BadElf { .. })));
    let line = "x".repeat(3000);
    let result = load(&memory, Boot { command_line: &line, ..boot(&elf64(None), None) });
    assert!(matches!(result, Err(BootError::CommandLineTooLong { len: 3000, max: 2047 })));
    let result = load(&memory, Boot { command_line: "a\0b", ..boot(&elf64(None), None) });
    assert!(matches!(result, Err(BootError::CommandLineNul)));
}

#[test]
fn a_program_is_told_from_a_kernel() {
    let mut program = elf64(None);
    program[64 + 56] = 3;
    let error = load(&memory(), boot(&program, None)).unwrap_err().to_string();
    assert!(error.contains("operating system"), "{error}");
}

#[test]
fn an_initrd_shorter_than_announced_is_refused() {
    let mut reader = &b"short"[..];
    let kernel = elf64(None);
    let result = load(&memory(), boot(&kernel, Some(Initrd { len: 6, reader: &mut reader })));
    assert!(matches!(result, Err(BootError::InitrdTruncated)));
}

#[test]
fn a_32_bit_or_ancient_bzimage_is_refused() {
    let mut file = bzimage(&gzip(&elf64(None)));
    file[0x236] = 0;
    assert!(matches!(load(&memory(), boot(&file, None)), Err(BootError::ForeignKernel { .. })));
    file[0x206..0x208].copy_from_slice(&0x204u16.to_le_bytes());
    assert!(matches!(load(&memory(), boot(&file, None)), Err(BootError::OldBzImage { major: 2, minor: 4 })));
}

#[test]
fn every_truncation_of_every_kind_is_an_error_or_a_boot() {
    let memory = memory();
    for file in [bzimage(&gzip(&elf64(Some(1)))), elf64(Some(1)), elf64(None), multiboot()] {
        for len in 0..file.len() {
            let _ = load(&memory, boot(&file[..len], None));
        }
    }
    for len in [0, 0x1f0, 0x210, 0x600, 0x610] {
        assert!(load(&memory, boot(&bzimage(&gzip(&elf64(None)))[..len], None)).is_err(), "{len}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn damaged_kernels_never_panic(
        which in 0usize..4,
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let mut file = match which {
            0 => bzimage(&elf64(Some(1))),
            1 => elf64(Some(1)),
            2 => elf64(None),
            _ => multiboot(),
        };
        for (index, byte) in damage {
            let position = index.index(file.len());
            file[position] = byte;
        }
        let _ = load(&memory(), boot(&file, None));
    }

    #[test]
    fn arbitrary_bytes_behind_a_magic_never_panic(
        magic in prop::sample::select(vec![&b"\x7fELF\x02\x01"[..], b"\x7fELF\x01\x01", b"\x02\xb0\xad\x1b"]),
        tail in prop::collection::vec(any::<u8>(), 0..512),
    ) {
        let file = [magic, &tail[..]].concat();
        let _ = load(&memory(), boot(&file, None));
    }
}
