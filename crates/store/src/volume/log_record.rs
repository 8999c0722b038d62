//! A record of a volume's log: what it says, and its bytes.

use std::sync::Arc;

use polder_trust::seal::Suite;

use crate::id::Id;
use crate::name::Name;
use crate::volume::extent_map::LogPlace;

/// The longest payload of a record.
pub(crate) const PAYLOAD_LEN_MAX: usize = 1 << 20;
pub(super) const HEADER_LEN: usize = 64;
const MAGIC: u32 = u32::from_le_bytes(*b"Plog");

/// What a record says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    /// The payload was written at `offset`.
    Write { offset: u64 },
    /// As `Write` in an encrypted volume; the payload is sealed under that number of the opening that wrote it.
    Sealed { offset: u64, number: u64, suite: Suite },
    /// The range reads as zeros.
    Zeros { offset: u64, len: u64 },
    /// The range is made of whole chunks that are in the store; the payload is their names, none of those that are zeros.
    Chunks { offset: u64, len: u64 },
    /// A snapshot of all records before this one; the payload says which.
    Snapshot,
    /// The volume has another size.
    Resize { capacity_bytes: u64 },
}

impl Change {
    /// Bytes of the volume that a record with so much payload says, those of zeros and sizes not counted.
    pub fn written_bytes(self, payload_len: usize) -> u64 {
        match self {
            Change::Write { .. } | Change::Sealed { .. } => payload_len as u64,
            Change::Chunks { len, .. } => len,
            Change::Zeros { .. } | Change::Snapshot | Change::Resize { .. } => 0,
        }
    }
}

/// A record's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub change: Change,
    pub payload_len: u32,
    pub sequence: u64,
    pub epoch: u32,
    /// Of the payload.
    pub checksum: u32,
    /// Records before this sequence number were stable when it was written.
    pub promised: u64,
}

impl Header {
    pub fn to_bytes(self, volume: u64) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        let (kind, offset, len) = match self.change {
            Change::Write { offset } => (1, offset, u64::from(self.payload_len)),
            Change::Sealed { offset, number, suite: Suite::Aes256Gcm } => (5, offset, number),
            Change::Sealed { offset, number, suite: Suite::Aegis256X2 } => (7, offset, number),
            Change::Zeros { offset, len } => (2, offset, len),
            Change::Chunks { offset, len } => (6, offset, len),
            Change::Snapshot => (3, 0, 0),
            Change::Resize { capacity_bytes } => (4, capacity_bytes, 0),
        };
        bytes[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[4] = kind;
        bytes[8..12].copy_from_slice(&(volume as u32).to_le_bytes());
        bytes[12..16].copy_from_slice(&self.epoch.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[24..32].copy_from_slice(&offset.to_le_bytes());
        bytes[32..40].copy_from_slice(&len.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.payload_len.to_le_bytes());
        bytes[44..48].copy_from_slice(&self.checksum.to_le_bytes());
        bytes[48..56].copy_from_slice(&self.promised.to_le_bytes());
        bytes[56..60].copy_from_slice(&((volume >> 32) as u32).to_le_bytes());
        let checksum = crc32c::crc32c(&bytes[..60]);
        bytes[60..64].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    pub fn from_bytes(bytes: &[u8; HEADER_LEN], volume: u64) -> Option<Header> {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        let known = word(0) == MAGIC
            && word(60) == crc32c::crc32c(&bytes[..60])
            && (u64::from(word(8)) | u64::from(word(56)) << 32) == volume;
        let header = Header {
            change: match bytes[4] {
                1 => Change::Write { offset: long(24) },
                2 => Change::Zeros { offset: long(24), len: long(32) },
                3 => Change::Snapshot,
                4 => Change::Resize { capacity_bytes: long(24) },
                5 => Change::Sealed { offset: long(24), number: long(32), suite: Suite::Aes256Gcm },
                7 => Change::Sealed { offset: long(24), number: long(32), suite: Suite::Aegis256X2 },
                6 => Change::Chunks { offset: long(24), len: long(32) },
                _ => return None,
            },
            payload_len: word(40),
            sequence: long(16),
            epoch: word(12),
            checksum: word(44),
            promised: long(48),
        };
        (known && header.payload_len as usize <= PAYLOAD_LEN_MAX).then_some(header)
    }
}

/// Where records end and continue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Position {
    pub place: LogPlace,
    /// Of the next record.
    pub sequence: u64,
    /// No record from here on was written under an earlier epoch: those that lie here were dropped by a recovery.
    pub epoch: u32,
}

/// A record that is to be appended.
pub(crate) struct Entry<'a> {
    pub change: Change,
    pub payload: &'a [u8],
    /// Of the payload.
    pub checksum: u32,
}

impl<'a> Entry<'a> {
    pub fn new(change: Change, payload: &'a [u8]) -> Self {
        Entry { change, payload, checksum: crc32c::crc32c(payload) }
    }
}

/// A record that was appended or found.
pub(crate) struct Appended {
    pub change: Change,
    /// Of the payload.
    pub place: LogPlace,
    pub payload_len: u32,
    /// Behind the record.
    pub end: Position,
}

/// The part of a volume's id that its records carry. Files were the logs of other volumes before, and what those wrote there is not to pass
/// for records of this one: so it is no less than what cannot be guessed.
pub(crate) fn volume_tag(id: Id) -> u64 {
    id.0.iter().take(8).fold(0, |tag, &byte| tag << 8 | u64::from(byte))
}

/// Bytes of a record with its padding.
pub(super) fn record_len(payload_len: usize) -> u64 {
    ((HEADER_LEN + payload_len) as u64).next_multiple_of(HEADER_LEN as u64)
}

/// The names in the payload of a record of chunks; none if that cannot be such a record of a volume with chunks of that length.
pub(crate) fn chunk_names(change: Change, payload: &[u8], chunk_len: u64) -> Option<Arc<[Name]>> {
    let Change::Chunks { offset, len } = change else { return None };
    let (names, rest) = payload.as_chunks::<{ Name::LEN }>();
    let fits = rest.is_empty() && !names.is_empty() && len == names.len() as u64 * chunk_len;
    let lies_well = offset.is_multiple_of(chunk_len) && offset.checked_add(len).is_some();
    (fits && lies_well).then(|| names.iter().map(|name| Name(*name)).collect())
}
