//! `polder rm`: removes instances and their disks.

use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::Args;

use super::disk;
use super::folder::InstanceFolder;
use super::record::InstanceTable;
use super::stop;
use crate::state_folder::StateFolder;

/// Remove instances and their disks
#[derive(Args)]
pub struct RmArguments {
    /// Names of the instances
    #[arg(required = true)]
    names: Vec<String>,
    /// Stop the machines of those that are active
    #[arg(short, long)]
    force: bool,
}

/// Carries out `polder rm`.
pub fn rm(arguments: &RmArguments) -> Result<ExitCode> {
    let state = StateFolder::open()?;
    let table = InstanceTable::open(&state)?;
    for name in &arguments.names {
        let record = table.get(name)?;
        if record.is_in_use() {
            if !arguments.force {
                bail!(
                    "the instance {name} is {} (`polder stop {name}` stops it, --force does so here)",
                    record.state()
                );
            }
            stop::end(&state, &table, &record)?;
        }
        // The row goes last: a removal that is interrupted can be repeated.
        disk::remove(&state, name)?;
        InstanceFolder::remove(&state, name)?;
        table.remove(name)?;
    }
    Ok(ExitCode::SUCCESS)
}
