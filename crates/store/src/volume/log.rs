//! A volume's log: every change of the volume in order, before it is in the tree.
//!
//! The log is a row of files of equal length, `log-N`. A record is a header of 64 bytes and its payload, padded to 64; the first record
//! after a flush begins at a page of its own, so that no page with promised records is ever written again. A record counts if it is
//! whole, carries the number that comes next, and was not written by an earlier process than the one before it: what a crash left
//! behind a hole never does. Each record says up to where records were promised when it was written: so a record that was promised and
//! is not whole any more is told from one that a crash tore.
//!
//! Files whose content is in the tree are used again (`spares`): their blocks are allocated and written already, so that a flush writes the
//! records and nothing else.

use std::fs::File;
use std::io::{self, IoSlice};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Result, StoreError};
use crate::id::Id;
use crate::room;
use crate::volume::extent_map::LogPlace;
use crate::volume::log_file::{FORMAT, LogFile, PAGE_LEN, allocate, file_header, make_file};
use crate::volume::log_read::{self, Found};
use crate::volume::log_record::{Appended, Entry, HEADER_LEN, Header, Position, record_len, volume_tag};
use crate::volume::spares::Spare;

/// Bytes of a log file, unless another size is asked for.
pub(crate) const FILE_LEN_DEFAULT: u64 = 32 << 20;
/// The shortest that takes the longest record, and the longest.
pub(crate) const FILE_LEN_RANGE: (u64, u64) = (2 << 20, 1 << 30);
/// Bytes of a new file whose room is taken at a time: a volume that is hardly written takes little.
const ALLOCATION_LEN: u64 = 2 << 20;
/// Records that are appended with one call at most: the host takes 1,024 slices, and a record has three.
pub(crate) const GROUP_LEN_MAX: usize = 128;
/// What lies between a payload and the next record.
const PADDING: [u8; HEADER_LEN] = [0; HEADER_LEN];

/// The end of a log that is written.
pub(crate) struct LogWriter {
    folder: PathBuf,
    volume: u64,
    epoch: u32,
    file_len: u64,
    file: Arc<LogFile>,
    offset: u64,
    sequence: u64,
    /// The next record begins at a page of its own.
    fresh_page: bool,
    /// Flushes since the file was begun.
    flushes: u64,
    /// Bytes of the file whose room is taken.
    allocated: u64,
    /// Files with records that may not be stable, each with the sequence number behind its last one.
    unsynced: Vec<(Arc<LogFile>, u64)>,
    /// Records before this sequence number are stable.
    promised: u64,
    /// Names of files that the folder got, and how many of them are stable.
    names: u64,
    stable_names: u64,
    /// Bytes of the volume that were written since the last flush began.
    unflushed_bytes: u64,
    /// The records that were not flushed name chunks that may not be stable: how often the store had failed to keep chunks before those were
    /// stored.
    unstable_chunks: Option<u64>,
    broken: bool,
    /// Room for headers, from one call to the next.
    headers: Vec<[u8; HEADER_LEN]>,
}

impl LogWriter {
    /// Where the next record would begin.
    pub fn position(&self) -> Position {
        let place = LogPlace::new(self.file.number, self.offset as u32);
        Position { place, sequence: self.sequence, epoch: self.epoch }
    }

    /// Flushes since the file was begun.
    pub fn flushes(&self) -> u64 {
        self.flushes
    }

    /// Whether a record with that payload fits into the file.
    pub fn fits(&self, payload_len: usize) -> bool {
        let offset = if self.fresh_page { self.offset.next_multiple_of(PAGE_LEN) } else { self.offset };
        offset + HEADER_LEN as u64 + payload_len as u64 <= self.file_len
    }

    /// The file that is written.
    pub fn file(&self) -> &Arc<LogFile> {
        &self.file
    }

    /// Goes on in the next file. Its name is stable with the next flush.
    pub fn next_file(&mut self, spare: Option<Spare>) -> Result<Arc<LogFile>> {
        self.check()?;
        if spare.is_none() {
            room::leave(&self.file.file, ALLOCATION_LEN)
                .map_err(StoreError::file("make a file after", &self.file.path))?;
        }
        let (file, used_before) = make_file(&self.folder, self.file.number + 1, self.volume, self.file_len, spare)?;
        self.names += 1;
        self.file = Arc::new(file);
        self.allocated = if used_before { self.file_len } else { 0 };
        self.offset = PAGE_LEN;
        self.fresh_page = false;
        self.flushes = 0;
        Ok(self.file.clone())
    }

