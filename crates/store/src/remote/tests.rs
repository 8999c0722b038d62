//! A remote store in memory, which counts what is asked of it and can be switched off; and a real one, where there is a server.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering};
use std::sync::{Barrier, Mutex};
use std::time::Instant;

use super::bucket::{Bucket, BucketError, Object};
use super::*;
use crate::test_store::{TestStore, image, image_content, noise, quiet};
use crate::transfer::testbench::image_of;
use crate::{CollectOptions, Content, StoreError, StoreOptions, Volume, VolumeOptions};

const CHUNK: usize = 16 << 10;

#[derive(Default)]
struct MemoryBucket {
    objects: Mutex<BTreeMap<String, (Vec<u8>, i64)>>,
    ranges: Mutex<Vec<(String, Range<u64>)>>,
    down: AtomicBool,
    /// Segments that are still taken.
    segments_left: AtomicUsize,
    now_ms: AtomicI64,
}

impl MemoryBucket {
    fn new() -> Arc<Self> {
        let bucket = MemoryBucket::default();
        bucket.segments_left.store(usize::MAX, Ordering::Relaxed);
        Arc::new(bucket)
    }

    fn answer<T>(
        &self,
        path: &str,
        act: impl FnOnce(&mut BTreeMap<String, (Vec<u8>, i64)>) -> Option<T>,
    ) -> Result<T, BucketError> {
        assert!(path.starts_with("store/"), "{path}");
        if self.down.load(Ordering::Relaxed) {
            return Err(BucketError::Again("connection refused".to_owned()));
        }
        act(&mut self.objects.lock().unwrap()).ok_or(BucketError::NotFound)
    }

    fn names(&self, folder: &str) -> Vec<String> {
        let folder = format!("store/{folder}/");
        self.objects.lock().unwrap().keys().filter(|name| name.starts_with(&folder)).cloned().collect()
    }

    fn bytes(&self) -> usize {
        self.objects.lock().unwrap().values().map(|(bytes, _)| bytes.len()).sum()
    }

    fn take_ranges(&self) -> Vec<(String, Range<u64>)> {
        std::mem::take(&mut self.ranges.lock().unwrap())
    }
}

impl Bucket for Arc<MemoryBucket> {
    fn put(&self, path: &str, bytes: Vec<u8>) -> Result<(), BucketError> {
        if path.starts_with("store/segments/") {
            let left =
                self.segments_left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
            if left.is_err() {
                return Err(BucketError::Credentials("signature does not match".to_owned()));
            }
        }
        let now = self.now_ms.load(Ordering::Relaxed);
        self.answer(path, |objects| {
            objects.insert(path.to_owned(), (bytes, now));
            Some(())
        })
    }

    fn get(&self, path: &str) -> Result<Vec<u8>, BucketError> {
        self.answer(path, |objects| objects.get(path).map(|(bytes, _)| bytes.clone()))
    }

    fn get_range(&self, path: &str, range: Range<u64>) -> Result<Vec<u8>, BucketError> {
        self.answer(path, |objects| {
            let (bytes, _) = objects.get(path)?;
            let range = range.start..range.end.min(bytes.len() as u64);
            self.ranges.lock().unwrap().push((path.to_owned(), range.clone()));
            Some(bytes[range.start as usize..range.end as usize].to_vec())
        })
    }

    fn remove(&self, path: &str) -> Result<(), BucketError> {
        self.answer(path, |objects| objects.remove(path).map(drop))
    }

    fn list(&self, folder: &str) -> Result<Vec<Object>, BucketError> {
        self.answer(&format!("{folder}/"), |objects| {
            let object = |(path, (bytes, modified_ms)): (&String, &(Vec<u8>, i64))| {
                let name = path.strip_prefix(folder)?.strip_prefix('/')?.to_owned();
                Some(Object { name, bytes: bytes.len() as u64, modified_ms: *modified_ms })
            };
            Some(objects.iter().filter_map(object).collect())
        })
    }
}

const PATIENCE: Duration = Duration::from_secs(3);

fn remote(bucket: &Arc<MemoryBucket>) -> Remote {
    let client = Client::new(Box::new(bucket.clone()), "/store/", PATIENCE);
    Remote { client: Arc::new(client), address: RemoteAddress::new("s3://bucket/store") }
}

/// Nothing in memory helps a store.
const NO_CACHE: StoreOptions = StoreOptions { chunk_cache_bytes: 0, node_cache_bytes: 0 };

