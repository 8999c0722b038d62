//! The header of a qcow2 file and its extensions.

use super::super::error::{FormatError, printable};
use super::super::{RawSource, Source, VIRTUAL_LEN_MAX};
use super::compression::Compression;
use super::{CLUSTER_BITS, be32, be64};

/// What a qcow2 file begins with.
const MAGIC: &[u8; 4] = b"QFI\xfb";
/// Bytes of the header of version 2.
const V2_LEN: usize = 72;
/// Bytes of the header of version 3 without optional fields.
const V3_LEN: usize = 104;
/// A backing file's name has at most this many bytes.
const BACKING_NAME_LEN_MAX: usize = 1023;
/// Header and extensions lie in the first cluster; of a large one no more than this is read.
const HEAD_LEN_MAX: usize = 64 << 10;

/// Incompatible features, by bit.
const DIRTY: u64 = 1 << 0;
const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA: u64 = 1 << 2;
const COMPRESSION_TYPE: u64 = 1 << 3;
const EXTENDED_L2: u64 = 1 << 4;
const KNOWN_INCOMPATIBLE: u64 = DIRTY | CORRUPT | EXTERNAL_DATA | COMPRESSION_TYPE | EXTENDED_L2;

/// Header extensions, by type.
const END_OF_EXTENSIONS: u32 = 0;
const BACKING_FORMAT: u32 = 0xe279_2aca;
const FEATURE_NAMES: u32 = 0x6803_f857;
const DATA_FILE_NAME: u32 = 0x4441_5441;

/// Another file that a header names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OtherFile {
    /// The name as it stands in the header: bytes that a guest may have chosen.
    pub name: Vec<u8>,
    /// The format that the header gives for it.
    pub format: Option<Vec<u8>>,
}

/// A checked header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// The cluster size is two to the power of this.
    pub cluster_bits: u32,
    /// Bytes of the virtual disk.
    pub virtual_len: u64,
    /// What compressed clusters are compressed with.
    pub compression: Compression,
    /// The image was not closed; its refcounts may be wrong.
    pub dirty: bool,
    /// L2 entries have 32 subclusters each.
    pub extended_l2: bool,
    /// The file that has what this one lacks.
    pub backing: Option<OtherFile>,
    /// The file that has the clusters; named where the header has a name.
    pub data_file: Option<OtherFile>,
    pub(super) l1_offset: u64,
    pub(super) l1_entries: u32,
    pub(super) refcount_table_offset: u64,
    pub(super) refcount_table_clusters: u32,
    pub(super) snapshots_offset: u64,
    pub(super) snapshot_count: u32,
}

impl Header {
    /// Reads and checks the header of a file.
    pub fn read(file: &RawSource) -> Result<Header, FormatError> {
        let name = file.name();
        let mut head = vec![0; HEAD_LEN_MAX.min(file.len() as usize)];
        file.read_at(0, &mut head)?;
        parse(name, &head)
    }

