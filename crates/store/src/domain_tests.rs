//! Encrypted domains: what lies on the disk, who can read it, and what goes on without keys.

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
fn a_locked_domain_is_named_and_so_is_why() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = noise(1, 65_536);
    {
        let disk = volume(&store_with(folder.path(), &["vault"]), "disk", "vault");
        disk.write_at(0, &bytes).unwrap();
        disk.flush().unwrap();
    }
    let store = open(folder.path());
    let why = || match Volume::open(&store, "disk", VolumeOptions::default()) {
        Err(error @ StoreError::Locked { .. }) => error.to_string(),
        other => panic!("{:?}", other.map(drop)),
    };
    assert_eq!(why(), "domain vault is locked: no key was given");
    let wrong = store.unlock_domain("vault", &key(9)).unwrap_err().to_string();
    assert!(wrong.contains("not the one that the key was wrapped under"), "{wrong}");
    // A file that is not there, one with another key, and one with the key.
    let file = folder.path().join("vault.key");
    let with = |byte: u8| {
        use std::os::unix::fs::OpenOptionsExt;
        let mut made = File::options().write(true).create(true).truncate(true).mode(0o600).open(&file).unwrap();
        made.write_all(&[byte; 32]).unwrap();
    };
    store.catalog().set_key_file(1, file.to_str()).unwrap();
    drop(store);
    let again = || open(folder.path());
    let why = |store: &Arc<Store>| match Volume::open(store, "disk", VolumeOptions::default()) {
        Err(error @ StoreError::Locked { .. }) => error.to_string(),
        other => panic!("{:?}", other.map(drop)),
    };
    assert!(why(&again()).contains("vault.key cannot be read: No such file"), "{}", why(&again()));
    with(9);
    let store = again();
    assert!(why(&store).contains("not the one"), "{}", why(&store));
    // Nothing new gets into it, and nothing was changed by trying.
    let zeros = Content::Zeros { capacity_bytes: MIB, chunk_len: 16_384 };
    assert!(matches!(store.create_volume_in("new", &zeros, Some("vault")), Err(StoreError::Locked { .. })));
    with(1);
    let store = again();
    assert!(content(&store, "disk")[..bytes.len()] == bytes);
}

#[test]
fn an_erased_domain_stays_unreadable_and_the_rest_of_the_store_whole() {
    let folder = tempfile::tempdir().unwrap();
    let store = store_with(folder.path(), &["gone", "kept"]);
    for (name, domain) in [("a", "gone"), ("b", "kept")] {
        let disk = volume(&store, name, domain);
        disk.write_at(0, &noise(1, 65_536)).unwrap();
        disk.close().unwrap();
    }
    let wrapped = std::fs::read(store.wrapped_path(1)).unwrap();
    {
        let _user = Volume::open(&store, "a", VolumeOptions::default()).unwrap();
        assert!(matches!(store.erase_domain("gone"), Err(StoreError::InUse { .. })));
    }
    assert!(store.erase_domain("gone").unwrap().wrapped.is_some());
    assert_eq!(files_with(folder.path(), &wrapped[76..108]), none());
    for store in [&store, &open(folder.path())] {
        let error = store.unlock_domain("gone", &key(1)).unwrap_err().to_string();
        assert_eq!(error, "domain gone is locked: it was erased");
        assert!(matches!(Volume::open(store, "a", VolumeOptions::default()), Err(StoreError::Locked { .. })));
    }
    // Again, as after a crash in between.
    assert_eq!(store.erase_domain("gone").unwrap().wrapped, None);
    store.remove_volume("a").unwrap();
    assert!(content(&store, "b")[..65_536] == noise(1, 65_536));
}

#[test]
fn a_domain_under_another_key_opens_with_that_only() {
    let folder = tempfile::tempdir().unwrap();
    let store = store_with(folder.path(), &["vault"]);
    volume(&store, "disk", "vault").close().unwrap();
    let old = std::fs::read(store.wrapped_path(1)).unwrap();
    store.rewrap_domain("vault", &key(2), Some(Path::new("/keys/new"))).unwrap();
    assert_eq!(store.domain("vault").unwrap().key_file.as_deref(), Some("/keys/new"));
    assert_eq!(files_with(folder.path(), &old[76..108]), none());
    let store = open(folder.path());
    assert!(store.unlock_domain("vault", &key(1)).is_err());
    store.unlock_domain("vault", &key(2)).unwrap();
    content(&store, "disk");
}

