//! The store: virtual disks, templates and memory in one content-addressed forest.
//!
//! Modules: `disk` (what front ends and disks say to each other), `format` (image formats: what is imported and exported).

pub mod disk;
pub mod format;
