//! `cargo xtask bench NAME`: measurements with the peer beside us in the same run.

use anyhow::{Result, bail};
use clap::Args;

#[derive(Args)]
pub struct BenchArguments {
    /// Which bench: engine
    name: String,
}

/// Runs the bench of that name.
pub fn bench(arguments: &BenchArguments) -> Result<()> {
    bail!("there is no bench {}", arguments.name)
}
