//! `polder image build debian`: a root file system from Debian's packages, its kernel and its initrd.
//!
//! mmdebstrap makes the root file system (as root directly, else in a user namespace), our scripts make it a guest of ours, and
//! `mke2fs -d` makes an ext4 disk of it without mounting anything.

use super::record::{ImageRecord, Parts};
use super::work_folder::WorkFolder;
use super::{customize, tools};
use crate::state_folder::StateFolder;
use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use polder_basics::{ByteSize, GIB, MIB};
use polder_store::format::RawSource;
use polder_store::{Replace, Store};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

const SUITE: &str = "bookworm";
/// The smallest root disk that holds a Debian with its kernel.
const DISK_BYTES_MIN: u64 = GIB;
const DISK_BYTES_MAX: u64 = 16 << 40;
/// Free space that making an image needs, beyond what the image itself takes.
const FREE_BYTES_MIN: u64 = 2 * GIB;

#[derive(Args)]
pub struct BuildArguments {
    /// Name of the image
    #[arg(long, default_value = "debian")]
    name: String,
    /// Size of the root disk; it takes only the space that is used
    #[arg(long, default_value = "4G")]
    size: ByteSize,
    /// More Debian packages, separated by commas
    #[arg(long, value_delimiter = ',', value_name = "PACKAGES")]
    include: Vec<String>,
    /// Which of Debian's kernels
    #[arg(long, value_enum, default_value = "cloud")]
    kernel: KernelFlavour,
    /// The guest agent to put inside [default: polder-agent beside the polder binary]
    #[arg(long, value_name = "FILE")]
    agent: Option<PathBuf>,
    /// Encrypt it in this domain (`polder store domain create`)
    #[arg(long)]
    domain: Option<String>,
    /// Replace an image of the same name
    #[arg(long)]
    force: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum KernelFlavour {
    /// linux-image-cloud-amd64: the drivers of virtual machines
    Cloud,
    /// linux-image-amd64: the drivers of every machine
    Generic,
}

impl KernelFlavour {
    fn package(self) -> &'static str {
        match self {
            Self::Cloud => "linux-image-cloud-amd64",
            Self::Generic => "linux-image-amd64",
        }
    }
}

/// Makes the image.
pub fn build(state: &StateFolder, store: &Arc<Store>, arguments: &BuildArguments) -> Result<()> {
    polder_store::check_name("image", &arguments.name)?;
    if !arguments.force && store.image(&arguments.name).is_ok() {
        bail!("there is an image {} already: name another with --name, or replace it with --force", arguments.name);
    }
    if !(DISK_BYTES_MIN..=DISK_BYTES_MAX).contains(&arguments.size.0) || !arguments.size.0.is_multiple_of(MIB) {
        bail!(
            "a root disk of {} is not possible: choose whole MiB from {} on",
            arguments.size,
            ByteSize(DISK_BYTES_MIN)
        );
    }
    if let Some(domain) = &arguments.domain {
        store.usable_domain(domain)?;
        eprintln!("polder: until it is in domain {domain}, the disk lies unencrypted in {}", state.images().display());
    }
    tools::check()?;
    let agent = find_agent(arguments.agent.as_deref())?;
    let work = WorkFolder::make(state, &arguments.name)?;
    check_free_space(work.path())?;
    eprintln!("Making a Debian {SUITE} root file system from its packages; this takes a minute or more.");
    make_root_file_system(arguments, &agent, work.path())?;
    let kernel_package = take_kernel(work.path())?;
    let parts = Parts {
        disk: &RawSource::open(&work.path().join("disk.raw"))?,
        domain: arguments.domain.as_deref(),
        kernel: Some(&work.path().join("kernel")),
        initrd: Some(&work.path().join("initrd")),
        kernel_package: &kernel_package,
        command_line: customize::COMMAND_LINE,
    };
    let replace = if arguments.force { Replace::Yes } else { Replace::No };
    ImageRecord::save(store, &arguments.name, &parts, replace)?;
    println!(
        "Image {} is ready ({kernel_package}, disk {}): polder run {}",
        arguments.name, arguments.size, arguments.name
    );
    Ok(())
}

