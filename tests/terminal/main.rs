//! Promise: a terminal is raw while a machine runs and as before when it ends, however it ends.

use polder_tests::{polder, tiny};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, tcgetattr};
use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(60);

/// Both ends of a terminal.
struct Terminal {
    ours: OwnedFd,
    theirs: File,
}

impl Terminal {
    fn open() -> Self {
        let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("the host has pseudo-terminals");
        grantpt(&ours).and_then(|()| unlockpt(&ours)).expect("a pseudo-terminal can be unlocked");
        let name = ptsname(&ours, Vec::new()).expect("a pseudo-terminal has a name");
        let path = std::path::Path::new(std::ffi::OsStr::from_bytes(name.as_bytes()));
        let theirs = File::options().read(true).write(true).open(path).expect("the terminal opens");
        Self { ours, theirs }
    }

    fn echoes(&self) -> bool {
        tcgetattr(&self.theirs).expect("a terminal has attributes").local_modes.contains(LocalModes::ECHO)
    }

    /// Reads until `text` was written to the terminal.
    fn expect(&self, text: &str) {
        let end = Instant::now() + LIMIT;
        let mut seen = Vec::new();
        while !String::from_utf8_lossy(&seen).contains(text) {
            assert!(Instant::now() < end, "{text:?} did not come: {}", String::from_utf8_lossy(&seen));
            let wait = Timespec { tv_sec: 1, tv_nsec: 0 };
            if poll(&mut [PollFd::new(&self.ours, PollFlags::IN)], Some(&wait)).expect("a terminal can be polled") > 0 {
                let mut bytes = [0; 4096];
                let count = rustix::io::read(&self.ours, &mut bytes).expect("the terminal can be read");
                seen.extend_from_slice(&bytes[..count]);
            }
        }
    }
}

/// Starts a guest that never ends on a terminal, ends it, and returns the status.
fn ended_by(extra: &[&str], end: impl FnOnce(&Terminal, &Child), message: &str) -> Option<i32> {
    let terminal = Terminal::open();
    assert!(terminal.echoes());
    let stream = || terminal.theirs.try_clone().expect("a descriptor can be copied");
    let mut child = Command::new(polder())
        .args(["boot", "--engine", "software", "--memory", "64M", "--kernel"])
        .arg(tiny("hang"))
        .args(extra)
        .stdin(stream())
        .stdout(stream())
        .stderr(stream())
        .spawn()
        .expect("polder starts");
    terminal.expect("halting for ever");
    assert!(!terminal.echoes(), "the terminal is not raw while the machine runs");
    end(&terminal, &child);
    terminal.expect(message);
    let status = child.wait().expect("a child can be waited for").code();
    assert!(terminal.echoes(), "the terminal is not as before");
    status
}

#[test]
fn the_terminal_is_restored_after_ctrl_a_x() {
    let leave = |terminal: &Terminal, _: &Child| {
        let mut ours = File::from(terminal.ours.try_clone().expect("a descriptor can be copied"));
        ours.write_all(b"\x01x").expect("the terminal takes keys");
    };
    assert_eq!(ended_by(&[], leave, "Ctrl-A x"), Some(1));
}

#[test]
fn the_terminal_is_restored_after_a_signal() {
    let terminate = |_: &Terminal, child: &Child| {
        kill_process(Pid::from_child(child), Signal::TERM).expect("a child can be signalled");
    };
    assert_eq!(ended_by(&[], terminate, "SIGTERM"), Some(1));
}

#[test]
fn the_terminal_is_restored_after_the_time_is_up() {
    assert_eq!(ended_by(&["--timeout", "3"], |_, _| {}, "was up"), Some(124));
}
