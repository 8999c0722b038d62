//! Runs: sorted tables of entries on disk. A sealed segment ends with the smallest kind; a run file holds the entries of
//! many segments.
//!
//! In memory stays a [`Guide`]: one prefix and one checksum of every page of entries, and a filter that says of most names that they are not
//! here. A lookup that passes it reads one page through the host's page cache. So the index costs little memory, is shared by all
//! processes, and a disk that fails or a bit that flips gives an error and not a wrong place.

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
const PAGE_LEN: usize = PAGE_ENTRIES as usize * Entry::LEN;
const MAGIC: &[u8; 16] = b"polder run\0\0\0\0\0\0";
const FORMAT: u32 = 1;
/// Bits of the filter for each entry: one name in eighteen or so that is not here passes it.
const FILTER_BITS: u64 = 6;
/// Of a short run, as the table of a segment is: there are many of them before they are merged, and each that is passed is a read. One
/// name in four hundred passes.
const FILTER_BITS_SHORT: u64 = 16;
const SHORT_RUN: u64 = 8192;
const FILTER_LOOKS: u64 = 4;

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

/// What is kept in memory of a run.
struct Guide {
    /// The first prefix of each page.
    fence: Vec<Prefix>,
    /// The checksum of each page.
    checksums: Vec<u32>,
    /// A Bloom filter of the prefixes.
    filter: Vec<u64>,
}

impl Guide {
    /// Of at most so many entries.
    fn new(entries_max: u64) -> Self {
        let bits = if entries_max <= SHORT_RUN { FILTER_BITS_SHORT } else { FILTER_BITS };
        let words = (entries_max * bits).div_ceil(64).max(1);
        Guide { fence: Vec::new(), checksums: Vec::new(), filter: vec![0; words as usize] }
    }

    /// Takes in the next page, which is whole unless it is the last.
    fn add_page(&mut self, page: &[u8]) {
        self.fence.extend(page.chunks_exact(Entry::LEN).next().map(|first| Entry::from_bytes(first).prefix));
        self.checksums.push(crc32c::crc32c(page));
        for entry in page.chunks_exact(Entry::LEN) {
            for bit in filter_bits(&Entry::from_bytes(entry).prefix, self.filter.len()) {
                self.filter[bit / 64] |= 1 << (bit % 64);
            }
        }
    }

    fn may_hold(&self, prefix: &Prefix) -> bool {
        filter_bits(prefix, self.filter.len()).into_iter().all(|bit| self.filter[bit / 64] & 1 << (bit % 64) != 0)
    }

    fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = self.fence.concat();
        self.checksums.iter().for_each(|checksum| bytes.extend_from_slice(&checksum.to_le_bytes()));
        self.filter.iter().for_each(|word| bytes.extend_from_slice(&word.to_le_bytes()));
        bytes
    }

    /// Bytes of the guide of so many pages, with a filter of so many words.
    fn len(pages: u64, filter_words: u64) -> Option<u64> {
        let pages = pages.checked_mul((Name::PREFIX_LEN + 4) as u64)?;
        pages.checked_add(filter_words.checked_mul(8)?)
    }

    /// The guide that `bytes`, of the right [length](Self::len), are.
    fn from_bytes(bytes: &[u8], pages: u64) -> Self {
        let (fence, rest) = bytes.split_at(pages as usize * Name::PREFIX_LEN);
        let (checksums, filter) = rest.split_at(pages as usize * 4);
        Guide {
            fence: fence.as_chunks().0.to_vec(),
            checksums: checksums.as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect(),
            filter: filter.as_chunks().0.iter().map(|bytes| u64::from_le_bytes(*bytes)).collect(),
        }
    }
}

/// The bits of a filter that stand for a prefix. A prefix is a hash already.
fn filter_bits(prefix: &Prefix, words: usize) -> [usize; FILTER_LOOKS as usize] {
    let part = |at: usize| u64::from(u32::from_le_bytes([prefix[at], prefix[at + 1], prefix[at + 2], prefix[at + 3]]));
    let (start, step) = (part(4), part(8) | 1);
    let bits = words as u64 * 64;
    std::array::from_fn(|look| ((start + look as u64 * step) % bits) as usize)
}

