//! Records of a volume's log, sealed under the volume's key.
//!
//! The nonce of a record is its place in the log, so nothing is stored for it and a record opens nowhere else. A place is used once: the caller promises
//! that. Whoever opens a log that may have been cut or written by another process begins a new epoch, and stores that durably, before writing to it.

use ring::aead::{Aad, LessSafeKey, Nonce};

use super::{Broken, PAYLOAD_BYTES_MAX, TAG_BYTES, cipher, derive};
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
    fn nonce(self) -> Nonce {
        let mut nonce = [0; 12];
        nonce[..4].copy_from_slice(&self.epoch.to_le_bytes());
        nonce[4..].copy_from_slice(&self.sequence.to_le_bytes());
        Nonce::assume_unique_for_key(nonce)
    }
}

/// Seals and opens the records of one volume's log. Its key schedule stays in memory as long as it does, and is not wiped.
pub struct LogCipher(LessSafeKey);

impl LogCipher {
    /// Of the volume that has this secret.
    pub fn of(volume: &Secret) -> LogCipher {
        LogCipher(cipher(derive("polder store volume log 1", volume).bytes()))
    }

    /// Seals a record in place; gives its tag. No two records of the volume may have one place: who knows both would know what they differ in.
    ///
    /// # Panics
    /// The payload is longer than [`PAYLOAD_BYTES_MAX`].
    pub fn seal(&self, place: LogPlace, header: &[u8], payload: &mut [u8]) -> [u8; TAG_BYTES] {
        assert!(payload.len() <= PAYLOAD_BYTES_MAX);
        let tag = self
            .0
            .seal_in_place_separate_tag(place.nonce(), Aad::from(header), payload)
            .expect("a payload is shorter than the cipher's longest");
        tag.as_ref().try_into().expect("a tag has 16 bytes")
    }

    /// Opens a record in place.
    pub fn open(
        &self,
        place: LogPlace,
        header: &[u8],
        tag: &[u8; TAG_BYTES],
        payload: &mut [u8],
    ) -> Result<(), Broken> {
        self.0
            .open_in_place_separate_tag(place.nonce(), Aad::from(header), (*tag).into(), payload, 0..)
            .map_err(|_| Broken)?;
        Ok(())
    }
}
