//! Instances: `polder run`, `ps`, `exec`, `console`, `balloon`, `stop` and `rm`.
//!
//! An instance is a row in `instances.db` (SQLite, WAL) and a folder `instances/NAME` in the state folder: a private copy of the
//! image's disk and three sockets. While it is active it is one process of its own, started by `run` from this same binary.
//!
//! What always holds:
//! - A name belongs to one instance: the row is claimed before anything else is made.
//! - Nobody has to clean up after a crash: a row whose process is gone is shown as inactive, whatever the row says.
//! - An instance that was to last no longer than its command (no `--name`, no `-d`) leaves nothing behind, even if the command is
//!   killed: its process ends with the command and removes it.
//!
//! Modules: `record` (the table), `folder` (paths and sockets), `disk` (the private copy), `process` (starting a machine's process, and
//! whether one lives), `machine` (what runs in it), `console_server` and `backlog` (the console's many readers), `control_socket`
//! (orders to the process), `console` (attaching), `session` (programs in the guest), and one for each command.

mod backlog;
mod balloon;
mod console;
mod console_server;
mod control_socket;
mod disk;
mod exec;
mod folder;
mod machine;
mod process;
mod ps;
mod record;
mod rm;
mod run;
mod session;
mod stop;

pub use balloon::{BalloonArguments, balloon};
pub use console::{ConsoleArguments, console};
pub use exec::{ExecArguments, exec};
pub use machine::{MachineArguments, leave_session, machine};
pub use ps::ps;
pub use rm::{RmArguments, rm};
pub use run::{RunArguments, run};
pub use stop::{StopArguments, stop};
