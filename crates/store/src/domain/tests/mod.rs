//! Encrypted domains: what lies on the disk, who can read it, and what goes on without keys.

mod forgery;
mod keys;

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;

use super::*;
use crate::disk::{Disk, Operation, Queue};
use crate::format::RawSource;
use crate::name::Name;
use crate::records::segment::SegmentFolder;
use crate::test_store::{noise, volume_content};
use crate::upkeep::collect::CollectOptions;
use crate::volume::Volume;
use crate::{Content, OpenDisk, Replace, StoreOptions, TreeSource, VolumeOptions};

const MIB: u64 = 1 << 20;
const MARKER: &[u8] = b"the dike at Kinderdijk is leaking";

fn open(folder: &Path) -> Arc<Store> {
    Store::open(folder, StoreOptions::default()).unwrap()
}

fn key(byte: u8) -> Key {
    Key::File(KeyFile::of(Secret::take(&mut [byte; 32])))
}

/// A store with domains that have keys of their own.
fn store_with(folder: &Path, domains: &[&str]) -> Arc<Store> {
    let store = open(folder);
    for (domain, byte) in domains.iter().zip(1..) {
        store.create_domain(domain, &key(byte), None).unwrap();
    }
    store
}

fn volume(store: &Arc<Store>, name: &str, domain: &str) -> Volume {
    let content = Content::Zeros { capacity_bytes: 8 * MIB, chunk_len: 16_384 };
    store.create_volume_in(name, &content, Some(domain)).unwrap();
    Volume::open(store, name, VolumeOptions::default()).unwrap()
}

fn content(store: &Arc<Store>, name: &str) -> Vec<u8> {
    volume_content(&Volume::open(store, name, VolumeOptions::default()).unwrap())
}

/// Text that LZ4 leaves readable, with the marker all over it.
fn marked(len: usize) -> Vec<u8> {
    (0u32..).flat_map(|line| [MARKER, &line.to_le_bytes()].concat()).take(len).collect()
}

/// All files below a folder.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => found.extend(files(&path)),
            false if path.metadata().unwrap().is_file() => found.push(path),
            false => {}
        }
    }
    found
}

/// The files of a store that have some bytes in them.
fn files_with(folder: &Path, bytes: &[u8]) -> Vec<PathBuf> {
    let has = |path: &PathBuf| {
        let content = std::fs::read(path).unwrap();
        content.windows(bytes.len()).any(|window| window == bytes)
    };
    files(folder).into_iter().filter(has).collect()
}

fn none() -> [PathBuf; 0] {
    []
}

#[test]
fn no_file_of_a_store_holds_what_was_written_to_an_encrypted_volume() {
    let folder = tempfile::tempdir().unwrap();
    let store = store_with(folder.path(), &["secret"]);
    let disk = volume(&store, "disk", "secret");
    let text = marked(300 * 1024);
    let open_name = crate::Namer::open().name(Kind::Data, &text[..16_384]);
    // Whole blocks, and parts of blocks.
    disk.write_at(0, &text).unwrap();
    disk.write_at(4 * MIB + 512, &text[..1024]).unwrap();
    disk.flush().unwrap();
    let check = |when: &str| {
        assert_eq!(files_with(folder.path(), MARKER), none(), "{when}");
        assert_eq!(files_with(folder.path(), &open_name.0[..Name::PREFIX_LEN]), none(), "{when}");
    };
    check("in the log");
    disk.snapshot("one").unwrap();
    disk.compact().unwrap();
    check("in the segment and the log");
    disk.close().unwrap();
    store.seal().unwrap();
    check("at rest");
    store.clone_volume("disk", Some("one"), "clone").unwrap();
    let clone = Volume::open(&store, "clone", VolumeOptions::default()).unwrap();
    clone.write_at(MIB, &text).unwrap();
    clone.close().unwrap();
    check("written to a clone");
    assert!(content(&store, "clone")[1 << 20..][..text.len()] == text);
    // The search finds what is there.
    let open = Content::Zeros { capacity_bytes: MIB, chunk_len: 16_384 };
    store.create_volume("open", &open).unwrap();
    let open = Volume::open(&store, "open", VolumeOptions::default()).unwrap();
    open.write_at(0, &text).unwrap();
    open.close().unwrap();
    store.seal().unwrap();
    assert!(files_with(folder.path(), MARKER).len() > 1);
    assert!(!files_with(folder.path(), &open_name.0[..Name::PREFIX_LEN]).is_empty());
}