/// A sorted table of entries.
pub(crate) struct Run {
    bytes: Bytes,
    entries: u64,
    guide: Guide,
}

fn is_damaged() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "a page of the index does not match its checksum")
}

impl Run {
    /// The table of a sealed segment; none if it does not match its checksum.
    pub fn of_segment(file: File, start: u64, entries: u32, checksum: u32) -> io::Result<Option<Self>> {
        let mut table = vec![0; entries as usize * Entry::LEN];
        let bytes = Bytes::File(file, start);
        bytes.read(&mut table, 0)?;
        if crc32c::crc32c(&table) != checksum {
            return Ok(None);
        }
        Ok(Some(Run { bytes, entries: entries.into(), guide: guide_of(&table) }))
    }

    /// A run of entries that were found otherwise.
    pub fn of_entries(mut entries: Vec<Entry>) -> Self {
        entries.sort_unstable();
        let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_bytes()).collect();
        Run { guide: guide_of(&bytes), bytes: Bytes::Memory(bytes), entries: entries.len() as u64 }
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
        let pages = entries.div_ceil(PAGE_ENTRIES);
        let size = file.metadata().map_err(StoreError::file("read", path))?.len();
        let table_end = entries.checked_mul(Entry::LEN as u64).and_then(|len| len.checked_add(HEADER_LEN as u64));
        let guide_len = Guide::len(pages, word(36).into()).filter(|_| word(36) > 0);
        let (Some(table_end), Some(guide_len)) = (table_end, guide_len) else {
            return Err(damaged("it has an impossible length"));
        };
        if table_end.checked_add(guide_len) != Some(size) {
            return Err(damaged("its length is not that of its entries"));
        }
        let mut guide = vec![0; guide_len as usize];
        let read = read_up_to(&file, &mut guide, table_end).map_err(StoreError::file("read", path))?;
        if read < guide.len() || crc32c::crc32c(&guide) != word(32) {
            return Err(damaged("its guide does not match its checksum"));
        }
        let guide = Guide::from_bytes(&guide, pages);
        Ok(Run { bytes: Bytes::File(file, HEADER_LEN as u64), entries, guide })
    }

    pub fn entries(&self) -> u64 {
        self.entries
    }

    /// Bytes that it takes in memory.
    pub fn memory_bytes(&self) -> usize {
        let Guide { fence, checksums, filter } = &self.guide;
        size_of_val(&fence[..]) + size_of_val(&checksums[..]) + size_of_val(&filter[..])
    }

    /// Reads a page into a buffer, and compares it with its checksum. Gives its bytes.
    fn page<'a>(&self, page: u64, buffer: &'a mut [u8; PAGE_LEN]) -> io::Result<&'a [u8]> {
        let count = PAGE_ENTRIES.min(self.entries.saturating_sub(page * PAGE_ENTRIES)) as usize;
        let bytes = &mut buffer[..count * Entry::LEN];
        self.bytes.read(bytes, page * PAGE_LEN as u64)?;
        match self.guide.checksums.get(page as usize) == Some(&crc32c::crc32c(bytes)) {
            true => Ok(bytes),
            false => Err(is_damaged()),
        }
    }

    /// Reads all of it and compares it with its checksums.
    pub fn check(&self) -> io::Result<()> {
        let mut buffer = [0; PAGE_LEN];
        (0..self.guide.checksums.len() as u64).try_for_each(|page| self.page(page, &mut buffer).map(drop))
    }

    /// The entries of a prefix: none, one, or several where the same chunk was stored twice. An error of kind `InvalidData` says that the
    /// run is damaged.
    pub fn find(&self, prefix: &Prefix, found: &mut Vec<Entry>) -> io::Result<()> {
        // Most names are in one run of many: memory for a page is not even cleared for the others.
        if !self.guide.may_hold(prefix) {
            return Ok(());
        }
        self.find_by(prefix, &mut PageReader::new(self), &mut |entry| found.push(entry))
    }

    /// As [`find`](Self::find) for many prefixes, which come in order: a page that several of them are in is read once. `found` hears of each
    /// entry, with the place of its prefix among them.
    pub fn find_each<'a>(
        &self,
        prefixes: impl Iterator<Item = &'a Prefix>,
        mut found: impl FnMut(usize, Entry),
    ) -> io::Result<()> {
        let mut reader = PageReader::new(self);
        prefixes
            .enumerate()
            .filter(|(_, prefix)| self.guide.may_hold(prefix))
            .try_for_each(|(at, prefix)| self.find_by(prefix, &mut reader, &mut |entry| found(at, entry)))
    }

    /// The entries of a prefix that passed the filter.
    fn find_by(&self, prefix: &Prefix, reader: &mut PageReader<'_>, found: &mut dyn FnMut(Entry)) -> io::Result<()> {
        let fence = &self.guide.fence;
        // Equal prefixes can begin in the page before the first page that begins with one.
        let mut page = fence.partition_point(|first| first < prefix).saturating_sub(1) as u64;
        while fence.get(page as usize).is_some_and(|first| first <= prefix) {
            let bytes = reader.page(page)?;
            let count = bytes.len() / Entry::LEN;
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
                found(Entry::from_bytes(entry(low)));
                low += 1;
            }
            if low < count {
                break;
            }
            page += 1;
        }
        Ok(())
    }

    /// Reads all entries, a page at a time.
    fn reader(&self) -> Reader<'_> {
        Reader { run: self, next: 0, entries: Vec::new().into_iter() }
    }
}

