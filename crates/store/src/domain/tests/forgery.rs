//! What somebody who has the disk and not the key changes, moves, makes or puts back, and how it is found.

use super::*;

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
