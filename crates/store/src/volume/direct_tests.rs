//! Long writes beside a vector of bytes that does the same: what goes straight into segments, and what a crash and a collection make of it.

use polder_trust::keys::{KeyFile, Secret};

use super::*;
use crate::domain::Key;
use crate::name::Kind;
use crate::test_store::{TestStore, at_once, noise, quiet, volume_content};
use crate::volume::extent_map::Place;
use crate::volume::volumes::Content;
use crate::{CollectOptions, Store};

const MIB: usize = 1 << 20;
const CHUNK: usize = 16 << 10;

/// Every long write is one of a stream.
fn options() -> VolumeOptions {
    VolumeOptions { stream_bytes: 0, settle: Duration::from_secs(3600), ..VolumeOptions::default() }
}

fn create(store: &Arc<Store>, name: &str, mib: u64, domain: Option<&str>) -> Volume {
    let content = Content::Zeros { capacity_bytes: mib << 20, chunk_len: CHUNK as u32 };
    store.create_volume_in(name, &content, domain).unwrap();
    Volume::open(store, name, options()).unwrap()
}

/// Chunks that the volume's log names.
fn named(volume: &Volume) -> u64 {
    let layers = volume.core().layers();
    layers.active.named + layers.frozen.as_ref().map_or(0, |frozen| frozen.generation.named)
}

/// Ends a volume as a process does that is killed: nothing is moved, nothing flushed.
fn abandon(volume: Volume) {
    drop(volume);
}

#[test]
fn long_writes_leave_only_names_in_the_log() {
    for domain in [None, Some("secret")] {
        let store = TestStore::new();
        store.create_domain("secret", &Key::File(KeyFile::of(Secret::random().unwrap())), None).unwrap();
        let volume = create(&store, "disk", 8, domain);
        let mut expected = vec![0; 8 * MIB];
        let write = |expected: &mut Vec<u8>, at: usize, bytes: &[u8]| {
            volume.write_at(at as u64, bytes).unwrap();
            expected[at..at + bytes.len()].copy_from_slice(bytes);
            assert!(volume_content(&volume) == *expected, "after {} bytes at {at}", bytes.len());
        };
        // Not on a chunk's border, at neither end, and with zeros in the middle.
        let mut long = noise(1, 3 * MIB);
        long[MIB..2 * MIB].fill(0);
        write(&mut expected, 5 * 4096 + 512, &long);
        let logged = volume.core().backlog_bytes();
        assert!(logged < 128 << 10, "{logged} bytes of log for three megabytes");
        assert!(named(&volume) >= 3 * 64 - 4);
        // Parts of what lies in such chunks, written anew both ways.
        write(&mut expected, MIB / 2 + 100 * 512, &noise(2, 8192));
        write(&mut expected, 2 * MIB + 512 * 3, &noise(3, 200 << 10));
        volume.zero(CHUNK as u64 * 7 + 4096, 40_960).unwrap();
        expected[CHUNK * 7 + 4096..][..40_960].fill(0);
        assert!(volume_content(&volume) == expected);
        volume.snapshot("between").unwrap();
        let at_snapshot = expected.clone();
        write(&mut expected, 0, &noise(4, 2 * MIB));
        volume.compact().unwrap();
        assert_eq!(named(&volume), 0);
        assert!(volume_content(&volume) == expected, "from the tree");
        volume.close().unwrap();
        store.clone_volume("disk", Some("between"), "then").unwrap();
        let then = Volume::open(&store, "then", options()).unwrap();
        assert!(volume_content(&then) == at_snapshot, "the snapshot");
        assert!(volume_content(&Volume::open(&store, "disk", options()).unwrap()) == expected, "opened again");
        let verified = store.verify(&mut quiet).unwrap();
        assert!(verified.damages.is_empty() && verified.lost.is_empty(), "{verified:?}");
    }
}

#[test]
fn short_writes_and_those_soon_after_a_flush_go_through_the_log() {
    let store = TestStore::new();
    let content = Content::Zeros { capacity_bytes: 8 << 20, chunk_len: CHUNK as u32 };
    store.create_volume("disk", &content).unwrap();
    let volume = Volume::open(&store, "disk", VolumeOptions { stream_bytes: 2 << 20, ..options() }).unwrap();
    let write = |at: usize, len: usize| volume.write_at(at as u64, &noise(at as u64, len)).unwrap();
    write(0, MIB);
    write(MIB, MIB);
    assert_eq!(named(&volume), 0, "the stream has only begun");
    write(2 * MIB, 3 * CHUNK);
    assert_eq!(named(&volume), 0, "too short");
    write(2 * MIB, MIB);
    assert_eq!(named(&volume), 64);
    volume.flush().unwrap();
    write(3 * MIB, MIB);
    assert_eq!(named(&volume), 64, "after a flush");
}

