//! The store: virtual disks, templates and memory in one content-addressed forest.
//!
//! Modules: `disk` (what front ends and disks say to each other), `format` (image formats: what is imported and exported),
//! `memory_disk` (a disk in memory, for tests), `nbd` (the server for NBD clients).

pub mod disk;
pub mod format;
pub mod memory_disk;
pub mod nbd;
