//! Assembles and links the guests of `guests/`.

use crate::command::run;
use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::SystemTime;

/// Makes every `guests/NAME.S` that is newer than its `tiny/NAME.elf`.
pub fn build() -> Result<()> {
    let sources = crate::project::root().join("guests");
    let built = crate::project::guests().join("tiny");
    std::fs::create_dir_all(&built).with_context(|| format!("cannot make {}", built.display()))?;
    let shared = ["start.inc", "smp.inc", "guest.ld"].map(|file| sources.join(file));
    for entry in std::fs::read_dir(&sources)? {
        let source = entry?.path();
        if source.extension().is_none_or(|extension| extension != "S") {
            continue;
        }
        let name = source.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        let elf = built.join(format!("{name}.elf"));
        if changed(&source).max(newest(&shared)) < changed(&elf) {
            continue;
        }
        let object = built.join(format!("{name}.o"));
        run(Command::new("gcc").args(["-c", "-m64", "-I"]).arg(&sources).arg("-o").arg(&object).arg(&source))?;
        run(Command::new("ld")
            .args(["-nostdlib", "-static", "-z", "noexecstack", "--no-warn-rwx-segments", "-T"])
            .arg(sources.join("guest.ld"))
            .arg("-o")
            .arg(&elf)
            .arg(&object))?;
    }
    Ok(())
}

fn newest(files: &[PathBuf]) -> SystemTime {
    files.iter().map(|file| changed(file)).max().unwrap_or(SystemTime::UNIX_EPOCH)
}

fn changed(file: &Path) -> SystemTime {
    file.metadata().and_then(|facts| facts.modified()).unwrap_or(SystemTime::UNIX_EPOCH)
}
