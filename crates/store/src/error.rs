//! What can go wrong in the store, in the words of who asked.

use std::io;
use std::path::{Path, PathBuf};

use crate::name::Name;

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("cannot {act} {path}", path = path.display())]
    File { act: &'static str, path: PathBuf, source: io::Error },
    #[error("the store's catalog cannot be read or written")]
    Catalog(#[from] rusqlite::Error),
    #[error("{path} has format {found}, which this release does not know (it knows {known})", path = path.display())]
    UnknownFormat { path: PathBuf, found: u32, known: u32 },
    #[error("{path} is damaged at byte {offset}: {what}", path = path.display())]
    Damaged { path: PathBuf, offset: u64, what: String },
    #[error("chunk {name} is missing from the store")]
    Missing { name: Name },
    #[error("there is no {what} {name}")]
    NotFound { what: &'static str, name: String },
    #[error("there is a {what} {name} already")]
    Exists { what: &'static str, name: String },
    #[error(
        "{name:?} is no name for a {what}: use up to 128 letters, digits, '-', '_' and '.', starting with a letter or digit"
    )]
    BadName { what: &'static str, name: String },
    #[error("{what} {name} is in use by process {process}")]
    InUse { what: &'static str, name: String, process: String },
    #[error("a volume of {bytes} bytes is not possible: {why}")]
    BadSize { bytes: u64, why: &'static str },
    #[error("bytes {offset} to {end} are not whole sectors inside the volume of {capacity_bytes} bytes")]
    OutOfRange { offset: u64, end: u64, capacity_bytes: u64 },
    #[error("the disk cannot be brought into the store")]
    Format(#[from] crate::format::FormatError),
    #[error("domain {domain} is locked: {why}")]
    Locked { domain: String, why: String },
    #[error("{what} is in domain {domain}: what is encrypted does not leave its store")]
    Encrypted { what: String, domain: String },
    #[error("{0}")]
    Refused(String),
    #[error(transparent)]
    Remote(#[from] crate::remote::RemoteError),
    #[error("an earlier write to {path} failed, so that nothing after it can be promised", path = path.display())]
    Broken { path: PathBuf },
}

pub type Result<T, E = StoreError> = std::result::Result<T, E>;

impl StoreError {
    pub(crate) fn file(act: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
        let path = path.to_path_buf();
        move |source| StoreError::File { act, path, source }
    }

    /// Whether the host has no room left.
    pub fn is_no_space(&self) -> bool {
        match self {
            StoreError::File { source, .. } => {
                matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
            }
            StoreError::Catalog(error) => error.sqlite_error().is_some_and(|error| {
                // The catalog's shared memory is a file as well.
                error.code == rusqlite::ErrorCode::DiskFull
                    || error.extended_code == rusqlite::ffi::SQLITE_IOERR_SHMSIZE
            }),
            _ => false,
        }
    }
}
