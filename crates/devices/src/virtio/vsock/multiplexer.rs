//! All connections of one guest, and the Unix sockets behind them.
//!
//! A program on the host connects to the device's socket, writes `CONNECT <port>\n` and reads `OK <host port>\n` once the guest has
//! accepted. A connection that the guest opens to port N goes to the socket `<path>_<N>`. Anything that makes no sense is answered
//! with a reset. One thread owns all of this; nothing here blocks.

use std::collections::{BTreeMap, VecDeque};
use std::io::{ErrorKind, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;

use polder_basics::Clock;
use rustix::event::PollFlags;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use super::connection::{Broken, Connection, Phase};
use super::packet::{
    HOST_CID, Header, OP_CREDIT_REQUEST, OP_CREDIT_UPDATE, OP_DATA, OP_REQUEST, OP_RESET, OP_RESPONSE, OP_SHUTDOWN,
    Ports, TYPE_STREAM,
};

/// Connections at one time; a further one is refused.
pub const CONNECTIONS_MAX: usize = 256;
/// Host programs that have connected and not yet said to which port.
pub const HANDSHAKES_MAX: usize = 32;
/// Resets that wait for the guest to take them. While so many wait, no packet is taken from the guest. Connections that break
/// on the host's side can add one each.
pub const RESETS_MAX: usize = 128;

/// `CONNECT 4294967295\n` and nothing longer.
const HANDSHAKE_LEN_MAX: usize = 19;
const NS_PER_S: u64 = 1_000_000_000;
const HANDSHAKE_TIMEOUT_NS: u64 = 10 * NS_PER_S;
/// How long the guest may take to accept.
const REQUEST_TIMEOUT_NS: u64 = 10 * NS_PER_S;
/// How long the guest may take to let go of a connection whose host side is gone.
const CLOSE_TIMEOUT_NS: u64 = 2 * NS_PER_S;

/// Host ports of connections that the host opens start here, far from those that anybody listens on.
const HOST_PORT_MIN: u32 = 1 << 30;

struct Handshake {
    socket: UnixStream,
    line: Vec<u8>,
    deadline_ns: u64,
}

enum Greeting {
    Waiting,
    Port(u32),
    Wrong,
}

impl Handshake {
    /// Reads the line byte by byte: what follows it belongs to the guest.
    fn advance(&mut self) -> Greeting {
        loop {
            let mut byte = [0];
            match self.socket.read(&mut byte) {
                Ok(1) if byte[0] == b'\n' => return parse_connect(&self.line).map_or(Greeting::Wrong, Greeting::Port),
                Ok(1) if self.line.len() < HANDSHAKE_LEN_MAX => self.line.push(byte[0]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Greeting::Waiting,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                _ => return Greeting::Wrong,
            }
        }
    }
}

fn parse_connect(line: &[u8]) -> Option<u32> {
    std::str::from_utf8(line).ok()?.strip_prefix("CONNECT ")?.parse().ok()
}

/// Something whose readiness the worker waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    Listener,
    Handshake(usize),
    Connection(Ports),
}

/// The connections of one guest.
pub struct Multiplexer {
    guest_cid: u64,
    listener: Arc<UnixListener>,
    path: PathBuf,
    clock: Arc<dyn Clock>,
    connections: BTreeMap<Ports, Connection>,
    handshakes: Vec<Handshake>,
    /// Connections that may have a packet for the guest, each once, in turn.
    ready: VecDeque<Ports>,
    resets: VecDeque<Ports>,
    next_host_port: u32,
}

impl Multiplexer {
    /// No connections. `listener` does not block and is bound to `path`.
    pub fn new(guest_cid: u64, listener: Arc<UnixListener>, path: PathBuf, clock: Arc<dyn Clock>) -> Self {
        Multiplexer {
            guest_cid,
            listener,
            path,
            clock,
            connections: BTreeMap::new(),
            handshakes: Vec::new(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            next_host_port: HOST_PORT_MIN,
        }
    }

    /// Whether a packet of the guest may be taken now.
    pub fn can_take(&self) -> bool {
        self.resets.len() < RESETS_MAX
    }

    /// Takes a packet of the guest. The payload has the length that the header says.
    pub fn take_packet(&mut self, header: &Header, payload: &[u8]) {
        let ports = header.ports();
        let addressed = header.source_cid == self.guest_cid && header.target_cid == HOST_CID;
        if !addressed || header.socket_type != TYPE_STREAM {
            // A reset that answers a reset would go round for ever.
            if header.op != OP_RESET {
                self.resets.push_back(ports);
            }
            return;
        }
        if header.op == OP_REQUEST {
            self.open_from_guest(ports, header);
            return;
        }
        if header.op == OP_RESET {
            self.connections.remove(&ports);
            return;
        }
        let Some(connection) = self.connections.get_mut(&ports) else {
            self.resets.push_back(ports);
            return;
        };
        connection.note_credit(header);
        let result = match header.op {
            OP_RESPONSE => connection.accept(ports.host),
            OP_DATA => connection.take_data(payload),
            OP_SHUTDOWN => {
                connection.take_shutdown(header.flags).and_then(|over| if over { Err(Broken) } else { Ok(()) })
            }
            OP_CREDIT_UPDATE => Ok(()),
            OP_CREDIT_REQUEST => {
                connection.answer_credit_request();
                Ok(())
            }
            _ => Err(Broken),
        };
        self.after(ports, result);
    }

    /// Takes the reset of a packet that could not even be read.
    pub fn refuse_packet(&mut self, header: &Header) {
        let ports = header.ports();
        if header.op != OP_RESET {
            self.after(ports, Err(Broken));
        }
    }

    /// Ends a broken connection with a reset; otherwise sees whether it now has a packet to send.
    fn after(&mut self, ports: Ports, result: Result<(), Broken>) {
        match result {
            Err(Broken) => {
                self.connections.remove(&ports);
                self.resets.push_back(ports);
            }
            Ok(()) => {
                let has_packet = self.connections.get(&ports).is_some_and(Connection::has_packet);
                if has_packet && !self.ready.contains(&ports) {
                    self.ready.push_back(ports);
                }
            }
        }
    }

    fn open_from_guest(&mut self, ports: Ports, request: &Header) {
        let result = if self.connections.contains_key(&ports) || self.connections.len() >= CONNECTIONS_MAX {
            Err(Broken)
        } else {
            self.connect_host(ports.host)
                .map(|socket| self.connections.insert(ports, Connection::from_guest(socket, request)))
                .map(|_| ())
        };
        self.after(ports, result);
    }

    /// Connects to whoever listens for a port of the host. A Unix socket connects at once or not at all.
    fn connect_host(&self, port: u32) -> Result<UnixStream, Broken> {
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{port}"));
        let address = SocketAddrUnix::new(path).map_err(|_| Broken)?;
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(|_| Broken)?;
        connect(&socket, &address).map_err(|_| Broken)?;
        Ok(UnixStream::from(socket))
    }

    /// Whether [`Multiplexer::next_packet`] may have something.
    pub fn has_packet(&self) -> bool {
        !self.resets.is_empty() || !self.ready.is_empty()
    }

    /// The next packet for the guest; its payload, at most `payload.len()` bytes, lies in `payload`. Connections take turns.
    pub fn next_packet(&mut self, payload: &mut [u8]) -> Option<Header> {
        if let Some(ports) = self.resets.pop_front() {
            return Some(Header::to_guest(self.guest_cid, ports, OP_RESET));
        }
        while let Some(ports) = self.ready.pop_front() {
            let Some(connection) = self.connections.get_mut(&ports) else { continue };
            match connection.next_packet(self.guest_cid, ports, payload) {
                Ok(packet) => {
                    if connection.has_packet() {
                        self.ready.push_back(ports);
                    }
                    if packet.is_some() {
                        return packet;
                    }
                }
                Err(Broken) => {
                    self.connections.remove(&ports);
                    return Some(Header::to_guest(self.guest_cid, ports, OP_RESET));
                }
            }
        }
        None
    }

    /// What to wait for, and the descriptor on which.
    pub fn sources(&self) -> Vec<(Source, BorrowedFd<'_>, PollFlags)> {
        let mut sources = Vec::with_capacity(1 + self.handshakes.len() + self.connections.len());
        if self.handshakes.len() < HANDSHAKES_MAX && self.connections.len() < CONNECTIONS_MAX {
            sources.push((Source::Listener, self.listener.as_fd(), PollFlags::IN));
        }
        for (index, handshake) in self.handshakes.iter().enumerate() {
            sources.push((Source::Handshake(index), handshake.socket.as_fd(), PollFlags::IN));
        }
        for (ports, connection) in &self.connections {
            let mut events = PollFlags::empty();
            if connection.wants_read() {
                events |= PollFlags::IN;
            }
            if connection.wants_write() {
                events |= PollFlags::OUT;
            }
            if !events.is_empty() || connection.wants_hang_up() {
                sources.push((Source::Connection(*ports), connection.socket().as_fd(), events));
            }
        }
        sources
    }

    /// Nanoseconds until something has waited for too long.
    pub fn timeout_ns(&self) -> Option<u64> {
        let handshakes = self.handshakes.iter().map(|handshake| handshake.deadline_ns);
        let phases = self.connections.values().filter_map(|connection| match connection.phase {
            Phase::Requested { deadline_ns } | Phase::Closing { deadline_ns } => Some(deadline_ns),
            Phase::Established => None,
        });
        let deadline_ns = handshakes.chain(phases).min()?;
        Some(deadline_ns.saturating_sub(self.clock.monotonic_ns()))
    }

    /// Acts on what poll reported of [`Multiplexer::sources`].
    pub fn handle(&mut self, events: &[(Source, PollFlags)]) {
        // Handshakes from the last to the first, so that those that are done can be removed.
        for (source, flags) in events.iter().rev().filter(|(_, flags)| !flags.is_empty()) {
            match *source {
                Source::Listener => self.accept(),
                Source::Handshake(index) => self.advance_handshake(index),
                Source::Connection(ports) => self.handle_connection(ports, *flags),
            }
        }
        self.expire();
    }

    fn accept(&mut self) {
        if let Ok((socket, _)) = self.listener.accept()
            && socket.set_nonblocking(true).is_ok()
        {
            let deadline_ns = self.clock.monotonic_ns() + HANDSHAKE_TIMEOUT_NS;
            self.handshakes.push(Handshake { socket, line: Vec::new(), deadline_ns });
        }
    }

    fn advance_handshake(&mut self, index: usize) {
        let Some(handshake) = self.handshakes.get_mut(index) else { return };
        match handshake.advance() {
            Greeting::Waiting => {}
            Greeting::Wrong => {
                self.handshakes.swap_remove(index);
            }
            Greeting::Port(guest) => {
                let handshake = self.handshakes.swap_remove(index);
                if self.connections.len() < CONNECTIONS_MAX {
                    let ports = Ports { host: self.free_host_port(guest), guest };
                    let deadline_ns = self.clock.monotonic_ns() + REQUEST_TIMEOUT_NS;
                    self.connections.insert(ports, Connection::from_host(handshake.socket, deadline_ns));
                    self.after(ports, Ok(()));
                }
            }
        }
    }

    /// A host port that has no connection to this port of the guest. There are more ports than connections.
    fn free_host_port(&mut self, guest: u32) -> u32 {
        loop {
            let host = self.next_host_port;
            self.next_host_port = host.wrapping_add(1).max(HOST_PORT_MIN);
            if !self.connections.contains_key(&Ports { host, guest }) {
                return host;
            }
        }
    }

    fn handle_connection(&mut self, ports: Ports, flags: PollFlags) {
        let Some(connection) = self.connections.get_mut(&ports) else { return };
        let mut result = Ok(());
        if flags.intersects(PollFlags::OUT | PollFlags::ERR) {
            result = connection.flush_to_host();
            if connection.is_over() {
                result = Err(Broken);
            }
        }
        if flags.contains(PollFlags::IN) {
            connection.set_readable();
        } else if flags.intersects(PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL) && result.is_ok() {
            result = connection.host_gone(self.clock.monotonic_ns() + CLOSE_TIMEOUT_NS);
        }
        self.after(ports, result);
    }

    fn expire(&mut self) {
        let now_ns = self.clock.monotonic_ns();
        self.handshakes.retain(|handshake| handshake.deadline_ns > now_ns);
        let expired: Vec<Ports> = self
            .connections
            .iter()
            .filter(|(_, connection)| match connection.phase {
                Phase::Requested { deadline_ns } | Phase::Closing { deadline_ns } => deadline_ns <= now_ns,
                Phase::Established => false,
            })
            .map(|(ports, _)| *ports)
            .collect();
        for ports in expired {
            self.after(ports, Err(Broken));
        }
    }
}
