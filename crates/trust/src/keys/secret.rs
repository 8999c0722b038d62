//! A 256-bit secret: in one place of memory, wiped when it goes, never printed.
//!
//! It lies on the heap, so that moving it leaves no copy behind. It cannot be compared with `==`, cloned or printed by mistake. The memory is not
//! locked: a host that swaps without encryption may write it to its disk.

use std::fmt;

use ring::rand::{SecureRandom, SystemRandom};
use zeroize::Zeroize;

/// Bytes of a secret.
pub const SECRET_BYTES: usize = 32;

/// A 256-bit secret. Gone from memory when it is dropped.
pub struct Secret(Box<[u8; SECRET_BYTES]>);

/// The host gave no random bytes.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the host gave no random bytes")]
pub struct NoRandomness;

impl Secret {
    /// A new secret from the host's random numbers.
    pub fn random() -> Result<Secret, NoRandomness> {
        let mut secret = Secret::zero();
        SystemRandom::new().fill(&mut *secret.0).map_err(|_| NoRandomness)?;
        Ok(secret)
    }

    /// The secret that some bytes are; they are wiped where they were.
    pub fn take(bytes: &mut [u8; SECRET_BYTES]) -> Secret {
        let mut secret = Secret::zero();
        secret.0.copy_from_slice(bytes);
        bytes.zeroize();
        secret
    }

    /// The bytes, for a cipher or a key derivation only.
    pub fn bytes(&self) -> &[u8; SECRET_BYTES] {
        &self.0
    }

    /// To be filled in place.
    fn zero() -> Secret {
        Secret(Box::new([0; SECRET_BYTES]))
    }
}

impl Drop for Secret {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Secret(..)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_taken_whole_and_wiped_where_it_was() {
        let mut bytes = [7; SECRET_BYTES];
        let secret = Secret::take(&mut bytes);
        assert_eq!(secret.bytes(), &[7; SECRET_BYTES]);
        assert_eq!(bytes, [0; SECRET_BYTES]);
    }

    #[test]
    fn a_secret_is_not_printed() {
        let secret = Secret::take(&mut [0xab; SECRET_BYTES]);
        assert_eq!(format!("{secret:?} {:#?}", Some(&secret)), "Secret(..) Some(\n    Secret(..),\n)");
    }

    #[test]
    fn two_random_secrets_differ() {
        let (one, other) = (Secret::random().expect("random bytes"), Secret::random().expect("random bytes"));
        assert_ne!(one.bytes(), other.bytes());
    }
}
