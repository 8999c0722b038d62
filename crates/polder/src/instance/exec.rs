//! `polder exec`: runs a program in an active instance.

use std::ffi::OsString;
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;

use super::folder::InstanceFolder;
use super::record::InstanceTable;
use super::run::check_command;
use super::session::{self, TerminalWish};
use crate::state_folder::StateFolder;

/// Run a command in an active instance
///
/// Waits until the guest has booted. Input, output and exit status are the command's; 127 says that it does not exist in the guest, 126
/// that it cannot be run, 128 + N that signal N ended it.
#[derive(Args)]
#[command(verbatim_doc_comment)]
pub struct ExecArguments {
    /// Name of the instance
    name: String,
    /// Give the command a terminal
    #[arg(short, long)]
    tty: bool,
    /// Set a variable for the command
    #[arg(short, long, value_name = "NAME=VALUE")]
    env: Vec<OsString>,
    /// Folder in the guest in which it runs
    #[arg(short, long, value_name = "FOLDER")]
    workdir: Option<OsString>,
    /// Command to run in the guest, after --
    #[arg(last = true, required = true)]
    command: Vec<OsString>,
}

/// Carries out `polder exec`.
pub fn exec(arguments: &ExecArguments) -> Result<ExitCode> {
    check_command(&arguments.command)?;
    let state = StateFolder::open()?;
    let table = InstanceTable::open(&state)?;
    let record = table.get_active(&arguments.name)?;
    let folder = InstanceFolder::open(&state, &record.name)?;
    let wish = if arguments.tty { TerminalWish::Terminal } else { TerminalWish::Pipes };
    let command = session::command(&arguments.command, &arguments.env, arguments.workdir.as_ref());
    session::wait_for_agent(&folder, &record.name, || !record.process.is_alive())?;
    session::execute(&folder, command, wish).map(ExitCode::from)
}
