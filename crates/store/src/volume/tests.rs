//! Volumes beside plain vectors of bytes that do the same: once in the open domain, once in an encrypted one.

use polder_trust::keys::{KeyFile, Secret};

use super::*;
use crate::domain::Key;
use crate::store::StoreOptions;
use crate::test_store::{noise, volume_content};
use crate::volume::volumes::{CHUNK_LEN_DEFAULT, Content};

const MIB: u64 = 1 << 20;

/// The module is there twice.
const IS_ENCRYPTED: bool = matches!(module_path!().as_bytes(), [.., b'e', b'd', b'_', b't', b'e', b's', b't', b's']);

struct World {
    _folder: tempfile::TempDir,
    store: Arc<Store>,
}

fn world() -> World {
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(folder.path(), StoreOptions::default()).unwrap();
    if IS_ENCRYPTED {
        let key = Key::File(KeyFile::of(Secret::random().unwrap()));
        store.create_domain("secret", &key, None).unwrap();
    }
    World { _folder: folder, store }
}

impl World {
    fn volume(&self, name: &str, capacity_bytes: u64) -> Volume {
        self.create(name, capacity_bytes, CHUNK_LEN_DEFAULT);
        self.open(name)
    }

    fn create(&self, name: &str, capacity_bytes: u64, chunk_len: u32) {
        let domain = IS_ENCRYPTED.then_some("secret");
        self.store.create_volume_in(name, &Content::Zeros { capacity_bytes, chunk_len }, domain).unwrap();
    }

    fn open(&self, name: &str) -> Volume {
        Volume::open(&self.store, name, VolumeOptions::default()).unwrap()
    }
}

#[test]
fn the_log_of_the_catalog_does_not_grow_with_each_snapshot() {
    let world = world();
    let volume = world.volume("disk", 4 * MIB);
    let log = world.store.folder().join("catalog.db-wal");
    let mut longest = 0;
    for number in 0..5000 {
        volume.snapshot(&format!("snapshot-{number}")).unwrap();
        longest = longest.max(log.metadata().unwrap().len());
    }
    // They make some 90 MB of it, if nobody writes it back.
    assert!(longest < 50 << 20, "{longest}");
    assert_eq!(world.store.snapshots("disk").unwrap().len(), 5000);
}

#[test]
fn a_name_is_taken_by_what_the_log_or_the_catalog_has_and_free_once_that_was_removed() {
    let world = world();
    let volume = world.volume("disk", 4 * MIB);
    let is_taken = |volume: &Volume, name: &str| matches!(volume.snapshot(name), Err(StoreError::Exists { .. }));
    drop(volume.snapshot("old").unwrap());
    volume.compact().unwrap();
    drop(volume.snapshot("new").unwrap());
    assert!(is_taken(&volume, "old") && is_taken(&volume, "new"));
    volume.close().unwrap();
    let volume = world.open("disk");
    drop(volume.snapshot("newest").unwrap());
    assert!(is_taken(&volume, "old") && is_taken(&volume, "new") && is_taken(&volume, "newest"));
    // By this process or another: the catalog tells.
    world.store.remove_snapshot("disk", "old").unwrap();
    drop(volume.snapshot("old").unwrap());
    assert!(is_taken(&volume, "old"));
    world.store.remove_snapshot("disk", "newest").unwrap();
    volume.compact().unwrap();
    drop(volume.snapshot("newest").unwrap());
    volume.close().unwrap();
    let mut names: Vec<String> = world.store.snapshots("disk").unwrap().into_iter().map(|row| row.name).collect();
    names.sort_unstable();
    assert_eq!(names, ["new", "newest", "old"]);
}

