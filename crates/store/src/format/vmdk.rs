//! What a VMDK file says of other files, before anything else reads it.
//!
//! A descriptor is text that names the files with the disk's content and the disk that it is a difference to. Readers of the format
//! open what it names, so only what names nothing else gets through: one self-contained sparse file, or a descriptor whose only
//! extent is a flat file beside it, which we read ourselves.

use super::error::{FormatError, file_name, printable};
use super::{RawSource, Source};
use rustix::fs::{Mode, OFlags};
use std::path::Path;

/// Bytes of a descriptor that are read, at most.
pub const DESCRIPTOR_LEN_MAX: u64 = 64 << 10;
/// What a sparse file with a descriptor inside begins with.
const SPARSE_MAGIC: &[u8] = b"KDMV";
/// The same of older ESX hosts.
const ESX_MAGIC: &[u8] = b"COWD";
/// Where qemu-img looks for the descriptor of a sparse file, whatever its header says, and how far.
const EMBEDDED_AT: u64 = 512;
const EMBEDDED_LEN: u64 = 20 * 512;
/// The key that names the disk below.
const PARENT_NAME: &[u8] = b"parentFileNameHint";
const NO_PARENT: &str = "ffffffff";
const SECTOR: u64 = 512;

/// A file that may be read.
#[derive(Debug)]
pub enum Vmdk {
    /// Everything is in the file itself: monolithicSparse or streamOptimized.
    SelfContained,
    /// A descriptor whose only extent is this flat file: monolithicFlat or vmfs.
    Flat(RawSource),
}

/// The only extent that a descriptor may have.
#[derive(Debug, PartialEq, Eq)]
struct FlatExtent {
    name: String,
    len: u64,
}

/// Looks at a VMDK file and refuses what names files other than itself and its `-flat.vmdk`.
pub fn look_at_vmdk(path: &Path) -> Result<Vmdk, FormatError> {
    let name = file_name(path);
    let file = RawSource::open(path)?;
    let mut head = vec![0; file.len().min(DESCRIPTOR_LEN_MAX) as usize];
    file.read_at(0, &mut head)?;
    if head.starts_with(SPARSE_MAGIC) {
        let (at, len) = check_sparse_header(&name, &head)?;
        let len = len.min(file.len().saturating_sub(at)).min(DESCRIPTOR_LEN_MAX);
        let mut declared = vec![0; len as usize];
        file.read_at(at.min(file.len()), &mut declared)?;
        check_embedded(&name, &head, &declared)?;
        return Ok(Vmdk::SelfContained);
    }
    let extent = parse_descriptor(&name, &head)?;
    let bad = |problem: String| FormatError::BadOtherFile {
        file: name.clone(),
        role: "extent",
        name: printable(extent.name.as_bytes()),
        problem,
    };
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let found = rustix::fs::open(folder.join(&extent.name), flags, Mode::empty())
        .map_err(|error| bad(format!("it cannot be opened without following links: {error}")))?;
    let flat = RawSource::from_file(found, file_name(&folder.join(&extent.name)))?;
    if flat.len() != extent.len {
        return Err(bad(format!("it has {} bytes where the descriptor says {}", flat.len(), extent.len)));
    }
    Ok(Vmdk::Flat(flat))
}

/// Checks the header of a sparse file; gives where it says that its descriptor lies.
fn check_sparse_header(name: &str, head: &[u8]) -> Result<(u64, u64), FormatError> {
    let Some(fields) = head.get(..SECTOR as usize) else {
        return Err(FormatError::malformed(name, "header", "the file ends in it"));
    };
    let field = |at: usize| u64::from_le_bytes(fields[at..at + 8].try_into().expect("eight bytes"));
    let (capacity, at, len) = (field(12), field(28), field(36));
    if capacity == 0 {
        // Then the descriptor's extents are the disk.
        let feature = "a sparse file that is only a descriptor of other files";
        return Err(FormatError::unsupported(name, feature));
    }
    Ok((at.saturating_mul(SECTOR), len.saturating_mul(SECTOR)))
}

/// A descriptor inside a sparse file names no disk below it, neither where the header says nor where qemu-img looks.
fn check_embedded(name: &str, head: &[u8], declared: &[u8]) -> Result<(), FormatError> {
    let end = head.len().min((EMBEDDED_AT + EMBEDDED_LEN) as usize);
    let looked_at = head.get(EMBEDDED_AT as usize..end).unwrap_or_default();
    for bytes in [looked_at, declared] {
        if let Some(at) = bytes.windows(PARENT_NAME.len()).position(|window| window == PARENT_NAME) {
            let rest = &bytes[at + PARENT_NAME.len()..];
            return Err(names_parent(name, rest.split(|byte| *byte == b'\n').next().unwrap_or_default()));
        }
    }
    Ok(())
}

fn names_parent(file: &str, rest_of_line: &[u8]) -> FormatError {
    let name = printable(rest_of_line.strip_prefix(b"=").unwrap_or(rest_of_line).trim_ascii());
    FormatError::NamesOtherFile { file: file.to_owned(), role: "parent disk", name }
}

