//! One connection from the host: a request, and for a program the streams both ways until it ends.
//!
//! One thread, one poll loop, no waiting on anything but poll. What waits in either direction is bounded: the host's input is read only
//! while the program takes it, the program's output only while the host takes it.

#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use polder_basics::agent_protocol::{AgentErrorKind, CHUNK_LEN_MAX, DecodeError, Decoder, ExitStatus, Message};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use crate::power;
use crate::program::{Program, set_nonblocking};

/// Input for the program that waits at most, not counting the frame that brings it over the bound.
const INPUT_LEN_MAX: usize = 64 * 1024;
/// Output for the host that waits at most, not counting the chunk that brings it over the bound.
const OUTPUT_LEN_MAX: usize = 256 * 1024;

/// A terminal's end-of-file character.
const TERMINAL_END: u8 = 4;

/// Why a session ended early. Nobody is left to be told.
enum Ended {
    /// The host closed the connection, or it broke.
    HostGone,
}

type Step<T> = Result<T, Ended>;

impl From<Errno> for Ended {
    fn from(_: Errno) -> Self {
        Ended::HostGone
    }
}

/// Tells a connection that there are too many.
pub fn refuse_busy(stream: OwnedFd, sessions_max: usize) {
    let mut connection = Connection::new(stream);
    let text = format!("the agent has {sessions_max} sessions already");
    connection.send(&Message::Error { kind: AgentErrorKind::Busy, text });
    let _ = connection.flush();
}

/// Serves a connection to its end.
pub fn serve(stream: OwnedFd) {
    if set_nonblocking(stream.as_fd()).is_err() {
        return;
    }
    let mut connection = Connection::new(stream);
    // A host that went away has nobody to tell; the program, if there was one, has been hung up.
    let _ = serve_requests(&mut connection);
}

fn serve_requests(connection: &mut Connection) -> Step<()> {
    loop {
        match connection.decoder.next_message() {
            Ok(Some(Message::Ping)) => connection.send(&Message::Pong),
            Ok(Some(Message::PowerOff)) => {
                connection.send(&Message::PoweringOff);
                connection.flush()?;
                power::power_off();
                return Ok(());
            }
            Ok(Some(Message::Exec(command))) => match Program::start(&command) {
                Ok(program) => return Running::new(program).serve(connection),
                Err(error) => return connection.fail(error.kind, error.text),
            },
            Ok(Some(_)) => {
                return connection.fail(AgentErrorKind::BadRequest, "the session began with no request".into());
            }
            Ok(None) => {
                connection.flush()?;
                connection.wait_and_receive()?;
            }
            Err(error) => return connection.fail_decoding(&error),
        }
    }
}

/// The stream to the host, with what waits on both sides of it.
struct Connection {
    stream: OwnedFd,
    decoder: Decoder,
    outgoing: Vec<u8>,
}

impl Connection {
    fn new(stream: OwnedFd) -> Self {
        Connection { stream, decoder: Decoder::new(), outgoing: Vec::new() }
    }

    fn send(&mut self, message: &Message) {
        // Only a message beyond the frame's bound fails, and the agent makes none.
        let _ = message.encode(&mut self.outgoing);
    }

    fn fail(&mut self, kind: AgentErrorKind, mut text: String) -> Step<()> {
        text.truncate(text.floor_char_boundary(4096));
        self.send(&Message::Error { kind, text });
        self.flush()
    }

    fn fail_decoding(&mut self, error: &DecodeError) -> Step<()> {
        self.fail(AgentErrorKind::BadRequest, error.to_string())
    }

    /// Writes what the host takes now.
    fn write_some(&mut self) -> Step<()> {
        while !self.outgoing.is_empty() {
            match rustix::io::write(&self.stream, &self.outgoing) {
                Ok(0) => return Err(Ended::HostGone),
                Ok(written) => {
                    self.outgoing.drain(..written);
                }
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                Err(_) => return Err(Ended::HostGone),
            }
        }
        Ok(())
    }

    /// Writes everything.
    fn flush(&mut self) -> Step<()> {
        loop {
            self.write_some()?;
            if self.outgoing.is_empty() {
                return Ok(());
            }
            wait(&mut [PollFd::new(&self.stream, PollFlags::OUT)])?;
        }
    }

    fn wait_and_receive(&mut self) -> Step<()> {
        wait(&mut [PollFd::new(&self.stream, PollFlags::IN)])?;
        self.receive()
    }

    /// Reads what is there now into the decoder.
    fn receive(&mut self) -> Step<()> {
        let mut chunk = [0; 16 * 1024];
        match rustix::io::read(&self.stream, &mut chunk) {
            Ok(0) => Err(Ended::HostGone),
            Ok(len) => {
                self.decoder.push(&chunk[..len]);
                Ok(())
            }
            Err(Errno::AGAIN | Errno::INTR) => Ok(()),
            Err(_) => Err(Ended::HostGone),
        }
    }
}

