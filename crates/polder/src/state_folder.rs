//! The folder where polder keeps what must outlive a command: images and instances.
//!
//! `$POLDER_HOME` if set, else `/var/lib/polder` for root, else `$XDG_DATA_HOME/polder` or `~/.local/share/polder`.

use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};

/// The state folder; it exists once this was made.
#[derive(Clone, Debug)]
pub struct StateFolder {
    path: PathBuf,
}

impl StateFolder {
    /// Finds the state folder, and makes it if it is not there.
    pub fn open() -> Result<Self> {
        let path = Self::locate()?;
        std::fs::create_dir_all(&path).with_context(|| {
            format!("cannot make the state folder {} (set POLDER_HOME to a folder that you can write)", path.display())
        })?;
        // Programs that run with another working directory are given paths from here.
        let path = path.canonicalize().with_context(|| format!("cannot reach the state folder {}", path.display()))?;
        Ok(Self { path })
    }

    /// A state folder at a known place.
    #[cfg(test)]
    pub fn at(path: PathBuf) -> Self {
        Self { path }
    }

    /// Where the state folder is or would be.
    pub fn locate() -> Result<PathBuf> {
        let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        if let Some(path) = variable("POLDER_HOME") {
            return Ok(path);
        }
        if rustix::process::geteuid().is_root() {
            return Ok(PathBuf::from("/var/lib/polder"));
        }
        if let Some(data) = variable("XDG_DATA_HOME") {
            return Ok(data.join("polder"));
        }
        match variable("HOME") {
            Some(home) => Ok(home.join(".local/share/polder")),
            None => bail!("there is no place for polder's state: set POLDER_HOME to a folder that you can write"),
        }
    }

    /// The folder itself.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Keys of encrypted domains.
    pub fn keys(&self) -> PathBuf {
        self.path.join("keys")
    }

    /// Where disks, images and snapshots lie.
    pub fn store(&self) -> PathBuf {
        self.path.join("store")
    }

    /// Kernels and initrds of images, as files that machines load.
    pub fn boot_files(&self) -> PathBuf {
        self.path.join("boot-files")
    }

    /// Where images are made; earlier releases kept them here, one folder each.
    pub fn images(&self) -> PathBuf {
        self.path.join("images")
    }
}
