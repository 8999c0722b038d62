//! Debian packages as sources of files: downloaded with apt, unpacked without being installed.

use crate::command::{capture, run, step};
use anyhow::{Context, Result, bail};
use std::path::Path;
use std::process::Command;

/// Downloads `package` and unpacks it into `into`, whole or not at all.
pub fn unpack(package: &str, into: &Path) -> Result<()> {
    if into.exists() {
        return Ok(());
    }
    crate::setup::refresh_package_lists()?;
    step(&format!("apt-get download {package}"));
    let work = into.with_extension("download");
    let _ = std::fs::remove_dir_all(&work);
    std::fs::create_dir_all(&work).with_context(|| format!("cannot make {}", work.display()))?;
    capture(Command::new("apt-get").current_dir(&work).args(["download", "--quiet=2", package]))?;
    let archive = std::fs::read_dir(&work)?
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"));
    let Some(archive) = archive else { bail!("apt-get download {package} left no package behind") };
    let tree = work.join("tree");
    run(Command::new("dpkg-deb").arg("--extract").arg(&archive).arg(&tree))?;
    std::fs::rename(&tree, into).with_context(|| format!("cannot move {} into place", tree.display()))?;
    std::fs::remove_dir_all(&work)?;
    Ok(())
}

/// The package that an empty metapackage such as linux-image-cloud-amd64 stands for.
pub fn real_package(meta: &str) -> Result<String> {
    crate::setup::refresh_package_lists()?;
    let shown = capture(Command::new("apt-cache").args(["show", "--no-all-versions", meta]))?;
    let depends = shown.lines().find_map(|line| line.strip_prefix("Depends: ")).unwrap_or_default();
    let first = depends.split([',', ' ']).next().unwrap_or_default();
    if first.is_empty() {
        bail!("the package {meta} depends on nothing: is it a metapackage?");
    }
    Ok(first.to_string())
}
