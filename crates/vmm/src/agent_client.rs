//! The host's end of a session with the agent in a guest.
//!
//! A session goes through the Unix socket of the machine's vsock device: `CONNECT <port>\n`, `OK <port>\n`, then the frames of
//! [`polder_basics::agent_protocol`]. The guest is hostile: what it sends is bounded by the frames, and every wait has a limit until
//! the session stands.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use polder_basics::agent_protocol::{AGENT_PORT, DecodeError, Decoder, EncodeError, Message};

/// `OK 4294967295\n`, with room to spare.
const ANSWER_LEN_MAX: usize = 32;

/// No session, or no more of it.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// Nothing listens on the machine's side of vsock: the machine is not running.
    #[error("the machine's vsock socket cannot be reached")]
    NoMachine(#[source] io::Error),
    /// The guest has no agent that listens, or not yet.
    #[error("no agent listens in the guest")]
    NoAgent,
    /// The connection broke.
    #[error("the connection to the agent broke")]
    Broken(#[source] io::Error),
    /// The agent ended the session before its last message.
    #[error("the agent closed the connection")]
    Closed,
    /// The agent sent what makes no sense.
    #[error("the agent does not follow the protocol")]
    Protocol(#[from] DecodeError),
    /// What is to be sent does not fit.
    #[error("the request is too long for the agent")]
    TooLong(#[from] EncodeError),
}

/// Sends messages of one session.
pub struct AgentSender {
    stream: UnixStream,
}

/// Receives messages of one session.
pub struct AgentReceiver {
    stream: UnixStream,
    decoder: Decoder,
}

/// Opens a session through the machine's vsock socket. An agent that does not answer within `timeout` counts as none.
pub fn connect(socket: &Path, timeout: Duration) -> Result<(AgentSender, AgentReceiver), AgentError> {
    let mut stream = UnixStream::connect(socket).map_err(AgentError::NoMachine)?;
    stream.set_read_timeout(Some(timeout)).map_err(AgentError::Broken)?;
    stream.set_write_timeout(Some(timeout)).map_err(AgentError::Broken)?;
    stream.write_all(format!("CONNECT {AGENT_PORT}\n").as_bytes()).map_err(|_| AgentError::NoAgent)?;
    let mut answer = Vec::new();
    while answer.last() != Some(&b'\n') {
        let mut byte = [0];
        match stream.read(&mut byte) {
            Ok(1) if answer.len() < ANSWER_LEN_MAX => answer.push(byte[0]),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            _ => return Err(AgentError::NoAgent),
        }
    }
    if !answer.starts_with(b"OK ") {
        return Err(AgentError::NoAgent);
    }
    let sender = stream.try_clone().map_err(AgentError::Broken)?;
    Ok((AgentSender { stream: sender }, AgentReceiver { stream, decoder: Decoder::new() }))
}

/// Whether the agent answers, within `timeout` for each step.
pub fn ping(socket: &Path, timeout: Duration) -> Result<(), AgentError> {
    let (mut sender, mut receiver) = connect(socket, timeout)?;
    sender.send(&Message::Ping)?;
    match receiver.receive() {
        Ok(Message::Pong) => Ok(()),
        Ok(_) | Err(AgentError::Closed) => Err(AgentError::NoAgent),
        Err(error) => Err(error),
    }
}

impl AgentSender {
    /// Sends a message; waits while the guest's buffers are full.
    pub fn send(&mut self, message: &Message) -> Result<(), AgentError> {
        let mut frame = Vec::new();
        message.encode(&mut frame)?;
        self.stream.write_all(&frame).map_err(AgentError::Broken)
    }
}

impl AgentReceiver {
    /// Waits for the next message for as long as it takes from now on, or for `timeout`.
    pub fn set_timeout(&mut self, timeout: Option<Duration>) -> Result<(), AgentError> {
        self.stream.set_write_timeout(timeout).map_err(AgentError::Broken)?;
        self.stream.set_read_timeout(timeout).map_err(AgentError::Broken)
    }

    /// The next message.
    pub fn receive(&mut self) -> Result<Message, AgentError> {
        let mut chunk = [0; 16 * 1024];
        loop {
            if let Some(message) = self.decoder.next_message()? {
                return Ok(message);
            }
            match self.stream.read(&mut chunk) {
                Ok(0) => return Err(AgentError::Closed),
                Ok(len) => self.decoder.push(&chunk[..len]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(AgentError::Broken(error)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;
    use std::path::PathBuf;
    use std::thread::JoinHandle;

    use tempfile::TempDir;

    const PATIENCE: Duration = Duration::from_secs(10);

    /// A machine's vsock socket that answers with fixed bytes, the folder that it is gone with, and what it was told.
    fn machine(answers: &'static [&'static [u8]]) -> (PathBuf, TempDir, JoinHandle<Vec<u8>>) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("vsock");
        let listener = UnixListener::bind(&path).unwrap();
        let thread = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut heard = Vec::new();
            for answer in answers {
                let mut bytes = [0; 256];
                let len = stream.read(&mut bytes).unwrap();
                heard.extend_from_slice(&bytes[..len]);
                stream.write_all(answer).unwrap();
            }
            heard
        });
        (path, folder, thread)
    }

    #[test]
    fn a_ping_is_a_greeting_and_a_frame() {
        let (path, _folder, thread) = machine(&[b"OK 1073741824\n", &[1, 20, 0, 0, 0, 0, 0, 0]]);
        ping(&path, PATIENCE).unwrap();
        assert_eq!(thread.join().unwrap(), b"CONNECT 1024\n\x01\x06\0\0\0\0\0\0");
    }

    #[test]
    fn a_guest_without_agent_is_told_from_a_machine_that_does_not_run() {
        let (path, _folder, _thread) = machine(&[b""]);
        assert!(matches!(ping(&path, PATIENCE), Err(AgentError::NoAgent)));
        std::fs::remove_file(&path).unwrap();
        assert!(matches!(ping(&path, PATIENCE), Err(AgentError::NoMachine(_))));
    }

    #[test]
    fn an_endless_greeting_and_a_broken_frame_are_refused() {
        let (path, _folder, _thread) = machine(&[&[b'O'; 100]]);
        assert!(matches!(ping(&path, PATIENCE), Err(AgentError::NoAgent)));
        let (path, _folder, _thread) = machine(&[b"OK 1\n", &[7; 8]]);
        assert!(matches!(ping(&path, PATIENCE), Err(AgentError::Protocol(DecodeError::Version { version: 7 }))));
    }
}
