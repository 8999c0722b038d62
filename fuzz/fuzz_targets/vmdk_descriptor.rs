//! Bytes as a VMDK file: a descriptor, and a sparse file with one inside.
//!
//! Holds: no panic, and what gets through names no file but a flat one beside it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use polder_store::format::testbench;

fuzz_target!(|input: &[u8]| testbench::look_at_vmdk(input));
