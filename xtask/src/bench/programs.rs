//! The programs bench: what people do in a guest, timed by the guest's own clock, in `polder boot` and in QEMU's TCG in turn.
//!
//! Rows: `apt-get install` from a repository on a disk, gcc and python as in the engine bench, four runs of gcc of which two run at a
//! time, on one and on two vCPUs, and rows with and without a dirty log. All get the same kernel and initramfs and a fresh copy of
//! the engine bench's disk, which they may write.

use super::BenchArguments;
use super::engine::{self, Parts};
use super::report::{Report, Runner};
use crate::command::{capture, run, step};
use anyhow::{Context, Result, bail};
use std::path::{Path, PathBuf};
use std::process::Command;

/// What the guest installs; with what they depend on these are 13 packages, of which some run scripts of their own.
const PACKAGES: [&str; 7] = ["bc", "ca-certificates", "jq", "less", "lua5.4", "make", "sqlite3"];
const REPOSITORY_DISK: &str = "64M";
const ROUNDS: u32 = 3;
/// The length of a round of the dirty log. Each starts with all pages clean, so every page costs its first store again.
const DIRTY_LOG_MS: &str = "100";

/// One machine of a round. Its rows are shown as ROW or ROW/VARIANT; a row's checksum is the same in all its variants.
struct Machine {
    runner: Runner,
    variant: Option<&'static str>,
    cpus: &'static str,
    dirty_log: bool,
    rows: &'static [&'static str],
}

const TWO_VCPUS: &str = "2vcpus";
const LOGGED: &str = "logged";
const LOGGED_ROWS: &[&str] = &["gcc_O2", "memcpy64k", "memcpy32m"];

/// Those whose times are compared follow each other (the last one and the first of the next round), so that what else the host does meets
/// both.
const MACHINES: [Machine; 5] = [
    Machine {
        runner: Runner::Polder,
        variant: None,
        cpus: "1",
        dirty_log: false,
        rows: &["compile", "apt_install", "gcc_O2", "python", "memcpy64k", "memcpy32m"],
    },
    Machine { runner: Runner::Polder, variant: Some(TWO_VCPUS), cpus: "2", dirty_log: false, rows: &["compile"] },
    Machine {
        runner: Runner::Tcg,
        variant: None,
        cpus: "1",
        dirty_log: false,
        rows: &["compile", "apt_install", "gcc_O2", "python"],
    },
    Machine { runner: Runner::Tcg, variant: Some(TWO_VCPUS), cpus: "2", dirty_log: false, rows: &["compile"] },
    Machine { runner: Runner::Polder, variant: Some(LOGGED), cpus: "1", dirty_log: true, rows: LOGGED_ROWS },
];

/// Measures, prints the table and the ratios between variants, and writes the table as JSON.
pub fn measure(arguments: &BenchArguments) -> Result<()> {
    let runners = arguments.monitors("the programs bench")?;
    if let Some(name) = arguments.rows.iter().find(|name| MACHINES.iter().all(|machine| !machine.has(name))) {
        bail!("there is no row {name}: choose from {}", MACHINES[0].rows.join(", "));
    }
    crate::setup::install()?;
    if runners.contains(&Runner::Tcg) {
        crate::setup::install_peer()?;
    }
    if !crate::setup::is_root() {
        bail!("the programs bench makes a root file system: run it as root");
    }
    let parts = engine::prepare()?;
    let repository = repository(&parts)?;
    crate::build::build()?;
    let mut report = Report::default();
    let rounds = arguments.rounds.unwrap_or(ROUNDS);
    for round in 1..=rounds {
        for machine in MACHINES.iter().filter(|machine| runners.contains(&machine.runner)) {
            let wanted = |row: &&str| arguments.rows.is_empty() || arguments.rows.iter().any(|name| name == row);
            let rows: Vec<&str> = machine.rows.iter().copied().filter(wanted).collect();
            if rows.is_empty() {
                continue;
            }
            step(&format!(
                "round {round} of {rounds}: {} {}",
                machine.runner.name(),
                machine.variant.unwrap_or_default()
            ));
            let output = boot(machine, &rows, &parts, &repository, arguments)?;
            report.add(machine.runner, machine.variant, &output);
        }
    }
    report.print();
    for line in ratios(&report) {
        println!("{line}");
    }
    let file = crate::project::target().join("bench/programs.json");
    report.write("programs", &file)?;
    println!("written to {}", file.display());
    report.verdict()
}

