//! The NBD server and clients that nobody here has written: libnbd's tools, QEMU's, fio, nbd-client and nbdkit.
//!
//! Each test serves a disk in memory, or a volume of a store, from its own process and runs the clients as children; `cargo xtask setup` installs them.

mod harness;

mod data;
mod information;
mod requests;
mod tls;
mod volume;
