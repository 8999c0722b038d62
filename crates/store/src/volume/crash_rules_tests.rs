//! Rules that a crash shows to be broken, each by itself. docs/decisions/crash-safety.md lists all of them, and the tests of the others.

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};

use super::{Head, State, Volume, VolumeOptions};
use crate::disk::{Disk, Durability, Operation, Queue};
use crate::format::Source;
use crate::name::Kind;
use crate::store::Store;
use crate::test_store::{at_once, noise, volume_content};
use crate::{Content, OpenDisk, StoreOptions};

const MIB: u64 = 1 << 20;

fn open_store(folder: &tempfile::TempDir) -> Arc<Store> {
    Store::open(folder.path(), StoreOptions::default()).unwrap()
}

fn make(store: &Arc<Store>, name: &str) -> Volume {
    store.create_volume(name, &Content::Zeros { capacity_bytes: 8 * MIB, chunk_len: 16_384 }).unwrap();
    open(store, name)
}

fn open(store: &Arc<Store>, name: &str) -> Volume {
    Volume::open(store, name, VolumeOptions::default()).unwrap()
}

/// Has other threads stop when it goes, also where a test fails.
struct StopAtEnd<'a>(&'a AtomicBool);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, SeqCst);
    }
}

/// Waits for the completion of an operation of a queue.
fn complete(queue: &mut impl Queue<Vec<u8>>, operation: Operation<Vec<u8>>) {
    queue.submit(1, operation);
    let completion = loop {
        if let Some(completion) = queue.next_completion() {
            break completion;
        }
        let mut waited = [rustix::event::PollFd::from_borrowed_fd(queue.signal(), rustix::event::PollFlags::IN)];
        rustix::event::poll(&mut waited, Some(&rustix::time::Timespec { tv_sec: 20, tv_nsec: 0 })).unwrap();
        let _ = rustix::io::read(queue.signal(), &mut [0; 8]);
    };
    completion.result.unwrap();
}

#[test]
fn an_empty_discard_takes_no_number_of_the_log() {
    let folder = tempfile::tempdir().unwrap();
    let store = open_store(&folder);
    let disk = Arc::new(OpenDisk::Volume(make(&store, "disk")));
    let OpenDisk::Volume(volume) = &*disk else { unreachable!("it was made as one") };
    volume.write_at(0, &noise(1, 4096)).unwrap();
    let before = volume.core().log().position();
    let mut queue = disk.open_queue::<Vec<u8>>().unwrap();
    for offset in [0, 512, 4096, MIB + 512, 8 * MIB] {
        volume.zero(offset, 0).unwrap();
        volume.write_at(offset, &[]).unwrap();
        for durability in [Durability::Cached, Durability::Stable] {
            complete(&mut queue, Operation::Discard { offset, len: 0, durability });
            complete(&mut queue, Operation::WriteZeroes { offset, len: 0, durability });
        }
    }
    assert_eq!(volume.core().log().position(), before);
    volume.write_at(4096, &noise(2, 4096)).unwrap();
    drop(queue);
    drop(disk);
    assert_eq!(volume_content(&open(&store, "disk"))[..8192], [noise(1, 4096), noise(2, 4096)].concat());
}

#[test]
fn a_flush_on_one_queue_covers_what_was_completed_on_another() {
    let folder = tempfile::tempdir().unwrap();
    let store = open_store(&folder);
    let disk = Arc::new(OpenDisk::Volume(make(&store, "disk")));
    let OpenDisk::Volume(volume) = &*disk else { unreachable!("it was made as one") };
    let (mut one, mut two) = (disk.open_queue::<Vec<u8>>().unwrap(), disk.open_queue::<Vec<u8>>().unwrap());
    for round in 0..20 {
        let write =
            Operation::Write { offset: round * 4096, buffer: noise(round, 4096), durability: Durability::Cached };
        complete(&mut one, write);
        // Parts of blocks go another way than whole ones.
        complete(&mut one, Operation::Discard { offset: MIB + round * 512, len: 512, durability: Durability::Cached });
        assert!(!volume.core().all_is_stable());
        complete(&mut two, Operation::Flush);
        assert!(volume.core().all_is_stable());
    }
}

