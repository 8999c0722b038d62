//! The polder command line.
//!
//! Invariant: nothing else in the house prints, and an error's chain is printed once, here. Exit status: 0 done, 2 wrong
//! usage, 1 anything else; commands that run a guest or a program in one end with the status their help names.

mod image;
mod state_folder;

use anyhow::Result;
use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// Virtual machines on any x86-64 Linux host.
#[derive(Parser)]
#[command(name = "polder", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make, list and remove images
    Image(image::ImageArguments),
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("polder: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Image(arguments) => image::image(arguments),
    }
}
