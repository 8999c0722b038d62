//! `polder ps`: lists the instances.

use std::process::ExitCode;

use anyhow::Result;
use polder_basics::ByteSize;

use super::record::InstanceTable;
use super::run::sweep;
use crate::image::utc;
use crate::state_folder::StateFolder;

/// Carries out `polder ps`.
pub fn ps() -> Result<ExitCode> {
    let state = StateFolder::open()?;
    let table = InstanceTable::open(&state)?;
    sweep(&state, &table)?;
    let records = table.all()?;
    let name_len = records.iter().map(|record| record.name.len()).max().unwrap_or(0).max(20);
    println!("{:<name_len$} {:<16} {:>4} {:>8}  {:<21} STATE", "NAME", "IMAGE", "CPUS", "MEMORY", "CREATED");
    for record in records {
        println!(
            "{:<name_len$} {:<16} {:>4} {:>8}  {:<21} {}",
            record.name,
            record.image,
            record.cpus,
            ByteSize(record.ram_bytes).to_string(),
            utc(record.created_s),
            record.state(),
        );
    }
    Ok(ExitCode::SUCCESS)
}