#[test]
fn equal_content_is_shared_inside_a_domain_and_never_between_two() {
    let folder = tempfile::tempdir().unwrap();
    let store = store_with(folder.path(), &["a", "b"]);
    let bytes = noise(1, 2 << 20);
    let stored = || {
        store.seal().unwrap();
        store.catalog().segments().unwrap().iter().map(|row| row.bytes).sum::<u64>()
    };
    let mut before = 0;
    for (name, domain, is_new) in [("one", "a", true), ("two", "a", false), ("three", "b", true), ("four", "b", false)]
    {
        let disk = volume(&store, name, domain);
        disk.write_at(0, &bytes).unwrap();
        disk.close().unwrap();
        let now = stored();
        let expected = if is_new { 2 * MIB..2 * MIB + 64 * 1024 } else { 0..16 * 1024 };
        assert!(expected.contains(&(now - before)), "{name}: {}", now - before);
        before = now;
    }
    let roots: Vec<_> = ["one", "two", "three"].map(|name| store.settled_disk(name, None).unwrap().root).into();
    assert_eq!(roots[0], roots[1]);
    assert_ne!(roots[0], roots[2]);
}

#[test]
fn collection_and_verification_work_without_keys() {
    let folder = tempfile::tempdir().unwrap();
    let store = store_with(folder.path(), &["vault"]);
    let disk = volume(&store, "disk", "vault");
    for part in 0..4 {
        disk.write_at(part * MIB, &noise(part, 1 << 20)).unwrap();
    }
    disk.compact().unwrap();
    disk.zero(0, 3 * MIB).unwrap();
    disk.close().unwrap();
    drop(store);
    let store = open(folder.path());
    // What is sealed stays as it is where other chunks are packed again.
    let tighten_after = Some(std::time::Duration::ZERO);
    let options = CollectOptions { bytes_per_second: u64::MAX, tighten_after, ..CollectOptions::default() };
    let collected = store.collect(options, &mut |_| Ok(())).unwrap();
    assert!(collected.freed_bytes - collected.rewritten_bytes > 2 * MIB, "{collected:?}");
    let verified = store.verify(&mut |_| Ok(())).unwrap();
    assert!(verified.damages.is_empty() && verified.lost.is_empty(), "{verified:?}");
    assert!(verified.locked >= 64, "{verified:?}");
    // Damage is found without the key, and what a segment then holds with it.
    let segments = SegmentFolder(folder.path().join("segments"));
    let segment = segments.sealed(segments.list().unwrap()[0].0);
    let file = File::options().read(true).write(true).open(&segment).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 300).unwrap();
    file.write_all_at(&[byte[0] ^ 1], 300).unwrap();
    assert_eq!(store.verify(&mut |_| Ok(())).unwrap().damages.len(), 1);
    file.write_all_at(&byte, 300).unwrap();
    store.unlock_domain("vault", &key(1)).unwrap();
    let verified = store.verify(&mut |_| Ok(())).unwrap();
    assert_eq!((verified.locked, verified.damages.len(), verified.lost.len()), (0, 0, 0));
    assert!(content(&store, "disk")[3 << 20..4 << 20] == noise(3, 1 << 20));
}

#[test]
fn what_was_written_over_many_openings_comes_back_from_the_log() {
    let folder = tempfile::tempdir().unwrap();
    drop(store_with(folder.path(), &["vault"]));
    let mut expected = vec![0; 8 << 20];
    for round in 0..12u64 {
        let store = open(folder.path());
        store.unlock_domain("vault", &key(1)).unwrap();
        let disk = match round {
            0 => volume(&store, "disk", "vault"),
            _ => Volume::open(&store, "disk", VolumeOptions::default()).unwrap(),
        };
        let mut found = vec![0; 8 << 20];
        disk.read_at(0, &mut found).unwrap();
        assert!(found == expected, "round {round}");
        for (part, len) in [(0, 8192), (1, 512), (2, 1 << 20)] {
            let offset = (round * 7 + part * 3) % 10 * 512 * 1024 + part * 512;
            let bytes = noise(round * 10 + part, len);
            disk.write_at(offset, &bytes).unwrap();
            expected[offset as usize..offset as usize + len].copy_from_slice(&bytes);
        }
        disk.flush().unwrap();
        if round == 7 {
            disk.compact().unwrap();
        }
    }
}

