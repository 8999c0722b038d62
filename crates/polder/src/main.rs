//! The polder command line.
//!
//! Invariant: nothing else in the house prints, and an error's chain is printed once, here. Exit status: 0 done, 2 wrong
//! usage, 1 anything else; commands that run a guest or a program in one end with the status their help names.

mod boot;
mod doctor;
mod hint;
mod image;
mod instance;
mod state_folder;
mod store;
mod volume;
mod watched;

use anyhow::Result;
use clap::{Parser, Subcommand};
use polder_basics::{Clock, SystemClock};
use std::process::ExitCode;
use watched::Hold;

/// Anything but the guest's own end, and wrong usage.
const STATUS_FAILED: u8 = 1;

/// Virtual machines on any x86-64 Linux host.
#[derive(Parser)]
#[command(name = "polder", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Boot(boot::BootArguments),
    Doctor(doctor::DoctorArguments),
    /// Make, list and remove images
    Image(image::ImageArguments),
    /// Make, list, remove, snapshot, clone, compare and serve virtual disks
    Volume(volume::VolumeArguments),
    /// Show, collect, verify and repair the store that holds them
    Store(store::StoreArguments),
    Run(instance::RunArguments),
    /// List the instances
    Ps,
    Exec(instance::ExecArguments),
    /// Attach to the serial console of an active instance; on a terminal, Ctrl-A x leaves it
    Console(instance::ConsoleArguments),
    Balloon(instance::BalloonArguments),
    Stop(instance::StopArguments),
    Rm(instance::RmArguments),
    /// The process of an instance; started by `polder run`
    #[command(hide = true)]
    MachineProcess(instance::MachineArguments),
}

fn main() -> ExitCode {
    let process_start_ns = SystemClock.monotonic_ns();
    let command = Arguments::parse().command;
    let filter = match &command {
        Command::Boot(arguments) => arguments.log_filter(),
        _ => None,
    };
    log_to_stderr(filter);
    match command {
        Command::Boot(arguments) => {
            watched::run(arguments.hold(), |orders| boot::boot(&arguments, orders, process_start_ns), told)
        }
        Command::MachineProcess(arguments) => {
            instance::leave_session();
            watched::run(Hold::Possible, |orders| instance::machine(&arguments, orders, process_start_ns), told)
        }
        command => match run(command) {
            Ok(status) => status,
            Err(error) => ExitCode::from(told(Err(error))),
        },
    }
}

/// The exit status; an error is told first.
fn told(result: Result<u8>) -> u8 {
    result.unwrap_or_else(|error| {
        eprintln!("polder: {error:#}");
        if let Some(hint) = hint::hint(&error) {
            eprintln!("hint: {hint}");
        }
        STATUS_FAILED
    })
}

/// Events of the libraries go to stderr when POLDER_LOG asks for them (`POLDER_LOG=debug`, `POLDER_LOG=polder::exceptions=trace`).
/// `otherwise` is the filter if it does not.
fn log_to_stderr(otherwise: Option<&str>) {
    let filter = tracing_subscriber::EnvFilter::try_from_env("POLDER_LOG").ok();
    if let Some(filter) = filter.or_else(|| otherwise.map(tracing_subscriber::EnvFilter::new)) {
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).init();
    }
}

fn run(command: Command) -> Result<ExitCode> {
    match command {
        // These end with a machine's status.
        Command::Boot(_) | Command::MachineProcess(_) => unreachable!("main runs machines"),
        Command::Doctor(arguments) => doctor::doctor(&arguments),
        Command::Image(arguments) => image::image(arguments).map(|()| ExitCode::SUCCESS),
        Command::Volume(arguments) => volume::volume(arguments),
        Command::Store(arguments) => store::store(&arguments),
        Command::Run(arguments) => instance::run(&arguments),
        Command::Ps => instance::ps(),
        Command::Exec(arguments) => instance::exec(&arguments),
        Command::Console(arguments) => instance::console(&arguments),
        Command::Balloon(arguments) => instance::balloon(&arguments),
        Command::Stop(arguments) => instance::stop(&arguments),
        Command::Rm(arguments) => instance::rm(&arguments),
    }
}
