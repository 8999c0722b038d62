//! The messages of a transfer, and the stream they travel in. docs/transfer.md draws them.
//!
//! Everything that a peer sends is bounded here: the length of each message by its kind, names and texts by theirs.

use std::io::{self, Read, Write};

use super::{NodeRef, TransferError, Transferred};
use crate::error::StoreError;
use crate::name::{Kind, Name};
use crate::pace::Pace;
use crate::records::record::{CONTENT_LEN_MAX, HEADER_LEN};
use crate::store::Store;

/// The version of the protocol that this release speaks. A later one names the oldest it still speaks as well.
pub(super) const VERSION: u16 = 1;
const MAGIC: &[u8; 16] = b"polder transfer\0";
const HELLO_LEN: usize = 56;
const FRAME_HEADER_LEN: usize = 5;
/// Longest text of a refusal.
const TEXT_LEN_MAX: usize = 1024;
/// Longest name of an image, volume or snapshot.
const NAME_LEN_MAX: usize = 128;
/// Bits of a request: children of a node of a tree, or trees of a node.
pub(super) const BITS_LEN_MAX: usize = 256;
/// A record with its header. What is packed can be a little longer than its content.
const RECORD_LEN_MAX: usize = HEADER_LEN + CONTENT_LEN_MAX + HEADER_LEN;
/// Bytes that are collected before they are handed to the stream.
const WRITE_BUFFER_LEN: usize = 256 << 10;
const READ_BUFFER_LEN: usize = 256 << 10;

mod kind {
    pub const PUSH: u8 = 1;
    pub const PULL: u8 = 2;
    pub const ACCEPTED: u8 = 3;
    pub const REFUSED: u8 = 4;
    pub const OFFER: u8 = 5;
    pub const WANT: u8 = 6;
    pub const RECORD: u8 = 7;
    pub const DONE: u8 = 8;
}

/// What is asked of a node that the other side has been told of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Want<'a> {
    pub handle: u32,
    /// The nodes are only to be opened: whoever asks has their records.
    pub open_only: bool,
    /// Nothing else will be asked of this node.
    pub last: bool,
    /// A bit for each child, the lowest of the first byte first.
    pub bits: &'a [u8],
}