/// What the variants are measured for, as far as both sides of a ratio were.
fn ratios(report: &Report) -> Vec<String> {
    let ratio = |runner, row: &str, variant| {
        let (plain, varied) = (report.median(row, runner)?, report.median(&format!("{row}/{variant}"), runner)?);
        Some(plain / varied)
    };
    let mut lines = Vec::new();
    for runner in [Runner::Polder, Runner::Tcg] {
        if let Some(gain) = ratio(runner, "compile", TWO_VCPUS) {
            lines.push(format!("With two vCPUs {} compiles {gain:.2} times as fast as with one.", runner.name()));
        }
    }
    for row in LOGGED_ROWS {
        if let Some(speed) = ratio(Runner::Polder, row, LOGGED) {
            lines.push(format!(
                "With a dirty log in rounds of {DIRTY_LOG_MS} ms {row} needs {:.2} of its time.",
                1.0 / speed
            ));
        }
    }
    lines
}

impl Machine {
    fn has(&self, name: &str) -> bool {
        self.rows.contains(&name)
    }
}

/// The folder with the packages, their index and their names, for the root file system of the engine bench.
pub fn packages() -> Result<PathBuf> {
    packages_for(&engine::prepare()?)
}

fn packages_for(parts: &Parts) -> Result<PathBuf> {
    let folder = crate::project::guests().join("programs");
    let packages = folder.join("packages");
    let names = PACKAGES.join(" ");
    if std::fs::read_to_string(packages.join("install")).ok().as_ref() != Some(&names) {
        step("apt-get download: the packages that the guest installs");
        let _ = std::fs::remove_dir_all(&folder);
        let archives = folder.join("archives");
        std::fs::create_dir_all(archives.join("partial"))?;
        std::fs::create_dir_all(&packages)?;
        crate::setup::refresh_package_lists()?;
        // What the guest's root lacks is what its own record of packages lacks.
        capture(
            Command::new("apt-get")
                .arg("-o")
                .arg(format!("Dir::State::status={}", parts.root.join("var/lib/dpkg/status").display()))
                .arg("-o")
                .arg(format!("Dir::Cache::Archives={}", archives.display()))
                .args(["-o", "APT::Sandbox::User=root", "--quiet=2", "--yes", "--no-install-recommends"])
                .args(["--download-only", "install"])
                .args(PACKAGES),
        )?;
        index(&archives, &packages)?;
        std::fs::write(packages.join("install"), names)?;
    }
    Ok(packages)
}

/// The read-only disk with the packages and the script of the rows; made again when one of them changes.
fn repository(parts: &Parts) -> Result<PathBuf> {
    let packages = packages_for(parts)?;
    let disk = packages.with_file_name("repository.raw");
    let script = crate::project::root().join("benches/programs/programs.sh");
    let copy = packages.join("programs.sh");
    if !disk.exists() || std::fs::read(&copy).ok() != Some(std::fs::read(&script)?) {
        let _ = std::fs::remove_file(&disk);
        std::fs::copy(script, copy)?;
        run(Command::new("/sbin/mke2fs")
            .args(["-q", "-t", "ext4", "-d"])
            .arg(&packages)
            .arg(&disk)
            .arg(REPOSITORY_DISK))?;
    }
    Ok(disk)
}

