//! The store as a whole: collections, verification and repair, several processes' worth of handles on one folder.

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use polder_trust::seal::Suite;

use crate::catalog::ImageRow;
use crate::disk::{Disk, Durability, Extent, Operation, Question, Queue};
use crate::format::{self, RawSource, Source as _};
use crate::node::{Node, Tree};
use crate::records::record::{Header, Packing};
use crate::test_store::{at_once, noise, volume_content};
use crate::tree::{self, Root};
use crate::upkeep::collect::CollectOptions;
use crate::volume::Volume;
use crate::{Content, OpenDisk, Replace, Store, StoreError, StoreOptions, TreeSource, VolumeOptions};

const MIB: u64 = 1 << 20;

fn open(folder: &tempfile::TempDir) -> Arc<Store> {
    Store::open(folder.path(), StoreOptions::default()).unwrap()
}

fn volume(store: &Arc<Store>, name: &str, capacity_bytes: u64) -> Volume {
    store.create_volume(name, &Content::Zeros { capacity_bytes, chunk_len: 16_384 }).unwrap();
    Volume::open(store, name, VolumeOptions::default()).unwrap()
}

fn content(store: &Arc<Store>, name: &str) -> Vec<u8> {
    volume_content(&Volume::open(store, name, VolumeOptions::default()).unwrap())
}

fn collect(store: &Arc<Store>) -> crate::Collected {
    store.collect(at_once(), &mut |_| Ok(())).unwrap()
}

#[test]
fn only_its_owner_enters_a_store_and_a_volume_that_is_hardly_written_takes_little() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("deep/store");
    let store = Store::open(&path, StoreOptions::default()).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
    let disk = volume(&store, "disk", 64 * MIB);
    disk.write_at(0, &noise(1, 4096)).unwrap();
    disk.flush().unwrap();
    let volumes = std::fs::read_dir(path.join("volumes")).unwrap();
    let files = volumes.flat_map(|volume| std::fs::read_dir(volume.unwrap().path()).unwrap());
    let blocks: u64 = files.map(|file| file.unwrap().metadata().unwrap().blocks()).sum();
    assert!(blocks * 512 < 4 * MIB, "{blocks} blocks");
}

#[test]
fn a_collection_frees_what_nothing_needs_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder);
    let kept = volume(&store, "kept", 64 * MIB);
    let gone = volume(&store, "gone", 64 * MIB);
    // Chunks of both lie side by side in the same segments.
    for part in 0..48u64 {
        kept.write_at(part * MIB, &noise(part, 128 * 1024)).unwrap();
        gone.write_at(part * MIB, &noise(1000 + part, 1 << 20)).unwrap();
        kept.compact().unwrap();
        gone.compact().unwrap();
    }
    kept.snapshot("early").unwrap();
    kept.zero(0, 20 * MIB).unwrap();
    let mut expected = vec![0; 64 << 20];
    kept.read_at(0, &mut expected).unwrap();
    kept.close().unwrap();
    gone.close().unwrap();
    store.seal().unwrap();
    assert_eq!(collect(&store).removed_segments, 0);
    store.remove_volume("gone").unwrap();
    let usage = store.usage(&mut |_| Ok(())).unwrap();
    assert!(usage.reclaimable_bytes() > 47 * MIB, "{usage:?}");
    let collected = collect(&store);
    assert!(collected.freed_bytes - collected.rewritten_bytes > 40 * MIB, "{collected:?}");
    let after = store.usage(&mut |_| Ok(())).unwrap();
    assert!(after.stored_bytes < 12 * MIB && after.lost.is_empty(), "{after:?}");
    for store in [&store, &open(&folder)] {
        assert!(content(store, "kept") == expected);
        let verified = store.verify(&mut |_| Ok(())).unwrap();
        assert!(verified.damages.is_empty() && verified.lost.is_empty(), "{verified:?}");
    }
    let early = store.snapshot("kept", "early").unwrap();
    store.create_volume("again", &Content::Snapshot(&early)).unwrap();
    assert!(content(&store, "again")[..128 * 1024] == noise(0, 128 * 1024));
}

