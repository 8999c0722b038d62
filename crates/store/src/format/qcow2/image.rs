//! One qcow2 file, open for reading.

use super::super::error::FormatError;
use super::super::{Content, Extent, RawSource, Source};
use super::compression::Inflater;
use super::entry::{self, Entry, SUBCLUSTERS};
use super::header::Header;
use super::host_map::{HOST_MAP_LEN_MAX, HostMap, MapFull, Owner};
use super::snapshot::{self, Snapshot};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard};

/// The length of an L1 table in bytes, at most, as in QEMU: with clusters of 64 KiB enough for 2 PiB, with clusters of 512
/// bytes for 128 GiB.
pub const L1_LEN_MAX: u64 = 32 << 20;
/// The length of a refcount table in bytes, at most, as in QEMU.
pub const REFCOUNT_TABLE_LEN_MAX: u64 = 8 << 20;
/// Bytes of L2 tables that an image keeps in memory.
pub const L2_CACHE_LEN_MAX: usize = 8 << 20;

/// A qcow2 image with what lies behind it.
pub struct Qcow2 {
    file: Arc<RawSource>,
    header: Header,
    snapshots: Vec<Snapshot>,
    /// Bytes of the disk: the image's or the opened snapshot's.
    len: u64,
    /// Offsets of L2 tables, 0 for none.
    l1: Vec<u64>,
    tables: Mutex<TableCache>,
    inflaters: Mutex<Vec<Inflater>>,
    backing: Option<Arc<dyn Source>>,
    data_file: Option<Arc<dyn Source>>,
}

impl std::fmt::Debug for Qcow2 {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Qcow2").field("file", &self.file.name()).field("header", &self.header).finish_non_exhaustive()
    }
}

/// What a part of a cluster is, in the file's own words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Unallocated,
    Zeros,
    Data { host: u64 },
    Compressed { host: u64, len: u64 },
}

/// L2 tables in memory, each under its index in the L1 table.
struct TableCache {
    tables: HashMap<u64, (u64, Arc<[u8]>)>,
    tables_max: usize,
    clock: u64,
}

impl TableCache {
    fn get(&mut self, index: u64) -> Option<Arc<[u8]>> {
        self.clock += 1;
        let (used, table) = self.tables.get_mut(&index)?;
        *used = self.clock;
        Some(table.clone())
    }

    fn put(&mut self, index: u64, table: Arc<[u8]>) {
        if self.tables.len() >= self.tables_max {
            let oldest = self.tables.iter().min_by_key(|(_, (used, _))| *used).map(|(index, _)| *index);
            self.tables.remove(&oldest.expect("the cache holds at least one table"));
        }
        self.clock += 1;
        self.tables.insert(index, (self.clock, table));
    }
}

fn hold<T>(lock: &Mutex<T>) -> MutexGuard<'_, T> {
    lock.lock().expect("no holder panics")
}

impl Qcow2 {
    /// Checks every table in use of a file whose header was read. `backing` and `data_file` are the files that the header names.
    pub(super) fn new(
        file: Arc<RawSource>,
        header: Header,
        snapshot: Option<&str>,
        backing: Option<Arc<dyn Source>>,
        data_file: Option<Arc<dyn Source>>,
    ) -> Result<Self, FormatError> {
        let (snapshots, snapshot_table_len) = snapshot::read_all(&file, &header)?;
        let (mut len, mut l1_offset, mut l1_entries) = (header.virtual_len, header.l1_offset, header.l1_entries);
        if let Some(wanted) = snapshot {
            let found = snapshots.iter().find(|one| one.name == wanted);
            let found = found
                .or_else(|| snapshots.iter().find(|one| one.id == wanted))
                .ok_or_else(|| FormatError::NoSuchSnapshot { file: file.name().to_owned(), name: wanted.to_owned() })?;
            (len, l1_offset, l1_entries) = (found.virtual_len, found.l1_offset, found.l1_entries);
        }
        let table_len = header.cluster_len() as usize;
        let mut image = Qcow2 {
            len,
            l1: Vec::new(),
            tables: Mutex::new(TableCache {
                tables: HashMap::new(),
                tables_max: (L2_CACHE_LEN_MAX / table_len).max(1),
                clock: 0,
            }),
            inflaters: Mutex::default(),
            file,
            header,
            snapshots,
            backing,
            data_file,
        };
        image.l1 = image.read_l1(l1_offset, u64::from(l1_entries))?;
        image.check_tables(l1_offset, snapshot_table_len)?;
        Ok(image)
    }

