//! The thread that serves gdb, one session after the other.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use gdbstub::common::Signal;
use gdbstub::conn::Connection;
use gdbstub::stub::state_machine::GdbStubStateMachine;
use gdbstub::stub::{DisconnectReason, GdbStub, MultiThreadStopReason};
use gdbstub::target::ext::breakpoints::WatchKind;
use polder_machine::{DebugEvent, WatchedAccess};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{RecvFlags, SendFlags, recv, send};

use super::debugger::{Debugger, Finding, News};
use super::listener::GdbListener;
use super::target::{GuestTarget, thread_of};
use crate::{Control, GdbConfig, GdbStart, Outcome, VmmError};

/// Bytes taken from gdb at a time.
const RECEIVE_LEN: usize = 4096;

/// The server; dropping it ends the session and the thread.
pub(crate) struct Server {
    debugger: Arc<Debugger>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Listens, and serves from now on. A gdb that asks for the guest's end has `control` stop the machine.
    pub(crate) fn start(config: &GdbConfig, control: &Control) -> Result<Server, VmmError> {
        let listener =
            GdbListener::bind(&config.place).map_err(|source| VmmError::Gdb { place: config.place.clone(), source })?;
        let debugger = Debugger::new(config.start == GdbStart::WithGdb)
            .map_err(|source| VmmError::Host { what: "descriptor for gdb", source })?;
        let debugger = Arc::new(debugger);
        let service = Service { listener, debugger: debugger.clone(), control: control.clone() };
        let thread = std::thread::Builder::new()
            .name("gdb".to_owned())
            .spawn(move || service.serve())
            .map_err(|source| VmmError::Host { what: "thread for gdb", source })?;
        Ok(Server { debugger, thread: Some(thread) })
    }

    pub(crate) fn debugger(&self) -> &Arc<Debugger> {
        &self.debugger
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.debugger.finish(None);
        if let Some(thread) = self.thread.take() {
            // It has nothing to say beyond what it logged.
            let _ = thread.join();
        }
    }
}

/// Why a session ended.
enum Ending {
    /// gdb detached, or its connection broke.
    Gone,
    /// gdb asked for the guest's end.
    Kill,
    /// The run is over.
    Over,
}

/// What there is to do.
enum Wake {
    News,
    Data,
}

struct Service {
    listener: GdbListener,
    debugger: Arc<Debugger>,
    control: Control,
}

impl Service {
    fn serve(&self) {
        while !self.debugger.is_over() {
            match self.wait(None) {
                Ok(Wake::News) => {
                    self.debugger.take_news();
                }
                Ok(Wake::Data) => {
                    if let Ok(connection) = self.listener.accept() {
                        self.attend(connection);
                    }
                }
                Err(error) => {
                    tracing::warn!("gdb is not served any more: {error}");
                    return;
                }
            }
        }
    }

    /// One gdb from its first byte to its last.
    fn attend(&self, connection: OwnedFd) {
        // A gdb that comes early waits while the kernel is read.
        if !self.debugger.wait_for_machine() {
            return;
        }
        self.debugger.attach();
        let ending = self.session(&connection).unwrap_or_else(|error| {
            tracing::debug!("the connection to gdb broke: {error}");
            Ending::Gone
        });
        match ending {
            Ending::Over => {}
            Ending::Gone => self.debugger.detach(),
            Ending::Kill => {
                self.control.stop();
                self.debugger.detach();
            }
        }
    }

