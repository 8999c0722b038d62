//! One program that runs for a session: started with pipes or a terminal, watched through a pidfd.
//!
//! The program leads a process group of its own, so that a signal and the end of the session reach whatever it started. Its ends of
//! pipes are ours alone and do not block.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use polder_basics::agent_protocol::{AgentErrorKind, Command, ExitStatus, TerminalSize};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags, fcntl_getfl, fcntl_setfl};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

/// Where programs are looked for.
pub const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// How long a program has between the hang-up and its end when the host has gone away.
const HANG_UP_TIMEOUT: Duration = Duration::from_secs(2);

/// A running program. Dropping it hangs it up and waits for its end.
pub struct Program {
    child: Child,
    pid: Pid,
    pidfd: OwnedFd,
    /// Where input goes; `None` after its end.
    pub stdin: Option<OwnedFd>,
    pub stdout: Option<OwnedFd>,
    /// `None` with a terminal.
    pub stderr: Option<OwnedFd>,
    has_terminal: bool,
    ended: bool,
}

/// The program did not start.
#[derive(Debug)]
pub struct StartError {
    pub kind: AgentErrorKind,
    pub text: String,
}

impl StartError {
    fn new(program: &str, error: &io::Error) -> Self {
        let (kind, text) = match error.kind() {
            io::ErrorKind::NotFound => {
                (AgentErrorKind::NotFound, format!("there is no program {program} in the guest"))
            }
            io::ErrorKind::PermissionDenied => {
                (AgentErrorKind::NotExecutable, format!("{program} in the guest may not be run: it is no program"))
            }
            _ if error.raw_os_error() == Some(libc::ENOEXEC) => {
                (AgentErrorKind::NotExecutable, format!("{program} in the guest is in no format that can be run"))
            }
            _ => (AgentErrorKind::Other, format!("{program} cannot be started: {error}")),
        };
        StartError { kind, text }
    }
}

impl Program {
    /// Starts a program.
    pub fn start(command: &Command) -> Result<Self, StartError> {
        let Some((name, arguments)) = command.arguments.split_first() else {
            return Err(StartError { kind: AgentErrorKind::BadRequest, text: "there is no program to run".into() });
        };
        let shown = String::from_utf8_lossy(name).into_owned();
        let directory = command.directory.as_deref().map(|path| Path::new(OsStr::from_bytes(path)));
        if let Some(directory) = directory.filter(|directory| !directory.is_dir()) {
            let text = format!("the directory {} does not exist", directory.display());
            return Err(StartError { kind: AgentErrorKind::NotFound, text });
        }
        let home = if Path::new("/root").is_dir() { Path::new("/root") } else { Path::new("/") };
        let mut process = std::process::Command::new(OsStr::from_bytes(name));
        process.args(arguments.iter().map(|argument| OsStr::from_bytes(argument)));
        process.env_clear().envs([("PATH", DEFAULT_PATH), ("USER", "root"), ("LOGNAME", "root"), ("SHELL", "/bin/sh")]);
        process.env("HOME", home).env("LANG", "C.UTF-8");
        for variable in &command.environment {
            let mut halves = variable.splitn(2, |byte| *byte == b'=');
            let (name, value) = (halves.next().unwrap_or_default(), halves.next().unwrap_or_default());
            if name.is_empty() {
                let text = "an environment variable has no name".to_owned();
                return Err(StartError { kind: AgentErrorKind::BadRequest, text });
            }
            process.env(OsStr::from_bytes(name), OsStr::from_bytes(value));
        }
        process.current_dir(directory.unwrap_or(home));
        let started = match command.terminal {
            Some(size) => start_on_terminal(process, size),
            None => start_on_pipes(process),
        };
        started.map_err(|error| StartError::new(&shown, &error))
    }

