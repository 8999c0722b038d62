//! Chunks, sealed convergently.
//!
//! Each chunk has a key of its own: keyed BLAKE3 of its name and of how its payload was made of it. So one key seals one plaintext only, and two records under
//! one key differ at most in how a compressor's releases have packed it, or in their headers. That must not repeat a nonce all the same, so the nonce is a
//! fingerprint of all that is sealed: POLYVAL of the payload (a universal hash with a secret key, as in AES-GCM-SIV), then keyed BLAKE3 of that, of the payload's length and of the header. A payload that *is* the
//! chunk needs no hash: the name has been one. As the key alone makes sure of most, a nonce that repeats would take two outputs of a compressor for one chunk that collide in 96 bits.
//!
//! Keys of single chunks are on the stack for as long as one is sealed or opened, and are not wiped.

use std::num::NonZeroU8;

use polyval::Polyval;
use polyval::universal_hash::UniversalHash;
use ring::aead::{Aad, LessSafeKey, Nonce};

use super::{Broken, ChunkName, PAYLOAD_BYTES_MAX, TAG_BYTES, cipher, derive};
use crate::keys::Secret;

/// Bytes of a nonce.
pub const NONCE_BYTES: usize = 12;
/// The longest header.
pub const HEADER_BYTES_MAX: usize = 64;

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
    pub nonce: [u8; NONCE_BYTES],
    pub tag: [u8; TAG_BYTES],
}

/// Seals and opens the chunks of a domain. Any number of threads may use one.
pub struct ChunkCipher {
    keys: Secret,
    nonces: Secret,
    fingerprints: Polyval,
}

impl ChunkCipher {
    /// Of the domain that has this secret.
    pub fn of(domain: &Secret) -> ChunkCipher {
        let fingerprints = derive("polder store chunk fingerprints 1", domain);
        let (key, _) = fingerprints.bytes().split_first_chunk::<16>().expect("a secret is longer");
        ChunkCipher {
            keys: derive("polder store chunk keys 1", domain),
            nonces: derive("polder store chunk nonces 1", domain),
            fingerprints: Polyval::new(key.into()),
        }
    }

    /// Seals the payload of a chunk in place. Equal input gives equal output.
    ///
    /// # Panics
    /// The header is longer than [`HEADER_BYTES_MAX`], or the payload than [`PAYLOAD_BYTES_MAX`].
    pub fn seal(&self, name: &ChunkName, form: Form, header: &[u8], payload: &mut [u8]) -> Seal {
        let nonce = self.nonce(form, header, payload);
        let tag = self
            .key(name, form)
            .seal_in_place_separate_tag(Nonce::assume_unique_for_key(nonce), Aad::from(header), payload)
            .expect("a payload is shorter than the cipher's longest");
        Seal { nonce, tag: tag.as_ref().try_into().expect("a tag has 16 bytes") }
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
        let nonce = Nonce::assume_unique_for_key(seal.nonce);
        self.key(name, form)
            .open_in_place_separate_tag(nonce, Aad::from(header), seal.tag.into(), payload, 0..)
            .map_err(|_| Broken)?;
        Ok(())
    }

    /// The chunk's own key.
    fn key(&self, name: &ChunkName, form: Form) -> LessSafeKey {
        let mut input = [0; 33];
        input[..32].copy_from_slice(name);
        input[32] = form.codec();
        cipher(blake3::keyed_hash(self.keys.bytes(), &input).as_bytes())
    }

    /// Codec, length (4 bytes), fingerprint (16, zeros for a whole chunk), header: hashed.
    fn nonce(&self, form: Form, header: &[u8], payload: &[u8]) -> [u8; NONCE_BYTES] {
        assert!(header.len() <= HEADER_BYTES_MAX && payload.len() <= PAYLOAD_BYTES_MAX);
        let mut input = [0; 21 + HEADER_BYTES_MAX];
        input[0] = form.codec();
        input[1..5].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        if form != Form::Whole {
            let mut fingerprint = self.fingerprints.clone();
            fingerprint.update_padded(payload);
            input[5..21].copy_from_slice(&fingerprint.finalize());
        }
        let end = 21 + header.len();
        input[21..end].copy_from_slice(header);
        let hash = blake3::keyed_hash(self.nonces.bytes(), &input[..end]);
        *hash.as_bytes().first_chunk().expect("a hash is longer")
    }
}