/// A message to send.
pub(super) enum Message<'a> {
    Push { image: &'a str, replace: bool },
    Pull(NodeRef),
    Accepted,
    Refused(&'a str),
    Offer(Name),
    Want(Want<'a>),
    Record(&'a [u8; HEADER_LEN], &'a [u8]),
    Done,
}

/// What a client asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Request {
    Push { image: String, replace: bool },
    Pull(NodeRef),
}

/// A message that came.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Incoming<'a> {
    Request(Request),
    Accepted,
    Refused(&'a str),
    Offer(Name),
    Want(Want<'a>),
    Record(&'a [u8]),
    Done,
}

fn protocol(what: impl Into<String>) -> TransferError {
    TransferError::Protocol(what.into())
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// A byte stream with messages on it.
pub(super) struct Link<S> {
    stream: S,
    pace: Pace,
    received: Vec<u8>,
    /// Of `received`, what was not taken yet.
    from: usize,
    to: usize,
    unsent: Vec<u8>,
    pub transferred: Transferred,
}

impl<S: Read + Write> Link<S> {
    pub fn new(stream: S, pace: Pace) -> Self {
        let received = vec![0; READ_BUFFER_LEN];
        let transferred = Transferred::default();
        Link { stream, pace, received, from: 0, to: 0, unsent: Vec::new(), transferred }
    }

    pub fn transferred(&self) -> Transferred {
        self.transferred
    }

    /// Says who we are, and hears who the other side is.
    pub fn greet(&mut self, store: &Store) -> Result<(), TransferError> {
        let domain = domain_of(store);
        let mut hello = Vec::with_capacity(HELLO_LEN);
        hello.extend_from_slice(MAGIC);
        hello.extend_from_slice(&VERSION.to_le_bytes());
        hello.extend_from_slice(&VERSION.to_le_bytes());
        hello.extend_from_slice(&[0; 4]);
        hello.extend_from_slice(&store.id().0);
        hello.extend_from_slice(&domain);
        self.unsent.extend_from_slice(&hello);
        self.flush()?;
        self.fill(HELLO_LEN)?;
        let said = &self.received[self.from..self.from + HELLO_LEN];
        if &said[..16] != MAGIC {
            return Err(protocol("it does not greet as a store does"));
        }
        let (first, last) = (u16_at(said, 16), u16_at(said, 18));
        if !(first..=last).contains(&VERSION) {
            return Err(TransferError::Version { first, last });
        }
        if said[40..56] != domain {
            return Err(TransferError::OtherDomain);
        }
        self.from += HELLO_LEN;
        Ok(())
    }

    /// Has a message sent with the next [`flush`](Self::flush), or before.
    pub fn send(&mut self, message: &Message<'_>) -> Result<(), TransferError> {
        let start = self.unsent.len();
        self.unsent.extend_from_slice(&[0; FRAME_HEADER_LEN]);
        let kind = write_payload(message, &mut self.unsent);
        let len = self.unsent.len() - start - FRAME_HEADER_LEN;
        self.unsent[start..start + 4].copy_from_slice(&(len as u32).to_le_bytes());
        self.unsent[start + 4] = kind;
        if self.unsent.len() >= WRITE_BUFFER_LEN {
            self.flush()?;
        }
        Ok(())
    }

    /// Bytes that wait for the next flush.
    pub fn unsent_len(&self) -> usize {
        self.unsent.len()
    }

    pub fn flush(&mut self) -> Result<(), TransferError> {
        if !self.unsent.is_empty() {
            let written = self.stream.write_all(&self.unsent);
            self.transferred.sent_bytes += self.unsent.len() as u64;
            self.pace.spend(self.unsent.len() as u64);
            self.unsent.clear();
            written.map_err(TransferError::Cut)?;
        }
        self.stream.flush().map_err(TransferError::Cut)
    }

    /// Sees to it that so many bytes have been received.
    fn fill(&mut self, len: usize) -> Result<(), TransferError> {
        match self.fill_or_end(len)? {
            true => Ok(()),
            false => Err(TransferError::Cut(io::ErrorKind::UnexpectedEof.into())),
        }
    }

    /// As [`fill`](Self::fill), but an end before the first byte is none of an error.
    fn fill_or_end(&mut self, len: usize) -> Result<bool, TransferError> {
        if self.from + len > self.received.len() {
            self.received.copy_within(self.from..self.to, 0);
            self.to -= self.from;
            self.from = 0;
        }
        while self.to - self.from < len {
            let end = io::ErrorKind::UnexpectedEof;
            match self.stream.read(&mut self.received[self.to..]) {
                Ok(0) if self.to == self.from => return Ok(false),
                Ok(0) => return Err(TransferError::Cut(end.into())),
                Ok(more) => {
                    self.to += more;
                    self.transferred.received_bytes += more as u64;
                    self.pace.spend(more as u64);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // TLS calls it so when a peer goes without a word.
                Err(error) if error.kind() == end && self.to == self.from => return Ok(false),
                Err(error) => return Err(TransferError::Cut(error)),
            }
        }
        Ok(true)
    }

    pub fn receive(&mut self) -> Result<Incoming<'_>, TransferError> {
        self.fill(FRAME_HEADER_LEN)?;
        self.receive_rest()
    }

    /// The next request; none if the client has closed.
    pub fn receive_request(&mut self) -> Result<Option<Request>, TransferError> {
        if !self.fill_or_end(FRAME_HEADER_LEN)? {
            return Ok(None);
        }
        match self.receive_rest()? {
            Incoming::Request(request) => Ok(Some(request)),
            _ => Err(protocol("a request was to come")),
        }
    }

    fn receive_rest(&mut self) -> Result<Incoming<'_>, TransferError> {
        let len = u32_at(&self.received, self.from) as usize;
        let kind = self.received[self.from + 4];
        let max = match kind {
            kind::PUSH => 1 + NAME_LEN_MAX,
            kind::PULL => 2 + 2 * NAME_LEN_MAX,
            kind::REFUSED => TEXT_LEN_MAX,
            kind::OFFER => Name::LEN,
            kind::WANT => 5 + BITS_LEN_MAX,
            kind::RECORD => RECORD_LEN_MAX,
            kind::ACCEPTED | kind::DONE => 0,
            other => return Err(protocol(format!("a message of unknown kind {other}"))),
        };
        if len > max {
            return Err(protocol(format!("a message of kind {kind} with {len} bytes")));
        }
        self.fill(FRAME_HEADER_LEN + len)?;
        let start = self.from + FRAME_HEADER_LEN;
        self.from = start + len;
        parse(kind, &self.received[start..start + len])
    }

    /// The other side's word whether it does what it was asked for.
    pub fn expect_accept(&mut self) -> Result<(), TransferError> {
        match self.receive()? {
            Incoming::Accepted => Ok(()),
            Incoming::Refused(why) => Err(TransferError::Refused(why.to_owned())),
            _ => Err(protocol("an answer to a request was to come")),
        }
    }

    /// Says why it ends here, if the other side can hear it. Gives the error back.
    pub fn tell(&mut self, error: TransferError) -> TransferError {
        let word = match &error {
            TransferError::Cut(_) | TransferError::Refused(_) => return error,
            TransferError::Store(StoreError::File { .. } | StoreError::Catalog(_)) => {
                // Paths of this host are nobody's business.
                "the store cannot read or write its files".to_owned()
            }
            told => told.to_string(),
        };
        // The connection is of no use afterwards in any case.
        let _ = self.send(&Message::Refused(&word)).and_then(|()| self.flush());
        error
    }
}

/// Tells naming domains apart without telling the secret.
fn domain_of(store: &Store) -> [u8; 16] {
    let name = store.namer().name(Kind::Node, b"polder transfer domain");
    let mut domain = [0; 16];
    domain.copy_from_slice(&name.0[..16]);
    domain
}

fn write_payload(message: &Message<'_>, bytes: &mut Vec<u8>) -> u8 {
    match message {
        Message::Push { image, replace } => {
            bytes.push(u8::from(*replace));
            bytes.extend_from_slice(image.as_bytes());
            kind::PUSH
        }
        Message::Pull(what) => {
            let (code, first, second) = match what {
                NodeRef::Image(name) => (0, name, ""),
                NodeRef::Snapshot { volume, snapshot } => (1, volume, snapshot.as_str()),
                NodeRef::Volume(name) => (2, name, ""),
            };
            bytes.extend_from_slice(&[code, first.len().min(NAME_LEN_MAX) as u8]);
            bytes.extend_from_slice(&first.as_bytes()[..first.len().min(NAME_LEN_MAX)]);
            bytes.extend_from_slice(second.as_bytes());
            kind::PULL
        }
        Message::Accepted => kind::ACCEPTED,
        Message::Refused(why) => {
            bytes.extend_from_slice(&why.as_bytes()[..why.floor_char_boundary(TEXT_LEN_MAX)]);
            kind::REFUSED
        }
        Message::Offer(name) => {
            bytes.extend_from_slice(&name.0);
            kind::OFFER
        }
        Message::Want(want) => {
            bytes.extend_from_slice(&want.handle.to_le_bytes());
            bytes.push(u8::from(want.open_only) | u8::from(want.last) << 1);
            bytes.extend_from_slice(want.bits);
            kind::WANT
        }
        Message::Record(header, packed) => {
            bytes.extend_from_slice(*header);
            bytes.extend_from_slice(packed);
            kind::RECORD
        }
        Message::Done => kind::DONE,
    }
}

fn text(bytes: &[u8]) -> Result<&str, TransferError> {
    std::str::from_utf8(bytes).map_err(|_| protocol("a text that is not UTF-8"))
}

fn parse(kind: u8, bytes: &[u8]) -> Result<Incoming<'_>, TransferError> {
    let short = || protocol(format!("a message of kind {kind} is too short"));
    Ok(match kind {
        kind::PUSH => match bytes {
            [replace @ (0 | 1), image @ ..] => {
                Incoming::Request(Request::Push { image: text(image)?.to_owned(), replace: *replace == 1 })
            }
            _ => return Err(short()),
        },
        kind::PULL => {
            let [code, len, names @ ..] = bytes else { return Err(short()) };
            let (first, second) = names.split_at_checked(usize::from(*len)).ok_or_else(short)?;
            let (first, second) = (text(first)?.to_owned(), text(second)?.to_owned());
            Incoming::Request(Request::Pull(match (code, second.is_empty()) {
                (0, true) => NodeRef::Image(first),
                (1, false) => NodeRef::Snapshot { volume: first, snapshot: second },
                (2, true) => NodeRef::Volume(first),
                _ => return Err(protocol(format!("a request for something of unknown kind {code}"))),
            }))
        }
        kind::ACCEPTED => Incoming::Accepted,
        kind::REFUSED => Incoming::Refused(text(bytes)?),
        kind::OFFER => Incoming::Offer(Name(bytes.try_into().map_err(|_| short())?)),
        kind::WANT => {
            if bytes.len() < 5 || bytes[4] > 3 {
                return Err(short());
            }
            Incoming::Want(Want {
                handle: u32_at(bytes, 0),
                open_only: bytes[4] & 1 != 0,
                last: bytes[4] & 2 != 0,
                bits: &bytes[5..],
            })
        }
        kind::RECORD => Incoming::Record(bytes),
        _ => Incoming::Done,
    })
}