#[test]
fn what_was_written_is_read_from_the_log_and_from_the_tree() {
    let world = world();
    let volume = world.volume("disk", 4 * MIB);
    let mut expected = vec![0; 4 << 20];
    for (round, (offset, len)) in
        [(0, 4096), (5 * 512, 512), (16_384, 100 * 1024), (3 << 20, 512), ((4 << 20) - 512, 512), (1 << 20, 2 << 20)]
            .into_iter()
            .enumerate()
    {
        let bytes = noise(round as u64, len);
        volume.write_at(offset as u64, &bytes).unwrap();
        expected[offset..offset + len].copy_from_slice(&bytes);
        assert!(volume_content(&volume) == expected, "round {round}, from the log");
        if round % 2 == 1 {
            volume.compact().unwrap();
            assert!(volume_content(&volume) == expected, "round {round}, from the tree");
        }
    }
    volume.zero(MIB, MIB + 512).unwrap();
    expected[1 << 20..(2 << 20) + 512].fill(0);
    assert!(volume_content(&volume) == expected);
    volume.close().unwrap();
    assert!(volume_content(&world.open("disk")) == expected);
}

#[test]
fn an_unclosed_volume_comes_back_from_its_log() {
    let world = world();
    let bytes = noise(1, 300 * 1024);
    {
        let volume = world.volume("disk", 8 * MIB);
        volume.write_at(4096, &bytes).unwrap();
        volume.write_at(512, &bytes[..512]).unwrap();
        volume.snapshot("one").unwrap();
        volume.zero(8192, 4096).unwrap();
    }
    let volume = world.open("disk");
    let mut expected = vec![0; 8 << 20];
    expected[4096..4096 + bytes.len()].copy_from_slice(&bytes);
    expected[512..1024].copy_from_slice(&bytes[..512]);
    let snapshot = world.store.snapshot("disk", "one").unwrap();
    world.store.create_volume("clone", &Content::Snapshot(&snapshot)).unwrap();
    assert!(volume_content(&world.open("clone")) == expected);
    expected[8192..12_288].fill(0);
    assert!(volume_content(&volume) == expected);
}

#[test]
fn snapshots_and_clones_hold_what_was_there_when_they_were_taken() {
    let world = world();
    let volume = world.volume("disk", 2 * MIB);
    let mut states = Vec::new();
    for round in 0..20u64 {
        volume.write_at(round * 7 % 500 * 4096, &noise(round, 8192)).unwrap();
        if round % 3 == 0 {
            volume.write_at(round * 512, &noise(round + 100, 512)).unwrap();
        }
        let name = format!("s{round}");
        volume.snapshot(&name).unwrap();
        states.push((name, volume_content(&volume)));
        if round == 9 {
            volume.compact().unwrap();
        }
    }
    assert!(matches!(volume.snapshot("s3"), Err(StoreError::Exists { .. })));
    for (name, state) in &states {
        let snapshot = world.store.snapshot("disk", name).unwrap();
        let clone = format!("clone-{name}");
        world.store.create_volume(&clone, &Content::Snapshot(&snapshot)).unwrap();
        let clone = world.open(&clone);
        assert!(volume_content(&clone) == *state, "{name}");
        clone.write_at(0, &[1; 512]).unwrap();
    }
    assert!(volume_content(&volume) == states.last().unwrap().1);
    // Each snapshot is a node whose parent is the one before.
    let snapshots = world.store.snapshots("disk").unwrap();
    for pair in snapshots.windows(2) {
        let node = world.store.load_node(&pair[1].node.unwrap()).unwrap();
        assert_eq!(node.parent, pair[0].node);
        assert_eq!(node.disks[0].root, pair[1].root.unwrap());
    }
    drop(volume);
    world.store.roll_back("disk", "s4").unwrap();
    assert!(volume_content(&world.open("disk")) == states[4].1);
    world.store.remove_snapshot("disk", "s4").unwrap();
    assert!(matches!(world.store.snapshot("disk", "s4"), Err(StoreError::NotFound { .. })));
}

