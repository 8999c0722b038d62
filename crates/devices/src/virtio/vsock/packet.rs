//! The header of a vsock packet (5.10.6), and what the two sides call each other.

use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Bytes of a header.
pub const HEADER_LEN: u64 = 44;
/// The longest payload that either side puts in one packet; what Linux uses too.
pub const PAYLOAD_LEN_MAX: usize = 64 * 1024;

/// The host's context id.
pub const HOST_CID: u64 = 2;
/// The smallest context id that a guest can have.
pub const GUEST_CID_MIN: u64 = 3;

pub const TYPE_STREAM: u16 = 1;

pub const OP_REQUEST: u16 = 1;
pub const OP_RESPONSE: u16 = 2;
pub const OP_RESET: u16 = 3;
pub const OP_SHUTDOWN: u16 = 4;
pub const OP_DATA: u16 = 5;
pub const OP_CREDIT_UPDATE: u16 = 6;
pub const OP_CREDIT_REQUEST: u16 = 7;

/// In a shutdown: the sender will receive no more.
pub const SHUTDOWN_RECEIVE: u32 = 1;
/// In a shutdown: the sender will send no more.
pub const SHUTDOWN_SEND: u32 = 2;

/// The header, as it lies in guest memory. Copied once; only the copy is looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, FromBytes, IntoBytes, Immutable)]
#[repr(C, packed)]
pub struct Header {
    pub source_cid: u64,
    pub target_cid: u64,
    pub source_port: u32,
    pub target_port: u32,
    /// Bytes of payload.
    pub len: u32,
    pub socket_type: u16,
    pub op: u16,
    pub flags: u32,
    /// The sender's buffer for what it receives, in bytes.
    pub buffer_len: u32,
    /// Bytes that the sender has taken out of that buffer since the connection began, modulo 2^32.
    pub forwarded: u32,
}

/// The two ports of a connection; all connections are between the host and the one guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ports {
    pub host: u32,
    pub guest: u32,
}

impl Header {
    /// A packet from the host.
    pub fn to_guest(guest_cid: u64, ports: Ports, op: u16) -> Self {
        Header {
            source_cid: HOST_CID,
            target_cid: guest_cid,
            source_port: ports.host,
            target_port: ports.guest,
            socket_type: TYPE_STREAM,
            op,
            ..Header::default()
        }
    }

    /// The ports of a packet from the guest.
    pub fn ports(&self) -> Ports {
        Ports { host: self.target_port, guest: self.source_port }
    }
}

const _: () = assert!(size_of::<Header>() as u64 == HEADER_LEN);