#[test]
fn an_image_of_an_encrypted_domain_stays_in_it() {
    let folder = tempfile::tempdir().unwrap();
    let store = store_with(folder.path(), &["vault", "other"]);
    let text = marked(1 << 20);
    let mut source = tempfile::NamedTempFile::new().unwrap();
    source.write_all(&text).unwrap();
    let mut node = store.new_node_in(BTreeMap::new(), Some("vault")).unwrap();
    node.add_disk("root", &RawSource::open(source.path()).unwrap(), &mut |_| Ok(())).unwrap();
    node.save_as_image("image", Replace::No).unwrap();
    store.seal().unwrap();
    assert_eq!(files_with(folder.path(), MARKER), none());
    assert_eq!(store.create_volume("disk", &Content::Image("image")).unwrap().domain, 1);
    assert!(content(&store, "disk") == text);
    let refused = store.create_volume_in("wrong", &Content::Image("image"), Some("other")).unwrap_err().to_string();
    assert!(refused.contains("cannot be in domain other"), "{refused}");
    let tree = store.image("image").unwrap().1.disks.remove(0);
    let mut open_node = store.new_node(BTreeMap::new()).unwrap();
    assert!(open_node.add_tree(tree.clone()).is_err());
    drop(open_node);
    // Without the key the image is listed, and not read.
    drop(store);
    let store = open(folder.path());
    assert_eq!(store.images().unwrap().len(), 1);
    assert!(matches!(store.read_file(&tree), Err(StoreError::Locked { .. })));
    let source = TreeSource::new(&store, &tree);
    assert!(crate::format::Source::read_at(&source, 0, &mut [0; 512]).is_err());
}