#[test]
fn equal_content_is_stored_once_and_zeros_not_at_all() {
    let world = world();
    let volume = world.volume("a", 16 * MIB);
    let bytes = noise(5, 8 << 20);
    volume.write_at(0, &bytes).unwrap();
    volume.write_at(8 * MIB, &bytes).unwrap();
    volume.close().unwrap();
    world.store.seal().unwrap();
    let stored = || world.store.catalog().segments().unwrap().iter().map(|row| row.bytes).sum::<u64>();
    let once = stored();
    assert!((8 * MIB..8 * MIB + 256 * 1024).contains(&once), "{once}");
    let other = world.volume("b", 64 * MIB);
    other.write_at(20 * MIB, &bytes).unwrap();
    other.write_at(0, &vec![0; 4 << 20]).unwrap();
    other.close().unwrap();
    world.store.seal().unwrap();
    assert!(stored() - once < 128 * 1024, "{}", stored() - once);
}

#[test]
fn a_second_opener_is_refused_and_told_who_was_first() {
    let world = world();
    let _volume = world.volume("disk", MIB);
    match Volume::open(&world.store, "disk", VolumeOptions::default()) {
        Err(StoreError::InUse { process, .. }) => assert_eq!(process, std::process::id().to_string()),
        other => panic!("{:?}", other.map(drop)),
    }
}

#[test]
fn a_volume_takes_another_size_and_forgets_what_was_cut_off() {
    let world = world();
    let volume = world.volume("disk", 3 * MIB);
    let bytes = noise(1, 3 << 20);
    volume.write_at(0, &bytes).unwrap();
    for compact in [false, true] {
        volume.resize(MIB + 512).unwrap();
        assert_eq!(volume.capacity_bytes(), MIB + 512);
        assert!(volume.write_at(MIB + 512, &[1; 512]).is_err());
        if compact {
            volume.compact().unwrap();
        }
        volume.resize(300 * MIB).unwrap();
        let mut expected = bytes[..(1 << 20) + 512].to_vec();
        expected.resize(4 << 20, 0);
        let mut found = vec![1; 4 << 20];
        volume.read_at(0, &mut found).unwrap();
        assert!(found == expected, "{compact}");
    }
    volume.close().unwrap();
    let volume = world.open("disk");
    assert_eq!(volume.capacity_bytes(), 300 * MIB);
    for size in [0, 513, CAPACITY_BYTES_MAX + 512] {
        assert!(matches!(volume.resize(size), Err(StoreError::BadSize { .. })), "{size}");
    }
}

#[test]
fn a_discard_of_a_whole_large_volume_is_quick() {
    let world = world();
    let volume = world.volume("disk", CAPACITY_BYTES_MAX);
    volume.write_at(CAPACITY_BYTES_MAX - 4096, &[7; 4096]).unwrap();
    volume.write_at(1 << 40, &[8; 4096]).unwrap();
    volume.compact().unwrap();
    volume.zero(0, CAPACITY_BYTES_MAX - 8192).unwrap();
    volume.compact().unwrap();
    let mut block = [1; 4096];
    volume.read_at(1 << 40, &mut block).unwrap();
    assert_eq!(block, [0; 4096]);
    volume.read_at(CAPACITY_BYTES_MAX - 4096, &mut block).unwrap();
    assert_eq!(block, [7; 4096]);
}

#[test]
fn writers_and_the_log_are_bounded() {
    let world = world();
    world.create("disk", 64 * MIB, 4096);
    let options = VolumeOptions { log_bytes_max: 8 * MIB, log_bytes_start: 2 * MIB, ..VolumeOptions::default() };
    let volume = Volume::open(&world.store, "disk", options).unwrap();
    let mut expected = vec![0; 64 << 20];
    for round in 0..300u64 {
        let bytes = noise(round, 256 * 1024);
        let offset = round * 13 % 256 * 256 * 1024;
        volume.write_at(offset, &bytes).unwrap();
        expected[offset as usize..offset as usize + bytes.len()].copy_from_slice(&bytes);
        assert!(volume.core().backlog_bytes() <= 9 * MIB);
    }
    assert!(volume_content(&volume) == expected);
    volume.compact().unwrap();
    // Nothing is counted twice of what is moved bit by bit.
    assert!(volume.core().backlog_bytes() < 4096 * 4096 / 64, "{}", volume.core().backlog_bytes());
    let files = log_file::list(&volume.core().folder).unwrap();
    assert!(files.len() <= 2, "{files:?}");
}