/// Moves the packages into the repository and writes its index.
fn index(archives: &Path, packages: &Path) -> Result<()> {
    let mut index = String::new();
    for entry in std::fs::read_dir(archives)? {
        let file = entry?.path();
        let Some(name) = file.file_name().and_then(|name| name.to_str()).filter(|name| name.ends_with(".deb")) else {
            continue;
        };
        let control = capture(Command::new("dpkg-deb").arg("--field").arg(&file))?;
        let sum = capture(Command::new("sha256sum").arg(&file))?;
        let sum = sum.split_whitespace().next().context("sha256sum printed nothing")?;
        let size = file.metadata()?.len();
        index += &format!("{}\nFilename: ./{name}\nSize: {size}\nSHA256: {sum}\n\n", control.trim_end());
        std::fs::rename(&file, packages.join(name))?;
    }
    std::fs::write(packages.join("Packages"), index).context("cannot write the index of the packages")
}

/// Runs the rows in one machine; returns what its console showed.
fn boot(
    machine: &Machine,
    rows: &[&str],
    parts: &Parts,
    repository: &Path,
    arguments: &BenchArguments,
) -> Result<String> {
    let disk = repository.with_file_name("run.raw");
    run(Command::new("cp").arg("--sparse=always").arg(&parts.disk).arg(&disk))?;
    let script = format!(
        "export ROWS='{}' BATCH_MS={} REPEATS={}; mount -t ext4 /dev/vda /mnt && mount -t ext4 -o ro /dev/vdb /mnt/mnt && mount --bind /proc /mnt/proc && mount --bind /dev /mnt/dev && mount -t tmpfs tmp /mnt/tmp && chroot /mnt /mnt/programs.sh",
        rows.join(" "),
        arguments.batch_ms,
        arguments.repeats
    );
    let output = engine::run_script(monitor(machine, parts, &disk, repository, arguments), &script, arguments);
    std::fs::remove_file(&disk)?;
    output
}

/// The monitor's command, up to the option that takes the kernel command line.
fn monitor(machine: &Machine, parts: &Parts, disk: &Path, repository: &Path, arguments: &BenchArguments) -> Command {
    let mut command;
    if machine.runner == Runner::Polder {
        command = Command::new(crate::project::polder());
        command.args(["boot", "--engine", "software", "--no-reboot", "--memory", "2G", "--cpus", machine.cpus]);
        command.arg("--disk").arg(disk).arg("--disk").arg(format!("{},ro", repository.display()));
        if machine.dirty_log {
            command.args(["--test-dirty-log", DIRTY_LOG_MS]);
        }
        command.args(["--timeout", &arguments.timeout_s.to_string(), "--kernel"]).arg(&parts.kernel);
        command.arg("--initrd").arg(&parts.initramfs).arg("--append");
    } else {
        command = Command::new("qemu-system-x86_64");
        command.args(["-accel", "tcg,thread=multi", "-machine", "q35", "-cpu", "max", "-m", "2048"]);
        command.args(["-smp", machine.cpus, "-nodefaults", "-nographic", "-no-reboot", "-serial", "stdio"]);
        for (id, file, more) in [("a", disk, ""), ("b", repository, ",readonly=on")] {
            command.arg("-drive").arg(format!("file={},if=none,id={id},format=raw{more}", file.display()));
            command.args(["-device", &format!("virtio-blk-pci,drive={id}")]);
        }
        command.arg("-kernel").arg(&parts.kernel).arg("-initrd").arg(&parts.initramfs).arg("-append");
    }
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_between_a_row_and_its_variants() {
        let mut report = Report::default();
        report.add(Runner::Polder, None, "ROW compile 30.0 1\nROW gcc_O2 10.0 2\nBENCH END\n");
        report.add(Runner::Polder, Some(TWO_VCPUS), "ROW compile 15.0 1\nBENCH END\n");
        report.add(Runner::Polder, Some(LOGGED), "ROW gcc_O2 11.0 2\nBENCH END\n");
        let lines = ratios(&report);
        assert_eq!(lines.len(), 2);
        assert!(lines[0].contains("polder compiles 2.00 times"), "{}", lines[0]);
        assert!(lines[1].contains("gcc_O2 needs 1.10"), "{}", lines[1]);
    }
}