fn store() -> TestStore {
    TestStore::with(NO_CACHE)
}

fn open(folder: &tempfile::TempDir) -> Arc<Store> {
    Store::open(folder.path(), NO_CACHE).unwrap()
}

fn push(remote: &Remote, store: &Arc<Store>, name: &str) -> Pushed {
    remote.push(store, &image(name), &TransferOptions::new(name), &mut quiet).unwrap()
}

fn volume(store: &Arc<Store>, image: &str, name: &str) -> Volume {
    store.create_volume(name, &Content::Image(image)).unwrap();
    Volume::open(store, name, VolumeOptions::default()).unwrap()
}

#[test]
fn only_what_a_remote_store_lacks_goes_there_and_only_what_we_lack_comes_back() {
    let (bucket, here, there) = (MemoryBucket::new(), store(), store());
    let remote = remote(&bucket);
    let mut bytes = noise(1, 1200 * CHUNK);
    image_of(&here, "first", &bytes);
    let first = push(&remote, &here, "first");
    assert_eq!((first.records, first.segments), (1200 + 10 + 1 + 1, 2));
    let all = bucket.bytes();
    assert!(all < bytes.len() * 102 / 100, "{all}");
    let renamed = remote.push(&here, &image("first"), &TransferOptions::new("first2"), &mut quiet).unwrap();
    assert_eq!((renamed.records, renamed.segments), (0, 0));
    bytes[500 * CHUNK..560 * CHUNK].copy_from_slice(&noise(2, 60 * CHUNK));
    image_of(&here, "second", &bytes);
    let second = push(&remote, &here, "second");
    assert!((60..=64).contains(&second.records), "{second:?}");
    assert!(bucket.bytes() - all < 61 * CHUNK + 10_000);
    let twice = remote.push(&here, &image("second"), &TransferOptions::new("second"), &mut quiet);
    assert!(matches!(twice, Err(RemoteError::Exists { .. })), "{twice:?}");

    let listed: Vec<String> = remote.list().unwrap().into_iter().map(|image| image.name).collect();
    assert_eq!(listed, ["first", "first2", "second"]);
    let mut last = 0;
    remote
        .pull(&there, "second", &TransferOptions::new("copy"), &mut |step| {
            last = step.done;
            Ok(())
        })
        .unwrap();
    assert!(last > 1190 * CHUNK as u64);
    assert!(image_content(&there, "copy").unwrap() == bytes);
    bucket.take_ranges();
    remote.pull(&there, "first", &TransferOptions::new("first"), &mut quiet).unwrap();
    let fetched: u64 = bucket.take_ranges().iter().map(|(_, range)| range.end - range.start).sum();
    assert!(fetched < 6 << 20, "{fetched}");
    assert!(image_content(&there, "first").unwrap() == image_content(&here, "first").unwrap());
    let verified = there.verify(&mut quiet).unwrap();
    assert!(verified.damages.is_empty() && verified.lost.is_empty(), "{verified:?}");
}

