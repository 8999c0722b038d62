//! The console's server in a machine's process: one guest, any number of people.
//!
//! A client that connects gets the backlog and then what comes; what it sends is typed at the console. One thread does it all and
//! always takes the guest's output, so a client that does not read holds up nobody: it misses what it was too slow for.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use polder_vmm::Control;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::backlog::Backlog;

/// Clients at one time; further ones wait to be accepted.
const CLIENTS_MAX: usize = 16;
/// Input of a client that the machine has not taken yet, at most.
const INPUT_LEN_MAX: usize = 4096;
/// How soon waiting input is offered again.
const INPUT_RETRY: Duration = Duration::from_millis(10);
/// How long clients may take to read the rest after the machine's end.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// The running server.
pub struct ConsoleServer {
    thread: JoinHandle<Backlog>,
}

impl ConsoleServer {
    /// Serves `listener` with what comes out of the pipe `output`, until its other end is closed.
    pub fn start(listener: UnixListener, output: OwnedFd, control: Control) -> Result<Self> {
        listener.set_nonblocking(true).context("cannot serve the console")?;
        let server = Server { listener, output, control, backlog: Backlog::default(), clients: Vec::new() };
        let thread = std::thread::Builder::new().name("console server".to_owned()).spawn(move || server.serve());
        Ok(ConsoleServer { thread: thread.context("the host gave no thread")? })
    }

    /// Waits until the machine's output has ended and the clients have it; its last output.
    pub fn finish(self) -> Vec<u8> {
        let backlog = self.thread.join().unwrap_or_default();
        let mut last = Vec::new();
        let mut position = backlog.start();
        while position < backlog.end() {
            let (at, bytes) = backlog.from(position);
            last.extend_from_slice(bytes);
            position = at + bytes.len() as u64;
        }
        last
    }
}

struct Server {
    listener: UnixListener,
    output: OwnedFd,
    control: Control,
    backlog: Backlog,
    clients: Vec<Client>,
}

struct Client {
    stream: UnixStream,
    /// The next byte of the console that it gets.
    position: u64,
    /// Typed and not yet taken by the machine.
    input: Vec<u8>,
    input_ended: bool,
}

impl Server {
    fn serve(mut self) -> Backlog {
        let mut deadline = None;
        loop {
            let unread = self.clients.iter().any(|client| client.position < self.backlog.end());
            let left = deadline.map(|deadline: Instant| deadline.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero() || !unread) {
                return self.backlog;
            }
            let events = match self.wait(left) {
                Ok(events) => events,
                Err(_) => return self.backlog,
            };
            if deadline.is_none() && !events.output.is_empty() && !self.take_output() {
                deadline = Some(Instant::now() + LAST_WORDS);
            }
            if !events.listener.is_empty() {
                self.accept();
            }
            self.serve_clients(&events.clients);
        }
    }

    fn wait(&self, left: Option<Duration>) -> rustix::io::Result<Events> {
        let ended = left.is_some();
        let accepting = !ended && self.clients.len() < CLIENTS_MAX;
        let flag = |wanted, flag| if wanted { flag } else { PollFlags::empty() };
        let mut fds = Vec::with_capacity(2 + self.clients.len());
        // The pipe's end would be reported for ever: it is not asked for again.
        let stand_in = &self.listener;
        fds.push(if ended {
            PollFd::new(stand_in, PollFlags::empty())
        } else {
            PollFd::new(&self.output, PollFlags::IN)
        });
        fds.push(PollFd::new(&self.listener, flag(accepting, PollFlags::IN)));
        for client in &self.clients {
            let input = flag(!client.input_ended && client.input.is_empty(), PollFlags::IN);
            let output = flag(client.position < self.backlog.end(), PollFlags::OUT);
            fds.push(PollFd::new(&client.stream, input | output));
        }
        let typing = self.clients.iter().any(|client| !client.input.is_empty());
        let timeout = match (left, typing) {
            (Some(left), true) => Some(left.min(INPUT_RETRY)),
            (None, true) => Some(INPUT_RETRY),
            (left, false) => left,
        };
        let timeout = timeout
            .map(|timeout| Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: timeout.subsec_nanos().into() });
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
        Ok(Events {
            output: fds[0].revents(),
            listener: fds[1].revents(),
            clients: fds[2..].iter().map(PollFd::revents).collect(),
        })
    }

    /// Takes output of the guest; whether there can be more.
    fn take_output(&mut self) -> bool {
        let mut bytes = [0; 16 * 1024];
        match rustix::io::read(&self.output, &mut bytes) {
            Ok(0) => false,
            Ok(len) => {
                self.backlog.push(&bytes[..len]);
                true
            }
            Err(Errno::INTR | Errno::AGAIN) => true,
            Err(_) => false,
        }
    }

    fn accept(&mut self) {
        if let Ok((stream, _)) = self.listener.accept()
            && stream.set_nonblocking(true).is_ok()
        {
            let position = self.backlog.start();
            self.clients.push(Client { stream, position, input: Vec::new(), input_ended: false });
        }
    }

    /// Serves the clients that were polled, and drops those that went away. One that was accepted since has its turn next time.
    fn serve_clients(&mut self, events: &[PollFlags]) {
        let mut events = events.iter();
        let (backlog, control) = (&self.backlog, &self.control);
        self.clients.retain_mut(|client| match events.next() {
            Some(events) => client.serve(*events, backlog, control),
            None => true,
        });
    }
}

