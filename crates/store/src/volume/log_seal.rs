//! The log of an encrypted volume: what was written is sealed block by block, so that a block is read without the others.
//!
//! The payload of such a record is the blocks' ciphertexts, where the blocks themselves would be, then a tag for each, then the
//! salt of the opening that wrote it. Each opening of a volume has a key of its own, from the volume's secret, its epoch and a random salt, and
//! numbers what it seals: also a record that could not be written has used its number up. So no key seals two blocks under one nonce, even if
//! the volume's files are put back from a copy and opened once more.

use std::cell::RefCell;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use polder_trust::keys::{SECRET_BYTES, Secret};
use polder_trust::seal::{LogCipher, LogPlace as Nonce, Suite, TAG_BYTES};

use crate::error::{Result, StoreError};
use crate::id::Id;
use crate::volume::extent_map::{BLOCK_LEN, LogPlace};
use crate::volume::log_file::LogFile;
use crate::volume::log_record::Change;

const SALT_LEN: usize = 16;
/// Blocks of a record at most; their numbers are eight bits of the nonce.
pub(crate) const SEALED_BLOCKS_MAX: usize = 128;
/// Bytes of a sealed block and its tag.
const SEALED_BLOCK_LEN: usize = BLOCK_LEN as usize + TAG_BYTES;

/// Bytes of the payload that so many bytes become.
pub(crate) fn sealed_len(len: usize) -> usize {
    len / BLOCK_LEN as usize * SEALED_BLOCK_LEN + SALT_LEN
}

/// Blocks in a sealed payload; none if it has an impossible length.
pub(crate) fn blocks_in(payload_len: u32) -> Option<u64> {
    let blocks = (payload_len as usize).checked_sub(SALT_LEN)?;
    let whole =
        blocks.is_multiple_of(SEALED_BLOCK_LEN) && (1..=SEALED_BLOCKS_MAX).contains(&(blocks / SEALED_BLOCK_LEN));
    whole.then_some((blocks / SEALED_BLOCK_LEN) as u64)
}

/// What the records of one opening of a volume are sealed with.
pub(crate) struct Opening {
    epoch: u32,
    salt: [u8; SALT_LEN],
    suite: Suite,
    cipher: LogCipher,
}

impl Opening {
    fn new(suite: Suite, volume: &Secret, epoch: u32, salt: [u8; SALT_LEN]) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("polder store volume opening 1");
        hasher.update(volume.bytes()).update(&epoch.to_le_bytes()).update(&salt);
        let mut key: [u8; SECRET_BYTES] = hasher.finalize().into();
        Opening { epoch, salt, suite, cipher: LogCipher::of(suite, &Secret::take(&mut key)) }
    }

    /// Adds the payload that holds some blocks.
    fn seal(&self, number: u64, offset: u64, blocks: &[u8], payload: &mut Vec<u8>) {
        let begin = payload.len();
        payload.extend_from_slice(blocks);
        payload.resize(begin + sealed_len(blocks.len()), 0);
        let (blocks, rest) = payload[begin..].split_at_mut(blocks.len());
        let (tags, salt) = rest.split_at_mut(rest.len() - SALT_LEN);
        let parts = blocks.chunks_exact_mut(BLOCK_LEN as usize).zip(tags.chunks_exact_mut(TAG_BYTES));
        for (index, (block, tag)) in parts.enumerate() {
            let at = offset + index as u64 * BLOCK_LEN;
            tag.copy_from_slice(&self.cipher.seal(self.nonce(number, index), &at.to_le_bytes(), block));
        }
        salt.copy_from_slice(&self.salt);
    }

    fn nonce(&self, number: u64, block: usize) -> Nonce {
        Nonce { epoch: self.epoch, sequence: number << 8 | block as u64 }
    }
}

/// Seals what a process writes to a volume's log, and knows how to open what is in it.
pub(crate) struct LogSealer {
    volume: Secret,
    ours: Arc<Opening>,
    next: AtomicU64,
}

