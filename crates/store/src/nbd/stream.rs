//! The socket of one client, with TLS in it or without.

use polder_trust::tls::{ServerConfig, ServerConnection};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt;
use rustix::net::{RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendFlags, recv, recvmsg, send, sendmsg};
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Bytes that TLS takes over before some have left.
const TLS_UNSENT_LEN_MAX: usize = 256 << 10;

/// Whether to wait for bytes or say at once that there are none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wait {
    Yes,
    No,
}

/// The socket of one client, in blocking mode; calls that must not wait say so.
pub(super) struct Stream {
    socket: Arc<OwnedFd>,
    tls: Option<Box<Tls>>,
}

struct Tls {
    connection: ServerConnection,
    /// There are decrypted bytes that nobody has taken.
    has_received: bool,
}

impl Stream {
    pub fn new(socket: Arc<OwnedFd>) -> Self {
        Self { socket, tls: None }
    }

    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// From here on [`Wait::Yes`] means at most this time; then it says that it would wait.
    pub fn wait_at_most(&self, timeout: Duration) {
        // Where the host refuses, the wait has no end, and only the buffers of an idle client are kept.
        let _ = sockopt::set_socket_timeout(&*self.socket, sockopt::Timeout::Recv, Some(timeout));
    }

    /// Whether bytes that were taken over have not left yet: [`Stream::send`] is to be called again, if with nothing.
    pub fn has_unsent(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.connection.wants_write())
    }

    /// Whether there are bytes for [`Stream::receive`] that the socket does not know of.
    pub fn has_received(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.has_received)
    }

    /// Whether the socket has something to receive, or its end.
    pub fn has_input(&self) -> io::Result<bool> {
        let mut fds = [PollFd::new(&*self.socket, PollFlags::IN)];
        match poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })) {
            Ok(ready) => Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Receives into `first`, and what it has no room for into `second`. Nothing means that the client has closed.
    pub fn receive(&mut self, first: &mut [u8], second: &mut [u8], wait: Wait) -> io::Result<usize> {
        let flags = match wait {
            Wait::Yes => RecvFlags::empty(),
            Wait::No => RecvFlags::DONTWAIT,
        };
        if let Some(tls) = &mut self.tls {
            return tls.receive(&self.socket, if first.is_empty() { second } else { first }, flags);
        }
        retry(|| {
            if first.is_empty() {
                return Ok(recv(&*self.socket, &mut *second, flags)?.1);
            }
            let mut slices = [IoSliceMut::new(first), IoSliceMut::new(second)];
            let received = recvmsg(&*self.socket, &mut slices, &mut RecvAncillaryBuffer::default(), flags)?;
            Ok(received.bytes)
        })
    }

    /// Sends what there is room for; says how much was taken over.
    pub fn send(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        match &mut self.tls {
            Some(tls) => tls.send(&self.socket, slices),
            None => send_some(&self.socket, slices),
        }
    }

    /// Receives at least one byte before `deadline`, or nothing if the client has closed.
    pub fn receive_before(&mut self, bytes: &mut [u8], deadline: Instant) -> io::Result<usize> {
        loop {
            match self.receive(&mut [], bytes, Wait::No) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.wait(PollFlags::IN, deadline)?;
                }
                result => return result,
            }
        }
    }

    /// Sends everything before `deadline`.
    pub fn send_all(&mut self, mut bytes: &[u8], deadline: Instant) -> io::Result<()> {
        while !bytes.is_empty() || self.has_unsent() {
            match self.send(&[IoSlice::new(bytes)]) {
                Ok(count) => bytes = &bytes[count..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.wait(PollFlags::OUT, deadline)?,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// From here on everything is TLS; the handshake ends before `deadline`.
    pub fn start_tls(&mut self, config: &Arc<ServerConfig>, deadline: Instant) -> io::Result<()> {
        let mut connection = ServerConnection::new(config.clone()).map_err(io::Error::other)?;
        connection.set_buffer_limit(Some(TLS_UNSENT_LEN_MAX));
        self.tls = Some(Box::new(Tls { connection, has_received: false }));
        while let Some(tls) = &mut self.tls
            && tls.connection.is_handshaking()
        {
            let result = if tls.connection.wants_write() {
                tls.flush(&self.socket)
            } else {
                tls.receive_packets(&self.socket, RecvFlags::DONTWAIT).and_then(|count| match count {
                    0 => Err(io::ErrorKind::UnexpectedEof.into()),
                    _ => Ok(()),
                })
            };
            let waits_for = if tls.connection.wants_write() { PollFlags::OUT } else { PollFlags::IN };
            match result {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.wait(waits_for, deadline)?,
                result => result?,
            }
        }
        self.send_all(&[], deadline)
    }

    /// Says goodbye, if there is TLS; does not wait.
    pub fn close(&mut self) {
        if let Some(tls) = &mut self.tls {
            tls.connection.send_close_notify();
            // The client sees the end of the socket in any case.
            let _ = tls.flush(&self.socket);
        }
    }

    fn wait(&self, flags: PollFlags, deadline: Instant) -> io::Result<()> {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut fds = [PollFd::new(&*self.socket, flags)];
        match poll(&mut fds, Some(&timespec(left))) {
            Ok(0) => Err(io::ErrorKind::TimedOut.into()),
            Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}

impl Tls {
    fn receive(&mut self, socket: &OwnedFd, bytes: &mut [u8], flags: RecvFlags) -> io::Result<usize> {
        loop {
            match self.connection.reader().read(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                result => {
                    let state = self.connection.process_new_packets().map_err(io::Error::other)?;
                    self.has_received = state.plaintext_bytes_to_read() > 0;
                    return result;
                }
            }
            if self.receive_packets(socket, flags)? == 0 {
                return Ok(0);
            }
        }
    }

    fn receive_packets(&mut self, socket: &OwnedFd, flags: RecvFlags) -> io::Result<usize> {
        let count = self.connection.read_tls(&mut Socket { socket, flags })?;
        if let Err(error) = self.connection.process_new_packets() {
            // The client is told why, if it listens.
            let _ = self.flush(socket);
            return Err(io::Error::new(io::ErrorKind::InvalidData, error));
        }
        Ok(count)
    }

    fn send(&mut self, socket: &OwnedFd, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        let taken = self.connection.writer().write_vectored(slices)?;
        match self.flush(socket) {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock || taken == 0 => Err(error),
            _ => Ok(taken),
        }
    }

    fn flush(&mut self, socket: &OwnedFd) -> io::Result<()> {
        while self.connection.wants_write() {
            self.connection.write_tls(&mut Socket { socket, flags: RecvFlags::DONTWAIT })?;
        }
        Ok(())
    }
}

/// The socket under TLS.
struct Socket<'a> {
    socket: &'a OwnedFd,
    flags: RecvFlags,
}

impl Read for Socket<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        retry(|| Ok(recv(self.socket, &mut *bytes, self.flags)?.1))
    }
}

impl Write for Socket<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        send_some(self.socket, &[IoSlice::new(bytes)])
    }

    fn write_vectored(&mut self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        send_some(self.socket, slices)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn send_some(socket: &OwnedFd, slices: &[IoSlice<'_>]) -> io::Result<usize> {
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    retry(|| {
        Ok(match slices {
            [slice] => send(socket, slice, flags)?,
            _ => sendmsg(socket, slices, &mut SendAncillaryBuffer::default(), flags)?,
        })
    })
}

/// What happened while a connection waited.
pub(super) struct Woken {
    pub readable: bool,
    pub signaled: bool,
}

/// Waits for the socket and for the disk. After `send_by` it is an error: then the client takes nothing.
pub(super) fn wait_for_any(
    socket: BorrowedFd<'_>,
    flags: PollFlags,
    signal: BorrowedFd<'_>,
    send_by: Option<Instant>,
) -> io::Result<Woken> {
    let timeout = match send_by.map(|deadline| deadline.saturating_duration_since(Instant::now())) {
        Some(Duration::ZERO) => return Err(io::ErrorKind::TimedOut.into()),
        left => left.map(timespec),
    };
    let mut fds = [PollFd::from_borrowed_fd(signal, PollFlags::IN), PollFd::from_borrowed_fd(socket, flags)];
    // Where nothing is to be known of the socket its end is not looked at either: it would be reported again and again.
    let count = if flags.is_empty() { 1 } else { 2 };
    match poll(&mut fds[..count], timeout.as_ref()) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    let readable = fds[1].revents().intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR);
    Ok(Woken { readable: readable && flags.contains(PollFlags::IN), signaled: !fds[0].revents().is_empty() })
}

fn timespec(duration: Duration) -> Timespec {
    Timespec { tv_sec: duration.as_secs() as i64, tv_nsec: i64::from(duration.subsec_nanos()) }
}

fn retry<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}
