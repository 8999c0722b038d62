//! What polder knows about an image: a node of the store with a disk, a kernel and an initrd.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use polder_store::format::RawSource;
use polder_store::{ImageRow, Node, Replace, Store, StoreError, Tree};
use serde::{Deserialize, Serialize};

use crate::state_folder::StateFolder;
use crate::store::Progress;

/// Facts of an image's node.
const KERNEL_PACKAGE: &str = "kernel-package";
const COMMAND_LINE: &str = "command-line";
/// Names of its files.
pub const KERNEL: &str = "kernel";
pub const INITRD: &str = "initrd";
/// And of its disk.
pub const DISK: &str = "root";

/// What polder knows about an image.
#[derive(Clone, Debug)]
pub struct ImageRecord {
    pub name: String,
    /// RFC 3339, in UTC.
    pub created_utc: String,
    pub node: polder_store::Name,
    /// Debian package of the kernel and its version; empty for an image that was brought in.
    pub kernel_package: String,
    /// Kernel command line an instance starts with.
    pub command_line: String,
    pub disk: Tree,
    pub kernel: Option<Tree>,
    pub initrd: Option<Tree>,
}

/// What an image is made of when it is put into the store.
pub struct Parts<'a> {
    pub disk: &'a dyn polder_store::format::Source,
    /// The domain that it is encrypted in.
    pub domain: Option<&'a str>,
    pub kernel: Option<&'a Path>,
    pub initrd: Option<&'a Path>,
    pub kernel_package: &'a str,
    pub command_line: &'a str,
}

impl ImageRecord {
    /// The image `name`.
    pub fn load(store: &Arc<Store>, name: &str) -> Result<Self> {
        match store.image(name) {
            Ok((row, node)) => Self::of(row, node),
            Err(StoreError::NotFound { .. }) => bail!(
                "there is no image {name} (`polder image build debian --name {name}` makes one, `polder image ls` lists what there is)"
            ),
            Err(error) => Err(error.into()),
        }
    }

    /// Every image, by name.
    pub fn all(store: &Arc<Store>) -> Result<Vec<Self>> {
        store.images()?.into_iter().map(|(row, node)| Self::of(row, node)).collect()
    }

    fn of(row: ImageRow, node: Node) -> Result<Self> {
        let fact = |key: &str| node.facts.get(key).cloned().unwrap_or_default();
        let (kernel_package, command_line) = (fact(KERNEL_PACKAGE), fact(COMMAND_LINE));
        let (kernel, initrd) = (node.file(KERNEL).cloned(), node.file(INITRD).cloned());
        let Some(disk) = node.disks.into_iter().next() else { bail!("image {} has no disk", row.name) };
        Ok(ImageRecord {
            created_utc: utc(row.created_ns / 1_000_000_000),
            name: row.name,
            node: row.node,
            kernel_package,
            command_line,
            disk,
            kernel,
            initrd,
        })
    }

    /// Puts an image into the store: it is there whole or not at all.
    pub fn save(store: &Arc<Store>, name: &str, parts: &Parts<'_>, replace: Replace) -> Result<()> {
        let facts = [(KERNEL_PACKAGE, parts.kernel_package), (COMMAND_LINE, parts.command_line)];
        let facts = facts.into_iter().filter(|(_, value)| !value.is_empty());
        let facts: BTreeMap<_, _> = facts.map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
        let mut node = store.new_node_in(facts, parts.domain)?;
        let mut progress = Progress::new();
        node.add_disk(DISK, parts.disk, &mut |step| progress.show(step))?;
        for (name, path) in [(KERNEL, parts.kernel), (INITRD, parts.initrd)] {
            if let Some(path) = path {
                node.add_file(name, &RawSource::open(path)?, &mut |step| progress.show(step))?;
            }
        }
        progress.finish();
        node.save_as_image(name, replace)?;
        Ok(())
    }

