//! One stream between a Unix socket on the host and a port in the guest.
//!
//! Flow control is by credit (5.10.6.3): each side says how much it can hold and how much it has passed on. What the guest sends
//! beyond what we can hold breaks the connection; what the host sends is read from its socket only as far as the guest's credit
//! reaches. So neither side makes the other grow.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use super::packet::{
    Header, OP_CREDIT_REQUEST, OP_CREDIT_UPDATE, OP_DATA, OP_REQUEST, OP_RESPONSE, OP_SHUTDOWN, PAYLOAD_LEN_MAX, Ports,
    SHUTDOWN_RECEIVE, SHUTDOWN_SEND,
};

/// Bytes from the guest that wait for the host's socket, at most.
pub const BUFFER_LEN: u32 = 256 * 1024;

/// Where a connection stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// We asked the guest and it has not answered.
    Requested { deadline_ns: u64 },
    /// Both sides can send.
    Established,
    /// The host's side is gone; the guest was told and has not let go.
    Closing { deadline_ns: u64 },
}

/// The connection must end with a reset to the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Broken;

/// Control packets that wait to be sent, each at most once.
#[derive(Debug, Clone, Copy, Default)]
struct Pending {
    request: bool,
    response: bool,
    shutdown: bool,
    credit_update: bool,
}

/// One stream.
pub struct Connection {
    socket: UnixStream,
    pub phase: Phase,
    /// From the guest, not yet taken by the socket.
    to_host: VecDeque<u8>,
    /// Bytes passed on to the socket, and what the guest last heard of it.
    forwarded: u32,
    told_forwarded: u32,
    /// What the guest said of its own buffer.
    guest_buffer_len: u32,
    guest_forwarded: u32,
    /// Bytes sent to the guest.
    sent: u32,
    pending: Pending,
    /// The socket has something to read, or its end.
    readable: bool,
    /// The guest's credit ran out and it has been asked for more.
    asked_credit: bool,
    host_ended: bool,
    guest_sends_no_more: bool,
    guest_receives_no_more: bool,
}

impl Connection {
    fn new(socket: UnixStream, phase: Phase) -> Self {
        Connection {
            socket,
            phase,
            to_host: VecDeque::new(),
            forwarded: 0,
            told_forwarded: 0,
            guest_buffer_len: 0,
            guest_forwarded: 0,
            sent: 0,
            pending: Pending::default(),
            readable: false,
            asked_credit: false,
            host_ended: false,
            guest_sends_no_more: false,
            guest_receives_no_more: false,
        }
    }

    /// A stream that the host opens. `socket` does not block.
    pub fn from_host(socket: UnixStream, deadline_ns: u64) -> Self {
        let mut connection = Connection::new(socket, Phase::Requested { deadline_ns });
        connection.pending.request = true;
        connection
    }

    /// A stream that the guest opened with `request`. `socket` does not block.
    pub fn from_guest(socket: UnixStream, request: &Header) -> Self {
        let mut connection = Connection::new(socket, Phase::Established);
        connection.note_credit(request);
        connection.pending.response = true;
        connection
    }

    pub fn socket(&self) -> &UnixStream {
        &self.socket
    }

    /// Every packet of the guest says where its buffer stands.
    pub fn note_credit(&mut self, header: &Header) {
        self.guest_buffer_len = header.buffer_len;
        self.guest_forwarded = header.forwarded;
        self.asked_credit &= self.credit() == 0;
    }

    /// Bytes that the guest can take now. A guest that claims to have passed on more than was sent gets none.
    fn credit(&self) -> u32 {
        self.guest_buffer_len.saturating_sub(self.sent.wrapping_sub(self.guest_forwarded))
    }

    /// The guest accepted; the host's program is told its port, as it waits for that line.
    pub fn accept(&mut self, host_port: u32) -> Result<(), Broken> {
        if !matches!(self.phase, Phase::Requested { .. }) || self.pending.request {
            return Err(Broken);
        }
        self.phase = Phase::Established;
        let line = format!("OK {host_port}\n");
        match self.socket.write(line.as_bytes()) {
            Ok(written) if written == line.len() => Ok(()),
            _ => Err(Broken),
        }
    }

    /// Data from the guest.
    pub fn take_data(&mut self, payload: &[u8]) -> Result<(), Broken> {
        if matches!(self.phase, Phase::Requested { .. }) || self.guest_sends_no_more {
            return Err(Broken);
        }
        if payload.len() > BUFFER_LEN as usize - self.to_host.len() {
            return Err(Broken);
        }
        if matches!(self.phase, Phase::Closing { .. }) {
            // Nobody reads it any more; the guest learns that from the shutdown.
            self.forwarded = self.forwarded.wrapping_add(payload.len() as u32);
            return Ok(());
        }
        self.to_host.extend(payload);
        self.flush_to_host()
    }

    /// The guest closes one or both directions; whether the connection is over.
    pub fn take_shutdown(&mut self, flags: u32) -> Result<bool, Broken> {
        self.guest_receives_no_more |= flags & SHUTDOWN_RECEIVE != 0;
        self.guest_sends_no_more |= flags & SHUTDOWN_SEND != 0;
        if self.guest_receives_no_more {
            let _ = self.socket.shutdown(Shutdown::Read);
        }
        self.flush_to_host()?;
        Ok(self.is_over())
    }

