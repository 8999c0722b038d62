//! The ciphers that something may be sealed with: what is stored says which, and what is sealed now takes the newest.

use aegis::aegis256x2::Aegis256X2;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};

use super::Broken;
use crate::keys::SECRET_BYTES;

/// Bytes of a nonce.
pub const NONCE_BYTES: usize = 12;
/// Bytes of a tag.
pub const TAG_BYTES: usize = 16;

/// An authenticated cipher with keys of 32 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Suite {
    /// NIST SP 800-38D.
    Aes256Gcm,
    /// draft-irtf-cfrg-aegis-aead, with tags of 16 bytes; the last 20 bytes of the nonce are zeros.
    Aegis256X2,
}

impl Suite {
    /// What everything is sealed with that is sealed now.
    pub const NEWEST: Suite = Suite::Aegis256X2;

    pub(super) fn keyed(self, key: &[u8; SECRET_BYTES]) -> Keyed {
        match self {
            Suite::Aes256Gcm => {
                Keyed::Aes256Gcm(LessSafeKey::new(UnboundKey::new(&AES_256_GCM, key).expect("a key has 256 bits")))
            }
            Suite::Aegis256X2 => Keyed::Aegis256X2(*key),
        }
    }
}

/// A cipher with its key.
#[expect(clippy::large_enum_variant, reason = "it is on the stack, or there is one for each opening of a volume")]
pub(super) enum Keyed {
    Aes256Gcm(LessSafeKey),
    Aegis256X2([u8; SECRET_BYTES]),
}

impl Keyed {
    /// Seals in place under a nonce that this key never had before; gives the tag. The payload is no longer than the cipher's longest.
    pub fn seal(&self, nonce: [u8; NONCE_BYTES], header: &[u8], payload: &mut [u8]) -> [u8; TAG_BYTES] {
        match self {
            Keyed::Aes256Gcm(key) => {
                let nonce = Nonce::assume_unique_for_key(nonce);
                let tag = key
                    .seal_in_place_separate_tag(nonce, Aad::from(header), payload)
                    .expect("a payload is shorter than the cipher's longest");
                tag.as_ref().try_into().expect("a tag has 16 bytes")
            }
            Keyed::Aegis256X2(key) => aegis(key, nonce).encrypt_in_place(payload, header),
        }
    }

    /// Opens in place what was sealed so.
    pub fn open(
        &self,
        nonce: [u8; NONCE_BYTES],
        header: &[u8],
        tag: &[u8; TAG_BYTES],
        payload: &mut [u8],
    ) -> Result<(), Broken> {
        match self {
            Keyed::Aes256Gcm(key) => {
                let nonce = Nonce::assume_unique_for_key(nonce);
                let opened = key.open_in_place_separate_tag(nonce, Aad::from(header), (*tag).into(), payload, 0..);
                opened.map(drop).map_err(|_| Broken)
            }
            Keyed::Aegis256X2(key) => aegis(key, nonce).decrypt_in_place(payload, tag, header).map_err(|_| Broken),
        }
    }
}

fn aegis(key: &[u8; SECRET_BYTES], nonce: [u8; NONCE_BYTES]) -> Aegis256X2<TAG_BYTES> {
    let mut whole = [0; 32];
    whole[..NONCE_BYTES].copy_from_slice(&nonce);
    Aegis256X2::new(key, &whole)
}