    /// Appends records with one call to the host: the first, for which there must be [room](Self::fits), and those behind it that fit into the
    /// file, [`GROUP_LEN_MAX`] at most. `appended` hears of each that is whole in the host's cache when this comes back, also if the next one
    /// failed.
    pub fn append_all(&mut self, entries: &[Entry], appended: &mut Vec<Appended>) -> Result<()> {
        self.check()?;
        if self.fresh_page {
            self.offset = self.offset.next_multiple_of(PAGE_LEN);
            self.fresh_page = false;
        }
        let (mut count, mut end) = (0, self.offset);
        for entry in entries.iter().take(GROUP_LEN_MAX) {
            if count > 0 && end + (HEADER_LEN + entry.payload.len()) as u64 > self.file_len {
                break;
            }
            end += record_len(entry.payload.len());
            count += 1;
        }
        self.take_room(end)?;
        let entries = &entries[..count];
        let mut headers = std::mem::take(&mut self.headers);
        headers.clear();
        headers.extend((self.sequence..).zip(entries).map(|(sequence, entry)| {
            let header = Header {
                change: entry.change,
                payload_len: entry.payload.len() as u32,
                sequence,
                epoch: self.epoch,
                checksum: entry.checksum,
                promised: self.promised,
            };
            header.to_bytes(self.volume)
        }));
        let mut slices = Vec::with_capacity(3 * count);
        for (header, entry) in headers.iter().zip(entries) {
            let padding = record_len(entry.payload.len()) as usize - HEADER_LEN - entry.payload.len();
            slices.extend([IoSlice::new(header), IoSlice::new(entry.payload), IoSlice::new(&PADDING[..padding])]);
        }
        // What lies behind the last payload is nobody's.
        slices.pop();
        let (written, result) = write_all_of(&self.file.file, &mut slices, self.offset);
        drop(slices);
        self.headers = headers;
        let (begin, written_end) = (self.sequence, self.offset + written);
        for entry in entries {
            let payload_end = self.offset + (HEADER_LEN + entry.payload.len()) as u64;
            // Those that are whole count even so: their numbers would come again, and a recovery could take what lies here for what is written
            // under them next.
            if payload_end > written_end {
                break;
            }
            let place = LogPlace::new(self.file.number, (self.offset as usize + HEADER_LEN) as u32);
            self.offset += record_len(entry.payload.len());
            self.sequence += 1;
            self.unflushed_bytes += entry.change.written_bytes(entry.payload.len());
            appended.push(Appended {
                change: entry.change,
                place,
                payload_len: entry.payload.len() as u32,
                end: self.position(),
            });
        }
        if self.sequence > begin {
            match self.unsynced.last_mut() {
                Some((last, end)) if Arc::ptr_eq(last, &self.file) => *end = self.sequence,
                _ => self.unsynced.push((self.file.clone(), self.sequence)),
            }
        }
        result.map_err(|error| {
            let error = StoreError::file("write", &self.file.path)(error);
            // A file system that copies on write can be full even so; what is written next takes the place of a part of a record.
            self.broken = !error.is_no_space();
            error
        })
    }

    /// Takes the room for what is about to be written, a step ahead: a record that was accepted is never refused for want of it. Takes
    /// little time, and none in files that were used before.
    fn take_room(&mut self, end: u64) -> Result<()> {
        if end <= self.allocated {
            return Ok(());
        }
        let end = (end + ALLOCATION_LEN).min(self.file_len.max(end));
        // What lies before is records.
        let start = self.allocated.max(self.offset);
        let taken = room::leave(&self.file.file, end - start).and_then(|()| allocate(&self.file.file, start, end));
        taken.map_err(StoreError::file("take room for", &self.file.path))?;
        self.allocated = end;
        Ok(())
    }

    /// Bytes of the volume that were written since the last flush began.
    pub fn unflushed_bytes(&self) -> u64 {
        self.unflushed_bytes
    }

    /// A record is about to be appended that names chunks which may not be stable: the next flush makes them so. `failures` is how often the
    /// store had failed to keep chunks before those were stored.
    pub fn owe_chunks(&mut self, failures: u64) {
        self.unstable_chunks.get_or_insert(failures);
    }

    /// Whether a flush has chunks to make stable.
    pub fn owes_chunks(&self) -> bool {
        self.unstable_chunks.is_some()
    }

    /// Begins a flush: what to sync, and the sequence number up to which everything is stable then.
    pub fn begin_flush(&mut self) -> Result<Flush> {
        self.check()?;
        self.fresh_page = true;
        self.flushes += 1;
        self.unflushed_bytes = 0;
        Ok(Flush {
            chunks: self.unstable_chunks.take(),
            files: self.unsynced.iter().map(|(file, _)| file.clone()).collect(),
            folder: (self.names > self.stable_names).then(|| self.folder.clone()),
            names: self.names,
            sequence: self.sequence,
        })
    }

