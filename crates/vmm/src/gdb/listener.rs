//! Where gdb connects.

use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{SocketFlags, accept_with, sockopt};

use crate::GdbPlace;
use crate::listening_socket::ListeningSocket;

/// A gdb that takes nothing for so long is gone.
const SEND_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(10);

/// The listening end; the file of a Unix socket goes with it.
#[derive(Debug)]
pub(crate) struct GdbListener {
    listener: OwnedFd,
    is_tcp: bool,
    _socket: Option<ListeningSocket>,
}

impl GdbListener {
    /// Listens on a port of 127.0.0.1 or at a path.
    pub(crate) fn bind(place: &GdbPlace) -> io::Result<Self> {
        match place {
            GdbPlace::Port(port) => {
                let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, *port))?;
                Ok(GdbListener { listener: listener.into(), is_tcp: true, _socket: None })
            }
            GdbPlace::Socket(path) => {
                let socket = ListeningSocket::bind(path)?;
                Ok(GdbListener { listener: socket.listener()?.into(), is_tcp: false, _socket: Some(socket) })
            }
        }
    }

    /// Takes a connection that waits.
    pub(crate) fn accept(&self) -> io::Result<OwnedFd> {
        let connection = accept_with(&self.listener, SocketFlags::CLOEXEC)?;
        sockopt::set_socket_timeout(&connection, sockopt::Timeout::Send, Some(SEND_TIMEOUT))?;
        if self.is_tcp {
            sockopt::set_tcp_nodelay(&connection, true)?;
        }
        Ok(connection)
    }
}

impl AsFd for GdbListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}