#[test]
fn old_chunks_that_are_packed_tighter_take_less_room_and_are_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder);
    // Sixteen letters in no order: LZ4 finds nothing in them. Noise gets no smaller at all.
    let mut bytes: Vec<u8> = noise(1, 24 << 20).iter().map(|byte| b'a' + byte % 16).collect();
    bytes[20 << 20..].copy_from_slice(&noise(2, 4 << 20));
    let disk = volume(&store, "disk", 24 * MIB);
    disk.write_at(0, &bytes).unwrap();
    disk.close().unwrap();
    store.seal().unwrap();
    let day = std::time::Duration::from_secs(24 * 3600);
    let tighten = |store: &Arc<Store>| {
        let options = CollectOptions { tighten_after: Some(30 * day), ..at_once() };
        store.collect(options, &mut |_| Ok(())).unwrap()
    };
    assert_eq!(tighten(&store).removed_segments, 0, "nothing is old");
    for segment in std::fs::read_dir(folder.path().join("segments")).unwrap() {
        let file = std::fs::File::options().write(true).open(segment.unwrap().path()).unwrap();
        file.set_modified(std::time::SystemTime::now() - 31 * day).unwrap();
    }
    let before = store.usage(&mut |_| Ok(())).unwrap();
    let collected = tighten(&store);
    let after = store.usage(&mut |_| Ok(())).unwrap();
    assert!(after.stored_bytes * 10 < before.stored_bytes * 7, "{before:?} {after:?}");
    assert!(collected.freed_bytes > collected.rewritten_bytes + 9 * MIB, "{collected:?}");
    assert_eq!((after.needed_records, after.used_bytes), (before.needed_records, before.used_bytes));
    // What is new is not looked at again.
    assert_eq!(tighten(&store).removed_segments, 0);
    // The same chunks are still found, and stored no second time.
    let again = volume(&store, "again", 24 * MIB);
    again.write_at(0, &bytes).unwrap();
    again.close().unwrap();
    store.seal().unwrap();
    assert!(store.usage(&mut |_| Ok(())).unwrap().stored_bytes < after.stored_bytes + 100_000);
    drop(store);
    let store = open(&folder);
    assert!(content(&store, "disk") == bytes);
    let disk = Volume::open(&open(&folder), "disk", VolumeOptions::default()).unwrap();
    let mut part = [0; 4096];
    for offset in [0usize, 20_480, (5 << 20) + 4096, (20 << 20) - 4096, 23 << 20] {
        disk.read_at(offset as u64, &mut part).unwrap();
        assert!(part[..] == bytes[offset..offset + 4096], "{offset}");
    }
    let verified = store.verify(&mut |_| Ok(())).unwrap();
    assert!(verified.damages.is_empty() && verified.lost.is_empty(), "{verified:?}");
}

