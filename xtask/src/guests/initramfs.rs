//! The small initramfs of the test guests: busybox, the modules of a machine's devices, and `init`.

use super::cpio::Archive;
use super::kernel::Kernel;
use super::package::{self, Source};
use anyhow::{Context, Result, bail};
use std::collections::HashMap;
use std::path::Path;
use std::process::Command;

/// Modules that are loaded, in this order, with what they need; those a kernel has built in or not at all are left out.
const MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "virtio_console",
    "virtio-rng",
    "virtio_balloon",
    "vmw_vsock_virtio_transport",
    "ext4",
    "crc32c_generic",
    "rtc-cmos",
    "pvpanic-mmio",
];

/// How Debian 13 packs its modules.
const PACKED: &str = ".xz";

const INIT: &str = include_str!("init.sh");

/// Makes `initramfs.cpio` beside the kernel.
pub fn build(kernel: &Kernel) -> Result<()> {
    let stamp = kernel.folder.join("initramfs.init");
    let target = kernel.folder.join("initramfs.cpio");
    let built_from = format!("{}\n{INIT}", MODULES.join(" "));
    if target.exists() && std::fs::read_to_string(&stamp).is_ok_and(|before| before == built_from) {
        return Ok(());
    }
    let busybox_tree = crate::project::guests().join("busybox");
    package::unpack(Source::Host, "busybox-static", &busybox_tree)?;
    let busybox = std::fs::read(busybox_tree.join("bin/busybox")).context("busybox-static has no bin/busybox")?;

    let mut archive = Archive::default();
    for folder in ["bin", "dev", "proc", "sys", "tmp", "mnt", "root", "etc", "modules"] {
        archive.directory(folder);
    }
    archive.program("init", INIT.as_bytes());
    archive.program("bin/busybox", &busybox);
    archive.symlink("bin/sh", "busybox");
    let mut order = String::new();
    for path in load_order(&kernel.modules())? {
        let content = module(&kernel.modules().join(&path))?;
        let name = path.rsplit('/').next().unwrap_or(&path).trim_end_matches(PACKED);
        archive.program(&format!("modules/{name}"), &content);
        order.push_str(name);
        order.push('\n');
    }
    archive.program("modules/order", order.as_bytes());
    std::fs::write(&target, archive.finish()).with_context(|| format!("cannot write {}", target.display()))?;
    std::fs::write(stamp, built_from)?;
    Ok(())
}

/// A module as busybox loads it: not packed.
fn module(path: &Path) -> Result<Vec<u8>> {
    if !path.to_string_lossy().ends_with(PACKED) {
        return std::fs::read(path).with_context(|| format!("cannot read module {}", path.display()));
    }
    let unpacked = Command::new("xz").args(["--decompress", "--stdout"]).arg(path).output().context("cannot run xz")?;
    if !unpacked.status.success() {
        bail!("cannot unpack module {}: {}", path.display(), String::from_utf8_lossy(&unpacked.stderr));
    }
    Ok(unpacked.stdout)
}

/// The modules and all they need, each after what it needs (modules.dep lists the needs of a module, nearest first).
fn load_order(modules: &Path) -> Result<Vec<String>> {
    let table = std::fs::read_to_string(modules.join("modules.dep")).context("cannot read modules.dep")?;
    let needs: HashMap<&str, Vec<&str>> = table
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(path, needs)| (path, needs.split_whitespace().collect()))
        .collect();
    let mut order: Vec<String> = Vec::new();
    let mut add = |path: &str| {
        if !order.iter().any(|known| known == path) {
            order.push(path.to_string());
        }
    };
    for name in MODULES {
        let file = format!("/{name}.ko");
        let Some(path) = needs.keys().find(|path| path.trim_end_matches(PACKED).ends_with(&file)) else { continue };
        needs[path].iter().rev().for_each(|need| add(need));
        add(path);
    }
    Ok(order)
}
