//! The process of an instance: its name that is never used twice, and how one is started.

use std::ffi::OsString;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, Stdio};

use anyhow::{Context, Result, anyhow, bail};
use polder_vmm::{GdbConfig, GdbPlace, GdbStart};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};

use super::folder::InstanceFolder;
use super::record::{InstanceRecord, Lifetime};
use crate::state_folder::StateFolder;

/// What a machine's process writes to its standard output once the machine runs; anything else is why it does not.
pub const READY: &str = "ready\n";
/// The longest explanation that is read.
const EXPLANATION_LEN_MAX: u64 = 16 * 1024;

/// A process, told apart from a later one with the same number by its start time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProcessId {
    pub pid: i32,
    /// Clock ticks between the host's boot and the process' start (proc(5), /proc/pid/stat, field 22).
    pub start: u64,
}

impl ProcessId {
    /// This process.
    pub fn own() -> Self {
        let pid = rustix::process::getpid().as_raw_nonzero().get();
        ProcessId { pid, start: start_of(pid).unwrap_or(0) }
    }

    /// Whether it lives. A zombie does not: it has ended and waits to be noticed.
    pub fn is_alive(self) -> bool {
        start_of(self.pid) == Some(self.start)
    }

    /// Ends it at once.
    pub fn kill(self) {
        if let Some(pid) = Pid::from_raw(self.pid).filter(|pid| self.is_alive() && test_kill_process(*pid).is_ok()) {
            let _ = kill_process(pid, Signal::KILL);
        }
    }
}

/// The start time of a living process.
fn start_of(pid: i32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field, in parentheses, may hold anything; the fields after it are plain.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_ascii_whitespace().collect();
    let state = fields.first()?;
    (*state != "Z" && *state != "X").then(|| fields.get(19)?.parse().ok()).flatten()
}

/// What is asked of a machine's process for this time only.
#[derive(Clone, Copy)]
pub struct StartOptions<'a> {
    pub gdb: Option<&'a GdbConfig>,
    pub record_profile: bool,
}

/// A started machine.
pub struct MachineProcess {
    child: Child,
    /// Held for as long as the machine is to run, where it is to end with this command.
    _lifeline: Option<ChildStdin>,
}

impl MachineProcess {
    /// Starts the process of an instance and waits until its machine runs.
    pub fn start(
        state: &StateFolder,
        folder: &InstanceFolder,
        record: &InstanceRecord,
        options: &StartOptions<'_>,
    ) -> Result<Self> {
        let log = File::create(folder.log()).context("cannot make the instance's log")?;
        // The same binary, even if its file has been replaced since.
        let mut command = Command::new("/proc/self/exe");
        command.arg0("polder").args(["machine-process", &record.name]).env("POLDER_HOME", state.path());
        if let Some(gdb) = options.gdb {
            command.arg("--gdb").arg(gdb_word(gdb));
        }
        if options.record_profile {
            command.arg("--record-profile");
        }
        command.stdout(Stdio::piped()).stderr(log);
        command.stdin(if record.lifetime == Lifetime::Command { Stdio::piped() } else { Stdio::null() });
        let mut child = command.spawn().context("cannot start the machine's process")?;
        let lifeline = child.stdin.take();
        let mut explanation = String::new();
        if let Some(output) = child.stdout.take() {
            output
                .take(EXPLANATION_LEN_MAX)
                .read_to_string(&mut explanation)
                .context("cannot hear from the machine")?;
        }
        if explanation == READY {
            return Ok(MachineProcess { child, _lifeline: lifeline });
        }
        drop(lifeline);
        let status = child.wait().context("cannot wait for the machine's process")?;
        match explanation.trim() {
            "" => {
                bail!("the machine's process ended before its machine ran: {status} (see {})", folder.log().display())
            }
            text => Err(anyhow!("{text}")),
        }
    }

    /// Waits for the machine's end; the process' exit status.
    pub fn wait(mut self) -> Result<u8> {
        let status = self.child.wait().context("cannot wait for the machine's process")?;
        Ok(status.code().map_or(1, |code| code as u8))
    }

    /// Ends the machine, where it ends with this command, and waits until nothing is left of it.
    pub fn end(mut self) -> Result<()> {
        self._lifeline = None;
        self.wait().map(drop)
    }

    /// Whether the process has ended.
    pub fn has_ended(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }
}

/// gdb's way in as `--gdb` takes it.
fn gdb_word(gdb: &GdbConfig) -> OsString {
    let mut word = match &gdb.place {
        GdbPlace::Port(port) => OsString::from(port.to_string()),
        GdbPlace::Socket(path) => path.clone().into_os_string(),
    };
    if gdb.start == GdbStart::WithGdb {
        word.push(",wait");
    }
    word
}

/// Tells whoever started this process that the machine runs, or why not; then standard output leads nowhere.
pub fn tell_starter(text: &str) {
    let mut output = std::io::stdout().lock();
    let _ = output.write_all(text.as_bytes()).and_then(|()| output.flush());
    if let Ok(null) = File::options().write(true).open("/dev/null") {
        let _ = rustix::stdio::dup2_stdout(&null);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_lives_and_one_that_ended_does_not() {
        assert!(ProcessId::own().is_alive());
        let mut child = Command::new("true").spawn().unwrap();
        let pid = child.id() as i32;
        let process = ProcessId { pid, start: start_of(pid).unwrap_or(0) };
        child.wait().unwrap();
        assert!(!process.is_alive());
    }

    #[test]
    fn a_number_that_was_used_again_is_another_process() {
        let own = ProcessId::own();
        assert!(!ProcessId { start: own.start + 1, ..own }.is_alive());
    }
}
