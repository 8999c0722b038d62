//! Segments: files of records, written once from front to end and then never changed.
//!
//! A process writes a segment of its own under a name that says so (`N.open`) and holds a lock on the file meanwhile. When the
//! segment is full, or the process ends, a table of its records in the order of their names goes to its end, and it is renamed to
//! `N.seg`: the table is the smallest kind of index run. Whoever finds an open segment without a lock finishes it, up to
//! the first record that is not whole.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::domain::OPEN_DOMAIN;
use crate::error::{Result, StoreError};
use crate::name::{Name, Namer};
use crate::records::record::{self, HEADER_LEN, Header};
use crate::volume::log_file::settle;

/// A segment is full when it holds that much.
pub(crate) const SEGMENT_LEN: u64 = 15 << 20;
/// No record of a segment ends behind this: what a location can say.
const SEGMENT_LEN_MAX: u64 = 16 << 20;
const MAGIC: &[u8; 16] = b"polder segment\0\0";
const TABLE_MAGIC: &[u8; 16] = b"polder table\0\0\0\0";
/// In files of version 1 everything is sealed with the first suite.
const FORMAT: u32 = 2;
const TABLE_FORMAT: u32 = 1;

/// The number of a segment; 28 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct SegmentNumber(pub u32);

pub(crate) const SEGMENT_NUMBER_MAX: u32 = (1 << 28) - 1;

/// Where a record lies: 56 bits of segment (28), offset in units of 64 bytes (18), and length in units of 128 bytes (10).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Location(u64);

impl Location {
    pub const LEN: usize = 7;
    const LEN_UNIT: u64 = 128;

    pub fn new(segment: SegmentNumber, offset: u64, record_len: usize) -> Self {
        debug_assert!(offset.is_multiple_of(HEADER_LEN as u64) && offset < SEGMENT_LEN_MAX);
        let units = (record_len as u64).div_ceil(Self::LEN_UNIT);
        let place = offset / HEADER_LEN as u64;
        Location(u64::from(segment.0) << 28 | place << 10 | units)
    }

    pub fn segment(self) -> SegmentNumber {
        SegmentNumber((self.0 >> 28) as u32)
    }

    pub fn offset(self) -> u64 {
        (self.0 >> 10 & 0x3_ffff) * HEADER_LEN as u64
    }

    /// Bytes to read: the record, and perhaps some behind it.
    pub fn read_len(self) -> usize {
        ((self.0 & 0x3ff) * Self::LEN_UNIT) as usize
    }

    pub fn to_bits(self) -> u64 {
        self.0
    }

    pub fn from_bits(bits: u64) -> Self {
        Location(bits)
    }

    fn to_bytes(self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes.copy_from_slice(&self.0.to_be_bytes()[1..]);
        bytes
    }

    fn from_bytes(bytes: &[u8]) -> Self {
        Location(bytes.iter().fold(0, |bits, &byte| bits << 8 | u64::from(byte)))
    }
}

/// An entry of a table or run: the first bytes of a name, and where its record lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Entry {
    pub prefix: [u8; Name::PREFIX_LEN],
    pub location: Location,
}

impl Entry {
    pub const LEN: usize = Name::PREFIX_LEN + Location::LEN;

    pub fn to_bytes(self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[..Name::PREFIX_LEN].copy_from_slice(&self.prefix);
        bytes[Name::PREFIX_LEN..].copy_from_slice(&self.location.to_bytes());
        bytes
    }

    pub fn from_bytes(bytes: &[u8]) -> Self {
        let mut prefix = [0; Name::PREFIX_LEN];
        prefix.copy_from_slice(&bytes[..Name::PREFIX_LEN]);
        Entry { prefix, location: Location::from_bytes(&bytes[Name::PREFIX_LEN..Self::LEN]) }
    }
}

/// Where segments lie and what they are called.
#[derive(Debug, Clone)]
pub(crate) struct SegmentFolder(pub PathBuf);

impl SegmentFolder {
    pub fn sealed(&self, segment: SegmentNumber) -> PathBuf {
        self.0.join(format!("{:08}.seg", segment.0))
    }

    pub fn open(&self, segment: SegmentNumber) -> PathBuf {
        self.0.join(format!("{:08}.open", segment.0))
    }

    /// What a file in the folder is, by its name.
    pub fn parse(name: &str) -> Option<(SegmentNumber, State)> {
        let (number, state) = name.split_once('.')?;
        let state = match state {
            "seg" => State::Sealed,
            "open" => State::Open,
            _ => return None,
        };
        (number.len() >= 8).then(|| number.parse().ok()).flatten().map(|number| (SegmentNumber(number), state))
    }

