//! Debian packages as sources of files: downloaded with apt, unpacked without being installed.

use crate::command::{capture, run, step};
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;

/// What packages come from.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// What this machine installs packages from.
    Host,
    /// Debian 13. Its lists are kept beside the guests, so that the machine itself never installs from them.
    Trixie,
}

const TRIXIE: &str =
    "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian trixie main\n";

impl Source {
    /// Sees to it that apt knows the packages.
    fn refresh(self) -> Result<()> {
        match self {
            Source::Host => crate::setup::refresh_package_lists(),
            Source::Trixie => {
                let folder = trixie_folder();
                for below in ["lists/partial", "cache/archives/partial"] {
                    std::fs::create_dir_all(folder.join(below))
                        .with_context(|| format!("cannot make {}", folder.display()))?;
                }
                std::fs::write(folder.join("sources.list"), TRIXIE)?;
                step("apt-get update for Debian 13, beside the machine's own lists");
                capture(self.apt("apt-get").args(["update", "--quiet=2", "--error-on=any"])).map(drop)
            }
        }
    }

    /// One of apt's programs, that reads this source.
    fn apt(self, program: &str) -> Command {
        let mut command = Command::new(program);
        if self == Source::Trixie {
            let folder = trixie_folder();
            for (name, place) in [("Etc::SourceList", "sources.list"), ("State::Lists", "lists"), ("Cache", "cache")] {
                command.arg("-o").arg(format!("Dir::{name}={}", folder.join(place).display()));
            }
            command.args(["-o", "Dir::Etc::SourceParts=/dev/null"]);
        }
        command
    }
}

fn trixie_folder() -> PathBuf {
    crate::project::guests().join("trixie-lists")
}

/// Downloads `package` and unpacks it into `into`, whole or not at all.
pub fn unpack(source: Source, package: &str, into: &Path) -> Result<()> {
    if into.exists() {
        return Ok(());
    }
    source.refresh()?;
    step(&format!("apt-get download {package}"));
    let work = into.with_extension("download");
    let _ = std::fs::remove_dir_all(&work);
    std::fs::create_dir_all(&work).with_context(|| format!("cannot make {}", work.display()))?;
    capture(source.apt("apt-get").current_dir(&work).args(["download", "--quiet=2", package]))?;
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
pub fn real_package(source: Source, meta: &str) -> Result<String> {
    source.refresh()?;
    let shown = capture(source.apt("apt-cache").args(["show", "--no-all-versions", meta]))?;
    let depends = shown.lines().find_map(|line| line.strip_prefix("Depends: ")).unwrap_or_default();
    let first = depends.split([',', ' ']).next().unwrap_or_default();
    if first.is_empty() {
        bail!("the package {meta} depends on nothing: is it a metapackage?");
    }
    Ok(first.to_string())
}