    /// A flush came to its end. A file that got records since it began needs another one, even if the log went on in the next.
    pub fn end_flush(&mut self, flush: &Flush, result: &io::Result<()>) {
        if result.is_err() {
            // What the host dropped it does not report twice: nothing after it can be promised.
            self.broken = true;
            return;
        }
        self.promised = self.promised.max(flush.sequence);
        self.stable_names = self.stable_names.max(flush.names);
        self.unsynced.retain(|(_, end)| *end > flush.sequence);
    }

    /// The file whose failure means that nothing can be promised any more.
    pub fn broken(&self) -> Option<PathBuf> {
        self.broken.then(|| self.file.path.clone())
    }

    fn check(&self) -> Result<()> {
        if self.broken { Err(StoreError::Broken { path: self.file.path.clone() }) } else { Ok(()) }
    }
}

/// What has to be synced for a flush.
pub(crate) struct Flush {
    /// Chunks have to be stable first: how often the store had failed to keep some before these were stored.
    pub chunks: Option<u64>,
    pub files: Vec<Arc<LogFile>>,
    /// The folder, if it got names since the last flush.
    folder: Option<PathBuf>,
    names: u64,
    pub sequence: u64,
}

impl Flush {
    /// Carries it out, on this thread.
    pub fn run(&self) -> io::Result<()> {
        self.files.iter().try_for_each(|file| file.file.sync_data())?;
        self.folder.as_ref().map_or(Ok(()), |folder| File::open(folder)?.sync_all())
    }
}

/// Writes all of some slices one behind the other: how many bytes, and why no more.
fn write_all_of(file: &File, mut slices: &mut [IoSlice<'_>], offset: u64) -> (u64, io::Result<()>) {
    let mut written = 0;
    IoSlice::advance_slices(&mut slices, 0);
    while !slices.is_empty() {
        match rustix::io::pwritev(file, slices, offset + written) {
            Ok(0) => return (written, Err(io::ErrorKind::WriteZero.into())),
            Ok(count) => {
                written += count as u64;
                IoSlice::advance_slices(&mut slices, count);
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return (written, Err(error.into())),
        }
    }
    (written, Ok(()))
}

/// A log that was found.
pub(crate) struct Recovered {
    pub writer: LogWriter,
    /// The files that hold records from the start on, and the one that is written.
    pub files: Vec<Arc<LogFile>>,
}

/// Reads a log from a position on: `found` hears of every record that is whole, with its payload, and says whether it counts. The log goes on
/// behind the last that does, under a new epoch.
pub(crate) fn recover(
    folder: &Path,
    id: Id,
    epoch: u32,
    start: Position,
    file_len: u64,
    spare: impl FnOnce() -> Option<Spare>,
    found: impl FnMut(Appended, &[u8]) -> Result<bool>,
) -> Result<Recovered> {
    let volume = volume_tag(id);
    let Found { mut files, end: mut at, refused } = log_read::read(folder, id, start, found)?;
    if let (Some(offset), Some(file)) = (refused, files.last()) {
        // Should what it lacks turn up later, it is not to count after all: other records follow in its stead.
        let cleared = file.file.write_all_at(&[0; HEADER_LEN], offset).and_then(|()| file.file.sync_data());
        cleared.map_err(StoreError::file("write", &file.path))?;
    }
    let (file, allocated) = match files.last() {
        Some(file) => {
            if file.format < FORMAT {
                // It was begun by a release that knew fewer records.
                let header = file_header(file.number, volume);
                file.file.write_all_at(&header, 0).map_err(StoreError::file("write", &file.path))?;
            }
            (file.clone(), 0)
        }
        None => {
            let number = at.place.file();
            let (file, used_before) = make_file(folder, number, volume, file_len, spare())?;
            let file = Arc::new(file);
            // Not before the start: the next recovery begins there again.
            at.place = LogPlace::new(number, at.place.offset().max(PAGE_LEN) as u32);
            files.push(file.clone());
            (file, if used_before { file_len } else { 0 })
        }
    };
    let writer = LogWriter {
        folder: folder.to_path_buf(),
        volume,
        epoch,
        file_len,
        offset: at.place.offset(),
        sequence: at.sequence,
        fresh_page: true,
        flushes: 0,
        allocated,
        // The names of the files may not be stable, and not every host forgets what it could not write.
        unsynced: files.iter().map(|file| (file.clone(), at.sequence)).collect(),
        promised: 0,
        names: 1,
        stable_names: 0,
        file,
        unflushed_bytes: 0,
        unstable_chunks: None,
        broken: false,
        headers: Vec::new(),
    };
    Ok(Recovered { writer, files })
}

#[cfg(test)]
#[path = "log_tests.rs"]
mod tests;
