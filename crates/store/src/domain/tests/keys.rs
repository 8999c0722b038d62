//! Keys of domains: locked, put under another key, and erased.

use super::*;

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