/// Pages of a run, of which the last that was asked for is kept.
struct PageReader<'a> {
    run: &'a Run,
    buffer: [u8; PAGE_LEN],
    held: Option<(u64, usize)>,
}

impl<'a> PageReader<'a> {
    fn new(run: &'a Run) -> Self {
        PageReader { run, buffer: [0; PAGE_LEN], held: None }
    }

    fn page(&mut self, page: u64) -> io::Result<&[u8]> {
        let len = match self.held {
            Some((held, len)) if held == page => len,
            _ => {
                self.held = None;
                let len = self.run.page(page, &mut self.buffer)?.len();
                self.held = Some((page, len));
                len
            }
        };
        Ok(&self.buffer[..len])
    }
}

fn guide_of(table: &[u8]) -> Guide {
    let mut guide = Guide::new((table.len() / Entry::LEN) as u64);
    table.chunks(PAGE_LEN).for_each(|page| guide.add_page(page));
    guide
}

struct Reader<'a> {
    run: &'a Run,
    /// The next page.
    next: u64,
    entries: std::vec::IntoIter<Entry>,
}

impl Reader<'_> {
    fn next(&mut self) -> io::Result<Option<Entry>> {
        if let Some(entry) = self.entries.next() {
            return Ok(Some(entry));
        }
        if self.next >= self.run.guide.checksums.len() as u64 {
            return Ok(None);
        }
        let mut buffer = [0; PAGE_LEN];
        let page = self.run.page(self.next, &mut buffer)?;
        self.entries = page.chunks_exact(Entry::LEN).map(Entry::from_bytes).collect::<Vec<_>>().into_iter();
        self.next += 1;
        Ok(self.entries.next())
    }
}