#[test]
fn a_volume_at_rest_has_no_log_and_its_file_goes_to_the_next_one() {
    let world = world();
    let spares = || std::fs::read_dir(world.store.folder().join("spares")).unwrap().count();
    world.create("one", 8 * MIB, 4096);
    let options = VolumeOptions { log_file_bytes: 2 * MIB, ..VolumeOptions::default() };
    let volume = Volume::open(&world.store, "one", options).unwrap();
    let folder = volume.core().folder.clone();
    volume.write_at(0, &noise(1, 3 << 20)).unwrap();
    volume.close().unwrap();
    assert!(log_file::list(&folder).unwrap().is_empty());
    let left = spares();
    assert!(left >= 2);

    world.create("two", 8 * MIB, 4096);
    let two = Volume::open(&world.store, "two", options).unwrap();
    assert_eq!((log_file::list(&two.core().folder).unwrap(), spares()), (vec![1], left - 1));
    two.write_at(4096, &noise(2, 4096)).unwrap();
    two.flush().unwrap();
    // What was in the file before is not taken for what the second volume wrote.
    drop(two);
    let two = Volume::open(&world.store, "two", options).unwrap();
    let one = Volume::open(&world.store, "one", options).unwrap();
    assert!(volume_content(&one)[..3 << 20] == noise(1, 3 << 20));
    assert!(volume_content(&two) == [vec![0; 4096], noise(2, 4096), vec![0; (8 << 20) - 8192]].concat());
    one.write_at(0, &noise(3, 4096)).unwrap();
    drop(one);
    let one = Volume::open(&world.store, "one", options).unwrap();
    assert!(volume_content(&one)[..4096] == noise(3, 4096));
}

/// Puts another file in the place of an open one, until it is dropped.
struct Replaced {
    fd: std::os::fd::RawFd,
    real: std::os::fd::OwnedFd,
}

impl Replaced {
    /// `/dev/full` takes no bytes; `/dev/zero` takes them, and cannot be synced.
    fn by(path: &str, fd: std::os::fd::RawFd) -> Replaced {
        use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
        let other = std::fs::File::options().read(true).write(true).open(path).unwrap();
        // SAFETY: both descriptors are open, and the copy is nobody else's.
        let real = unsafe {
            let real = OwnedFd::from_raw_fd(libc::dup(fd));
            assert_eq!(libc::dup2(other.as_raw_fd(), fd), fd);
            real
        };
        Replaced { fd, real }
    }
}

impl Drop for Replaced {
    fn drop(&mut self) {
        use std::os::fd::AsRawFd;
        // SAFETY: both descriptors are open.
        assert_eq!(unsafe { libc::dup2(self.real.as_raw_fd(), self.fd) }, self.fd);
    }
}

#[test]
fn a_volume_whose_sync_failed_refuses_flushes_and_others_go_on() {
    use std::os::fd::AsRawFd;
    let world = world();
    let (volume, other) = (world.volume("disk", MIB), world.volume("other", MIB));
    volume.write_at(0, &noise(1, 4096)).unwrap();
    volume.flush().unwrap();
    volume.write_at(4096, &noise(2, 4096)).unwrap();
    {
        let fd = volume.core().layers().files.last().unwrap().file.as_raw_fd();
        let _replaced = Replaced::by("/dev/zero", fd);
        assert!(matches!(volume.flush(), Err(StoreError::File { .. })));
    }
    // Once is enough: what the host dropped it does not report again.
    let error = volume.flush().unwrap_err().to_string();
    assert!(error.contains("nothing after it can be promised"), "{error}");
    assert!(matches!(volume.write_at(0, &[1; 4096]), Err(StoreError::Broken { .. })));
    assert!(matches!(volume.snapshot("late"), Err(StoreError::Broken { .. })));
    other.write_at(0, &noise(3, 4096)).unwrap();
    other.flush().unwrap();
    drop(volume);
    let volume = world.open("disk");
    assert_eq!(volume_content(&volume)[..8192], [noise(1, 4096), noise(2, 4096)].concat());
    volume.flush().unwrap();
}

