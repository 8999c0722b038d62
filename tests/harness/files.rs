//! Where the guests and the binary are, and scratch folders that vanish.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

/// Debian's stock kernels.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kernel {
    Cloud,
    Generic,
    /// The generic kernel, packed with gzip.
    GenericGzip,
    /// The cloud kernel of Debian 13.
    TrixieCloud,
}

impl Kernel {
    pub fn image(self) -> PathBuf {
        found(self.folder().join("vmlinuz"), "cargo xtask guests")
    }

    /// The small initramfs with busybox.
    pub fn initramfs(self) -> PathBuf {
        found(self.folder().join("initramfs.cpio"), "cargo xtask guests")
    }

    /// Whether it could be fetched: that of Debian 13 needs Debian's own server. Says so if not.
    pub fn is_there(self) -> bool {
        let there = self.folder().join("initramfs.cpio").exists();
        if !there {
            println!("{self:?} could not be fetched: left out");
        }
        there
    }

    fn folder(self) -> PathBuf {
        guests().join(match self {
            Self::Cloud => "cloud",
            Self::Generic => "generic",
            Self::GenericGzip => "generic-gzip",
            Self::TrixieCloud => "trixie-cloud",
        })
    }
}

/// The ELF file of a guest of `guests/`.
pub fn tiny(name: &str) -> PathBuf {
    found(guests().join("tiny").join(format!("{name}.elf")), "cargo xtask guests --tiny")
}

/// The busybox of the initramfs, which is linked statically: programs for the host's side of a test.
pub fn busybox() -> PathBuf {
    found(guests().join("busybox/bin/busybox"), "cargo xtask guests")
}

/// A state folder that holds the image `debian`.
pub fn image_home() -> PathBuf {
    let home = guests().join("home");
    found(home.join("store/catalog.db"), "cargo xtask test");
    home
}

/// The release binary.
pub fn polder() -> PathBuf {
    let path = std::env::var_os("POLDER_TEST_BINARY").map_or_else(|| target().join("release/polder"), PathBuf::from);
    found(path, "cargo xtask build")
}

/// Whether the long forms are asked for.
pub fn nightly() -> bool {
    std::env::var_os("POLDER_TEST_NIGHTLY").is_some()
}

fn guests() -> PathBuf {
    std::env::var_os("POLDER_TEST_GUESTS").map_or_else(|| target().join("guests"), PathBuf::from)
}

fn target() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), |folder| root.join(folder))
}

fn found(path: PathBuf, made_by: &str) -> PathBuf {
    assert!(path.exists(), "{} is not there: `{made_by}` makes it", path.display());
    path
}

/// A folder of one test's own; it is removed when dropped.
pub struct Scratch(PathBuf);

impl Scratch {
    pub fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("polder-test-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).expect("a folder for temporary files can be written");
        Self(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Writes a file in it and returns its path.
    pub fn file(&self, name: &str, content: &[u8]) -> PathBuf {
        let path = self.0.join(name);
        std::fs::write(&path, content).expect("the scratch folder can be written");
        path
    }

    /// Makes a file of `bytes` zeros that takes no room.
    pub fn sparse(&self, name: &str, bytes: u64) -> PathBuf {
        let path = self.0.join(name);
        let file = std::fs::File::create(&path).expect("the scratch folder can be written");
        file.set_len(bytes).expect("a sparse file can be made");
        path
    }
}

impl Default for Scratch {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
