//! A listening vsock socket. The standard library knows no vsock, so these are the bare system calls.

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

/// Connections that wait to be accepted.
const BACKLOG: i32 = 64;

/// A socket that takes connections from the host.
pub struct VsockListener {
    socket: OwnedFd,
}

impl VsockListener {
    /// Listens on a port for every context id.
    pub fn bind(port: u32) -> io::Result<Self> {
        // SAFETY: no pointers are passed; the result is checked before it is owned.
        let raw = unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
        if raw < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just made and belongs to nobody else.
        let socket = unsafe { OwnedFd::from_raw_fd(raw) };
        // SAFETY: the address is a plain structure for which all zeros is valid.
        let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
        address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
        address.svm_port = port;
        address.svm_cid = libc::VMADDR_CID_ANY;
        let len = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
        // SAFETY: the address is a live structure of that length.
        if unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), len) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: no pointers are passed.
        if unsafe { libc::listen(socket.as_raw_fd(), BACKLOG) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(VsockListener { socket })
    }

    /// Waits for a connection.
    pub fn accept(&self) -> io::Result<OwnedFd> {
        loop {
            let none = std::ptr::null_mut();
            // SAFETY: null pointers say that the peer's address is not wanted.
            let raw = unsafe { libc::accept4(self.socket.as_raw_fd(), none, std::ptr::null_mut(), libc::SOCK_CLOEXEC) };
            if raw >= 0 {
                // SAFETY: the descriptor was just made and belongs to nobody else.
                return Ok(unsafe { OwnedFd::from_raw_fd(raw) });
            }
            let error = io::Error::last_os_error();
            match error.raw_os_error() {
                Some(libc::EINTR | libc::ECONNABORTED) => {}
                // Out of descriptors or memory for now; sessions that end give some back.
                Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM) => {
                    std::thread::sleep(std::time::Duration::from_millis(100));
                }
                _ => return Err(error),
            }
        }
    }
}
