//! What the host and the agent in a guest say to each other: constants, messages and their bytes.
//!
//! One connection carries one session. The host opens it to [`AGENT_PORT`] over vsock and sends one [`Message::Exec`],
//! [`Message::Ping`] or [`Message::PowerOff`]; the agent answers. A frame is a header of eight bytes (version, kind, two zero bytes,
//! length of the payload as a little-endian 32-bit number) and the payload. Each side treats the other as hostile: lengths are
//! checked before anything is kept, every payload is parsed to its last byte, and an unknown version or kind is an error that names it.

use std::fmt;

/// The vsock port on which the agent listens.
pub const AGENT_PORT: u32 = 1024;
/// The version of the frames. A peer with another version is refused by name.
pub const PROTOCOL_VERSION: u8 = 1;
/// Bytes in a frame's header.
pub const HEADER_LEN: usize = 8;
/// The longest payload. A command line with its environment must fit.
pub const PAYLOAD_LEN_MAX: usize = 256 * 1024;
/// Senders cut streams into pieces of at most this.
pub const CHUNK_LEN_MAX: usize = 32 * 1024;
/// Arguments or variables in one command, at most.
pub const STRINGS_MAX: usize = 4096;

/// A program to run.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Command {
    /// The program, looked up in the guest's PATH, and its arguments; never empty.
    pub arguments: Vec<Vec<u8>>,
    /// Variables added to the agent's defaults, each NAME=VALUE.
    pub environment: Vec<Vec<u8>>,
    /// Where it runs; the user's home if not given.
    pub directory: Option<Vec<u8>>,
    /// Give it a terminal of this size; input, output and errors are then one stream.
    pub terminal: Option<TerminalSize>,
}

/// Rows and columns of a terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TerminalSize {
    pub rows: u16,
    pub columns: u16,
}

/// How a program ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExitStatus {
    Code(u8),
    Signal(u8),
}

impl ExitStatus {
    /// The status that a shell would show: the code, or 128 plus the signal.
    pub fn shell_code(self) -> u8 {
        match self {
            ExitStatus::Code(code) => code,
            ExitStatus::Signal(signal) => signal.saturating_add(128),
        }
    }
}

/// Why the agent did not do what it was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AgentErrorKind {
    /// The program or the directory does not exist in the guest.
    NotFound,
    /// The program exists and cannot be run.
    NotExecutable,
    /// Too many sessions.
    Busy,
    /// The request makes no sense.
    BadRequest,
    /// Anything else.
    Other,
}

/// A message in either direction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// Host: run this.
    Exec(Command),
    /// Host: input for the program.
    Stdin(Vec<u8>),
    /// Host: no more input.
    StdinEnd,
    /// Host: send the program's process group this signal.
    Signal(u8),
    /// Host: the terminal's size changed.
    Resize(TerminalSize),
    /// Host: are you there?
    Ping,
    /// Host: switch the guest off in an orderly way.
    PowerOff,
    /// Agent: the program wrote this.
    Stdout(Vec<u8>),
    /// Agent: the program wrote this to its error output.
    Stderr(Vec<u8>),
    /// Agent: the program ended; the last message of the session.
    Exit(ExitStatus),
    /// Agent: it did not work; the last message of the session.
    Error { kind: AgentErrorKind, text: String },
    /// Agent: here I am.
    Pong,
    /// Agent: the guest is about to switch off.
    PoweringOff,
}

/// A message is too long for a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the message has {len} bytes or {strings} strings; at most {PAYLOAD_LEN_MAX} bytes and {STRINGS_MAX} strings fit"
)]
pub struct EncodeError {
    pub len: usize,
    pub strings: usize,
}

/// The peer broke the protocol. The session ends.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The peer speaks another version.
    #[error("the peer speaks version {version} of the agent's protocol; this side speaks version {PROTOCOL_VERSION}")]
    Version { version: u8 },
    /// A frame of an unknown kind.
    #[error("a frame has the unknown kind {kind}")]
    Kind { kind: u8 },
    /// The header announces too much.
    #[error("a frame announces {len} bytes; at most {PAYLOAD_LEN_MAX} are allowed")]
    Length { len: usize },
    /// The payload is not what its kind demands.
    #[error("a frame of kind {kind} is malformed")]
    Payload { kind: u8 },
}

const KIND_EXEC: u8 = 1;
const KIND_STDIN: u8 = 2;
const KIND_STDIN_END: u8 = 3;
const KIND_SIGNAL: u8 = 4;
const KIND_RESIZE: u8 = 5;
const KIND_PING: u8 = 6;
const KIND_POWER_OFF: u8 = 7;
const KIND_STDOUT: u8 = 16;
const KIND_STDERR: u8 = 17;
const KIND_EXIT: u8 = 18;
const KIND_ERROR: u8 = 19;
const KIND_PONG: u8 = 20;
const KIND_POWERING_OFF: u8 = 21;