thread_local! {
    /// What is sealed, from one record to the next.
    static SEALED: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

impl LogSealer {
    pub fn new(domain: &Secret, volume: Id, epoch: u32) -> Result<Self> {
        let mut hasher = blake3::Hasher::new_derive_key("polder store volume 1");
        hasher.update(domain.bytes()).update(&volume.0);
        let volume = Secret::take(&mut hasher.finalize().into());
        let mut salt = [0; SALT_LEN];
        let random = Secret::random().map_err(|error| StoreError::Refused(error.to_string()))?;
        salt.copy_from_slice(&random.bytes()[..SALT_LEN]);
        let ours = Arc::new(Opening::new(Suite::NEWEST, &volume, epoch, salt));
        Ok(LogSealer { ours, volume, next: AtomicU64::new(0) })
    }

    /// Seals whole blocks that are written at `offset`; `append` gets the change and the payload for the log.
    pub fn seal<T>(&self, offset: u64, blocks: &[u8], append: impl FnOnce(Change, &[u8]) -> T) -> T {
        let write = |sealed: &mut Vec<u8>| {
            sealed.clear();
            let change = self.seal_onto(offset, blocks, sealed);
            append(change, sealed)
        };
        SEALED.with(|sealed| match sealed.try_borrow_mut() {
            Ok(mut sealed) => write(&mut sealed),
            Err(_) => write(&mut Vec::new()),
        })
    }

    /// Adds the payload of whole blocks that are written at `offset` to others; gives the change for the log.
    pub fn seal_onto(&self, offset: u64, blocks: &[u8], payloads: &mut Vec<u8>) -> Change {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        self.ours.seal(number, offset, blocks, payloads);
        Change::Sealed { offset, number, suite: self.ours.suite }
    }

    /// The opening that wrote a record: ours, one of those `before` it, or another.
    pub fn opening(
        &self,
        suite: Suite,
        epoch: u32,
        salt: &[u8],
        before: Option<&Arc<Opening>>,
    ) -> Option<Arc<Opening>> {
        let mut known = [Some(&self.ours), before].into_iter().flatten();
        let known = known.find(|known| (known.suite, known.epoch) == (suite, epoch) && known.salt == salt);
        Some(match known {
            Some(opening) => opening.clone(),
            None => Arc::new(Opening::new(suite, &self.volume, epoch, salt.try_into().ok()?)),
        })
    }

    pub fn ours(&self) -> &Arc<Opening> {
        &self.ours
    }
}

/// The salt at the end of a sealed payload.
pub(crate) fn salt_of(payload: &[u8]) -> &[u8] {
    &payload[payload.len().saturating_sub(SALT_LEN)..]
}

/// How to open the record of a log that a block is in.
#[derive(Clone)]
pub(crate) struct SealedRecord {
    pub opening: Arc<Opening>,
    /// Of its first block in the volume.
    pub offset: u64,
    pub number: u64,
    /// Of its first block in the log.
    pub place: LogPlace,
    pub blocks: u64,
}

/// A part of sealed blocks of a log, to be read.
#[derive(Clone)]
pub(crate) struct SealedPart {
    pub file: Arc<LogFile>,
    pub record: SealedRecord,
    /// The first byte, counted from the record's first block.
    pub from: u64,
    pub len: usize,
}

impl SealedPart {
    /// Reads the part by `read`, which fills a buffer from an offset in the file, and opens it.
    pub fn read_by(&self, bytes: &mut [u8], mut read: impl FnMut(&mut [u8], u64) -> io::Result<()>) -> io::Result<()> {
        let record = &self.record;
        let first = self.from / BLOCK_LEN;
        let end = (self.from + self.len as u64).div_ceil(BLOCK_LEN);
        let skipped = (self.from - first * BLOCK_LEN) as usize;
        let count = (end - first) as usize;
        let start = record.place.offset();
        let mut tags = vec![0; count * TAG_BYTES];
        read(&mut tags, start + record.blocks * BLOCK_LEN + first * TAG_BYTES as u64)?;
        // Whole blocks are opened where they are wanted.
        let whole = skipped == 0 && self.len == count * BLOCK_LEN as usize;
        let mut own = vec![0; if whole { 0 } else { count * BLOCK_LEN as usize }];
        let blocks = if whole { &mut *bytes } else { &mut own[..] };
        read(blocks, start + first * BLOCK_LEN)?;
        let parts = blocks.chunks_exact_mut(BLOCK_LEN as usize).zip(tags.chunks_exact(TAG_BYTES));
        for (index, (block, tag)) in (first as usize..).zip(parts) {
            let at = record.offset + index as u64 * BLOCK_LEN;
            let tag = tag.try_into().map_err(|_| io::ErrorKind::InvalidData)?;
            let nonce = record.opening.nonce(record.number, index);
            let opened = record.opening.cipher.open(nonce, &at.to_le_bytes(), tag, block);
            opened.map_err(|broken| io::Error::new(io::ErrorKind::InvalidData, broken))?;
        }
        if !whole {
            bytes.copy_from_slice(&own[skipped..skipped + self.len]);
        }
        Ok(())
    }

    /// Reads the part, waiting for the host's disk.
    pub fn read(&self, bytes: &mut [u8]) -> Result<()> {
        let read = self.read_by(bytes, |part, offset| self.file.file.read_exact_at(part, offset));
        read.map_err(|error| match error.get_ref().is_some_and(|inner| inner.is::<polder_trust::seal::Broken>()) {
            true => StoreError::Damaged {
                path: self.file.path().to_path_buf(),
                offset: self.record.place.offset() + self.from,
                what: error.to_string(),
            },
            false => StoreError::file("read", self.file.path())(error),
        })
    }
}

impl std::fmt::Debug for SealedPart {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes from {} of sealed blocks in {:?}", self.len, self.from, self.file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// If this fails the format has changed: volumes whose logs were not settled could no longer be read.
    #[test]
    fn the_format_of_sealed_log_payloads_is_as_it_was() {
        for (suite, hash) in [
            (Suite::Aes256Gcm, "33b3d8a5d12838ccfc36e051f9c9355798f03714c0e0a646ea2daed0be73636a"),
            (Suite::Aegis256X2, "97c3d6fd5db7506dd25591c72c484b3fd4debbadec3e791f409b1832dee2857b"),
        ] {
            let mut payload = Vec::new();
            let opening = Opening::new(suite, &Secret::take(&mut [0x22; 32]), 3, [0x33; 16]);
            opening.seal(5, 8192, &[0x44; 8192], &mut payload);
            assert_eq!(blake3::hash(&payload).to_string(), hash, "{suite:?}");
            assert_eq!(blocks_in(payload.len() as u32), Some(2));
        }
    }

    #[test]
    fn a_payload_has_whole_blocks_and_no_more_than_their_numbers_allow() {
        let lens = [0, 15, 16, 17, 4096, sealed_len(4096) - 1, sealed_len(4096) + 1, sealed_len(129 * 4096)];
        for len in lens {
            assert_eq!(blocks_in(len as u32), None, "{len}");
        }
        assert_eq!(blocks_in(sealed_len(128 * 4096) as u32), Some(128));
    }
}