    /// All segments that have a file.
    pub fn list(&self) -> Result<Vec<(SegmentNumber, State)>> {
        let mut found = Vec::new();
        for entry in std::fs::read_dir(&self.0).map_err(StoreError::file("list", &self.0))? {
            let entry = entry.map_err(StoreError::file("list", &self.0))?;
            found.extend(entry.file_name().to_str().and_then(SegmentFolder::parse));
        }
        found.sort_unstable_by_key(|&(number, _)| number);
        Ok(found)
    }
}

/// Whether a segment is still written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    Open,
    Sealed,
}

pub(super) fn file_header(number: SegmentNumber) -> [u8; HEADER_LEN] {
    let mut bytes = [0; HEADER_LEN];
    bytes[..16].copy_from_slice(MAGIC);
    bytes[16..20].copy_from_slice(&FORMAT.to_le_bytes());
    bytes[20..24].copy_from_slice(&number.0.to_le_bytes());
    let checksum = crc32c::crc32c(&bytes[..60]);
    bytes[60..].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

fn check_file_header(file: &File, path: &Path) -> Result<()> {
    let mut bytes = [0; HEADER_LEN];
    let damaged = |what: &str| StoreError::Damaged { path: path.to_path_buf(), offset: 0, what: what.to_owned() };
    match file.read_exact_at(&mut bytes, 0) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Err(damaged("it is cut off")),
        Err(error) => return Err(StoreError::file("read", path)(error)),
    }
    if &bytes[..16] != MAGIC {
        return Err(damaged("it is no segment"));
    }
    let found = u32::from_le_bytes([bytes[16], bytes[17], bytes[18], bytes[19]]);
    if !(1..=FORMAT).contains(&found) {
        return Err(StoreError::UnknownFormat { path: path.to_path_buf(), found, known: FORMAT });
    }
    if bytes[60..] != crc32c::crc32c(&bytes[..60]).to_le_bytes() {
        return Err(damaged("its header does not match its checksum"));
    }
    Ok(())
}

/// What a sealed segment holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Summary {
    pub number: SegmentNumber,
    pub records: u32,
    /// Bytes of records, and so where its table begins.
    pub bytes: u64,
    pub table_checksum: u32,
}

pub(super) fn lock(file: &File) -> io::Result<()> {
    Ok(rustix::fs::flock(file, rustix::fs::FlockOperation::NonBlockingLockExclusive)?)
}

/// Writes the table behind the records.
pub(super) fn write_table(
    number: SegmentNumber,
    file: &File,
    end: u64,
    mut entries: Vec<Entry>,
) -> io::Result<Summary> {
    let bytes = table(number, end, &mut entries);
    file.write_all_at(&bytes, end)?;
    file.set_len(end + bytes.len() as u64)?;
    let table_checksum = crc32c::crc32c(&bytes[..entries.len() * Entry::LEN]);
    Ok(Summary { number, records: entries.len() as u32, bytes: end, table_checksum })
}

/// What lies behind the records of a sealed segment: its table, and the trailer that says how long that is.
fn table(number: SegmentNumber, end: u64, entries: &mut [Entry]) -> Vec<u8> {
    entries.sort_unstable();
    let mut bytes = Vec::with_capacity(entries.len() * Entry::LEN + HEADER_LEN);
    for entry in entries.iter() {
        bytes.extend_from_slice(&entry.to_bytes());
    }
    let table_checksum = crc32c::crc32c(&bytes);
    let mut trailer = [0; HEADER_LEN];
    trailer[..16].copy_from_slice(TABLE_MAGIC);
    trailer[16..20].copy_from_slice(&TABLE_FORMAT.to_le_bytes());
    trailer[20..24].copy_from_slice(&number.0.to_le_bytes());
    trailer[24..28].copy_from_slice(&(entries.len() as u32).to_le_bytes());
    trailer[32..40].copy_from_slice(&end.to_le_bytes());
    trailer[40..44].copy_from_slice(&table_checksum.to_le_bytes());
    let checksum = crc32c::crc32c(&trailer[..60]);
    trailer[60..].copy_from_slice(&checksum.to_le_bytes());
    bytes.extend_from_slice(&trailer);
    bytes
}

/// Gives a segment that was published its final name. Without it, it is found under the other until somebody finishes it.
pub(super) fn name_sealed(folder: &SegmentFolder, number: SegmentNumber) {
    let named =
        std::fs::rename(folder.open(number), folder.sealed(number)).and_then(|()| File::open(&folder.0)?.sync_all());
    if let Err(error) = named {
        tracing::warn!(segment = number.0, %error, "a segment keeps the name of one that is written");
    }
}

/// A segment that is made in memory, to be kept elsewhere.
pub(crate) struct SegmentBytes {
    number: SegmentNumber,
    bytes: Vec<u8>,
    entries: Vec<Entry>,
}

