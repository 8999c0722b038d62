//! The boot bench: from the start of the monitor's process to the login prompt of a Debian image, in `polder boot` and in QEMU's TCG, in turn.
//!
//! Both get the same kernel, initrd and command line, a fresh copy of the same disk, the same number of vCPUs and the same memory.
//! The prompt is the end because it is what a user waits for; the machine is then ended from outside.

use super::BenchArguments;
use super::report::{Runner, processor};
use crate::command::{run, step};
use crate::guests::{self, Flavour};
use anyhow::{Context, Result, bail};
use serde_json::json;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

const PROMPT: &[u8] = b" login: ";
const MEMORY_MIB: u32 = 1024;
/// What is shown of a console whose prompt did not come.
const SHOWN_BYTES: usize = 1200;

/// One row of the table.
struct Row {
    flavour: Flavour,
    name: &'static str,
    cpus: u32,
}

const ROWS: [Row; 4] = [
    Row { flavour: Flavour::Cloud, name: "cloud/1", cpus: 1 },
    Row { flavour: Flavour::Cloud, name: "cloud/4", cpus: 4 },
    Row { flavour: Flavour::Generic, name: "generic/1", cpus: 1 },
    Row { flavour: Flavour::Generic, name: "generic/4", cpus: 4 },
];

/// Seconds of each round of one row.
struct Measured<'a> {
    row: &'a Row,
    seconds: Vec<(Runner, Vec<f64>)>,
}

/// A monitor that is ended when dropped, whatever it is doing.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself; either way it is waited for.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Measures, prints the table and writes it as JSON.
pub fn measure(arguments: &BenchArguments) -> Result<()> {
    let runners = arguments.monitors("a boot")?;
    if let Some(name) = arguments.rows.iter().find(|name| ROWS.iter().all(|row| row.name != **name)) {
        bail!("there is no row {name}: choose from cloud/1, cloud/4, generic/1 and generic/4");
    }
    let wanted = |row: &&Row| arguments.rows.is_empty() || arguments.rows.iter().any(|name| name == row.name);
    let rows: Vec<&Row> = ROWS.iter().filter(wanted).collect();
    crate::setup::install()?;
    if runners.contains(&Runner::Tcg) {
        crate::setup::install_peer()?;
    }
    crate::build::build()?;
    let mut table = Vec::new();
    for row in rows {
        let image = guests::image::with_kernel(row.flavour)?;
        let mut seconds: Vec<(Runner, Vec<f64>)> = runners.iter().map(|runner| (*runner, Vec::new())).collect();
        let rounds = arguments.rounds.unwrap_or(1);
        for round in 1..=rounds {
            for (runner, times) in &mut seconds {
                step(&format!("{}, round {round} of {rounds}: {}", row.name, runner.name()));
                let time = to_prompt(*runner, row, &image, arguments.timeout_s)?;
                println!("{:.1} s", time.as_secs_f64());
                times.push(time.as_secs_f64());
            }
        }
        table.push(Measured { row, seconds });
    }
    print(&table);
    let file = crate::project::target().join("bench/boot.json");
    write(&table, &file)?;
    println!("written to {}", file.display());
    Ok(())
}

/// Boots one machine to its prompt. The first boot of a fresh copy is measured, from files that were just read.
fn to_prompt(runner: Runner, row: &Row, image: &Path, timeout_s: u64) -> Result<Duration> {
    let folder = crate::project::guests().join("bench");
    std::fs::create_dir_all(&folder)?;
    let disk = folder.join("boot.raw");
    run(Command::new("cp").arg("--sparse=always").arg(image.join("disk.raw")).arg(&disk))?;
    let result = boot(monitor(runner, row, image, &disk)?, timeout_s);
    std::fs::remove_file(&disk)?;
    result.with_context(|| format!("{} in {}", row.name, runner.name()))
}

fn monitor(runner: Runner, row: &Row, image: &Path, disk: &Path) -> Result<Command> {
    let record = std::fs::read_to_string(image.join("image.json"))?;
    let record: serde_json::Value = serde_json::from_str(&record)?;
    let command_line = record["command_line"].as_str().context("the image's record names no kernel command line")?;
    let (cpus, memory) = (row.cpus.to_string(), MEMORY_MIB.to_string());
    let mut command;
    if runner == Runner::Polder {
        command = Command::new(crate::project::polder());
        command.args(["boot", "--engine", "software", "--no-reboot", "--cpus", &cpus]);
        command.args(["--memory", &format!("{memory}M"), "--disk"]).arg(disk);
        command.arg("--kernel").arg(image.join("kernel")).arg("--initrd").arg(image.join("initrd"));
        command.args(["--append", command_line]);
    } else {
        command = Command::new("qemu-system-x86_64");
        command.args(["-accel", "tcg", "-machine", "q35", "-cpu", "max", "-m", &memory, "-smp", &cpus]);
        command.args(["-nodefaults", "-nographic", "-no-reboot", "-serial", "stdio", "-drive"]);
        command.arg(format!("file={},if=none,id=d,format=raw", disk.display()));
        command.args(["-device", "virtio-blk-pci,drive=d", "-kernel"]).arg(image.join("kernel"));
        command.arg("-initrd").arg(image.join("initrd")).args(["-append", command_line]);
    }
    Ok(command)
}

