//! The names: directories in memory until all is known.
//!
//! Nothing is ever followed: a symbolic link is content, and a path that goes through one is an error. So no archive can reach
//! outside its own tree.

use super::inode::Kind;
use std::collections::BTreeMap;

/// The longest path, in bytes, as in Linux.
pub(super) const PATH_LEN_MAX: usize = 4096;
/// The longest name.
const NAME_LEN_MAX: usize = 255;

/// An inode's place in the list of inodes.
pub(super) type NodeIndex = u32;

/// A directory: its parent and what it holds.
#[derive(Debug)]
pub(super) struct Directory {
    pub(super) parent: NodeIndex,
    pub(super) entries: BTreeMap<Box<[u8]>, NodeIndex>,
}

/// The components of a path, which `.` and empty ones are not; says what is wrong with it.
pub(super) fn components(path: &[u8]) -> Result<Vec<&[u8]>, String> {
    if path.len() > PATH_LEN_MAX {
        return Err(format!("its path has {} bytes; at most {PATH_LEN_MAX} are possible", path.len()));
    }
    if path.contains(&0) {
        return Err("its path contains a zero byte".to_owned());
    }
    let parts: Vec<&[u8]> = path.split(|byte| *byte == b'/').filter(|part| !matches!(*part, b"" | b".")).collect();
    if parts.contains(&&b".."[..]) {
        return Err("its path contains \"..\"".to_owned());
    }
    match parts.iter().find(|part| part.len() > NAME_LEN_MAX) {
        Some(long) => Err(format!("its path has a name of {} bytes; at most {NAME_LEN_MAX} are possible", long.len())),
        None => Ok(parts),
    }
}

/// Why a path through something that is no directory leads nowhere.
pub(super) fn not_a_directory(name: &[u8], kind: Kind) -> String {
    let name = super::super::error::printable(name);
    match kind {
        Kind::Symlink => format!("its path goes through the symbolic link {name}, and links are not followed"),
        _ => format!("its path goes through {name}, which is no directory"),
    }
}
