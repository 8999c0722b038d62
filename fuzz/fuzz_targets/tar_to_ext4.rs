//! Bytes as a tar archive that becomes an ext4 disk of 16 MiB.
//!
//! Holds: no panic, and no write beyond the disk.
#![no_main]

use libfuzzer_sys::fuzz_target;
use polder_store::format::testbench;

fuzz_target!(|input: &[u8]| testbench::import_tar(input));
