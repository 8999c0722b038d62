//! What the rows of a run share: how long and how often, the disks they work on, the programs they call, and taking turns.

use super::place::Place;
use super::report::{Table, Unit};
use crate::bench::BenchArguments;
use crate::command::{capture, cargo, run, step};
use anyhow::{Context, Result};
use serde_json::Value;
use std::path::PathBuf;
use std::process::Command;

const MIB: u64 = 1 << 20;
/// What all rows need of the disk at a time, by the size of the disk under test.
const ROOM_FACTOR: u64 = 14;

/// Rounds of long turns, unless fewer are asked for.
const LONG_ROUNDS_MAX: u32 = 3;

/// One value of one turn, by name.
pub type Sample = Vec<(&'static str, f64)>;

pub struct Session {
    pub place: Place,
    pub rounds: u32,
    /// Length of a turn.
    pub seconds: f64,
    /// Bytes of the disk under test.
    pub disk_bytes: u64,
    pub quick: bool,
    /// Clones of the row that upgrades them.
    pub clones: u32,
    program: PathBuf,
}

/// Who takes turns.
pub struct Runner<'a> {
    name: String,
    turn: Box<dyn FnMut(u64) -> Result<Sample> + 'a>,
}

impl<'a> Runner<'a> {
    /// The turn gets a number that differs from round to round, as a seed.
    pub fn new(name: impl Into<String>, turn: impl FnMut(u64) -> Result<Sample> + 'a) -> Self {
        Runner { name: name.into(), turn: Box::new(turn) }
    }
}

/// What came of the turns: each runner's samples, by rounds.
pub struct Turns(Vec<(String, Vec<Sample>)>);

impl Turns {
    /// The values of one name as a table; runners that have none are left out.
    pub fn table(&self, name: impl Into<String>, unit: Unit, value: &str) -> Table {
        let mut table = Table::new(name, unit);
        for (runner, _) in &self.0 {
            let values = self.values(runner, value);
            if !values.is_empty() {
                table = table.with(runner, values);
            }
        }
        table
    }

    pub fn values(&self, runner: &str, value: &str) -> Vec<f64> {
        let samples = self.0.iter().filter(|(name, _)| name == runner).flat_map(|(_, samples)| samples);
        samples.flatten().filter(|(name, _)| *name == value).map(|(_, value)| *value).collect()
    }
}

impl Session {
    pub fn open(arguments: &BenchArguments, rounds: u32) -> Result<Self> {
        let disk_bytes = if arguments.quick { 256 * MIB } else { 1024 * MIB };
        let chosen = arguments.folder.clone().unwrap_or_else(|| crate::project::target().join("bench"));
        let place = Place::make(&chosen, ROOM_FACTOR * disk_bytes)?;
        step("cargo build --release (the program that measures in one process)");
        run(cargo().args(["build", "--quiet", "--release", "--package", "polder-store", "--example", "store_bench"]))?;
        Ok(Session {
            place,
            rounds: rounds.max(1),
            seconds: if arguments.quick { 0.5 } else { 1.5 },
            disk_bytes,
            quick: arguments.quick,
            clones: arguments.clones,
            program: crate::project::target().join("release/examples/store_bench"),
        })
    }

    /// Ends a row: nothing of its files is left.
    pub fn clear(&self) -> Result<()> {
        self.place.clear()
    }

    /// Takes turns: in each round everyone once, and each round begins with another one.
    pub fn by_turns(&self, runners: Vec<Runner<'_>>) -> Result<Turns> {
        Self::turns(self.rounds, runners)
    }

    /// The same for turns that are so long that a few of them say as much as many short ones.
    pub fn by_long_turns(&self, runners: Vec<Runner<'_>>) -> Result<Turns> {
        Self::turns(self.rounds.min(LONG_ROUNDS_MAX), runners)
    }