#[test]
fn a_domain_under_a_passphrase_finds_it_in_its_file() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("passphrase");
    std::fs::write(&file, "nine metres below the sea\n").unwrap();
    let mode = |mode| std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
    mode(0o644);
    let exposed = Key::read(KeyKind::Passphrase, &file).unwrap_err();
    assert!(exposed.contains("chmod 600"), "{exposed}");
    mode(0o600);
    let store = open(folder.path());
    store.create_domain("vault", &Key::read(KeyKind::Passphrase, &file).unwrap(), Some(&file)).unwrap();
    volume(&store, "disk", "vault").close().unwrap();
    drop(store);
    let store = open(folder.path());
    assert_eq!(store.key_kind(&store.domain("vault").unwrap()).unwrap(), KeyKind::Passphrase);
    content(&store, "disk");
    std::fs::write(&file, "another").unwrap();
    let error = open(folder.path()).create_volume_in(
        "late",
        &Content::Zeros { capacity_bytes: MIB, chunk_len: 16_384 },
        Some("vault"),
    );
    assert_eq!(error.unwrap_err().to_string(), "domain vault is locked: the passphrase is wrong");
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
    let options = CollectOptions { bytes_per_second: u64::MAX, ..CollectOptions::default() };
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
fn a_changed_sealed_record_is_found_whether_its_checksums_were_made_to_fit_or_not() {
    let folder = tempfile::tempdir().unwrap();
    let store = store_with(folder.path(), &["vault"]);
    let disk = volume(&store, "disk", "vault");
    disk.write_at(0, &noise(1, 16_384)).unwrap();
    disk.close().unwrap();
    drop(store);
    let segments = SegmentFolder(folder.path().join("segments"));
    let path = segments.sealed(segments.list().unwrap()[0].0);
    let whole = std::fs::read(&path).unwrap();
    for (at, fits) in [0, 12, 28, 16_000].into_iter().flat_map(|at| [(at, true), (at, false)]) {
        let mut bytes = whole.clone();
        let header = Header::from_bytes(&bytes[64..]).unwrap();
        assert_eq!((header.kind, header.domain), (Kind::Data, 1));
        bytes[128 + at] ^= 1;
        if fits {
            let checksum = crc32c::crc32c(&bytes[128..128 + header.packed_len as usize]);
            bytes[64..128].copy_from_slice(&Header { checksum, ..header }.to_bytes());
        }
        std::fs::write(&path, &bytes).unwrap();
        let store = open(folder.path());
        store.unlock_domain("vault", &key(1)).unwrap();
        let disk = Volume::open(&store, "disk", VolumeOptions::default()).unwrap();
        match disk.read_at(0, &mut [0; 4096]) {
            Err(StoreError::Damaged { what, .. }) => assert!(what.contains("the seal does not hold"), "{what}"),
            other => panic!("byte {at}: {other:?}"),
        }
        drop(disk);
        assert_eq!(store.verify(&mut |_| Ok(())).unwrap().damages.len(), 1);
    }
}

/// The log of a volume that was written and not settled, and its file.
fn logged(folder: &Path) -> PathBuf {
    let store = store_with(folder, &["vault"]);
    let disk = volume(&store, "disk", "vault");
    disk.write_at(8192, &noise(1, 12_288)).unwrap();
    disk.flush().unwrap();
    disk.core().folder.join("log-00000001")
}

type Change<'a> = &'a dyn Fn(&mut [u8]);

