//! Encryption at rest: what the store writes to its disk, sealed so that only who has the domain's or the volume's secret reads it.
//!
//! Two kinds of things are stored. *Chunks* are named by their contents and stored once inside a *domain*, a set of volumes that may know of one another what they have in common. They
//! are sealed under keys of their names ([`ChunkCipher`]): equal chunks of a domain have equal names, those of two domains have nothing in common. *Records of a log* are
//! sealed under their volume's key by their place in the log ([`LogCipher`]).
//!
//! Either [`Suite`] gives 16 bytes of tag and binds the header that goes with a payload to it as associated data. Nothing allocates: payloads are sealed and opened where they lie.
//! docs/keys.md has the derivations byte by byte; docs/decisions/encryption.md has why.

mod chunks;
mod log;
mod suite;

pub use chunks::{ChunkCipher, Form, Seal};
pub use log::{LogCipher, LogPlace};
pub use suite::{NONCE_BYTES, Suite, TAG_BYTES};

use crate::keys::Secret;

/// The name of a chunk: its content decides it, and the domain.
pub type ChunkName = [u8; 32];

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

#[cfg(test)]
mod tests;