#[test]
fn a_collection_beside_writers_loses_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder);
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        for writer in 0..2u64 {
            let (folder, store, stop) = (&folder, open(&folder), &stop);
            scope.spawn(move || {
                let name = format!("disk{writer}");
                let disk = volume(&store, &name, 8 * MIB);
                let mut expected = vec![0; 8 << 20];
                for round in 0.. {
                    // A few contents that come and go, so that chunks are found again that a collection is about to remove.
                    let bytes = noise(round % 5, 256 * 1024);
                    let at = (round * 7 % 32 * 256 * 1024) as usize;
                    disk.write_at(at as u64, &bytes).unwrap();
                    expected[at..at + bytes.len()].copy_from_slice(&bytes);
                    if round % 3 == 0 {
                        disk.zero((round * 5 % 32) * 256 * 1024, 256 * 1024).unwrap();
                        let at = ((round * 5 % 32) * 256 * 1024) as usize;
                        expected[at..at + 256 * 1024].fill(0);
                    }
                    disk.compact().unwrap();
                    if round % 4 == writer {
                        store.seal().unwrap();
                    }
                    if stop.load(std::sync::atomic::Ordering::Relaxed) {
                        break;
                    }
                }
                let mut found = vec![0; 8 << 20];
                disk.read_at(0, &mut found).unwrap();
                assert!(found == expected);
                disk.close().unwrap();
                drop(store);
                // Nothing in memory helps this one.
                assert!(content(&open(folder), &name) == expected);
            });
        }
        // The writers end whatever happens here.
        let collections: Vec<_> = (0..15).map(|_| store.collect(at_once(), &mut |_| Ok(()))).collect();
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        for collected in collections {
            collected.unwrap();
        }
    });
    let verified = store.verify(&mut |_| Ok(())).unwrap();
    assert!(verified.damages.is_empty() && verified.lost.is_empty(), "{verified:?}");
}

#[test]
fn what_one_thread_seals_is_found_whatever_others_read_of_the_catalog_meanwhile() {
    use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
    let folder = tempfile::tempdir().unwrap();
    let (store, other) = (open(&folder), open(&folder));
    let seal = |store: &Arc<Store>, seed| {
        let mut batch = store.batch_in(None).unwrap();
        let name = batch.put_chunk(&noise(seed, 16_384)).unwrap();
        batch.sync().unwrap();
        drop(batch);
        store.seal().unwrap();
        name
    };
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in (1 << 32..).take_while(|_| !stop.load(SeqCst)) {
                seal(&other, round);
            }
        });
        for _ in 0..2 {
            scope.spawn(|| {
                while !stop.load(SeqCst) {
                    store.index().refresh_segments(store.catalog()).unwrap()
                }
            });
        }
        let lost = (0..300).filter(|&round| store.index().find(&seal(&store, round)).unwrap().is_empty()).count();
        stop.store(true, SeqCst);
        assert_eq!(lost, 0);
    });
}

#[test]
fn a_flipped_bit_is_found_named_and_repaired_where_another_copy_is() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = noise(1, 4 << 20);
    // Two handles write the same at the same time, and so it is stored twice.
    let (one, two) = (open(&folder), open(&folder));
    let (a, b) = (volume(&one, "a", 8 * MIB), volume(&two, "b", 8 * MIB));
    a.write_at(0, &bytes).unwrap();
    a.write_at(5 * MIB, &noise(2, 1 << 20)).unwrap();
    b.write_at(0, &bytes).unwrap();
    a.close().unwrap();
    b.close().unwrap();
    drop((one, two));
    let store = open(&folder);
    let mut segments: Vec<_> =
        std::fs::read_dir(folder.path().join("segments")).unwrap().map(|entry| entry.unwrap().path()).collect();
    segments.sort();
    assert_eq!(segments.len(), 2);
    let flip = |at: u64| {
        let file = std::fs::File::options().read(true).write(true).open(&segments[0]).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 4], at).unwrap();
    };
    flip(1 << 20);
    // A header as well.
    flip(64 + (64 + 16_384) * 5 + 3);
    let verified = store.verify(&mut |_| Ok(())).unwrap();
    assert_eq!(verified.damages.len(), 2, "{verified:?}");
    assert!(verified.damages.iter().all(|damage| damage.segment == segments[0]));
    assert!(verified.lost.is_empty(), "{:?}", verified.lost);
    // Reading takes the whole copy.
    assert!(content(&open(&folder), "a")[..4 << 20] == bytes);
    let repaired = store.repair(&mut |_| Ok(())).unwrap();
    assert_eq!((repaired.rewritten_segments, repaired.lost.len()), (1, 0));
    let verified = store.verify(&mut |_| Ok(())).unwrap();
    assert!(verified.damages.is_empty() && verified.lost.is_empty(), "{verified:?}");
    assert!(content(&store, "a")[..4 << 20] == bytes);
}

