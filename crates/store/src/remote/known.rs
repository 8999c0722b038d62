//! Which records a remote store holds: its index, and a copy of it beside the store while an image is attached.
//!
//! The copy tells every process, with the network or without, which records are not lost but elsewhere.

use std::path::{Path, PathBuf};

use super::bucket::Client;
use super::error::RemoteError;
use super::layout::{self, RemoteIndex, RemotePlace};
use crate::error::{Result, StoreError};
use crate::name::Name;
use crate::store::Store;

/// The folder of a store that holds copies of indexes, in a folder for each remote store.
const FOLDER: &str = "remotes";
/// The file that says which remote store it is.
const ADDRESS_FILE: &str = "url";

/// The index of a remote store.
pub(super) struct Known {
    pub indexes: Vec<(String, RemoteIndex)>,
}

impl Known {
    /// Reads the index of a remote store, from the copy in `folder` where there is one, which is brought up to date.
    pub fn load(client: &Client, folder: Option<&Path>) -> Result<Self, RemoteError> {
        let listed = client.list(layout::INDEX)?;
        let mut indexes = Vec::with_capacity(listed.len());
        for object in listed {
            let path = layout::path(layout::INDEX, &object.name);
            let copy = folder.map(|folder| folder.join(&object.name));
            let kept = copy.as_ref().and_then(|copy| std::fs::read(copy).ok());
            let kept = kept.and_then(|bytes| RemoteIndex::from_object(&path, &bytes).ok());
            let index = match kept {
                Some(index) => index,
                None => {
                    let bytes = match client.find(&path)? {
                        Some(bytes) => bytes,
                        // A collection has put another in its place.
                        None => return Known::load(client, folder),
                    };
                    let index = RemoteIndex::from_object(&path, &bytes)?;
                    copy.map_or(Ok(()), |copy| write(&copy, &bytes))?;
                    index
                }
            };
            indexes.push((object.name, index));
        }
        if let Some(folder) = folder {
            for name in files(folder)? {
                if name != ADDRESS_FILE && !indexes.iter().any(|(known, _)| *known == name) {
                    let path = folder.join(&name);
                    std::fs::remove_file(&path).map_err(StoreError::file("remove", &path))?;
                }
            }
        }
        Ok(Known { indexes })
    }

    /// Where copies of a record are.
    pub fn find(&self, name: &Name) -> impl Iterator<Item = RemotePlace> {
        self.indexes.iter().flat_map(|(_, index)| index.find(name))
    }
}

/// The folder for a remote store's index, made if it is not there.
pub(super) fn folder_of(store: &Store, url: &str) -> Result<PathBuf> {
    let folder = store.folder().join(FOLDER).join(&blake3::hash(url.as_bytes()).to_hex()[..32]);
    std::fs::create_dir_all(&folder).map_err(StoreError::file("make", &folder))?;
    write(&folder.join(ADDRESS_FILE), url.as_bytes())?;
    Ok(folder)
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let making = path.with_extension("making");
    std::fs::write(&making, bytes)
        .and_then(|()| std::fs::rename(&making, path))
        .map_err(StoreError::file("write", path))
}

fn files(folder: &Path) -> Result<Vec<String>> {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(StoreError::file("list", folder)(error)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(StoreError::file("list", folder))?;
        names.extend(entry.file_name().into_string().ok());
    }
    Ok(names)
}

/// The addresses of the remote stores that a store has attached images of.
pub fn attached(store: &Store) -> Result<Vec<String>> {
    let folder = store.folder().join(FOLDER);
    let mut urls = Vec::new();
    for name in files(&folder)? {
        let path = folder.join(name).join(ADDRESS_FILE);
        urls.push(std::fs::read_to_string(&path).map_err(StoreError::file("read", &path))?);
    }
    Ok(urls)
}

/// Forgets a remote store: what only it holds counts as lost from now on, until an image of it is attached again.
pub fn detach(store: &Store, url: &str) -> Result<()> {
    let folder = folder_of(store, url)?;
    std::fs::remove_dir_all(&folder).map_err(StoreError::file("remove", &folder))
}

/// The records that a store can have from remote stores of which images are attached.
pub(crate) struct KnownElsewhere(Vec<RemoteIndex>);

impl KnownElsewhere {
    pub fn load(store: &Store) -> Result<Self> {
        let folder = store.folder().join(FOLDER);
        let mut indexes = Vec::new();
        for remote in files(&folder)? {
            let folder = folder.join(remote);
            for name in files(&folder)?.iter().filter(|name| *name != ADDRESS_FILE) {
                let path = folder.join(name);
                let bytes = std::fs::read(&path).map_err(StoreError::file("read", &path))?;
                match RemoteIndex::from_object(name, &bytes) {
                    Ok(index) => indexes.push(index),
                    Err(error) => tracing::warn!(%error, path = %path.display(), "attached images may seem incomplete"),
                }
            }
        }
        Ok(KnownElsewhere(indexes))
    }

    pub fn contains(&self, name: &Name) -> bool {
        self.0.iter().any(|index| index.find(name).next().is_some())
    }
}