/// Runs mmdebstrap with our scripts; leaves `disk.raw` and the guest's `boot` folder in `work`.
fn make_root_file_system(arguments: &BuildArguments, agent: &Path, work: &Path) -> Result<()> {
    let disk_path = work.join("disk.raw");
    let disk = File::create_new(&disk_path).with_context(|| format!("cannot make {}", disk_path.display()))?;
    disk.set_len(arguments.size.0).context("cannot set the size of the disk")?;
    // In a user namespace mke2fs is another user of the host: it reaches the disk through the open file, not through folders
    // that may be closed to it, and may write it while it is made.
    disk.set_permissions(std::fs::Permissions::from_mode(0o666))?;
    rustix::io::fcntl_setfd(&disk, rustix::io::FdFlags::empty()).context("cannot hand the disk on")?;

    let mut include: Vec<&str> = customize::PACKAGES.to_vec();
    include.push(arguments.kernel.package());
    include.extend(arguments.include.iter().map(String::as_str));
    let boot = work.join("boot-files");
    std::fs::create_dir_all(&boot)?;
    let mke2fs = tools::find("mke2fs").unwrap_or_else(|| PathBuf::from("mke2fs"));
    let hook = |script: String| format!("--customize-hook={script}");
    let quoted = |path: &Path| format!("'{}'", path.to_string_lossy().replace('\'', "'\\''"));

    let mut command = Command::new("mmdebstrap");
    command
        .args(["--variant=minbase", "--format=null"])
        .arg(format!("--include={}", include.join(",")))
        .args(["--dpkgopt=path-exclude=/usr/share/man/*", "--dpkgopt=path-exclude=/usr/share/doc/*"])
        .args(["--dpkgopt=path-include=/usr/share/doc/*/copyright", "--dpkgopt=path-exclude=/usr/share/locale/*"])
        .arg(format!("--essential-hook={}", customize::BEFORE_PACKAGES))
        .arg(hook(format!("upload {} /usr/local/sbin/polder-agent", quoted(agent))))
        .arg(hook("chmod 755 \"$1/usr/local/sbin/polder-agent\"".to_string()))
        .arg(hook(customize::after_packages(&arguments.name)))
        .arg(hook(format!("copy-out /boot {}", quoted(&boot))))
        .arg(hook("rm \"$1\"/boot/plain-* \"$1/boot/kernel-package\"".to_string()))
        .arg(hook(customize::make_disk(&mke2fs.to_string_lossy(), disk.as_raw_fd())))
        .args([SUITE, "-"])
        .env("LC_ALL", "C.UTF-8")
        .env("SOURCE_DATE_EPOCH", now_seconds());
    let log = work.join("build.log");
    tools::run(&mut command, &log).with_context(|| {
        let text = std::fs::read(&log).unwrap_or_default();
        format!("cannot make the root file system{}", tools::apt_complaint(&String::from_utf8_lossy(&text)))
    })?;
    disk.set_permissions(std::fs::Permissions::from_mode(0o644))?;
    Ok(())
}

fn now_seconds() -> String {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()).to_string()
}

/// Moves the kernel and its initrd into place and says which package they are from.
fn take_kernel(work: &Path) -> Result<String> {
    let boot = work.join("boot-files");
    let root = if boot.join("boot").is_dir() { boot.join("boot") } else { boot.clone() };
    let mut found = 0;
    for entry in std::fs::read_dir(&root)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let target = if name.starts_with("vmlinuz-") {
            "kernel"
        } else if name.starts_with("plain-initrd.img-") {
            "initrd"
        } else {
            continue;
        };
        std::fs::rename(&path, work.join(target)).with_context(|| format!("cannot keep {}", path.display()))?;
        found += 1;
    }
    if found != 2 {
        bail!("the root file system holds {found} kernel files instead of one kernel and one initrd");
    }
    let package = std::fs::read_to_string(root.join("kernel-package")).unwrap_or_default();
    std::fs::remove_dir_all(&boot)?;
    Ok(package.trim().to_string())
}

/// The agent must run in any guest: it has to be statically linked.
fn find_agent(given: Option<&Path>) -> Result<PathBuf> {
    let path = match given {
        Some(path) => path.to_path_buf(),
        None => std::env::current_exe().context("cannot find the polder binary")?.with_file_name("polder-agent"),
    };
    let bytes = std::fs::read(&path).with_context(|| {
        format!("cannot read the guest agent {} (`cargo xtask build` makes it; --agent names another)", path.display())
    })?;
    if !bytes.starts_with(b"\x7fELF") {
        bail!("{} is no program: the guest agent is made by `cargo xtask build`", path.display());
    }
    if bytes.windows(15).any(|window| window == b"/lib64/ld-linux") {
        bail!(
            "{} is dynamically linked and would not run in every guest: `cargo xtask build` links it statically",
            path.display()
        );
    }
    path.canonicalize().with_context(|| format!("cannot reach {}", path.display()))
}

fn check_free_space(folder: &Path) -> Result<()> {
    let facts = rustix::fs::statvfs(folder).with_context(|| format!("cannot look at {}", folder.display()))?;
    let free = facts.f_bavail.saturating_mul(facts.f_frsize);
    if free < FREE_BYTES_MIN {
        bail!(
            "{} has {} MiB free and an image needs {}: free some space, or set POLDER_HOME to a folder on a larger disk",
            folder.display(),
            free / MIB,
            ByteSize(FREE_BYTES_MIN)
        );
    }
    Ok(())
}
