//! What lies in a remote store, byte by byte: docs/transfer.md draws it.
//!
//! Objects are written once and never changed, but for images that are replaced.

use super::error::RemoteError;
use crate::id::Id;
use crate::name::{Kind, Name, Namer};
use crate::records::segment::{Entry, Location};

/// The version of all objects that this release writes, and the newest that it reads.
const FORMAT: u32 = 1;
const HEADER_LEN: usize = 64;
const SEGMENT_ROW_LEN: usize = 32;
/// Names of a profile, at most.
pub(super) const PROFILE_LEN_MAX: usize = 256 << 10;

pub(super) const FORMAT_OBJECT: &str = "format";
/// Among what is listed as dead, so that one list tells the time and since when.
pub(super) const CLOCK: &str = "clock";
pub(super) const SEGMENTS: &str = "segments";
pub(super) const INDEX: &str = "index";
pub(super) const IMAGES: &str = "images";
pub(super) const PROFILES: &str = "profiles";
pub(super) const DEAD: &str = "dead";

pub(super) fn path(folder: &str, name: impl std::fmt::Display) -> String {
    format!("{folder}/{name}")
}

const MAGIC_STORE: &[u8; 16] = b"polder remote\0\0\0";
const MAGIC_INDEX: &[u8; 16] = b"polder r-index\0\0";
const MAGIC_IMAGE: &[u8; 16] = b"polder r-image\0\0";
const MAGIC_PROFILE: &[u8; 16] = b"polder r-boot\0\0\0";

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

/// An object: a header of 64 bytes, with what the rest of it is made of, and a checksum at the very end.
fn seal(magic: &[u8; 16], fields: &[u8], body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_LEN + body.len() + 4);
    bytes.extend_from_slice(magic);
    bytes.extend_from_slice(&FORMAT.to_le_bytes());
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(fields);
    bytes.resize(HEADER_LEN, 0);
    bytes.extend_from_slice(body);
    let checksum = crc32c::crc32c(&bytes);
    bytes.extend_from_slice(&checksum.to_le_bytes());
    bytes
}

/// The fields and the body of an object.
fn unseal<'b>(magic: &[u8; 16], object: &str, bytes: &'b [u8]) -> Result<(&'b [u8], &'b [u8]), RemoteError> {
    let damaged = |what: &str| RemoteError::Damaged { object: object.to_owned(), what: what.to_owned() };
    if bytes.len() < HEADER_LEN + 4 || &bytes[..16] != magic {
        return Err(damaged("it is not what its name says"));
    }
    let found = u32_at(bytes, 16);
    if found != FORMAT {
        return Err(RemoteError::UnknownFormat { object: object.to_owned(), found, known: FORMAT });
    }
    let (covered, checksum) = bytes.split_at(bytes.len() - 4);
    if checksum != crc32c::crc32c(covered).to_le_bytes() {
        return Err(damaged("it does not match its checksum"));
    }
    Ok((&covered[24..HEADER_LEN], &covered[HEADER_LEN..]))
}

fn domain_of(namer: &Namer) -> [u8; 16] {
    let mut domain = [0; 16];
    domain.copy_from_slice(&namer.name(Kind::Node, b"polder transfer domain").0[..16]);
    domain
}

pub(super) fn format_object(namer: &Namer) -> Vec<u8> {
    seal(MAGIC_STORE, &domain_of(namer), &[])
}

/// Whether a remote store is one that we can use.
pub(super) fn check_format(namer: &Namer, bytes: &[u8]) -> Result<(), RemoteError> {
    let (fields, _) = unseal(MAGIC_STORE, FORMAT_OBJECT, bytes)?;
    if fields[..16] == domain_of(namer) { Ok(()) } else { Err(RemoteError::OtherDomain) }
}

/// A name for a node in a remote store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteImage {
    pub name: String,
    pub created_ns: u64,
    pub node: Name,
}

pub(super) fn image_object(created_ns: u64, node: &Name) -> Vec<u8> {
    let mut fields = created_ns.to_le_bytes().to_vec();
    fields.extend_from_slice(&node.0);
    seal(MAGIC_IMAGE, &fields, &[])
}

pub(super) fn read_image(name: &str, bytes: &[u8]) -> Result<RemoteImage, RemoteError> {
    let (fields, _) = unseal(MAGIC_IMAGE, &path(IMAGES, name), bytes)?;
    let mut node = Name::NONE;
    node.0.copy_from_slice(&fields[8..8 + Name::LEN]);
    Ok(RemoteImage { name: name.to_owned(), created_ns: u64_at(fields, 0), node })
}

pub(super) fn profile_object(names: &[Name]) -> Vec<u8> {
    seal(MAGIC_PROFILE, &[], &names.iter().flat_map(|name| name.0).collect::<Vec<u8>>())
}

pub(super) fn read_profile(object: &str, bytes: &[u8]) -> Result<Vec<Name>, RemoteError> {
    let (_, body) = unseal(MAGIC_PROFILE, object, bytes)?;
    let names = body.chunks_exact(Name::LEN).take(PROFILE_LEN_MAX);
    Ok(names
        .map(|bytes| {
            let mut name = Name::NONE;
            name.0.copy_from_slice(bytes);
            name
        })
        .collect())
}

/// Where a record is in a remote store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RemotePlace {
    pub segment: Id,
    pub offset: u64,
    /// Bytes to read: the record, and perhaps some behind it.
    pub len: u64,
}