#[test]
fn what_is_moved_again_after_a_crash_is_the_same_tree_and_the_same_nodes_and_takes_no_room() {
    let folder = tempfile::tempdir().unwrap();
    let store = open_store(&folder);
    let volume = make(&store, "disk");
    let [head, log, kept] = ["head", "log-00000001", "kept"].map(|name| volume.core().folder.join(name));
    volume.write_at(0, &noise(1, 100_000 / 512 * 512)).unwrap();
    volume.snapshot("first").unwrap();
    volume.compact().unwrap();
    for round in 0..3 {
        volume.write_at(round * 40_960, &noise(round + 2, 8192)).unwrap();
        volume.snapshot(&format!("s{round}")).unwrap();
    }
    volume.write_at(MIB, &noise(9, 4096)).unwrap();
    volume.flush().unwrap();
    let before = std::fs::read(&head).unwrap();
    std::fs::copy(&log, &kept).unwrap();
    let state = |volume: &Volume| {
        let State { root, .. } = Head::peek(&volume.core().folder).unwrap().unwrap();
        let snapshots = store.snapshots("disk").unwrap();
        (root, snapshots.into_iter().map(|snapshot| (snapshot.name, snapshot.root, snapshot.node)).collect::<Vec<_>>())
    };
    volume.compact().unwrap();
    let expected = state(&volume);
    drop(volume);
    store.seal().unwrap();
    let stored = || store.catalog().segments().unwrap().iter().map(|row| row.bytes).sum::<u64>();
    let bytes = stored();
    for _ in 0..2 {
        // A crash after everything was in the tree, and before the head said so.
        std::fs::write(&head, &before).unwrap();
        std::fs::copy(&kept, &log).unwrap();
        let volume = open(&store, "disk");
        volume.compact().unwrap();
        assert_eq!(state(&volume), expected);
        drop(volume);
        store.seal().unwrap();
        assert_eq!(stored(), bytes);
    }
}

#[test]
fn what_another_process_has_not_sealed_is_read_and_not_built_on() {
    let folder = tempfile::tempdir().unwrap();
    let (one, two) = (open_store(&folder), open_store(&folder));
    let bytes = noise(1, 16_384);
    let put = |store: &Arc<Store>| {
        let mut batch = store.batch().unwrap();
        let (name, location) = batch.put(Kind::Data, &bytes).unwrap();
        (name, location, batch.sync().unwrap().reused)
    };
    let (name, theirs, _) = put(&one);
    assert_eq!(two.read_local(&name).unwrap().content[..], bytes);
    let (_, ours, reused) = put(&two);
    assert!(reused == 0 && ours.segment() != theirs.segment());
    // Once it is sealed it is as stable as it gets.
    drop(two);
    one.seal().unwrap();
    assert_eq!(put(&open_store(&folder)).2, 1);
}

#[test]
fn a_chunk_that_was_found_again_stays_until_the_root_that_names_it_is_stable() {
    let folder = tempfile::tempdir().unwrap();
    let (store, other) = (open_store(&folder), open_store(&folder));
    let volume = make(&store, "disk");
    volume.write_at(0, &noise(1, 16_384)).unwrap();
    volume.compact().unwrap();
    // Nothing needs the chunk any more.
    volume.zero(0, MIB).unwrap();
    volume.compact().unwrap();
    store.seal().unwrap();
    let mut batch = store.batch().unwrap();
    let (name, _) = batch.put(Kind::Data, &noise(1, 16_384)).unwrap();
    assert_eq!(batch.sync().unwrap().reused, 1);
    let (send, receive) = std::sync::mpsc::channel();
    let collection = std::thread::spawn(move || {
        other.collect(at_once(), &mut |step| {
            // The chunk was not marked; from here on the collection wants it gone.
            send.send(step.what).unwrap();
            Ok(())
        })
    });
    assert!(receive.iter().any(|step| step == "rewriting"));
    let root = crate::tree::update(&mut batch, crate::Root::empty(512), &[(0, name)]).unwrap();
    batch.sync().unwrap();
    store.create_volume("other", &Content::Zeros { capacity_bytes: 8 * MIB, chunk_len: 16_384 }).unwrap();
    store.catalog().set_volume_root(store.volume("other").unwrap().id, root).unwrap();
    assert!(!collection.is_finished(), "it does not wait for the batch");
    drop(batch);
    collection.join().unwrap().unwrap();
    assert_eq!(volume_content(&open(&store, "other"))[..16_384], noise(1, 16_384));
}

