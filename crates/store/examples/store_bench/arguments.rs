//! What a command was told: words of the form KEY=VALUE, and paths.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use polder_store::{OpenDisk, Store, StoreOptions, Volume, VolumeOptions};

use crate::Outcome;

pub struct Arguments {
    values: BTreeMap<String, String>,
    pub paths: Vec<PathBuf>,
}

impl Arguments {
    pub fn parse(words: impl Iterator<Item = String>) -> Outcome<Self> {
        let mut arguments = Arguments { values: BTreeMap::new(), paths: Vec::new() };
        for word in words {
            match word.split_once('=') {
                // A path can hold any sign; it is told apart by its first.
                Some((key, value)) if !word.starts_with('/') => {
                    arguments.values.insert(key.to_owned(), value.to_owned());
                }
                _ => arguments.paths.push(word.into()),
            }
        }
        Ok(arguments)
    }

    pub fn text(&self, key: &str) -> Outcome<&str> {
        self.values.get(key).map(String::as_str).ok_or_else(|| format!("{key} is missing").into())
    }

    pub fn path(&self, key: &str) -> Outcome<&Path> {
        self.text(key).map(Path::new)
    }

    pub fn number<T: FromStr>(&self, key: &str) -> Outcome<T> {
        self.text(key)?.parse().map_err(|_| format!("{key} is no such number").into())
    }

    /// The same, for what has a value of its own where none is given.
    pub fn number_or<T: FromStr>(&self, key: &str, default: T) -> Outcome<T> {
        if self.values.contains_key(key) { self.number(key) } else { Ok(default) }
    }

    pub fn duration(&self, key: &str) -> Outcome<Duration> {
        Ok(Duration::from_secs_f64(self.number(key)?))
    }

    /// The store at `store=`, as commands open it.
    pub fn store(&self) -> Outcome<Arc<Store>> {
        Ok(Store::open(self.path("store")?, StoreOptions::default())?)
    }

    /// The volume at `volume=` of a store, as commands open it.
    pub fn volume(&self, store: &Arc<Store>) -> Outcome<Volume> {
        Ok(Volume::open(store, self.text("volume")?, VolumeOptions::default())?)
    }
}

/// The volume that a disk is.
pub fn volume_of(disk: &OpenDisk) -> Outcome<&Volume> {
    match disk {
        OpenDisk::Volume(volume) => Ok(volume),
        OpenDisk::Fixed(_) => Err("the disk is not a volume".into()),
    }
}

/// Closes a disk that nobody else holds any more.
pub fn close(disk: Arc<OpenDisk>) -> Outcome<()> {
    let disk = Arc::try_unwrap(disk).map_err(|_| "the disk is still in use")?;
    Ok(disk.close()?)
}
