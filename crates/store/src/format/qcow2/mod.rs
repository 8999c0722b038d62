//! qcow2, versions 2 and 3, from the format's specification (docs/interop/qcow2.txt of QEMU 7.2).
//!
//! A virtual disk is cut into clusters. The L1 table names L2 tables, an L2 table says where each cluster lies in the file: not
//! at all (then the backing file has it), as zeros, as it is, or compressed.
//!
//! What a reader may take, whatever the file says:
//! - Memory: [`L1_LEN_MAX`] for the L1 table, [`HOST_MAP_LEN_MAX`] while the tables are checked, [`SNAPSHOT_TABLE_LEN_MAX`] for
//!   the list of snapshots, [`L2_CACHE_LEN_MAX`] plus one table a thread for L2 tables, and a few clusters a thread while it reads;
//!   that for each of at most [`CHAIN_LEN_MAX`] images.
//! - Time: opening reads each table that is in use once; a cluster inflates to one cluster at most, and a read costs at most
//!   that for each cluster that it touches and each image of the chain.
//!
//! Refcounts do not matter for reading and are not looked at; a dirty image therefore is read like any other.
//!
//! Modules: `header`, `entry` (L2 entries), `host_map` (what in the file belongs to whom), `image` (one file), `compression`,
//! `chain` (backing files), `snapshot`, `writer`, `deflate_pool` (threads that compress for it).

mod chain;
mod compression;
mod deflate_pool;
mod entry;
mod header;
mod host_map;
mod image;
mod snapshot;
#[cfg(test)]
mod tests;
mod writer;

pub use chain::{CHAIN_LEN_MAX, OpenOptions, OtherFiles};
pub use compression::Compression;
pub use header::{Header, OtherFile};
pub use host_map::HOST_MAP_LEN_MAX;
pub use image::{L1_LEN_MAX, L2_CACHE_LEN_MAX, Qcow2, REFCOUNT_TABLE_LEN_MAX};
pub use snapshot::{SNAPSHOT_TABLE_LEN_MAX, Snapshot};
#[cfg(test)]
pub(crate) use tests::Random;
pub use writer::Qcow2Writer;

/// The cluster sizes of the format: 512 bytes to 2 MiB.
const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;

fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}
