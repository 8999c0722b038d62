//! tar archives as a stream of entries: ustar, pax, GNU (long names, holes) and the old form.
//!
//! What a reader takes, whatever the archive says: [`EXTENDED_LEN_MAX`] for extended headers and long names, 16 MiB for a map of
//! holes, and time in proportion to what is read. Content is handed on in pieces and never kept.

mod header;
mod pax;
mod sparse;

use super::FormatError;
use super::error::printable;
use super::ext4::{Attributes, Time};
use header::{Header, RECORD_LEN};
use pax::Records;
use sparse::SparseMap;
use std::io::{self, Read};

/// Bytes of extended headers and long names that are read for one entry, at most.
pub const EXTENDED_LEN_MAX: u64 = 1 << 20;
/// Bytes of extended headers for all entries that follow, at most: each entry gets a copy.
pub const GLOBAL_LEN_MAX: u64 = 16 << 10;
/// Content is handed on in pieces of this many bytes.
const PIECE_LEN: usize = 256 << 10;

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum TarKind {
    File { len: u64 },
    HardLink { target: Vec<u8> },
    Symlink { text: Vec<u8> },
    Character { major: u32, minor: u32 },
    Block { major: u32, minor: u32 },
    Directory,
    Fifo,
}

/// An entry of an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TarEntry {
    pub(super) path: Vec<u8>,
    pub(super) kind: TarKind,
    pub(super) attributes: Attributes,
    /// It has an access control list in words, which is left out.
    pub(super) has_acl_text: bool,
    map: SparseMap,
}

/// Reads an archive.
pub(super) struct TarReader<R> {
    input: R,
    name: String,
    /// Entries so far, for errors.
    index: u64,
    global: Records,
    global_len: u64,
    /// Bytes of extended headers that the entry in work has so far.
    extended_len: u64,
    /// What is left to skip before the next header.
    left: u64,
    padding: u64,
}

impl<R: Read> TarReader<R> {
    pub(super) fn new(input: R, name: &str) -> Self {
        TarReader {
            input,
            name: name.to_owned(),
            index: 0,
            global: Records::default(),
            global_len: 0,
            extended_len: 0,
            left: 0,
            padding: 0,
        }
    }

    fn wrong(&self, path: &[u8], problem: impl Into<String>) -> FormatError {
        let place = match path {
            [] => format!("entry {}", self.index),
            path => format!("entry {} ({})", self.index, printable(path)),
        };
        FormatError::malformed(&self.name, place, problem)
    }