    fn new(mut child: Child, pipes: [Option<OwnedFd>; 3], has_terminal: bool) -> io::Result<Self> {
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let opened = pid.ok_or(io::ErrorKind::InvalidData.into()).and_then(|pid| {
            for pipe in pipes.iter().flatten() {
                set_nonblocking(pipe.as_fd())?;
            }
            Ok((pid, pidfd_open(pid, PidfdFlags::empty())?))
        });
        match opened {
            Ok((pid, pidfd)) => {
                let [stdin, stdout, stderr] = pipes;
                Ok(Program { child, pid, pidfd, stdin, stdout, stderr, has_terminal, ended: false })
            }
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(error)
            }
        }
    }

    /// Readable once the program has ended.
    pub fn end_event(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Whether the program runs on a terminal.
    pub fn has_terminal(&self) -> bool {
        self.has_terminal
    }

    /// How the program ended, once it has.
    pub fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        let Some(status) = self.child.try_wait()? else { return Ok(None) };
        self.ended = true;
        Ok(Some(match (status.code(), status.signal()) {
            (Some(code), _) => ExitStatus::Code(code as u8),
            (None, Some(signal)) => ExitStatus::Signal(signal as u8),
            (None, None) => ExitStatus::Code(1),
        }))
    }

    /// Sends the program's group a signal; unknown numbers are ignored, as is a program that has ended.
    pub fn signal(&self, number: u8) {
        if let Some(signal) = Signal::from_named_raw(i32::from(number)).filter(|_| !self.ended) {
            let _ = kill_process_group(self.pid, signal);
        }
    }

    /// Sets the terminal's size.
    pub fn resize(&self, size: TerminalSize) {
        if let Some(terminal) = self.stdout.as_ref().filter(|_| self.has_terminal) {
            let _ = tcsetwinsize(terminal, window_size(size));
        }
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if self.ended {
            return;
        }
        let _ = kill_process_group(self.pid, Signal::HUP);
        let timeout = Timespec { tv_sec: HANG_UP_TIMEOUT.as_secs() as i64, tv_nsec: 0 };
        let _ = poll(&mut [PollFd::new(&self.pidfd, PollFlags::IN)], Some(&timeout));
        let _ = kill_process_group(self.pid, Signal::KILL);
        let _ = self.child.wait();
    }
}

fn start_on_pipes(mut process: std::process::Command) -> io::Result<Program> {
    process.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let mut child = process.spawn()?;
    let pipes = [
        child.stdin.take().map(OwnedFd::from),
        child.stdout.take().map(OwnedFd::from),
        child.stderr.take().map(OwnedFd::from),
    ];
    Program::new(child, pipes, false)
}

fn start_on_terminal(mut process: std::process::Command, size: TerminalSize) -> io::Result<Program> {
    let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    grantpt(&terminal)?;
    unlockpt(&terminal)?;
    let name = ptsname(&terminal, Vec::new())?;
    let inner = rustix::fs::open(name, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())?;
    tcsetwinsize(&terminal, window_size(size))?;
    process.stdin(inner.try_clone()?).stdout(inner.try_clone()?).stderr(inner);
    // SAFETY: between fork and exec the closure makes two system calls and touches no memory of other threads.
    unsafe {
        process.pre_exec(|| {
            rustix::process::setsid()?;
            rustix::process::ioctl_tiocsctty(BorrowedFd::borrow_raw(0))?;
            Ok(())
        });
    }
    let child = process.spawn()?;
    // The command holds the terminal's inner side: dropped here, so that its end is seen when the program closes it.
    drop(process);
    Program::new(child, [Some(terminal.try_clone()?), Some(terminal), None], true)
}

fn window_size(size: TerminalSize) -> Winsize {
    Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 }
}

/// Makes reads and writes say `WouldBlock` instead of waiting.
pub fn set_nonblocking(fd: BorrowedFd<'_>) -> io::Result<()> {
    Ok(fcntl_setfl(fd, fcntl_getfl(fd)? | OFlags::NONBLOCK)?)
}
