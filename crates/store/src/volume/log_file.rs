//! A file of a volume's log: its name and header, and the room that it takes.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use rustix::fs::FallocateFlags;

use crate::error::{Result, StoreError};
use crate::volume::log_record::HEADER_LEN;
use crate::volume::spares::Spare;

/// Bytes of a spare that are written and synced at a time: those who flush meanwhile wait for so much at most.
const SPARE_STEP_LEN: usize = 256 << 10;
pub(super) const PAGE_LEN: u64 = 4096;
/// Where the first record of a file begins.
pub(crate) const FIRST_OFFSET: u32 = PAGE_LEN as u32;
const FILE_MAGIC: &[u8; 16] = b"polder log\0\0\0\0\0\0";
/// Files of version 1 have no records of chunks, those before version 3 nothing that is sealed with another suite than the first.
pub(super) const FORMAT: u32 = 3;

/// A file of the log. It is written again from the front once nobody holds it any more.
pub(crate) struct LogFile {
    pub number: u32,
    pub file: File,
    pub(super) path: PathBuf,
    /// The version in its header.
    pub(super) format: u32,
}

impl LogFile {
    #[cfg(test)]
    pub fn at(number: u32, path: PathBuf) -> Self {
        LogFile { number, file: File::create(&path).unwrap(), path, format: FORMAT }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

pub(super) fn path_of(folder: &Path, number: u32) -> PathBuf {
    folder.join(format!("log-{number:08}"))
}

pub(super) fn file_header(number: u32, volume: u64) -> [u8; HEADER_LEN] {
    let mut bytes = [0; HEADER_LEN];
    bytes[..16].copy_from_slice(FILE_MAGIC);
    bytes[16..20].copy_from_slice(&FORMAT.to_le_bytes());
    bytes[20..24].copy_from_slice(&number.to_le_bytes());
    bytes[24..32].copy_from_slice(&volume.to_le_bytes());
    let checksum = crc32c::crc32c(&bytes[..60]);
    bytes[60..].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

/// Opens a file of the log, if there is one with that number and a header of its own.
pub(super) fn open_file(folder: &Path, number: u32, volume: u64) -> Result<Option<LogFile>> {
    let path = path_of(folder, number);
    let file = match File::options().read(true).write(true).open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(StoreError::file("open", &path)(error)),
    };
    let mut bytes = [0; HEADER_LEN];
    if !read_whole(&file, &mut bytes, 0).map_err(StoreError::file("read", &path))? {
        return Ok(None);
    }
    let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    if &bytes[..16] != FILE_MAGIC || word(60) != crc32c::crc32c(&bytes[..60]) {
        // A crash came before its header was written: nothing was ever appended to it.
        return Ok(None);
    }
    if !(1..=FORMAT).contains(&word(16)) {
        return Err(StoreError::UnknownFormat { path, found: word(16), known: FORMAT });
    }
    let tag = u64::from(word(24)) | u64::from(word(28)) << 32;
    Ok((word(20) == number && tag == volume).then_some(LogFile { number, file, path, format: word(16) }))
}

/// A file of the log under its number: one that was used before, or a new one; whether it was. Neither its name nor its header is stable.
pub(super) fn make_file(
    folder: &Path,
    number: u32,
    volume: u64,
    len: u64,
    spare: Option<Spare>,
) -> Result<(LogFile, bool)> {
    let path = path_of(folder, number);
    let made = (|| {
        let taken = spare.map(|spare| spare.rename(&path)).transpose()?.flatten();
        let used_before = taken.is_some();
        let file = match taken {
            Some(file) => file,
            None => File::options().read(true).write(true).create(true).truncate(true).open(&path)?,
        };
        // Its length does not change any more, so that a flush need not write it.
        file.set_len(len)?;
        file.write_all_at(&file_header(number, volume), 0)?;
        Ok((file, used_before))
    })();
    let (file, used_before) = made.map_err(StoreError::file("make", &path))?;
    Ok((LogFile { number, file, path, format: FORMAT }, used_before))
}

/// Takes the room for a range of a file, which holds nothing yet.
pub(super) fn allocate(file: &File, start: u64, end: u64) -> io::Result<()> {
    match rustix::fs::fallocate(file, FallocateFlags::empty(), start, end - start) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::OPNOTSUPP) => write_zeros(file, start, end, || Ok(())),
        Err(error) => Err(error.into()),
    }
}

pub(super) fn write_zeros(
    file: &File,
    start: u64,
    end: u64,
    mut written: impl FnMut() -> io::Result<()>,
) -> io::Result<()> {
    let zeros = vec![0; SPARE_STEP_LEN];
    (start..end).step_by(zeros.len()).try_for_each(|offset| {
        let part = zeros.len().min((end - offset) as usize);
        file.write_all_at(&zeros[..part], offset)?;
        written()
    })
}

/// Numbers of the log files in a folder.
pub(crate) fn list(folder: &Path) -> Result<Vec<u32>> {
    let mut logs = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(StoreError::file("list", folder))? {
        let entry = entry.map_err(StoreError::file("list", folder))?;
        if let Some(number) = entry.file_name().to_string_lossy().strip_prefix("log-") {
            logs.extend(number.parse::<u32>());
        }
    }
    logs.sort_unstable();
    Ok(logs)
}

/// Removes the files of a log before a number.
pub(crate) fn remove_before(folder: &Path, number: u32) -> Result<()> {
    for old in list(folder)?.into_iter().filter(|&old| old < number) {
        let path = path_of(folder, old);
        std::fs::remove_file(&path).map_err(StoreError::file("remove", &path))?;
    }
    Ok(())
}

pub(crate) fn sync_folder(folder: &Path) -> Result<()> {
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(StoreError::file("write", folder))
}

/// Sees to it that what is read from a file is what the host's disk holds. After a sync that failed the host's cache holds what
/// never came there, as if it had.
pub(crate) fn settle(file: &File) -> io::Result<()> {
    file.sync_data()?;
    match rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed) {
        // A file system without a cache has none to forget.
        Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

pub(super) fn read_whole(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<bool> {
    match file.read_exact_at(bytes, offset) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}