#[test]
fn a_block_of_a_sealed_log_that_was_changed_or_moved_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let path = logged(folder.path());
    let whole = std::fs::read(&path).unwrap();
    let (begin, payload) = (4096, 4160);
    let payload_len = crate::volume::log_seal::sealed_len(12_288);
    // A bit of a block, of a tag, and of the salt; a block in the place of another; a record for another place of the volume.
    let changes: [Change<'_>; 5] = [
        &|bytes| bytes[payload + 5000] ^= 1,
        &|bytes| bytes[payload + 12_288 + 17] ^= 1,
        &|bytes| bytes[payload + 12_288 + 48 + 3] ^= 1,
        &|bytes| {
            bytes.copy_within(payload..payload + 4096, payload + 4096);
            bytes.copy_within(payload + 12_288..payload + 12_288 + 16, payload + 12_288 + 16);
        },
        &|bytes| bytes[begin + 24] ^= 1 << 4,
    ];
    for (index, change) in changes.into_iter().enumerate() {
        let mut bytes = whole.clone();
        change(&mut bytes);
        let checksum = crc32c::crc32c(&bytes[payload..payload + payload_len]);
        bytes[begin + 44..begin + 48].copy_from_slice(&checksum.to_le_bytes());
        let checksum = crc32c::crc32c(&bytes[begin..begin + 60]);
        bytes[begin + 60..payload].copy_from_slice(&checksum.to_le_bytes());
        std::fs::write(&path, &bytes).unwrap();
        let store = open(folder.path());
        store.unlock_domain("vault", &key(1)).unwrap();
        let disk = Volume::open(&store, "disk", VolumeOptions::default()).unwrap();
        let mut read = [0; 32_768];
        match disk.read_at(0, &mut read) {
            Err(StoreError::Damaged { what, .. }) => assert!(what.contains("the seal does not hold"), "{what}"),
            other => panic!("change {index}: {other:?}"),
        }
        assert!(disk.compact().is_err());
    }
    std::fs::write(&path, &whole).unwrap();
    let store = open(folder.path());
    store.unlock_domain("vault", &key(1)).unwrap();
    assert!(content(&store, "disk")[8192..20_480] == noise(1, 12_288));
}

#[test]
fn a_record_that_is_not_sealed_is_refused_in_an_encrypted_log_and_the_other_way_round() {
    let folder = tempfile::tempdir().unwrap();
    let path = logged(folder.path());
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[4096 + 4] = 1;
    let checksum = crc32c::crc32c(&bytes[4096..4156]);
    bytes[4156..4160].copy_from_slice(&checksum.to_le_bytes());
    std::fs::write(&path, &bytes).unwrap();
    let store = open(folder.path());
    store.unlock_domain("vault", &key(1)).unwrap();
    let refused = |what: &str| match Volume::open(&store, "disk", VolumeOptions::default()) {
        Err(StoreError::Damaged { what: found, .. }) => assert!(found.contains(what), "{found}"),
        other => panic!("{:?}", other.map(drop)),
    };
    refused("not sealed in the log of an encrypted volume");
    bytes[4096 + 4] = 5;
    let checksum = crc32c::crc32c(&bytes[4096..4156]);
    bytes[4156..4160].copy_from_slice(&checksum.to_le_bytes());
    std::fs::write(&path, &bytes).unwrap();
    let catalog = rusqlite::Connection::open(folder.path().join("catalog.db")).unwrap();
    catalog.execute("UPDATE volume SET domain = 0", []).unwrap();
    refused("a sealed record in the log of a volume that is not encrypted");
}

#[test]
fn a_log_that_is_put_back_from_a_copy_is_never_sealed_under_the_same_nonces() {
    let folder = tempfile::tempdir().unwrap();
    let path = logged(folder.path());
    let head = path.with_file_name("head");
    let copies = [std::fs::read(&head).unwrap(), std::fs::read(&path).unwrap()];
    // Twice from the same state: epoch, position and numbers are the same, and what is written differs in one bit.
    let sealed = [0, 1].map(|bit| {
        std::fs::write(&head, &copies[0]).unwrap();
        std::fs::write(&path, &copies[1]).unwrap();
        let store = open(folder.path());
        store.unlock_domain("vault", &key(1)).unwrap();
        let disk = Volume::open(&store, "disk", VolumeOptions::default()).unwrap();
        disk.write_at(0, &[bit; 4096]).unwrap();
        disk.flush().unwrap();
        drop(disk);
        let bytes = std::fs::read(&path).unwrap();
        let at = (0..bytes.len()).step_by(64).rfind(|&at| bytes[at..].starts_with(b"Plog")).unwrap();
        (bytes[at + 12..at + 40].to_vec(), bytes[at + 64..at + 64 + 4096].to_vec())
    });
    assert_eq!(sealed[0].0, sealed[1].0, "epoch, sequence, offset and number");
    let equal = sealed[0].1.iter().zip(&sealed[1].1).filter(|(one, other)| **one == **other ^ 1).count();
    assert!(equal < 64, "the two streams of key have {equal} bytes of 4096 in common");
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
    let is = domain.seal(&header, packed, &mut ours);
    assert_eq!((is.packed_len, is.domain, is.checksum), (was.packed_len, 7, crc32c::crc32c(&ours)));
    assert_eq!(domain.open(&is, &mut ours).unwrap(), packed);
}

