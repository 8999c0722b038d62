//! Key-encryption keys in files: 32 bytes, or 64 hexadecimal digits with or without an end of line.
//!
//! A key that others may read is none. What is checked is the file that was opened, not what its name leads to later.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use ring::rand::{SecureRandom, SystemRandom};
use rustix::fs::OFlags;
use zeroize::Zeroizing;

use super::secret::{NoRandomness, SECRET_BYTES, Secret};

/// Hexadecimal digits of a key.
const DIGITS: usize = 2 * SECRET_BYTES;
/// The longest file that is overwritten as one with keys.
const ERASED_BYTES_MAX: u64 = 1 << 20;

/// A key-encryption key from a file.
#[derive(Debug)]
pub struct KeyFile(Secret);

/// A key file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    #[error("key file {path} cannot be read")]
    Read { path: PathBuf, source: io::Error },
    #[error("{path} is no regular file, so it is no key file")]
    NotAFile { path: PathBuf },
    #[error("key file {path} is open to others (mode {mode:04o}); only its owner may have access: chmod 600")]
    Exposed { path: PathBuf, mode: u32 },
    #[error("key file {path} belongs to another user ({owner})")]
    Foreign { path: PathBuf, owner: u32 },
    #[error("key file {path} has neither 32 bytes nor 64 hexadecimal digits")]
    Contents { path: PathBuf },
}

/// A key file cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum CreateKeyFileError {
    #[error(transparent)]
    NoRandomness(#[from] NoRandomness),
    #[error("key file {path} cannot be made")]
    Write { path: PathBuf, source: io::Error },
}

impl KeyFile {
    /// Reads a key file that nobody but its owner may read, who is the caller or root.
    pub fn read(path: &Path) -> Result<KeyFile, KeyFileError> {
        let failed = |source| KeyFileError::Read { path: path.into(), source };
        // A FIFO would be waited for.
        let mut file = open(path, OpenOptions::new().read(true), OFlags::NONBLOCK).map_err(failed)?;
        let facts = file.metadata().map_err(failed)?;
        if !facts.is_file() {
            return Err(KeyFileError::NotAFile { path: path.into() });
        }
        if facts.mode() & 0o077 != 0 {
            return Err(KeyFileError::Exposed { path: path.into(), mode: facts.mode() & 0o7777 });
        }
        if facts.uid() != 0 && facts.uid() != rustix::process::geteuid().as_raw() {
            return Err(KeyFileError::Foreign { path: path.into(), owner: facts.uid() });
        }
        let mut bytes = Zeroizing::new([0; DIGITS + 2]);
        let mut len = 0;
        while len < bytes.len() {
            match file.read(&mut bytes[len..]) {
                Ok(0) => break,
                Ok(more) => len += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(failed(error)),
            }
        }
        parse(&bytes[..len]).map(KeyFile).ok_or_else(|| KeyFileError::Contents { path: path.into() })
    }

    /// Makes a key file with a new random key; on the disk when this returns. No file may be there yet.
    pub fn create(path: &Path) -> Result<KeyFile, CreateKeyFileError> {
        let secret = Secret::random()?;
        let mut text = Zeroizing::new(Vec::with_capacity(DIGITS + 1));
        for byte in secret.bytes() {
            let digit = |value: u8| b"0123456789abcdef"[usize::from(value)];
            text.extend([digit(byte >> 4), digit(byte & 15)]);
        }
        text.push(b'\n');
        let write = || {
            let mut file = open(path, OpenOptions::new().write(true).create_new(true).mode(0o600), OFlags::empty())?;
            file.write_all(&text)?;
            file.sync_all()?;
            sync_folder_of(path)
        };
        write().map_err(|source| CreateKeyFileError::Write { path: path.into(), source })?;
        Ok(KeyFile(secret))
    }

    /// A key that comes from elsewhere, as if a file had it.
    pub fn of(key: Secret) -> KeyFile {
        KeyFile(key)
    }

    pub(super) fn key(&self) -> &Secret {
        &self.0
    }
}