    /// The kernel and initrd as files of the host, for machines to load. They are written once and stay until the image is removed.
    pub fn boot_files(&self, state: &StateFolder, store: &Arc<Store>) -> Result<(PathBuf, Option<PathBuf>)> {
        let Some(kernel) = &self.kernel else {
            bail!(
                "image {} has no kernel to boot (`polder image import` takes one with --kernel and --initrd)",
                self.name
            )
        };
        let initrd = self.initrd.as_ref().map(|initrd| boot_file(state, store, initrd)).transpose()?;
        Ok((boot_file(state, store, kernel)?, initrd))
    }
}

fn boot_file_name(file: &Tree) -> String {
    format!("{}-{}", file.root.name, file.len_bytes)
}

/// Removes kernels and initrds of the host that came out of a domain.
pub fn remove_boot_files_of(state: &StateFolder, store: &Arc<Store>, domain: u32) -> Result<()> {
    for image in ImageRecord::all(store)? {
        for file in image.kernel.iter().chain(&image.initrd).filter(|file| file.domain == domain) {
            let path = state.boot_files().join(boot_file_name(file));
            match std::fs::remove_file(&path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(error).with_context(|| format!("cannot remove {}", path.display()));
                }
                _ => {}
            }
        }
    }
    Ok(())
}

/// A file of the store as a file of the host.
fn boot_file(state: &StateFolder, store: &Arc<Store>, file: &Tree) -> Result<PathBuf> {
    let folder = state.boot_files();
    let path = folder.join(boot_file_name(file));
    if path.exists() {
        return Ok(path);
    }
    let made = || -> Result<()> {
        std::fs::create_dir_all(&folder)?;
        let making = folder.join(format!(".{}", polder_store::Id::random()));
        let written = store.read_file(file).map_err(anyhow::Error::from).and_then(|bytes| {
            let mut target = File::create_new(&making)?;
            target.write_all(&bytes)?;
            Ok(std::fs::rename(&making, &path)?)
        });
        if written.is_err() {
            // The error that is reported is the one that matters.
            let _ = std::fs::remove_file(&making);
        }
        written
    };
    made().with_context(|| format!("cannot write the {} to {}", file.name, path.display()))?;
    Ok(path)
}