    fn turns(rounds: u32, mut runners: Vec<Runner<'_>>) -> Result<Turns> {
        let mut turns = Turns(runners.iter().map(|runner| (runner.name.clone(), Vec::new())).collect());
        for round in 0..rounds as usize {
            for turn in 0..runners.len() {
                let at = (round + turn) % runners.len();
                let runner = &mut runners[at];
                let sample = (runner.turn)(round as u64 + 1).with_context(|| format!("the turn of {}", runner.name))?;
                turns.0[at].1.push(sample);
            }
        }
        Ok(turns)
    }

    // Programs

    fn home(&self) -> PathBuf {
        self.place.path("home")
    }

    /// The `store=` of our program.
    pub fn store(&self) -> PathBuf {
        self.home().join("store")
    }

    pub fn polder(&self) -> Command {
        let mut command = Command::new(crate::project::polder());
        command.env("POLDER_HOME", self.home());
        command
    }

    /// Calls the program that measures in one process.
    pub fn measure(&self, command: &str, arguments: &[(&str, String)]) -> Result<Value> {
        let words = arguments.iter().map(|(key, value)| format!("{key}={value}"));
        Ok(serde_json::from_str(&capture(Command::new(&self.program).arg(command).args(words))?)?)
    }

    /// The same for a volume of the store, within its first bytes.
    pub fn measure_volume(&self, command: &str, volume: &str, arguments: &[(&str, String)]) -> Result<Value> {
        let mut all = vec![
            ("store", self.store().display().to_string()),
            ("volume", volume.to_owned()),
            ("range", self.disk_bytes.to_string()),
        ];
        all.extend(arguments.iter().map(|(key, value)| (*key, value.clone())));
        self.measure(command, &all)
    }

    /// Drops files and folders from the host's page cache (posix_fadvise, file by file).
    pub fn evict(&self, paths: &[PathBuf]) -> Result<()> {
        capture(Command::new(&self.program).arg("evict").args(paths)).map(drop)
    }

    /// What the distinct chunks of some raw disks take at least.
    pub fn ideal(&self, paths: &[PathBuf]) -> Result<Value> {
        Ok(serde_json::from_str(&capture(Command::new(&self.program).arg("ideal").args(paths))?)?)
    }

    // Disks

    /// A raw disk, all of it data, half of that compressible; made when it is asked for first.
    pub fn raw(&self) -> Result<PathBuf> {
        let path = self.place.path("base.raw");
        if !path.exists() {
            self.measure("make-data", &[("file", text(&path)), ("bytes", self.disk_bytes.to_string())])?;
        }
        Ok(path)
    }

    /// A copy of it, every block written.
    pub fn raw_copy(&self, name: &str) -> Result<PathBuf> {
        let path = self.place.path(name);
        if !path.exists() {
            run(Command::new("cp").args(["--sparse=never", "--reflink=never"]).arg(self.raw()?).arg(&path))?;
        }
        Ok(path)
    }

    /// The disk as qcow2.
    pub fn qcow2(&self, name: &str) -> Result<PathBuf> {
        let path = self.place.path(name);
        if !path.exists() {
            run(Command::new("qemu-img").args(["convert", "-f", "raw", "-O", "qcow2"]).arg(self.raw()?).arg(&path))?;
        }
        Ok(path)
    }

    /// A volume that begins as the disk.
    pub fn volume(&self, name: &str) -> Result<String> {
        if capture(self.polder().args(["image", "inspect", "base"])).is_err() {
            capture(self.polder().args(["image", "import", "--format", "raw"]).arg(self.raw()?).arg("base"))?;
        }
        capture(self.polder().args(["volume", "create", "--image", "base", name]))?;
        Ok(name.to_owned())
    }
}

pub fn text(path: &std::path::Path) -> String {
    path.display().to_string()
}

/// A number inside what a program printed.
pub fn number(value: &Value, path: &str) -> Result<f64> {
    value.pointer(path).and_then(Value::as_f64).with_context(|| format!("there is no number at {path} in {value}"))
}