/// Merges runs into one file, without the entries of segments that are not to be kept. Gives the number of entries. An error of kind
/// `InvalidData` says that one of the runs is damaged.
pub(crate) fn merge(runs: &[&Run], keep: impl Fn(SegmentNumber) -> bool, path: &Path) -> io::Result<u64> {
    let mut readers: Vec<Reader<'_>> = runs.iter().map(|run| run.reader()).collect();
    let mut heads = readers.iter_mut().map(Reader::next).collect::<io::Result<Vec<_>>>()?;
    let temporary = Temporary(path.with_extension("making"));
    let file = File::create(&temporary.0)?;
    let mut writer = io::BufWriter::with_capacity(1 << 20, &file);
    writer.write_all(&[0; HEADER_LEN])?;
    let mut count = 0u64;
    let mut guide = Guide::new(runs.iter().map(|run| run.entries).sum());
    let mut page = Vec::with_capacity(PAGE_LEN);
    // Few runs are merged at a time: looking at all heads is as good as a heap.
    while let Some(least) = (0..heads.len()).filter(|&run| heads[run].is_some()).min_by_key(|&run| heads[run]) {
        if let Some(entry) = heads[least]
            && keep(entry.location.segment())
        {
            page.extend_from_slice(&entry.to_bytes());
            count += 1;
            if page.len() == PAGE_LEN {
                guide.add_page(&page);
                writer.write_all(&page)?;
                page.clear();
            }
        }
        heads[least] = readers[least].next()?;
    }
    if !page.is_empty() {
        guide.add_page(&page);
        writer.write_all(&page)?;
    }
    let guide_bytes = guide.to_bytes();
    writer.write_all(&guide_bytes)?;
    writer.flush()?;
    drop(writer);
    let mut header = [0; HEADER_LEN];
    header[..16].copy_from_slice(MAGIC);
    header[16..20].copy_from_slice(&FORMAT.to_le_bytes());
    header[24..32].copy_from_slice(&count.to_le_bytes());
    header[32..36].copy_from_slice(&crc32c::crc32c(&guide_bytes).to_le_bytes());
    header[36..40].copy_from_slice(&(guide.filter.len() as u32).to_le_bytes());
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

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::records::segment::Location;

    fn entry(number: u32) -> Entry {
        let mut prefix = [0; Name::PREFIX_LEN];
        prefix.copy_from_slice(&blake3::hash(&number.to_le_bytes()).as_bytes()[..Name::PREFIX_LEN]);
        Entry { prefix, location: Location::new(SegmentNumber(number % 7), u64::from(number % 1000) * 64, 4096) }
    }

    /// A run file of the entries of two runs, without those of segment 3.
    fn merged(folder: &Path) -> (PathBuf, Vec<Entry>) {
        let path = folder.join("1.run");
        let halves = [0..3000, 3000..9000].map(|numbers| Run::of_entries(numbers.map(entry).collect()));
        let count = merge(&[&halves[0], &halves[1]], |segment| segment.0 != 3, &path).unwrap();
        let mut kept: Vec<Entry> = (0..9000).map(entry).collect();
        kept.retain(|entry| entry.location.segment().0 != 3);
        assert_eq!(count, kept.len() as u64);
        (path, kept)
    }

    #[test]
    fn every_entry_of_a_merged_run_is_found_and_hardly_any_other_is_looked_for() {
        let folder = tempfile::tempdir().unwrap();
        let (path, kept) = merged(folder.path());
        let run = Run::open(&path).unwrap();
        run.check().unwrap();
        for entry in &kept {
            let mut found = Vec::new();
            run.find(&entry.prefix, &mut found).unwrap();
            assert_eq!(found, [*entry]);
        }
        let passed = (10_000..30_000).filter(|&other| run.guide.may_hold(&entry(other).prefix)).count();
        assert!(passed < 20_000 / 12, "{passed} of 20,000 names pass");
        // What the index costs in memory and on the disk, of twenty bytes an entry.
        let on_disk = std::fs::metadata(&path).unwrap().len() as usize;
        assert!(run.memory_bytes() < kept.len() && on_disk + 64 < 20 * kept.len());
    }

    #[test]
    fn no_flipped_bit_of_a_run_gives_a_wrong_place() {
        let folder = tempfile::tempdir().unwrap();
        let (path, kept) = merged(folder.path());
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let len = file.metadata().unwrap().len();
        for bit in (0..8 * len).step_by(9973) {
            let mut byte = [0];
            file.read_exact_at(&mut byte, bit / 8).unwrap();
            file.write_all_at(&[byte[0] ^ 1 << (bit % 8)], bit / 8).unwrap();
            if let Ok(run) = Run::open(&path) {
                assert_eq!(run.check().unwrap_err().kind(), io::ErrorKind::InvalidData, "bit {bit}");
                for entry in kept.iter().step_by(101) {
                    let mut found = Vec::new();
                    match run.find(&entry.prefix, &mut found) {
                        Ok(()) => assert_eq!(found, [*entry], "bit {bit}"),
                        Err(error) => assert_eq!(error.kind(), io::ErrorKind::InvalidData),
                    }
                }
                let merged = merge(&[&run], |_| true, &folder.path().join("2.run"));
                assert_eq!(merged.unwrap_err().kind(), io::ErrorKind::InvalidData);
            }
            file.write_all_at(&byte, bit / 8).unwrap();
        }
        Run::open(&path).unwrap().check().unwrap();
    }
}
