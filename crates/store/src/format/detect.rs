//! What a file looks like, for hints.

use super::Format;
use super::error::{FormatError, file_name};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// The format that a file's first and last bytes are those of; raw where nothing is known.
///
/// Who may call it: code that words a hint for a person ("this looks like qcow2: say `--format qcow2`"), and tests. Never to
/// decide how a file is read: a guest writes its raw disk as it likes, a qcow2 header among it, and that header names files of
/// the host.
pub fn looks_like(path: &Path) -> Result<Format, FormatError> {
    let name = file_name(path);
    let failed = |error| FormatError::io(&name, "look at it", error);
    let status = std::fs::metadata(path).map_err(failed)?;
    if !status.is_file() {
        return Ok(Format::Raw);
    }
    let file = File::open(path).map_err(failed)?;
    let mut head = [0; 512];
    let head_len = file.read_at(&mut head, 0).map_err(failed)?;
    let head = &head[..head_len];
    // A fixed VHD has its only mark in the last sector.
    let mut tail = [0; 8];
    let has_tail = status.len() >= 512 && file.read_exact_at(&mut tail, status.len() - 512).is_ok();
    let at = |offset: usize, magic: &[u8]| head.get(offset..).is_some_and(|rest| rest.starts_with(magic));
    Ok(if at(0, b"QFI\xfb") {
        Format::Qcow2
    } else if at(0, b"KDMV") || at(0, b"COWD") || at(0, b"# Disk DescriptorFile") {
        Format::Vmdk
    } else if at(0, b"vhdxfile") {
        Format::Vhdx
    } else if at(64, &0xbeda_107f_u32.to_le_bytes()) {
        Format::Vdi
    } else if at(0, b"conectix") || (has_tail && &tail == b"conectix") {
        Format::Vpc
    } else {
        Format::Raw
    })
}
