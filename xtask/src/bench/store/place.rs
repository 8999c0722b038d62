//! The folder under test: its room is checked first, and everything in it is removed afterwards.

use crate::command::{capture, run};
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The folder inside the chosen one that is ours; what an ended run left in it is of no use to anybody.
const FOLDER: &str = "polder-store-bench";
/// Room that is left to others.
const SPARE_BYTES: u64 = 2 << 30;

pub struct Place {
    folder: PathBuf,
    /// A short path for sockets, whose names may have 107 bytes.
    sockets: PathBuf,
}

impl Place {
    /// Makes the folder, if the disk has the room.
    pub fn make(chosen: &Path, needed_bytes: u64) -> Result<Self> {
        std::fs::create_dir_all(chosen).with_context(|| format!("cannot make {}", chosen.display()))?;
        let folder = chosen.canonicalize()?.join(FOLDER);
        let sockets = std::env::temp_dir().join(format!("{FOLDER}-{}", std::process::id()));
        let place = Place { folder, sockets };
        place.remove();
        let free = free_bytes(chosen)?;
        if free < needed_bytes + SPARE_BYTES {
            bail!(
                "{} has {} MiB left, and the bench wants {}: choose another folder with --folder, or --quick",
                chosen.display(),
                free >> 20,
                (needed_bytes + SPARE_BYTES) >> 20
            );
        }
        std::fs::create_dir_all(&place.folder)?;
        std::fs::create_dir_all(&place.sockets)?;
        Ok(place)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    pub fn socket(&self, name: &str) -> PathBuf {
        self.sockets.join(name)
    }

    /// Removes everything in it.
    pub fn clear(&self) -> Result<()> {
        std::fs::remove_dir_all(&self.folder)?;
        std::fs::create_dir_all(&self.folder)?;
        Ok(())
    }

    /// Writes back what the host holds of its file system, so that the next turn does not pay for this one.
    pub fn sync(&self) -> Result<()> {
        run(Command::new("sync").arg("--file-system").arg(&self.folder))
    }

    fn remove(&self) {
        // What is not there needs no removing, and what cannot be removed is found when the folder is made.
        let _ = std::fs::remove_dir_all(&self.folder);
        let _ = std::fs::remove_dir_all(&self.sockets);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.remove();
    }
}

fn free_bytes(folder: &Path) -> Result<u64> {
    let table = capture(Command::new("df").args(["--block-size=1", "--output=avail"]).arg(folder))?;
    let free = table.lines().nth(1).and_then(|line| line.trim().parse().ok());
    free.with_context(|| format!("df does not say how much room {} has", folder.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_without_room_is_refused_and_one_that_goes_leaves_nothing() {
        let chosen = std::env::temp_dir().join(format!("polder-place-test-{}", std::process::id()));
        assert!(Place::make(&chosen, 1 << 60).is_err());
        let place = Place::make(&chosen, 0).unwrap();
        let (folder, sockets) = (place.folder.clone(), place.sockets.clone());
        std::fs::write(place.path("disk"), "content").unwrap();
        place.clear().unwrap();
        assert!(folder.exists() && sockets.exists() && !place.path("disk").exists());
        drop(place);
        assert!(!folder.exists() && !sockets.exists());
        std::fs::remove_dir(&chosen).unwrap();
    }
}