#[test]
fn a_snapshot_that_only_the_log_still_has_is_listed_and_can_be_used_though_the_volume_is_closed() {
    let folder = tempfile::tempdir().unwrap();
    let store = open_store(&folder);
    let volume = make(&store, "disk");
    volume.write_at(0, &noise(1, 4096)).unwrap();
    volume.snapshot("one").unwrap();
    volume.resize(4 * MIB).unwrap();
    volume.snapshot("two").unwrap();
    volume.write_at(0, &noise(2, 4096)).unwrap();
    drop(volume);
    // What the catalog holds beside the log is synced by whoever comes next: a power cut can take it.
    let lose = || {
        let catalog = rusqlite::Connection::open(folder.path().join("catalog.db")).unwrap();
        assert_eq!(catalog.execute("DELETE FROM snapshot", []).unwrap(), 2);
    };
    lose();
    let names = |store: &Store| -> Vec<_> {
        let snapshots = store.snapshots("disk").unwrap();
        snapshots.into_iter().map(|snapshot| (snapshot.name, snapshot.capacity_bytes)).collect()
    };
    assert_eq!(names(&store), [("one".to_owned(), 8 * MIB), ("two".to_owned(), 4 * MIB)]);
    lose();
    assert_eq!(store.snapshot("disk", "one").unwrap().capacity_bytes, 8 * MIB);
    lose();
    store.clone_volume("disk", Some("one"), "clone").unwrap();
    assert_eq!(volume_content(&open(&store, "clone"))[..4096], noise(1, 4096));
    store.remove_snapshot("disk", "one").unwrap();
    assert_eq!(names(&store), [("two".to_owned(), 4 * MIB)]);
}

#[test]
fn a_rollback_keeps_the_snapshots_that_others_take_until_it_has_the_volume() {
    let folder = tempfile::tempdir().unwrap();
    let store = open_store(&folder);
    let volume = make(&store, "disk");
    volume.write_at(0, &noise(0, 4096)).unwrap();
    volume.snapshot("first").unwrap();
    drop(volume);
    let stop = AtomicBool::new(false);
    let taken = std::thread::scope(|scope| {
        let others = scope.spawn(|| {
            let mut taken = Vec::new();
            while !stop.load(SeqCst) {
                let number = taken.len() as u64 + 1;
                // As a machine that runs for a moment, and is killed.
                let Ok(volume) = Volume::open(&store, "disk", VolumeOptions::default()) else { continue };
                volume.write_at(4096, &noise(number, 4096)).unwrap();
                volume.snapshot(&format!("s{number}")).unwrap();
                taken.push(number);
            }
            taken
        });
        let stop_at_end = StopAtEnd(&stop);
        let mut done = 0;
        while done < 20 {
            match store.roll_back("disk", "first") {
                Ok(()) => done += 1,
                Err(crate::StoreError::InUse { .. }) => {}
                Err(error) => panic!("{error}"),
            }
        }
        drop(stop_at_end);
        others.join().unwrap()
    });
    assert!(!taken.is_empty());
    for number in taken {
        let tree = store.settled_disk("disk", Some(&format!("s{number}"))).unwrap();
        let mut bytes = vec![0; 8192];
        crate::TreeSource::new(&store, &tree).read_at(0, &mut bytes).unwrap();
        assert_eq!(bytes, [noise(0, 4096), noise(number, 4096)].concat());
    }
}

