use std::os::unix::fs::PermissionsExt;

use super::*;

/// A folder that goes with the test.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("polder-trust-{}-{name}", std::process::id()));
        std::fs::create_dir(&path).unwrap();
        Folder(path)
    }

    fn file(&self, contents: &[u8], mode: u32) -> PathBuf {
        let path = self.0.join("key");
        std::fs::write(&path, contents).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

const DIGITS_OF_KEY: &[u8] = b"000102030405060708090a0b0c0d0e0f101112131415161718191A1B1C1D1E1F";

fn key() -> [u8; 32] {
    std::array::from_fn(|at| at as u8)
}

#[test]
fn a_key_file_has_32_bytes_or_64_digits() {
    let folder = Folder::new("forms");
    for contents in [&key()[..], DIGITS_OF_KEY, &[DIGITS_OF_KEY, b"\n"].concat()] {
        let file = KeyFile::read(&folder.file(contents, 0o600)).unwrap();
        assert_eq!(file.key().bytes(), &key());
    }
    let mut foreign = DIGITS_OF_KEY.to_vec();
    foreign[5] = b'g';
    let long = [DIGITS_OF_KEY, b"\n\n"].concat();
    for contents in [&b""[..], &[7; 31], &[7; 33], &foreign, &DIGITS_OF_KEY[..63], &long, &[b'0'; 4096]] {
        let error = KeyFile::read(&folder.file(contents, 0o600)).unwrap_err();
        assert!(matches!(error, KeyFileError::Contents { .. }), "{error}");
    }
}

#[test]
fn a_key_file_that_others_may_use_is_refused() {
    let folder = Folder::new("modes");
    for mode in [0o644, 0o640, 0o604, 0o660, 0o620, 0o610] {
        let error = KeyFile::read(&folder.file(&key(), mode)).unwrap_err();
        assert!(matches!(error, KeyFileError::Exposed { mode: found, .. } if found == mode), "{error}");
    }
    assert!(KeyFile::read(&folder.file(&key(), 0o400)).is_ok());
}

#[test]
fn a_key_file_that_is_none_is_refused_and_not_waited_for() {
    let folder = Folder::new("kinds");
    assert!(matches!(KeyFile::read(&folder.0), Err(KeyFileError::NotAFile { .. })));
    assert!(matches!(KeyFile::read(&folder.0.join("missing")), Err(KeyFileError::Read { .. })));
    let fifo = folder.0.join("fifo");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    assert!(matches!(KeyFile::read(&fifo), Err(KeyFileError::NotAFile { .. })));
}

#[test]
fn a_key_file_that_was_made_is_read_back_and_never_replaced() {
    let folder = Folder::new("made");
    let path = folder.0.join("key");
    let made = KeyFile::create(&path).unwrap();
    assert_eq!(KeyFile::read(&path).unwrap().key().bytes(), made.key().bytes());
    assert!(matches!(KeyFile::create(&path), Err(CreateKeyFileError::Write { .. })));
    assert_eq!(KeyFile::read(&path).unwrap().key().bytes(), made.key().bytes());
}

#[test]
fn an_erased_file_is_overwritten_and_gone() {
    let folder = Folder::new("erased");
    let path = folder.file(&key(), 0o600);
    // What its other name leads to is the same bytes on the disk.
    let other = folder.0.join("other");
    std::fs::hard_link(&path, &other).unwrap();
    erase(&path).unwrap();
    assert!(!path.exists());
    let left = std::fs::read(&other).unwrap();
    assert_eq!(left.len(), 32);
    assert_ne!(left, key());
    assert!(matches!(erase(&path), Err(EraseError::Overwrite { .. })));
}

#[test]
fn what_is_no_file_with_keys_is_not_erased() {
    let folder = Folder::new("kept");
    let large = folder.file(&vec![1; ERASED_BYTES_MAX as usize + 1], 0o600);
    assert!(matches!(erase(&large), Err(EraseError::NoKeys { .. })));
    let link = folder.0.join("link");
    std::os::unix::fs::symlink(&large, &link).unwrap();
    assert!(erase(&link).is_err());
    assert_eq!(std::fs::read(&large).unwrap()[0], 1);
}