/// Flips bits all over a part of a file.
fn flip_bits(path: &std::path::Path, range: std::ops::Range<u64>, step: usize) {
    let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
    for at in range.step_by(step) {
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 1 << (at % 8)], at).unwrap();
    }
}

#[test]
fn a_collection_with_a_damaged_index_removes_nothing_that_is_needed() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = noise(1, 14 << 20);
    {
        let store = open(&folder);
        let (kept, gone) = (volume(&store, "kept", 16 * MIB), volume(&store, "gone", 64 * MIB));
        // So many segments that some of them get a common run, and the last ones have tables of their own.
        for (part, bytes) in bytes.chunks(1 << 20).enumerate() {
            kept.write_at(part as u64 * MIB, bytes).unwrap();
            gone.write_at(part as u64 * MIB, &noise(100 + part as u64, 1 << 20)).unwrap();
            kept.compact().unwrap();
            gone.compact().unwrap();
            store.seal().unwrap();
            store.tidy().unwrap();
        }
        kept.close().unwrap();
        gone.close().unwrap();
        store.remove_volume("gone").unwrap();
    }
    let list = |what: &str, extension: &str| -> Vec<std::path::PathBuf> {
        let entries = std::fs::read_dir(folder.path().join(what)).unwrap();
        let paths = entries.map(|entry| entry.unwrap().path());
        paths.filter(|path| path.extension().is_some_and(|found| found == extension)).collect()
    };
    let runs = list("index", "run");
    assert!(!runs.is_empty());
    let whole: Vec<Vec<u8>> = runs.iter().map(|run| std::fs::read(run).unwrap()).collect();
    // Places in the entries, so that they lead elsewhere: in runs, and in the tables of segments.
    for run in &runs {
        let len = std::fs::metadata(run).unwrap().len();
        flip_bits(run, 64 + 16..len - 4096, 19 * 7);
    }
    let tables = list("segments", "seg");
    for segment in tables.iter().step_by(2) {
        let len = std::fs::metadata(segment).unwrap().len();
        flip_bits(segment, len - 64 - 19..len - 64 - 3, 5);
    }
    let store = open(&folder);
    let verified = store.verify(&mut |_| Ok(())).unwrap();
    assert!(verified.lost.is_empty(), "{:?}", verified.lost);
    for damaged in runs.iter().chain(tables.iter().step_by(2)) {
        assert!(verified.damages.iter().any(|damage| damage.segment == *damaged), "{}", damaged.display());
    }
    assert_eq!(verified.damages.len(), runs.len() + tables.len().div_ceil(2));
    assert!(content(&store, "kept")[..14 << 20] == bytes);
    let collected = collect(&store);
    assert!(collected.before.lost.is_empty() && collected.freed_bytes > 0);
    assert!(content(&store, "kept")[..14 << 20] == bytes);
    drop(store);
    // A process that only repairs.
    for (run, bytes) in runs.iter().zip(&whole).filter(|(run, _)| run.exists()) {
        assert!(std::fs::read(run).unwrap() != *bytes);
    }
    let store = open(&folder);
    let repaired = store.repair(&mut |_| Ok(())).unwrap();
    assert!(repaired.lost.is_empty());
    let verified = store.verify(&mut |_| Ok(())).unwrap();
    assert!(verified.damages.is_empty() && verified.lost.is_empty(), "{verified:?}");
    assert!(content(&open(&folder), "kept")[..14 << 20] == bytes);
}

