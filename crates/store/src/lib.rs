//! The store: virtual disks, templates and memory in one content-addressed forest.
//!
//! A disk is a tree ([`Root`]) whose leaves name chunks; equal chunks are stored once, in segments. What is written to a
//! volume goes to its log first and into the tree later; a snapshot is a record in that log.
//!
//! Rooms, from the bottom: `name`, `id` and `room` (on the host's disk); `records` (bytes on disk, and from names to places); `tree` and
//! `node` (what is a disk, and what a life); `catalog` (what there is); `domain` (encryption); `store` (all of it, open in a process);
//! `volume` (what is written); `images`; `upkeep` (what is needed, and whether it is whole); `disk` (what front ends and disks say to each
//! other, and the store's side of it); `nbd` (the server for NBD clients); `transfer` (from store to store over a stream, only what is
//! missing); `remote` (images in an object store, pushed, pulled, and used while they are still there);
//! `format` (image formats: what is imported and exported).

mod catalog;
pub mod disk;
mod domain;
mod error;
pub mod format;
mod id;
mod images;
mod name;
pub mod nbd;
mod node;
mod pace;
mod records;
pub mod remote;
mod room;
mod store;
#[cfg(test)]
mod test_store;
pub mod transfer;
mod tree;
mod upkeep;
mod volume;
mod workers;

pub use catalog::{DomainRow, ImageRow, Replace, SnapshotRow, VolumeRow, check_name};
pub use disk::open_disk::{FixedDisk, OpenDisk};
pub use disk::queue::DiskQueue;
pub use domain::{DomainErased, Key, KeyKind, OPEN_DOMAIN};
pub use error::{Result, StoreError};
pub use id::Id;
pub use images::{NewNode, TreeSource};
pub use name::{Kind, Name, Namer};
pub use node::{Node, Tree};
pub use records::index::IndexFigures;
pub use store::{Added, Store, StoreOptions};
pub use tree::Root;
pub use upkeep::collect::{CollectOptions, Collected, Step, Usage, Watcher};
pub use upkeep::mark::Lost;
pub use upkeep::verify::{Damage, Repaired, Verified};
pub use volume::volumes::{CHUNK_LEN_DEFAULT, Content, VolumeFacts};
pub use volume::{CAPACITY_BYTES_MAX, Volume, VolumeOptions};
