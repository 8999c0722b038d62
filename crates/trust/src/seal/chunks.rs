//! Chunks, sealed under keys of their own.
//!
//! Each chunk has a key of its own: keyed BLAKE3 of its name, of how its payload was made of it, and of the suite. So one key seals one plaintext only, and two payloads under
//! one key differ at most in how two releases of a compressor have packed it. Nonces are numbers in a row that begins at a random place of 96 bits for each
//! [`ChunkCipher`], so that one cipher never uses one twice, and two releases, which are two processes, would have to begin at neighbours among 2^96.
//!
//! Keys of single chunks are on the stack for as long as one is sealed or opened, and are not wiped.

use std::num::NonZeroU8;
use std::sync::atomic::{AtomicU64, Ordering};

use super::suite::Keyed;
use super::{Broken, ChunkName, NONCE_BYTES, PAYLOAD_BYTES_MAX, Suite, TAG_BYTES, derive};
use crate::keys::{NoRandomness, Secret};

/// What a payload is of its chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// The chunk itself, byte by byte. No other payload may be sealed as this under the chunk's name.
    Whole,
    /// Made of it by the codec with this number.
    Encoded(NonZeroU8),
}

impl Form {
    /// The codec's number; 0 if there is none.
    pub fn codec(self) -> u8 {
        match self {
            Form::Whole => 0,
            Form::Encoded(codec) => codec.get(),
        }
    }
}

/// What is stored beside a sealed payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seal {
    pub suite: Suite,
    pub nonce: [u8; NONCE_BYTES],
    pub tag: [u8; TAG_BYTES],
}

/// Seals and opens the chunks of a domain. Any number of threads may use one.
pub struct ChunkCipher {
    keys: Secret,
    /// The first four bytes of all nonces.
    nonces: [u8; 4],
    /// The others of the next one, as a number.
    next_nonce: AtomicU64,
}

impl ChunkCipher {
    /// Of the domain that has this secret.
    pub fn of(domain: &Secret) -> Result<ChunkCipher, NoRandomness> {
        let random = Secret::random()?;
        let (first, _) = random.bytes().split_first_chunk::<NONCE_BYTES>().expect("a secret is longer");
        Ok(Self::from_nonce(domain, *first))
    }

    /// One whose first nonce is known.
    pub(super) fn from_nonce(domain: &Secret, first: [u8; NONCE_BYTES]) -> ChunkCipher {
        let [a, b, c, d, number @ ..] = first;
        ChunkCipher {
            keys: derive("polder store chunk keys 1", domain),
            nonces: [a, b, c, d],
            next_nonce: AtomicU64::new(u64::from_le_bytes(number)),
        }
    }

    /// Seals the payload of a chunk in place. Equal input gives other output each time.
    ///
    /// # Panics
    /// The payload is longer than [`PAYLOAD_BYTES_MAX`].
    pub fn seal(&self, suite: Suite, name: &ChunkName, form: Form, header: &[u8], payload: &mut [u8]) -> Seal {
        assert!(payload.len() <= PAYLOAD_BYTES_MAX);
        let nonce = self.nonce();
        Seal { suite, nonce, tag: self.key(suite, name, form).seal(nonce, header, payload) }
    }

    /// Opens in place what [`ChunkCipher::seal`] has sealed.
    pub fn open(
        &self,
        name: &ChunkName,
        form: Form,
        header: &[u8],
        seal: &Seal,
        payload: &mut [u8],
    ) -> Result<(), Broken> {
        self.key(seal.suite, name, form).open(seal.nonce, header, &seal.tag, payload)
    }

    /// The chunk's own key.
    fn key(&self, suite: Suite, name: &ChunkName, form: Form) -> Keyed {
        let mut input = [0; 34];
        input[..32].copy_from_slice(name);
        input[32] = form.codec();
        // The first suite was the only one.
        let input = match suite {
            Suite::Aes256Gcm => &input[..33],
            Suite::Aegis256X2 => {
                input[33] = 1;
                &input[..]
            }
        };
        suite.keyed(blake3::keyed_hash(self.keys.bytes(), input).as_bytes())
    }

    /// One that this cipher has not used before.
    fn nonce(&self) -> [u8; NONCE_BYTES] {
        let number = self.next_nonce.fetch_add(1, Ordering::Relaxed);
        let mut nonce = [0; NONCE_BYTES];
        nonce[..4].copy_from_slice(&self.nonces);
        nonce[4..].copy_from_slice(&number.to_le_bytes());
        nonce
    }
}