    /// The checked header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The snapshots inside.
    pub fn snapshots(&self) -> &[Snapshot] {
        &self.snapshots
    }

    fn malformed(&self, place: impl Into<String>, problem: impl Into<String>) -> FormatError {
        FormatError::malformed(self.file.name(), place, problem)
    }

    /// Reads the entries that the disk's length needs; more may be there and mean nothing.
    fn read_l1(&self, offset: u64, entries: u64) -> Result<Vec<u64>, FormatError> {
        let needed = self.len.div_ceil(1 << self.header.l1_shift());
        let place = "L1 table";
        if needed > entries {
            let problem = format!("it has {entries} entries, and a disk of {} bytes needs {needed}", self.len);
            return Err(self.malformed(place, problem));
        }
        if needed * 8 > L1_LEN_MAX {
            let what = "the length of the L1 table in bytes";
            let (file, value, limit) = (self.file.name().to_owned(), needed * 8, L1_LEN_MAX);
            return Err(FormatError::TooLarge { file, what, value, limit });
        }
        if needed == 0 {
            return Ok(Vec::new());
        }
        let inside = offset.checked_add(needed * 8).is_some_and(|end| end <= self.file.len());
        if !inside || !offset.is_multiple_of(self.header.cluster_len()) || offset == 0 {
            let problem = format!(
                "its {} bytes are said to lie at {offset:#x}; the file has {:#x} bytes and clusters of {:#x}",
                needed * 8,
                self.file.len(),
                self.header.cluster_len()
            );
            return Err(self.malformed(place, problem));
        }
        let mut bytes = vec![0; needed as usize * 8];
        self.file.read_at(offset, &mut bytes)?;
        let words = bytes.chunks_exact(8).enumerate().map(|(index, word)| {
            let word = u64::from_be_bytes(word.try_into().expect("eight bytes"));
            let table = entry::l1_offset(word, &self.header)
                .map_err(|problem| self.malformed(format!("L1 table, entry {index}"), problem))?;
            match table {
                Some(table) if table + self.header.cluster_len() > self.file.len() => Err(self.malformed(
                    format!("L1 table, entry {index}"),
                    format!("it points at {table:#x}, and the file has {:#x} bytes", self.file.len()),
                )),
                table => Ok(table.unwrap_or(0)),
            }
        });
        words.collect()
    }

