//! The project's own commands: `cargo xtask NAME`.
//!
//! Everything a developer or CI does beyond `cargo build` has its one home here, so that the commands in README, in `.ci/run`
//! and on a developer's machine are the same. Every command ends with an honest status: 0 only if all it promises was done.
//!
//! Modules: `setup` (Debian packages), `check` (fmt, clippy, tidy), `tidy` (the house rules), `guests` (test guests under
//! `target/guests`), `build` (release binary and static agent), `test`, `demo`, `bench`; `project` (paths) and `command`
//! (running other programs) serve them all.

mod bench;
mod build;
mod check;
mod command;
mod demo;
mod guests;
mod project;
mod setup;
mod test;
mod tidy;

use anyhow::Result;
use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// The project's own commands.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Install the Debian packages that building and testing need (as root), or print the command that does
    Setup,
    /// Format check, clippy with warnings denied, and tidy
    Check,
    /// Check the house rules: floors, SAFETY notes, allows, dead files, promises, the top folder
    Tidy,
    /// Build the release binary and the static guest agent
    Build,
    /// Build the test guests into target/guests
    Guests(guests::GuestsArguments),
    /// Do the set-up and run every test
    Test(test::TestArguments),
    /// Build polder, make a Debian image, boot it, run a command inside and shut it down
    Demo,
    /// Measure, and print a table with the peer beside us
    Bench(bench::BenchArguments),
}

fn main() -> ExitCode {
    match run(Arguments::parse().task) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> Result<()> {
    match task {
        Task::Setup => setup::install(),
        Task::Check => check::check(),
        Task::Tidy => tidy::tidy(),
        Task::Build => build::build().map(|_| ()),
        Task::Guests(arguments) => guests::guests(&arguments),
        Task::Test(arguments) => test::test(&arguments),
        Task::Demo => demo::demo(),
        Task::Bench(arguments) => bench::bench(&arguments),
    }
}