impl Message {
    fn kind(&self) -> u8 {
        match self {
            Message::Exec(_) => KIND_EXEC,
            Message::Stdin(_) => KIND_STDIN,
            Message::StdinEnd => KIND_STDIN_END,
            Message::Signal(_) => KIND_SIGNAL,
            Message::Resize(_) => KIND_RESIZE,
            Message::Ping => KIND_PING,
            Message::PowerOff => KIND_POWER_OFF,
            Message::Stdout(_) => KIND_STDOUT,
            Message::Stderr(_) => KIND_STDERR,
            Message::Exit(_) => KIND_EXIT,
            Message::Error { .. } => KIND_ERROR,
            Message::Pong => KIND_PONG,
            Message::PoweringOff => KIND_POWERING_OFF,
        }
    }

    /// Appends the message's frame to `frames`; on an error nothing is appended.
    pub fn encode(&self, frames: &mut Vec<u8>) -> Result<(), EncodeError> {
        let start = frames.len();
        frames.extend_from_slice(&[PROTOCOL_VERSION, self.kind(), 0, 0, 0, 0, 0, 0]);
        let mut strings = 0;
        match self {
            Message::Exec(command) => {
                strings = command.arguments.len().max(command.environment.len());
                encode_command(command, frames);
            }
            Message::Stdin(bytes) | Message::Stdout(bytes) | Message::Stderr(bytes) => frames.extend_from_slice(bytes),
            Message::Signal(signal) => frames.push(*signal),
            Message::Resize(size) => encode_size(*size, frames),
            Message::Exit(ExitStatus::Code(code)) => frames.extend_from_slice(&[0, *code]),
            Message::Exit(ExitStatus::Signal(signal)) => frames.extend_from_slice(&[1, *signal]),
            Message::Error { kind, text } => {
                frames.push(match kind {
                    AgentErrorKind::NotFound => 0,
                    AgentErrorKind::NotExecutable => 1,
                    AgentErrorKind::Busy => 2,
                    AgentErrorKind::BadRequest => 3,
                    AgentErrorKind::Other => 4,
                });
                frames.extend_from_slice(text.as_bytes());
            }
            Message::StdinEnd | Message::Ping | Message::PowerOff | Message::Pong | Message::PoweringOff => {}
        }
        let len = frames.len() - start - HEADER_LEN;
        if len > PAYLOAD_LEN_MAX || strings > STRINGS_MAX {
            frames.truncate(start);
            return Err(EncodeError { len, strings });
        }
        frames[start + 4..start + HEADER_LEN].copy_from_slice(&(len as u32).to_le_bytes());
        Ok(())
    }

    fn decode(kind: u8, payload: &[u8]) -> Result<Message, DecodeError> {
        let malformed = DecodeError::Payload { kind };
        let message = match (kind, payload) {
            (KIND_EXEC, _) => Message::Exec(decode_command(payload).ok_or(malformed)?),
            (KIND_STDIN, _) => Message::Stdin(payload.to_vec()),
            (KIND_STDIN_END, []) => Message::StdinEnd,
            (KIND_SIGNAL, &[signal]) => Message::Signal(signal),
            (KIND_RESIZE, _) => {
                let mut reader = Reader(payload);
                Message::Resize(reader.size().filter(|_| reader.0.is_empty()).ok_or(malformed)?)
            }
            (KIND_PING, []) => Message::Ping,
            (KIND_POWER_OFF, []) => Message::PowerOff,
            (KIND_STDOUT, _) => Message::Stdout(payload.to_vec()),
            (KIND_STDERR, _) => Message::Stderr(payload.to_vec()),
            (KIND_EXIT, &[0, code]) => Message::Exit(ExitStatus::Code(code)),
            (KIND_EXIT, &[1, signal]) => Message::Exit(ExitStatus::Signal(signal)),
            (KIND_ERROR, [error_kind, text @ ..]) => {
                let kind = match error_kind {
                    0 => AgentErrorKind::NotFound,
                    1 => AgentErrorKind::NotExecutable,
                    2 => AgentErrorKind::Busy,
                    3 => AgentErrorKind::BadRequest,
                    4 => AgentErrorKind::Other,
                    _ => return Err(malformed),
                };
                Message::Error { kind, text: String::from_utf8_lossy(text).into_owned() }
            }
            (KIND_PONG, []) => Message::Pong,
            (KIND_POWERING_OFF, []) => Message::PoweringOff,
            (KIND_STDIN_END | KIND_SIGNAL | KIND_PING | KIND_POWER_OFF, _) => return Err(malformed),
            (KIND_EXIT | KIND_ERROR | KIND_PONG | KIND_POWERING_OFF, _) => return Err(malformed),
            _ => return Err(DecodeError::Kind { kind }),
        };
        Ok(message)
    }
}

