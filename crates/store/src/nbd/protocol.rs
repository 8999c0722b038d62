//! Numbers and headers of the NBD protocol, as in "The NBD protocol" (doc/proto.md of the NBD project). Names are those of that
//! document without their prefix; everything on the wire is big-endian.

use std::ops::Deref;

pub(super) const INIT_PASSWORD: u64 = 0x4e42_444d_4147_4943;
pub(super) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
pub(super) const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

/// Handshake flags, and the client's answers to them.
pub(super) mod handshake {
    pub const FIXED_NEWSTYLE: u16 = 1 << 0;
    pub const NO_ZEROES: u16 = 1 << 1;
}

/// Options of the negotiation.
pub(super) mod option {
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const STARTTLS: u32 = 5;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Replies to options.
pub(super) mod reply {
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    const ERROR: u32 = 1 << 31;
    pub const ERR_UNSUP: u32 = ERROR + 1;
    pub const ERR_POLICY: u32 = ERROR + 2;
    pub const ERR_INVALID: u32 = ERROR + 3;
    pub const ERR_TLS_REQD: u32 = ERROR + 5;
    pub const ERR_UNKNOWN: u32 = ERROR + 6;
    pub const ERR_TOO_BIG: u32 = ERROR + 9;
    pub const ERR_EXT_HEADER_REQD: u32 = ERROR + 10;
}

/// Kinds of information about an export.
pub(super) mod info {
    pub const EXPORT: u16 = 0;
    pub const NAME: u16 = 1;
    pub const DESCRIPTION: u16 = 2;
    pub const BLOCK_SIZE: u16 = 3;
}

/// What an export can do.
pub(super) mod transmission {
    pub const HAS_FLAGS: u16 = 1 << 0;
    pub const READ_ONLY: u16 = 1 << 1;
    pub const SEND_FLUSH: u16 = 1 << 2;
    pub const SEND_FUA: u16 = 1 << 3;
    pub const SEND_TRIM: u16 = 1 << 5;
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    pub const SEND_DF: u16 = 1 << 7;
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    pub const SEND_CACHE: u16 = 1 << 10;
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Commands.
pub(super) mod command {
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISC: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const CACHE: u16 = 5;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
}

/// Flags of commands.
pub(super) mod command_flag {
    pub const FUA: u16 = 1 << 0;
    pub const NO_HOLE: u16 = 1 << 1;
    pub const DF: u16 = 1 << 2;
    pub const REQ_ONE: u16 = 1 << 3;
    pub const FAST_ZERO: u16 = 1 << 4;
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

/// Bits of `base:allocation`.
pub(super) mod state {
    pub const HOLE: u32 = 1 << 0;
    pub const ZERO: u32 = 1 << 1;
}

/// The bit of a context about changes, as QEMU has it in `qemu:dirty-bitmap:`.
pub(super) const STATE_DIRTY: u32 = 1 << 0;

/// An error as a client sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum ErrorNumber {
    NotPermitted = 1,
    InputOutput = 5,
    Invalid = 22,
    NoSpace = 28,
    Overflow = 75,
    Shutdown = 108,
}

/// Bytes of the longest string that the protocol allows.
pub(super) const STRING_LEN_MAX: usize = 4096;

/// What requests and replies look like, as it was agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// One head a reply.
    Simple,
    /// Replies are chunks.
    Structured,
    /// The same with lengths of 64 bits, in requests as well.
    Extended,
}

pub(super) const REQUEST_LEN: usize = 28;
pub(super) const EXTENDED_REQUEST_LEN: usize = 32;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;

/// The head of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Request {
    pub flags: u16,
    pub command: u16,
    pub cookie: u64,
    pub offset: u64,
    /// Of the data that follow, or of the range that is meant.
    pub len: u64,
}

impl Request {
    /// The head that the bytes begin with, and how many it has. Nothing if they are too few; no request if the magic number is wrong.
    pub fn parse(bytes: &[u8], form: Form) -> Option<(Option<Self>, usize)> {
        let (magic, head_len) = match form {
            Form::Simple | Form::Structured => (REQUEST_MAGIC, REQUEST_LEN),
            Form::Extended => (EXTENDED_REQUEST_MAGIC, EXTENDED_REQUEST_LEN),
        };
        let head = bytes.get(..head_len)?;
        let request = Self {
            flags: u16_at(head, 4),
            command: u16_at(head, 6),
            cookie: u64_at(head, 8),
            offset: u64_at(head, 16),
            len: if form == Form::Extended { u64_at(head, 24) } else { u32_at(head, 24).into() },
        };
        Some(((u32_at(head, 0) == magic).then_some(request), head_len))
    }

