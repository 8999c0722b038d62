//! The file of `--stats`: made at the start, so that a path that cannot be written is known then, and filled at the end.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use polder_vmm::Stats;

/// An open file. Dropping it unwritten removes it again if it was not there before.
pub struct StatsFile {
    path: PathBuf,
    file: File,
    remove: bool,
}

impl StatsFile {
    pub fn create(path: &Path) -> Result<Self> {
        let context = || format!("the statistics file {} cannot be written", path.display());
        let (file, remove) = match File::create_new(path) {
            Ok(file) => (file, true),
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                (File::options().write(true).open(path).with_context(context)?, false)
            }
            Err(error) => return Err(error).with_context(context),
        };
        Ok(StatsFile { path: path.to_owned(), file, remove })
    }

    pub fn write(mut self, stats: &Stats) -> Result<()> {
        let mut text = serde_json::to_string_pretty(stats).context("the statistics cannot be written as JSON")?;
        text.push('\n');
        if self.file.metadata().is_ok_and(|metadata| metadata.is_file()) {
            self.file.set_len(0).with_context(|| self.context())?;
        }
        self.file.write_all(text.as_bytes()).with_context(|| self.context())?;
        self.remove = false;
        Ok(())
    }

    fn context(&self) -> String {
        format!("the statistics file {} cannot be written", self.path.display())
    }
}

impl Drop for StatsFile {
    fn drop(&mut self) {
        if self.remove {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unwritten_file_vanishes_and_a_written_one_is_json() {
        let path = std::env::temp_dir().join(format!("polder-stats-{}", std::process::id()));
        drop(StatsFile::create(&path).unwrap());
        assert!(!path.exists());
        StatsFile::create(&path).unwrap().write(&Stats::default()).unwrap();
        let value: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        assert!(value["times"]["vmm_ready_ns"].is_u64());
        drop(StatsFile::create(&path).unwrap());
        assert!(path.exists(), "a file that was there before stays");
        std::fs::remove_file(&path).unwrap();
        assert!(StatsFile::create(Path::new("/nowhere/stats.json")).is_err());
    }
}