    /// Whoever owns a cluster owns it alone: else one write through one table would change what another means, and a small file
    /// could pretend to hold any amount of data.
    fn check_tables(&self, l1_offset: u64, snapshot_table_len: u64) -> Result<(), FormatError> {
        let cluster_len = self.header.cluster_len();
        let fixed = [
            ("the header", 0..1),
            ("the L1 table", l1_offset..l1_offset + self.l1.len() as u64 * 8),
            ("the refcount table", self.refcount_table()?),
            ("the snapshot table", self.header.snapshots_offset..self.header.snapshots_offset + snapshot_table_len),
        ];
        let mut map = HostMap::new(self.header.cluster_bits);
        for (name, range) in &fixed {
            let mut at = range.start;
            while at < range.end {
                self.claim(&mut map, &fixed, at, Owner::Table, &|| (*name).to_owned())?;
                at += cluster_len;
            }
        }
        for (index, table) in self.l1.iter().enumerate().filter(|(_, table)| **table != 0) {
            self.claim(&mut map, &fixed, *table, Owner::Table, &|| format!("L1 table, entry {index}"))?;
        }
        // Clusters of an external data file share nothing with the tables.
        let mut data_map = self.data_file.is_some().then(|| HostMap::new(self.header.cluster_bits));
        let mut bytes = vec![0; cluster_len as usize];
        for (table_index, table) in self.l1.iter().enumerate().filter(|(_, table)| **table != 0) {
            self.file.read_at(*table, &mut bytes)?;
            if super::super::is_zero(&bytes) {
                continue;
            }
            for index in 0..cluster_len / self.header.entry_len() {
                let guest = ((table_index as u64) << self.header.l1_shift()) + index * cluster_len;
                if guest >= self.len {
                    break;
                }
                let place = || format!("L2 table {table_index}, entry {index}");
                let entry = self.entry(table_index as u64, &bytes, index)?;
                let map = data_map.as_mut().unwrap_or(&mut map);
                match entry {
                    Entry::Unallocated | Entry::Zeros { host: None } | Entry::Subclusters { host: None, .. } => {}
                    Entry::Data { host }
                    | Entry::Zeros { host: Some(host) }
                    | Entry::Subclusters { host: Some(host), .. } => {
                        self.claim(map, &fixed, host, Owner::Data, &place)?;
                    }
                    Entry::Compressed { host, len } => {
                        let mut at = host & !(cluster_len - 1);
                        while at < (host + len).min(self.file.len()) {
                            self.claim(map, &fixed, at, Owner::Compressed, &place)?;
                            at += cluster_len;
                        }
                    }
                }
            }
        }
        Ok(())
    }

    fn refcount_table(&self) -> Result<Range<u64>, FormatError> {
        let start = self.header.refcount_table_offset;
        let len = u64::from(self.header.refcount_table_clusters) << self.header.cluster_bits;
        if len > REFCOUNT_TABLE_LEN_MAX {
            let what = "the length of the refcount table in bytes";
            let (file, value, limit) = (self.file.name().to_owned(), len, REFCOUNT_TABLE_LEN_MAX);
            return Err(FormatError::TooLarge { file, what, value, limit });
        }
        match start.checked_add(len) {
            Some(end) if end <= self.file.len() && start.is_multiple_of(self.header.cluster_len()) => Ok(start..end),
            _ => {
                let problem =
                    format!("its {len:#x} bytes are said to lie at {start:#x}; the file has {:#x}", self.file.len());
                Err(self.malformed("refcount table", problem))
            }
        }
    }