    /// Waits for news of the machine or for bytes: from `connection`, or without one a new connection.
    fn wait(&self, connection: Option<&OwnedFd>) -> io::Result<Wake> {
        loop {
            let mut fds = [
                PollFd::from_borrowed_fd(self.debugger.wake(), PollFlags::IN),
                PollFd::from_borrowed_fd(self.listener.as_fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(connection.map_or(self.listener.as_fd(), AsFd::as_fd), PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Err(rustix::io::Errno::INTR) => continue,
                result => result?,
            };
            let [news, new_connection, data] = fds.map(|fd| !fd.revents().is_empty());
            if news {
                return Ok(Wake::News);
            }
            if connection.is_some() && new_connection {
                // One at a time: the second is told so by its connection's end.
                drop(self.listener.accept());
            }
            if data {
                return Ok(Wake::Data);
            }
        }
    }

    fn session(&self, connection: &OwnedFd) -> Result<Ending, Box<dyn std::error::Error>> {
        let mut target = GuestTarget::new(self.debugger.clone());
        let replies = Replies { connection: connection.try_clone()?, waiting: Vec::new() };
        let mut stub = GdbStub::new(replies).run_state_machine(&mut target)?;
        let mut received = Received::default();
        loop {
            stub = match stub {
                GdbStubStateMachine::Idle(idle) => {
                    let Some(byte) = received.next() else {
                        match self.wait(Some(connection))? {
                            Wake::News if matches!(self.debugger.take_news(), Some(News::End(_))) => {
                                return Ok(Ending::Over);
                            }
                            Wake::News => {}
                            Wake::Data if !received.fill(connection)? => return Ok(Ending::Gone),
                            Wake::Data => {}
                        }
                        stub = idle.into();
                        continue;
                    };
                    idle.incoming_data(&mut target, byte)?
                }
                GdbStubStateMachine::Running(running) => {
                    if let Some(byte) = received.next() {
                        stub = running.incoming_data(&mut target, byte)?;
                        continue;
                    }
                    match self.wait(Some(connection))? {
                        Wake::News => match self.debugger.take_news() {
                            Some(News::End(outcome)) => {
                                running.report_stop(&mut target, last_reason(outcome))?;
                                return Ok(Ending::Over);
                            }
                            Some(News::Found { index, finding }) => {
                                let reason = reason(&target, index, finding);
                                running.report_stop(&mut target, reason)?
                            }
                            None => running.into(),
                        },
                        Wake::Data => {
                            if !received.fill(connection)? {
                                return Ok(Ending::Gone);
                            }
                            running.into()
                        }
                    }
                }
                GdbStubStateMachine::CtrlCInterrupt(interrupt) => {
                    self.debugger.stop();
                    let reason = MultiThreadStopReason::SignalWithThread { tid: thread_of(0), signal: Signal::SIGINT };
                    interrupt.interrupt_handled(&mut target, Some(reason))?
                }
                GdbStubStateMachine::Disconnected(disconnected) => {
                    if !matches!(disconnected.get_reason(), DisconnectReason::Kill) {
                        return Ok(Ending::Gone);
                    }
                    // gdb waits for an answer (GDB manual, appendix E.2, vKill), which `gdbstub` leaves out.
                    let _ = send(connection, b"$OK#9a", SendFlags::NOSIGNAL);
                    return Ok(Ending::Kill);
                }
            };
        }
    }
}

/// What gdb hears when a vCPU has come back.
fn reason(target: &GuestTarget, index: usize, finding: Finding) -> MultiThreadStopReason<u64> {
    let tid = thread_of(index);
    match finding {
        Finding::Event(DebugEvent::Step) => MultiThreadStopReason::SignalWithThread { tid, signal: Signal::SIGTRAP },
        Finding::Event(DebugEvent::Breakpoint { address }) if target.is_hardware(address) => {
            MultiThreadStopReason::HwBreak(tid)
        }
        Finding::Event(DebugEvent::Breakpoint { .. }) => MultiThreadStopReason::SwBreak(tid),
        Finding::Event(DebugEvent::Watchpoint(point)) => {
            let kind = match point.access {
                WatchedAccess::Read => WatchKind::Read,
                WatchedAccess::Write => WatchKind::Write,
                WatchedAccess::ReadOrWrite => WatchKind::ReadWrite,
            };
            MultiThreadStopReason::Watch { tid, kind, addr: point.address }
        }
        Finding::TripleFault => MultiThreadStopReason::SignalWithThread { tid, signal: Signal::SIGSEGV },
    }
}

/// What gdb hears when the guest has ended: the exit status that `polder boot` has for it, or a signal.
fn last_reason(outcome: Option<Outcome>) -> MultiThreadStopReason<u64> {
    match outcome {
        Some(Outcome::PoweredOff) => MultiThreadStopReason::Exited(0),
        Some(Outcome::Reset) => MultiThreadStopReason::Exited(10),
        Some(Outcome::Panicked | Outcome::TripleFault) => MultiThreadStopReason::Exited(11),
        Some(Outcome::TimedOut) => MultiThreadStopReason::Exited(124),
        Some(Outcome::DebugExit(value)) => MultiThreadStopReason::Exited((value << 1 | 1) as u8),
        Some(Outcome::Stopped) | None => MultiThreadStopReason::Terminated(Signal::SIGKILL),
    }
}

/// Bytes from gdb that have yet to be looked at.
#[derive(Default)]
struct Received {
    bytes: Vec<u8>,
    at: usize,
}

impl Received {
    fn next(&mut self) -> Option<u8> {
        let byte = self.bytes.get(self.at).copied();
        self.at += usize::from(byte.is_some());
        byte
    }

    /// Takes what has come; false at the connection's end.
    fn fill(&mut self, connection: &OwnedFd) -> io::Result<bool> {
        self.bytes.resize(RECEIVE_LEN, 0);
        let (len, _) = recv(connection, &mut self.bytes[..], RecvFlags::empty())?;
        self.bytes.truncate(len);
        self.at = 0;
        Ok(len > 0)
    }
}

/// Answers on their way to gdb.
struct Replies {
    connection: OwnedFd,
    waiting: Vec<u8>,
}

impl Connection for Replies {
    type Error = io::Error;

    fn write(&mut self, byte: u8) -> io::Result<()> {
        self.waiting.push(byte);
        Ok(())
    }

    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.waiting.extend_from_slice(bytes);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        let mut rest = &self.waiting[..];
        while !rest.is_empty() {
            // A gdb that is gone is an error here and no signal.
            match send(&self.connection, rest, SendFlags::NOSIGNAL) {
                Ok(len) => rest = &rest[len..],
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.waiting.clear();
        Ok(())
    }
}
