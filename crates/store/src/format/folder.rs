//! A folder of the host becomes an ext4 disk.
//!
//! The tree is walked from open folder to open folder, never through a symbolic link, so that whoever changes it meanwhile changes
//! what is copied but not where it comes from. What is mounted inside appears as an empty folder.

use super::error::{FormatError, file_name, printable};
use super::ext4::{Attributes, Entry, Ext4Options, Ext4Writer, Time};
use super::import::Imported;
use super::{Content, RawSource, Source, Target};
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;
use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

/// Folders inside one another that are walked, at most: each is open.
pub const FOLDER_DEPTH_MAX: usize = 256;
/// Bytes of a file that are read at once.
const PIECE_LEN: u64 = 256 << 10;
/// The longest list of names of extended attributes, and the longest value, as in Linux.
const XATTR_LEN_MAX: usize = 64 << 10;
/// What is kept of extended attributes; others belong to the file system that has them.
const XATTR_NAMES: [&[u8]; 4] = [b"user.", b"trusted.", b"security.", b"system.posix_acl_"];

/// A folder on the way down: its handle, its path in the tree, and the names that are still to come, the next one last.
struct Level {
    folder: OwnedFd,
    path: Vec<u8>,
    names: Vec<CString>,
}

/// What is the same for all of a walk.
struct Walk<'a, 'b> {
    writer: Ext4Writer<'b>,
    name: &'a str,
    device: u64,
    /// Files with several names, by device and inode, and the first of their names.
    seen: HashMap<(u64, u64), Vec<u8>>,
}

/// Makes an ext4 file system of a folder and everything in it: owners, permissions, times, links, devices, holes and extended
/// attributes as they are on the host.
pub fn folder_to_ext4(path: &Path, target: &mut dyn Target, options: Ext4Options) -> Result<Imported, FormatError> {
    let name = file_name(path);
    let fail = |act: &str, error: Errno| FormatError::io(&name, act, error);
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(path, flags, Mode::empty()).map_err(|error| fail("open it", error))?;
    let status = rustix::fs::fstat(&root).map_err(|error| fail("look at it", error))?;
    let mut walk = Walk {
        writer: Ext4Writer::new(target, &name, options)?,
        name: &name,
        device: status.st_dev,
        seen: HashMap::new(),
    };
    let attributes = walk.attributes(&status, b"", &XattrsOf::Open(&root))?;
    walk.writer.add(b"", &attributes, Entry::Directory)?;
    let mut levels = vec![walk.level(root, Vec::new())?];
    while let Some(level) = levels.last_mut() {
        let Some(entry) = level.names.pop() else {
            levels.pop();
            continue;
        };
        if let Some(below) = walk.entry(level, &entry)? {
            if levels.len() == FOLDER_DEPTH_MAX {
                let (what, limit) = ("the depth of folders inside one another", FOLDER_DEPTH_MAX as u64);
                return Err(FormatError::TooLarge { file: name.clone(), what, value: limit + 1, limit });
            }
            levels.push(below);
        }
    }
    Ok(Imported { file_system: walk.writer.finish()?, access_lists_left_out: 0 })
}

/// Whose extended attributes are asked for.
enum XattrsOf<'a> {
    Open(&'a OwnedFd),
    /// By a path whose last part is not followed: links and devices cannot be opened.
    Path(String),
}

impl XattrsOf<'_> {
    fn list(&self, into: &mut [u8]) -> Result<usize, Errno> {
        match self {
            XattrsOf::Open(file) => rustix::fs::flistxattr(file, into),
            XattrsOf::Path(path) => rustix::fs::llistxattr(path, into),
        }
    }

    fn get(&self, name: &CStr, into: &mut [u8]) -> Result<usize, Errno> {
        match self {
            XattrsOf::Open(file) => rustix::fs::fgetxattr(file, name, into),
            XattrsOf::Path(path) => rustix::fs::lgetxattr(path, name, into),
        }
    }
}

impl Walk<'_, '_> {
    fn fail(&self, act: &str, path: &[u8], error: Errno) -> FormatError {
        FormatError::io(self.name, format!("{act} {}", printable(path)), error)
    }

    /// Reads the names in a folder.
    fn level(&self, folder: OwnedFd, path: Vec<u8>) -> Result<Level, FormatError> {
        let entries = Dir::read_from(&folder).map_err(|error| self.fail("read the folder", &path, error))?;
        let mut names = Vec::new();
        for entry in entries {
            let entry = entry.map_err(|error| self.fail("read the folder", &path, error))?;
            if !matches!(entry.file_name().to_bytes(), b"." | b"..") {
                names.push(entry.file_name().to_owned());
            }
        }
        // The same disk whatever order the host has them in.
        names.sort_by(|one, other| other.cmp(one));
        Ok(Level { folder, path, names })
    }

