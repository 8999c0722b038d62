//! Writes a qcow2 image of version 3 with clusters of 64 KiB, from one end of the disk to the other.
//!
//! What always holds:
//! - The header is written last: an image that was not finished is no image.
//! - In memory are the L1 table (at most 1 MiB), one L2 table, one block of refcounts, one cluster that is being put together,
//!   and with compression a few clusters a thread.
//! - Every cluster that is used has its true refcount. The file is cut into regions of 2 GiB, one for each block of refcounts,
//!   and the block lies in its region: it is written when the next region begins.

use super::super::error::{FormatError, file_name};
use super::super::raw::write_file;
use super::super::{Target, VIRTUAL_LEN_MAX, is_zero};
use super::compression::{Compression, Deflater};
use super::deflate_pool::{DeflatePool, Packed};
use std::fs::File;
use std::num::NonZeroUsize;
use std::path::Path;

const CLUSTER_BITS: u32 = 16;
const CLUSTER: u64 = 1 << CLUSTER_BITS;
/// Entries of an L2 table.
const L2_ENTRIES: u64 = CLUSTER / 8;
/// Entries of a page of the host in an L2 table.
const L2_PAGE_ENTRIES: usize = 512;
/// Clusters that one block of 16-bit refcounts counts.
const REGION_CLUSTERS: u64 = CLUSTER / 2;
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
/// Where the count of sectors begins in a compressed entry.
const SECTORS_SHIFT: u32 = 62 - (CLUSTER_BITS - 8);
const SECTOR: u64 = 512;
/// Bytes of the header: version 3 with the compression type.
const HEADER_LEN: u32 = 112;
/// Compressed clusters are written together until there are this many bytes of them.
const WRITE_LEN: usize = 1 << 20;

/// A qcow2 image that is being written. Ranges come in ascending order.
pub struct Qcow2Writer {
    file: File,
    name: String,
    len: u64,
    compression: Option<Compression>,
    pool: Option<DeflatePool>,
    /// Where the next range may begin.
    end: u64,
    /// The cluster that is being put together, and its number in the disk.
    partial: Option<(u64, Vec<u8>)>,
    l1: Vec<u64>,
    /// The L2 table in work: its index, and its entries.
    l2_index: u64,
    l2: Vec<u64>,
    /// The next cluster of the file.
    next: u64,
    /// The refcounts of the region in work, and where the blocks of all regions lie.
    refcounts: Vec<u16>,
    blocks: Vec<u64>,
    /// The free end of the last cluster with compressed data.
    packed_free: std::ops::Range<u64>,
    /// Compressed data that is not written yet, and where it goes.
    unwritten: (u64, Vec<u8>),
}

impl Qcow2Writer {
    /// Makes a new image of a disk of `len` bytes, rounded up to whole sectors, for QEMU knows no parts of one; a file that is already there is left alone and reported. Compression runs on
    /// `threads`.
    pub fn create(
        path: &Path,
        len: u64,
        compression: Option<Compression>,
        threads: NonZeroUsize,
    ) -> Result<Self, FormatError> {
        let name = file_name(path);
        let len = len.div_ceil(SECTOR).saturating_mul(SECTOR);
        if len > VIRTUAL_LEN_MAX {
            let what = "the size of the virtual disk in bytes";
            return Err(FormatError::TooLarge { file: name, what, value: len, limit: VIRTUAL_LEN_MAX });
        }
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(path)
            .map_err(|error| FormatError::io(&name, "make it", error))?;
        let l1 = vec![0; len.div_ceil(CLUSTER * L2_ENTRIES) as usize];
        let mut writer = Qcow2Writer {
            file,
            name,
            len,
            compression,
            pool: compression.map(|kind| DeflatePool::new(threads, move || Deflater::new(kind))),
            end: 0,
            partial: None,
            l1,
            l2_index: 0,
            l2: vec![0; L2_ENTRIES as usize],
            next: 0,
            refcounts: Vec::new(),
            blocks: Vec::new(),
            packed_free: 0..0,
            unwritten: (0, Vec::new()),
        };
        // The header, the L1 table and the first block of refcounts.
        writer.begin_region(1 + writer.l1_clusters());
        Ok(writer)
    }

