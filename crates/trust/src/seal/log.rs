//! Records of a volume's log, sealed under the volume's key.
//!
//! The nonce of a record is its place in the log, so nothing is stored for it and a record opens nowhere else. A place is used once: the caller promises
//! that. Whoever opens a log that may have been cut or written by another process begins a new epoch, and stores that durably, before writing to it.

use super::suite::Keyed;
use super::{Broken, NONCE_BYTES, PAYLOAD_BYTES_MAX, Suite, TAG_BYTES, derive};
use crate::keys::Secret;

/// Where a record is in its volume's log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LogPlace {
    /// Of the writer.
    pub epoch: u32,
    pub sequence: u64,
}

impl LogPlace {
    /// Epoch and sequence, least significant bytes first.
    fn nonce(self) -> [u8; NONCE_BYTES] {
        let mut nonce = [0; NONCE_BYTES];
        nonce[..4].copy_from_slice(&self.epoch.to_le_bytes());
        nonce[4..].copy_from_slice(&self.sequence.to_le_bytes());
        nonce
    }
}

/// Seals and opens the records of one volume's log. Its key stays in memory as long as it does, and is not wiped.
pub struct LogCipher(Keyed);

impl LogCipher {
    /// Of the volume that has this secret.
    pub fn of(suite: Suite, volume: &Secret) -> LogCipher {
        let usage = match suite {
            Suite::Aes256Gcm => "polder store volume log 1",
            Suite::Aegis256X2 => "polder store volume log 2",
        };
        LogCipher(suite.keyed(derive(usage, volume).bytes()))
    }

    /// Seals a record in place; gives its tag. No two records of the volume may have one place: who knows both would know what they differ in.
    ///
    /// # Panics
    /// The payload is longer than [`PAYLOAD_BYTES_MAX`].
    pub fn seal(&self, place: LogPlace, header: &[u8], payload: &mut [u8]) -> [u8; TAG_BYTES] {
        assert!(payload.len() <= PAYLOAD_BYTES_MAX);
        self.0.seal(place.nonce(), header, payload)
    }

    /// Opens a record in place.
    pub fn open(
        &self,
        place: LogPlace,
        header: &[u8],
        tag: &[u8; TAG_BYTES],
        payload: &mut [u8],
    ) -> Result<(), Broken> {
        self.0.open(place.nonce(), header, tag, payload)
    }
}
