//! What an entry of an L2 table says.

use super::header::Header;

/// The bits of a table entry that hold an offset in the file.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// Standard entries: reads as zeros, whatever the offset.
const ZERO: u64 = 1 << 0;
const COMPRESSED: u64 = 1 << 62;
/// Refcount is exactly one: matters to writers, and tells "at 0" from "nowhere" in an external data file.
const COPIED: u64 = 1 << 63;
/// Bits of L1 entries and of standard L2 entries that are always zero.
const RESERVED: u64 = !(OFFSET | COMPRESSED | COPIED | ZERO);
/// Subclusters of an extended entry.
pub(super) const SUBCLUSTERS: u64 = 32;
/// What compressed data is counted in.
const SECTOR_LEN: u64 = 512;

/// Where a cluster lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Entry {
    /// Nowhere: the backing file has it, or it is zeros.
    Unallocated,
    /// All zeros; a cluster may be set aside for it.
    Zeros {
        /// What is set aside.
        host: Option<u64>,
    },
    /// As it is.
    Data {
        /// Offset in the file that holds the clusters.
        host: u64,
    },
    /// Compressed, in at most `len` bytes.
    Compressed {
        /// Offset in the image.
        host: u64,
        /// Bytes; the data may end earlier.
        len: u64,
    },
    /// In 32 parts, each of which is allocated, zeros or neither.
    Subclusters {
        /// Offset of the cluster, if there is one.
        host: Option<u64>,
        /// A bit for each subcluster that is in the cluster.
        allocated: u32,
        /// A bit for each subcluster that reads as zeros.
        zeros: u32,
    },
}

/// The offset in an L1 entry, if it names a table.
pub(super) fn l1_offset(word: u64, header: &Header) -> Result<Option<u64>, String> {
    if word & !(OFFSET | COPIED) != 0 {
        return Err(format!("reserved bits are set in {word:#018x}"));
    }
    let offset = word & OFFSET;
    if !offset.is_multiple_of(header.cluster_len()) {
        return Err(format!("it points at {offset:#x}, which is not the start of a cluster"));
    }
    Ok((offset != 0).then_some(offset))
}

/// Reads an entry; `bitmap` is the second half of an extended one.
pub(super) fn parse(word: u64, bitmap: u64, header: &Header) -> Result<Entry, String> {
    if word & COMPRESSED != 0 {
        if header.data_file.is_some() {
            return Err("it is compressed, which an image with a data file cannot have".to_owned());
        }
        if bitmap != 0 {
            return Err("it is compressed and has subclusters".to_owned());
        }
        let shift = 62 - (header.cluster_bits - 8);
        let host = word & ((1 << shift) - 1);
        let sectors = ((word & (COMPRESSED - 1)) >> shift) + 1;
        return Ok(Entry::Compressed { host, len: sectors * SECTOR_LEN - host % SECTOR_LEN });
    }
    let zero_flag_known = header.version >= 3 && !header.extended_l2;
    let reserved = if zero_flag_known { RESERVED } else { RESERVED | ZERO };
    if word & reserved != 0 {
        return Err(format!("reserved bits are set in {word:#018x}"));
    }
    let offset = word & OFFSET;
    if !offset.is_multiple_of(header.cluster_len()) {
        return Err(format!("it points at {offset:#x}, which is not the start of a cluster"));
    }
    let at_zero = header.data_file.is_some() && word & COPIED != 0;
    let host = (offset != 0 || at_zero).then_some(offset);
    if header.extended_l2 {
        let (allocated, zeros) = (bitmap as u32, (bitmap >> 32) as u32);
        if allocated & zeros != 0 {
            return Err(format!("subclusters {:#010x} are both allocated and zeros", allocated & zeros));
        }
        return match host {
            None if allocated != 0 => Err("it has allocated subclusters and no cluster".to_owned()),
            None if zeros == 0 => Ok(Entry::Unallocated),
            host => Ok(Entry::Subclusters { host, allocated, zeros }),
        };
    }
    Ok(match host {
        host if word & ZERO != 0 => Entry::Zeros { host },
        Some(host) => Entry::Data { host },
        None => Entry::Unallocated,
    })
}
