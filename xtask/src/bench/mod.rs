//! `cargo xtask bench NAME`: measurements with the peer beside us in the same run.

mod boot;
mod engine;
mod programs;
mod report;
mod store;

use anyhow::{Result, bail};
use clap::Args;
use report::Runner;
use std::path::PathBuf;

#[derive(Args)]
pub struct BenchArguments {
    /// Which bench: engine (programs natively, in polder and in QEMU's TCG) boot (a Debian to its login prompt, in polder and in TCG), programs (apt-get, compilers and python in polder and in TCG) or store (disks beside qemu-nbd and nbdkit)
    name: String,
    /// How often each runner runs everything; the medians are shown; 5 for engine and store, 1 for boot and 3 for programs if not given
    #[arg(long)]
    rounds: Option<u32>,
    /// Length of a batch in milliseconds
    #[arg(long, default_value_t = 150)]
    batch_ms: u32,
    /// How often whole programs run in each round
    #[arg(long, default_value_t = 1)]
    repeats: u32,
    /// Only these rows, separated by commas
    #[arg(long, value_delimiter = ',')]
    rows: Vec<String>,
    /// Only these runners, separated by commas: native, polder, interpreter (polder without translation), tcg; all but interpreter if none is named
    #[arg(long, value_delimiter = ',')]
    runners: Vec<String>,
    /// Seconds after which a guest is given up
    #[arg(long, default_value_t = 3000)]
    timeout_s: u64,
    /// Of store: smaller disks, shorter turns and two rounds, to see that everything runs
    #[arg(long)]
    quick: bool,
    /// Of store: a folder on the disk that is measured; target/bench if not given
    #[arg(long, value_name = "FOLDER")]
    folder: Option<PathBuf>,
    /// Of store: how many clones the row of that name upgrades
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=1000))]
    clones: u32,
}

impl BenchArguments {
    /// The runners of a bench of whole machines, polder and TCG if none is named; `what` has no other form.
    fn monitors(&self, what: &str) -> Result<Vec<Runner>> {
        let runners: Vec<Runner> = match self.runners.as_slice() {
            [] => vec![Runner::Polder, Runner::Tcg],
            names => names.iter().map(|name| name.parse()).collect::<Result<_>>()?,
        };
        if runners.iter().any(|runner| matches!(runner, Runner::Native | Runner::Interpreter)) {
            bail!("{what} has no such form: choose from polder and tcg");
        }
        Ok(runners)
    }
}

/// Runs the bench of that name.
pub fn bench(arguments: &BenchArguments) -> Result<()> {
    match arguments.name.as_str() {
        "engine" => engine::measure(arguments),
        "boot" => boot::measure(arguments),
        "programs" => programs::measure(arguments),
        "store" => store::measure(arguments),
        other => bail!("there is no bench {other}: there are engine, boot, programs and store"),
    }
}
