//! Wrapped keys: a secret, encrypted under a key-encryption key, as it is stored.
//!
//! A record has 128 bytes; numbers have their least significant byte first.
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 8 | `POLDERWK` |
//! | 8 | 2 | version: 1 |
//! | 10 | 1 | wrapped under: 1 a key file, 2 a passphrase |
//! | 11 | 1 | the secret is that of: 1 a domain, 2 a volume |
//! | 12 | 4 | passphrase: memory of argon2id in KiB; else 0 |
//! | 16 | 4 | passphrase: passes; else 0 |
//! | 20 | 4 | passphrase: lanes; else 0 |
//! | 24 | 16 | passphrase: salt; else 0 |
//! | 40 | 16 | id of the domain or volume |
//! | 56 | 8 | check of the key-encryption key: tells a wrong key from damage |
//! | 64 | 12 | nonce |
//! | 76 | 32 | the secret, by AES-256-GCM; bytes 0 to 63 are associated data |
//! | 108 | 16 | tag |
//! | 124 | 4 | the first bytes of BLAKE3 of bytes 0 to 123: tells damage from a wrong key |
//!
//! Of the key-encryption key K (a file's, or argon2id 1.3 of passphrase and salt) the cipher's key is `derive("polder key wrapping 1", K)`, the check the first 8 bytes of
//! `derive("polder key check 1", K)`. Nothing of the record has to be hidden.

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use ring::rand::{SecureRandom, SystemRandom};

use super::key_file::KeyFile;
use super::passphrase::{Cost, CostOutOfBounds, NoMemory, Passphrase, key_of};
use super::secret::{NoRandomness, SECRET_BYTES, Secret};

/// Bytes of a record.
pub const WRAPPED_KEY_BYTES: usize = 128;

const MAGIC: &[u8; 8] = b"POLDERWK";
const VERSION: u16 = 1;
/// Bytes that are bound to the secret.
const HEADER: usize = 64;
/// Where the checksum is.
const CHECKSUM: usize = WRAPPED_KEY_BYTES - 4;

/// What a secret is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Names and seals the chunks of a domain.
    Domain,
    /// Seals the log of a volume.
    Volume,
}

/// Whose secret is wrapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Subject {
    pub purpose: Purpose,
    pub id: [u8; 16],
}