    fn l1_clusters(&self) -> u64 {
        (self.l1.len() as u64 * 8).div_ceil(CLUSTER)
    }

    fn write_file(&self, offset: u64, bytes: &[u8]) -> Result<(), FormatError> {
        write_file(&self.file, &self.name, offset, bytes)
    }

    /// Begins a region whose first `before` clusters are in use, and puts its block of refcounts behind them.
    fn begin_region(&mut self, before: u64) {
        self.refcounts = vec![0; REGION_CLUSTERS as usize];
        self.refcounts[..=before as usize].fill(1);
        self.next += before;
        self.blocks.push(self.next * CLUSTER);
        self.next += 1;
        self.packed_free = 0..0;
    }

    fn write_block(&self) -> Result<(), FormatError> {
        let bytes: Vec<u8> = self.refcounts.iter().flat_map(|count| count.to_be_bytes()).collect();
        self.write_file(*self.blocks.last().expect("the first region begins with the writer"), &bytes)
    }

    /// Gives away `count` clusters in a row, at most what a region has, each with a refcount of one.
    fn allocate(&mut self, count: u64) -> Result<u64, FormatError> {
        let left = self.blocks.len() as u64 * REGION_CLUSTERS - self.next;
        if count > left {
            self.write_block()?;
            // What is left stays free.
            self.next += left;
            self.begin_region(0);
        }
        let first = self.next;
        let at = (first % REGION_CLUSTERS) as usize;
        self.refcounts[at..at + count as usize].fill(1);
        self.next += count;
        Ok(first * CLUSTER)
    }

    fn set_entry(&mut self, cluster: u64, entry: u64) -> Result<(), FormatError> {
        let index = cluster / L2_ENTRIES;
        if index != self.l2_index {
            self.write_l2()?;
            self.l2_index = index;
        }
        self.l2[(cluster % L2_ENTRIES) as usize] = entry;
        Ok(())
    }

    fn write_l2(&mut self) -> Result<(), FormatError> {
        if self.l2.iter().all(|entry| *entry == 0) {
            return Ok(());
        }
        let offset = self.allocate(1)?;
        // Pages without entries stay holes: a disk with little in many places makes many tables.
        for (index, page) in self.l2.chunks(L2_PAGE_ENTRIES).enumerate() {
            if page.iter().any(|entry| *entry != 0) {
                self.write_file(offset + (index * L2_PAGE_ENTRIES * 8) as u64, &be_bytes(page))?;
            }
        }
        self.l1[self.l2_index as usize] = offset | COPIED;
        self.l2.fill(0);
        Ok(())
    }

    /// Takes whole clusters, the first of which is `cluster` of the disk.
    fn put_clusters(&mut self, cluster: u64, bytes: &[u8]) -> Result<(), FormatError> {
        let is_hole = |bytes: &[u8]| is_zero(bytes);
        if self.pool.is_some() {
            for (index, piece) in bytes.chunks_exact(CLUSTER as usize).enumerate().filter(|(_, piece)| !is_hole(piece))
            {
                self.compress(cluster + index as u64, piece.to_vec())?;
            }
            return Ok(());
        }
        // Neighbours in the disk that become neighbours in the file are written at once.
        let mut run: Option<(u64, std::ops::Range<usize>)> = None;
        for (index, piece) in bytes.chunks_exact(CLUSTER as usize).enumerate() {
            if is_hole(piece) {
                continue;
            }
            let number = cluster + index as u64;
            // The table that ends here comes before the cluster in the file.
            if number / L2_ENTRIES != self.l2_index {
                self.write_l2()?;
                self.l2_index = number / L2_ENTRIES;
            }
            let offset = self.allocate(1)?;
            self.set_entry(number, offset | COPIED)?;
            let start = index * CLUSTER as usize;
            match &mut run {
                Some((at, range)) if range.end == start && *at + range.len() as u64 == offset => {
                    range.end += CLUSTER as usize;
                }
                _ => {
                    if let Some((at, range)) = run.take() {
                        self.write_file(at, &bytes[range])?;
                    }
                    run = Some((offset, start..start + CLUSTER as usize));
                }
            }
        }
        match run {
            Some((at, range)) => self.write_file(at, &bytes[range]),
            None => Ok(()),
        }
    }

