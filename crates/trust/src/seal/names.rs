//! Names of chunks: keyed BLAKE3 of their contents.
//!
//! The key is the domain's, so that nobody outside of it can tell from a name whether a chunk is one that they know. Volumes that are not encrypted
//! share a domain whose key is public.

use super::derive;
use crate::keys::{SECRET_BYTES, Secret};

/// The name of a chunk in its domain.
pub type ChunkName = [u8; 32];

/// Gives names in a domain.
pub struct Names(Secret);

impl Names {
    /// The domain of what is not encrypted. Its names tell what a chunk is to whoever has the chunk.
    pub fn public() -> Names {
        Names(Secret::take(&mut blake3::derive_key("polder store default domain 1", &[])))
    }

    /// The domain that has this secret.
    pub fn of(domain: &Secret) -> Names {
        Names(derive("polder store chunk names 1", domain))
    }

    /// The name of a chunk.
    pub fn name(&self, chunk: &[u8]) -> ChunkName {
        *blake3::keyed_hash(self.key(), chunk).as_bytes()
    }

    /// For hashing of more than one chunk at a time; never stored, never shown.
    pub fn key(&self) -> &[u8; SECRET_BYTES] {
        self.0.bytes()
    }
}
