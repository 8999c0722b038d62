//! Opening an image with the files that it stands on.
//!
//! A guest can have written any header, and a header names files of the host. So names are followed only where the caller
//! says so, and then only downwards from the folder of the image; the format of a named file comes from the header, never from
//! the file.

use super::super::error::{FormatError, file_name, printable};
use super::super::{RawSource, Source};
use super::header::{Header, OtherFile};
use super::image::Qcow2;
use rustix::fs::{Mode, OFlags};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

/// Images that may stand on one another, at most.
pub const CHAIN_LEN_MAX: usize = 256;

/// What to do with names of other files in a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OtherFiles {
    /// An image that names one is refused.
    #[default]
    Refused,
    /// They are opened if they lie in the image's folder or below, reached without a symbolic link and without `..`.
    InFolder,
}

/// How an image is opened.
#[derive(Default)]
pub struct OpenOptions {
    /// The snapshot to read instead of the disk as it is now, by name or id.
    pub snapshot: Option<String>,
    /// Whether names in headers are followed.
    pub other_files: OtherFiles,
    /// What to use as the backing file, whatever its name is in the header.
    pub backing: Option<Arc<dyn Source>>,
    /// What to use as the data file, whatever its name is in the header.
    pub data_file: Option<Arc<dyn Source>>,
}

/// An image of the chain whose tables were not yet looked at.
struct Link {
    file: Arc<RawSource>,
    header: Header,
    data_file: Option<Arc<dyn Source>>,
}

impl Qcow2 {
    /// Opens an image and, as `options` allow, what it stands on.
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Qcow2, FormatError> {
        let mut file = Arc::new(RawSource::open(path)?);
        let folder_path = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let folder_name = file_name(folder_path);
        let folder_flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let mut folder = rustix::fs::open(folder_path, folder_flags, Mode::empty())
            .map_err(|error| FormatError::io(&folder_name, "open it", error))?;
        let mut seen = Vec::new();
        let mut links: Vec<Link> = Vec::new();
        let mut bottom: Option<Arc<dyn Source>> = options.backing.clone();
        loop {
            if seen.contains(&file.identity()) {
                let problem = format!("the chain of backing files comes back to {}", file.name());
                return Err(FormatError::malformed(links[0].file.name(), "header, backing file name", problem));
            }
            if links.len() == CHAIN_LEN_MAX {
                let what = "the number of images in its backing chain";
                let (value, limit) = (CHAIN_LEN_MAX as u64 + 1, CHAIN_LEN_MAX as u64);
                return Err(FormatError::TooLarge { file: links[0].file.name().to_owned(), what, value, limit });
            }
            seen.push(file.identity());
            let header = Header::read(&file)?;
            let top = links.is_empty();
            let data_file = match &header.data_file {
                None => None,
                Some(_) if top && options.data_file.is_some() => options.data_file.clone(),
                Some(other) => {
                    let (_, data) = follow(&file, &folder, folder_path, other, "data file", options.other_files)?;
                    Some(Arc::new(data) as Arc<dyn Source>)
                }
            };
            let backing = header.backing.clone();
            links.push(Link { file: file.clone(), header, data_file });
            if top && options.backing.is_some() {
                if backing.is_none() {
                    let problem = "a backing file was given, and the image names none";
                    return Err(FormatError::malformed(file.name(), "header, backing file name", problem));
                }
                break;
            }
            let Some(other) = backing else { break };
            let (below, found) = follow(&file, &folder, folder_path, &other, "backing file", options.other_files)?;
            match other.format.as_deref() {
                Some(b"qcow2") => (file, folder) = (Arc::new(found), below),
                Some(b"raw") => {
                    bottom = Some(Arc::new(found));
                    break;
                }
                Some(format) => {
                    let feature = format!("a backing file in the format \"{}\"", printable(format));
                    return Err(FormatError::unsupported(file.name(), feature));
                }
                None => {
                    let problem = "the header does not say in which format it is, which polder never guesses \
                                   (`qemu-img rebase -u -b NAME -F FORMAT` writes it down)";
                    return Err(bad_other(&file, "backing file", &other.name, problem.to_owned()));
                }
            }
        }
        let mut image: Option<Qcow2> = None;
        for (index, link) in links.into_iter().enumerate().rev() {
            let backing = match image.take() {
                Some(image) => Some(Arc::new(image) as Arc<dyn Source>),
                None => bottom.take(),
            };
            let snapshot = options.snapshot.as_deref().filter(|_| index == 0);
            image = Some(Qcow2::new(link.file, link.header, snapshot, backing, link.data_file)?);
        }
        Ok(image.expect("a chain has at least one image"))
    }
}

fn bad_other(file: &RawSource, role: &'static str, name: &[u8], problem: String) -> FormatError {
    FormatError::BadOtherFile { file: file.name().to_owned(), role, name: printable(name), problem }
}

/// Opens a file that a header names, and the folder that it lies in.
fn follow(
    file: &RawSource,
    folder: &OwnedFd,
    folder_path: &Path,
    other: &OtherFile,
    role: &'static str,
    allowed: OtherFiles,
) -> Result<(OwnedFd, RawSource), FormatError> {
    let name = &other.name[..];
    if allowed == OtherFiles::Refused {
        return Err(FormatError::NamesOtherFile { file: file.name().to_owned(), role, name: printable(name) });
    }
    let bad = |problem: String| bad_other(file, role, name, problem);
    let mut relative = name;
    if name.starts_with(b"/") {
        // `qemu-img create -b` is mostly given whole paths.
        let prefix = [folder_path.as_os_str().as_bytes(), b"/"].concat();
        relative = name
            .strip_prefix(&prefix[..])
            .ok_or_else(|| bad(format!("only files in {} or below are opened", folder_path.display())))?;
    }
    let mut parts: Vec<&[u8]> =
        relative.split(|byte| *byte == b'/').filter(|part| !matches!(*part, b"" | b".")).collect();
    if parts.contains(&&b".."[..]) {
        return Err(bad("a name with \"..\" is not followed".to_owned()));
    }
    let last = parts.pop().ok_or_else(|| bad("that is no file's name".to_owned()))?;
    let fail = |error: rustix::io::Errno| bad(format!("it cannot be opened without following links: {error}"));
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let mut parent = rustix::io::fcntl_dupfd_cloexec(folder, 0).map_err(fail)?;
    for part in parts {
        parent = rustix::fs::openat(&parent, part, flags | OFlags::DIRECTORY, Mode::empty()).map_err(fail)?;
    }
    let found = rustix::fs::openat(&parent, last, flags | OFlags::NONBLOCK, Mode::empty()).map_err(fail)?;
    let source = RawSource::from_file(found, printable(name))?;
    Ok((parent, source))
}