#[test]
fn a_record_is_not_taken_for_another_whose_name_begins_alike() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder);
    let bytes = noise(1, 4096);
    let name = store.namer().name(crate::Kind::Data, &bytes);
    let mut alike = name;
    alike.0[31] ^= 1;
    for sealed in [false, true] {
        let mut batch = store.batch().unwrap();
        let header = Header {
            kind: crate::Kind::Data,
            packing: Packing::Raw,
            packed_len: 4096,
            content_len: 4096,
            name: alike,
            domain: 0,
            suite: Suite::Aes256Gcm,
            checksum: crc32c::crc32c(&noise(2, 4096)),
        };
        batch.put_packed(&header, &noise(2, 4096)).unwrap();
        batch.sync().unwrap();
        drop(batch);
        if sealed {
            store.seal().unwrap();
        }
        assert!(store.find_for_reuse(&alike).unwrap().is_some());
        assert!(store.find_for_reuse(&name).unwrap().is_none());
    }
    let mut batch = store.batch().unwrap();
    assert_eq!(batch.put_chunk(&bytes).unwrap(), name);
    batch.sync().unwrap();
    drop(batch);
    store.seal().unwrap();
    assert_eq!(store.read_local(&name).unwrap().content[..], bytes[..]);
}

#[test]
fn what_has_no_other_copy_is_named_with_who_needs_it_and_where() {
    let folder = tempfile::tempdir().unwrap();
    let disk = volume(&open(&folder), "disk", 8 * MIB);
    disk.write_at(3 * MIB, &noise(1, 16_384)).unwrap();
    disk.snapshot("saved").unwrap();
    disk.close().unwrap();
    let segment = std::fs::read_dir(folder.path().join("segments")).unwrap().next().unwrap().unwrap().path();
    let file = std::fs::File::options().write(true).open(segment).unwrap();
    file.write_all_at(b"flood", 500).unwrap();
    let store = open(&folder);
    let verified = store.verify(&mut |_| Ok(())).unwrap();
    assert_eq!(verified.damages.len(), 1);
    let lost: Vec<_> = verified.lost.iter().map(|lost| (lost.owner.as_str(), lost.offset)).collect();
    assert_eq!(lost, [("volume disk", Some(3 * MIB)), ("snapshot saved of volume disk", Some(3 * MIB))]);
    let disk = Volume::open(&store, "disk", VolumeOptions::default()).unwrap();
    let mut bytes = [0; 4096];
    assert!(matches!(disk.read_at(3 * MIB, &mut bytes), Err(StoreError::Damaged { .. })));
    disk.read_at(0, &mut bytes).unwrap();
}

#[test]
fn a_collection_keeps_all_that_a_node_holds_and_not_its_parent() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder);
    let mut batch = store.batch().unwrap();
    let mut tree = |name: &str, seed: u64| {
        let changes: Vec<_> = (0..300).map(|at| (at, batch.put_chunk(&noise(seed + at, 16_384)).unwrap())).collect();
        let root = tree::update(&mut batch, Root::empty(300), &changes).unwrap();
        Tree { name: name.to_owned(), root, len_bytes: 300 * 16_384, chunk_len: 16_384, domain: 0 }
    };
    let [disk, memory, machine, before] = [("disk", 0), ("memory", 1000), ("machine", 2000), ("before", 3000)]
        .map(|(name, seed)| (tree(name, seed), seed));
    let parent = Node { disks: vec![before.0.clone()], ..Node::default() }.put(&mut batch).unwrap();
    let facts = BTreeMap::from([("title".to_owned(), "saved".to_owned())]);
    let node = Node {
        disks: vec![disk.0.clone()],
        memories: vec![memory.0.clone()],
        files: vec![machine.0.clone()],
        parent: Some(parent),
        created_ns: 1,
        facts,
    };
    let name = node.put(&mut batch).unwrap();
    // Many others, so that their records are neighbours and lie in several pages of the index.
    let others: Vec<_> = (0..300)
        .map(|created_ns| Node { parent: Some(parent), created_ns, ..Node::default() }.put(&mut batch).unwrap())
        .collect();
    batch.sync().unwrap();
    let image = |name: &str, node| ImageRow { name: name.to_owned(), created_ns: 0, node };
    store.catalog().add_image(&image("saved", name), Replace::No).unwrap();
    for (number, other) in others.iter().enumerate() {
        store.catalog().add_image(&image(&format!("other-{number}"), *other), Replace::No).unwrap();
    }
    drop(batch);
    store.seal().unwrap();
    let options = CollectOptions { needed_percent_min: 101, ..at_once() };
    let collected = store.collect(options, &mut |_| Ok(())).unwrap();
    assert!(collected.freed_bytes - collected.rewritten_bytes > 4 * MIB, "{collected:?}");
    let store = open(&folder);
    assert_eq!(store.load_node(&name).unwrap(), node);
    for (tree, seed) in [disk, memory, machine] {
        let mut bytes = vec![0; tree.len_bytes as usize];
        TreeSource::new(&store, &tree).read_at(0, &mut bytes).unwrap();
        let right = bytes.chunks(16_384).zip(seed..).all(|(chunk, seed)| chunk == noise(seed, 16_384));
        assert!(right, "{}", tree.name);
    }
    assert!(others.iter().all(|other| store.load_node(other).is_ok()));
    assert!(matches!(store.load_node(&parent), Err(StoreError::Missing { .. })));
    let before = TreeSource::new(&store, &before.0).read_at(0, &mut [0; 4096]);
    assert!(before.is_err());
    assert_eq!(store.usage(&mut |_| Ok(())).unwrap().used_bytes, 3 * 300 * 16_384);
}