    /// Bytes of data that follow the head. A write has them whether it says so or not: the protocol wants it to, and QEMU's does not.
    pub fn payload_len(&self, form: Form) -> u64 {
        let says_so = form == Form::Extended && self.flags & command_flag::PAYLOAD_LEN != 0;
        if says_so || self.command == command::WRITE { self.len } else { 0 }
    }

    /// As a client sends it.
    #[cfg(test)]
    pub fn to_bytes(self, form: Form) -> Vec<u8> {
        let magic = if form == Form::Extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC };
        let mut bytes = magic.to_be_bytes().to_vec();
        bytes.extend_from_slice(&self.flags.to_be_bytes());
        bytes.extend_from_slice(&self.command.to_be_bytes());
        bytes.extend_from_slice(&self.cookie.to_be_bytes());
        bytes.extend_from_slice(&self.offset.to_be_bytes());
        match form {
            Form::Extended => bytes.extend_from_slice(&self.len.to_be_bytes()),
            _ => bytes.extend_from_slice(&(self.len as u32).to_be_bytes()),
        }
        bytes
    }
}

pub(super) const SIMPLE_REPLY_LEN: usize = 16;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;

/// The head of a simple reply; `error` 0 means success.
pub(super) fn simple_reply(error: u32, cookie: u64) -> [u8; SIMPLE_REPLY_LEN] {
    let mut bytes = [0; SIMPLE_REPLY_LEN];
    bytes[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    bytes[4..8].copy_from_slice(&error.to_be_bytes());
    bytes[8..].copy_from_slice(&cookie.to_be_bytes());
    bytes
}

const EXTENDED_CHUNK_HEAD_LEN: usize = 32;
/// The longest head of a chunk of data, with the offset that begins its payload.
pub(super) const DATA_HEAD_LEN_MAX: usize = EXTENDED_CHUNK_HEAD_LEN + 8;
/// The longest chunk that says where zeros are.
pub(super) const HOLE_LEN_MAX: usize = EXTENDED_CHUNK_HEAD_LEN + 12;
const CHUNK_MAGIC: u32 = 0x668e_33ef;
const EXTENDED_CHUNK_MAGIC: u32 = 0x6e8a_278c;

/// The type of a structured reply's chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum ChunkType {
    None = 0,
    OffsetData = 1,
    OffsetHole = 2,
    BlockStatus = 5,
    BlockStatusExtended = 6,
    Error = (1 << 15) + 1,
}

/// Whether more chunks of the same reply follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Last {
    Yes,
    No,
}

/// The first bytes of a chunk.
pub(super) struct Head {
    bytes: [u8; HOLE_LEN_MAX],
    len: usize,
}

impl Head {
    fn push(&mut self, more: &[u8]) {
        self.bytes[self.len..][..more.len()].copy_from_slice(more);
        self.len += more.len();
    }
}

impl Deref for Head {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// The head of a chunk of a reply; `payload_len` bytes follow. The form is not the simple one.
pub(super) fn chunk_head(form: Form, last: Last, chunk: ChunkType, request: &Request, payload_len: u32) -> Head {
    let mut head = Head { bytes: [0; HOLE_LEN_MAX], len: 0 };
    let magic = if form == Form::Extended { EXTENDED_CHUNK_MAGIC } else { CHUNK_MAGIC };
    head.push(&magic.to_be_bytes());
    head.push(&u16::from(last == Last::Yes).to_be_bytes());
    head.push(&(chunk as u16).to_be_bytes());
    head.push(&request.cookie.to_be_bytes());
    match form {
        Form::Extended => {
            head.push(&request.offset.to_be_bytes());
            head.push(&u64::from(payload_len).to_be_bytes());
        }
        _ => head.push(&payload_len.to_be_bytes()),
    }
    head
}

/// What comes before the `len` bytes of a chunk of data.
pub(super) fn data_head(form: Form, last: Last, request: &Request, offset: u64, len: u32) -> Head {
    let mut head = chunk_head(form, last, ChunkType::OffsetData, request, len + 8);
    head.push(&offset.to_be_bytes());
    head
}

/// A chunk that says that `len` bytes are zeros.
pub(super) fn hole(form: Form, last: Last, request: &Request, offset: u64, len: u32) -> Head {
    let mut head = chunk_head(form, last, ChunkType::OffsetHole, request, 12);
    head.push(&offset.to_be_bytes());
    head.push(&len.to_be_bytes());
    head
}

/// The number at `at`, which is inside `bytes`.
pub(super) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

/// The number at `at`, which is inside `bytes`.
pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// The number at `at`, which is inside `bytes`.
pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) << 32 | u64::from(u32_at(bytes, at + 4))
}