/// The names of the files with wrapped secrets.
fn wrapped_files(store: &Store) -> Vec<String> {
    let mut names: Vec<String> = files(&store.domains_folder())
        .iter()
        .map(|path| path.file_name().unwrap().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// A key file, as the command line names one.
fn key_file(folder: &Path, byte: u8) -> PathBuf {
    use std::os::unix::fs::OpenOptionsExt;
    let path = folder.join(format!("{byte}.key"));
    File::options().write(true).create_new(true).mode(0o600).open(&path).unwrap().write_all(&[byte; 32]).unwrap();
    path
}

#[test]
fn a_rewrap_that_ends_anywhere_leaves_the_domain_under_the_key_that_the_catalog_names() {
    for end in 0..5 {
        let folder = tempfile::tempdir().unwrap();
        let keys = [1, 2, 3].map(|byte| key_file(folder.path(), byte));
        let store = open(&folder.path().join("store"));
        store.create_domain("vault", &key(1), Some(&keys[0])).unwrap();
        volume(&store, "disk", "vault").close().unwrap();
        let old = std::fs::read(store.wrapped_path(1)).unwrap();
        // The steps of a rewrap, as far as it came.
        let row = store.domain("vault").unwrap();
        let secret = store.unwrap(&row, &key(1)).unwrap();
        let wrapped = WrappedKey::wrap(&secret, store.subject(1), key(2).protection()).unwrap();
        let steps: [&dyn Fn() -> Result<()>; 4] =
            [&|| store.make_wrapped(1, &wrapped), &|| store.keep_old(1), &|| store.take_making(1), &|| {
                store.catalog().set_key_file(1, keys[1].to_str())
            }];
        steps[..end].iter().for_each(|step| step().unwrap());
        let again = open(&folder.path().join("store"));
        content(&again, "disk");
        // An attempt that fails, as on a full disk, destroys nothing.
        let making = store.domains_folder().join(format!("1{MAKING}"));
        let _ = std::fs::remove_file(&making);
        std::fs::create_dir(&making).unwrap();
        assert!(again.rewrap_domain("vault", &key(3), Some(&keys[2])).is_err(), "{end}");
        std::fs::remove_dir(&making).unwrap();
        content(&open(&folder.path().join("store")), "disk");
        // The next one comes through, and leaves nothing of the others.
        again.rewrap_domain("vault", &key(3), Some(&keys[2])).unwrap();
        assert_eq!(wrapped_files(&again), ["1"], "{end}");
        for record in [&old, &wrapped.to_bytes().to_vec()] {
            assert_eq!(files_with(folder.path(), &record[76..108]), none(), "{end}");
        }
        let again = open(&folder.path().join("store"));
        content(&again, "disk");
        assert!(again.unlock_domain("vault", &key(1)).is_err());
        assert!(again.unlock_domain("vault", &key(2)).is_err());
    }
}

#[test]
fn a_key_file_that_was_moved_is_named_anew_and_an_erased_domain_leaves_no_record_of_an_attempt() {
    let folder = tempfile::tempdir().unwrap();
    let (one, moved) = (key_file(folder.path(), 1), folder.path().join("elsewhere"));
    let at = folder.path().join("store");
    let store = open(&at);
    store.create_domain("vault", &key(1), Some(&one)).unwrap();
    volume(&store, "disk", "vault").close().unwrap();
    drop(store);
    std::fs::rename(&one, &moved).unwrap();
    let store = open(&at);
    assert!(Volume::open(&store, "disk", VolumeOptions::default()).is_err());
    let before = std::fs::read(store.wrapped_path(1)).unwrap();
    store.rewrap_domain("vault", &key(1), Some(&moved)).unwrap();
    assert_eq!(std::fs::read(store.wrapped_path(1)).unwrap(), before);
    drop(store);
    let store = open(&at);
    content(&store, "disk");
    let secret = store.unwrap(&store.domain("vault").unwrap(), &key(1)).unwrap();
    let attempt = WrappedKey::wrap(&secret, store.subject(1), key(2).protection()).unwrap();
    store.keep_old(1).unwrap();
    store.make_wrapped(1, &attempt).unwrap();
    store.erase_domain("vault").unwrap();
    assert_eq!(wrapped_files(&store), [""; 0]);
    for record in [before, attempt.to_bytes().to_vec()] {
        assert_eq!(files_with(folder.path(), &record[76..108]), none());
    }
}

#[test]
fn an_erased_domain_is_forgotten_once_nothing_is_in_it() {
    let folder = tempfile::tempdir().unwrap();
    let store = store_with(folder.path(), &["vault", "empty"]);
    assert!(store.erase_domain("empty").unwrap().is_forgotten);
    // A clone of a snapshot that is in the log only.
    let disk = volume(&store, "disk", "vault");
    disk.snapshot("one").unwrap();
    drop(disk);
    store.clone_volume("disk", Some("one"), "clone").unwrap();
    assert!(!store.erase_domain("vault").unwrap().is_forgotten);
    assert!(store.domain("vault").unwrap().is_erased);
    store.remove_volume("disk").unwrap();
    store.remove_volume("clone").unwrap();
    assert!(store.erase_domain("vault").unwrap().is_forgotten);
    assert_eq!(store.domains().unwrap(), []);
    // The name is free, and its number is not.
    assert_eq!(store.create_domain("vault", &key(1), None).unwrap().id, 3);
    store.collect(CollectOptions::default(), &mut |_| Ok(())).unwrap();
}

/// Writes a record in the place of another, with checksums that fit.
fn put_record(segment: &mut [u8], at: usize, header: Header, packed: &[u8]) {
    let header = Header { packed_len: packed.len() as u32, checksum: crc32c::crc32c(packed), ..header };
    segment[at..at + 64].copy_from_slice(&header.to_bytes());
    segment[at + 64..at + 64 + packed.len()].copy_from_slice(packed);
}

/// A store with a volume of two megabytes that do not pack, and so with a leaf that does not; its one segment, and where its records lie.
fn segment_with(folder: &Path, kind: Kind) -> (PathBuf, Vec<u8>, Vec<(usize, Header)>) {
    let store = store_with(folder, &["vault"]);
    let disk = volume(&store, "disk", "vault");
    disk.write_at(0, &noise(1, 2 << 20)).unwrap();
    disk.close().unwrap();
    drop(store);
    let segments = SegmentFolder(folder.join("segments"));
    let path = segments.sealed(segments.list().unwrap()[0].0);
    let bytes = std::fs::read(&path).unwrap();
    let mut found = Vec::new();
    let mut at = 64;
    while let Ok(header) = Header::from_bytes(&bytes[at..]) {
        if header.kind == kind {
            found.push((at, header));
        }
        at += header.record_len();
    }
    (path, bytes, found)
}

/// What reading the volume's first chunk says, in a process that has the key.
fn first_read(folder: &Path) -> Result<Vec<u8>> {
    let store = open(folder);
    store.unlock_domain("vault", &key(1)).unwrap();
    let disk = Volume::open(&store, "disk", VolumeOptions::default())?;
    let mut bytes = vec![0; 16_384];
    disk.read_at(0, &mut bytes).map(|()| bytes)
}

#[test]
fn an_open_record_in_the_place_of_a_sealed_one_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (path, mut bytes, found) = segment_with(folder.path(), Kind::Data);
    for (at, header) in found {
        // Whoever has the disk and not the key can write this.
        put_record(&mut bytes, at, Header { domain: 0, packing: Packing::Raw, ..header }, &[b'!'; 16_384]);
    }
    std::fs::write(&path, &bytes).unwrap();
    let error = first_read(folder.path()).unwrap_err().to_string();
    assert!(error.contains("of domain number 1 lies here as one of domain number 0"), "{error}");
    // Nor does it come from memory, where an open volume may have read it.
    let store = open(folder.path());
    let name = Name([7; 32]);
    store.cache_chunk(&name, 0, &Arc::from([1]));
    assert!(store.cached_chunk(&name, 0).is_some() && store.cached_chunk(&name, 1).is_none());
}

#[test]
fn a_node_of_an_encrypted_tree_that_somebody_else_made_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let (path, whole, found) = segment_with(folder.path(), Kind::Tree);
    let (at, header) = found.into_iter().find(|(_, header)| header.packing == Packing::Raw).unwrap();
    let mut node = whole[at + 64..at + 64 + 4096].to_vec();
    let (first, others) = node.split_at_mut(32);
    first.swap_with_slice(&mut others[..32]);
    for (domain, says) in [(1, "holds something else"), (0, "of domain number 1 is in domain number 0"), (9, "locked")]
    {
        let mut bytes = whole.clone();
        put_record(&mut bytes, at, Header { domain, ..header }, &node);
        std::fs::write(&path, &bytes).unwrap();
        let error = first_read(folder.path()).unwrap_err().to_string();
        assert!(error.contains(says), "{domain}: {error}");
        // Collection has no keys, and needs none.
        open(folder.path()).usage(&mut |_| Ok(())).unwrap();
    }
    std::fs::write(&path, &whole).unwrap();
    assert!(first_read(folder.path()).unwrap() == noise(1, 2 << 20)[..16_384]);
}

