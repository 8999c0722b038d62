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

use rustix::fs::FallocateFlags;

use crate::error::{Result, StoreError};
use crate::id::Id;
use crate::records::segment::read_up_to;
use crate::room;
use crate::volume::extent_map::LogPlace;
use crate::volume::spares::Spare;

/// Bytes of a log file, unless another size is asked for.
pub(crate) const FILE_LEN_DEFAULT: u64 = 32 << 20;
/// The shortest that takes the longest record, and the longest.
pub(crate) const FILE_LEN_RANGE: (u64, u64) = (2 << 20, 1 << 30);
/// The longest payload of a record.
pub(crate) const PAYLOAD_LEN_MAX: usize = 1 << 20;
/// Bytes of a new file whose room is taken at a time: a volume that is hardly written takes little.
const ALLOCATION_LEN: u64 = 2 << 20;
/// Bytes of a spare that are written and synced at a time: those who flush meanwhile wait for so much at most.
const SPARE_STEP_LEN: usize = 256 << 10;
const HEADER_LEN: usize = 64;
const PAGE_LEN: u64 = 4096;
/// Where the first record of a file begins.
pub(crate) const FIRST_OFFSET: u32 = PAGE_LEN as u32;
const FILE_MAGIC: &[u8; 16] = b"polder log\0\0\0\0\0\0";
const MAGIC: u32 = u32::from_le_bytes(*b"Plog");
const FORMAT: u32 = 1;

/// What a record says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    /// The payload was written at `offset`.
    Write { offset: u64 },
    /// As `Write` in an encrypted volume; the payload is sealed under that number of the opening that wrote it.
    Sealed { offset: u64, number: u64 },
    /// The range reads as zeros.
    Zeros { offset: u64, len: u64 },
    /// A snapshot of all records before this one; the payload says which.
    Snapshot,
    /// The volume has another size.
    Resize { capacity_bytes: u64 },
}

/// A record's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Header {
    change: Change,
    payload_len: u32,
    sequence: u64,
    epoch: u32,
    checksum: u32,
    /// Records before this sequence number were stable when it was written.
    promised: u64,
}

