//! Raw images: a file or block device whose bytes are the disk's.
//!
//! Holes of a file are found with SEEK_DATA and SEEK_HOLE and left out of what is written.

use super::error::{FormatError, file_name};
use super::{Content, Extent, Source, Target};
use rustix::fs::{FallocateFlags, FileType, Mode, OFlags, SeekFrom};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Zeros shorter than this are written as data: a file system has no smaller hole.
const GRANULE: usize = 4096;
/// Bytes written at once: with 2 MiB the kernel takes up to five times as long to find room for them in its page cache.
const WRITE_LEN: usize = 256 << 10;
/// Zeros written at once where a range cannot be made a hole.
const ZEROS: &[u8] = &[0; 64 << 10];

/// A raw image to read.
#[derive(Debug)]
pub struct RawSource {
    file: File,
    name: String,
    len: u64,
    /// What names a file on this host: device and inode.
    identity: (u64, u64),
}

impl RawSource {
    /// Opens a file or block device; anything else is refused, and a pipe makes nobody wait.
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        let name = file_name(path);
        let file = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty())
            .map_err(|error| FormatError::io(&name, "open it", error))?;
        Self::from_file(file, name)
    }

    /// Takes an open file; `name` is for errors.
    pub fn from_file(file: OwnedFd, name: String) -> Result<Self, FormatError> {
        let status = rustix::fs::fstat(&file).map_err(|error| FormatError::io(&name, "look at it", error))?;
        let len = disk_len(&file, &status, &name)?;
        Ok(RawSource { file: File::from(file), name, len, identity: (status.st_dev, status.st_ino) })
    }

    /// The name for errors.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Device and inode.
    pub(crate) fn identity(&self) -> (u64, u64) {
        self.identity
    }
}

/// The length of a file or block device; other kinds are refused.
fn disk_len(file: &OwnedFd, status: &rustix::fs::Stat, name: &str) -> Result<u64, FormatError> {
    match FileType::from_raw_mode(status.st_mode) {
        FileType::RegularFile => Ok(status.st_size as u64),
        FileType::BlockDevice => {
            rustix::fs::seek(file, SeekFrom::End(0)).map_err(|error| FormatError::io(name, "find its length", error))
        }
        other => Err(FormatError::io(
            name,
            "use it as an image",
            io::Error::new(io::ErrorKind::InvalidInput, format!("it is no file or block device but a {other:?}")),
        )),
    }
}

impl Source for RawSource {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> Result<(), FormatError> {
        self.file
            .read_exact_at(bytes, offset)
            .map_err(|error| FormatError::io(&self.name, format!("read {} bytes at {offset:#x}", bytes.len()), error))
    }

    fn extent_at(&self, offset: u64, limit: u64) -> Result<Extent, FormatError> {
        let rest = (self.len - offset).min(limit);
        // The file's own position moves, but nobody reads at it.
        let (content, end) = match rustix::fs::seek(&self.file, SeekFrom::Data(offset)) {
            Ok(data) if data > offset => (Content::Zeros, data),
            Ok(_) => match rustix::fs::seek(&self.file, SeekFrom::Hole(offset)) {
                Ok(hole) if hole > offset => (Content::Data, hole),
                _ => (Content::Data, self.len),
            },
            Err(rustix::io::Errno::NXIO) => (Content::Zeros, self.len),
            // Block devices, and file systems that do not know holes.
            Err(_) => (Content::Data, self.len),
        };
        Ok(Extent { len: (end - offset).min(rest), content })
    }
}

/// A raw image to write, in any order.
#[derive(Debug)]
pub struct RawTarget {
    file: File,
    name: String,
    len: u64,
    /// From here on the file is a hole and needs no zeros.
    untouched_from: u64,
}

impl RawTarget {
    /// Makes a new file of `len` bytes; one that is already there is left alone and reported.
    pub fn create(path: &Path, len: u64) -> Result<Self, FormatError> {
        let name = file_name(path);
        let file = File::options()
            .write(true)
            .create_new(true)
            .open(path)
            .map_err(|error| FormatError::io(&name, "make it", error))?;
        file.set_len(len).map_err(|error| FormatError::io(&name, format!("give it {len} bytes"), error))?;
        Ok(RawTarget { file, name, len, untouched_from: 0 })
    }