#[test]
fn an_open_tree_in_the_place_of_an_encrypted_one_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let store = store_with(folder.path(), &["vault"]);
    let disk = volume(&store, "disk", "vault");
    disk.write_at(0, &noise(1, 65_536)).unwrap();
    disk.close().unwrap();
    store.create_volume("open", &Content::Zeros { capacity_bytes: 8 * MIB, chunk_len: 16_384 }).unwrap();
    let other = Volume::open(&store, "open", VolumeOptions::default()).unwrap();
    other.write_at(0, &noise(2, 65_536)).unwrap();
    other.close().unwrap();
    let root = store.settled_disk("open", None).unwrap().root;
    let folder_of = store.volume_folder(store.volume("disk").unwrap().id);
    let mut head = crate::volume::head::Head::open(&folder_of).unwrap().unwrap();
    let before = head.state;
    head.write(crate::volume::head::State { root, ..before }).unwrap();
    drop(store);
    let error = first_read(folder.path()).unwrap_err().to_string();
    assert!(error.contains("of domain number 1 is in domain number 0"), "{error}");
    // And a volume that the catalog calls open, although its tree is not.
    let mut head = crate::volume::head::Head::open(&folder_of).unwrap().unwrap();
    let state = head.state;
    head.write(crate::volume::head::State { root: before.root, ..state }).unwrap();
    let catalog = rusqlite::Connection::open(folder.path().join("catalog.db")).unwrap();
    catalog.execute("UPDATE volume SET domain = 0", []).unwrap();
    let error = first_read(folder.path()).unwrap_err().to_string();
    assert!(error.contains("of domain number 0 is in domain number 1"), "{error}");
}