#[test]
fn what_is_encrypted_does_not_go_to_another_store() {
    use crate::transfer::{NodeRef, TransferError, TransferOptions, push};
    let folder = tempfile::tempdir().unwrap();
    let store = store_with(folder.path(), &["vault"]);
    let disk = volume(&store, "disk", "vault");
    disk.write_at(0, &noise(1, 4096)).unwrap();
    disk.close().unwrap();
    let (ours, _theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let what = NodeRef::Volume("disk".to_owned());
    match push(&store, &what, ours, &TransferOptions::new("copy"), &mut |_| Ok(())) {
        Err(TransferError::Store(error @ StoreError::Encrypted { .. })) => {
            assert_eq!(error.to_string(), "volume disk is in domain vault: what is encrypted does not leave its store");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_queue_reads_an_encrypted_volume_from_memory_and_from_the_hosts_disk() {
    let folder = tempfile::tempdir().unwrap();
    let store = store_with(folder.path(), &["vault"]);
    let disk = volume(&store, "disk", "vault");
    let mut expected = vec![0; 8 << 20];
    for (offset, len) in [(0usize, 3 << 20), (5 << 20, 512), (6 << 20, 40_960)] {
        let bytes = noise(offset as u64, len);
        disk.write_at(offset as u64, &bytes).unwrap();
        expected[offset..offset + len].copy_from_slice(&bytes);
        if offset == 0 {
            disk.compact().unwrap();
        }
    }
    let log = disk.core().folder.join("log-00000001");
    disk.flush().unwrap();
    let disk = Arc::new(OpenDisk::Volume(disk));
    let mut queue = disk.open_queue::<Vec<u8>>().unwrap();
    for (offset, len) in
        [(0, 8 << 20), (5 * MIB, 4096), (6 * MIB + 512, 5120), (6 * MIB + 4096, 8192), (MIB + 512, 512)]
    {
        for is_cached in [true, false] {
            if !is_cached {
                let file = File::open(&log).unwrap();
                rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
            }
            queue.submit(1, Operation::Read { offset, buffer: vec![9; len] });
            let completion = loop {
                if let Some(completion) = queue.next_completion() {
                    break completion;
                }
                let mut waited =
                    [rustix::event::PollFd::from_borrowed_fd(queue.signal(), rustix::event::PollFlags::IN)];
                rustix::event::poll(&mut waited, Some(&rustix::time::Timespec { tv_sec: 10, tv_nsec: 0 })).unwrap();
                let _ = rustix::io::read(queue.signal(), &mut [0; 8]);
            };
            completion.result.unwrap();
            assert!(completion.buffer.unwrap() == expected[offset as usize..][..len], "{offset} {len} {is_cached}");
        }
    }
}

/// If this fails the format has changed: stores that exist could no longer be read.
#[test]
fn the_format_of_sealed_store_records_is_as_it_was() {
    let domain = Domain::new(7, Secret::take(&mut [0x11; 32])).unwrap();
    let content = marked(4096);
    let name = domain.namer.name(Kind::Data, &content);
    let packed = b"as if a codec had packed it";
    let header = Header {
        kind: Kind::Data,
        packing: Packing::Lz4,
        packed_len: packed.len() as u32,
        content_len: 4096,
        name,
        domain: 7,
        suite: Suite::Aes256Gcm,
        checksum: 0,
    };
    assert_eq!(name.to_string(), "f78fc6782923056f171869ca01fbbe7563f045251f4b2936e868cdfc379feccf");
    // As an earlier release has sealed it, under a nonce of its own.
    let sealed = "92bf6c020353146688618305880a284583c492253a3ef11c0b097071d2b817d4c2cf3115d58cf6a14b475fa6d281d411bc0d7b7976acc0";
    let digit = |digit: u8| (digit as char).to_digit(16).unwrap() as u8;
    let mut sealed: Vec<u8> = sealed.as_bytes().chunks(2).map(|pair| digit(pair[0]) << 4 | digit(pair[1])).collect();
    let was = Header { packed_len: sealed.len() as u32, checksum: crc32c::crc32c(&sealed), ..header };
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    assert_eq!(hex(&was.to_bytes()[48..]), "070000001afa3ea20000000086ea3a07");
    assert_eq!(domain.open(&was, &mut sealed).unwrap(), packed);
    // And as this one does.
    let mut ours = Vec::new();
    let is = domain.seal_onto(&header, packed, &mut ours);
    assert_eq!((is.packed_len, is.domain, is.checksum), (was.packed_len, 7, crc32c::crc32c(&ours)));
    assert_eq!(domain.open(&is, &mut ours).unwrap(), packed);
}

#[test]
fn a_volume_is_copied_into_a_domain_and_out_of_it_and_leaves_nothing_readable_on_the_way() {
    let folder = tempfile::tempdir().unwrap();
    let store = store_with(folder.path(), &["vault", "other"]);
    let text = marked(3 << 20);
    let zeros = Content::Zeros { capacity_bytes: 5 * MIB + 512, chunk_len: 4096 };
    store.create_volume_in("one", &zeros, Some("vault")).unwrap();
    let disk = Volume::open(&store, "one", VolumeOptions::default()).unwrap();
    disk.write_at(MIB, &text).unwrap();
    let snapshot = disk.snapshot("now").unwrap();
    disk.write_at(MIB, &noise(1, 4096)).unwrap();
    let copy = |name: &str, domain: Option<&str>| {
        let row = store.copy_volume(name, &Content::Snapshot(&snapshot), domain, &mut |_| Ok(())).unwrap();
        assert_eq!((row.chunk_len, row.capacity_bytes), (4096, 5 * MIB + 512));
        let read = content(&store, name);
        assert!(read[1 << 20..][..text.len()] == text);
        assert!(read[..1 << 20].iter().chain(&read[(1 << 20) + text.len()..]).all(|&byte| byte == 0));
        row.domain
    };
    assert_eq!(copy("two", Some("other")), 2);
    store.seal().unwrap();
    assert_eq!(files_with(folder.path(), MARKER), none());
    assert_eq!(copy("open", None), 0);
    store.seal().unwrap();
    assert!(!files_with(folder.path(), MARKER).is_empty());
    let again = store.copy_volume("open", &zeros, Some("other"), &mut |_| Ok(()));
    assert!(matches!(again, Err(StoreError::Exists { .. })));
}

#[test]
fn a_catalog_without_domains_gets_them() {
    let folder = tempfile::tempdir().unwrap();
    drop(open(folder.path()));
    let catalog = rusqlite::Connection::open(folder.path().join("catalog.db")).unwrap();
    catalog.execute_batch("DROP TABLE domain; PRAGMA user_version = 1").unwrap();
    drop(catalog);
    let store = open(folder.path());
    assert_eq!(store.domains().unwrap(), []);
    assert_eq!(store.create_domain("vault", &key(1), None).unwrap().id, 1);
    assert!(matches!(store.create_domain("vault", &key(1), None), Err(StoreError::Exists { .. })));
}
