//! Which records a remote store holds: its index, and a copy of it beside the store while an image is attached.
//!
//! The copy tells every process, with the network or without, which records are not lost but elsewhere.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::address::{ADDRESS_FILE, FOLDER, RemoteAddress};
use super::bucket::Client;
use super::error::RemoteError;
use super::layout::{self, RemoteIndex, RemotePlace};
use crate::error::{Result, StoreError};
use crate::id::Id;
use crate::name::Name;
use crate::node::Tree;
use crate::store::{Local, Store};
use crate::tree::{self, Visit};
use crate::upkeep::mark::Marks;

/// How a file is called while it is written.
const MAKING: &str = "making";
/// How often a folder is looked through that another process changes meanwhile.
const LOOKS_MAX: usize = 10;

/// The index of a remote store.
#[derive(Default)]
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
            for name in index_files(folder)? {
                if !indexes.iter().any(|(known, _)| *known == name) {
                    let path = folder.join(&name);
                    match std::fs::remove_file(&path) {
                        Err(error) if error.kind() != ErrorKind::NotFound => {
                            return Err(StoreError::file("remove", &path)(error).into());
                        }
                        _ => {}
                    }
                }
            }
        }
        Ok(Known { indexes })
    }

    /// The copy in a folder, as it is.
    pub fn kept(folder: &Path) -> Result<Self> {
        let mut looks = 0;
        'look: loop {
            looks += 1;
            let mut indexes = Vec::new();
            for name in index_files(folder)? {
                let path = folder.join(&name);
                let bytes = match std::fs::read(&path) {
                    // Another process has brought the folder up to date.
                    Err(error) if error.kind() == ErrorKind::NotFound && looks < LOOKS_MAX => continue 'look,
                    read => read.map_err(StoreError::file("read", &path))?,
                };
                match RemoteIndex::from_object(&name, &bytes) {
                    Ok(index) => indexes.push((name, index)),
                    Err(error) => tracing::warn!(%error, path = %path.display(), "attached images may seem incomplete"),
                }
            }
            return Ok(Known { indexes });
        }
    }

    /// Where copies of a record are.
    pub fn find(&self, name: &Name) -> impl Iterator<Item = RemotePlace> {
        self.indexes.iter().flat_map(|(_, index)| index.find(name))
    }
}

/// The folder for a remote store's index, made if it is not there.
pub(super) fn make_folder(store: &Store, address: &RemoteAddress) -> Result<PathBuf> {
    let folder = address.folder_in(store);
    std::fs::create_dir_all(&folder).map_err(StoreError::file("make", &folder))?;
    write(&folder.join(ADDRESS_FILE), address.to_text().as_bytes())?;
    Ok(folder)
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    // Several threads and processes may bring the same.
    let making = path.with_extension(format!("{}.{MAKING}", Id::random()));
    std::fs::write(&making, bytes)
        .and_then(|()| std::fs::rename(&making, path))
        .map_err(StoreError::file("write", path))
}

fn files(folder: &Path) -> Result<Vec<String>> {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(StoreError::file("list", folder)(error)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(StoreError::file("list", folder))?;
        names.extend(entry.file_name().into_string().ok());
    }
    Ok(names)
}

fn index_files(folder: &Path) -> Result<Vec<String>> {
    let mut names = files(folder)?;
    names.retain(|name| name != ADDRESS_FILE && !name.ends_with(MAKING));
    Ok(names)
}

/// The remote stores that the store in a folder has attached images of.
pub fn attached(folder: &Path) -> Result<Vec<RemoteAddress>> {
    let folder = folder.join(FOLDER);
    let mut addresses = Vec::new();
    for name in files(&folder)? {
        let path = folder.join(name).join(ADDRESS_FILE);
        match std::fs::read_to_string(&path) {
            Ok(text) => addresses.push(RemoteAddress::from_text(&text)),
            // It is being made, or removed.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(StoreError::file("read", &path)(error)),
        }
    }
    addresses.sort_by(|a, b| (&a.url, &a.endpoint).cmp(&(&b.url, &b.endpoint)));
    Ok(addresses)
}

/// Forgets a remote store: what only it holds counts as lost from now on, until an image of it is attached again.
pub fn detach(store: &Store, address: &RemoteAddress) -> Result<()> {
    let folder = address.folder_in(store);
    match std::fs::remove_dir_all(&folder) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(StoreError::file("remove", &folder)(error)),
        _ => Ok(()),
    }
}

/// How much of something is in the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Locality {
    Whole,
    /// The rest is in a remote store.
    Part {
        /// Of its disks and files, in whole chunks.
        local_bytes: u64,
    },
}

/// The records that a store can have from remote stores of which images are attached.
pub struct Elsewhere(Vec<Known>);

impl Elsewhere {
    pub fn load(store: &Store) -> Result<Self> {
        Elsewhere::load_if(store, |_| true)
    }

    fn load_if(store: &Store, wanted: impl Fn(&Path) -> bool) -> Result<Self> {
        let top = store.folder().join(FOLDER);
        let folders = files(&top)?.into_iter().map(|remote| top.join(remote)).filter(|folder| wanted(folder));
        Ok(Elsewhere(folders.map(|folder| Known::kept(&folder)).collect::<Result<_>>()?))
    }

    pub(crate) fn contains(&self, name: &Name) -> bool {
        self.0.iter().any(|known| known.find(name).next().is_some())
    }

    /// How much of a node is here, of which these are the trees. One that no remote store knows is whole.
    pub fn locality<'t>(
        &self,
        store: &Store,
        node: &Name,
        trees: impl IntoIterator<Item = &'t Tree>,
    ) -> Result<Locality> {
        if !self.contains(node) {
            return Ok(Locality::Whole);
        }
        let is_here = |name: &Name| Ok::<bool, StoreError>(!store.index().find(name)?.is_empty());
        let (mut local_bytes, mut whole) = (0, true);
        for tree in trees {
            tree::walk(&Local(store), tree.root, &mut |visit| {
                let here = match visit {
                    Visit::Node(name) => is_here(&name)?,
                    Visit::Chunk(_, name) => {
                        let here = is_here(&name)?;
                        local_bytes += if here { u64::from(tree.chunk_len) } else { 0 };
                        here
                    }
                };
                whole &= here;
                Ok(here)
            })?;
        }
        Ok(if whole { Locality::Whole } else { Locality::Part { local_bytes } })
    }
}

/// Who needs something that only this remote store holds.
pub fn needed_by(store: &Store, address: &RemoteAddress) -> Result<Vec<String>> {
    let folder = address.folder_in(store);
    let known = Known::kept(&folder)?;
    let mut marks = Marks::with_elsewhere(Elsewhere::load_if(store, |other| *other != folder)?);
    store.index().refresh(store.catalog())?;
    let roots = store.roots(&mut marks.logs)?;
    marks.add(store, &roots, &mut || Ok(()))?;
    let only_there = marks.lost.into_iter().filter(|lost| known.find(&lost.name).next().is_some());
    let mut owners: Vec<String> = only_there.map(|lost| lost.owner).collect();
    owners.sort();
    owners.dedup();
    Ok(owners)
}