#[test]
fn what_was_flushed_comes_back_from_names_in_the_log() {
    let store = TestStore::new();
    let volume = create(&store, "disk", 8, None);
    let bytes = noise(1, 4 * MIB);
    volume.write_at(0, &bytes).unwrap();
    volume.flush().unwrap();
    assert!(!volume.core().owes_chunks());
    abandon(volume);
    let volume = Volume::open(&store, "disk", options()).unwrap();
    assert_eq!(named(&volume), 256);
    assert!(volume_content(&volume)[..4 * MIB] == bytes);
    volume.close().unwrap();
    assert!(volume_content(&Volume::open(&store, "disk", options()).unwrap())[..4 * MIB] == bytes);
}

/// A volume that was abandoned with a record, appended after a flush, whose chunk is nowhere, and others behind it.
fn with_a_lost_chunk(store: &Arc<Store>, flush_after: bool) -> Vec<u8> {
    let volume = create(store, "disk", 8, None);
    let bytes = noise(1, MIB);
    volume.write_at(0, &bytes).unwrap();
    volume.flush().unwrap();
    let lost = store.namer().name(Kind::Data, &noise(2, CHUNK));
    let change = log_record::Change::Chunks { offset: 0, len: CHUNK as u64 };
    // Not at the beginning of a page.
    volume.core().append_record(log_record::Change::Zeros { offset: MIB as u64, len: 4096 }, &[], 0, None).unwrap();
    volume.core().append_record(change, &lost.0, CHUNK, None).unwrap();
    volume.write_at(4 << 20, &noise(3, 4096)).unwrap();
    if flush_after {
        volume.flush().unwrap();
        volume.write_at(5 << 20, &noise(4, 4096)).unwrap();
    }
    abandon(volume);
    bytes
}

#[test]
fn a_record_whose_chunks_a_crash_took_does_not_count_nor_does_it_later() {
    let store = TestStore::new();
    let bytes = with_a_lost_chunk(&store, false);
    let volume = Volume::open(&store, "disk", options()).unwrap();
    let mut expected = vec![0; 8 * MIB];
    expected[..MIB].copy_from_slice(&bytes);
    assert!(volume_content(&volume) == expected);
    // Others take its place; then its chunk turns up.
    let later = noise(5, 4096);
    for block in 0..4 {
        volume.write_at(6 * MIB as u64 + block * 4096, &later).unwrap();
        expected[6 * MIB + block as usize * 4096..][..4096].copy_from_slice(&later);
        volume.flush().unwrap();
    }
    store.batch().unwrap().put_chunk(&noise(2, CHUNK)).unwrap();
    abandon(volume);
    assert!(volume_content(&Volume::open(&store, "disk", options()).unwrap()) == expected);
}

#[test]
fn a_promised_record_whose_chunks_are_gone_is_damage() {
    let store = TestStore::new();
    with_a_lost_chunk(&store, true);
    let error = Volume::open(&store, "disk", options()).map(drop).unwrap_err().to_string();
    assert!(error.contains("names chunks that are not there"), "{error}");
    let lost = store.usage(&mut quiet).unwrap().lost;
    assert_eq!((lost.len(), lost[0].owner.as_str(), lost[0].offset), (1, "volume disk", Some(0)));
}

#[test]
fn a_collection_leaves_what_only_a_log_names() {
    let store = TestStore::new();
    let keep = create(&store, "keep", 8, None);
    let closed = create(&store, "closed", 8, None);
    let bytes = [noise(1, 2 * MIB), noise(2, 2 * MIB)];
    // Beside each, what nothing needs any more.
    for (volume, bytes) in [&keep, &closed].into_iter().zip(&bytes) {
        volume.write_at(0, &noise(7, 4 * MIB)).unwrap();
        volume.compact().unwrap();
        volume.write_at(0, bytes).unwrap();
        volume.zero(2 << 20, 2 << 20).unwrap();
        volume.flush().unwrap();
    }
    keep.compact().unwrap();
    keep.write_at(4 << 20, &noise(3, MIB)).unwrap();
    abandon(closed);
    store.seal().unwrap();
    let all = CollectOptions { needed_percent_min: 100, ..at_once() };
    let collected = store.collect(all, &mut quiet).unwrap();
    assert!(collected.freed_bytes > 4 << 20, "{collected:?}");
    assert!(volume_content(&keep)[..2 * MIB] == bytes[0]);
    assert!(volume_content(&keep)[4 * MIB..5 * MIB] == noise(3, MIB));
    let closed = Volume::open(&store, "closed", options()).unwrap();
    assert_eq!(named(&closed), 128);
    assert!(volume_content(&closed)[..2 * MIB] == bytes[1]);
}

