//! The Debian packages that building and testing need, each with its reason.
//!
//! As root the missing ones are installed; without, the exact command is printed and the task fails.

use crate::command::{capture, run, step};
use anyhow::{Result, bail};
use std::process::Command;

/// A package and why it is needed.
struct Package {
    name: &'static str,
    reason: &'static str,
}

/// Needed by every task that builds or tests.
const PACKAGES: &[Package] = &[
    Package {
        name: "gcc",
        reason: "links Rust programs, builds SQLite, liblzma, the tiny guests and the benchmark program",
    },
    Package { name: "libc6-dev", reason: "headers and the static C library that the guest agent is linked with" },
    Package { name: "git", reason: "tidy asks it which files belong to the project" },
    Package { name: "binutils", reason: "assembles and links the tiny guests" },
    Package { name: "ca-certificates", reason: "cargo fetches crates over TLS" },
    Package { name: "mmdebstrap", reason: "makes Debian root file systems from packages" },
    Package { name: "debian-archive-keyring", reason: "the keys that mmdebstrap checks Debian's packages with" },
    Package {
        name: "e2fsprogs",
        reason: "mke2fs -d turns a root file system into an ext4 disk; e2fsck judges what a power cut left of one on a volume",
    },
    Package { name: "kmod", reason: "depmod: the order in which a test guest loads its kernel modules" },
    Package { name: "uidmap", reason: "makes root file systems without being root" },
    Package { name: "fakeroot", reason: "owners of files in a disk made without being root" },
    Package { name: "zstd", reason: "unpacks packages and compresses initramfs images" },
    Package { name: "iproute2", reason: "the network test makes a TAP interface in a namespace of its own" },
    Package { name: "acpica-tools", reason: "iasl judges our ACPI tables" },
    Package { name: "gdb", reason: "the judge of --gdb" },
    Package { name: "xz-utils", reason: "unpacks packages" },
    Package { name: "openssl", reason: "makes the certificates of the tests of TLS" },
    Package { name: "libnbd-bin", reason: "nbdinfo and nbdcopy judge our NBD server" },
    Package { name: "python3-libnbd", reason: "nbdsh sends our NBD server single requests, right and wrong" },
    Package {
        name: "fio",
        reason: "writes to our NBD server and verifies what it reads; the client of the store bench",
    },
    Package { name: "nbd-client", reason: "the first NBD client lists the exports of our server" },
    Package {
        name: "nbdkit",
        reason: "its filters stand between a client and our NBD server; a peer in the store bench",
    },
    Package {
        name: "qemu-utils",
        reason: "qemu-img judges our image formats and our NBD server, and converts VMDK and VHDX; qemu-nbd is a peer in the store bench",
    },
];

/// What benchmarks run beside polder.
const PEER_PACKAGES: &[Package] =
    &[Package { name: "qemu-system-x86", reason: "the peer that benchmarks run beside polder (-accel tcg)" }];

/// Programs that tests run and nothing of the product is linked with, installed by cargo under `target/tools`.
struct Tool {
    name: &'static str,
    version: &'static str,
    /// Features of it that the tests need; without the others it builds in half the time.
    features: &'static str,
    reason: &'static str,
}

/// Needed by the nightly tests: building them takes half an hour of a busy machine.
const NIGHTLY_TOOLS: &[Tool] = &[Tool {
    name: "garage",
    version: "2.5.0",
    features: "bundled-libs,lmdb",
    reason: "an object store of others (AGPL): the real server that remote stores are tested with",
}];

/// Installs the programs that only the nightly tests run.
pub fn install_nightly_tools() -> Result<()> {
    for tool in NIGHTLY_TOOLS {
        let root = crate::project::target().join("tools");
        if root.join("bin").join(tool.name).exists() {
            continue;
        }
        step(&format!("cargo install {} {}: {}", tool.name, tool.version, tool.reason));
        run(crate::command::cargo()
            .args(["install", tool.name, "--version", tool.version, "--locked", "--no-default-features"])
            .args(["--features", tool.features, "--root"])
            .arg(&root))?;
    }
    Ok(())
}

/// Installs what building and testing need.
pub fn install() -> Result<()> {
    ensure(PACKAGES)
}

/// Installs the peer of the benchmarks.
pub fn install_peer() -> Result<()> {
    ensure(PEER_PACKAGES)
}

fn ensure(packages: &[Package]) -> Result<()> {
    if crate::command::exists("apt-get") {
        let missing: Vec<&Package> = packages.iter().filter(|package| !installed(package.name)).collect();
        if missing.is_empty() {
            return Ok(());
        }
        println!("These Debian packages are missing:");
        for package in &missing {
            println!("  {:<24} {}", package.name, package.reason);
        }
        let names: Vec<&str> = missing.iter().map(|package| package.name).collect();
        if !is_root() {
            bail!(
                "run this command as root, then try again:\n  apt-get update && apt-get install --yes --no-install-recommends {}",
                names.join(" ")
            );
        }
        step(&format!("apt-get install {}", names.join(" ")));
        run(Command::new("apt-get").args(["update", "--quiet=2"]))?;
        return run(Command::new("apt-get")
            .args(["install", "--yes", "--quiet=2", "--no-install-recommends"])
            .args(&names)
            .env("DEBIAN_FRONTEND", "noninteractive"));
    }
    bail!("this machine has no apt-get: building and testing polder needs a Debian 12 or later")
}

/// Reads the package lists if the machine has none, so that `apt-get download` knows its packages.
pub fn refresh_package_lists() -> Result<()> {
    let known = capture(Command::new("apt-cache").args(["show", "--no-all-versions", "linux-image-cloud-amd64"]));
    if known.is_ok() {
        return Ok(());
    }
    if !is_root() {
        bail!("apt knows no package lists: run `apt-get update` as root, then try again");
    }
    run(Command::new("apt-get").args(["update", "--quiet=2"]))
}

/// Whether we run as root.
pub fn is_root() -> bool {
    capture(Command::new("id").arg("-u")).is_ok_and(|id| id.trim() == "0")
}

fn installed(package: &str) -> bool {
    capture(Command::new("dpkg-query").args(["--show", "--showformat=${db:Status-Status}", package]))
        .is_ok_and(|status| status == "installed")
}
