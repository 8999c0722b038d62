//! The engine bench: the rows of `benches/engine` natively, in `polder boot` (translated; interpreted as well if asked for) and in QEMU's TCG, in turn.
//!
//! All three run the same root file system: natively as a chroot, in the guests from a read-only disk under Debian's cloud kernel
//! with one vCPU and 2 GiB. A row's checksum must be the same everywhere.

use super::BenchArguments;
use super::report::{Report, Runner};
use crate::command::{capture, run, step};
use crate::guests;
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const PACKAGES: &str = "gcc,libc6-dev,python3-minimal,openssl,zstd,gzip";
const DISK: &str = "2G";
const ROUNDS: u32 = 5;

/// Where the parts of the bench lie.
pub struct Parts {
    pub root: PathBuf,
    pub disk: PathBuf,
    pub kernel: PathBuf,
    pub initramfs: PathBuf,
}

/// Measures, prints the table and writes it as JSON.
pub fn measure(arguments: &BenchArguments) -> Result<()> {
    let runners: Vec<Runner> = match arguments.runners.as_slice() {
        [] => vec![Runner::Native, Runner::Polder, Runner::Tcg],
        names => names.iter().map(|name| name.parse()).collect::<Result<_>>()?,
    };
    crate::setup::install()?;
    if runners.contains(&Runner::Tcg) {
        crate::setup::install_peer()?;
    }
    if !crate::setup::is_root() {
        bail!("the engine bench runs its rows in a chroot: run it as root");
    }
    let parts = prepare()?;
    if runners.iter().any(|runner| matches!(runner, Runner::Polder | Runner::Interpreter)) {
        crate::build::build()?;
    }
    let mut report = Report::default();
    let rounds = arguments.rounds.unwrap_or(ROUNDS);
    for round in 1..=rounds {
        for runner in &runners {
            step(&format!("round {round} of {rounds}: {}", runner.name()));
            let output = match runner {
                Runner::Native => native(&parts, arguments)?,
                Runner::Polder => guest(polder(&parts, arguments, "auto"), arguments)?,
                Runner::Interpreter => guest(polder(&parts, arguments, "never"), arguments)?,
                Runner::Tcg => guest(tcg(&parts), arguments)?,
            };
            report.add(*runner, None, &output);
        }
    }
    report.print();
    let file = crate::project::target().join("bench/engine.json");
    report.write("engine", &file)?;
    println!("written to {}", file.display());
    report.verdict()
}

/// Makes the root file system, the program, its inputs and the disk, as far as they are missing.
pub fn prepare() -> Result<Parts> {
    guests::all()?;
    let folder = crate::project::guests().join("bench");
    std::fs::create_dir_all(&folder)?;
    let root = folder.join("root");
    if !root.join("bench").exists() {
        step("mmdebstrap: the root file system of the bench");
        let _ = std::fs::remove_dir_all(&root);
        capture(
            Command::new("mmdebstrap")
                .args(["--quiet", "--variant=minbase", "--include", PACKAGES, "bookworm"])
                .arg(&root),
        )?;
        std::fs::create_dir_all(root.join("bench"))?;
    }
    let disk = folder.join("disk.raw");
    if install_rows(&root)? || !disk.exists() {
        step("mke2fs: the disk of the bench");
        let _ = std::fs::remove_file(&disk);
        run(Command::new("/sbin/mke2fs").args(["-q", "-t", "ext4", "-d"]).arg(&root).arg(&disk).arg(DISK))?;
    }
    let cloud = crate::project::guests().join("cloud");
    Ok(Parts { root, disk, kernel: cloud.join("vmlinuz"), initramfs: cloud.join("initramfs.cpio") })
}