/// The key in a file's bytes.
fn parse(bytes: &[u8]) -> Option<Secret> {
    let mut key = [0; SECRET_BYTES];
    if bytes.len() == SECRET_BYTES {
        key.copy_from_slice(bytes);
        return Some(Secret::take(&mut key));
    }
    let digits = bytes.strip_suffix(b"\n").unwrap_or(bytes);
    if digits.len() != DIGITS {
        return None;
    }
    let mut key = Zeroizing::new(key);
    for (byte, pair) in key.iter_mut().zip(digits.chunks_exact(2)) {
        let digit = |digit: u8| char::from(digit).to_digit(16);
        *byte = (digit(pair[0])? << 4 | digit(pair[1])?) as u8;
    }
    Some(Secret::take(&mut key))
}

/// What is left on the disk of a file that [`erase`] has removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Erased {
    /// The file system writes where the file lay (ext4, tmpfs), so its old bytes are gone from there. A solid-state drive keeps the old cells until it collects them all the same, and so do a journal with data, a snapshot below the
    /// file system, and a backup.
    Overwritten,
    /// The file system may write elsewhere (Btrfs, XFS with shared extents, network file systems and all that is not known): the old bytes may be on the disk until their place is used again.
    OldBytesMayRemain,
}

/// A file with keys cannot be erased.
#[derive(Debug, thiserror::Error)]
pub enum EraseError {
    #[error("{path} cannot be overwritten, so it was left as it is")]
    Overwrite { path: PathBuf, source: io::Error },
    #[error("{path} is no regular file of at most 1 MiB, so it was left as it is")]
    NoKeys { path: PathBuf },
    #[error("{path} was overwritten, but it cannot be removed")]
    Remove { path: PathBuf, source: io::Error },
    #[error(transparent)]
    NoRandomness(#[from] NoRandomness),
}

/// Overwrites a file with keys, brings that to the disk, and removes the file.
///
/// This erases what is encrypted under the keys (crypto-erase) if no other copy of them is left: a wrapped key with a passphrase is read with that,
/// one with a key file with that file. [`Erased`] says what the file system makes of it; where that is not enough, give the disk to its own secure-erase command,
/// or keep keys where they can be destroyed.
pub fn erase(path: &Path) -> Result<Erased, EraseError> {
    let failed = |source| EraseError::Overwrite { path: path.into(), source };
    let mut file = open(path, OpenOptions::new().write(true), OFlags::NOFOLLOW | OFlags::NONBLOCK).map_err(failed)?;
    let facts = file.metadata().map_err(failed)?;
    if !facts.is_file() || facts.len() > ERASED_BYTES_MAX {
        return Err(EraseError::NoKeys { path: path.into() });
    }
    // Not zeros: some file systems would make a hole of them.
    let mut noise = vec![0; facts.len() as usize];
    SystemRandom::new().fill(&mut noise).map_err(|_| NoRandomness)?;
    file.write_all(&noise).map_err(failed)?;
    file.sync_all().map_err(failed)?;
    let kind = rustix::fs::fstatfs(&file).map_err(|error| failed(error.into()))?.f_type;
    let removed = std::fs::remove_file(path).and_then(|()| sync_folder_of(path));
    removed.map_err(|source| EraseError::Remove { path: path.into(), source })?;
    const EXT4: u64 = 0xef53;
    const TMPFS: u64 = 0x0102_1994;
    Ok(if matches!(kind as u64, EXT4 | TMPFS) { Erased::Overwritten } else { Erased::OldBytesMayRemain })
}

fn open(path: &Path, options: &mut OpenOptions, flags: OFlags) -> io::Result<File> {
    options.custom_flags((flags | OFlags::NOCTTY | OFlags::CLOEXEC).bits() as i32).open(path)
}

/// Brings a file's name, or that it is gone, to the disk.
fn sync_folder_of(path: &Path) -> io::Result<()> {
    let folder = path.parent().filter(|folder| folder.as_os_str() != OsStr::new("")).unwrap_or(Path::new("."));
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests;