#[test]
fn flushes_that_wait_for_one_that_fails_fail_as_well() {
    use std::os::fd::AsRawFd;
    let world = world();
    let volume = world.volume("disk", MIB);
    volume.write_at(0, &noise(1, 4096)).unwrap();
    let fd = volume.core().layers().files.last().unwrap().file.as_raw_fd();
    let _replaced = Replaced::by("/dev/zero", fd);
    let (send, receive) = std::sync::mpsc::channel();
    for _ in 0..20 {
        let send = send.clone();
        volume.core().flush_then(move |result| send.send(result.is_err()).unwrap());
    }
    for _ in 0..20 {
        assert!(receive.recv_timeout(Duration::from_secs(20)).unwrap());
    }
}

#[test]
fn a_batch_fails_if_what_it_built_on_did_not_become_stable() {
    use std::os::fd::AsRawFd;
    let world = world();
    let bytes = noise(1, 16_384);
    let mut one = world.store.batch().unwrap();
    let mut two = world.store.batch().unwrap();
    let (name, _) = one.put(crate::Kind::Data, &bytes).unwrap();
    assert_eq!(two.put(crate::Kind::Data, &bytes).unwrap().0, name);
    {
        let fd = world.store.writing_file().unwrap().as_raw_fd();
        let _replaced = Replaced::by("/dev/zero", fd);
        assert!(one.sync().is_err());
    }
    assert!(two.sync().is_err(), "it found a record that is lost");
    let mut three = world.store.batch().unwrap();
    three.put(crate::Kind::Data, &bytes).unwrap();
    assert_eq!(three.sync().unwrap().reused, 0);
}

#[test]
fn a_store_that_found_the_disk_full_goes_on_when_there_is_room() {
    use std::os::fd::AsRawFd;
    let world = world();
    let volume = world.volume("disk", 64 * MIB);
    volume.write_at(0, &noise(1, 16_384)).unwrap();
    volume.compact().unwrap();
    volume.write_at(MIB, &noise(2, 24 << 20)).unwrap();
    {
        let fd = world.store.writing_file().unwrap().as_raw_fd();
        let _replaced = Replaced::by("/dev/full", fd);
        let error = volume.compact().unwrap_err().to_string();
        assert!(error.contains("No space left"), "{error}");
        volume.write_at(0, &noise(3, 4096)).unwrap();
        volume.flush().unwrap();
        assert!(volume.compact().is_err());
    }
    volume.compact().unwrap();
    let mut expected = noise(1, 16_384);
    expected[..4096].copy_from_slice(&noise(3, 4096));
    assert!(volume_content(&volume)[..16_384] == expected);
    volume.close().unwrap();
    let verified = world.store.verify(&mut |_| Ok(())).unwrap();
    assert!(verified.damages.is_empty() && verified.lost.is_empty(), "{verified:?}");
}

