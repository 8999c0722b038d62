//! The store: virtual disks, templates and memory in one content-addressed forest.
//!
//! A disk is a tree ([`Root`]) whose leaves name chunks; equal chunks are stored once, in segments. What is written to a
//! volume goes to its log first and into the tree later; a snapshot is a record in that log.
//!
//! Modules, from the bottom: `name` and `id`; `record` and `segment` (bytes on disk); `run` and `index` (names to places); `cache`;
//! `tree` and `node`; `catalog` (what there is); `store` (all of it, open in a process); `extent_map`, `log` and `head` (what a volume is
//! besides its tree); `volume`, `compact` and `control` (a volume that is open); `log_seal` and `domain` (encryption); `volumes` (making and removing them); `mark`, `collect` and `verify`
//! (what is needed, and whether it is whole); `disk` (what front ends and disks say to each other), `open_disk`, `queue` and
//! `workers` (the store's side of that); `nbd` (the server for NBD clients);
//! `transfer` (from store to store over a stream, only what is missing);
//! `remote` (images in an object store, pushed, pulled, and used while they are still there);
//! `format` (image formats: what is imported and exported); `memory_disk` (a disk in memory, for tests).

mod cache;
mod catalog;
mod collect;
mod compact;
mod control;
pub mod disk;
mod domain;
mod error;
mod extent_map;
pub mod format;
mod head;
mod id;
mod images;
mod index;
mod log;
mod log_seal;
mod mark;
pub mod memory_disk;
mod name;
pub mod nbd;
mod node;
mod open_disk;
mod pace;
mod queue;
mod record;
pub mod remote;
mod run;
mod segment;
mod store;
pub mod transfer;
mod tree;
mod verify;
mod volume;
mod volumes;
mod workers;

pub use catalog::{DomainRow, ImageRow, Replace, SnapshotRow, VolumeRow, check_name};
pub use collect::{CollectOptions, Collected, Step, Usage, Watcher};
pub use domain::{DomainErased, Key, KeyKind, OPEN_DOMAIN};
pub use error::{Result, StoreError};
pub use id::Id;
pub use images::{NewNode, TreeSource};
pub use index::IndexFigures;
pub use mark::Lost;
pub use name::{Kind, Name, Namer};
pub use node::{Node, Tree};
pub use open_disk::{FixedDisk, OpenDisk};
pub use queue::DiskQueue;
pub use store::{Added, Store, StoreOptions};
pub use tree::Root;
pub use verify::{Damage, Repaired, Verified};
pub use volume::{CAPACITY_BYTES_MAX, Volume, VolumeOptions};
pub use volumes::{CHUNK_LEN_DEFAULT, Content, VolumeFacts};
