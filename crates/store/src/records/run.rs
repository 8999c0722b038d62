//! Runs: sorted tables of entries on disk. A sealed segment ends with the smallest kind; a run file holds the entries of
//! many segments.
//!
//! In memory stays one prefix of every page of entries; a lookup reads one page through the host's page cache. So the index
//! costs little memory, is shared by all processes, and a disk that fails gives an error and not a signal.

use std::cmp::Ordering;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::error::{Result, StoreError};
use crate::name::Name;
use crate::records::record::HEADER_LEN;
use crate::records::segment::{Entry, SegmentNumber, read_up_to};

/// Entries of a page.
const PAGE_ENTRIES: u64 = 256;
const MAGIC: &[u8; 16] = b"polder run\0\0\0\0\0\0";
const FORMAT: u32 = 1;

type Prefix = [u8; Name::PREFIX_LEN];

/// Where the bytes of a run are.
enum Bytes {
    /// A file, and where in it the entries begin.
    File(File, u64),
    /// The table of a segment that lost its own.
    Memory(Vec<u8>),
}

impl Bytes {
    /// Fills `bytes` from an offset within the entries.
    fn read(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        match self {
            Bytes::File(file, start) => match read_up_to(file, bytes, start + offset)? == bytes.len() {
                true => Ok(()),
                false => Err(io::ErrorKind::UnexpectedEof.into()),
            },
            Bytes::Memory(all) => {
                bytes.copy_from_slice(&all[offset as usize..][..bytes.len()]);
                Ok(())
            }
        }
    }
}

/// A sorted table of entries.
pub(crate) struct Run {
    bytes: Bytes,
    entries: u64,
    /// The first prefix of each page.
    fence: Vec<Prefix>,
}

impl Run {
    /// The table of a sealed segment.
    pub fn of_segment(file: File, start: u64, entries: u64) -> io::Result<Self> {
        let mut run = Run { bytes: Bytes::File(file, start), entries, fence: Vec::new() };
        run.read_fence()?;
        Ok(run)
    }

    /// A run of entries that were found otherwise.
    pub fn of_entries(mut entries: Vec<Entry>) -> Self {
        entries.sort_unstable();
        let bytes = entries.iter().flat_map(|entry| entry.to_bytes()).collect();
        let fence = entries.iter().step_by(PAGE_ENTRIES as usize).map(|entry| entry.prefix).collect();
        Run { bytes: Bytes::Memory(bytes), entries: entries.len() as u64, fence }
    }

    /// A run file.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(StoreError::file("open", path))?;
        let mut header = [0; HEADER_LEN];
        let len = read_up_to(&file, &mut header, 0).map_err(StoreError::file("read", path))?;
        let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let damaged = |what: &str| StoreError::Damaged { path: path.to_path_buf(), offset: 0, what: what.to_owned() };
        if len < HEADER_LEN || &header[..16] != MAGIC || word(60) != crc32c::crc32c(&header[..60]) {
            return Err(damaged("it is no run of the index"));
        }
        if word(16) != FORMAT {
            return Err(StoreError::UnknownFormat { path: path.to_path_buf(), found: word(16), known: FORMAT });
        }
        let entries = u64::from(word(24)) | u64::from(word(28)) << 32;
        let size = file.metadata().map_err(StoreError::file("read", path))?.len();
        if entries.checked_mul(Entry::LEN as u64).and_then(|len| len.checked_add(HEADER_LEN as u64)) != Some(size) {
            return Err(damaged("its length is not that of its entries"));
        }
        let mut run = Run { bytes: Bytes::File(file, HEADER_LEN as u64), entries, fence: Vec::new() };
        run.read_fence().map_err(StoreError::file("read", path))?;
        Ok(run)
    }

    fn read_fence(&mut self) -> io::Result<()> {
        for page in 0..self.entries.div_ceil(PAGE_ENTRIES) {
            let first = self.read(page * PAGE_ENTRIES, 1)?;
            self.fence.extend(first.first().map(|entry| entry.prefix));
        }
        Ok(())
    }

    pub fn entries(&self) -> u64 {
        self.entries
    }

    /// Bytes that it takes in memory.
    pub fn memory_bytes(&self) -> usize {
        self.fence.capacity() * size_of::<Prefix>()
    }

    fn read(&self, first: u64, count: u64) -> io::Result<Vec<Entry>> {
        let count = count.min(self.entries.saturating_sub(first)) as usize;
        let mut bytes = vec![0; count * Entry::LEN];
        self.bytes.read(&mut bytes, first * Entry::LEN as u64)?;
        Ok(bytes.chunks_exact(Entry::LEN).map(Entry::from_bytes).collect())
    }

    /// The entries of a prefix: none, one, or several where the same chunk was stored twice.
    pub fn find(&self, prefix: &Prefix, found: &mut Vec<Entry>) -> io::Result<()> {
        // Equal prefixes can begin in the page before the first page that begins with one.
        let mut page = self.fence.partition_point(|first| first < prefix).saturating_sub(1) as u64;
        while self.fence.get(page as usize).is_some_and(|first| first <= prefix) {
            let mut bytes = [0; PAGE_ENTRIES as usize * Entry::LEN];
            let count = PAGE_ENTRIES.min(self.entries - page * PAGE_ENTRIES) as usize;
            let bytes = &mut bytes[..count * Entry::LEN];
            self.bytes.read(bytes, page * PAGE_ENTRIES * Entry::LEN as u64)?;
            let entry = |index: usize| &bytes[index * Entry::LEN..(index + 1) * Entry::LEN];
            let (mut low, mut high) = (0, count);
            while low < high {
                let middle = (low + high) / 2;
                match entry(middle)[..Name::PREFIX_LEN].cmp(prefix) {
                    Ordering::Less => low = middle + 1,
                    _ => high = middle,
                }
            }
            while low < count && entry(low)[..Name::PREFIX_LEN] == *prefix {
                found.push(Entry::from_bytes(entry(low)));
                low += 1;
            }
            if low < count {
                break;
            }
            page += 1;
        }
        Ok(())
    }

    /// Reads all entries, a piece at a time.
    fn reader(&self) -> Reader<'_> {
        Reader { run: self, next: 0, piece: Vec::new().into_iter() }
    }
}