    fn claim(
        &self,
        map: &mut HostMap,
        fixed: &[(&str, Range<u64>)],
        offset: u64,
        owner: Owner,
        place: &dyn Fn() -> String,
    ) -> Result<(), FormatError> {
        let present = match map.claim(offset, owner) {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(present)) => present,
            Err(MapFull) => {
                let what = "the memory in bytes that it takes to check which table owns which cluster";
                let limit = HOST_MAP_LEN_MAX as u64;
                return Err(FormatError::TooLarge { file: self.file.name().to_owned(), what, value: limit + 1, limit });
            }
        };
        let whose = match present {
            Owner::Table => {
                let cluster = offset & !(self.header.cluster_len() - 1);
                let holds = |range: &Range<u64>| {
                    !range.is_empty() && cluster < range.end && range.start < cluster + self.header.cluster_len()
                };
                match fixed.iter().find(|(_, range)| holds(range)) {
                    Some((name, _)) => (*name).to_owned(),
                    None => {
                        let index = self.l1.iter().position(|table| *table == cluster);
                        format!("L2 table {}", index.expect("every other table is an L2 table"))
                    }
                }
            }
            Owner::Data => "a cluster of data that another entry names".to_owned(),
            Owner::Compressed => "compressed clusters".to_owned(),
            Owner::Nobody => unreachable!("a cluster that nobody has is given away"),
        };
        Err(self.malformed(place(), format!("it points at {offset:#x}, where {whose} lies")))
    }

    /// Entry `index` of an L2 table, checked against the file's length.
    fn entry(&self, table_index: u64, table: &[u8], index: u64) -> Result<Entry, FormatError> {
        let at = (index * self.header.entry_len()) as usize;
        let word = super::be64(table, at);
        let bitmap = if self.header.extended_l2 { super::be64(table, at + 8) } else { 0 };
        if word == 0 && bitmap == 0 {
            return Ok(Entry::Unallocated);
        }
        let fail = |problem| self.malformed(format!("L2 table {table_index}, entry {index}"), problem);
        let entry = entry::parse(word, bitmap, &self.header).map_err(fail)?;
        let (host, needed) = match entry {
            Entry::Unallocated | Entry::Zeros { .. } => return Ok(entry),
            Entry::Compressed { host, .. } => (host, 1),
            // A cluster at the end may be cut off behind the end of the disk.
            Entry::Data { host } => {
                let guest = (table_index << self.header.l1_shift()) + index * self.header.cluster_len();
                (host, self.len.saturating_sub(guest).min(self.header.cluster_len()))
            }
            Entry::Subclusters { host, allocated, .. } => {
                let Some(host) = host else { return Ok(entry) };
                let guest = (table_index << self.header.l1_shift()) + index * self.header.cluster_len();
                let used = u64::from(32 - allocated.leading_zeros()) * (self.header.cluster_len() / SUBCLUSTERS);
                (host, used.min(self.len.saturating_sub(guest)))
            }
        };
        let file_len = self.data_file.as_ref().map_or(self.file.len(), |data| data.len());
        if host.checked_add(needed).is_none_or(|end| end > file_len) {
            return Err(fail(format!("it points at {host:#x}, and the file has {file_len:#x} bytes: it is cut off")));
        }
        Ok(entry)
    }

    fn table(&self, index: u64) -> Result<Option<Arc<[u8]>>, FormatError> {
        let offset = self.l1[index as usize];
        if offset == 0 {
            return Ok(None);
        }
        if let Some(table) = hold(&self.tables).get(index) {
            return Ok(Some(table));
        }
        let mut bytes = vec![0; self.header.cluster_len() as usize];
        self.file.read_at(offset, &mut bytes)?;
        let table: Arc<[u8]> = bytes.into();
        hold(&self.tables).put(index, table.clone());
        Ok(Some(table))
    }

    /// What lies at `offset`, and how many bytes of the same kind follow, within `limit` bytes and one L2 table.
    fn part_at(&self, offset: u64, limit: u64) -> Result<(Part, u64), FormatError> {
        let shift = self.header.l1_shift();
        let table_index = offset >> shift;
        let limit = limit.min(((table_index + 1) << shift) - offset);
        let Some(table) = self.table(table_index)? else { return Ok((Part::Unallocated, limit)) };
        let (first, mut len) = self.part_of_entry(table_index, &table, offset)?;
        while len < limit && !matches!(first, Part::Compressed { .. }) {
            let (next, next_len) = self.part_of_entry(table_index, &table, offset + len)?;
            let follows = match (first, next) {
                (Part::Data { host }, Part::Data { host: next_host }) => host + len == next_host,
                (first, next) => first == next,
            };
            if !follows {
                break;
            }
            len += next_len;
        }
        Ok((first, len.min(limit)))
    }

    /// The same within one cluster.
    fn part_of_entry(&self, table_index: u64, table: &[u8], offset: u64) -> Result<(Part, u64), FormatError> {
        let cluster_len = self.header.cluster_len();
        let index = (offset & ((1 << self.header.l1_shift()) - 1)) >> self.header.cluster_bits;
        let inside = offset & (cluster_len - 1);
        let rest = cluster_len - inside;
        Ok(match self.entry(table_index, table, index)? {
            Entry::Unallocated => (Part::Unallocated, rest),
            Entry::Zeros { .. } => (Part::Zeros, rest),
            Entry::Data { host } => (Part::Data { host: host + inside }, rest),
            Entry::Compressed { host, len } => (Part::Compressed { host, len }, rest),
            Entry::Subclusters { host, allocated, zeros } => {
                let subcluster_len = cluster_len / SUBCLUSTERS;
                let bit = 1_u32 << (inside / subcluster_len);
                let part = match host {
                    _ if zeros & bit != 0 => Part::Zeros,
                    Some(host) if allocated & bit != 0 => Part::Data { host: host + inside },
                    _ => Part::Unallocated,
                };
                (part, subcluster_len - inside % subcluster_len)
            }
        })
    }

    fn read_compressed(&self, offset: u64, host: u64, len: u64, bytes: &mut [u8]) -> Result<(), FormatError> {
        let cluster_len = self.header.cluster_len();
        // The last cluster of a file may end before its last sector does.
        let mut packed = vec![0; len.min(self.file.len().saturating_sub(host)) as usize];
        self.file.read_at(host, &mut packed)?;
        let mut inflater = hold(&self.inflaters).pop().unwrap_or_else(Inflater::new);
        let inside = (offset & (cluster_len - 1)) as usize;
        let whole = bytes.len() as u64 == cluster_len;
        let mut cluster = if whole { Vec::new() } else { vec![0; cluster_len as usize] };
        let into = if whole { &mut *bytes } else { &mut cluster[..] };
        inflater.inflate(self.header.compression, &packed, into).map_err(|problem| {
            let table = offset >> self.header.l1_shift();
            let index = (offset & ((1 << self.header.l1_shift()) - 1)) >> self.header.cluster_bits;
            self.malformed(format!("L2 table {table}, entry {index}, compressed at {host:#x}"), problem)
        })?;
        if !whole {
            bytes.copy_from_slice(&cluster[inside..inside + bytes.len()]);
        }
        hold(&self.inflaters).push(inflater);
        Ok(())
    }

    fn read_backing(&self, offset: u64, bytes: &mut [u8]) -> Result<(), FormatError> {
        let backed = self.backing.as_ref().map_or(0, |backing| backing.len().saturating_sub(offset));
        let (backed, beyond) = bytes.split_at_mut(backed.min(bytes.len() as u64) as usize);
        beyond.fill(0);
        match &self.backing {
            Some(backing) if !backed.is_empty() => backing.read_at(offset, backed),
            _ => Ok(()),
        }
    }

    fn backing_extent(&self, offset: u64, limit: u64) -> Result<Extent, FormatError> {
        match &self.backing {
            Some(backing) if offset < backing.len() => backing.extent_at(offset, limit),
            _ => Ok(Extent { len: limit, content: Content::Zeros }),
        }
    }
}

