//! Numbers and headers of the NBD protocol, as in "The NBD protocol" (doc/proto.md of the NBD project). Names are those of that
//! document without their prefix; everything on the wire is big-endian.

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

pub(super) const REQUEST_LEN: usize = 28;
const REQUEST_MAGIC: u32 = 0x2560_9513;

/// The head of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Request {
    pub flags: u16,
    pub command: u16,
    pub cookie: u64,
    pub offset: u64,
    pub len: u32,
}

impl Request {
    /// Nothing if the magic number is wrong.
    pub fn parse(bytes: &[u8; REQUEST_LEN]) -> Option<Self> {
        if u32_at(bytes, 0) != REQUEST_MAGIC {
            return None;
        }
        Some(Self {
            flags: u16_at(bytes, 4),
            command: u16_at(bytes, 6),
            cookie: u64_at(bytes, 8),
            offset: u64_at(bytes, 16),
            len: u32_at(bytes, 24),
        })
    }

    /// As a client sends it.
    #[cfg(test)]
    pub fn to_bytes(self) -> [u8; REQUEST_LEN] {
        let mut bytes = [0; REQUEST_LEN];
        bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
        bytes[4..6].copy_from_slice(&self.flags.to_be_bytes());
        bytes[6..8].copy_from_slice(&self.command.to_be_bytes());
        bytes[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        bytes[16..24].copy_from_slice(&self.offset.to_be_bytes());
        bytes[24..].copy_from_slice(&self.len.to_be_bytes());
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

pub(super) const CHUNK_HEAD_LEN: usize = 20;
/// The head of a chunk of data, with the offset that begins its payload.
pub(super) const DATA_HEAD_LEN: usize = CHUNK_HEAD_LEN + 8;
/// A chunk that says where zeros are.
pub(super) const HOLE_LEN: usize = CHUNK_HEAD_LEN + 12;
const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// The type of a structured reply's chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum ChunkType {
    None = 0,
    OffsetData = 1,
    OffsetHole = 2,
    BlockStatus = 5,
    Error = (1 << 15) + 1,
}

/// Whether more chunks of the same reply follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Last {
    Yes,
    No,
}

/// The head of a chunk.
pub(super) fn chunk_head(last: Last, chunk: ChunkType, cookie: u64, payload_len: u32) -> [u8; CHUNK_HEAD_LEN] {
    let mut bytes = [0; CHUNK_HEAD_LEN];
    bytes[..4].copy_from_slice(&CHUNK_MAGIC.to_be_bytes());
    bytes[4..6].copy_from_slice(&u16::from(last == Last::Yes).to_be_bytes());
    bytes[6..8].copy_from_slice(&(chunk as u16).to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..].copy_from_slice(&payload_len.to_be_bytes());
    bytes
}

/// What comes before the `len` bytes of a chunk of data.
pub(super) fn data_head(last: Last, cookie: u64, offset: u64, len: u32) -> [u8; DATA_HEAD_LEN] {
    let mut bytes = [0; DATA_HEAD_LEN];
    bytes[..CHUNK_HEAD_LEN].copy_from_slice(&chunk_head(last, ChunkType::OffsetData, cookie, len + 8));
    bytes[CHUNK_HEAD_LEN..].copy_from_slice(&offset.to_be_bytes());
    bytes
}

/// A chunk that says that `len` bytes are zeros.
pub(super) fn hole(last: Last, cookie: u64, offset: u64, len: u32) -> [u8; HOLE_LEN] {
    let mut bytes = [0; HOLE_LEN];
    bytes[..CHUNK_HEAD_LEN].copy_from_slice(&chunk_head(last, ChunkType::OffsetHole, cookie, 12));
    bytes[CHUNK_HEAD_LEN..CHUNK_HEAD_LEN + 8].copy_from_slice(&offset.to_be_bytes());
    bytes[CHUNK_HEAD_LEN + 8..].copy_from_slice(&len.to_be_bytes());
    bytes
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