#[test]
fn an_attached_image_is_read_and_written_while_it_is_still_remote() {
    let (bucket, here, there) = (MemoryBucket::new(), store(), store());
    let remote = remote(&bucket);
    let bytes = noise(3, 1500 * CHUNK);
    image_of(&here, "disk", &bytes);
    push(&remote, &here, "disk");
    let attached = remote.attach(&there, "disk", &TransferOptions::new("disk")).unwrap();
    let disk = volume(&there, "disk", "volume");
    // As a boot does: here and there, some of it twice.
    let mut part = vec![0; 4096];
    for step in 0..40usize {
        let at = step * 7919 % 300 * 65_536 + 4096;
        disk.read_at(at as u64, &mut part).unwrap();
        assert!(part == bytes[at..at + 4096]);
    }
    disk.write_at(70 * CHUNK as u64, &[9; 512]).unwrap();
    let fetched = attached.fetched_bytes();
    assert!(fetched < 8 << 20, "{fetched}");
    let Locality::Part { local_bytes } = locality(&there, "disk") else { panic!("most of it is remote") };
    assert!(local_bytes > 40 * CHUNK as u64 && local_bytes <= fetched, "{local_bytes} of {fetched}");
    assert!(needed_by(&there, &remote.address).unwrap().contains(&"image disk".to_owned()));
    // Collected, closed, opened by a process that knows no network: nothing is lost.
    disk.close().unwrap();
    there.seal().unwrap();
    let usage = there.usage(&mut quiet).unwrap();
    assert!(usage.lost.is_empty(), "{usage:?}");
    there.collect(CollectOptions::default(), &mut quiet).unwrap();
    let again = open(&there.folder);
    again.collect(CollectOptions::default(), &mut quiet).unwrap();
    assert!(again.verify(&mut quiet).unwrap().lost.is_empty());
    assert!(matches!(image_content(&again, "disk"), Err(StoreError::Missing { .. })));
    assert_eq!(attached_urls(&again), ["s3://bucket/store"]);
    // With the network, everything is there, and what came before comes no more.
    let resumed = remote.resume(&again);
    let volume = Volume::open(&again, "volume", VolumeOptions::default()).unwrap();
    let mut whole = vec![0; bytes.len()];
    volume.read_at(0, &mut whole).unwrap();
    let mut expected = bytes.clone();
    expected[70 * CHUNK..70 * CHUNK + 512].fill(9);
    assert!(whole == expected);
    volume.close().unwrap();
    let rest = resumed.fetched_bytes();
    assert!(fetched + rest < bytes.len() as u64 * 125 / 100, "{fetched} and {rest}");
    assert_eq!(locality(&again, "disk"), Locality::Whole);
    // Whole now: without the remote store nothing is missing.
    assert!(needed_by(&again, &remote.address).unwrap().is_empty());
    detach(&again, &remote.address).unwrap();
    assert!(again.usage(&mut quiet).unwrap().lost.is_empty());
    bucket.down.store(true, Ordering::Relaxed);
    assert!(image_content(&again, "disk").unwrap() == bytes);
}

fn locality(store: &Arc<Store>, image: &str) -> Locality {
    let (row, node) = store.image(image).unwrap();
    Elsewhere::load(store).unwrap().locality(store, &row.node, node.trees()).unwrap()
}

fn attached_urls(store: &Store) -> Vec<String> {
    super::attached(store.folder()).unwrap().into_iter().map(|address| address.url).collect()
}

#[test]
fn who_reads_on_gets_more_at_a_time() {
    let (bucket, here, there) = (MemoryBucket::new(), store(), store());
    let remote = remote(&bucket);
    let bytes = noise(14, 1500 * CHUNK);
    image_of(&here, "disk", &bytes);
    push(&remote, &here, "disk");
    remote.attach(&there, "disk", &TransferOptions::new("disk")).unwrap();
    bucket.take_ranges();
    assert!(image_content(&there, "disk").unwrap() == bytes);
    // 24 MiB in two segments, at first 128 KiB at a time and in the end 2 MiB.
    let ranges = bucket.take_ranges();
    let lens: Vec<u64> = ranges.iter().map(|(_, range)| range.end - range.start).collect();
    assert!((12..=32).contains(&lens.len()) && lens[0] <= 128 << 10, "{lens:?}");
    assert!(lens.iter().sum::<u64>() < bytes.len() as u64 * 102 / 100, "{lens:?}");
}

#[test]
fn readers_at_once_fetch_each_record_once() {
    let (bucket, here, there) = (MemoryBucket::new(), store(), store());
    let remote = remote(&bucket);
    let bytes = noise(4, 400 * CHUNK);
    image_of(&here, "disk", &bytes);
    push(&remote, &here, "disk");
    let attached = remote.attach(&there, "disk", &TransferOptions::new("disk")).unwrap();
    bucket.take_ranges();
    let before = attached.fetched_bytes();
    let barrier = Barrier::new(8);
    std::thread::scope(|scope| {
        for reader in 0..8usize {
            let (barrier, there, bytes) = (&barrier, &there, &bytes);
            scope.spawn(move || {
                let (_, node) = there.image("disk").unwrap();
                let mut source = crate::tree::reader::TreeReader::new(there, node.disks[0].root, CHUNK, 0);
                for round in 0..100 {
                    barrier.wait();
                    // All eight ask for the same, or for neighbours of it.
                    let chunk = (round * 37 + if round % 2 == 0 { 0 } else { reader }) % 400;
                    let found = source.chunk(chunk as u64).unwrap().unwrap();
                    assert!(found[..] == bytes[chunk * CHUNK..(chunk + 1) * CHUNK]);
                }
            });
        }
    });
    let mut ranges = bucket.take_ranges();
    let fetched: u64 = ranges.iter().map(|(_, range)| range.end - range.start).sum();
    assert_eq!(fetched, attached.fetched_bytes() - before);
    ranges.sort_by_key(|(path, range)| (path.clone(), range.start));
    for pair in ranges.windows(2) {
        // A range may end inside a record, which then comes with the next: no record comes whole in two.
        let shared = pair[0].1.end.saturating_sub(pair[1].1.start);
        assert!(pair[0].0 != pair[1].0 || shared < CHUNK as u64 + 192, "{pair:?}");
    }
    assert!(ranges.len() > 20, "{}", ranges.len());
}