struct Events {
    output: PollFlags,
    listener: PollFlags,
    clients: Vec<PollFlags>,
}

impl Client {
    /// Whether it is still there.
    fn serve(&mut self, events: PollFlags, backlog: &Backlog, control: &Control) -> bool {
        if events.contains(PollFlags::IN) && !self.receive() {
            return false;
        }
        if !self.input.is_empty() {
            let taken = control.type_in(&self.input);
            self.input.drain(..taken.min(self.input.len()));
        }
        if events.contains(PollFlags::OUT) && !self.send(backlog) {
            return false;
        }
        !events.intersects(PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL)
    }

    fn receive(&mut self) -> bool {
        let mut bytes = [0; INPUT_LEN_MAX];
        match self.stream.read(&mut bytes) {
            // It types no more and may read on.
            Ok(0) => self.input_ended = true,
            Ok(len) => self.input.extend_from_slice(&bytes[..len]),
            Err(error) => return matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted),
        }
        true
    }

    fn send(&mut self, backlog: &Backlog) -> bool {
        let (at, bytes) = backlog.from(self.position);
        match self.stream.write(bytes) {
            Ok(len) => self.position = at + len as u64,
            Err(error) => return matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted),
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::instance::backlog::BACKLOG_LEN_MAX;
    use rustix::pipe::{PipeFlags, pipe_with};

    struct Bench {
        /// With the socket in it.
        folder: tempfile::TempDir,
        guest: std::fs::File,
        server: ConsoleServer,
    }

    fn bench() -> Bench {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("console")).unwrap();
        let (output, guest) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let server = ConsoleServer::start(listener, output, Control::new()).unwrap();
        Bench { folder, guest: guest.into(), server }
    }

    fn connect(bench: &Bench) -> UnixStream {
        let stream = UnixStream::connect(bench.folder.path().join("console")).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    }

    fn read(stream: &mut UnixStream, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn every_client_gets_all_output_and_then_the_end() {
        let mut bench = bench();
        let mut first = connect(&bench);
        bench.guest.write_all(b"one ").unwrap();
        assert_eq!(read(&mut first, 4), b"one ");
        let mut late = connect(&bench);
        assert_eq!(read(&mut late, 4), b"one ");
        bench.guest.write_all(b"two").unwrap();
        drop(bench.guest);
        for mut client in [first, late] {
            let mut rest = Vec::new();
            client.read_to_end(&mut rest).unwrap();
            assert_eq!(rest, b"two");
        }
        assert_eq!(bench.server.finish(), b"one two");
    }

    #[test]
    fn a_client_that_does_not_read_holds_up_nobody() {
        let mut bench = bench();
        let slow = connect(&bench);
        for round in 0..64u8 {
            bench.guest.write_all(&[round; 32 * 1024]).unwrap();
        }
        bench.guest.write_all(b"end").unwrap();
        drop(bench.guest);
        let last = bench.server.finish();
        assert_eq!(last.len(), BACKLOG_LEN_MAX);
        assert!(last.ends_with(b"\x3fend"));
        drop(slow);
    }

    #[test]
    fn clients_that_come_and_go_leave_the_server_whole() {
        let mut bench = bench();
        for _ in 0..3 * CLIENTS_MAX {
            let mut client = connect(&bench);
            client.write_all(b"typed").unwrap();
            drop(client);
        }
        bench.guest.write_all(b"still here").unwrap();
        let mut client = connect(&bench);
        assert_eq!(read(&mut client, 10), b"still here");
    }
}