impl SegmentBytes {
    pub fn new(number: SegmentNumber) -> Self {
        SegmentBytes { number, bytes: file_header(number).to_vec(), entries: Vec::new() }
    }

    pub fn is_full(&self) -> bool {
        self.bytes.len() as u64 >= SEGMENT_LEN
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Appends a record, unless the segment is full.
    pub fn append(&mut self, header: &Header, packed: &[u8]) {
        let location = Location::new(self.number, self.bytes.len() as u64, header.record_len());
        self.bytes.extend_from_slice(&header.to_bytes());
        self.bytes.extend_from_slice(packed);
        self.bytes.resize(self.bytes.len().next_multiple_of(HEADER_LEN), 0);
        self.entries.push(Entry { prefix: header.name.prefix(), location });
    }

    /// The sealed segment, and its entries.
    pub fn finish(mut self) -> (Vec<u8>, Vec<Entry>) {
        let table = table(self.number, self.bytes.len() as u64, &mut self.entries);
        self.bytes.extend_from_slice(&table);
        (self.bytes, self.entries)
    }
}

/// Reads what a sealed segment says of itself.
pub(crate) fn summary(folder: &SegmentFolder, number: SegmentNumber, file: &File) -> Result<Summary> {
    let path = folder.sealed(number);
    check_file_header(file, &path)?;
    let len = file.metadata().map_err(StoreError::file("read", &path))?.len();
    let damaged = |what: &str| StoreError::Damaged { path: path.clone(), offset: len, what: what.to_owned() };
    let at = len.checked_sub(HEADER_LEN as u64).ok_or_else(|| damaged("it is cut off"))?;
    let mut bytes = [0; HEADER_LEN];
    file.read_exact_at(&mut bytes, at).map_err(StoreError::file("read", &path))?;
    let summary = trailer(&bytes, number).ok_or_else(|| damaged("its table is missing"))?;
    match summary.bytes.checked_add(u64::from(summary.records) * Entry::LEN as u64) == Some(at) {
        true => Ok(summary),
        false => Err(damaged("its table has an impossible length")),
    }
}

/// What the trailer of a segment says; none if these bytes are no trailer of it.
fn trailer(bytes: &[u8; HEADER_LEN], number: SegmentNumber) -> Option<Summary> {
    let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let is_it = &bytes[..16] == TABLE_MAGIC && word(60) == crc32c::crc32c(&bytes[..60]) && word(20) == number.0;
    is_it.then(|| Summary {
        number,
        records: word(24),
        bytes: u64::from(word(32)) | u64::from(word(36)) << 32,
        table_checksum: word(40),
    })
}

/// What is wrong with the table of a sealed segment, all of whose bytes these are.
pub(crate) fn check_table(bytes: &[u8], number: SegmentNumber, records_end: u64) -> Result<(), String> {
    let table = bytes.get(records_end as usize..).and_then(|rest| rest.split_last_chunk::<HEADER_LEN>());
    let (table, end) = table.ok_or("it is cut off before its table")?;
    let summary = trailer(end, number).ok_or("its table has no end that can be read")?;
    match summary.records as usize * Entry::LEN == table.len() && summary.table_checksum == crc32c::crc32c(table) {
        true => Ok(()),
        false => Err("its table does not match its checksum".to_owned()),
    }
}

/// A record found by reading a segment from front to end.
pub(crate) struct Found {
    pub header: Header,
    pub location: Location,
}

impl Found {
    pub fn entry(&self) -> Entry {
        Entry { prefix: self.header.name.prefix(), location: self.location }
    }
}

/// Reads the headers of the records from `from` on: whole records only, up to the first place where none begins. Gives where that is,
/// and what is wrong there; a segment that ends properly ends where its table begins.
pub(crate) fn scan(
    file: &File,
    number: SegmentNumber,
    from: u64,
    end: u64,
    mut found: impl FnMut(Found),
) -> io::Result<(u64, Option<String>)> {
    let mut at = from.max(HEADER_LEN as u64);
    let mut bytes = [0; HEADER_LEN];
    while at < end {
        match file.read_exact_at(&mut bytes, at) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok((at, None)),
            Err(error) => return Err(error),
        }
        let header = match Header::from_bytes(&bytes) {
            Ok(header) => header,
            Err(what) => return Ok((at, Some(what))),
        };
        let next = at + header.record_len() as u64;
        if next > end {
            return Ok((at, Some("a record is cut off".to_owned())));
        }
        found(Found { header, location: Location::new(number, at, header.record_len()) });
        at = next;
    }
    Ok((at, None))
}