#[test]
fn reads_outlast_a_server_that_is_stopped_and_started_and_end_when_it_stays_away() {
    let (bucket, here, there) = (MemoryBucket::new(), store(), store());
    let remote = remote(&bucket);
    let bytes = noise(5, 200 * CHUNK);
    image_of(&here, "disk", &bytes);
    push(&remote, &here, "disk");
    remote.attach(&there, "disk", &TransferOptions::new("disk")).unwrap();
    let (_, node) = there.image("disk").unwrap();
    let mut reader = crate::tree::reader::TreeReader::new(&there, node.disks[0].root, CHUNK, 0);
    assert!(reader.chunk(0).unwrap().unwrap()[..] == bytes[..CHUNK]);
    bucket.down.store(true, Ordering::Relaxed);
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            let mut reader = crate::tree::reader::TreeReader::new(&there, node.disks[0].root, CHUNK, 0);
            reader.chunk(100).unwrap().unwrap()
        });
        std::thread::sleep(Duration::from_millis(300));
        assert!(!waiting.is_finished());
        bucket.down.store(false, Ordering::Relaxed);
        assert!(waiting.join().unwrap()[..] == bytes[100 * CHUNK..101 * CHUNK]);
    });
    bucket.down.store(true, Ordering::Relaxed);
    let begin = Instant::now();
    // Several that wait for the same wait no longer than one.
    std::thread::scope(|scope| {
        for _ in 0..4 {
            let (there, node) = (&there, &node);
            scope.spawn(move || {
                let mut reader = crate::tree::reader::TreeReader::new(there, node.disks[0].root, CHUNK, 0);
                let error = reader.chunk(150).unwrap_err();
                assert!(matches!(&error, StoreError::Remote(RemoteError::Gone { .. })), "{error}");
                assert!(error.to_string().contains("connection refused"), "{error}");
                assert!(matches!(crate::disk::DiskError::from(error), crate::disk::DiskError::Io(_)));
            });
        }
    });
    assert!(begin.elapsed() < PATIENCE * 2 + Duration::from_secs(1), "{:?}", begin.elapsed());
    bucket.down.store(false, Ordering::Relaxed);
    assert!(image_content(&there, "disk").unwrap() == bytes);
}

#[test]
fn what_is_damaged_or_missing_in_a_remote_store_is_named() {
    let (bucket, here, there) = (MemoryBucket::new(), store(), store());
    let remote = remote(&bucket);
    image_of(&here, "disk", &noise(6, 100 * CHUNK));
    assert!(matches!(remote.remove("disk"), Err(RemoteError::NoImage { .. })));
    assert!(matches!(
        remote.pull(&there, "disk", &TransferOptions::new("disk"), &mut quiet),
        Err(RemoteError::NoImage { .. })
    ));
    push(&remote, &here, "disk");
    remote.attach(&there, "disk", &TransferOptions::new("disk")).unwrap();
    let segment = bucket.names("segments").remove(0);
    let original = bucket.objects.lock().unwrap()[&segment].clone();
    // A bit of a chunk far behind what is read with the node.
    let mut flipped = original.clone();
    flipped.0[1_000_000] ^= 1;
    bucket.objects.lock().unwrap().insert(segment.clone(), flipped);
    let error = image_content(&there, "disk").unwrap_err();
    let StoreError::Remote(RemoteError::Damaged { object, what }) = &error else { panic!("{error}") };
    assert!(segment.ends_with(object.as_str()) && what.contains("byte"), "{error}");
    bucket.objects.lock().unwrap().remove(&segment);
    let error = image_content(&there, "disk").unwrap_err();
    assert!(matches!(&error, StoreError::Remote(RemoteError::Missing { .. })), "{error}");
    assert!(error.to_string().contains(&segment), "{error}");
    bucket.objects.lock().unwrap().insert(segment, original);
    assert!(image_content(&there, "disk").unwrap() == image_content(&here, "disk").unwrap());
    let other = Remote { client: remote.client.clone(), address: remote.address.clone() };
    bucket.objects.lock().unwrap().get_mut("store/format").unwrap().0[30] ^= 1;
    let error = other.pull(&there, "disk", &TransferOptions::new("again"), &mut quiet).unwrap_err();
    assert!(matches!(error, RemoteError::Damaged { .. }), "{error}");
}