    /// Both directions are closed and everything the guest sent is with the host.
    pub fn is_over(&self) -> bool {
        self.guest_receives_no_more && self.guest_sends_no_more && self.to_host.is_empty()
    }

    /// The guest wants to know where our buffer stands.
    pub fn answer_credit_request(&mut self) {
        self.pending.credit_update = true;
    }

    /// Passes on what the socket takes.
    pub fn flush_to_host(&mut self) -> Result<(), Broken> {
        while !self.to_host.is_empty() {
            let (front, _) = self.to_host.as_slices();
            match self.socket.write(front) {
                Ok(0) => return Err(Broken),
                Ok(written) => {
                    self.to_host.drain(..written);
                    self.forwarded = self.forwarded.wrapping_add(written as u32);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(_) => return Err(Broken),
            }
        }
        if self.to_host.is_empty() && self.guest_sends_no_more {
            let _ = self.socket.shutdown(Shutdown::Write);
        }
        if self.forwarded.wrapping_sub(self.told_forwarded) >= BUFFER_LEN / 4 {
            self.pending.credit_update = true;
        }
        Ok(())
    }

    /// Whether to hear of the socket's readiness to take bytes.
    pub fn wants_write(&self) -> bool {
        !self.to_host.is_empty()
    }

    /// Whether to hear of bytes on the socket.
    pub fn wants_read(&self) -> bool {
        self.can_send_data() && !self.readable && self.credit() > 0
    }

    /// Whether to hear of the other end's going away, and of nothing else.
    pub fn wants_hang_up(&self) -> bool {
        match self.phase {
            Phase::Requested { .. } => true,
            Phase::Established => self.host_ended || self.guest_receives_no_more,
            Phase::Closing { .. } => false,
        }
    }

    fn can_send_data(&self) -> bool {
        self.phase == Phase::Established && !self.host_ended && !self.guest_receives_no_more
    }

    /// The socket has bytes or its end.
    pub fn set_readable(&mut self) {
        self.readable = true;
    }

    /// The host's program is gone for good.
    pub fn host_gone(&mut self, deadline_ns: u64) -> Result<(), Broken> {
        if self.phase != Phase::Established || !self.to_host.is_empty() || self.guest_sends_no_more {
            return Err(Broken);
        }
        self.host_ended = true;
        self.phase = Phase::Closing { deadline_ns };
        self.pending.shutdown = true;
        Ok(())
    }

    /// Whether a packet for the guest may wait here.
    pub fn has_packet(&self) -> bool {
        let Pending { request, response, shutdown, credit_update } = self.pending;
        let data = self.readable && self.can_send_data() && (self.credit() > 0 || !self.asked_credit);
        request || response || shutdown || credit_update || data
    }

    /// The next packet for the guest, its payload in `payload`; `None` if there is nothing to say after all.
    pub fn next_packet(&mut self, guest_cid: u64, ports: Ports, payload: &mut [u8]) -> Result<Option<Header>, Broken> {
        let mut packet = Header::to_guest(guest_cid, ports, 0);
        if std::mem::take(&mut self.pending.request) {
            packet.op = OP_REQUEST;
        } else if std::mem::take(&mut self.pending.response) {
            packet.op = OP_RESPONSE;
        } else if self.readable && self.can_send_data() && self.credit() > 0 {
            let len_max = payload.len().min(self.credit() as usize).min(PAYLOAD_LEN_MAX);
            match self.read_host(&mut payload[..len_max]) {
                Ok(Some(0)) => {
                    self.host_ended = true;
                    packet.op = OP_SHUTDOWN;
                    packet.flags = SHUTDOWN_SEND;
                }
                Ok(Some(len)) => {
                    packet.op = OP_DATA;
                    packet.len = len as u32;
                    self.sent = self.sent.wrapping_add(len as u32);
                }
                Ok(None) => return self.next_packet(guest_cid, ports, payload),
                Err(_) => return Err(Broken),
            }
        } else if std::mem::take(&mut self.pending.shutdown) {
            packet.op = OP_SHUTDOWN;
            packet.flags = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;
        } else if std::mem::take(&mut self.pending.credit_update) {
            packet.op = OP_CREDIT_UPDATE;
        } else if self.readable && self.can_send_data() && !self.asked_credit {
            self.asked_credit = true;
            packet.op = OP_CREDIT_REQUEST;
        } else {
            return Ok(None);
        }
        // Whatever is sent tells the guest where our buffer stands.
        self.pending.credit_update = false;
        packet.buffer_len = BUFFER_LEN;
        packet.forwarded = self.forwarded;
        self.told_forwarded = self.forwarded;
        Ok(Some(packet))
    }

    /// Reads from the socket: `Some(0)` at its end, `None` if nothing is there.
    fn read_host(&mut self, target: &mut [u8]) -> io::Result<Option<usize>> {
        if target.is_empty() {
            self.readable = false;
            return Ok(None);
        }
        loop {
            match self.socket.read(target) {
                Ok(len) => {
                    // A short read says that the socket is empty; its end, if it comes, is news from poll.
                    self.readable = len == target.len();
                    return Ok(Some(len));
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.readable = false;
                    return Ok(None);
                }
                Err(error) => return Err(error),
            }
        }
    }
}