#[test]
fn an_image_that_somebody_else_changed_is_refused_by_whoever_has_the_key() {
    let folder = tempfile::tempdir().unwrap();
    let store = store_with(folder.path(), &["vault"]);
    let mut source = tempfile::NamedTempFile::new().unwrap();
    source.write_all(&noise(1, 65_536)).unwrap();
    let mut node = store.new_node_in(BTreeMap::new(), Some("vault")).unwrap();
    node.add_disk("root", &RawSource::open(source.path()).unwrap(), &mut |_| Ok(())).unwrap();
    node.save_as_image("image", Replace::No).unwrap();
    drop(store);
    let segments = SegmentFolder(folder.path().join("segments"));
    let path = segments.sealed(segments.list().unwrap()[0].0);
    let mut bytes = std::fs::read(&path).unwrap();
    let (mut at, mut header) = (64, Header::from_bytes(&bytes[64..]).unwrap());
    while header.kind != Kind::Node {
        at += header.record_len();
        header = Header::from_bytes(&bytes[at..]).unwrap();
    }
    assert_eq!(header.packing, Packing::Raw);
    let mut packed = bytes[at + 64..at + 64 + header.packed_len as usize].to_vec();
    let name = packed.windows(4).position(|window| window == b"root").unwrap();
    packed[name] = b'R';
    for domain in [1, 0, 9] {
        put_record(&mut bytes, at, Header { domain, ..header }, &packed);
        std::fs::write(&path, &bytes).unwrap();
        let store = open(folder.path());
        store.unlock_domain("vault", &key(1)).unwrap();
        let error = store.image("image").unwrap_err().to_string();
        assert!(error.contains("holds something else"), "{domain}: {error}");
    }
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