#[test]
fn while_a_collection_is_at_its_end_long_writes_go_through_the_log() {
    let store = TestStore::new();
    let volume = create(&store, "disk", 8, None);
    let alone = store.lock_out_batches().unwrap();
    let bytes = noise(1, MIB);
    volume.write_at(0, &bytes).unwrap();
    assert_eq!(named(&volume), 0);
    drop(alone);
    volume.write_at(MIB as u64, &bytes).unwrap();
    assert_eq!(named(&volume), 64);
    assert!(volume_content(&volume)[..2 * MIB] == [&bytes[..], &bytes[..]].concat());
}

#[test]
fn places_in_named_chunks_move_with_what_is_cut() {
    let store = TestStore::new();
    let volume = create(&store, "disk", 1, None);
    volume.write_at(0, &noise(1, 8 * CHUNK)).unwrap();
    volume.write_at(5 * 4096, &noise(2, 4096)).unwrap();
    let (parts, _) = volume.core().layered(0..8 * CHUNK as u64);
    let blocks: Vec<Option<u32>> = parts
        .iter()
        .map(|(_, place)| match place {
            Some(Place::Chunks(place)) => Some(place.block),
            _ => None,
        })
        .collect();
    assert_eq!(blocks, [Some(0), None, Some(6)]);
}

/// Everything that is done to volumes, in any order, and what snapshots and the volume hold then.
#[test]
fn whatever_is_done_long_writes_are_as_others() {
    let seed = std::env::var("POLDER_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64);
    println!("POLDER_SEED={seed}");
    let mut state = seed;
    let mut below = move |end: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % end
    };
    let begin = std::time::Instant::now();
    while begin.elapsed() < Duration::from_secs(4) {
        let store = TestStore::new();
        let mut volume = Some(create(&store, "disk", 3, None));
        let mut expected = vec![0; 3 * MIB];
        let mut snapshots: Vec<(String, Vec<u8>)> = Vec::new();
        let mut done = Vec::new();
        for step in 0..60 {
            let open = volume.as_ref().unwrap();
            let choice = below(20);
            done.push(match choice {
                0..8 => {
                    let at = below(expected.len() / 512) * 512;
                    let len = (1 + below(1000) * 512).next_multiple_of(512).min(expected.len() - at);
                    let bytes = noise(below(1 << 30) as u64, len);
                    open.write_at(at as u64, &bytes).unwrap();
                    expected[at..at + len].copy_from_slice(&bytes);
                    format!("write {len} at {at}")
                }
                8..11 => {
                    let at = below(expected.len() / 512) * 512;
                    let len = (below(100) * 512).min(expected.len() - at);
                    open.zero(at as u64, len as u64).unwrap();
                    expected[at..at + len].fill(0);
                    format!("zero {len} at {at}")
                }
                11..13 => {
                    let len = MIB + below(4096) * 512;
                    open.resize(len as u64).unwrap();
                    expected.resize(len, 0);
                    format!("resize to {len}")
                }
                13..15 => {
                    let name = format!("s{step}");
                    open.snapshot(&name).unwrap();
                    snapshots.push((name, expected.clone()));
                    "snapshot".to_owned()
                }
                15 => {
                    open.compact().unwrap();
                    "compact".to_owned()
                }
                16 => {
                    store.seal().unwrap();
                    "seal".to_owned()
                }
                17 => {
                    store.collect(CollectOptions { needed_percent_min: 100, ..at_once() }, &mut quiet).unwrap();
                    "collect".to_owned()
                }
                18 => {
                    open.flush().unwrap();
                    "flush".to_owned()
                }
                _ => {
                    abandon(volume.take().unwrap());
                    volume = Some(Volume::open(&store, "disk", options()).unwrap());
                    "abandon".to_owned()
                }
            });
            let found = volume_content(volume.as_ref().unwrap());
            let differs = found.iter().zip(&expected).position(|(found, expected)| found != expected);
            assert!(found == expected, "seed {seed}, at {differs:?} after {done:#?}");
        }
        volume.take().unwrap().close().unwrap();
        for (name, content) in &snapshots {
            store.clone_volume("disk", Some(name), &format!("of-{name}")).unwrap();
            let clone = Volume::open(&store, &format!("of-{name}"), options()).unwrap();
            let found = volume_content(&clone);
            let differs = found.iter().zip(content).position(|(found, expected)| found != expected);
            assert!(found == *content, "seed {seed}: snapshot {name} at {differs:?} after {done:#?}");
        }
    }
}
