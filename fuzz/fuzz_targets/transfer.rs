//! What a peer says in a transfer between two stores: arbitrary messages, and a right conversation in which some bytes are wrong.
//!
//! Holds: no panic, no hang; what gets a name in the store is whole, and everything in the store holds what its name says.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| polder_store::transfer::testbench::converse(input));