#[test]
fn a_push_that_was_cut_goes_on_with_what_is_missing() {
    let (bucket, here, there) = (MemoryBucket::new(), store(), store());
    let remote = remote(&bucket);
    // Nineteen segments: the first sixteen are named by an index object before the rest is there.
    let bytes = noise(7, 18 * 960 * CHUNK);
    image_of(&here, "disk", &bytes);
    bucket.segments_left.store(17, Ordering::Relaxed);
    let cut = remote.push(&here, &image("disk"), &TransferOptions::new("disk"), &mut quiet);
    assert!(matches!(cut, Err(RemoteError::Credentials { .. })), "{cut:?}");
    assert!(remote.list().unwrap().is_empty());
    assert_eq!(bucket.names("index").len(), 1);
    bucket.segments_left.store(usize::MAX, Ordering::Relaxed);
    let again = push(&remote, &here, "disk");
    assert!((2..=4).contains(&again.segments), "{again:?}");
    remote.pull(&there, "disk", &TransferOptions::new("disk"), &mut quiet).unwrap();
    assert!(image_content(&there, "disk").unwrap() == bytes);
}

#[test]
fn a_remote_collection_lists_first_and_removes_later() {
    let (bucket, here, there) = (MemoryBucket::new(), store(), store());
    let remote = remote(&bucket);
    let grace = Duration::from_secs(3600);
    let collect = || remote.collect(&here, grace, &mut quiet).unwrap();
    let wait = |seconds: i64| bucket.now_ms.fetch_add(seconds * 1000, Ordering::Relaxed);
    let (kept, gone) = (noise(8, 50 * CHUNK), noise(9, 50 * CHUNK));
    image_of(&here, "kept", &kept);
    image_of(&here, "gone", &gone);
    push(&remote, &here, "kept");
    push(&remote, &here, "gone");
    let nothing = collect();
    assert_eq!((nothing.segments, nothing.needed_segments, nothing.listed), (2, 2, 0));
    remote.remove("gone").unwrap();
    assert_eq!(collect().listed, 1);
    wait(60);
    let early = collect();
    assert_eq!((early.listed, early.removed), (0, 0));
    // A push builds on nothing that is listed.
    assert_eq!(push(&remote, &here, "gone").records, 52);
    wait(3600);
    let late = collect();
    assert_eq!((late.removed, late.needed_segments, late.revived), (1, 2, 0));
    assert!(late.removed_bytes > 50 * CHUNK as u64);
    // The clock stays.
    assert_eq!((bucket.names("segments").len(), bucket.names("dead").len()), (2, 1));
    remote.pull(&there, "gone", &TransferOptions::new("gone"), &mut quiet).unwrap();
    remote.pull(&there, "kept", &TransferOptions::new("kept"), &mut quiet).unwrap();
    assert!(image_content(&there, "gone").unwrap() == gone && image_content(&there, "kept").unwrap() == kept);
    // Listed, and needed again under its old name: the mark goes.
    let manifest = bucket.objects.lock().unwrap()["store/images/gone"].clone();
    remote.remove("gone").unwrap();
    assert_eq!(collect().listed, 1);
    bucket.objects.lock().unwrap().insert("store/images/gone".to_owned(), manifest);
    wait(4000);
    let revived = collect();
    assert_eq!((revived.revived, revived.removed), (1, 0));
}