#[test]
fn a_collection_names_the_snapshot_whose_node_is_gone_and_reads_another_copy_of_one_that_is_damaged() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder);
    let disk = volume(&store, "disk", 8 * MIB);
    disk.write_at(0, &noise(1, 16_384)).unwrap();
    disk.snapshot("saved").unwrap();
    disk.close().unwrap();
    store.seal().unwrap();
    let node = store.snapshot("disk", "saved").unwrap().node.unwrap();
    let (header, packed) = store.read_packed(&node).unwrap();
    let location = store.index().find_all(&node).unwrap()[0];
    let mut batch = store.batch().unwrap();
    batch.put_packed(&header, &packed).unwrap();
    batch.sync().unwrap();
    drop(batch);
    store.seal().unwrap();
    // The copy that the collection looks at first.
    let file = std::fs::File::options().write(true).open(store.segment_path(location)).unwrap();
    file.write_all_at(b"flood", location.offset() + 64).unwrap();
    assert_eq!(store.usage(&mut |_| Ok(())).unwrap().lost, []);
    let second = store.index().find_all(&node).unwrap()[1];
    let file = std::fs::File::options().write(true).open(store.segment_path(second)).unwrap();
    file.write_all_at(b"flood", second.offset() + 64).unwrap();
    let error = store.collect(at_once(), &mut |_| Ok(())).unwrap_err().to_string();
    assert!(error.contains("snapshot saved of volume disk needs"), "{error}");
}

#[test]
fn an_image_is_brought_in_and_out_unchanged() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder);
    let path = folder.path().join("disk.raw");
    let mut bytes = vec![0; 9 << 20];
    bytes[..3 << 20].copy_from_slice(&noise(1, 3 << 20));
    bytes[(7 << 20) + 512..(8 << 20)].copy_from_slice(&noise(2, (1 << 20) - 512));
    std::fs::write(&path, &bytes).unwrap();
    let facts = BTreeMap::from([("kernel".to_owned(), "6.1".to_owned())]);
    let mut node = store.new_node(facts.clone()).unwrap();
    node.add_disk("root", &RawSource::open(&path).unwrap(), &mut |_| Ok(())).unwrap();
    node.save_as_image("debian", Replace::No).unwrap();
    let mut node = store.new_node(facts).unwrap();
    node.add_disk("root", &RawSource::open(&path).unwrap(), &mut |_| Ok(())).unwrap();
    assert!(matches!(node.save_as_image("debian", Replace::No), Err(StoreError::Exists { .. })));
    let (_, node) = store.image("debian").unwrap();
    let source = TreeSource::new(&store, &node.disks[0]);
    let out = folder.path().join("out.raw");
    let mut target = format::RawTarget::create(&out, node.disks[0].len_bytes).unwrap();
    format::copy(&source, &mut target, std::num::NonZero::new(2).unwrap(), &mut |_| {}).unwrap();
    assert!(std::fs::read(&out).unwrap() == bytes);
    store.create_volume("instance", &Content::Image("debian")).unwrap();
    assert!(content(&store, "instance") == bytes);
}

