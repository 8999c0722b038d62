//! The disk as a guest driver sees it, on both engines.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use polder_machine::AccessSize;
use rustix::fs::{MemfdFlags, memfd_create};

use super::*;
use crate::virtio::testing::{CONFIG, DATA, Driver, INDIRECT, NEXT, WRITE};
use crate::virtio::{FEATURE_EVENT_INDEX, FEATURE_INDIRECT};

const ENGINES: [EngineChoice; 2] = [EngineChoice::Auto, EngineChoice::Threads];
const SECTORS: u64 = 2048;

fn scratch_file() -> File {
    let file = File::from(memfd_create("disk", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(SECTORS * SECTOR_LEN).unwrap();
    file
}

fn block(file: &File, access: DiskAccess, engine: EngineChoice, queues: u16) -> Arc<Block> {
    let file = file.try_clone().unwrap();
    let options =
        BlockOptions { medium: DiskMedium::File(file), access, serial: "polder-disk-0".to_owned(), queues, engine };
    Arc::new(Block::new(options).unwrap())
}

fn driver(file: &File, engine: EngineChoice) -> Driver {
    let features = FEATURE_FLUSH | FEATURE_DISCARD | FEATURE_WRITE_ZEROES | FEATURE_INDIRECT | FEATURE_EVENT_INDEX;
    Driver::ready(block(file, DiskAccess::ReadWrite, engine, 2), features)
}

fn put_header(driver: &Driver, address: u64, request_type: u32, sector: u64) {
    let mut header = [0; 16];
    header[0..4].copy_from_slice(&request_type.to_le_bytes());
    header[8..16].copy_from_slice(&sector.to_le_bytes());
    driver.put(address, &header);
}

/// Sends a request of a header, the parts, and a status byte; the status and the number of bytes written.
pub(super) fn request(driver: &mut Driver, request_type: u32, sector: u64, parts: &[(u64, u32, bool)]) -> (u8, u32) {
    put_header(driver, DATA, request_type, sector);
    driver.put(DATA + 0x100, &[0xee]);
    let mut chain = vec![(DATA, 16, false)];
    chain.extend_from_slice(parts);
    chain.push((DATA + 0x100, 1, true));
    let head = driver.send(0, &chain);
    let (used, written) = driver.wait_used(0);
    assert_eq!(used, head);
    (driver.bytes(DATA + 0x100, 1)[0], written)
}

#[test]
fn what_was_written_is_read_back_in_any_framing() {
    for engine in ENGINES {
        let file = scratch_file();
        let mut driver = driver(&file, engine);
        let bytes: Vec<u8> = (0..4096).map(|index| (index * 7 % 251) as u8).collect();
        driver.put(DATA + 0x1000, &bytes);
        let out = [(DATA + 0x1000, 1000, false), (DATA + 0x1000 + 1000, 3096, false)];
        assert_eq!(request(&mut driver, 1, 5, &out), (0, 1));
        let mut on_disk = vec![0; 4096];
        file.read_exact_at(&mut on_disk, 5 * 512).unwrap();
        assert_eq!(on_disk, bytes);
        let back = [(DATA + 0x4000, 3000, true), (DATA + 0x6000, 1096, true)];
        assert_eq!(request(&mut driver, 0, 5, &back), (0, 4097));
        assert_eq!(driver.bytes(DATA + 0x4000, 3000), bytes[..3000]);
        assert_eq!(driver.bytes(DATA + 0x6000, 1096), bytes[3000..]);
    }
}

#[test]
fn a_request_outside_the_disk_or_of_broken_sectors_is_an_io_error() {
    for engine in ENGINES {
        let mut driver = driver(&scratch_file(), engine);
        for (request_type, sector, len) in [
            (0, SECTORS, 512),
            (0, SECTORS - 1, 1024),
            (0, u64::MAX, 512),
            (0, 0, 511),
            (0, 0, 0),
            (1, u64::MAX / 512, 512),
        ] {
            let parts = [(DATA + 0x1000, len, request_type == 0)];
            assert_eq!(request(&mut driver, request_type, sector, &parts).0, 1, "{request_type} {sector} {len}");
        }
        assert_eq!(request(&mut driver, 77, 0, &[]).0, 2);
        assert_eq!(driver.status() & 64, 0);
    }
}

#[test]
fn a_read_only_disk_refuses_every_change() {
    let file = scratch_file();
    let mut driver = Driver::ready(block(&file, DiskAccess::ReadOnly, EngineChoice::Auto, 1), FEATURE_READ_ONLY);
    assert_eq!(driver.offered() & (FEATURE_READ_ONLY | FEATURE_DISCARD), FEATURE_READ_ONLY);
    for request_type in [1, 11, 13] {
        assert_eq!(request(&mut driver, request_type, 0, &[(DATA + 0x1000, 512, false)]).0, 1);
    }
    assert_eq!(request(&mut driver, 0, 0, &[(DATA + 0x1000, 512, true)]).0, 0);
}

#[test]
fn flush_serial_discard_and_write_zeroes_answer() {
    for engine in ENGINES {
        let file = scratch_file();
        file.write_all_at(&[0xaa; 64 * 512], 0).unwrap();
        let mut driver = driver(&file, engine);
        assert_eq!(request(&mut driver, 4, 0, &[]), (0, 1));
        assert_eq!(request(&mut driver, 8, 0, &[(DATA + 0x1000, 20, true)]), (0, 21));
        assert_eq!(driver.bytes(DATA + 0x1000, 14), b"polder-disk-0\0");
        let segment = |sector: u64, sectors: u32, flags: u32| {
            [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
        };
        // (type, sector, sectors, flags, status)
        for (request_type, sector, sectors, flags, status) in [
            (11, 0, 8, 0, 0),
            (13, 8, 8, 0, 0),
            (13, 16, 8, 1, 0),
            (13, 24, 8, 2, 2),
            (11, 24, 8, 1, 2),
            (13, SECTORS - 1, 2, 0, 1),
            (13, 24, u32::MAX, 0, 1),
            (11, 24, u32::MAX, 0, 1),
        ] {
            driver.put(DATA + 0x2000, &segment(sector, sectors, flags));
            let answer = request(&mut driver, request_type, 0, &[(DATA + 0x2000, 16, false)]);
            assert_eq!(answer, (status, 1), "{request_type} {sector} {sectors} {flags}");
        }
        let mut bytes = vec![0; 64 * 512];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes[..24 * 512].iter().all(|&byte| byte == 0));
        assert!(bytes[24 * 512..].iter().all(|&byte| byte == 0xaa));
    }
}

#[test]
fn a_file_that_became_shorter_is_an_io_error_and_not_a_hang() {
    for engine in ENGINES {
        let file = scratch_file();
        let mut driver = driver(&file, engine);
        file.set_len(512).unwrap();
        assert_eq!(request(&mut driver, 0, 0, &[(DATA + 0x1000, 1024, true)]).0, 1);
        assert_eq!(request(&mut driver, 0, 0, &[(DATA + 0x1000, 512, true)]).0, 0);
    }
}

#[test]
fn a_full_host_file_system_is_an_io_error() {
    for engine in ENGINES {
        // A sealed memfd refuses writes as a full or broken file system does.
        let file = File::from(memfd_create("disk", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap());
        file.set_len(SECTORS * SECTOR_LEN).unwrap();
        rustix::fs::fcntl_add_seals(&file, rustix::fs::SealFlags::WRITE).unwrap();
        let mut driver = driver(&file, engine);
        assert_eq!(request(&mut driver, 1, 0, &[(DATA + 0x1000, 512, false)]).0, 1);
        assert_eq!(request(&mut driver, 0, 0, &[(DATA + 0x1000, 512, true)]).0, 0);
    }
}

#[test]
fn a_header_written_to_sector_0_does_not_change_the_format() {
    let file = scratch_file();
    let mut writer = driver(&file, EngineChoice::Auto);
    let mut header = [0u8; 512];
    header[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
    writer.put(DATA + 0x1000, &header);
    assert_eq!(request(&mut writer, 1, 0, &[(DATA + 0x1000, 512, false)]).0, 0);
    drop(writer);
    let mut reader = driver(&file, EngineChoice::Auto);
    assert_eq!(reader.read(CONFIG, AccessSize::Qword), SECTORS);
    assert_eq!(request(&mut reader, 0, 0, &[(DATA + 0x2000, 512, true)]).0, 0);
    assert_eq!(reader.bytes(DATA + 0x2000, 512), header);
}

#[test]
fn a_request_without_room_for_its_status_stops_the_disk_until_reset() {
    for engine in ENGINES {
        let mut driver = driver(&scratch_file(), engine);
        put_header(&driver, DATA, 0, 0);
        driver.send(0, &[(DATA, 16, false)]);
        driver.wait_needs_reset();
        driver.initialise(FEATURE_FLUSH);
        assert_eq!(driver.status(), 0xf);
        assert_eq!(request(&mut driver, 4, 0, &[]).0, 0);
    }
}

#[test]
fn a_whole_queue_of_requests_completes_through_indirect_tables() {
    for engine in ENGINES {
        let file = scratch_file();
        for sector in 0..SECTORS {
            file.write_all_at(&sector.to_le_bytes(), sector * 512).unwrap();
        }
        let mut driver = driver(&file, engine);
        let table = driver.queues[1].descriptors;
        for index in 0..256u16 {
            let start = DATA + 0x1000 * u64::from(index);
            put_header(&driver, start, 0, u64::from(index) * 3);
            driver.put_descriptor(start + 0x100, 0, start, 16, NEXT, 1);
            driver.put_descriptor(start + 0x100, 1, start + 0x200, 512, NEXT | WRITE, 2);
            driver.put_descriptor(start + 0x100, 2, start + 0x400, 1, WRITE, 0);
            driver.put_descriptor(table, index, start + 0x100, 48, INDIRECT, 0);
            driver.offer(1, index);
        }
        driver.ring(1);
        let mut heads: Vec<u16> = (0..256).map(|_| driver.wait_used(1).0).collect();
        heads.sort_unstable();
        assert!(heads.iter().copied().eq(0..256));
        for index in 0..256u64 {
            let value = driver.memory.load_u64(polder_memory::GuestAddress(DATA + 0x1000 * index + 0x200)).unwrap();
            assert_eq!(value, index * 3);
        }
    }
}

#[test]
fn a_reset_with_requests_in_flight_waits_for_them() {
    for engine in ENGINES {
        let mut driver = driver(&scratch_file(), engine);
        for index in 0..64u64 {
            let start = DATA + 0x2_0000 * index;
            put_header(&driver, start, 0, 0);
            driver.add_chain(0, &[(start, 16, false), (start + 0x1000, 0x1_0000, true), (start + 0x100, 1, true)]);
        }
        driver.ring(0);
        driver.set_status(0);
        let msi = driver.msi.clone();
        msi.wait_until("the reset", || driver.status() == 0);
        // Nothing writes to memory any more: a second driver can use the same pages.
        driver.memory.fill(polder_memory::GuestAddress(DATA), 0x55, 64 * 0x2_0000).unwrap();
        driver.initialise(FEATURE_FLUSH);
        assert_eq!(driver.bytes(DATA, 64 * 0x2_0000), vec![0x55; 64 * 0x2_0000]);
        assert_eq!(request(&mut driver, 4, 0, &[]).0, 0);
    }
}

#[test]
fn files_that_cannot_be_disks_are_refused() {
    let short = File::from(memfd_create("disk", MemfdFlags::CLOEXEC).unwrap());
    short.set_len(511).unwrap();
    let options = |file, access| BlockOptions {
        medium: DiskMedium::File(file),
        access,
        serial: String::new(),
        queues: 1,
        engine: EngineChoice::Auto,
    };
    assert!(matches!(Block::new(options(short, DiskAccess::ReadWrite)), Err(BlockError::TooSmall { len: 511 })));
    let read_only = File::open("/proc/self/exe").unwrap();
    assert!(matches!(Block::new(options(read_only, DiskAccess::ReadWrite)), Err(BlockError::NotWritable)));
    let mut pipe = File::open("/dev/zero").unwrap();
    assert!(pipe.seek(SeekFrom::End(0)).is_ok() && pipe.read(&mut [0]).is_ok());
    assert!(Block::new(options(pipe, DiskAccess::ReadOnly)).is_err());
}