#[test]
fn a_push_beside_a_remote_collection_ends_with_everything_there() {
    let (bucket, here, there) = (MemoryBucket::new(), store(), store());
    let remote = remote(&bucket);
    let shared = noise(10, 50 * CHUNK);
    image_of(&here, "old", &shared);
    push(&remote, &here, "old");
    remote.remove("old").unwrap();
    let bytes = [shared.clone(), noise(11, 20 * CHUNK)].concat();
    image_of(&here, "new", &bytes);
    // After the push has seen what is there, a collection lists it.
    let mut collected = None;
    let pushed = remote.push(&here, &image("new"), &TransferOptions::new("new"), &mut |_| {
        collected.get_or_insert_with(|| remote.collect(&here, Duration::ZERO, &mut quiet).unwrap());
        Ok(())
    });
    assert_eq!(collected.unwrap().listed, 1);
    assert!(pushed.unwrap().records >= 70);
    let removed = remote.collect(&here, Duration::ZERO, &mut quiet).unwrap();
    assert_eq!(removed.removed, 1);
    remote.pull(&there, "new", &TransferOptions::new("new"), &mut quiet).unwrap();
    assert!(image_content(&there, "new").unwrap() == bytes);
    // A store that knew the removed segment looks for the new one.
    let late = store();
    let attached = remote.attach(&late, "new", &TransferOptions::new("new")).unwrap();
    push(&remote, &here, "old");
    image_of(&here, "old2", &shared);
    drop(attached);
    assert!(image_content(&late, "new").unwrap() == bytes);
}

#[test]
fn what_was_read_first_is_fetched_first() {
    let (bucket, here, there) = (MemoryBucket::new(), store(), store());
    let remote = remote(&bucket);
    let bytes = noise(12, 1500 * CHUNK);
    image_of(&here, "disk", &bytes);
    push(&remote, &here, "disk");
    let attached = remote.attach(&there, "disk", &TransferOptions::new("disk")).unwrap();
    let (_, node) = there.image("disk").unwrap();
    let chunks = [1400u64, 20, 700];
    let mut reader = crate::tree::reader::TreeReader::new(&there, node.disks[0].root, CHUNK, 0);
    chunks.iter().for_each(|&chunk| drop(reader.chunk(chunk).unwrap()));
    attached.save_profile("disk").unwrap();
    // Another host.
    let (bucket2, other) = (bucket.clone(), store());
    let attached = self::remote(&bucket2).attach(&other, "disk", &TransferOptions::new("disk")).unwrap();
    bucket.take_ranges();
    attached.prefetch(&image("disk"), None, &mut quiet).unwrap();
    let wanted: Vec<Name> = attached.store.image("disk").map(|_| attached_names(&there, &node, &chunks)).unwrap();
    let known = Known::load(&remote.client, None).unwrap();
    let places: Vec<u64> = wanted.iter().map(|name| known.find(name).next().unwrap().offset).collect();
    let first: Vec<u64> = bucket.take_ranges().iter().take(20).map(|(_, range)| range.start).collect();
    assert!(places.iter().all(|place| first.contains(place)), "{places:?} in {first:?}");
    bucket.down.store(true, Ordering::Relaxed);
    assert!(image_content(&other, "disk").unwrap() == bytes);
}

fn attached_names(store: &Arc<Store>, node: &Node, chunks: &[u64]) -> Vec<Name> {
    let leaf = |chunk: u64| crate::tree::find_leaf(&**store, node.disks[0].root, chunk).unwrap().unwrap();
    chunks.iter().map(|&chunk| leaf(chunk).children[chunk as usize % crate::tree::FAN_OUT]).collect()
}

/// A garage server on a folder of its own.
struct Garage {
    process: std::process::Child,
    program: std::path::PathBuf,
    folder: tempfile::TempDir,
    port: u16,
}

const ACCESS_KEY: &str = "GK31c2f218a2e44f485b94239e";
const SECRET_KEY: &str = "b892c0665f0ada8a4755dae98baa3b133590e11dae3bcc1f9d769d67f16c3835";

impl Garage {
    /// None where the server is not installed.
    fn start() -> Option<Self> {
        let program =
            std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/tools/bin/garage").canonicalize().ok();
        let Some(program) = program else {
            println!("left out: target/tools has no garage, which `cargo xtask test --nightly` installs");
            return None;
        };
        let folder = tempfile::tempdir().unwrap();
        let free = || std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let (port, rpc) = (free(), free());
        let place = folder.path().display();
        let configuration = format!(
            "metadata_dir = \"{place}/meta\"\ndata_dir = \"{place}/data\"\ndb_engine = \"lmdb\"\nmetadata_fsync = true\n\
             replication_factor = 1\nrpc_bind_addr = \"127.0.0.1:{rpc}\"\nrpc_public_addr = \"127.0.0.1:{rpc}\"\n\
             rpc_secret = \"{SECRET_KEY}\"\n[s3_api]\ns3_region = \"garage\"\napi_bind_addr = \"127.0.0.1:{port}\"\n"
        );
        std::fs::write(folder.path().join("garage.toml"), configuration).unwrap();
        let process = Garage::run(&program, &folder);
        let garage = Garage { process, program, folder, port };
        garage.wait();
        Some(garage)
    }

