//! Records: what segments are made of. A header of 64 bytes, then the packed bytes, padded to 64.
//!
//! A record says itself what it holds, so that a segment can be read without an index. docs/store-format.md draws it.

use std::ops::Range;
use std::sync::Arc;

use lz4_flex::block::{CompressTable, compress_into_with_table, get_maximum_output_size};
use polder_trust::seal::Suite;

use crate::name::{Kind, Name};
use crate::records::{lz4, tight};

/// Bytes before the packed bytes, and the unit that records are padded to.
pub(crate) const HEADER_LEN: usize = 64;
/// The largest content of a record.
pub(crate) const CONTENT_LEN_MAX: usize = 64 << 10;
const MAGIC: u32 = u32::from_le_bytes(*b"Prec");

/// How a record's bytes are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Packing {
    Raw = 0,
    Lz4 = 1,
    Zstd = 2,
}

/// The byte of a suite in the header of a record; nothing is sealed in an open domain, and its records have zero.
fn suite_byte(suite: Suite) -> u8 {
    match suite {
        Suite::Aes256Gcm => 0,
        Suite::Aegis256X2 => 1,
    }
}

/// A record's header, checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    pub kind: Kind,
    pub packing: Packing,
    pub packed_len: u32,
    pub content_len: u32,
    pub name: Name,
    /// The domain whose secret the packed bytes are sealed with; zero is open.
    pub domain: u32,
    /// What they are sealed with, if they are.
    pub suite: Suite,
    pub checksum: u32,
}

impl Header {
    /// Bytes of the whole record, padding included.
    pub fn record_len(&self) -> usize {
        (HEADER_LEN + self.packed_len as usize).next_multiple_of(HEADER_LEN)
    }

    pub fn to_bytes(self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[4] = self.kind as u8;
        bytes[5] = self.packing as u8;
        bytes[6] = suite_byte(self.suite);
        bytes[8..12].copy_from_slice(&self.packed_len.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.content_len.to_le_bytes());
        bytes[16..48].copy_from_slice(&self.name.0);
        bytes[48..52].copy_from_slice(&self.domain.to_le_bytes());
        bytes[52..56].copy_from_slice(&self.checksum.to_le_bytes());
        let checksum = crc32c::crc32c(&bytes[..60]);
        bytes[60..64].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// The header that `bytes` are, or what is wrong with them.
    pub fn from_bytes(bytes: &[u8]) -> Result<Header, String> {
        if bytes.len() < HEADER_LEN {
            return Err("a record's header is cut off".to_owned());
        }
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        if word(0) != MAGIC {
            return Err("no record begins here".to_owned());
        }
        if word(60) != crc32c::crc32c(&bytes[..60]) {
            return Err("a record's header does not match its checksum".to_owned());
        }
        let kind = Kind::from_byte(bytes[4]).ok_or_else(|| format!("a record of unknown kind {}", bytes[4]))?;
        let packing = match bytes[5] {
            0 => Packing::Raw,
            1 => Packing::Lz4,
            2 => Packing::Zstd,
            other => return Err(format!("a record with unknown packing {other}")),
        };
        let suite = match bytes[6] {
            0 => Suite::Aes256Gcm,
            1 => Suite::Aegis256X2,
            other => return Err(format!("a record sealed with the unknown suite {other}")),
        };
        let mut name = Name::NONE;
        name.0.copy_from_slice(&bytes[16..48]);
        let header = Header {
            kind,
            packing,
            packed_len: word(8),
            content_len: word(12),
            name,
            domain: word(48),
            suite,
            checksum: word(52),
        };
        // Sealing adds less than a header's length to what is packed.
        if header.content_len as usize > CONTENT_LEN_MAX
            || header.packed_len as usize > CONTENT_LEN_MAX + HEADER_LEN
            || bytes[7] != 0
            || bytes[56..60] != [0; 4]
        {
            return Err("a record of impossible length or with fields that are not known".to_owned());
        }
        Ok(header)
    }
}

/// Packs records; keeps its buffers from one to the next.
#[derive(Default)]
pub(crate) struct Packer {
    packed: Vec<u8>,
    table: CompressTable,
}

impl Packer {
    /// Packs `content`: how, and the bytes to store. What does not become smaller by a padding unit stays as it is.
    pub fn pack<'a>(&'a mut self, content: &'a [u8]) -> (Packing, &'a [u8]) {
        let bound = get_maximum_output_size(content.len());
        if self.packed.len() < bound {
            self.packed.resize(bound, 0);
        }
        match compress_into_with_table(content, &mut self.packed, &mut self.table) {
            Ok(len) if len + HEADER_LEN <= content.len() => (Packing::Lz4, &self.packed[..len]),
            _ => (Packing::Raw, content),
        }
    }
}

/// The header and packed bytes of the record that `bytes` begin with, checksums compared.
pub(crate) fn split(bytes: &[u8]) -> Result<(Header, &[u8]), String> {
    split_unless(bytes, |_| false)
}