    /// Adds one entry; gives the folder to go into.
    fn entry(&mut self, level: &Level, name: &CStr) -> Result<Option<Level>, FormatError> {
        let mut path = level.path.clone();
        path.push(b'/');
        path.extend_from_slice(name.to_bytes());
        let status = match rustix::fs::statat(&level.folder, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(status) => status,
            // It went away meanwhile.
            Err(Errno::NOENT) => return Ok(None),
            Err(error) => return Err(self.fail("look at", &path, error)),
        };
        let kind = FileType::from_raw_mode(status.st_mode);
        if kind != FileType::Directory && status.st_nlink > 1 {
            if let Some(first) = self.seen.get(&(status.st_dev, status.st_ino)) {
                self.writer.add(&path, &Attributes::default(), Entry::HardLink { target: first })?;
                return Ok(None);
            }
            self.seen.insert((status.st_dev, status.st_ino), path.clone());
        }
        let by_path = || {
            let name = name.to_str().ok()?;
            Some(XattrsOf::Path(format!("/proc/self/fd/{}/{name}", level.folder.as_fd().as_raw_fd())))
        };
        let open = |flags| {
            rustix::fs::openat(
                &level.folder,
                name,
                flags | OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC,
                Mode::empty(),
            )
        };
        match kind {
            FileType::Directory => {
                let folder = open(OFlags::DIRECTORY).map_err(|error| self.fail("open", &path, error))?;
                let attributes = self.attributes(&status, &path, &XattrsOf::Open(&folder))?;
                self.writer.add(&path, &attributes, Entry::Directory)?;
                return match status.st_dev == self.device {
                    true => self.level(folder, path).map(Some),
                    false => Ok(None),
                };
            }
            FileType::RegularFile => {
                let file = open(OFlags::NONBLOCK).map_err(|error| self.fail("open", &path, error))?;
                let status = rustix::fs::fstat(&file).map_err(|error| self.fail("look at", &path, error))?;
                let attributes = self.attributes(&status, &path, &XattrsOf::Open(&file))?;
                let source = RawSource::from_file(file, format!("{}{}", self.name, printable(&path)))?;
                self.writer.add(&path, &attributes, Entry::File { len: source.len() })?;
                self.content(&source)?;
                return Ok(None);
            }
            _ => {}
        }
        let attributes = match by_path() {
            Some(xattrs) => self.attributes(&status, &path, &xattrs)?,
            None => attributes_without_xattrs(&status),
        };
        let (major, minor) = (rustix::fs::major(status.st_rdev), rustix::fs::minor(status.st_rdev));
        let text;
        let entry = match kind {
            FileType::Symlink => {
                let read = rustix::fs::readlinkat(&level.folder, name, Vec::new());
                text = read.map_err(|error| self.fail("read the link", &path, error))?;
                Entry::Symlink { text: text.as_bytes() }
            }
            FileType::Fifo => Entry::Fifo,
            FileType::Socket => Entry::Socket,
            FileType::CharacterDevice => Entry::Character { major, minor },
            FileType::BlockDevice => Entry::Block { major, minor },
            _ => return Err(self.fail("understand", &path, Errno::NOSYS)),
        };
        self.writer.add(&path, &attributes, entry)?;
        Ok(None)
    }

    fn content(&mut self, source: &RawSource) -> Result<(), FormatError> {
        let mut piece = Vec::new();
        let mut at = 0;
        while at < source.len() {
            let extent = source.extent_at(at, u64::MAX)?;
            let end = at + extent.len;
            while at < end && extent.content == Content::Data {
                piece.resize((end - at).min(PIECE_LEN) as usize, 0);
                source.read_at(at, &mut piece)?;
                self.writer.write(at, &piece)?;
                at += piece.len() as u64;
            }
            at = end;
        }
        Ok(())
    }

    fn attributes(&self, status: &Stat, path: &[u8], xattrs: &XattrsOf<'_>) -> Result<Attributes, FormatError> {
        let mut attributes = attributes_without_xattrs(status);
        let mut names = vec![0; XATTR_LEN_MAX];
        let len = match xattrs.list(&mut names) {
            Ok(len) => len,
            Err(Errno::OPNOTSUPP) => 0,
            Err(error) => return Err(self.fail("read the extended attributes of", path, error)),
        };
        for name in
            names[..len].split_inclusive(|byte| *byte == 0).filter_map(|name| CStr::from_bytes_with_nul(name).ok())
        {
            if !XATTR_NAMES.iter().any(|prefix| name.to_bytes().starts_with(prefix)) {
                continue;
            }
            let mut value = vec![0; XATTR_LEN_MAX];
            match xattrs.get(name, &mut value) {
                Ok(len) => value.truncate(len),
                // It went away meanwhile.
                Err(Errno::NODATA) => continue,
                Err(error) => return Err(self.fail("read the extended attributes of", path, error)),
            }
            attributes.xattrs.push((name.to_bytes().to_vec(), value));
        }
        attributes.xattrs.sort();
        Ok(attributes)
    }
}

fn attributes_without_xattrs(status: &Stat) -> Attributes {
    let time = |seconds: i64, nanoseconds: u64| Time { seconds, nanoseconds: nanoseconds as u32 };
    Attributes {
        permissions: (status.st_mode & 0o7777) as u16,
        user: status.st_uid,
        group: status.st_gid,
        modified: time(status.st_mtime, status.st_mtime_nsec),
        accessed: Some(time(status.st_atime, status.st_atime_nsec)),
        changed: Some(time(status.st_ctime, status.st_ctime_nsec)),
        xattrs: Vec::new(),
    }
}
