//! What the store promised stays, whatever happens to the process, the power and the disk.
//!
//! A workload of several threads writes, discards, flushes, takes and removes snapshots, resizes, compacts and collects, and keeps account of what
//! was promised ([`model`]). It is stopped by `kill -9` ([`killed`]), by a power cut that loses what was not synced ([`power`]), by
//! a full disk ([`full`]), and by failing operations and flipped bits ([`faults`]); then everything is read and compared. [`processes`] has
//! several of them at one store. [`file_system`] has the host's ext4 and applications on a volume, and cuts the power before each sync. Seeds are printed, and POLDER_SEED takes one back; POLDER_TEST_NIGHTLY runs the long forms.

mod child;
mod fuse;
mod host;
mod mapped;
mod model;
mod power_disk;
mod random;
mod volume_file;
mod workload;

mod faults;
mod file_system;
mod full;
mod killed;
mod power;
mod processes;
