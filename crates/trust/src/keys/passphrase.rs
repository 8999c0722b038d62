//! Keys from passphrases, by argon2id (RFC 9106).
//!
//! What a derivation costs is chosen when a key is wrapped, and stored beside it. Whoever reads it back has it from a file, which may be hostile: a cost beyond
//! the bounds here is refused before anything is allocated.

use argon2::{Algorithm, Argon2, Block, Params, Version};
use zeroize::{Zeroize, Zeroizing};

use super::secret::Secret;

/// Most memory that a derivation may take: 1 GiB.
pub const MEMORY_KIB_MAX: u32 = 1 << 20;
/// Most passes over the memory.
pub const PASSES_MAX: u32 = 16;
/// Most lanes. They are run one after the other here, so they only cost.
pub const LANES_MAX: u32 = 4;

/// A passphrase. Wiped when it is dropped, and never printed.
pub struct Passphrase(Zeroizing<Vec<u8>>);

/// The passphrase is empty.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the passphrase is empty")]
pub struct EmptyPassphrase;

impl Passphrase {
    /// Takes a passphrase as it was typed, without the end of its line.
    pub fn new(text: Vec<u8>) -> Result<Passphrase, EmptyPassphrase> {
        if text.is_empty() {
            return Err(EmptyPassphrase);
        }
        Ok(Passphrase(Zeroizing::new(text)))
    }
}

impl std::fmt::Debug for Passphrase {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("Passphrase(..)")
    }
}

/// What a derivation costs whoever knows the passphrase, and whoever guesses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cost {
    memory_kib: u32,
    passes: u32,
    lanes: u32,
}

/// Such a cost is not allowed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "a passphrase with {memory_kib} KiB of memory, {passes} passes and {lanes} lanes is not allowed: at most {MEMORY_KIB_MAX} KiB, {PASSES_MAX} passes and {LANES_MAX} lanes, and at least 8 KiB a lane"
)]
pub struct CostOutOfBounds {
    pub memory_kib: u32,
    pub passes: u32,
    pub lanes: u32,
}

/// 64 MiB, three passes, one lane: the second of the choices that RFC 9106 recommends, with as many passes, in one lane.
impl Default for Cost {
    fn default() -> Cost {
        Cost { memory_kib: 64 << 10, passes: 3, lanes: 1 }
    }
}

impl Cost {
    pub fn new(memory_kib: u32, passes: u32, lanes: u32) -> Result<Cost, CostOutOfBounds> {
        let is_allowed = (1..=LANES_MAX).contains(&lanes)
            && (1..=PASSES_MAX).contains(&passes)
            && (8 * lanes..=MEMORY_KIB_MAX).contains(&memory_kib);
        if is_allowed {
            Ok(Cost { memory_kib, passes, lanes })
        } else {
            Err(CostOutOfBounds { memory_kib, passes, lanes })
        }
    }

    pub fn memory_kib(self) -> u32 {
        self.memory_kib
    }

    pub fn passes(self) -> u32 {
        self.passes
    }

    pub fn lanes(self) -> u32 {
        self.lanes
    }
}

/// The host has not the memory for a derivation.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("a passphrase needs {memory_kib} KiB of memory, which the host does not give")]
pub struct NoMemory {
    pub memory_kib: u32,
}

/// The key-encryption key of a passphrase.
pub(super) fn key_of(passphrase: &Passphrase, salt: &[u8; 16], cost: Cost) -> Result<Secret, NoMemory> {
    let Cost { memory_kib, passes, lanes } = cost;
    let params = Params::new(memory_kib, passes, lanes, Some(32)).expect("the cost is within bounds");
    let mut memory: Vec<Block> = Vec::new();
    let blocks = params.block_count();
    memory.try_reserve_exact(blocks).map_err(|_| NoMemory { memory_kib })?;
    memory.resize(blocks, Block::default());
    let mut memory = Zeroizing::new(memory);
    let mut key = [0; 32];
    Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
        .hash_password_into_with_memory(&passphrase.0, salt, &mut key, memory.as_mut_slice())
        .expect("salt, key and memory are as long as they have to be");
    let secret = Secret::take(&mut key);
    memory.zeroize();
    Ok(secret)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cost_beyond_the_bounds_is_refused() {
        for (memory_kib, passes, lanes) in [
            (100 << 20, 3, 1),
            (u32::MAX, 1, 1),
            (1 << 16, 17, 1),
            (1 << 16, u32::MAX, 1),
            (1 << 16, 3, 5),
            (1 << 16, 0, 1),
            (1 << 16, 3, 0),
            (7, 1, 1),
            (31, 1, 4),
        ] {
            let refused = CostOutOfBounds { memory_kib, passes, lanes };
            assert_eq!(Cost::new(memory_kib, passes, lanes), Err(refused));
        }
        assert!(Cost::new(MEMORY_KIB_MAX, PASSES_MAX, LANES_MAX).is_ok());
        let Cost { memory_kib, passes, lanes } = Cost::default();
        assert_eq!(Cost::new(memory_kib, passes, lanes), Ok(Cost::default()));
    }

    /// The value is libargon2's.
    #[test]
    fn a_passphrase_gives_the_key_that_the_reference_implementation_gives() {
        let passphrase = Passphrase::new(b"correct horse".to_vec()).unwrap();
        let key = key_of(&passphrase, b"sixteen of salt.", Cost::new(64, 2, 1).unwrap()).unwrap();
        let hex: String = key.bytes().iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, "c9f2071918afd7201a41d7d5a8cb79f9321e30360189a844e77ff3e12cb0b4a5");
    }

    #[test]
    fn an_empty_passphrase_is_refused_and_none_is_printed() {
        assert!(Passphrase::new(Vec::new()).is_err());
        let passphrase = Passphrase::new(b"hidden".to_vec()).unwrap();
        assert_eq!(format!("{passphrase:?}"), "Passphrase(..)");
    }
}