#[test]
fn a_snapshot_that_was_removed_stays_removed_whatever_the_log_still_says() {
    let world = world();
    let volume = world.volume("disk", MIB);
    volume.write_at(0, &noise(1, 4096)).unwrap();
    volume.snapshot("one").unwrap();
    volume.flush().unwrap();
    let [head, log, kept] = ["head", "log-00000001", "kept"].map(|name| volume.core().folder.join(name));
    let before = std::fs::read(&head).unwrap();
    std::fs::hard_link(&log, &kept).unwrap();
    volume.compact().unwrap();
    drop(volume);
    // A crash after the catalog had the snapshot's tree and before the head said so.
    std::fs::write(&head, before).unwrap();
    std::fs::rename(&kept, &log).unwrap();
    world.store.spares().clear().unwrap();
    world.store.remove_snapshot("disk", "one").unwrap();
    let names = || -> Vec<String> {
        world.store.snapshots("disk").unwrap().into_iter().map(|snapshot| snapshot.name).collect()
    };
    let volume = world.open("disk");
    assert_eq!(names(), [""; 0]);
    volume.write_at(4096, &noise(2, 4096)).unwrap();
    volume.snapshot("one").unwrap();
    volume.close().unwrap();
    assert_eq!(names(), ["one"]);
    let snapshot = world.store.snapshot("disk", "one").unwrap();
    world.store.create_volume("clone", &Content::Snapshot(&snapshot)).unwrap();
    assert_eq!(volume_content(&world.open("clone"))[..8192], [noise(1, 4096), noise(2, 4096)].concat());
}

#[test]
fn a_log_whose_file_is_missing_is_named() {
    let world = world();
    let options = VolumeOptions { log_file_bytes: 2 << 20, ..VolumeOptions::default() };
    let open = || Volume::open(&world.store, "disk", options);
    world.create("disk", 16 * MIB, 4096);
    let volume = open().unwrap();
    let folder = volume.core().folder.clone();
    volume.write_at(0, &noise(1, 5 << 20)).unwrap();
    volume.flush().unwrap();
    drop(volume);
    let first = folder.join("log-00000001");
    std::fs::rename(&first, folder.join("aside")).unwrap();
    match open() {
        Err(StoreError::Damaged { what, .. }) => assert!(what.contains("file 1 of the log is missing"), "{what}"),
        other => panic!("{:?}", other.map(drop)),
    }
    std::fs::rename(folder.join("aside"), &first).unwrap();
    assert!(volume_content(&open().unwrap())[..5 << 20] == noise(1, 5 << 20));
}

#[test]
fn a_smaller_size_that_failed_cuts_nothing_off() {
    use std::os::fd::AsRawFd;
    let world = world();
    let volume = world.volume("disk", 2 * MIB);
    let bytes = noise(1, 2 << 20);
    volume.write_at(0, &bytes).unwrap();
    volume.flush().unwrap();
    {
        let fd = volume.core().layers().files.last().unwrap().file.as_raw_fd();
        let _replaced = Replaced::by("/dev/full", fd);
        assert!(volume.resize(MIB).is_err());
    }
    assert_eq!(volume.capacity_bytes(), 2 * MIB);
    assert!(volume_content(&volume) == bytes);
    volume.resize(MIB + 512).unwrap();
    volume.close().unwrap();
    let volume = world.open("disk");
    volume.resize(2 * MIB).unwrap();
    let mut expected = bytes[..(1 << 20) + 512].to_vec();
    expected.resize(2 << 20, 0);
    assert!(volume_content(&volume) == expected);
}

#[test]
fn a_volume_that_cannot_be_moved_into_the_store_can_be_left() {
    use std::os::fd::AsRawFd;
    let world = world();
    world.store.create_volume("disk", &Content::Zeros { capacity_bytes: 16 * MIB, chunk_len: 4096 }).unwrap();
    let options = VolumeOptions { log_bytes_start: MIB, ..VolumeOptions::default() };
    let volume = Volume::open(&world.store, "disk", options).unwrap();
    volume.write_at(0, &noise(1, 4096)).unwrap();
    volume.compact().unwrap();
    let fd = world.store.writing_file().unwrap().as_raw_fd();
    let replaced = Replaced::by("/dev/full", fd);
    volume.write_at(0, &noise(2, 8 << 20)).unwrap();
    assert!(volume.compact().is_err());
    drop(volume);
    drop(replaced);
    assert!(volume_content(&world.open("disk"))[..8 << 20] == noise(2, 8 << 20));
}