    fn run(program: &std::path::Path, folder: &tempfile::TempDir) -> std::process::Child {
        let log = std::fs::File::create(folder.path().join("log")).unwrap();
        std::process::Command::new(program)
            .arg("-c")
            .arg(folder.path().join("garage.toml"))
            .args(["server", "--single-node", "--default-bucket"])
            .env("GARAGE_DEFAULT_ACCESS_KEY", ACCESS_KEY)
            .env("GARAGE_DEFAULT_SECRET_KEY", SECRET_KEY)
            .env("GARAGE_DEFAULT_BUCKET", "polder")
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap()
    }

    fn wait(&self) {
        let begin = Instant::now();
        while self.remote(SECRET_KEY, Duration::from_secs(1)).list().is_err() {
            let log = || std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default();
            assert!(begin.elapsed() < Duration::from_secs(60), "garage does not answer: {}", log());
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn remote(&self, secret_key: &str, patience: Duration) -> Remote {
        let address = RemoteAddress {
            url: "s3://polder/some/where".to_owned(),
            endpoint: Some(format!("http://127.0.0.1:{}", self.port)),
            region: "garage".to_owned(),
            patience,
        };
        let credentials =
            Credentials { access_key: ACCESS_KEY.to_owned(), secret_key: secret_key.to_owned(), session_token: None };
        Remote::open(&RemoteOptions { address, credentials: Some(credentials) }).unwrap()
    }

    fn stop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    fn restart(&mut self) {
        self.process = Garage::run(&self.program, &self.folder);
    }
}

impl Drop for Garage {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn garage_keeps_images_and_an_attached_one_outlasts_its_restart() {
    let Some(mut garage) = Garage::start() else { return };
    let (here, there, third) = (store(), store(), store());
    let bytes = noise(13, 2500 * CHUNK);
    image_of(&here, "disk", &bytes);
    let remote = garage.remote(SECRET_KEY, Duration::from_secs(30));
    let pushed = push(&remote, &here, "disk");
    assert!(pushed.segments >= 3, "{pushed:?}");
    let stranger = garage.remote(&"0".repeat(64), Duration::from_secs(5)).list().unwrap_err();
    assert!(matches!(stranger, RemoteError::Credentials { .. }), "{stranger}");
    remote.pull(&third, "disk", &TransferOptions::new("disk"), &mut quiet).unwrap();
    assert!(image_content(&third, "disk").unwrap() == bytes);

    let begin = Instant::now();
    let attached = remote.attach(&there, "disk", &TransferOptions::new("disk")).unwrap();
    let disk = volume(&there, "disk", "volume");
    let mut part = vec![0; 4096];
    disk.read_at(0, &mut part).unwrap();
    println!("first bytes of an attached image after {:?}", begin.elapsed());
    assert!(part == bytes[..4096]);
    garage.stop();
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut part = vec![0; 4096];
            for step in 0..30usize {
                let at = step * 7919 % 600 * 65_536;
                disk.read_at(at as u64, &mut part).unwrap();
                assert!(part == bytes[at..at + 4096]);
            }
        });
        std::thread::sleep(Duration::from_millis(500));
        assert!(!reader.is_finished());
        garage.restart();
        reader.join().unwrap();
    });
    assert!(attached.fetched_bytes() < bytes.len() as u64 / 2);
    attached.save_profile("disk").unwrap();
    attached.prefetch(&image("disk"), None, &mut quiet).unwrap();
    remote.remove("disk").unwrap();
    assert_eq!(remote.collect(&here, Duration::ZERO, &mut quiet).unwrap().listed, pushed.segments);
    assert_eq!(remote.collect(&here, Duration::ZERO, &mut quiet).unwrap().removed, pushed.segments);
    assert!(remote.list().unwrap().is_empty());
    garage.stop();
    assert!(image_content(&there, "disk").unwrap() == bytes);
    disk.close().unwrap();
    let gone = garage.remote(SECRET_KEY, Duration::from_secs(1)).list().unwrap_err();
    assert!(matches!(gone, RemoteError::Gone { .. }), "{gone}");
}