    pub(super) fn cluster_len(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Bytes of one L2 entry.
    pub(super) fn entry_len(&self) -> u64 {
        if self.extended_l2 { 16 } else { 8 }
    }

    /// Bits of a disk offset below the index into the L1 table.
    pub(super) fn l1_shift(&self) -> u32 {
        2 * self.cluster_bits - self.entry_len().ilog2()
    }
}

fn parse(name: &str, head: &[u8]) -> Result<Header, FormatError> {
    let wrong = |reason: String| FormatError::WrongFormat { file: name.to_owned(), format: "qcow2", reason };
    let bad = |place: &str, problem: String| FormatError::malformed(name, place, problem);
    if head.len() < V2_LEN {
        return Err(wrong(format!("it has {} bytes, and the header alone has {V2_LEN}", head.len())));
    }
    if &head[..4] != MAGIC {
        return Err(wrong("it does not begin with the bytes QFI 0xfb".to_owned()));
    }
    let version = be32(head, 4);
    if !(2..=3).contains(&version) {
        return Err(FormatError::unsupported(name, format!("version {version} of qcow2")));
    }
    let cluster_bits = be32(head, 20);
    if !CLUSTER_BITS.contains(&cluster_bits) {
        let problem = format!("the cluster size is 2^{cluster_bits} bytes; the format has 2^9 to 2^21");
        return Err(bad("header, field cluster_bits", problem));
    }
    let virtual_len = be64(head, 24);
    if virtual_len > VIRTUAL_LEN_MAX {
        let what = "the size of the virtual disk in bytes";
        return Err(FormatError::TooLarge { file: name.to_owned(), what, value: virtual_len, limit: VIRTUAL_LEN_MAX });
    }
    match be32(head, 32) {
        0 => {}
        1 => return Err(FormatError::unsupported(name, "AES encryption")),
        2 => return Err(FormatError::unsupported(name, "LUKS encryption")),
        method => return Err(FormatError::unsupported(name, format!("encryption method {method}"))),
    }
    let mut header = Header {
        version,
        cluster_bits,
        virtual_len,
        compression: Compression::Zlib,
        dirty: false,
        extended_l2: false,
        backing: None,
        data_file: None,
        l1_offset: be64(head, 40),
        l1_entries: be32(head, 36),
        refcount_table_offset: be64(head, 48),
        refcount_table_clusters: be32(head, 56),
        snapshots_offset: be64(head, 64),
        snapshot_count: be32(head, 60),
    };
    // Extensions and the backing file's name lie in the first cluster.
    let head = &head[..head.len().min(1 << cluster_bits)];
    let (incompatible, extensions_at) = if version == 2 { (0, V2_LEN) } else { parse_v3(name, head, &mut header)? };
    let backing_name_at = be64(head, 8);
    let backing_name = backing_name(name, head, backing_name_at)?;
    let extensions_end = if backing_name.is_some() { backing_name_at as usize } else { head.len() };
    let extensions = Extensions::parse(name, head, extensions_at, extensions_end)?;
    refuse_features(name, incompatible, &extensions)?;
    header.backing = backing_name.map(|name| OtherFile { name, format: extensions.backing_format.clone() });
    if incompatible & EXTERNAL_DATA != 0 {
        let named = extensions.data_file_name.unwrap_or_default();
        header.data_file = Some(OtherFile { name: named, format: Some(b"raw".to_vec()) });
    }
    Ok(header)
}

/// The fields of version 3: the incompatible features, and where the extensions begin.
fn parse_v3(name: &str, head: &[u8], header: &mut Header) -> Result<(u64, usize), FormatError> {
    if head.len() < V3_LEN {
        return Err(FormatError::malformed(name, "header", format!("it ends after {} of {V3_LEN} bytes", head.len())));
    }
    let header_len = be32(head, 100) as usize;
    if header_len < V3_LEN || header_len > head.len() || !header_len.is_multiple_of(8) {
        let problem = format!("it says {header_len} bytes, and the first {} may hold it", head.len());
        return Err(FormatError::malformed(name, "header, field header_length", problem));
    }
    let incompatible = be64(head, 72);
    header.dirty = incompatible & DIRTY != 0;
    header.extended_l2 = incompatible & EXTENDED_L2 != 0;
    if header.extended_l2 && header.cluster_bits < 14 {
        let problem =
            format!("extended L2 entries need clusters of 16 KiB or more; they have 2^{}", header.cluster_bits);
        return Err(FormatError::malformed(name, "header, field cluster_bits", problem));
    }
    let kind = if header_len > V3_LEN { head[V3_LEN] } else { 0 };
    header.compression = match kind {
        0 => Compression::Zlib,
        1 => Compression::Zstd,
        other => return Err(FormatError::unsupported(name, format!("compression type {other}"))),
    };
    if (kind != 0) != (incompatible & COMPRESSION_TYPE != 0) {
        let problem = format!("type {kind} and the feature bit for it contradict each other");
        return Err(FormatError::malformed(name, "header, field compression_type", problem));
    }
    Ok((incompatible, header_len))
}

fn backing_name(name: &str, head: &[u8], at: u64) -> Result<Option<Vec<u8>>, FormatError> {
    let len = be32(head, 16) as usize;
    if at == 0 || len == 0 {
        return Ok(None);
    }
    let bad = |problem| FormatError::malformed(name, "header, backing file name", problem);
    if len > BACKING_NAME_LEN_MAX {
        return Err(bad(format!("it has {len} bytes; at most {BACKING_NAME_LEN_MAX} are allowed")));
    }
    let bytes = usize::try_from(at).ok().filter(|at| *at >= V2_LEN).and_then(|at| head.get(at..)?.get(..len));
    match bytes {
        Some(bytes) => Ok(Some(bytes.to_vec())),
        None => Err(bad(format!("its {len} bytes at {at:#x} are not in the first cluster behind the header"))),
    }
}

/// What the extensions say that matters here.
#[derive(Default)]
struct Extensions {
    backing_format: Option<Vec<u8>>,
    data_file_name: Option<Vec<u8>>,
    /// Entries of 48 bytes: kind, bit, name.
    feature_names: Vec<u8>,
}

impl Extensions {
    fn parse(name: &str, head: &[u8], mut at: usize, end: usize) -> Result<Self, FormatError> {
        let mut found = Extensions::default();
        let mut index = 0;
        while at + 8 <= end {
            let (kind, len) = (be32(head, at), be32(head, at + 4) as usize);
            if kind == END_OF_EXTENSIONS {
                break;
            }
            let Some(content) = head[at + 8..end].get(..len) else {
                let problem = format!("it says {len} bytes, and {} are left", end - at - 8);
                return Err(FormatError::malformed(name, format!("header extension {index} ({kind:#010x})"), problem));
            };
            match kind {
                BACKING_FORMAT => found.backing_format = Some(content.to_vec()),
                DATA_FILE_NAME => found.data_file_name = Some(content.to_vec()),
                FEATURE_NAMES => found.feature_names = content.to_vec(),
                // Unknown extensions may be ignored: what must be known has a feature bit.
                _ => {}
            }
            at += 8 + len.next_multiple_of(8);
            index += 1;
        }
        Ok(found)
    }

    /// What the file itself calls an incompatible feature.
    fn feature_name(&self, bit: u32) -> Option<String> {
        let entry = self.feature_names.chunks_exact(48).find(|entry| entry[0] == 0 && u32::from(entry[1]) == bit)?;
        let text = entry[2..].split(|byte| *byte == 0).next()?;
        Some(printable(text))
    }
}

fn refuse_features(name: &str, incompatible: u64, extensions: &Extensions) -> Result<(), FormatError> {
    let unknown = incompatible & !KNOWN_INCOMPATIBLE;
    if unknown != 0 {
        let bit = unknown.trailing_zeros();
        let feature = match extensions.feature_name(bit) {
            Some(text) => format!("the incompatible feature {bit}, which it calls \"{text}\""),
            None => format!("the incompatible feature {bit}"),
        };
        return Err(FormatError::unsupported(name, feature));
    }
    if incompatible & CORRUPT != 0 {
        let problem = "the image is marked as corrupt; `qemu-img check -r all` may repair it";
        return Err(FormatError::malformed(name, "header, field incompatible_features", problem));
    }
    Ok(())
}