impl Source for Qcow2 {
    fn len(&self) -> u64 {
        self.len
    }

    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> Result<(), FormatError> {
        let mut done = 0;
        while done < bytes.len() {
            let at = offset + done as u64;
            let (part, len) = self.part_at(at, (bytes.len() - done) as u64)?;
            let piece = &mut bytes[done..done + len as usize];
            match part {
                Part::Zeros => piece.fill(0),
                Part::Unallocated => self.read_backing(at, piece)?,
                Part::Compressed { host, len } => self.read_compressed(at, host, len, piece)?,
                Part::Data { host } => match &self.data_file {
                    Some(data) => data.read_at(host, piece)?,
                    None => self.file.read_at(host, piece)?,
                },
            }
            done += len as usize;
        }
        Ok(())
    }

    fn extent_at(&self, offset: u64, limit: u64) -> Result<Extent, FormatError> {
        let limit = limit.min(self.len - offset);
        let (first, mut len) = self.part_at(offset, limit)?;
        let content = match first {
            Part::Zeros => Content::Zeros,
            Part::Data { .. } | Part::Compressed { .. } => Content::Data,
            Part::Unallocated if self.backing.is_none() => Content::Zeros,
            // Asked once, not for each piece of a longer answer: every image of a chain would double the work.
            Part::Unallocated => return self.backing_extent(offset, len),
        };
        while len < limit {
            let (next, next_len) = self.part_at(offset + len, limit - len)?;
            let follows = match next {
                Part::Zeros => content == Content::Zeros,
                Part::Data { .. } | Part::Compressed { .. } => content == Content::Data,
                Part::Unallocated => self.backing.is_none() && content == Content::Zeros,
            };
            if !follows {
                break;
            }
            len += next_len;
        }
        Ok(Extent { len, content })
    }
}
