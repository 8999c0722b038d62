//! Bytes opened as a qcow2 image, its snapshots too, and both ends of the disk read.
//!
//! Holds: no panic, memory and time within the bounds that the reader names, and what is said to be zeros reads as zeros.
#![no_main]

use libfuzzer_sys::fuzz_target;
use polder_store::format::testbench;

fuzz_target!(|input: &[u8]| testbench::read_qcow2(input));
