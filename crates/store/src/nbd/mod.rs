//! The NBD server: disks for clients of the network block device protocol, over Unix sockets and TCP.
//!
//! It speaks fixed newstyle negotiation and, with clients that ask for it, structured replies, extended headers and metadata contexts; "The NBD
//! protocol" (doc/proto.md of the NBD project) is what it follows. A connection has one thread and one [`Queue`] of its disk: a
//! request that the disk answers at once costs one system call to receive, one to send, and no other thread.
//!
//! Invariants:
//! - Nothing that a client sends makes the server panic, hang or hold more than the bounds below.
//! - A client that is slow, dead or hostile costs the others nothing but its share of the connections.
//! - A flush covers what any connection was told is done: [`Disk`](crate::disk::Disk) promises it.
//!
//! Modules: `protocol` (numbers and heads), `negotiation` and `transmission` (the two phases, bytes in and bytes out), `refusal`
//! (what makes no sense), `context` (what can be asked about parts of a disk), `buffer`, `chunks`, `outgoing` and `budget`
//! (requests and replies in memory), `exports` (disks by name), `stream` (a socket, with TLS or without), `connection` (the
//! thread of one client), `listener`, `server`, `testbench` (the body of a fuzz target).
//!
//! [`Queue`]: crate::disk::Queue

mod budget;
mod buffer;
mod chunks;
mod connection;
mod context;
mod exports;
mod listener;
mod negotiation;
#[cfg(test)]
mod negotiation_tests;
mod outgoing;
mod protocol;
mod refusal;
mod server;
#[cfg(test)]
mod server_tests;
mod stream;
#[cfg(any(test, feature = "testbench"))]
pub mod testbench;
mod transmission;
#[cfg(test)]
mod transmission_tests;

pub use exports::{Export, ExportError, Exports};
pub use listener::{ListenError, Listener};
pub use server::{Server, ServerOptions, StopHandle, Tls};

use std::time::Duration;

/// Bytes of the longest read or write. The protocol asks for 32 MiB; libnbd and nbdkit go up to this.
pub const PAYLOAD_LEN_MAX: u32 = 64 << 20;
/// Exports of one server.
pub const EXPORTS_MAX: usize = 1024;
/// Bytes of an option's data. A longer option is skipped and refused.
pub const OPTION_LEN_MAX: usize = 32 << 10;
/// Queries in one option about metadata contexts.
pub const CONTEXT_QUERIES_MAX: usize = 64;
/// Metadata contexts of one connection.
pub const CONTEXTS_MAX: usize = 16;
/// Snapshots that are listed as metadata contexts; older ones can be chosen by name.
pub const LISTED_SNAPSHOTS_MAX: usize = 256;
/// Parts that one request about the status of blocks gets for each context.
pub const EXTENTS_MAX: usize = 4096;
/// Requests of one connection that the disk has and has not finished. At the bound no more are received.
pub const REQUESTS_IN_FLIGHT_MAX: usize = 128;
/// Bytes of buffers of one connection, in flight and waiting to be sent; one more request may begin below it.
pub const HELD_BYTES_MAX: usize = 64 << 20;
/// The same of all connections of a server. Above it a connection gets one request at a time.
pub const SERVER_HELD_BYTES_MAX: usize = 1 << 30;
/// Bytes that wait to be sent to one client before no more requests are received from it.
pub const OUTGOING_BYTES_MAX: usize = 32 << 20;
/// Bytes of unused large buffers that a connection keeps.
pub const POOLED_BYTES_MAX: usize = 16 << 20;

/// After this time without a request a connection keeps no buffers.
const REST_TIMEOUT: Duration = Duration::from_secs(10);
/// How long clients may take their last replies when the server stops.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// Bytes that are read from the disk before replies are sent.
const ROUND_BYTES_MAX: usize = 256 << 10;
/// Bytes of a part without data that is worth a chunk of its own in a reply.
const HOLE_LEN_MIN: usize = 4096;
/// Bytes that a request to fill the cache reads at most; it is a hint.
const CACHE_LEN_MAX: u64 = 32 << 20;
/// Bytes that one request about the status of blocks looks at, at most; the client asks on. Whatever the disk is like, it is looked through in
/// the thread of the connection.
const STATUS_LEN_MAX: u64 = 16 << 30;
/// Parts of memory that are sent with one system call.
const IO_SLICES_MAX: usize = 64;
/// Bytes that are received at once, but for the data of writes.
const INPUT_LEN: usize = 64 << 10;