struct Reader<'a> {
    run: &'a Run,
    next: u64,
    piece: std::vec::IntoIter<Entry>,
}

impl Reader<'_> {
    const PIECE: u64 = 16 * PAGE_ENTRIES;

    fn next(&mut self) -> io::Result<Option<Entry>> {
        if let Some(entry) = self.piece.next() {
            return Ok(Some(entry));
        }
        self.piece = self.run.read(self.next, Self::PIECE)?.into_iter();
        self.next += Self::PIECE;
        Ok(self.piece.next())
    }
}

/// Merges runs into one file, without the entries of segments that are not to be kept. Gives the number of entries.
pub(crate) fn merge(runs: &[&Run], keep: impl Fn(SegmentNumber) -> bool, path: &Path) -> Result<u64> {
    write(runs, keep, path).map_err(StoreError::file("write", path))
}

fn write(runs: &[&Run], keep: impl Fn(SegmentNumber) -> bool, path: &Path) -> io::Result<u64> {
    let mut readers: Vec<Reader<'_>> = runs.iter().map(|run| run.reader()).collect();
    let mut heads = readers.iter_mut().map(Reader::next).collect::<io::Result<Vec<_>>>()?;
    let temporary = Temporary(path.with_extension("making"));
    let file = File::create(&temporary.0)?;
    let mut writer = io::BufWriter::with_capacity(1 << 20, &file);
    writer.write_all(&[0; HEADER_LEN])?;
    let mut count = 0u64;
    // Few runs are merged at a time: looking at all heads is as good as a heap.
    while let Some(least) = (0..heads.len()).filter(|&run| heads[run].is_some()).min_by_key(|&run| heads[run]) {
        if let Some(entry) = heads[least]
            && keep(entry.location.segment())
        {
            writer.write_all(&entry.to_bytes())?;
            count += 1;
        }
        heads[least] = readers[least].next()?;
    }
    writer.flush()?;
    drop(writer);
    let mut header = [0; HEADER_LEN];
    header[..16].copy_from_slice(MAGIC);
    header[16..20].copy_from_slice(&FORMAT.to_le_bytes());
    header[24..32].copy_from_slice(&count.to_le_bytes());
    let checksum = crc32c::crc32c(&header[..60]);
    header[60..].copy_from_slice(&checksum.to_le_bytes());
    std::os::unix::fs::FileExt::write_all_at(&file, &header, 0)?;
    file.sync_all()?;
    std::fs::rename(&temporary.0, path)?;
    if let Some(folder) = path.parent() {
        File::open(folder)?.sync_all()?;
    }
    Ok(count)
}

/// A file in the making: gone unless it was renamed.
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}