fn encode_size(size: TerminalSize, frames: &mut Vec<u8>) {
    frames.extend_from_slice(&size.rows.to_le_bytes());
    frames.extend_from_slice(&size.columns.to_le_bytes());
}

fn encode_string(string: &[u8], frames: &mut Vec<u8>) {
    // Lengths beyond 32 bits are beyond the payload's bound, which the caller checks afterwards.
    frames.extend_from_slice(&(string.len() as u32).to_le_bytes());
    frames.extend_from_slice(string);
}

fn encode_command(command: &Command, frames: &mut Vec<u8>) {
    for strings in [&command.arguments, &command.environment] {
        frames.extend_from_slice(&(strings.len() as u32).to_le_bytes());
        strings.iter().for_each(|string| encode_string(string, frames));
    }
    frames.push(u8::from(command.directory.is_some()));
    if let Some(directory) = &command.directory {
        encode_string(directory, frames);
    }
    frames.push(u8::from(command.terminal.is_some()));
    if let Some(size) = command.terminal {
        encode_size(size, frames);
    }
}

fn decode_command(payload: &[u8]) -> Option<Command> {
    let mut reader = Reader(payload);
    let command = Command {
        arguments: reader.strings()?,
        environment: reader.strings()?,
        directory: if reader.flag()? { Some(reader.string()?) } else { None },
        terminal: if reader.flag()? { Some(reader.size()?) } else { None },
    };
    (reader.0.is_empty() && !command.arguments.is_empty()).then_some(command)
}

/// The rest of a payload. No string holds a zero byte: it could not be a C string.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn array<const LEN: usize>(&mut self) -> Option<[u8; LEN]> {
        let (bytes, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*bytes)
    }

    fn flag(&mut self) -> Option<bool> {
        match self.array()? {
            [0] => Some(false),
            [1] => Some(true),
            _ => None,
        }
    }

    fn size(&mut self) -> Option<TerminalSize> {
        Some(TerminalSize { rows: u16::from_le_bytes(self.array()?), columns: u16::from_le_bytes(self.array()?) })
    }

    fn string(&mut self) -> Option<Vec<u8>> {
        let len = u32::from_le_bytes(self.array()?) as usize;
        let (bytes, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        (!bytes.contains(&0)).then(|| bytes.to_vec())
    }

    fn strings(&mut self) -> Option<Vec<Vec<u8>>> {
        let count = u32::from_le_bytes(self.array()?) as usize;
        if count > STRINGS_MAX {
            return None;
        }
        (0..count).map(|_| self.string()).collect()
    }
}

/// Cuts a stream of bytes into messages. Holds at most one frame and what was pushed last.
#[derive(Default)]
pub struct Decoder {
    bytes: Vec<u8>,
    taken: usize,
}

impl fmt::Debug for Decoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Decoder").field("waiting", &(self.bytes.len() - self.taken)).finish()
    }
}