    fn compress(&mut self, cluster: u64, bytes: Vec<u8>) -> Result<(), FormatError> {
        let pool = self.pool.as_mut().expect("asked only with compression");
        let done = pool.push(cluster, bytes);
        done.map_or(Ok(()), |packed| self.put_packed(packed))
    }

    fn put_packed(&mut self, packed: Packed) -> Result<(), FormatError> {
        let Packed { cluster, bytes, compressed } = packed;
        // The table in work is finished first: its cluster would cut a row of compressed data.
        if cluster / L2_ENTRIES != self.l2_index {
            self.write_l2()?;
            self.l2_index = cluster / L2_ENTRIES;
        }
        let Some(compressed) = compressed else {
            let offset = self.allocate(1)?;
            self.set_entry(cluster, offset | COPIED)?;
            return self.write_file(offset, &bytes);
        };
        let len = compressed.len() as u64;
        let room = self.packed_free.end - self.packed_free.start;
        if room < len {
            let offset = self.allocate(1)?;
            if offset == self.packed_free.end && room > 0 {
                // The new cluster follows the last one: the data lies across both.
                self.packed_free.end += CLUSTER;
            } else {
                self.packed_free = offset..offset + CLUSTER;
            }
        }
        let offset = self.packed_free.start;
        self.packed_free.start += len;
        // A cluster of the file counts every compressed cluster that it has a part of; the first was counted when it was
        // allocated.
        let (first, last) = (offset / CLUSTER, (offset + len - 1) / CLUSTER);
        for one in first..=last {
            let fresh = offset <= one * CLUSTER;
            if !fresh {
                self.refcounts[(one % REGION_CLUSTERS) as usize] += 1;
            }
        }
        let sectors = (offset + len - 1) / SECTOR - offset / SECTOR;
        self.set_entry(cluster, offset | sectors << SECTORS_SHIFT | COMPRESSED)?;
        let follows = self.unwritten.0 + self.unwritten.1.len() as u64 == offset;
        if !follows || self.unwritten.1.len() >= WRITE_LEN {
            self.write_unwritten()?;
            self.unwritten.0 = offset;
        }
        self.unwritten.1.extend_from_slice(&compressed);
        Ok(())
    }

    fn write_unwritten(&mut self) -> Result<(), FormatError> {
        self.write_file(self.unwritten.0, &self.unwritten.1)?;
        self.unwritten.1.clear();
        Ok(())
    }

    /// Checks the order, and finishes the partial cluster if the range begins behind it.
    fn begin_range(&mut self, offset: u64, len: u64) -> Result<(), FormatError> {
        if offset < self.end {
            return Err(FormatError::OutOfOrder { file: self.name.clone(), offset, end: self.end });
        }
        assert!(offset + len <= self.len, "a range beyond the end of the disk");
        self.end = offset + len;
        match &self.partial {
            Some((cluster, _)) if offset / CLUSTER != *cluster => self.put_partial(),
            _ => Ok(()),
        }
    }

    fn put_partial(&mut self) -> Result<(), FormatError> {
        match self.partial.take() {
            Some((cluster, bytes)) => self.put_clusters(cluster, &bytes),
            None => Ok(()),
        }
    }