/// Finishes a segment whose process died: it ends before the first record that is not whole. Those behind that are whole may have been
/// promised, where it was damaged and not torn: `rescue` takes them elsewhere first.
pub(crate) fn adopt(
    folder: &SegmentFolder,
    number: SegmentNumber,
    rescue: impl FnOnce(Vec<(Header, Vec<u8>)>) -> Result<()>,
    publish: impl FnOnce(&Summary) -> Result<()>,
) -> Result<()> {
    let path = folder.open(number);
    let file = match File::options().read(true).write(true).open(&path) {
        Ok(file) => file,
        // Somebody else was quicker.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(StoreError::file("open", &path)(error)),
    };
    // Whoever writes it has it locked.
    if lock(&file).is_err() || !path.exists() {
        return Ok(());
    }
    settle(&file).map_err(StoreError::file("read", &path))?;
    let len = file.metadata().map_err(StoreError::file("read", &path))?.len().min(SEGMENT_LEN_MAX);
    let header = match check_file_header(&file, &path) {
        // A later release knows what to do with it.
        Err(StoreError::UnknownFormat { .. }) => return Ok(()),
        Err(error @ StoreError::File { .. }) => return Err(error),
        other => other,
    };
    let mut records = Vec::new();
    scan(&file, number, 0, len, |found| records.push(found)).map_err(StoreError::file("read", &path))?;
    let mut entries = Vec::new();
    let mut end = HEADER_LEN as u64;
    for found in records {
        // Headers can be stable where contents are not.
        let content = read_record(&file, found.location).map_err(StoreError::file("read", &path))?;
        if content.is_err() {
            break;
        }
        end = found.location.offset() + found.header.record_len() as u64;
        entries.push(found.entry());
    }
    let behind = whole_behind(&file, end, len).map_err(StoreError::file("read", &path))?;
    if !behind.is_empty() {
        tracing::warn!(segment = %path.display(), offset = end, records = behind.len(), "records behind a damaged one are copied");
        rescue(behind)?;
    }
    if entries.is_empty() {
        return std::fs::remove_file(&path).map_err(StoreError::file("remove", &path));
    }
    let finish = || {
        if header.is_err() {
            file.write_all_at(&file_header(number), 0)?;
        }
        let summary = write_table(number, &file, end, entries)?;
        file.sync_all()?;
        Ok(summary)
    };
    publish(&finish().map_err(StoreError::file("finish", &path))?)?;
    name_sealed(folder, number);
    Ok(())
}

/// The whole records behind a place where none is. Where a header is damaged, nobody knows any more where records begin, and a guest's
/// data can look like one: from there on a record counts only if its content has its name.
fn whole_behind(file: &File, from: u64, end: u64) -> io::Result<Vec<(Header, Vec<u8>)>> {
    let mut bytes = vec![0; end.saturating_sub(from).min(SEGMENT_LEN_MAX) as usize];
    let len = read_up_to(file, &mut bytes, from)?;
    let bytes = &bytes[..len];
    let mut records = Vec::new();
    let (mut at, mut in_step) = (0, true);
    while let Some(rest) = bytes.get(at..).filter(|rest| rest.len() >= HEADER_LEN) {
        let record = record::split(rest).ok().filter(|(header, packed)| in_step || has_its_name(header, packed));
        at += match (&record, Header::from_bytes(rest)) {
            (None, Ok(header)) if in_step => header.record_len(),
            (Some((header, _)), _) => header.record_len(),
            _ => {
                in_step = false;
                HEADER_LEN
            }
        };
        records.extend(record.map(|(header, packed)| (header, packed.to_vec())));
    }
    Ok(records)
}

/// Whether a record that is not encrypted holds what its name says. Names of encrypted domains cannot be told without their keys.
fn has_its_name(header: &Header, packed: &[u8]) -> bool {
    header.domain == OPEN_DOMAIN
        && record::unpack(header, packed).is_ok_and(|content| Namer::open().name(header.kind, &content) == header.name)
}

/// Reads a record whole: its header and packed bytes, checksums compared; or what is wrong with it.
pub(crate) fn read_record(file: &File, location: Location) -> io::Result<Result<(Header, Vec<u8>), String>> {
    let mut bytes = vec![0; location.read_len()];
    let len = read_up_to(file, &mut bytes, location.offset())?;
    bytes.truncate(len);
    Ok(record::split(&bytes).map(|(header, packed)| {
        let packed = packed.to_vec();
        (header, packed)
    }))
}

/// Reads until the buffer is full or the file ends.
pub(crate) fn read_up_to(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut len = 0;
    while len < buffer.len() {
        match file.read_at(&mut buffer[len..], offset + len as u64) {
            Ok(0) => break,
            Ok(more) => len += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(len)
}
