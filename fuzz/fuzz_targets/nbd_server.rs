//! What a client sends to the NBD server, negotiation and transmission, to a disk in memory that may be slow or fail.
//!
//! Holds: no panic; what the server holds stays below its bound; with structured replies each request has one answer.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| polder_store::nbd::testbench::converse(input));
