//! `image.json`: what polder knows about an image.

use crate::state_folder::StateFolder;
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// The format this release writes.
pub const FORMAT: u32 = 1;
/// Longest name of an image.
const NAME_LEN_MAX: usize = 64;

/// What polder knows about an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRecord {
    /// Version of this record; an unknown one is refused.
    pub format: u32,
    pub name: String,
    /// RFC 3339, in UTC.
    pub created_utc: String,
    /// Debian package of the kernel and its version.
    pub kernel_package: String,
    /// Kernel command line an instance starts with.
    pub command_line: String,
    /// Size of disk.raw as the guest sees it.
    pub root_disk_bytes: u64,
}

impl ImageRecord {
    /// Reads the record of the image `name`.
    pub fn load(state: &StateFolder, name: &str) -> Result<Self> {
        let folder = folder(state, name)?;
        if !folder.exists() {
            bail!(
                "there is no image {name} (`polder image build debian --name {name}` makes one, `polder image ls` lists what there is)"
            );
        }
        Self::read(&folder)
    }

    /// Every image, by name. Folders that hold no image.json are no images.
    pub fn all(state: &StateFolder) -> Result<Vec<Self>> {
        let mut images = Vec::new();
        let Ok(entries) = std::fs::read_dir(state.images()) else { return Ok(images) };
        for entry in entries {
            let folder = entry.context("cannot list the images")?.path();
            let hidden = folder.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
            if !hidden && folder.join("image.json").exists() {
                images.push(Self::read(&folder)?);
            }
        }
        images.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(images)
    }

    /// Writes the record into an image folder.
    pub fn write(&self, folder: &Path) -> Result<()> {
        let path = folder.join("image.json");
        let text = serde_json::to_string_pretty(self)?;
        std::fs::write(&path, text + "\n").with_context(|| format!("cannot write {}", path.display()))
    }

    fn read(folder: &Path) -> Result<Self> {
        let path = folder.join("image.json");
        let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let value: serde_json::Value =
            serde_json::from_str(&text).with_context(|| format!("{} is damaged", path.display()))?;
        match value["format"].as_u64() {
            Some(1) => serde_json::from_value(value).with_context(|| format!("{} is damaged", path.display())),
            Some(other) => bail!("{} has format {other}, which this release does not know", path.display()),
            None => bail!("{} is damaged: it names no format", path.display()),
        }
    }
}

/// Where the image of this name lies; names that could lead elsewhere are refused.
pub fn folder(state: &StateFolder, name: &str) -> Result<PathBuf> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty() || name.len() > NAME_LEN_MAX || name.starts_with(['.', '-']) || !name.chars().all(plain) {
        bail!(
            "{name:?} is no name for an image: use up to {NAME_LEN_MAX} letters, digits, '-', '_' and '.', starting with a letter or digit"
        );
    }
    Ok(state.images().join(name))
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

    #[test]
    fn an_image_name_cannot_leave_the_images_folder() {
        let state = StateFolder::at(std::env::temp_dir());
        assert!(folder(&state, "debian-12").is_ok());
        for name in ["", "..", ".hidden", "a/b", "-x", "a b", &"x".repeat(65)] {
            assert!(folder(&state, name).is_err(), "{name:?}");
        }
    }

    #[test]
    fn a_record_of_an_unknown_format_is_refused_by_name() {
        let folder = std::env::temp_dir().join(format!("polder-record-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("image.json"), r#"{"format":99}"#).unwrap();
        let error = ImageRecord::read(&folder).unwrap_err().to_string();
        std::fs::remove_dir_all(&folder).unwrap();
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