    fn header(&self, refcount_table: u64, refcount_table_clusters: u64) -> Vec<u8> {
        let zstd = self.compression == Some(Compression::Zstd);
        let mut header = Vec::with_capacity(HEADER_LEN as usize + 8);
        header.extend_from_slice(b"QFI\xfb");
        header.extend_from_slice(&3_u32.to_be_bytes());
        header.extend_from_slice(&[0; 12]); // no backing file
        header.extend_from_slice(&CLUSTER_BITS.to_be_bytes());
        header.extend_from_slice(&self.len.to_be_bytes());
        header.extend_from_slice(&[0; 4]); // no encryption
        header.extend_from_slice(&(self.l1.len() as u32).to_be_bytes());
        header.extend_from_slice(&CLUSTER.to_be_bytes()); // the L1 table
        header.extend_from_slice(&refcount_table.to_be_bytes());
        header.extend_from_slice(&(refcount_table_clusters as u32).to_be_bytes());
        header.extend_from_slice(&[0; 12]); // no snapshots
        header.extend_from_slice(&(u64::from(zstd) << 3).to_be_bytes()); // incompatible features
        header.extend_from_slice(&[0; 16]); // compatible ones, and those that an older writer clears
        header.extend_from_slice(&4_u32.to_be_bytes()); // refcounts of 16 bits
        header.extend_from_slice(&HEADER_LEN.to_be_bytes());
        header.push(u8::from(zstd));
        header.resize(HEADER_LEN as usize + 8, 0); // and the end of extensions
        header
    }
}

fn be_bytes(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_be_bytes()).collect()
}

impl Target for Qcow2Writer {
    fn len(&self) -> u64 {
        self.len
    }

    fn granule(&self) -> usize {
        CLUSTER as usize
    }

    fn write_at(&mut self, mut offset: u64, mut bytes: &[u8]) -> Result<(), FormatError> {
        self.begin_range(offset, bytes.len() as u64)?;
        while !bytes.is_empty() {
            let (cluster, inside) = (offset / CLUSTER, (offset % CLUSTER) as usize);
            let whole = bytes.len() & !(CLUSTER as usize - 1);
            let taken = if inside == 0 && whole > 0 {
                self.put_partial()?;
                self.put_clusters(cluster, &bytes[..whole])?;
                whole
            } else {
                if self.partial.as_ref().is_some_and(|(present, _)| *present != cluster) {
                    self.put_partial()?;
                }
                let (_, partial) = self.partial.get_or_insert_with(|| (cluster, vec![0; CLUSTER as usize]));
                let taken = bytes.len().min(CLUSTER as usize - inside);
                partial[inside..inside + taken].copy_from_slice(&bytes[..taken]);
                taken
            };
            offset += taken as u64;
            bytes = &bytes[taken..];
        }
        Ok(())
    }

    fn zero(&mut self, offset: u64, len: u64) -> Result<(), FormatError> {
        self.begin_range(offset, len)
    }

    fn finish(&mut self) -> Result<(), FormatError> {
        self.put_partial()?;
        while let Some(packed) = self.pool.as_mut().and_then(DeflatePool::pop) {
            self.put_packed(packed)?;
        }
        self.write_unwritten()?;
        self.write_l2()?;
        // The table itself may begin a region; one entry more is room for it.
        let table_clusters = ((self.blocks.len() as u64 + 1) * 8).div_ceil(CLUSTER);
        let table = self.allocate(table_clusters)?;
        self.write_block()?;
        self.write_file(table, &be_bytes(&self.blocks))?;
        self.write_file(CLUSTER, &be_bytes(&self.l1))?;
        let failed = |error| FormatError::io(&self.name, "finish it", error);
        self.file.set_len(self.next * CLUSTER).map_err(failed)?;
        self.file.sync_all().map_err(failed)?;
        self.write_file(0, &self.header(table, table_clusters))?;
        self.file.sync_all().map_err(failed)
    }
}