impl Header {
    fn to_bytes(self, volume: u64) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        let (kind, offset, len) = match self.change {
            Change::Write { offset } => (1, offset, u64::from(self.payload_len)),
            Change::Sealed { offset, number } => (5, offset, number),
            Change::Zeros { offset, len } => (2, offset, len),
            Change::Snapshot => (3, 0, 0),
            Change::Resize { capacity_bytes } => (4, capacity_bytes, 0),
        };
        bytes[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[4] = kind;
        bytes[8..12].copy_from_slice(&(volume as u32).to_le_bytes());
        bytes[12..16].copy_from_slice(&self.epoch.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[24..32].copy_from_slice(&offset.to_le_bytes());
        bytes[32..40].copy_from_slice(&len.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.payload_len.to_le_bytes());
        bytes[44..48].copy_from_slice(&self.checksum.to_le_bytes());
        bytes[48..56].copy_from_slice(&self.promised.to_le_bytes());
        bytes[56..60].copy_from_slice(&((volume >> 32) as u32).to_le_bytes());
        let checksum = crc32c::crc32c(&bytes[..60]);
        bytes[60..64].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    fn from_bytes(bytes: &[u8; HEADER_LEN], volume: u64) -> Option<Header> {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        let known = word(0) == MAGIC
            && word(60) == crc32c::crc32c(&bytes[..60])
            && (u64::from(word(8)) | u64::from(word(56)) << 32) == volume;
        let header = Header {
            change: match bytes[4] {
                1 => Change::Write { offset: long(24) },
                2 => Change::Zeros { offset: long(24), len: long(32) },
                3 => Change::Snapshot,
                4 => Change::Resize { capacity_bytes: long(24) },
                5 => Change::Sealed { offset: long(24), number: long(32) },
                _ => return None,
            },
            payload_len: word(40),
            sequence: long(16),
            epoch: word(12),
            checksum: word(44),
            promised: long(48),
        };
        (known && header.payload_len as usize <= PAYLOAD_LEN_MAX).then_some(header)
    }
}

/// A file of the log. It is written again from the front once nobody holds it any more.
pub(crate) struct LogFile {
    pub number: u32,
    pub file: File,
    path: PathBuf,
}

impl LogFile {
    #[cfg(test)]
    pub fn at(number: u32, path: PathBuf) -> Self {
        LogFile { number, file: File::create(&path).unwrap(), path }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Where records end and continue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Position {
    pub place: LogPlace,
    /// Of the next record.
    pub sequence: u64,
    /// No record from here on was written under an earlier epoch: those that lie here were dropped by a recovery.
    pub epoch: u32,
}

/// A record that was appended or found.
pub(crate) struct Appended {
    pub change: Change,
    /// Of the payload.
    pub place: LogPlace,
    pub payload_len: u32,
    /// Behind the record.
    pub end: Position,
}

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
    broken: bool,
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

    /// Appends a record; there must be [room](Self::fits) for it. It is in the host's cache when this comes back.
    pub fn append(&mut self, change: Change, payload: &[u8], checksum: u32) -> Result<Appended> {
        self.check()?;
        if self.fresh_page {
            self.offset = self.offset.next_multiple_of(PAGE_LEN);
            self.fresh_page = false;
        }
        self.take_room(self.offset + record_len(payload.len()))?;
        let header = Header {
            change,
            payload_len: payload.len() as u32,
            sequence: self.sequence,
            epoch: self.epoch,
            checksum,
            promised: self.promised,
        };
        let header = header.to_bytes(self.volume);
        if let Err(error) = write_both(&self.file.file, &header, payload, self.offset) {
            let error = StoreError::file("write", &self.file.path)(error);
            // A file system that copies on write can be full even so; what is written next takes the place of a part of a record.
            self.broken = !error.is_no_space();
            return Err(error);
        }
        let place = LogPlace::new(self.file.number, (self.offset as usize + HEADER_LEN) as u32);
        self.offset += record_len(payload.len());
        self.sequence += 1;
        match self.unsynced.last_mut() {
            Some((last, end)) if Arc::ptr_eq(last, &self.file) => *end = self.sequence,
            _ => self.unsynced.push((self.file.clone(), self.sequence)),
        }
        Ok(Appended { change, place, payload_len: payload.len() as u32, end: self.position() })
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

    /// Begins a flush: what to sync, and the sequence number up to which everything is stable then.
    pub fn begin_flush(&mut self) -> Result<Flush> {
        self.check()?;
        self.fresh_page = true;
        self.flushes += 1;
        Ok(Flush {
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

/// Bytes of a record with its padding.
fn record_len(payload_len: usize) -> u64 {
    ((HEADER_LEN + payload_len) as u64).next_multiple_of(HEADER_LEN as u64)
}

/// Writes header and payload, whole.
fn write_both(file: &File, header: &[u8], payload: &[u8], offset: u64) -> io::Result<()> {
    let whole = header.len() + payload.len();
    let written = loop {
        match rustix::io::pwritev(file, &[IoSlice::new(header), IoSlice::new(payload)], offset) {
            Ok(written) => break written,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    };
    if written < whole {
        let rest = [header, payload].concat();
        file.write_all_at(&rest[written..], offset + written as u64)?;
    }
    Ok(())
}

fn path_of(folder: &Path, number: u32) -> PathBuf {
    folder.join(format!("log-{number:08}"))
}

/// The part of a volume's id that its records carry. Files were the logs of other volumes before, and what those wrote there is not to pass
/// for records of this one: so it is no less than what cannot be guessed.
pub(crate) fn volume_tag(id: Id) -> u64 {
    id.0.iter().take(8).fold(0, |tag, &byte| tag << 8 | u64::from(byte))
}

fn file_header(number: u32, volume: u64) -> [u8; HEADER_LEN] {
    let mut bytes = [0; HEADER_LEN];
    bytes[..16].copy_from_slice(FILE_MAGIC);
    bytes[16..20].copy_from_slice(&FORMAT.to_le_bytes());
    bytes[20..24].copy_from_slice(&number.to_le_bytes());
    bytes[24..32].copy_from_slice(&volume.to_le_bytes());
    let checksum = crc32c::crc32c(&bytes[..60]);
    bytes[60..].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

/// A file of the log under its number: one that was used before, or a new one; whether it was. Neither its name nor its header is stable.
fn make_file(folder: &Path, number: u32, volume: u64, len: u64, spare: Option<Spare>) -> Result<(LogFile, bool)> {
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
    Ok((LogFile { number, file, path }, used_before))
}

/// Takes the room for a range of a file, which holds nothing yet.
fn allocate(file: &File, start: u64, end: u64) -> io::Result<()> {
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

pub(crate) fn sync_folder(folder: &Path) -> Result<()> {
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(StoreError::file("write", folder))
}

/// A log that was found.
pub(crate) struct Recovered {
    pub writer: LogWriter,
    /// The files that hold records from the start on, and the one that is written.
    pub files: Vec<Arc<LogFile>>,
}

/// Reads a log from a position on: `found` hears of every record that counts, with its payload if that is not of a write. The log goes
/// on behind the last, under a new epoch.
pub(crate) fn recover(
    folder: &Path,
    id: Id,
    epoch: u32,
    start: Position,
    file_len: u64,
    spare: impl FnOnce() -> Option<Spare>,
    found: impl FnMut(Appended, &[u8]),
) -> Result<Recovered> {
    let volume = volume_tag(id);
    let (mut files, mut at) = read(folder, id, start, found)?;
    let (file, allocated) = match files.last() {
        Some(file) => (file.clone(), 0),
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
        broken: false,
    };
    Ok(Recovered { writer, files })
}

/// Reads a log from a position on and changes nothing: `found` hears of every record that counts. Gives the files that were read, and
/// where the log ends.
pub(crate) fn read(
    folder: &Path,
    id: Id,
    start: Position,
    mut found: impl FnMut(Appended, &[u8]),
) -> Result<(Vec<Arc<LogFile>>, Position)> {
    let volume = volume_tag(id);
    let mut files: Vec<Arc<LogFile>> = Vec::new();
    let mut at = start;
    let mut payload = Vec::new();
    while let Some(file) = open_file(folder, at.place.file(), volume)? {
        let file = Arc::new(file);
        files.push(file.clone());
        let reading = StoreError::file("read", &file.path);
        let end = (|| {
            settle(&file.file)?;
            while let Some((header, offset)) = next_record(&file.file, &at, volume, &mut payload)? {
                let begin = LogPlace::new(file.number, (offset + HEADER_LEN as u64) as u32);
                at = Position {
                    place: LogPlace::new(file.number, (offset + record_len(payload.len())) as u32),
                    sequence: at.sequence + 1,
                    epoch: header.epoch,
                };
                let appended =
                    Appended { change: header.change, place: begin, payload_len: payload.len() as u32, end: at };
                found(appended, &payload);
            }
            Ok(at)
        })();
        at = end.map_err(reading)?;
        // The next file counts if it begins with the record that comes next.
        let next = Position { place: LogPlace::new(file.number + 1, PAGE_LEN as u32), ..at };
        let follower = open_file(folder, next.place.file(), volume)?;
        if let Some(offset) = promised_behind(&file, follower.as_ref(), &at, volume)? {
            return Err(StoreError::Damaged {
                path: file.path.clone(),
                offset,
                what: format!("record {} of the log was promised and is not whole any more", at.sequence),
            });
        }
        let Some(file) = follower else { break };
        let begins = next_record(&file.file, &next, volume, &mut payload);
        if begins.map_err(StoreError::file("read", &file.path))?.is_none() {
            break;
        }
        at = next;
    }
    Ok((files, at))
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

/// Where a record that should be at a position was damaged, if one was: records behind it say that it was promised. One record is as
/// long as a megabyte, so the one that follows it begins not far behind, or in the next file.
fn promised_behind(file: &LogFile, follower: Option<&LogFile>, at: &Position, volume: u64) -> Result<Option<u64>> {
    let reading = |file: &LogFile| {
        let path = file.path.clone();
        move |error| StoreError::file("read", &path)(error)
    };
    let start = at.place.offset();
    let mut window = vec![0; 2 * PAYLOAD_LEN_MAX];
    let len = read_up_to(&file.file, &mut window, start).map_err(reading(file))?;
    let follows = |header: &Header| header.sequence > at.sequence && header.epoch >= at.epoch;
    let mut payload = Vec::new();
    let mut promises = |file: &LogFile, offset: u64, header: &Header| -> io::Result<bool> {
        let begin = LogPlace::new(file.number, offset as u32);
        let mut next = Position { place: begin, sequence: header.sequence, epoch: at.epoch };
        while let Some((header, offset)) = next_record(&file.file, &next, volume, &mut payload)? {
            if header.promised > at.sequence {
                return Ok(true);
            }
            let end = offset + record_len(payload.len());
            let place = LogPlace::new(file.number, end as u32);
            next = Position { place, sequence: header.sequence + 1, epoch: header.epoch };
        }
        Ok(false)
    };
    for from in (0..len.saturating_sub(HEADER_LEN - 1)).step_by(HEADER_LEN) {
        let Some(header) = header_at(&window[from..], volume).filter(&follows) else { continue };
        if promises(file, start + from as u64, &header).map_err(reading(file))? {
            return Ok(Some(start));
        }
        break;
    }
    if let Some(follower) = follower {
        let mut bytes = [0; HEADER_LEN];
        if read_whole(&follower.file, &mut bytes, PAGE_LEN).map_err(reading(follower))?
            && let Some(header) = header_at(&bytes, volume).filter(&follows)
            && promises(follower, PAGE_LEN, &header).map_err(reading(follower))?
        {
            return Ok(Some(start));
        }
    }
    Ok(None)
}

fn header_at(bytes: &[u8], volume: u64) -> Option<Header> {
    Header::from_bytes(bytes.first_chunk()?, volume)
}

/// The record at a position, or at the page behind it, if one counts. Its payload is left in `payload`.
fn next_record(file: &File, at: &Position, volume: u64, payload: &mut Vec<u8>) -> io::Result<Option<(Header, u64)>> {
    let offset = at.place.offset();
    let mut places = vec![offset, offset.next_multiple_of(PAGE_LEN)];
    places.dedup();
    for offset in places {
        let mut bytes = [0; HEADER_LEN];
        if !read_whole(file, &mut bytes, offset)? {
            continue;
        }
        let Some(header) = Header::from_bytes(&bytes, volume) else { continue };
        if header.sequence != at.sequence || header.epoch < at.epoch {
            continue;
        }
        payload.resize(header.payload_len as usize, 0);
        if read_whole(file, payload, offset + HEADER_LEN as u64)? && crc32c::crc32c(payload) == header.checksum {
            return Ok(Some((header, offset)));
        }
    }
    Ok(None)
}

fn read_whole(file: &File, bytes: &mut [u8], offset: u64) -> io::Result<bool> {
    match file.read_exact_at(bytes, offset) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

/// Opens a file of the log, if there is one with that number and a header of its own.
fn open_file(folder: &Path, number: u32, volume: u64) -> Result<Option<LogFile>> {
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
    if word(16) != FORMAT {
        return Err(StoreError::UnknownFormat { path, found: word(16), known: FORMAT });
    }
    let tag = u64::from(word(24)) | u64::from(word(28)) << 32;
    Ok((word(20) == number && tag == volume).then_some(LogFile { number, file, path }))
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

#[cfg(test)]
#[path = "log_tests.rs"]
mod tests;