/// Reads a descriptor and gives its extent, if it has one and that is a flat file beside it.
fn parse_descriptor(name: &str, bytes: &[u8]) -> Result<FlatExtent, FormatError> {
    let wrong =
        |reason: &str| FormatError::WrongFormat { file: name.to_owned(), format: "vmdk", reason: reason.to_owned() };
    if bytes.starts_with(ESX_MAGIC) {
        return Err(FormatError::unsupported(name, "a sparse file of ESX (COWD)"));
    }
    if bytes.len() as u64 >= DESCRIPTOR_LEN_MAX {
        return Err(wrong("it is too long for a descriptor and does not begin like a sparse file"));
    }
    // It ends at its first NUL: a program that writes a shorter one over it leaves the end of what was there.
    let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    let text = std::str::from_utf8(text).map_err(|_| wrong("it is neither a sparse file nor text"))?;
    if !text.starts_with("# Disk DescriptorFile") {
        return Err(wrong("it begins neither like a sparse file nor like a descriptor"));
    }
    let mut create_type = None;
    let mut extents = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let place = || format!("descriptor, line {}", index + 1);
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if ["RW ", "RDONLY ", "NOACCESS "].iter().any(|access| line.starts_with(access)) {
            extents.push(parse_extent(name, &place(), line)?);
            continue;
        }
        let Some((key, value)) = line.split_once('=') else {
            return Err(FormatError::malformed(name, place(), format!("{} says nothing", printable(line.as_bytes()))));
        };
        let value = value.trim().trim_matches('"');
        match key.trim() {
            "createType" => create_type = Some(value.to_owned()),
            "parentFileNameHint" => return Err(names_parent(name, value.as_bytes())),
            "parentCID" if !value.eq_ignore_ascii_case(NO_PARENT) => {
                return Err(FormatError::unsupported(name, "a parent disk"));
            }
            _ => {}
        }
    }
    match create_type.as_deref() {
        Some("monolithicFlat" | "vmfs") => {}
        Some(other) => {
            let feature = format!("the type \"{}\" of VMDK", printable(other.as_bytes()));
            return Err(FormatError::unsupported(name, feature));
        }
        None => return Err(FormatError::malformed(name, "descriptor", "it says no createType")),
    }
    if extents.len() != 1 {
        let problem = format!("it has {} extents; a flat disk has one", extents.len());
        return Err(FormatError::malformed(name, "descriptor", problem));
    }
    Ok(extents.remove(0))
}

/// Reads `RW 4192256 FLAT "disk-flat.vmdk" 0`.
fn parse_extent(file: &str, place: &str, line: &str) -> Result<FlatExtent, FormatError> {
    let bad = |problem: String| FormatError::malformed(file, place, problem);
    let mut words = line.splitn(4, ' ');
    let (access, sectors, kind, rest) = (words.next(), words.next(), words.next(), words.next().unwrap_or_default());
    let sectors: Option<u64> = sectors.and_then(|sectors| sectors.parse().ok());
    let len = sectors.and_then(|sectors| sectors.checked_mul(SECTOR));
    let len = len
        .filter(|len| *len <= super::VIRTUAL_LEN_MAX)
        .ok_or_else(|| bad("its length is no sensible number".to_owned()))?;
    let mut parts = rest.split('"');
    let (before, named, after) = (parts.next(), parts.next(), parts.next());
    let (Some(before), Some(named), Some(after), None) = (before, named, after, parts.next()) else {
        return Err(bad("it names no file".to_owned()));
    };
    let refused = |problem: &str| FormatError::BadOtherFile {
        file: file.to_owned(),
        role: "extent",
        name: printable(named.as_bytes()),
        problem: problem.to_owned(),
    };
    if !named.ends_with("-flat.vmdk") || named.contains(['/', '\0']) {
        return Err(refused("only a file beside it whose name ends in \"-flat.vmdk\" is opened"));
    }
    if access != Some("RW") || !matches!(kind, Some("FLAT" | "VMFS")) || !before.is_empty() {
        return Err(bad(format!("{} is no flat extent", printable(line.as_bytes()))));
    }
    if !matches!(after.trim(), "" | "0") {
        return Err(refused("the disk does not begin where the file does"));
    }
    Ok(FlatExtent { name: named.to_owned(), len })
}

/// For fuzzing: looks at bytes as a descriptor and as a sparse file.
#[cfg(any(test, feature = "testbench"))]
pub(super) fn look_at_bytes(bytes: &[u8]) {
    if let Ok(extent) = parse_descriptor("descriptor", bytes) {
        assert!(!extent.name.contains('/') && extent.name.ends_with("-flat.vmdk"), "{extent:?}");
    }
    if check_sparse_header("sparse", bytes).is_ok() && check_embedded("sparse", bytes, bytes).is_ok() {
        assert!(!bytes.windows(PARENT_NAME.len()).any(|window| window == PARENT_NAME));
    }
}