    fn read_error(&self, error: io::Error) -> FormatError {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => self.wrong(&[], "the archive is cut off"),
            _ => FormatError::io(&self.name, format!("read entry {}", self.index), error),
        }
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), FormatError> {
        self.input.read_exact(bytes).map_err(|error| self.read_error(error))
    }

    fn skip(&mut self, mut len: u64) -> Result<(), FormatError> {
        let mut piece = [0; 8192];
        while len > 0 {
            let taken = len.min(piece.len() as u64);
            self.fill(&mut piece[..taken as usize])?;
            len -= taken;
        }
        Ok(())
    }

    /// The content of an extended header or of a long name, in memory.
    fn small_content(&mut self, header: &Header) -> Result<Vec<u8>, FormatError> {
        let (len, limit) = match header.kind {
            b'g' => (&mut self.global_len, GLOBAL_LEN_MAX),
            _ => (&mut self.extended_len, EXTENDED_LEN_MAX),
        };
        *len = len.saturating_add(header.len);
        if *len > limit {
            let what = "the length of extended headers in bytes";
            return Err(FormatError::TooLarge { file: self.name.clone(), what, value: *len, limit });
        }
        let mut content = vec![0; header.len as usize];
        self.fill(&mut content)?;
        self.skip(padding_len(header.len))?;
        Ok(content)
    }

    /// The next entry; nothing at the archive's end mark.
    pub(super) fn next_entry(&mut self) -> Result<Option<TarEntry>, FormatError> {
        let (left, padding) = (std::mem::take(&mut self.left), std::mem::take(&mut self.padding));
        self.skip(left)?;
        self.skip(padding)?;
        let mut records = self.global.clone();
        self.extended_len = 0;
        let (mut long_path, mut long_link) = (None, None);
        loop {
            let mut record = [0; RECORD_LEN];
            self.fill(&mut record)?;
            if record == [0; RECORD_LEN] {
                return Ok(None);
            }
            let header = Header::parse(&record).map_err(|problem| self.wrong(&[], problem))?;
            let until_zero = |bytes: Vec<u8>| bytes.split(|byte| *byte == 0).next().unwrap_or_default().to_vec();
            match header.kind {
                b'x' | b'X' | b'g' => {
                    let content = self.small_content(&header)?;
                    let into = if header.kind == b'g' { &mut self.global } else { &mut records };
                    let added = into.add(&content);
                    added.map_err(|problem| self.wrong(&[], problem))?;
                    if header.kind == b'g' {
                        records = self.global.clone();
                    }
                }
                b'L' => long_path = Some(until_zero(self.small_content(&header)?)),
                b'K' => long_link = Some(until_zero(self.small_content(&header)?)),
                // The name of the volume.
                b'V' => self.skip(header.len.saturating_add(padding_len(header.len)))?,
                _ => {
                    let entry = self.entry(header, records, long_path, long_link)?;
                    self.index += 1;
                    return Ok(Some(entry));
                }
            }
        }
    }

    fn entry(
        &mut self,
        header: Header,
        records: Records,
        long_path: Option<Vec<u8>>,
        long_link: Option<Vec<u8>>,
    ) -> Result<TarEntry, FormatError> {
        let mut sparse = records.sparse;
        let path = sparse.name.take().or(records.path).or(long_path).unwrap_or(header.path);
        let link = records.link.or(long_link).unwrap_or(header.link);
        let wrong = |problem: String| {
            FormatError::malformed(&self.name, format!("entry {} ({})", self.index, printable(&path)), problem)
        };
        let small = |name: &str, value: u64| {
            u32::try_from(value).map_err(|_| wrong(format!("its {name} is {value}, and 32 bits are all there is")))
        };
        let mut attributes = Attributes {
            permissions: (header.mode & 0o7777) as u16,
            user: small("owner", records.user.unwrap_or(header.user))?,
            group: small("group", records.group.unwrap_or(header.group))?,
            modified: records.modified.unwrap_or(Time { seconds: header.modified, nanoseconds: 0 }),
            accessed: records.accessed,
            changed: records.changed,
            xattrs: records.xattrs,
        };
        // In the order of bytes whatever the archive's order is.
        attributes.xattrs.sort();
        let major = small("driver number", records.major.unwrap_or(header.major))?;
        let minor = small("device number", records.minor.unwrap_or(header.minor))?;
        let mut stored_len = records.len.unwrap_or(header.len);
        let mut map = SparseMap::default();
        let kind = match header.kind {
            b'0' | 0 | b'7' if path.ends_with(b"/") => TarKind::Directory,
            b'0' | 0 | b'7' | b'S' => {
                let mut real_len = sparse.real_len;
                map = sparse.map;
                if header.kind == b'S' {
                    (map, real_len) = self.old_sparse_map(&header.record, &path)?;
                } else if sparse.map_in_content {
                    let (read_map, read_len) = self.content_sparse_map(&path, stored_len)?;
                    map = read_map;
                    stored_len -= read_len;
                } else if real_len.is_none() && map.parts().is_empty() {
                    map = SparseMap::whole(stored_len);
                }
                let len = real_len.unwrap_or(stored_len);
                let (map_len, map_end) = map.stored_len();
                if map_len != stored_len || map_end > len {
                    return Err(self.wrong(
                        &path,
                        format!(
                            "its map of holes is for {map_len} bytes up to {map_end}; it has {stored_len} of {len}"
                        ),
                    ));
                }
                TarKind::File { len }
            }
            b'1' if stored_len > 0 && records.len.is_some() => {
                return Err(FormatError::unsupported(&self.name, "hard links with content of their own"));
            }
            b'1' => {
                // Some archives say the target's length here; no content follows.
                stored_len = 0;
                TarKind::HardLink { target: link }
            }
            b'2' => TarKind::Symlink { text: link },
            b'3' => TarKind::Character { major, minor },
            b'4' => TarKind::Block { major, minor },
            b'5' => TarKind::Directory,
            b'6' => TarKind::Fifo,
            other => {
                let feature = format!("entries of the type \"{}\"", printable(&[other]));
                return Err(FormatError::unsupported(&self.name, feature));
            }
        };
        (self.left, self.padding) = (stored_len, padding_len(stored_len));
        Ok(TarEntry { path, kind, attributes, has_acl_text: records.has_acl_text, map })
    }

    /// The map of an entry of the type S: in the header and in records behind it.
    fn old_sparse_map(
        &mut self,
        record: &[u8; RECORD_LEN],
        path: &[u8],
    ) -> Result<(SparseMap, Option<u64>), FormatError> {
        let mut map = SparseMap::default();
        let number = |field: &[u8]| header::number(field).and_then(|value| u64::try_from(value).ok());
        let mut add = |fields: &[u8]| {
            for pair in fields.chunks_exact(24).take_while(|pair| pair[0] != 0 || pair[12] != 0) {
                map.push(number(&pair[..12])?, number(&pair[12..])?)?;
            }
            Some(())
        };
        let real_len = number(&record[483..495]);
        let mut good = real_len.is_some() && add(&record[386..482]).is_some();
        let mut more = record[482] != 0;
        while good && more {
            let mut next = [0; RECORD_LEN];
            self.fill(&mut next)?;
            good = next[0] != 0 && add(&next[..504]).is_some();
            more = next[504] != 0;
        }
        if !good {
            return Err(self.wrong(path, "its map of holes is damaged"));
        }
        Ok((map, real_len))
    }

    /// The map in front of the content: decimal numbers, a line each, filled up to whole records. Also gives its length.
    fn content_sparse_map(&mut self, path: &[u8], stored_len: u64) -> Result<(SparseMap, u64), FormatError> {
        let mut map = SparseMap::default();
        let mut read_len = 0;
        let mut left: Option<u64> = None;
        let mut offset = None;
        let mut value: Option<u64> = None;
        while left != Some(0) {
            if read_len + RECORD_LEN as u64 > stored_len {
                return Err(self.wrong(path, "its map of holes is damaged"));
            }
            let mut record = [0; RECORD_LEN];
            self.fill(&mut record)?;
            read_len += RECORD_LEN as u64;
            for byte in record {
                if left == Some(0) {
                    break;
                }
                let good = match byte {
                    b'0'..=b'9' => {
                        let next =
                            value.unwrap_or(0).checked_mul(10).and_then(|tens| tens.checked_add((byte - b'0').into()));
                        value = next;
                        next.is_some()
                    }
                    b'\n' => match (value.take(), left, offset.take()) {
                        (Some(number), None, _) => {
                            left = Some(number);
                            number <= sparse::PARTS_MAX as u64
                        }
                        (Some(number), Some(_), None) => {
                            offset = Some(number);
                            true
                        }
                        (Some(number), Some(parts), Some(offset)) => {
                            left = Some(parts - 1);
                            map.push(offset, number).is_some()
                        }
                        (None, ..) => false,
                    },
                    _ => false,
                };
                if !good {
                    return Err(self.wrong(path, "its map of holes is damaged"));
                }
            }
        }
        Ok((map, read_len))
    }

    /// Hands the content of the entry that was given last to `take`, with the offset of each piece.
    pub(super) fn content(
        &mut self,
        entry: &TarEntry,
        mut take: impl FnMut(u64, &[u8]) -> Result<(), FormatError>,
    ) -> Result<(), FormatError> {
        let mut piece = vec![0; PIECE_LEN];
        for (offset, len) in entry.map.parts() {
            let mut done = 0;
            while done < *len {
                let taken = (len - done).min(PIECE_LEN as u64) as usize;
                self.fill(&mut piece[..taken])?;
                self.left -= taken as u64;
                take(offset + done, &piece[..taken])?;
                done += taken as u64;
            }
        }
        Ok(())
    }
}

/// Bytes that fill content up to whole records.
fn padding_len(len: u64) -> u64 {
    len.wrapping_neg() % RECORD_LEN as u64
}
