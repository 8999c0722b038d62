//! Debian's stock kernels, unpacked from their packages.

use super::package::{self, Source};
use crate::command::run;
use anyhow::{Context, Result};
use std::path::PathBuf;
use std::process::Command;

/// Which of Debian's kernels.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Flavour {
    /// linux-image-cloud-amd64: few drivers, most virtual machines run it.
    Cloud,
    /// linux-image-amd64: the kernel of every other Debian machine.
    Generic,
}

/// A kernel in the cache.
pub struct Kernel {
    /// Folder of everything that belongs to it.
    pub folder: PathBuf,
    /// What `uname -r` says.
    pub release: String,
}

impl Flavour {
    fn metapackage(self) -> &'static str {
        match self {
            Self::Cloud => "linux-image-cloud-amd64",
            Self::Generic => "linux-image-amd64",
        }
    }

    fn word(self) -> &'static str {
        match self {
            Self::Cloud => "cloud",
            Self::Generic => "generic",
        }
    }
}

/// Where the kernel of a flavour and a source is.
fn folder(flavour: Flavour, source: Source) -> PathBuf {
    let word = flavour.word();
    crate::project::guests().join(match source {
        Source::Host => word.to_string(),
        Source::Trixie => format!("trixie-{word}"),
    })
}

impl Kernel {
    /// The folder with modules.dep.
    pub fn modules(&self) -> PathBuf {
        self.folder.join("tree/lib/modules").join(&self.release)
    }
}

/// Makes `vmlinuz`, the modules and `version` of a flavour.
pub fn fetch(flavour: Flavour, source: Source) -> Result<Kernel> {
    let folder = folder(flavour, source);
    let release_file = folder.join("version");
    if let Ok(release) = std::fs::read_to_string(&release_file) {
        return Ok(Kernel { folder, release });
    }
    std::fs::create_dir_all(&folder)?;
    let package = package::real_package(source, flavour.metapackage())?;
    let release = package.strip_prefix("linux-image-").unwrap_or(&package).to_string();
    let tree = folder.join("tree");
    package::unpack(source, &package, &tree)?;
    if !tree.join("lib").exists() {
        // Debian 13 has /lib in /usr; depmod and the initramfs look for the modules where they were before.
        std::os::unix::fs::symlink("usr/lib", tree.join("lib"))?;
    }
    let image = tree.join(format!("boot/vmlinuz-{release}"));
    std::fs::copy(&image, folder.join("vmlinuz")).with_context(|| format!("{package} has no {}", image.display()))?;
    run(Command::new("/sbin/depmod").arg("--basedir").arg(&tree).arg(&release))?;
    std::fs::write(&release_file, &release)?;
    Ok(Kernel { folder, release })
}