#[test]
fn a_queue_reads_writes_and_answers_questions() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(&folder);
    let disk = volume(&store, "disk", 32 * MIB);
    let bytes = noise(1, 1 << 20);
    disk.write_at(MIB, &bytes).unwrap();
    disk.snapshot("before").unwrap();
    disk.close().unwrap();
    drop(store);
    let store = open(&folder);
    let disk = Arc::new(OpenDisk::Volume(Volume::open(&store, "disk", VolumeOptions::default()).unwrap()));
    let mut queue = disk.open_queue::<Vec<u8>>().unwrap();
    let mut expected = vec![0; 32 << 20];
    expected[1 << 20..2 << 20].copy_from_slice(&bytes);
    let mut token = 0;
    let mut run = |operation| {
        token += 1;
        queue.submit(token, operation);
        let completion = loop {
            if let Some(completion) = queue.next_completion() {
                break completion;
            }
            let mut waited = [rustix::event::PollFd::from_borrowed_fd(queue.signal(), rustix::event::PollFlags::IN)];
            rustix::event::poll(&mut waited, Some(&rustix::time::Timespec { tv_sec: 10, tv_nsec: 0 })).unwrap();
            let _ = rustix::io::read(queue.signal(), &mut [0; 8]);
        };
        assert_eq!(completion.token, token);
        completion.result.map(|()| completion.buffer.unwrap_or_default())
    };
    for (offset, len) in [(0, 512), (MIB - 4096, 16_384), (MIB + 512, 100 * 512), (0, 4 << 20)] {
        // From the host's disk first, from memory then.
        for _ in 0..2 {
            let read = run(Operation::Read { offset, buffer: vec![9; len] }).unwrap();
            assert!(read == expected[offset as usize..offset as usize + len], "{offset} {len}");
        }
    }
    let more = noise(2, 12_288);
    for offset in [4096, 20 * MIB + 512] {
        let write = Operation::Write { offset, buffer: more.clone(), durability: Durability::Stable };
        run(write).unwrap();
        expected[offset as usize..offset as usize + more.len()].copy_from_slice(&more);
    }
    run(Operation::Discard { offset: MIB, len: 8192, durability: Durability::Cached }).unwrap();
    expected[1 << 20..(1 << 20) + 8192].fill(0);
    run(Operation::Flush).unwrap();
    let read = run(Operation::Read { offset: 0, buffer: vec![9; 32 << 20] }).unwrap();
    assert!(read == expected);
    assert!(run(Operation::Read { offset: 32 * MIB, buffer: vec![0; 512] }).is_err());
    drop(queue);
    let parts = |question| {
        let extents = disk.extents(&question, 0, 32 * MIB, 100).unwrap();
        extents.iter().filter(|extent| extent.set).map(|&Extent { offset, len, .. }| (offset, len)).collect::<Vec<_>>()
    };
    assert_eq!(parts(Question::Allocated), [(4096, 12_288), (MIB + 8192, MIB - 8192), (20 * MIB, 16_384)]);
    let changed = parts(Question::ChangedSince("before".to_owned()));
    assert_eq!(changed, [(4096, 12_288), (MIB, 8192), (20 * MIB, 16_384)]);
    assert!(disk.extents(&Question::ChangedSince("never".to_owned()), 0, 512, 1).is_err());
}
