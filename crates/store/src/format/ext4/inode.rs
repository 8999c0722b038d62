//! An inode: what a file is but for its name.

use super::checksum::crc32c;
use super::extent::Extent;
use super::layout::INODE_LEN;

/// The file's blocks are named by extents.
const USES_EXTENTS: u32 = 0x8_0000;
/// Bytes of an inode behind the first 128 that are in use.
const EXTRA_LEN: u16 = 32;

/// A point in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Time {
    /// Seconds since 1970.
    pub seconds: i64,
    /// And nanoseconds.
    pub nanoseconds: u32,
}

impl Time {
    /// As the disk has it: 34 bits of seconds from 1901 to 2446; what lies outside becomes the nearest.
    fn on_disk(self) -> (u32, u32) {
        let (min, max) = (i64::from(i32::MIN), i64::from(i32::MAX) + (3 << 32));
        let (seconds, nanoseconds) = match self.seconds {
            seconds if seconds < min => (min, 0),
            seconds if seconds > max => (max, 0),
            seconds => (seconds, self.nanoseconds.min(999_999_999)),
        };
        let epoch = (seconds - i64::from(seconds as i32)) >> 32;
        (seconds as u32, nanoseconds << 2 | epoch as u32 & 3)
    }
}

/// Who owns a file, who may use it, and when that was said.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Attributes {
    /// Permissions with set-user-id, set-group-id and sticky bit: the low twelve bits of the mode.
    pub permissions: u16,
    /// The owner.
    pub user: u32,
    /// The owner's group.
    pub group: u32,
    /// When the content was changed.
    pub modified: Time,
    /// When it was read; without it, when it was changed.
    pub accessed: Option<Time>,
    /// When owner or permissions were changed; without it, when the content was.
    pub changed: Option<Time>,
    /// Extended attributes, by whole name.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// What an inode is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Fifo,
    Character { major: u32, minor: u32 },
    Directory,
    Block { major: u32, minor: u32 },
    File,
    Symlink,
    Socket,
}

impl Kind {
    pub(super) fn mode(self) -> u16 {
        match self {
            Kind::Fifo => 0o010000,
            Kind::Character { .. } => 0o020000,
            Kind::Directory => 0o040000,
            Kind::Block { .. } => 0o060000,
            Kind::File => 0o100000,
            Kind::Symlink => 0o120000,
            Kind::Socket => 0o140000,
        }
    }

    /// The number in directory entries.
    pub(super) fn file_type(self) -> u8 {
        match self {
            Kind::File => 1,
            Kind::Directory => 2,
            Kind::Character { .. } => 3,
            Kind::Block { .. } => 4,
            Kind::Fifo => 5,
            Kind::Socket => 6,
            Kind::Symlink => 7,
        }
    }
}

/// An inode in memory, until it is written.
#[derive(Debug, Clone)]
pub(super) struct Inode {
    pub(super) kind: Kind,
    pub(super) permissions: u16,
    pub(super) user: u32,
    pub(super) group: u32,
    pub(super) modified: Time,
    pub(super) accessed: Time,
    pub(super) changed: Time,
    pub(super) len: u64,
    pub(super) links: u32,
    pub(super) extents: Vec<Extent>,
    /// A symbolic link's text, if it is short enough to lie in the inode.
    pub(super) text: Box<[u8]>,
    /// The block with the extended attributes; 0 for none.
    pub(super) xattr_block: u64,
}

/// The checksum that everything of an inode goes on from.
pub(super) fn seed(file_system_seed: u32, number: u32) -> u32 {
    const GENERATION: [u8; 4] = [0; 4];
    crc32c(crc32c(file_system_seed, &number.to_le_bytes()), &GENERATION)
}

impl Inode {
    /// Its bytes in the inode table. `root` is the root of the tree of extents, for files that have one; `blocks` counts the blocks
    /// that it takes, those of the tree among them.
    pub(super) fn bytes(&self, inode_seed: u32, root: Option<&[u8; 60]>, blocks: u64) -> Vec<u8> {
        let mut bytes = vec![0; INODE_LEN as usize];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        let (accessed, accessed_extra) = self.accessed.on_disk();
        let (changed, changed_extra) = self.changed.on_disk();
        let (modified, modified_extra) = self.modified.on_disk();
        let sectors = blocks * 8;
        // More subdirectories than the field can count are shown as one (dir_nlink).
        let links = if self.links > 65_000 { 1 } else { self.links as u16 };
        put(0x00, &(self.kind.mode() | self.permissions & 0o7777).to_le_bytes());
        put(0x02, &(self.user as u16).to_le_bytes());
        put(0x04, &(self.len as u32).to_le_bytes());
        put(0x08, &accessed.to_le_bytes());
        put(0x0c, &changed.to_le_bytes());
        put(0x10, &modified.to_le_bytes());
        put(0x18, &(self.group as u16).to_le_bytes());
        put(0x1a, &links.to_le_bytes());
        put(0x1c, &(sectors as u32).to_le_bytes());
        put(0x20, &(if root.is_some() { USES_EXTENTS } else { 0 }).to_le_bytes());
        match (root, self.kind) {
            (Some(root), _) => put(0x28, root),
            (None, Kind::Character { major, minor } | Kind::Block { major, minor }) => {
                if major < 256 && minor < 256 {
                    put(0x28, &(major << 8 | minor).to_le_bytes());
                } else {
                    put(0x2c, &(minor & 0xff | major << 8 | (minor & !0xff) << 12).to_le_bytes());
                }
            }
            (None, _) => put(0x28, &self.text),
        }
        put(0x68, &(self.xattr_block as u32).to_le_bytes());
        put(0x6c, &((self.len >> 32) as u32).to_le_bytes());
        put(0x74, &((sectors >> 32) as u16).to_le_bytes());
        put(0x76, &((self.xattr_block >> 32) as u16).to_le_bytes());
        put(0x78, &((self.user >> 16) as u16).to_le_bytes());
        put(0x7a, &((self.group >> 16) as u16).to_le_bytes());
        put(0x80, &EXTRA_LEN.to_le_bytes());
        put(0x84, &changed_extra.to_le_bytes());
        put(0x88, &modified_extra.to_le_bytes());
        put(0x8c, &accessed_extra.to_le_bytes());
        put(0x90, &modified.to_le_bytes());
        put(0x94, &modified_extra.to_le_bytes());
        let sum = crc32c(inode_seed, &bytes);
        bytes[0x7c..0x7e].copy_from_slice(&(sum as u16).to_le_bytes());
        bytes[0x82..0x84].copy_from_slice(&((sum >> 16) as u16).to_le_bytes());
        bytes
    }
}
