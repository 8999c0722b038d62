//! Encryption at rest: what the store writes to its disk, sealed so that only who has the domain's or the volume's secret reads it.
//!
//! Two kinds of things are stored. *Chunks* are named by their contents and stored once inside a *domain*, a set of volumes that may know of one another what they have in common. They
//! are sealed under keys of their names ([`ChunkCipher`]): equal chunks of a domain have equal names, those of two domains have nothing in common. *Records of a log* are
//! sealed under their volume's key by their place in the log ([`LogCipher`]).
//!
//! Always AES-256-GCM: 16 bytes of tag, and the header that goes with a payload is bound to it as associated data. Nothing allocates: payloads are sealed and opened where they lie.
//! docs/keys.md has the derivations byte by byte; docs/decisions/encryption.md has why.

mod chunks;
mod log;

pub use chunks::{ChunkCipher, Form, NONCE_BYTES, Seal};
pub use log::{LogCipher, LogPlace};

use ring::aead::{AES_256_GCM, LessSafeKey, UnboundKey};

use crate::keys::{SECRET_BYTES, Secret};

/// The name of a chunk: its content decides it, and the domain.
pub type ChunkName = [u8; 32];

/// Bytes of a tag.
pub const TAG_BYTES: usize = 16;
/// The longest payload.
pub const PAYLOAD_BYTES_MAX: usize = 16 << 20;

/// It was not sealed like this under this key: its bytes, its header or its tag were changed, it lies in the wrong place, or the key is another one.
/// The payload's bytes are worthless now.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the seal does not hold: these bytes were changed or sealed under another key")]
pub struct Broken;

/// A key for one use from a secret for many. The uses that exist are in docs/keys.md.
fn derive(usage: &str, secret: &Secret) -> Secret {
    Secret::take(&mut blake3::derive_key(usage, secret.bytes()))
}

fn cipher(key: &[u8; SECRET_BYTES]) -> LessSafeKey {
    LessSafeKey::new(UnboundKey::new(&AES_256_GCM, key).expect("a key has 256 bits"))
}

#[cfg(test)]
mod tests;
