//! Wrapped keys as they are read from a file.
//!
//! Holds: no panic; what is read gives the same bytes again, asks for no more than the bounds, and does not open under a key that it was not wrapped with.
#![no_main]

use libfuzzer_sys::fuzz_target;
use polder_trust::keys::{KeyFile, MEMORY_KIB_MAX, Opener, PASSES_MAX, Secret, WRAPPED_KEY_BYTES, WrappedKey};

fuzz_target!(|input: &[u8]| {
    let mut bytes = input.to_vec();
    if bytes.len() == WRAPPED_KEY_BYTES {
        // Magic, version and checksum are given away, so that the fuzzer need not find them.
        bytes[..10].copy_from_slice(b"POLDERWK\x01\0");
        let checksum = blake3::hash(&bytes[..124]);
        bytes[124..].copy_from_slice(&checksum.as_bytes()[..4]);
    }
    let Ok(key) = WrappedKey::from_bytes(&bytes) else { return };
    assert_eq!(key.to_bytes()[..], bytes);
    match key.passphrase_cost() {
        Some(cost) => assert!(cost.memory_kib() <= MEMORY_KIB_MAX && cost.passes() <= PASSES_MAX),
        None => assert!(key.unwrap(key.subject(), Opener::KeyFile(&KeyFile::of(Secret::take(&mut [7; 32])))).is_err()),
    }
});
