//! A disk of the store as a guest driver sees it.

use std::sync::Arc;

use polder_machine::AccessSize;
use polder_store::{CHUNK_LEN_DEFAULT, Content, OpenDisk, Store, StoreOptions, Volume, VolumeOptions};

use super::tests::request;
use super::*;
use crate::virtio::testing::{CONFIG, DATA, Driver};

const BYTES: u64 = 1 << 20;

struct World {
    store: Arc<Store>,
    _folder: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(folder.path(), StoreOptions::default()).unwrap();
        store.create_volume("disk", &Content::Zeros { capacity_bytes: BYTES, chunk_len: CHUNK_LEN_DEFAULT }).unwrap();
        World { store, _folder: folder }
    }

    fn open(&self) -> Arc<OpenDisk> {
        Arc::new(OpenDisk::Volume(Volume::open(&self.store, "disk", VolumeOptions::default()).unwrap()))
    }
}

fn driver(disk: &Arc<OpenDisk>) -> Driver {
    let options = BlockOptions {
        medium: DiskMedium::Store(disk.clone()),
        access: DiskAccess::ReadWrite,
        serial: "volume".to_owned(),
        queues: 2,
        engine: EngineChoice::Auto,
    };
    let features = FEATURE_FLUSH | FEATURE_DISCARD | FEATURE_WRITE_ZEROES;
    Driver::ready(Arc::new(Block::new(options).unwrap()), features)
}

#[test]
fn a_volume_keeps_what_a_driver_wrote_in_any_framing() {
    let world = World::new();
    let bytes: Vec<u8> = (0..8192).map(|index| (index * 7 % 251) as u8).collect();
    {
        let disk = world.open();
        let mut driver = driver(&disk);
        driver.put(DATA + 0x1000, &bytes);
        let parts = [(DATA + 0x1000, 1000, false), (DATA + 0x1000 + 1000, 7192, false)];
        assert_eq!(request(&mut driver, 1, 5, &parts), (0, 1));
        assert_eq!(request(&mut driver, 4, 0, &[]), (0, 1));
        // The rest reads as zeros; nothing lies beyond the end.
        assert_eq!(request(&mut driver, 0, 100, &[(DATA + 0x8000, 4096, true)]), (0, 4097));
        assert_eq!(driver.bytes(DATA + 0x8000, 4096), vec![0; 4096]);
        assert_eq!(request(&mut driver, 0, BYTES / 512, &[(DATA + 0x8000, 512, true)]).0, 1);
    }
    let disk = world.open();
    let mut driver = driver(&disk);
    let back = [(DATA + 0x8000, 3000, true), (DATA + 0xc000, 5192, true)];
    assert_eq!(request(&mut driver, 0, 5, &back), (0, 8193));
    assert_eq!(driver.bytes(DATA + 0x8000, 3000), bytes[..3000]);
    assert_eq!(driver.bytes(DATA + 0xc000, 5192), bytes[3000..]);
    let segment = [&5u64.to_le_bytes()[..], &8u32.to_le_bytes(), &0u32.to_le_bytes()].concat();
    driver.put(DATA + 0x2000, &segment);
    assert_eq!(request(&mut driver, 11, 0, &[(DATA + 0x2000, 16, false)]), (0, 1));
    assert_eq!(request(&mut driver, 0, 5, &[(DATA + 0x8000, 8192, true)]), (0, 8193));
    assert_eq!(driver.bytes(DATA + 0x8000, 8192), [&[0; 4096], &bytes[4096..]].concat());
}

#[test]
fn a_driver_hears_of_another_size() {
    let world = World::new();
    let disk = world.open();
    let mut driver = driver(&disk);
    assert_eq!(driver.read(CONFIG, AccessSize::Qword), BYTES / 512);
    // Its queues are at work once they have answered.
    assert_eq!(request(&mut driver, 4, 0, &[]), (0, 1));
    let before = driver.msi.total();
    polder_store::disk::Disk::resize(&*disk, 2 * BYTES).unwrap();
    let msi = driver.msi.clone();
    msi.wait_until("the interrupt", || msi.total() > before);
    assert_eq!(driver.read(CONFIG, AccessSize::Qword), 2 * BYTES / 512);
    assert_eq!(request(&mut driver, 0, BYTES / 512, &[(DATA + 0x8000, 512, true)]), (0, 513));
}
