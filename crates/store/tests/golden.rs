//! Promise: a store of this release is read by every later one.
//!
//! `golden/v1.tar.zst` is a store as it lay on the disk while a process used it: volumes in trees of one to three levels, a run of the
//! index, a segment that was still written, an encrypted domain, and logs with records of every kind, snapshots among them. It was made
//! once by `make_a_golden_store` and is never made again: a format that changes gets a store of its own beside it. `v2` has log files of
//! version 2, whose records name chunks; `v3` segments of version 2 and log files of version 3, in which encrypted volumes are sealed
//! with AEGIS-256X2.

use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use polder_store::format::{RawSource, Source};
use polder_store::{Content, Key, KeyKind, Replace, Store, StoreOptions, Tree, TreeSource, Volume, VolumeOptions};

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;
/// Bytes of the golden store at most: it is in the repository.
const ARCHIVE_LEN_MAX: usize = 300 * KIB;
const COMMAND_LINE: &str = "root=/dev/vda quiet";
const DOMAIN: &str = "vault";

/// Something that is done to a disk.
enum Step {
    Write(usize, Vec<u8>),
    Zero(usize, usize),
    Resize(usize),
    Snapshot(&'static str),
}

use Step::{Resize, Snapshot, Write as Put, Zero};

/// A disk of the golden store.
struct Disk {
    name: &'static str,
    chunk_len: usize,
    capacity: usize,
    domain: Option<&'static str>,
    /// What is in its tree.
    settled: Vec<Step>,
    /// What was in its log when the store was archived.
    logged: Vec<Step>,
}

/// What a disk held, and its snapshots.
struct Expected {
    now: Vec<u8>,
    snapshots: BTreeMap<&'static str, Vec<u8>>,
}

impl Disk {
    fn expected(&self) -> Expected {
        let mut expected = Expected { now: vec![0; self.capacity], snapshots: BTreeMap::new() };
        for step in self.settled.iter().chain(&self.logged) {
            match step {
                Put(offset, bytes) => expected.now[*offset..offset + bytes.len()].copy_from_slice(bytes),
                Zero(offset, len) => expected.now[*offset..offset + len].fill(0),
                Resize(capacity) => expected.now.resize(*capacity, 0),
                Snapshot(name) => drop(expected.snapshots.insert(name, expected.now.clone())),
            }
        }
        expected
    }
}

/// Bytes that do not pack. Part of what is stored: it stays as it is.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Bytes that pack well.
fn text(word: &str, len: usize) -> Vec<u8> {
    word.bytes().cycle().take(len).collect()
}

fn disks() -> Vec<Disk> {
    let begin = |seed| {
        vec![
            Put(0, noise(seed, 4 * KIB)),
            Put(64 * KIB, text("dike ", 200 * KIB)),
            Put(MIB + 512, noise(seed + 1, 512)),
            Put(3 * MIB, text("sluice ", 128 * KIB)),
            Zero(3 * MIB + 32 * KIB, 64 * KIB),
        ]
    };
    let mut history = begin(30);
    history.extend([Snapshot("first"), Put(5 * MIB, text("polder ", 40 * KIB))]);
    // Each round makes a segment of its own, so that some are merged into a run.
    history.extend((0..16).map(|round| Put(6 * MIB + round * 16 * KIB, noise(100 + round as u64, 512))));
    vec![
        // One level: 128 chunks.
        Disk {
            name: "level-1",
            chunk_len: 64 * KIB,
            capacity: 8 * MIB,
            domain: None,
            settled: begin(1),
            logged: Vec::new(),
        },
        Disk {
            name: "level-2",
            chunk_len: 16 * KIB,
            capacity: 20 * MIB,
            domain: None,
            settled: begin(10),
            logged: Vec::new(),
        },
        // Three levels, and a last chunk that is not whole.
        Disk {
            name: "level-3",
            chunk_len: 4 * KIB,
            capacity: 65 * MIB + 512,
            domain: None,
            settled: [begin(20), vec![Put(65 * MIB, text("end ", 512))]].into_iter().flatten().collect(),
            logged: Vec::new(),
        },
        Disk {
            name: "history",
            chunk_len: 16 * KIB,
            capacity: 12 * MIB,
            domain: None,
            settled: history,
            logged: vec![
                Put(2 * MIB, noise(40, 4 * KIB)),
                Put(2 * MIB + 512, noise(41, 1024)),
                Snapshot("second"),
                // Longer than a record, and than what is left of the log's file.
                Put(7 * MIB, text("longer than a record ", 2 * MIB + 12 * KIB)),
                Zero(8 * MIB + 4 * KIB, 300 * KIB),
                Zero(64 * KIB, 100 * KIB + 512),
                Resize(8 * MIB + 3 * KIB),
                Snapshot("third"),
                Resize(16 * MIB),
                Put(12 * MIB, noise(42, 8 * KIB)),
            ],
        },
        Disk {
            name: "late",
            chunk_len: 4 * KIB,
            capacity: MIB,
            domain: None,
            settled: Vec::new(),
            logged: vec![Put(8 * KIB, noise(50, 4 * KIB)), Put(0, text("water ", 16 * KIB))],
        },
        Disk {
            name: "sealed",
            chunk_len: 16 * KIB,
            capacity: 8 * MIB,
            domain: Some(DOMAIN),
            // Small: what a log has sealed does not pack.
            settled: vec![Put(0, noise(70, 4 * KIB)), Put(3 * MIB, text("vault ", 32 * KIB)), Snapshot("first")],
            logged: vec![
                Put(2 * MIB, noise(80, 12 * KIB)),
                Put(2 * MIB + 512, noise(81, 1024)),
                Snapshot("second"),
                Put(4 * MIB, text("sealed ", 24 * KIB)),
                Zero(MIB, 8 * KIB),
            ],
        },
    ]
}

/// The disk and the kernel of the image.
fn image_parts() -> (Vec<u8>, Vec<u8>) {
    let mut disk = vec![0; 3 * MIB];
    disk[..100 * KIB].copy_from_slice(&text("an image ", 100 * KIB));
    disk[2 * MIB..2 * MIB + 4 * KIB].copy_from_slice(&noise(60, 4 * KIB));
    (disk, noise(61, 5000))
}

fn archive(version: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/{version}.tar.zst"))
}

/// The disks of the second golden store: each has long writes in its log, and others over them.
fn streams() -> Vec<Disk> {
    [("stream", None, 16), ("sealed-stream", Some(DOMAIN), 16), ("fine-stream", None, 4)]
        .map(|(name, domain, chunk_kib)| Disk {
            name,
            chunk_len: chunk_kib * KIB,
            capacity: 2 * MIB,
            domain,
            settled: vec![Put(0, text("before ", 300 * KIB))],
            logged: vec![
                // With zeros in the middle, and parts of chunks at both ends.
                Put(4 * KIB, [text("long ", 200 * KIB), vec![0; 64 * KIB], noise(70, 20 * KIB)].concat()),
                Put(90 * KIB, noise(71, 5 * KIB)),
                Snapshot("between"),
                Zero(100 * KIB, 10 * KIB),
                Put(MIB, text("longer ", 512 * KIB)),
            ],
        })
        .into()
}

fn carry_out(volume: &Volume, steps: &[Step]) {
    for step in steps {
        match step {
            Put(offset, bytes) => volume.write_at(*offset as u64, bytes).unwrap(),
            Zero(offset, len) => volume.zero(*offset as u64, *len as u64).unwrap(),
            Resize(capacity) => volume.resize(*capacity as u64).unwrap(),
            Snapshot(name) => drop(volume.snapshot(name).unwrap()),
        }
    }
}

fn create(store: &Arc<Store>, name: &str, disk: &Disk) {
    let content = Content::Zeros { capacity_bytes: disk.capacity as u64, chunk_len: disk.chunk_len as u32 };
    store.create_volume_in(name, &content, disk.domain).unwrap();
}

/// The key of the domain.
fn key(folder: &Path) -> Key {
    let path = folder.join("vault.key");
    std::fs::write(&path, noise(90, 32)).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    Key::read(KeyKind::File, &path).unwrap()
}

#[test]
#[ignore = "golden stores are made once"]
fn make_a_golden_store() {
    assert!(!archive("v1").exists(), "a golden store is made once: another format gets another");
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(&folder.path().join("store"), StoreOptions::default()).unwrap();
    store.create_domain(DOMAIN, &key(folder.path()), None).unwrap();
    let never = Duration::from_secs(24 * 3600);
    let mut open = Vec::new();
    for disk in disks() {
        create(&store, disk.name, &disk);
        let options = VolumeOptions { settle: never, ..VolumeOptions::default() };
        let volume = Volume::open(&store, disk.name, options).unwrap();
        for step in &disk.settled {
            carry_out(&volume, std::slice::from_ref(step));
            volume.compact().unwrap();
            store.seal().unwrap();
        }
        volume.close().unwrap();
        if !disk.logged.is_empty() {
            // What was removed is known to the catalog as long as the log may have it.
            let small = VolumeOptions { log_file_bytes: 2 << 20, ..options };
            let volume = Volume::open(&store, disk.name, if disk.name == "history" { small } else { options }).unwrap();
            volume.snapshot("removed").unwrap();
            store.remove_snapshot(disk.name, "removed").unwrap();
            carry_out(&volume, &disk.logged);
            volume.flush().unwrap();
            open.push(volume);
        }
    }
    store.seal().unwrap();
    store.clone_volume("level-2", None, "clone").unwrap();
    store.clone_volume("history", Some("third"), "clone-in-the-log").unwrap();
    // Last: its segment stays open.
    let (disk, kernel) = image_parts();
    let facts = [("command-line".to_owned(), COMMAND_LINE.to_owned())];
    let mut node = store.new_node(facts.into()).unwrap();
    for (part, bytes) in [("root", &disk), ("kernel", &kernel)] {
        let path = folder.path().join(part);
        std::fs::write(&path, bytes).unwrap();
        let source = RawSource::open(&path).unwrap();
        match part {
            "root" => node.add_disk(part, &source, &mut |_| Ok(())).unwrap(),
            _ => node.add_file(part, &source, &mut |_| Ok(())).unwrap(),
        }
    }
    node.save_as_image("system", Replace::No).unwrap();
    pack(folder.path(), "v1");
}

#[test]
#[ignore = "golden stores are made once"]
fn make_a_golden_store_whose_logs_name_chunks() {
    make_with_logs("v2", streams());
}

/// The encrypted disks of the third golden store.
fn sealed() -> Vec<Disk> {
    disks().into_iter().chain(streams()).filter(|disk| disk.domain.is_some()).collect()
}

#[test]
#[ignore = "golden stores are made once"]
fn make_a_golden_store_that_is_sealed_with_aegis() {
    make_with_logs("v3", sealed());
}

/// A store with disks whose logs hold something, long writes as names of chunks.
fn make_with_logs(version: &str, disks: Vec<Disk>) {
    assert!(!archive(version).exists(), "a golden store is made once: another format gets another");
    let folder = tempfile::tempdir().unwrap();
    let store = Store::open(&folder.path().join("store"), StoreOptions::default()).unwrap();
    store.create_domain(DOMAIN, &key(folder.path()), None).unwrap();
    let never = Duration::from_secs(24 * 3600);
    let options = VolumeOptions { settle: never, stream_bytes: 0, log_file_bytes: 2 << 20, ..VolumeOptions::default() };
    let open = disks.into_iter().map(|disk| {
        create(&store, disk.name, &disk);
        let volume = Volume::open(&store, disk.name, options).unwrap();
        carry_out(&volume, &disk.settled);
        volume.compact().unwrap();
        carry_out(&volume, &disk.logged);
        volume.flush().unwrap();
        volume
    });
    let open: Vec<Volume> = open.collect();
    pack(folder.path(), version);
    drop(open);
}

/// Archives the store in a folder as it lies there.
fn pack(folder: &Path, version: &str) {
    let tar = Command::new("tar")
        .args(["--create", "--sparse", "--sort=name", "--owner=0", "--group=0", "--numeric-owner"])
        .args(["--exclude=control", "--exclude=spares/*", "--exclude=catalog.db-shm", "--directory"])
        .arg(folder)
        .arg("store")
        .output()
        .unwrap();
    assert!(tar.status.success(), "{}", String::from_utf8_lossy(&tar.stderr));
    let packed = zstd::encode_all(&tar.stdout[..], 19).unwrap();
    assert!(packed.len() <= ARCHIVE_LEN_MAX, "{} bytes", packed.len());
    let archive = archive(version);
    std::fs::create_dir_all(archive.parent().unwrap()).unwrap();
    std::fs::write(archive, packed).unwrap();
}

fn unpack(folder: &Path, version: &str) {
    let bytes = zstd::decode_all(&std::fs::read(archive(version)).unwrap()[..]).unwrap();
    let mut tar = Command::new("tar")
        .args(["--extract", "--no-same-owner", "--directory"])
        .arg(folder)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    tar.stdin.take().unwrap().write_all(&bytes).unwrap();
    assert!(tar.wait().unwrap().success());
}

fn read(store: &Arc<Store>, tree: &Tree) -> Vec<u8> {
    let mut bytes = vec![0; tree.len_bytes as usize];
    TreeSource::new(store, tree).read_at(0, &mut bytes).unwrap();
    bytes
}

/// Whether both are the same, without a report of megabytes.
#[track_caller]
fn same(found: &[u8], expected: &[u8], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let at = found.iter().zip(expected).position(|(found, expected)| found != expected);
    assert_eq!(at, None, "{what} differs at this byte");
}

fn check_disks(store: &Arc<Store>, disks: &[Disk]) {
    for disk in disks {
        let name = disk.name;
        let expected = disk.expected();
        let volume = Volume::open(store, name, VolumeOptions::default()).unwrap();
        let mut now = vec![0; volume.capacity_bytes() as usize];
        volume.read_at(0, &mut now).unwrap();
        same(&now, &expected.now, name);
        volume.close().unwrap();
        same(&read(store, &store.settled_disk(name, None).unwrap()), &expected.now, name);
        let found: Vec<String> = store.snapshots(name).unwrap().into_iter().map(|snapshot| snapshot.name).collect();
        let mut names: Vec<&str> = found.iter().map(String::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, expected.snapshots.keys().copied().collect::<Vec<_>>(), "{name}");
        for (snapshot, content) in &expected.snapshots {
            let tree = store.settled_disk(name, Some(snapshot)).unwrap();
            same(&read(store, &tree), content, snapshot);
        }
    }
}

fn check(store: &Arc<Store>) {
    let disks = disks();
    check_disks(store, &disks);
    let disk = |name: &str| disks.iter().find(|disk| disk.name == name).unwrap().expected();
    let clone = |name: &str| read(store, &store.settled_disk(name, None).unwrap());
    same(&clone("clone"), &disk("level-2").now, "clone");
    same(&clone("clone-in-the-log"), &disk("history").snapshots["third"], "clone-in-the-log");

    let (disk, kernel) = image_parts();
    let (_, node) = store.image("system").unwrap();
    same(&read(store, &node.disks[0]), &disk, "the image's disk");
    same(&store.read_file(node.file("kernel").unwrap()).unwrap(), &kernel, "the image's kernel");
    assert_eq!(node.facts["command-line"], COMMAND_LINE);
}

#[track_caller]
fn verify(store: &Arc<Store>) {
    let verified = store.verify(&mut |_| Ok(())).unwrap();
    assert!(verified.records > 20, "{verified:?}");
    assert!(verified.damages.is_empty() && verified.lost.is_empty(), "{verified:?}");
}

#[test]
fn stores_of_this_release_are_read() {
    let folder = tempfile::tempdir().unwrap();
    unpack(folder.path(), "v1");
    let store = Store::open_existing(&folder.path().join("store"), StoreOptions::default()).unwrap();
    // Without the key what is sealed cannot be read, and is whole as far as can be seen.
    verify(&store);
    assert!(Volume::open(&store, "sealed", VolumeOptions::default()).is_err());
    store.unlock_domain(DOMAIN, &key(folder.path())).unwrap();
    verify(&store);
    check(&store);
    // What is written today is named and shaped as it was then, and so is stored once with it.
    for disk in disks().iter().filter(|disk| disk.logged.is_empty()) {
        let name = format!("new-{}", disk.name);
        create(&store, &name, disk);
        let volume = Volume::open(&store, &name, VolumeOptions::default()).unwrap();
        carry_out(&volume, &disk.settled);
        volume.close().unwrap();
        let root = |name: &str| store.settled_disk(name, None).unwrap().root;
        assert_eq!(root(&name), root(disk.name), "{name}");
    }
    store.collect(Default::default(), &mut |_| Ok(())).unwrap();
    verify(&store);
    check(&store);
}

#[test]
fn stores_whose_logs_name_chunks_are_read() {
    check_with_logs("v2", &streams());
}

#[test]
fn stores_that_are_sealed_with_aegis_are_read() {
    check_with_logs("v3", &sealed());
}

fn check_with_logs(version: &str, disks: &[Disk]) {
    let folder = tempfile::tempdir().unwrap();
    unpack(folder.path(), version);
    let store = Store::open_existing(&folder.path().join("store"), StoreOptions::default()).unwrap();
    verify(&store);
    // Without the key, and before any of them is opened.
    store.collect(Default::default(), &mut |_| Ok(())).unwrap();
    store.unlock_domain(DOMAIN, &key(folder.path())).unwrap();
    check_disks(&store, disks);
    verify(&store);
}