/// As [`split`], but packed bytes are left alone that the caller checks in a better way: sealed ones, by their seals.
pub(crate) fn split_unless(
    bytes: &[u8],
    is_left_alone: impl FnOnce(&Header) -> bool,
) -> Result<(Header, &[u8]), String> {
    let header = Header::from_bytes(bytes)?;
    let end = HEADER_LEN + header.packed_len as usize;
    let packed = bytes.get(HEADER_LEN..end).ok_or_else(|| "a record is cut off".to_owned())?;
    if !is_left_alone(&header) && crc32c::crc32c(packed) != header.checksum {
        return Err(format!("chunk {} does not match its checksum", header.name));
    }
    Ok((header, packed))
}

/// Unpacks the packed bytes of a record to exactly the length that its header says.
pub(crate) fn unpack(header: &Header, packed: &[u8]) -> Result<Arc<[u8]>, String> {
    if header.packing == Packing::Raw && packed.len() == header.content_len as usize {
        return Ok(packed.into());
    }
    let mut content: Arc<[u8]> = std::iter::repeat_n(0, header.content_len as usize).collect();
    let space = Arc::get_mut(&mut content).unwrap_or_else(|| unreachable!("nobody else has it yet"));
    unpack_into(header, packed, space)?;
    Ok(content)
}

/// Unpacks the packed bytes of a record into as many bytes as its header says.
pub(crate) fn unpack_into(header: &Header, packed: &[u8], content: &mut [u8]) -> Result<(), String> {
    if content.len() != header.content_len as usize || header.packing == Packing::Raw && packed.len() != content.len() {
        return Err(format!("chunk {} has another length than it says", header.name));
    }
    let unpacked = match header.packing {
        Packing::Raw => {
            content.copy_from_slice(packed);
            Some(packed.len())
        }
        Packing::Lz4 => lz4::unpack(packed, content),
        Packing::Zstd => tight::unpack(packed, content),
    };
    match unpacked == Some(content.len()) {
        true => Ok(()),
        false => Err(format!("chunk {} cannot be unpacked", header.name)),
    }
}

/// A part of the content of a record, which is unpacked as far as it goes in `scratch`. None if that cannot be.
pub(crate) fn unpack_part<'a>(
    header: &Header,
    packed: &'a [u8],
    part: Range<usize>,
    scratch: &'a mut Vec<u8>,
) -> Option<&'a [u8]> {
    let len = header.content_len as usize;
    if part.end > len {
        return None;
    }
    if header.packing == Packing::Raw {
        return packed.get(part).filter(|_| packed.len() == len);
    }
    if scratch.len() < len {
        scratch.resize(len, 0);
    }
    let content = &mut scratch[..len];
    if header.packing == Packing::Lz4 {
        lz4::unpack_front(packed, content, part.end).filter(|&unpacked| unpacked >= part.end)?;
    } else {
        unpack_into(header, packed, content).ok()?;
    }
    content.get(part)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::name::Namer;

    fn header(content: &[u8], packing: Packing, packed: &[u8]) -> Header {
        Header {
            kind: Kind::Data,
            packing,
            packed_len: packed.len() as u32,
            content_len: content.len() as u32,
            name: Namer::open().name(Kind::Data, content),
            domain: 0,
            suite: Suite::Aes256Gcm,
            checksum: crc32c::crc32c(packed),
        }
    }

    #[test]
    fn what_is_packed_comes_back_and_what_does_not_shrink_stays() {
        let mut packer = Packer::default();
        let text: Vec<u8> = b"polder ".iter().copied().cycle().take(16 << 10).collect();
        let mut noise = vec![0; 16 << 10];
        blake3::Hasher::new().finalize_xof().fill(&mut noise);
        for (content, packing) in [(&text, Packing::Lz4), (&noise, Packing::Raw)] {
            let (chosen, packed) = packer.pack(content);
            assert_eq!(chosen, packing);
            let header = header(content, chosen, packed);
            assert_eq!(Header::from_bytes(&header.to_bytes()), Ok(header));
            assert_eq!(unpack(&header, packed).unwrap()[..], content[..]);
            let mut scratch = vec![9; 100];
            for part in [0..1, 0..4096, 512..513, 4096..16_384, 16_384..16_384] {
                assert_eq!(unpack_part(&header, packed, part.clone(), &mut scratch).unwrap(), &content[part]);
            }
            assert_eq!(unpack_part(&header, packed, 16_000..16_385, &mut scratch), None);
        }
    }

    #[test]
    fn any_flipped_bit_is_found() {
        let mut packer = Packer::default();
        let content = [5; 4096];
        let (packing, packed) = packer.pack(&content);
        let header = header(&content, packing, packed);
        let bytes = [&header.to_bytes()[..], packed].concat();
        assert_eq!(split(&bytes), Ok((header, packed)));
        for bit in 0..8 * bytes.len() {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(split(&flipped).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn a_bomb_unpacks_to_no_more_than_it_says() {
        let zeros = vec![0; 1 << 20];
        let bomb = lz4_flex::block::compress(&zeros);
        let header = header(&zeros[..4096], Packing::Lz4, &bomb);
        assert!(unpack(&header, &bomb).is_err());
        let bomb = zstd::bulk::compress(&zeros, 3).unwrap();
        let header =
            Header { packing: Packing::Zstd, packed_len: bomb.len() as u32, checksum: crc32c::crc32c(&bomb), ..header };
        assert!(unpack(&header, &bomb).is_err());
    }
}
