//! What the store promised stays, whatever happens to the process, the power and the disk.
//!
//! A workload of several threads writes, discards, flushes, takes and removes snapshots, resizes, compacts and collects, and keeps account of what
//! was promised ([`model`]). It is stopped by `kill -9` ([`killed`]), by a power cut that loses what was not synced ([`power`]), by
//! a full disk ([`full`]), and by failing operations and flipped bits ([`faults`]); then everything is read and compared. [`processes`] has
//! several of them at one store. Seeds are printed, and POLDER_SEED takes one back; POLDER_TEST_NIGHTLY runs the long forms.

mod child;
mod model;
mod power_disk;
mod random;
mod workload;

mod faults;
mod full;
mod killed;
mod power;
mod processes;