/// Removes kernels and initrds of the host that no image has any more.
pub fn sweep_boot_files(state: &StateFolder, store: &Arc<Store>) -> Result<()> {
    let images = ImageRecord::all(store)?;
    let files = images.iter().flat_map(|image| image.kernel.iter().chain(&image.initrd));
    let kept: Vec<String> = files.map(boot_file_name).collect();
    let Ok(entries) = std::fs::read_dir(state.boot_files()) else { return Ok(()) };
    for entry in entries {
        let path = entry.context("cannot list the kernels of images")?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if !name.starts_with('.') && !kept.contains(&name) {
            std::fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
    }
    Ok(())
}

/// An image as releases before the store kept it: `images/NAME` with `image.json`, `disk.raw`, `kernel` and `initrd`.
#[derive(Serialize, Deserialize)]
struct FolderRecord {
    format: u32,
    kernel_package: String,
    command_line: String,
}

/// Brings images that lie in folders into the store, and removes the folders.
pub fn take_in_folders(state: &StateFolder, store: &Arc<Store>) -> Result<()> {
    let Ok(entries) = std::fs::read_dir(state.images()) else { return Ok(()) };
    for entry in entries {
        let folder = entry.context("cannot list the images")?.path();
        let name = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let record = folder.join("image.json");
        if name.starts_with('.') || !record.exists() {
            continue;
        }
        take_in(store, &name, &folder, &record).with_context(|| format!("cannot bring image {name} into the store"))?;
        // Renamed first: a removal that is interrupted leaves no half image under the name.
        let doomed = state.images().join(format!(".{name}.removing-{}", std::process::id()));
        std::fs::rename(&folder, &doomed)
            .and_then(|()| std::fs::remove_dir_all(&doomed))
            .with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    Ok(())
}

fn take_in(store: &Arc<Store>, name: &str, folder: &Path, record: &Path) -> Result<()> {
    let text = std::fs::read_to_string(record).with_context(|| format!("cannot read {}", record.display()))?;
    let value: serde_json::Value =
        serde_json::from_str(&text).with_context(|| format!("{} is damaged", record.display()))?;
    let known: FolderRecord = match value["format"].as_u64() {
        Some(1) => serde_json::from_value(value).with_context(|| format!("{} is damaged", record.display()))?,
        Some(other) => bail!("{} has format {other}, which this release does not know", record.display()),
        None => bail!("{} is damaged: it names no format", record.display()),
    };
    let parts = Parts {
        disk: &RawSource::open(&folder.join("disk.raw"))?,
        domain: None,
        kernel: Some(&folder.join("kernel")),
        initrd: Some(&folder.join("initrd")),
        kernel_package: &known.kernel_package,
        command_line: &known.command_line,
    };
    ImageRecord::save(store, name, &parts, Replace::Yes)
}

/// The time `seconds` after 1970 as RFC 3339 (civil date from days: the Gregorian calendar repeats every 146097 days).
pub fn utc(seconds: u64) -> String {
    let (days, of_day) = (seconds / 86_400, seconds % 86_400);
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", of_day / 3600, of_day / 60 % 60, of_day % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(name: &str) -> StateFolder {
        let path = std::env::temp_dir().join(format!("polder-record-{name}-{}", std::process::id()));
        std::fs::create_dir_all(path.join("images/old")).unwrap();
        StateFolder::at(path)
    }

    #[test]
    fn an_image_of_an_earlier_release_is_taken_into_the_store() {
        let state = state("taken");
        let folder = state.images().join("old");
        let record = r#"{"format":1,"name":"old","created_utc":"2026-11-22T17:04:07Z","kernel_package":"linux","command_line":"quiet","root_disk_bytes":8192}"#;
        for (name, bytes) in
            [("image.json", record.as_bytes()), ("disk.raw", &[7; 8192]), ("kernel", b"k"), ("initrd", b"i")]
        {
            std::fs::write(folder.join(name), bytes).unwrap();
        }
        let store = crate::store::open(&state).unwrap();
        take_in_folders(&state, &store).unwrap();
        assert!(!folder.exists());
        let image = ImageRecord::load(&store, "old").unwrap();
        assert_eq!(
            (image.kernel_package.as_str(), image.command_line.as_str(), image.disk.len_bytes),
            ("linux", "quiet", 8192)
        );
        let (kernel, initrd) = image.boot_files(&state, &store).unwrap();
        assert_eq!(std::fs::read(&kernel).unwrap(), b"k");
        assert_eq!(std::fs::read(initrd.unwrap()).unwrap(), b"i");
        store.remove_image("old").unwrap();
        sweep_boot_files(&state, &store).unwrap();
        assert!(!kernel.exists());
        std::fs::remove_dir_all(state.path()).unwrap();
    }

    #[test]
    fn a_record_of_an_unknown_format_is_refused_by_name() {
        let state = state("unknown");
        std::fs::write(state.images().join("old/image.json"), r#"{"format":99}"#).unwrap();
        let store = crate::store::open(&state).unwrap();
        let error = format!("{:#}", take_in_folders(&state, &store).unwrap_err());
        std::fs::remove_dir_all(state.path()).unwrap();
        assert!(error.contains("format 99"), "{error}");
    }

    #[test]
    fn seconds_become_a_civil_date() {
        assert_eq!(utc(0), "1970-01-01T00:00:00Z");
        assert_eq!(utc(951_782_399), "2000-02-28T23:59:59Z");
        assert_eq!(utc(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(utc(1_795_367_047), "2026-11-22T17:04:07Z");
    }
}