impl Decoder {
    /// An empty decoder.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds received bytes. Call [`Decoder::next_message`] until it gives `None` before pushing more.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.drain(..self.taken);
        self.taken = 0;
        self.bytes.extend_from_slice(bytes);
    }

    /// The next whole message, if there is one. After an error the stream is out of step and must be closed.
    pub fn next_message(&mut self) -> Result<Option<Message>, DecodeError> {
        let rest = &self.bytes[self.taken..];
        let Some(([version, kind, _, _, len @ ..], payload)) = rest.split_first_chunk::<HEADER_LEN>() else {
            return Ok(None);
        };
        if *version != PROTOCOL_VERSION {
            return Err(DecodeError::Version { version: *version });
        }
        let len = u32::from_le_bytes(*len) as usize;
        if len > PAYLOAD_LEN_MAX {
            return Err(DecodeError::Length { len });
        }
        let Some(payload) = payload.get(..len) else { return Ok(None) };
        let message = Message::decode(*kind, payload)?;
        self.taken += HEADER_LEN + len;
        Ok(Some(message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn every_message() -> Vec<Message> {
        let size = TerminalSize { rows: 24, columns: 80 };
        let command = Command {
            arguments: vec![b"printf".to_vec(), b"a b\n".to_vec(), Vec::new()],
            environment: vec![b"TERM=vt100".to_vec()],
            directory: Some(b"/tmp".to_vec()),
            terminal: Some(size),
        };
        vec![
            Message::Exec(Command { arguments: vec![b"true".to_vec()], ..Command::default() }),
            Message::Exec(command),
            Message::Stdin(b"in".to_vec()),
            Message::StdinEnd,
            Message::Signal(15),
            Message::Resize(size),
            Message::Ping,
            Message::PowerOff,
            Message::Stdout(vec![0; CHUNK_LEN_MAX]),
            Message::Stderr(Vec::new()),
            Message::Exit(ExitStatus::Code(3)),
            Message::Exit(ExitStatus::Signal(9)),
            Message::Error { kind: AgentErrorKind::NotFound, text: "no such program".into() },
            Message::Pong,
            Message::PoweringOff,
        ]
    }

    #[test]
    fn every_message_survives_the_way_in_any_pieces() {
        let mut frames = Vec::new();
        for message in every_message() {
            message.encode(&mut frames).unwrap();
        }
        for piece_len in [1, 7, 4096, frames.len()] {
            let (mut decoder, mut decoded) = (Decoder::new(), Vec::new());
            for piece in frames.chunks(piece_len) {
                decoder.push(piece);
                while let Some(message) = decoder.next_message().unwrap() {
                    decoded.push(message);
                }
            }
            assert_eq!(decoded, every_message());
        }
    }

    fn decode(bytes: &[u8]) -> Result<Option<Message>, DecodeError> {
        let mut decoder = Decoder::new();
        decoder.push(bytes);
        decoder.next_message()
    }

    #[test]
    fn wrong_versions_kinds_and_lengths_are_refused_by_name() {
        assert_eq!(decode(&[2, KIND_PING, 0, 0, 0, 0, 0, 0]), Err(DecodeError::Version { version: 2 }));
        assert_eq!(decode(&[1, 99, 0, 0, 0, 0, 0, 0]), Err(DecodeError::Kind { kind: 99 }));
        assert_eq!(decode(&[1, KIND_PING, 0, 0, 1, 0, 0, 0, 0]), Err(DecodeError::Payload { kind: KIND_PING }));
        let len = PAYLOAD_LEN_MAX + 1;
        let mut header = [1, KIND_STDOUT, 0, 0, 0, 0, 0, 0];
        header[4..].copy_from_slice(&(len as u32).to_le_bytes());
        assert_eq!(decode(&header), Err(DecodeError::Length { len }));
    }

    #[test]
    fn a_command_that_lies_about_its_strings_is_refused() {
        let exec = |payload: &[u8]| {
            let mut frame = vec![1, KIND_EXEC, 0, 0];
            frame.extend_from_slice(&(payload.len() as u32).to_le_bytes());
            frame.extend_from_slice(payload);
            decode(&frame)
        };
        let malformed = Err(DecodeError::Payload { kind: KIND_EXEC });
        // No argument; more strings than there are; a string longer than the payload; a zero byte; a byte too many.
        assert_eq!(exec(&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0]), malformed);
        assert_eq!(exec(&[0xff; 4]), malformed);
        assert_eq!(exec(&[1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, b'a']), malformed);
        assert_eq!(exec(&[1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]), malformed);
        assert_eq!(exec(&[1, 0, 0, 0, 1, 0, 0, 0, b'a', 0, 0, 0, 0, 0, 0, 7]), malformed);
        assert!(exec(&[1, 0, 0, 0, 1, 0, 0, 0, b'a', 0, 0, 0, 0, 0, 0]).is_ok());
    }

    #[test]
    fn a_message_too_long_for_a_frame_is_refused_and_leaves_nothing() {
        let mut frames = vec![1, 2, 3];
        assert!(Message::Stdin(vec![0; PAYLOAD_LEN_MAX + 1]).encode(&mut frames).is_err());
        let many = Command { arguments: vec![Vec::new(); STRINGS_MAX + 1], ..Command::default() };
        assert!(Message::Exec(many).encode(&mut frames).is_err());
        assert_eq!(frames, [1, 2, 3]);
    }

    #[test]
    fn truncated_and_flipped_frames_never_panic() {
        let mut frames = Vec::new();
        for message in every_message().into_iter().take(8) {
            message.encode(&mut frames).unwrap();
        }
        for index in 0..frames.len() {
            for bit in 0..8 {
                let mut bytes = frames.clone();
                bytes[index] ^= 1 << bit;
                let mut decoder = Decoder::new();
                decoder.push(&bytes);
                while let Ok(Some(_)) = decoder.next_message() {}
            }
        }
    }
}
