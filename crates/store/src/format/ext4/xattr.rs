//! Extended attributes: one block an inode, shared by inodes with the same ones.

use super::checksum::crc32c;
use super::layout::BLOCK_LEN;

const MAGIC: u32 = 0xea02_0000;
const HEADER_LEN: usize = 32;
const ENTRY_LEN: usize = 16;
/// The four zeros behind the last entry.
const END_LEN: usize = 4;
/// The longest name behind its prefix.
const NAME_LEN_MAX: usize = 255;
/// Inodes that may share a block, as in the kernel.
pub(super) const SHARERS_MAX: u32 = 1024;

/// Names that are numbers on the disk: the whole name, or the part up to the dot.
const PREFIXES: [(&[u8], u8); 6] = [
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"user.", 1),
    (b"trusted.", 4),
    (b"security.", 6),
    (b"system.", 7),
];

/// Checked attributes of one inode, as the content of a block but for the count of sharers and the checksum.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct XattrBlock(Vec<u8>);

impl XattrBlock {
    /// Puts attributes, by whole name, into a block; says what does not fit.
    pub(super) fn new(attributes: &[(Vec<u8>, Vec<u8>)]) -> Result<Self, String> {
        let mut entries = Vec::with_capacity(attributes.len());
        for (name, value) in attributes {
            let shown = || super::super::error::printable(name);
            let (prefix, index) = PREFIXES
                .into_iter()
                .find(|(prefix, _)| name.starts_with(prefix) && (prefix.ends_with(b".") || name == prefix))
                .ok_or_else(|| format!("the extended attribute {} belongs to no namespace of ext4", shown()))?;
            let rest = &name[prefix.len()..];
            if rest.len() > NAME_LEN_MAX || (rest.is_empty() && prefix.ends_with(b".")) {
                return Err(format!("the extended attribute {} has a name that ext4 cannot hold", shown()));
            }
            let value = match index {
                2 | 3 => acl_on_disk(value).ok_or_else(|| format!("{} is no access control list", shown()))?,
                _ => value.clone(),
            };
            entries.push((index, rest, value));
        }
        entries.sort_by(|(index, name, _), (other_index, other, _)| {
            (index, name.len(), name).cmp(&(other_index, other.len(), other))
        });
        if entries.windows(2).any(|pair| (pair[0].0, pair[0].1) == (pair[1].0, pair[1].1)) {
            return Err("an extended attribute is there twice".to_owned());
        }
        let padded = |len: usize| len.next_multiple_of(4);
        let needed: usize =
            entries.iter().map(|(_, name, value)| ENTRY_LEN + padded(name.len()) + padded(value.len())).sum();
        let room = BLOCK_LEN as usize - HEADER_LEN - END_LEN;
        if needed > room {
            return Err(format!("its extended attributes need {needed} bytes, and a block has room for {room}"));
        }
        let mut block = vec![0; BLOCK_LEN as usize];
        block[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        block[8..12].copy_from_slice(&1_u32.to_le_bytes());
        let (mut at, mut value_at) = (HEADER_LEN, BLOCK_LEN as usize);
        let mut block_hash = 0_u32;
        for (index, name, value) in &entries {
            value_at -= padded(value.len());
            block[value_at..value_at + value.len()].copy_from_slice(value);
            let hash = entry_hash(name, &block[value_at..value_at + padded(value.len())]);
            block[at] = name.len() as u8;
            block[at + 1] = *index;
            let offset = if value.is_empty() { 0 } else { value_at as u16 };
            block[at + 2..at + 4].copy_from_slice(&offset.to_le_bytes());
            block[at + 8..at + 12].copy_from_slice(&(value.len() as u32).to_le_bytes());
            block[at + 12..at + 16].copy_from_slice(&hash.to_le_bytes());
            block[at + ENTRY_LEN..at + ENTRY_LEN + name.len()].copy_from_slice(name);
            at += ENTRY_LEN + padded(name.len());
            block_hash = block_hash.rotate_left(16) ^ hash;
        }
        if entries.iter().any(|(_, name, value)| name.is_empty() && value.is_empty()) {
            block_hash = 0;
        }
        block[12..16].copy_from_slice(&block_hash.to_le_bytes());
        Ok(XattrBlock(block))
    }

    /// Its bytes at a place on the disk.
    pub(super) fn bytes(&self, place: u64, sharers: u32, seed: u32) -> Vec<u8> {
        let mut block = self.0.clone();
        block[4..8].copy_from_slice(&sharers.to_le_bytes());
        let sum = crc32c(crc32c(seed, &place.to_le_bytes()), &block);
        block[16..20].copy_from_slice(&sum.to_le_bytes());
        block
    }
}

fn entry_hash(name: &[u8], padded_value: &[u8]) -> u32 {
    let hash = name.iter().fold(0_u32, |hash, byte| hash.rotate_left(5) ^ u32::from(*byte));
    let words = padded_value.chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().expect("four bytes")));
    words.fold(hash, |hash, word| hash.rotate_left(16) ^ word)
}

/// An access control list as system calls and archives have it (version 2) in the shorter form of the disk (version 1).
fn acl_on_disk(value: &[u8]) -> Option<Vec<u8>> {
    const USER: u16 = 2;
    const GROUP: u16 = 8;
    let (version, entries) = value.split_at_checked(4)?;
    if version != 2_u32.to_le_bytes() || !entries.len().is_multiple_of(8) {
        return None;
    }
    let mut disk = 1_u32.to_le_bytes().to_vec();
    for entry in entries.chunks_exact(8) {
        let tag = u16::from_le_bytes([entry[0], entry[1]]);
        disk.extend_from_slice(if tag == USER || tag == GROUP { entry } else { &entry[..4] });
    }
    Some(disk)
}
