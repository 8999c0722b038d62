//! A machine that has a disk runs in a process that another one watches.
//!
//! The host's kernel does not let a process end while it waits for some file systems (FUSE, NFS and the like), nor while it waits for
//! a flush of any disk, through io_uring or not: neither a signal nor the process itself can help that. So such a machine runs
//! in a child, which says how it ended before it tries to end; the process that people and scripts wait for hears it and ends
//! at once. What is left of the child ends when the host answers.
//!
//! The child is forked before any thread exists. It has the same terminal, process group and standard files.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::process::ExitCode;

use anyhow::{Context, Result};
use polder_vmm::{Drained, Report};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions, kill_process, pidfd_open, waitpid};

use crate::boot::StopSignals;

/// How long a child may take to say how it ended once it was told to end, and then to end.
const ORDERED_S: i64 = 10;
const ENDING_NS: i64 = 300_000_000;

/// How a watched child hears of signals that its watcher got: one byte, the signal's number. Its end is the watcher's.
pub type Orders = Option<OwnedFd>;

/// Whether the host's kernel may hold a machine's process beyond its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hold {
    Possible,
    Never,
}

/// Tells people that a disk of the machine that ended was silent.
pub fn say_what_is_left(report: &Report) {
    if report.drained == Drained::Left {
        eprintln!("polder: the host does not answer a disk; what the guest asked of it last may be lost");
    }
}

/// Runs `machine`, whose exit status is the process', watched if need be. `told` says what is wrong to people.
pub fn run(hold: Hold, machine: impl FnOnce(Orders) -> Result<u8>, told: impl Fn(Result<u8>) -> u8) -> ExitCode {
    if hold == Hold::Never {
        return ExitCode::from(told(machine(None)));
    }
    match split() {
        Ok(Side::Child { orders, mut report }) => {
            let status = told(machine(Some(orders)));
            // Whoever reads the guest's output must not wait for this process either.
            lead_all_nowhere(report.as_raw_fd());
            let _ = report.write_all(&[status]);
            ExitCode::from(status)
        }
        Ok(Side::Watcher { child, orders, report, signals }) => {
            lead_nowhere();
            ExitCode::from(told(watch(child, orders, report, signals)))
        }
        Err(error) => ExitCode::from(told(Err(error))),
    }
}

enum Side {
    Child { orders: OwnedFd, report: File },
    Watcher { child: Pid, orders: File, report: File, signals: File },
}

fn split() -> Result<Side> {
    let signals = StopSignals::block().context("the signals that stop polder cannot be caught")?;
    let (orders, order) = pipe_with(PipeFlags::CLOEXEC).context("the host gave no pipe")?;
    let (hear, report) = pipe_with(PipeFlags::CLOEXEC).context("the host gave no pipe")?;
    // SAFETY: no other thread exists yet, so the child may do all that this process may.
    match unsafe { libc::fork() } {
        -1 => Err(std::io::Error::last_os_error()).context("the host gave no process"),
        0 => Ok(Side::Child { orders, report: report.into() }),
        child => Ok(Side::Watcher {
            child: Pid::from_raw(child).context("a process has a number")?,
            orders: order.into(),
            report: hear.into(),
            signals: signals.descriptor().context("the signals that stop polder cannot be read")?,
        }),
    }
}

/// Waits until the child says how it ended, and passes signals on meanwhile.
fn watch(child: Pid, mut orders: File, mut report: File, mut signals: File) -> Result<u8> {
    let mut timeout = None;
    loop {
        let mut fds = [PollFd::new(&report, PollFlags::IN), PollFd::new(&signals, PollFlags::IN)];
        match poll(&mut fds, timeout.as_ref()) {
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(error).context("the machine's process cannot be watched"),
            Ok(0) => {
                let _ = kill_process(child, Signal::KILL);
                anyhow::bail!("the machine was stopped while the host did not answer");
            }
            Ok(_) => {}
        }
        let (reported, signalled) = (!fds[0].revents().is_empty(), !fds[1].revents().is_empty());
        if reported {
            let mut status = [0];
            return match report.read(&mut status) {
                Ok(1) => {
                    wait_a_little(child);
                    Ok(status[0])
                }
                _ => ended_without_a_word(child),
            };
        }
        if signalled {
            // struct signalfd_siginfo begins with the signal's number.
            let mut info = [0; 128];
            if signals.read(&mut info).is_ok() {
                let _ = orders.write_all(&info[..1]);
                timeout = Some(Timespec { tv_sec: ORDERED_S, tv_nsec: 0 });
            }
        }
    }
}

/// A child that can end does so now.
fn wait_a_little(child: Pid) {
    if let Ok(process) = pidfd_open(child, PidfdFlags::empty()) {
        let patience = Timespec { tv_sec: 0, tv_nsec: ENDING_NS };
        let _ = poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&patience));
        // So that whoever asks what this process has cost hears of the child as well.
        let _ = waitpid(Some(child), WaitOptions::NOHANG);
    }
}

fn ended_without_a_word(child: Pid) -> Result<u8> {
    let status = waitpid(Some(child), WaitOptions::empty()).context("the machine's process cannot be waited for")?;
    match status.and_then(|(_, status)| status.terminating_signal()) {
        Some(signal) => anyhow::bail!("the machine's process was killed by signal {signal}"),
        None => anyhow::bail!("the machine's process ended without a word"),
    }
}

/// Gives up all pipes, sockets and terminals of this process but one: a thread that waits for the host for ever would keep them open,
/// and with them whoever is at their other end. (Threads of the machine that are about to end may have copies of standard output.)
fn lead_all_nowhere(but: RawFd) {
    let Ok(null) = File::options().read(true).write(true).open("/dev/null") else { return };
    let Ok(entries) = std::fs::read_dir("/proc/self/fd") else { return };
    let numbers: Vec<RawFd> = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    for number in numbers {
        // The link's text is the kernel's own: no file system is asked.
        let leads_to = std::fs::read_link(format!("/proc/self/fd/{number}")).unwrap_or_default();
        let leads_to = leads_to.to_string_lossy();
        let shared = ["pipe:", "socket:", "/dev/pts/", "/dev/tty", "/dev/console", "/dev/net/tun"];
        if number != but && shared.iter().any(|kind| leads_to.starts_with(kind)) {
            // SAFETY: no pointers. Whoever owns the number has an open file as before, which leads nowhere.
            unsafe { libc::dup2(null.as_raw_fd(), number) };
        }
    }
}

/// Gives up standard input and output.
fn lead_nowhere() {
    if let Ok(null) = File::options().read(true).write(true).open("/dev/null") {
        let _ = rustix::stdio::dup2_stdin(&null);
        let _ = rustix::stdio::dup2_stdout(&null);
    }
}
