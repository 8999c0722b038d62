//! `polder run`: makes an instance from an image and starts it.

use std::ffi::OsString;
use std::io::Read;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use clap::Args;
use polder_basics::ByteSize;
use polder_store::Store;
use polder_vmm::{CPUS_MAX, GdbConfig};

use super::console::{Detached, attach};
use super::disk;
use super::folder::InstanceFolder;
use super::process::{MachineProcess, StartOptions};
use super::record::{InstanceTable, Lifetime, NewInstance, Phase};
use super::session::{self, TerminalWish};
use super::stop::{self, STOP_TIMEOUT};
use crate::boot::{EngineName, parse_gdb, parse_memory};
use crate::image::{ImageRecord, open_store};
use crate::state_folder::StateFolder;

/// Make an instance from an image and start it
///
/// Without a command, the serial console is attached; on a terminal, Ctrl-A x leaves it. With one, it is run in the guest once
/// that has booted: its output is this command's output and its exit status this command's, and the guest is switched off afterwards.
///
/// An instance without --name and -d lasts as long as this command and leaves nothing behind. Others stay until `polder rm`.
///
/// Exit status without a command: 0 the guest powered off or was left, 11 it panicked or triple-faulted, 1 anything else.
#[derive(Args)]
#[command(verbatim_doc_comment)]
pub struct RunArguments {
    /// Name of the image (`polder image ls` lists them)
    image: String,
    /// Start it and come back at once; prints the instance's name
    #[arg(short, long, conflicts_with = "command")]
    detach: bool,
    /// Name of the instance: letters, digits and '-'
    #[arg(long)]
    name: Option<String>,
    /// Number of vCPUs, 1 to 8
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=CPUS_MAX as i64))]
    cpus: u32,
    /// Memory, 64M to 16G
    #[arg(long, value_name = "SIZE", default_value = "1G", value_parser = parse_memory)]
    memory: ByteSize,
    /// What runs the guest: auto takes the faster engine that works here
    #[arg(long, value_name = "ENGINE", default_value = "auto")]
    engine: EngineName,
    /// Let gdb attach: at a port of 127.0.0.1 or at a Unix socket; with ",wait" nothing runs until gdb says so
    #[arg(long, value_name = "PORT|SOCKET[,wait]", value_parser = parse_gdb)]
    gdb: Option<GdbConfig>,
    /// Keep, beside the attached image in its object store, what this machine reads of it: the next one to run it gets that first
    #[arg(long)]
    record_profile: bool,
    /// Give the command a terminal
    #[arg(short, long, requires = "command")]
    tty: bool,
    /// Command to run in the guest, after --
    #[arg(last = true)]
    command: Vec<OsString>,
}

/// Carries out `polder run`.
pub fn run(arguments: &RunArguments) -> Result<ExitCode> {
    let state = StateFolder::open()?;
    let store = open_store(&state)?;
    let image = ImageRecord::load(&store, &arguments.image)?;
    let table = InstanceTable::open(&state)?;
    sweep(&state, &table)?;
    let kept = arguments.detach || arguments.name.is_some();
    let new = NewInstance {
        name: match &arguments.name {
            Some(name) => name.clone(),
            None => random_name(&image.name)?,
        },
        image: image.name,
        cpus: arguments.cpus,
        ram: arguments.memory,
        engine: arguments.engine.word().to_owned(),
        lifetime: if kept { Lifetime::Kept } else { Lifetime::Command },
    };
    let options = StartOptions { gdb: arguments.gdb.as_ref(), record_profile: arguments.record_profile };
    let (folder, process) = start(&state, &store, &table, &new, &options)?;
    if arguments.detach {
        println!("{}", new.name);
        return Ok(ExitCode::SUCCESS);
    }
    if arguments.command.is_empty() {
        return run_attached(&new, &folder, process);
    }
    run_command(arguments, &state, &new, &folder, process)
}

/// Makes the instance and its machine; on an error nothing is left of it.
fn start(
    state: &StateFolder,
    store: &Arc<Store>,
    table: &InstanceTable,
    new: &NewInstance,
    options: &StartOptions<'_>,
) -> Result<(InstanceFolder, MachineProcess)> {
    table.claim(new)?;
    let made = (|| {
        let folder = InstanceFolder::make(state, &new.name)?;
        disk::make(store, &new.name, &new.image)?;
        let process = MachineProcess::start(state, &folder, &table.get(&new.name)?, options)?;
        Ok((folder, process))
    })();
    if made.is_err() {
        // The error that is reported is the one that matters.
        let _ = disk::remove(state, &new.name);
        let _ = InstanceFolder::remove(state, &new.name);
        let _ = table.remove(&new.name);
    }
    made
}

fn run_attached(new: &NewInstance, folder: &InstanceFolder, process: MachineProcess) -> Result<ExitCode> {
    match (attach(folder)?, new.lifetime) {
        (Detached::MachineEnded, _) => process.wait().map(ExitCode::from),
        (Detached::Left, Lifetime::Command) => process.end().map(|()| ExitCode::SUCCESS),
        (Detached::Left, Lifetime::Kept) => {
            eprintln!("polder: the instance runs on (`polder console {}` attaches again)", new.name);
            Ok(ExitCode::SUCCESS)
        }
    }
}

fn run_command(
    arguments: &RunArguments,
    state: &StateFolder,
    new: &NewInstance,
    folder: &InstanceFolder,
    mut process: MachineProcess,
) -> Result<ExitCode> {
    let wish = if arguments.tty { TerminalWish::Terminal } else { TerminalWish::Pipes };
    let command = session::command(&arguments.command, &[], None);
    let result = session::wait_for_agent(folder, &new.name, || process.has_ended())
        .and_then(|()| session::execute(folder, command, wish));
    match new.lifetime {
        // Its disk goes with it: there is nothing to write back.
        Lifetime::Command => process.end()?,
        Lifetime::Kept => {
            stop::stop_instance(state, &new.name, STOP_TIMEOUT)?;
        }
    }
    Ok(ExitCode::from(result?))
}

/// The image's name and a few random digits.
fn random_name(image: &str) -> Result<String> {
    let mut random = [0; 3];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut random))
        .context("the host's random numbers cannot be read from /dev/urandom")?;
    let plain: String = image.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).take(50).collect();
    Ok(format!("{}-{:02x}{:02x}{:02x}", plain.trim_matches('-'), random[0], random[1], random[2]))
}

/// Removes what killed commands could not: instances that were never started or were to last as long as their command.
pub fn sweep(state: &StateFolder, table: &InstanceTable) -> Result<()> {
    for record in table.all()? {
        let orphan = record.phase == Phase::Making || record.lifetime == Lifetime::Command;
        if orphan && !record.process.is_alive() {
            disk::remove(state, &record.name)?;
            InstanceFolder::remove(state, &record.name)?;
            table.remove(&record.name)?;
        }
    }
    Ok(())
}

/// Refuses an empty command before anything is made of it.
pub fn check_command(command: &[OsString]) -> Result<()> {
    if command.first().is_none_or(|word| word.is_empty()) {
        bail!("there is no command to run (write it after --)");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::instance::record::check_name;

    #[test]
    fn random_names_are_names() {
        for image in ["debian", "my_image.v2", &"x".repeat(64)] {
            check_name(&random_name(image).unwrap()).unwrap();
        }
    }
}