/// What a secret is wrapped under.
#[derive(Debug, Clone, Copy)]
pub enum Protection<'a> {
    KeyFile(&'a KeyFile),
    Passphrase(&'a Passphrase, Cost),
}

/// What a wrapped key is opened with.
#[derive(Debug, Clone, Copy)]
pub enum Opener<'a> {
    KeyFile(&'a KeyFile),
    Passphrase(&'a Passphrase),
}

/// A secret, encrypted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WrappedKey {
    subject: Subject,
    under: Under,
    check: [u8; 8],
    nonce: [u8; 12],
    secret: [u8; SECRET_BYTES],
    tag: [u8; 16],
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Under {
    KeyFile,
    Passphrase { cost: Cost, salt: [u8; 16] },
}

/// Bytes are no wrapped key.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ReadWrappedKeyError {
    #[error("this is no wrapped key")]
    Foreign,
    #[error("the wrapped key has format {version}; this release knows format {VERSION}")]
    UnknownVersion { version: u16 },
    #[error("the wrapped key is damaged")]
    Damaged,
    #[error("the wrapped key is protected or used in a way that this release does not know")]
    Unknown,
    #[error("the wrapped key costs too much to open")]
    TooCostly(#[from] CostOutOfBounds),
}

/// A secret cannot be wrapped.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum WrapError {
    #[error(transparent)]
    NoRandomness(#[from] NoRandomness),
    #[error(transparent)]
    NoMemory(#[from] NoMemory),
}

/// A wrapped key cannot be opened.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum UnwrapError {
    #[error("the passphrase is wrong")]
    WrongPassphrase,
    #[error("the key file is not the one that the key was wrapped under")]
    WrongKeyFile,
    #[error("the key is wrapped under a passphrase, not a key file")]
    NeedsPassphrase,
    #[error("the key is wrapped under a key file, not a passphrase")]
    NeedsKeyFile,
    #[error("the wrapped key is that of another volume or domain")]
    OtherSubject,
    #[error("the wrapped key was changed")]
    Changed,
    #[error(transparent)]
    NoMemory(#[from] NoMemory),
}

/// A key cannot be wrapped anew.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum RewrapError {
    #[error("the old protection does not open")]
    Unwrap(#[from] UnwrapError),
    #[error("the new protection cannot be made")]
    Wrap(#[from] WrapError),
}

impl WrappedKey {
    /// Encrypts a secret for storing.
    pub fn wrap(secret: &Secret, subject: Subject, protection: Protection<'_>) -> Result<WrappedKey, WrapError> {
        let (mut salt, mut nonce) = ([0; 16], [0; 12]);
        let random = SystemRandom::new();
        random.fill(&mut salt).and_then(|()| random.fill(&mut nonce)).map_err(|_| NoRandomness)?;
        Self::wrap_with(secret, subject, protection, salt, nonce)
    }

    fn wrap_with(
        secret: &Secret,
        subject: Subject,
        protection: Protection<'_>,
        salt: [u8; 16],
        nonce: [u8; 12],
    ) -> Result<WrappedKey, WrapError> {
        let (under, keys) = match protection {
            Protection::KeyFile(file) => (Under::KeyFile, Keys::of(file.key())),
            Protection::Passphrase(passphrase, cost) => {
                (Under::Passphrase { cost, salt }, Keys::of(&key_of(passphrase, &salt, cost)?))
            }
        };
        let mut wrapped =
            WrappedKey { subject, under, check: keys.check, nonce, secret: [0; SECRET_BYTES], tag: [0; 16] };
        let header = wrapped.header();
        // Plain for a moment, and encrypted before anybody sees it.
        wrapped.secret = *secret.bytes();
        let tag = keys
            .cipher
            .seal_in_place_separate_tag(Nonce::assume_unique_for_key(nonce), Aad::from(header), &mut wrapped.secret)
            .expect("a secret is shorter than the cipher's longest");
        wrapped.tag = tag.as_ref().try_into().expect("a tag has 16 bytes");
        Ok(wrapped)
    }

    /// The secret, if this is the subject's and the key is right. With a passphrase this takes as long as its cost says.
    pub fn unwrap(&self, subject: Subject, opener: Opener<'_>) -> Result<Secret, UnwrapError> {
        if self.subject != subject {
            return Err(UnwrapError::OtherSubject);
        }
        let (keys, wrong) = match (self.under, opener) {
            (Under::KeyFile, Opener::KeyFile(file)) => (Keys::of(file.key()), UnwrapError::WrongKeyFile),
            (Under::Passphrase { cost, salt }, Opener::Passphrase(passphrase)) => {
                (Keys::of(&key_of(passphrase, &salt, cost)?), UnwrapError::WrongPassphrase)
            }
            (Under::KeyFile, Opener::Passphrase(_)) => return Err(UnwrapError::NeedsKeyFile),
            (Under::Passphrase { .. }, Opener::KeyFile(_)) => return Err(UnwrapError::NeedsPassphrase),
        };
        if keys.check != self.check {
            return Err(wrong);
        }
        let mut secret = self.secret;
        keys.cipher
            .open_in_place_separate_tag(
                Nonce::assume_unique_for_key(self.nonce),
                Aad::from(self.header()),
                self.tag.into(),
                &mut secret,
                0..,
            )
            .map_err(|_| UnwrapError::Changed)?;
        Ok(Secret::take(&mut secret))
    }

    /// The same secret under another protection. What was encrypted with the secret stays as it is; the old record has to be destroyed for the old protection to lose its force.
    pub fn rewrap(&self, opener: Opener<'_>, protection: Protection<'_>) -> Result<WrappedKey, RewrapError> {
        let secret = self.unwrap(self.subject, opener)?;
        Ok(WrappedKey::wrap(&secret, self.subject, protection)?)
    }

    /// Whose secret this is.
    pub fn subject(&self) -> Subject {
        self.subject
    }

    /// The cost of its passphrase; `None`: it is wrapped under a key file.
    pub fn passphrase_cost(&self) -> Option<Cost> {
        match self.under {
            Under::KeyFile => None,
            Under::Passphrase { cost, .. } => Some(cost),
        }
    }

    /// What comes before the nonce.
    fn header(&self) -> [u8; HEADER] {
        let mut header = [0; HEADER];
        header[..8].copy_from_slice(MAGIC);
        header[8..10].copy_from_slice(&VERSION.to_le_bytes());
        header[11] = match self.subject.purpose {
            Purpose::Domain => 1,
            Purpose::Volume => 2,
        };
        match self.under {
            Under::KeyFile => header[10] = 1,
            Under::Passphrase { cost, salt } => {
                header[10] = 2;
                header[12..16].copy_from_slice(&cost.memory_kib().to_le_bytes());
                header[16..20].copy_from_slice(&cost.passes().to_le_bytes());
                header[20..24].copy_from_slice(&cost.lanes().to_le_bytes());
                header[24..40].copy_from_slice(&salt);
            }
        }
        header[40..56].copy_from_slice(&self.subject.id);
        header[56..].copy_from_slice(&self.check);
        header
    }

    /// The record.
    pub fn to_bytes(&self) -> [u8; WRAPPED_KEY_BYTES] {
        let mut bytes = [0; WRAPPED_KEY_BYTES];
        bytes[..HEADER].copy_from_slice(&self.header());
        bytes[64..76].copy_from_slice(&self.nonce);
        bytes[76..108].copy_from_slice(&self.secret);
        bytes[108..124].copy_from_slice(&self.tag);
        let checksum = checksum(&bytes);
        bytes[CHECKSUM..].copy_from_slice(&checksum);
        bytes
    }

    /// Reads a record.
    pub fn from_bytes(bytes: &[u8]) -> Result<WrappedKey, ReadWrappedKeyError> {
        use ReadWrappedKeyError::{Damaged, Foreign, Unknown, UnknownVersion};
        let version = bytes.strip_prefix(MAGIC).and_then(|rest| rest.first_chunk()).ok_or(Foreign)?;
        let version = u16::from_le_bytes(*version);
        if version != VERSION {
            return Err(UnknownVersion { version });
        }
        let bytes: &[u8; WRAPPED_KEY_BYTES] = bytes.try_into().map_err(|_| Damaged)?;
        if checksum(bytes) != bytes[CHECKSUM..] {
            return Err(Damaged);
        }
        let [memory_kib, passes, lanes] = [12, 16, 20].map(|at| u32::from_le_bytes(part(bytes, at)));
        let under = match bytes[10] {
            1 if bytes[12..40] == [0; 28] => Under::KeyFile,
            2 => Under::Passphrase { cost: Cost::new(memory_kib, passes, lanes)?, salt: part(bytes, 24) },
            _ => return Err(Unknown),
        };
        let purpose = match bytes[11] {
            1 => Purpose::Domain,
            2 => Purpose::Volume,
            _ => return Err(Unknown),
        };
        Ok(WrappedKey {
            subject: Subject { purpose, id: part(bytes, 40) },
            under,
            check: part(bytes, 56),
            nonce: part(bytes, 64),
            secret: part(bytes, 76),
            tag: part(bytes, 108),
        })
    }
}

/// Some bytes of a record.
fn part<const LEN: usize>(bytes: &[u8; WRAPPED_KEY_BYTES], at: usize) -> [u8; LEN] {
    *bytes[at..].first_chunk().expect("the fields end where the record does")
}

fn checksum(bytes: &[u8; WRAPPED_KEY_BYTES]) -> [u8; 4] {
    *blake3::hash(&bytes[..CHECKSUM]).as_bytes().first_chunk().expect("a hash is longer")
}

/// What a key-encryption key is used as.
struct Keys {
    cipher: LessSafeKey,
    check: [u8; 8],
}

impl Keys {
    fn of(key: &Secret) -> Keys {
        let wrapping = Secret::take(&mut blake3::derive_key("polder key wrapping 1", key.bytes()));
        let check = blake3::derive_key("polder key check 1", key.bytes());
        Keys {
            cipher: LessSafeKey::new(UnboundKey::new(&AES_256_GCM, wrapping.bytes()).expect("a key has 256 bits")),
            check: *check.first_chunk().expect("a derived key is longer"),
        }
    }
}

#[cfg(test)]
mod tests;