    /// Opens a file or block device that is there; its content is overwritten, its length stays.
    pub fn open(path: &Path) -> Result<Self, FormatError> {
        let name = file_name(path);
        let file = rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty())
            .map_err(|error| FormatError::io(&name, "open it for writing", error))?;
        let status = rustix::fs::fstat(&file).map_err(|error| FormatError::io(&name, "look at it", error))?;
        let len = disk_len(&file, &status, &name)?;
        Ok(RawTarget { file: File::from(file), name, len, untouched_from: len })
    }

    fn write_zeros(&self, mut offset: u64, end: u64) -> Result<(), FormatError> {
        while offset < end {
            let len = (end - offset).min(ZEROS.len() as u64);
            self.write(offset, &ZEROS[..len as usize])?;
            offset += len;
        }
        Ok(())
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), FormatError> {
        write_file(&self.file, &self.name, offset, bytes)
    }
}

/// Writes to an image's file.
pub(super) fn write_file(file: &File, name: &str, mut offset: u64, bytes: &[u8]) -> Result<(), FormatError> {
    for piece in bytes.chunks(WRITE_LEN) {
        file.write_all_at(piece, offset)
            .map_err(|error| FormatError::io(name, format!("write {} bytes at {offset:#x}", piece.len()), error))?;
        offset += piece.len() as u64;
    }
    Ok(())
}

impl Target for RawTarget {
    fn len(&self) -> u64 {
        self.len
    }

    fn granule(&self) -> usize {
        GRANULE
    }

    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> Result<(), FormatError> {
        self.untouched_from = self.untouched_from.max(offset + bytes.len() as u64);
        self.write(offset, bytes)
    }

    fn zero(&mut self, offset: u64, len: u64) -> Result<(), FormatError> {
        let end = (offset + len).min(self.untouched_from);
        if offset >= end {
            return Ok(());
        }
        let punched = rustix::fs::fallocate(
            &self.file,
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            offset,
            end - offset,
        );
        match punched {
            Ok(()) => Ok(()),
            Err(_) => self.write_zeros(offset, end),
        }
    }

    fn finish(&mut self) -> Result<(), FormatError> {
        self.file.sync_all().map_err(|error| FormatError::io(&self.name, "flush it to the disk", error))
    }
}

#[cfg(test)]
mod tests {
    use super::super::test_folder::TestFolder;
    use super::*;

    #[test]
    fn holes_are_found_and_left() {
        let folder = TestFolder::new("raw-holes");
        let path = folder.path("disk");
        let mut target = RawTarget::create(&path, 1 << 20).unwrap();
        target.write_at(256 << 10, &[7; 8192]).unwrap();
        target.zero(512 << 10, 64 << 10).unwrap();
        target.finish().unwrap();
        let source = RawSource::open(&path).unwrap();
        assert_eq!(source.len(), 1 << 20);
        assert_eq!(source.extent_at(0, 1 << 20).unwrap(), Extent { len: 256 << 10, content: Content::Zeros });
        assert_eq!(source.extent_at(256 << 10, 1 << 20).unwrap(), Extent { len: 8192, content: Content::Data });
        let after = source.extent_at((256 << 10) + 8192, 1 << 30).unwrap();
        assert_eq!(after, Extent { len: (768 << 10) - 8192, content: Content::Zeros });
    }

    #[test]
    fn zeros_over_old_data_read_as_zeros() {
        let folder = TestFolder::new("raw-zeros");
        let path = folder.path("disk");
        std::fs::write(&path, vec![9; 100_000]).unwrap();
        let mut target = RawTarget::open(&path).unwrap();
        target.zero(10, 50_000).unwrap();
        target.finish().unwrap();
        let bytes = std::fs::read(&path).unwrap();
        assert!(bytes[10..50_010].iter().all(|byte| *byte == 0));
        assert!(bytes[..10].iter().chain(&bytes[50_010..]).all(|byte| *byte == 9));
        assert_eq!(bytes.len(), 100_000);
    }

    #[test]
    fn what_is_no_file_or_block_device_is_refused() {
        let folder = TestFolder::new("raw-kinds");
        assert!(RawSource::open(folder.root()).is_err());
        assert!(RawSource::open(std::path::Path::new("/dev/zero")).is_err());
        let path = folder.path("disk");
        std::fs::write(&path, b"kept").unwrap();
        assert!(RawTarget::create(&path, 10).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"kept");
    }
}
