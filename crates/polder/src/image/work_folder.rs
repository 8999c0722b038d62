//! Where images are made before they are in the store.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::state_folder::StateFolder;

/// A folder in the making: gone when dropped.
pub struct WorkFolder(PathBuf);

impl WorkFolder {
    /// Makes one for an image of that name, which is known to be a name. What others left that were killed goes.
    pub fn make(state: &StateFolder, name: &str) -> Result<Self> {
        let images = state.images();
        std::fs::create_dir_all(&images).with_context(|| format!("cannot make {}", images.display()))?;
        remove_leftovers(&images);
        let work = WorkFolder(images.join(format!(".{name}.building-{}", std::process::id())));
        std::fs::create_dir_all(&work.0).with_context(|| format!("cannot make {}", work.0.display()))?;
        Ok(work)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for WorkFolder {
    fn drop(&mut self) {
        // Nothing to do about a folder that cannot be removed; the next build tries again.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Removes what builds that were killed left behind: their process is gone.
fn remove_leftovers(images: &Path) {
    let Ok(entries) = std::fs::read_dir(images) else { return };
    for path in entries.filter_map(|entry| entry.ok().map(|entry| entry.path())) {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let Some((_, process)) = name.split_once(".building-").or_else(|| name.split_once(".removing-")) else {
            continue;
        };
        if !Path::new("/proc").join(process).exists() {
            let _ = std::fs::remove_dir_all(&path);
        }
    }
}