#[test]
fn a_snapshot_that_was_granted_while_the_volume_was_closed_is_there_for_the_next_one_to_open_it() {
    let folder = tempfile::tempdir().unwrap();
    let store = open_store(&folder);
    let volume_folder = {
        let volume = make(&store, "disk");
        volume.write_at(0, &noise(1, 4096)).unwrap();
        volume.core().folder.clone()
    };
    let (number, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let granted: Vec<String> = std::thread::scope(|scope| {
        let ask = || {
            let mut granted = Vec::new();
            while !stop.load(SeqCst) {
                let name = format!("s{}", number.fetch_add(1, SeqCst));
                if crate::volume::control::snapshot(&volume_folder, &name).is_ok() {
                    granted.push(name);
                }
            }
            granted
        };
        let askers: Vec<_> = (0..4).map(|_| scope.spawn(ask)).collect();
        let stop_at_end = StopAtEnd(&stop);
        for round in 0..25 {
            let volume = open(&store, "disk");
            let wanted = number.load(SeqCst) + 3;
            while number.load(SeqCst) < wanted {
                std::thread::yield_now();
            }
            // What each opening reads from the log is what the one before left there.
            volume.write_at(0, &noise(round, 4096)).unwrap();
        }
        drop(stop_at_end);
        askers.into_iter().flat_map(|asker| asker.join().unwrap()).collect()
    });
    assert!(!granted.is_empty());
    open(&store, "disk").close().unwrap();
    let there: Vec<_> = store.snapshots("disk").unwrap();
    for name in granted {
        let row = there.iter().find(|row| row.name == name);
        assert!(row.is_some_and(|row| row.root.is_some()), "{name}: {row:?}");
    }
}

#[test]
fn a_damaged_record_of_a_segment_that_was_never_finished_costs_no_other() {
    for (what, damage) in [("content", 64 + 100), ("header", 20)] {
        let folder = tempfile::tempdir().unwrap();
        let crashed = tempfile::tempdir().unwrap();
        let names: Vec<_> = {
            let store = open_store(&folder);
            let mut batch = store.batch().unwrap();
            let names = (0..20).map(|seed| batch.put(Kind::Data, &noise(seed, 16_384)).unwrap()).collect();
            batch.sync().unwrap();
            // The process dies here.
            for entry in ["catalog.db", "catalog.db-wal", "segments", "index", "volumes"] {
                copy(&folder.path().join(entry), &crashed.path().join(entry));
            }
            names
        };
        let segment = std::fs::read_dir(crashed.path().join("segments")).unwrap().next().unwrap().unwrap().path();
        assert_eq!(segment.extension().unwrap(), "open");
        let file = std::fs::File::options().read(true).write(true).open(segment).unwrap();
        for at in [3, 11] {
            let (_, location) = names[at];
            let mut byte = [0];
            file.read_exact_at(&mut byte, location.offset() + damage).unwrap();
            file.write_all_at(&[byte[0] ^ 4], location.offset() + damage).unwrap();
        }
        let store = open_store(&crashed);
        for (at, (name, _)) in names.iter().enumerate() {
            match store.read_local(name) {
                Ok(read) => assert!(read.content[..] == noise(at as u64, 16_384), "{what} {at}"),
                Err(_) => assert!([3, 11].contains(&at), "{what} of 3 and 11: {at} is gone"),
            }
        }
        let verified = store.verify(&mut |_| Ok(())).unwrap();
        assert!(verified.damages.is_empty(), "{verified:?}");
    }
}

fn copy(from: &std::path::Path, to: &std::path::Path) {
    if from.is_file() {
        std::fs::copy(from, to).unwrap();
        return;
    }
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        copy(&path, &to.join(path.file_name().unwrap()));
    }
}

/// Data of a guest that looks like records is data.
#[test]
fn what_looks_like_a_record_inside_of_a_damaged_one_is_no_record() {
    use crate::records::record::{Header, Packing};
    use polder_trust::seal::Suite;
    let folder = tempfile::tempdir().unwrap();
    let crashed = tempfile::tempdir().unwrap();
    let victim = crate::Namer::open().name(Kind::Data, &noise(7, 4096));
    // Nothing in it repeats: it lies in the segment as it is.
    let forged = |domain| {
        let lie = noise(100 + u64::from(domain), 4096);
        let header = Header {
            kind: Kind::Data,
            packing: Packing::Raw,
            packed_len: 4096,
            content_len: 4096,
            name: victim,
            domain,
            suite: Suite::Aes256Gcm,
            checksum: crc32c::crc32c(&lie),
        };
        [&header.to_bytes()[..], &lie].concat()
    };
    let payload = [noise(1, 1024), forged(0), noise(2, 512), forged(3), noise(3, 64)].concat();
    let location = {
        let store = open_store(&folder);
        let mut batch = store.batch().unwrap();
        let (_, location) = batch.put(Kind::Data, &payload).unwrap();
        assert!(location.read_len() > payload.len());
        batch.put(Kind::Data, &noise(9, 4096)).unwrap();
        batch.sync().unwrap();
        for entry in ["catalog.db", "catalog.db-wal", "segments", "index", "volumes"] {
            copy(&folder.path().join(entry), &crashed.path().join(entry));
        }
        location
    };
    let segment = std::fs::read_dir(crashed.path().join("segments")).unwrap().next().unwrap().unwrap().path();
    let file = std::fs::File::options().write(true).open(segment).unwrap();
    file.write_all_at(b"torn", location.offset()).unwrap();
    let store = open_store(&crashed);
    assert!(store.read_local(&victim).is_err());
    let behind = crate::Namer::open().name(Kind::Data, &noise(9, 4096));
    assert_eq!(store.read_local(&behind).unwrap().content[..], noise(9, 4096));
}