/// Builds the program and its inputs into the root file system; says whether anything changed.
fn install_rows(root: &Path) -> Result<bool> {
    let sources = crate::project::root().join("benches/engine");
    let mut files: Vec<PathBuf> = Vec::new();
    let mut text = Vec::new();
    for entry in std::fs::read_dir(&sources)? {
        files.push(entry?.path());
    }
    files.sort();
    for file in &files {
        text.extend(std::fs::read(file)?);
    }
    let stamp = root.join("bench/sources");
    if std::fs::read(&stamp).is_ok_and(|built_from| built_from == text) {
        return Ok(false);
    }
    let rows = root.join("bench/rows");
    let programs = files.iter().filter(|file| file.extension().is_some_and(|extension| extension == "c"));
    run(Command::new("gcc").args(["-O2", "-Wall", "-static", "-o"]).arg(&rows).args(programs))?;
    std::fs::copy(sources.join("bench.sh"), root.join("bench/bench.sh"))?;
    run(Command::new(&rows).arg("inputs").arg(root.join("bench")))?;
    std::fs::write(stamp, text)?;
    Ok(true)
}

fn settings(arguments: &BenchArguments) -> Vec<(&'static str, String)> {
    vec![
        ("BATCH_MS", arguments.batch_ms.to_string()),
        ("REPEATS", arguments.repeats.to_string()),
        ("ROWS", arguments.rows.join(" ")),
    ]
}

fn native(parts: &Parts, arguments: &BenchArguments) -> Result<String> {
    // The rows want /proc and /dev; a mount namespace of its own keeps the mounts from outliving the run.
    let script =
        "mount -t proc proc proc && mount --bind /dev dev && mount -t tmpfs tmp tmp && exec chroot . /bench/bench.sh";
    capture(
        Command::new("unshare")
            .args(["--mount", "sh", "-c", script])
            .current_dir(&parts.root)
            .envs(settings(arguments)),
    )
}

fn polder(parts: &Parts, arguments: &BenchArguments, translate: &str) -> Command {
    let mut command = Command::new(crate::project::polder());
    command.args(["boot", "--engine", "software", "--memory", "2G", "--cpus", "1", "--no-reboot"]);
    command.args(["--translate", translate, "--disk"]);
    command.arg(format!("{},ro", parts.disk.display()));
    command.args(["--timeout", &arguments.timeout_s.to_string(), "--kernel"]).arg(&parts.kernel);
    command.arg("--initrd").arg(&parts.initramfs).arg("--append");
    command
}

fn tcg(parts: &Parts) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-accel", "tcg,thread=single", "-machine", "q35", "-cpu", "max", "-m", "2048", "-smp", "1"]);
    command.args(["-nodefaults", "-nographic", "-no-reboot", "-serial", "stdio", "-drive"]);
    command.arg(format!("file={},if=none,id=d,format=raw,readonly=on", parts.disk.display()));
    command.args(["-device", "virtio-blk-pci,drive=d", "-kernel"]).arg(&parts.kernel);
    command.arg("-initrd").arg(&parts.initramfs).arg("-append");
    command
}

/// Runs the rows in a monitor whose last option takes the kernel command line.
fn guest(command: Command, arguments: &BenchArguments) -> Result<String> {
    let words: Vec<String> =
        settings(arguments).into_iter().map(|(name, value)| format!("export {name}='{value}';")).collect();
    let script = format!(
        "{} mount -t ext4 -o ro /dev/vda /mnt && mount --bind /proc /mnt/proc && mount --bind /dev /mnt/dev && mount -t tmpfs tmp /mnt/tmp && chroot /mnt /bench/bench.sh",
        words.join(" ")
    );
    run_script(command, &script, arguments)
}

/// Runs a script as the guest's only program, in a monitor whose last option takes the kernel command line; returns what its console showed.
pub fn run_script(mut command: Command, script: &str, arguments: &BenchArguments) -> Result<String> {
    command.arg(format!("console=ttyS0 quiet polder_run=\"{script}\""));
    let output = Command::new("timeout")
        .arg((arguments.timeout_s + 30).to_string())
        .arg(command.get_program())
        .args(command.get_args())
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .context("cannot start the monitor")?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