fn wait(fds: &mut [PollFd<'_>]) -> Step<()> {
    match poll(fds, None) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// A program and the input that waits for it.
struct Running {
    program: Program,
    input: Vec<u8>,
    input_ended: bool,
    status: Option<ExitStatus>,
}

/// Which of the program's outputs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Output {
    Stdout,
    Stderr,
}

impl Running {
    fn new(program: Program) -> Self {
        Running { program, input: Vec::new(), input_ended: false, status: None }
    }

    fn serve(mut self, connection: &mut Connection) -> Step<()> {
        loop {
            if !self.take_requests(connection)? {
                return Ok(());
            }
            let was_full = self.input.len() >= INPUT_LEN_MAX;
            self.feed_input();
            if was_full && self.input.len() < INPUT_LEN_MAX {
                // Whole frames may wait in the decoder, and no event will tell of them.
                continue;
            }
            connection.write_some()?;
            self.read_output(Output::Stdout, connection);
            self.read_output(Output::Stderr, connection);
            if self.status.is_none() {
                self.status = self.program.try_wait().unwrap_or(Some(ExitStatus::Code(1)));
                if self.status.is_some() {
                    // Look at the outputs once more: everything that the program wrote is there now.
                    continue;
                }
            } else if self.program.stdout.is_none() && self.program.stderr.is_none() {
                break;
            }
            self.wait_for_work(connection)?;
        }
        if let Some(status) = self.status {
            connection.send(&Message::Exit(status));
        }
        connection.flush()
    }

    fn wait_for_work(&self, connection: &Connection) -> Step<()> {
        let mut stream_events = PollFlags::empty();
        if self.input.len() < INPUT_LEN_MAX {
            stream_events |= PollFlags::IN;
        }
        if !connection.outgoing.is_empty() {
            stream_events |= PollFlags::OUT;
        }
        let mut fds = vec![PollFd::new(&connection.stream, stream_events)];
        if let Some(stdin) = self.program.stdin.as_ref().filter(|_| !self.input.is_empty()) {
            fds.push(PollFd::new(stdin, PollFlags::OUT));
        }
        if connection.outgoing.len() < OUTPUT_LEN_MAX {
            let outputs = [&self.program.stdout, &self.program.stderr];
            fds.extend(outputs.into_iter().flatten().map(|output| PollFd::new(output, PollFlags::IN)));
        }
        let end_event = self.program.end_event();
        if self.status.is_none() {
            fds.push(PollFd::from_borrowed_fd(end_event, PollFlags::IN));
        }
        wait(&mut fds)?;
        if fds[0].revents().intersects(PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL)
            && !fds[0].revents().contains(PollFlags::IN)
        {
            return Err(Ended::HostGone);
        }
        Ok(())
    }

    /// Takes what the host sent; whether the session goes on.
    fn take_requests(&mut self, connection: &mut Connection) -> Step<bool> {
        loop {
            while self.input.len() < INPUT_LEN_MAX {
                match connection.decoder.next_message() {
                    Ok(Some(Message::Stdin(bytes))) if !self.input_ended => self.input.extend_from_slice(&bytes),
                    Ok(Some(Message::Stdin(_))) => {}
                    Ok(Some(Message::StdinEnd)) => {
                        if self.program.has_terminal() && !self.input_ended {
                            self.input.push(TERMINAL_END);
                        }
                        self.input_ended = true;
                    }
                    Ok(Some(Message::Signal(number))) => self.program.signal(number),
                    Ok(Some(Message::Resize(size))) => self.program.resize(size),
                    Ok(Some(Message::Ping)) => connection.send(&Message::Pong),
                    Ok(Some(_)) => {
                        let text = "a program runs in this session already".to_owned();
                        return connection.fail(AgentErrorKind::BadRequest, text).map(|()| false);
                    }
                    Ok(None) => break,
                    Err(error) => return connection.fail_decoding(&error).map(|()| false),
                }
            }
            // Whole frames may wait in the decoder while the input is full; more is read only when there are none, and a host that
            // floods us with pings has to take its answers first.
            if self.input.len() >= INPUT_LEN_MAX || connection.outgoing.len() >= OUTPUT_LEN_MAX {
                return Ok(true);
            }
            let mut ready = [PollFd::new(&connection.stream, PollFlags::IN)];
            match poll(&mut ready, Some(&rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 })) {
                Ok(0) | Err(Errno::INTR) => return Ok(true),
                Ok(_) => connection.receive()?,
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Writes the input that the program takes now; closes its input after the end.
    fn feed_input(&mut self) {
        while let Some(stdin) = self.program.stdin.as_ref().filter(|_| !self.input.is_empty()) {
            match rustix::io::write(stdin, &self.input) {
                Ok(written) => {
                    self.input.drain(..written);
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                // The program closed its input: the rest has no reader.
                Err(_) => self.program.stdin = None,
            }
        }
        if self.program.stdin.is_none() {
            self.input.clear();
        } else if self.input_ended && !self.program.has_terminal() {
            self.program.stdin = None;
        }
    }

    /// Reads the output that is there now, as far as the bound allows. After the program's end an empty pipe is a finished one,
    /// even if something that it left running still holds it.
    fn read_output(&mut self, output: Output, connection: &mut Connection) {
        let mut chunk = vec![0; CHUNK_LEN_MAX];
        let pipe = match output {
            Output::Stdout => &mut self.program.stdout,
            Output::Stderr => &mut self.program.stderr,
        };
        while connection.outgoing.len() < OUTPUT_LEN_MAX {
            let Some(open) = pipe.as_ref() else { return };
            match rustix::io::read(open, &mut chunk) {
                Ok(len) if len > 0 => {
                    let bytes = chunk[..len].to_vec();
                    connection.send(&match output {
                        Output::Stdout => Message::Stdout(bytes),
                        Output::Stderr => Message::Stderr(bytes),
                    });
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if self.status.is_none() => return,
                // The end; with a terminal, EIO when the last program on it is gone.
                _ => *pipe = None,
            }
        }
    }
}

impl From<io::Error> for Ended {
    fn from(_: io::Error) -> Self {
        Ended::HostGone
    }
}