/// Runs the monitor until its console shows the prompt, and ends it.
fn boot(mut command: Command, timeout_s: u64) -> Result<Duration> {
    let start = Instant::now();
    let mut child = Running(command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("cannot start it")?);
    let mut output = child.0.stdout.take().context("it has no standard output")?;
    let (sender, receiver) = mpsc::channel();
    let reader = std::thread::spawn(move || {
        let (mut console, mut part) = (Vec::new(), [0; 4096]);
        while let Ok(length @ 1..) = output.read(&mut part) {
            console.extend_from_slice(&part[..length]);
            if let Some(at) = console.windows(PROMPT.len()).position(|window| window == PROMPT) {
                // The other side may have given up meanwhile.
                let _ = sender.send(start.elapsed());
                console.truncate(at);
                break;
            }
        }
        console
    });
    let time = receiver.recv_timeout(Duration::from_secs(timeout_s));
    drop(child);
    let console = reader.join().unwrap_or_default();
    time.map_err(|_| {
        let tail = String::from_utf8_lossy(&console[console.len().saturating_sub(SHOWN_BYTES)..]).into_owned();
        anyhow::anyhow!("no login prompt within {timeout_s} s; the console's end:\n{tail}")
    })
}

fn median(times: &[f64]) -> f64 {
    let mut sorted = times.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

fn print(table: &[Measured]) {
    println!("| kernel/vCPUs | polder | tcg | polder / tcg |");
    println!("|---|---|---|---|");
    for measured in table {
        let times = |runner| measured.seconds.iter().find(|(known, _)| *known == runner).map(|(_, times)| times);
        let cell = |runner| times(runner).map_or("-".to_string(), |times| shown(times));
        let ratio = match (times(Runner::Polder), times(Runner::Tcg)) {
            (Some(ours), Some(peer)) => format!("{:.2}", median(ours) / median(peer)),
            _ => "-".to_string(),
        };
        println!("| {} | {} | {} | {ratio} |", measured.row.name, cell(Runner::Polder), cell(Runner::Tcg));
    }
}

/// The median, and from where to where if there is more than one.
fn shown(times: &[f64]) -> String {
    let (least, most) =
        times.iter().fold((f64::MAX, f64::MIN), |(least, most), time| (time.min(least), time.max(most)));
    match times.len() {
        1 => format!("{:.1} s", times[0]),
        _ => format!("{:.1} s ({least:.1} to {most:.1})", median(times)),
    }
}

fn write(table: &[Measured], file: &PathBuf) -> Result<()> {
    let rows: Vec<_> = table
        .iter()
        .map(|measured| {
            let mut entry = json!({ "row": measured.row.name });
            for (runner, times) in &measured.seconds {
                entry[format!("{}_s", runner.name())] = json!(times);
            }
            entry
        })
        .collect();
    let report = json!({
        "format": 1, "bench": "boot", "processor": processor(), "memory_mib": MEMORY_MIB, "rows": rows,
    });
    if let Some(folder) = file.parent() {
        std::fs::create_dir_all(folder)?;
    }
    std::fs::write(file, serde_json::to_string_pretty(&report)? + "\n")
        .with_context(|| format!("cannot write {}", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn script(text: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", text]);
        command
    }

    #[test]
    fn a_boot_ends_at_its_prompt_and_one_without_prompt_fails() {
        boot(script("echo Debian; printf 'debian login: '; exec sleep 1000"), 60).unwrap();
        let error = boot(script("echo Kernel panic"), 60).unwrap_err().to_string();
        assert!(error.contains("Kernel panic"), "{error}");
    }

    #[test]
    fn the_median_and_the_ends_are_shown() {
        assert_eq!(shown(&[3.0, 1.0, 2.04]), "2.0 s (1.0 to 3.0)");
        assert_eq!(shown(&[7.0]), "7.0 s");
    }
}