/// Which records some segments hold. Their places count the segments in the order of the list.
pub(super) struct RemoteIndex {
    pub segments: Vec<Id>,
    entries: Vec<u8>,
}

impl RemoteIndex {
    pub fn to_object(segments: &[Id], entries: &mut [Entry]) -> Vec<u8> {
        entries.sort_unstable();
        let mut fields = (segments.len() as u64).to_le_bytes().to_vec();
        fields.extend_from_slice(&(entries.len() as u64).to_le_bytes());
        let mut body = Vec::with_capacity(segments.len() * SEGMENT_ROW_LEN + entries.len() * Entry::LEN);
        for segment in segments {
            body.extend_from_slice(&segment.0);
            body.resize(body.len() + SEGMENT_ROW_LEN - segment.0.len(), 0);
        }
        entries.iter().for_each(|entry| body.extend_from_slice(&entry.to_bytes()));
        seal(MAGIC_INDEX, &fields, &body)
    }

    pub fn from_object(object: &str, bytes: &[u8]) -> Result<Self, RemoteError> {
        let (fields, body) = unseal(MAGIC_INDEX, object, bytes)?;
        let damaged = || RemoteError::Damaged {
            object: object.to_owned(),
            what: "its length is not that of its lists".to_owned(),
        };
        let len = |at, unit: usize| usize::try_from(u64_at(fields, at)).ok().and_then(|count| count.checked_mul(unit));
        let (rows, entries) = (len(0, SEGMENT_ROW_LEN).ok_or_else(damaged)?, len(8, Entry::LEN).ok_or_else(damaged)?);
        if rows.checked_add(entries) != Some(body.len()) {
            return Err(damaged());
        }
        let segment = |row: &[u8]| {
            let mut id = Id([0; 16]);
            id.0.copy_from_slice(&row[..16]);
            id
        };
        let segments = body[..rows].chunks_exact(SEGMENT_ROW_LEN).map(segment).collect();
        Ok(RemoteIndex { segments, entries: body[rows..].to_vec() })
    }

    fn entry(&self, index: usize) -> Entry {
        Entry::from_bytes(&self.entries[index * Entry::LEN..])
    }

    /// All entries, with the segments that they are in.
    pub fn entries(&self) -> impl Iterator<Item = (Id, Entry)> {
        (0..self.entries.len() / Entry::LEN).filter_map(|index| {
            let entry = self.entry(index);
            Some((*self.segments.get(entry.location.segment().0 as usize)?, entry))
        })
    }

    /// Where a record is, once for each copy.
    pub fn find(&self, name: &Name) -> impl Iterator<Item = RemotePlace> {
        let prefix = name.prefix();
        let count = self.entries.len() / Entry::LEN;
        let (mut low, mut high) = (0, count);
        while low < high {
            let middle = (low + high) / 2;
            match self.entries[middle * Entry::LEN..][..Name::PREFIX_LEN] < prefix[..] {
                true => low = middle + 1,
                false => high = middle,
            }
        }
        (low..count).map(|index| self.entry(index)).take_while(move |entry| entry.prefix == prefix).filter_map(
            |Entry { location, .. }| {
                let segment = *self.segments.get(location.segment().0 as usize)?;
                Some(RemotePlace { segment, offset: location.offset(), len: location.read_len() as u64 })
            },
        )
    }
}

/// An entry for the index of a push.
pub(super) fn entry_in(ordinal: usize, entry: Entry) -> Entry {
    let Entry { prefix, location } = entry;
    let number = crate::records::segment::SegmentNumber(ordinal as u32);
    Entry { prefix, location: Location::new(number, location.offset(), location.read_len()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::records::segment::SegmentNumber;

    #[test]
    fn objects_of_a_remote_store_come_back_and_flipped_bits_are_found() {
        let name = Namer::open().name(Kind::Data, b"water");
        let other = Namer::open().name(Kind::Data, b"land");
        let location = Location::new(SegmentNumber(1), 128, 700);
        let mut entries = [Entry { prefix: name.prefix(), location }];
        let ids = [Id([1; 16]), Id([2; 16])];
        type Reads = fn(&[u8]) -> bool;
        let objects: [(Vec<u8>, Reads); 4] = [
            (format_object(&Namer::open()), |bytes| check_format(&Namer::open(), bytes).is_ok()),
            (image_object(7, &name), |bytes| read_image("a", bytes).is_ok()),
            (profile_object(&[name, other]), |bytes| read_profile("p", bytes).is_ok()),
            (RemoteIndex::to_object(&ids, &mut entries), |bytes| RemoteIndex::from_object("i", bytes).is_ok()),
        ];
        for (bytes, reads) in &objects {
            assert!(reads(bytes));
            for bit in 0..8 * bytes.len() {
                let mut flipped = bytes.clone();
                flipped[bit / 8] ^= 1 << (bit % 8);
                assert!(!reads(&flipped), "bit {bit}");
            }
            for len in 0..bytes.len() {
                assert!(!reads(&bytes[..len]), "{len} bytes");
            }
        }
        assert_eq!(read_profile("p", &objects[2].0).unwrap(), [name, other]);
        let index = RemoteIndex::from_object("i", &objects[3].0).unwrap();
        let found: Vec<_> = index.find(&name).collect();
        assert_eq!(found, [RemotePlace { segment: ids[1], offset: 128, len: 768 }]);
        assert_eq!(index.find(&other).count(), 0);
        assert!(matches!(check_format(&Namer::new(&[7; 32]), &objects[0].0), Err(RemoteError::OtherDomain)));
    }
}
