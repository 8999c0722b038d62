//! Sockets that wait for clients.

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Clients that wait to be accepted.
const BACKLOG: i32 = 128;

/// A socket that waits for clients. Dropping one of a path removes it.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
    place: Place,
}

#[derive(Debug)]
enum Place {
    Unix { path: PathBuf, device: u64, inode: u64 },
    Tcp { address: SocketAddr },
}

/// Why nobody can connect.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    #[error("{path} is no socket and stays")]
    NoSocket { path: PathBuf },
    #[error("another server listens at {path}")]
    InUse { path: PathBuf },
    #[error("cannot listen at {path}")]
    Unix {
        path: PathBuf,
        #[source]
        cause: io::Error,
    },
    #[error("cannot listen at {address}")]
    Tcp {
        address: SocketAddr,
        #[source]
        cause: io::Error,
    },
}

impl Listener {
    /// Listens at a path of the file system. Whoever may connect is up to the permissions `mode`. A socket that a server left
    /// behind when it was killed is replaced.
    pub fn unix(path: &Path, mode: u32) -> Result<Self, ListenError> {
        let error = |cause: io::Error| ListenError::Unix { path: path.to_owned(), cause };
        let address = SocketAddrUnix::new(path).map_err(|cause| error(cause.into()))?;
        if let Ok(metadata) = path.symlink_metadata() {
            if !metadata.file_type().is_socket() {
                return Err(ListenError::NoSocket { path: path.to_owned() });
            }
            let probe = stream_socket().map_err(error)?;
            if connect(&probe, &address) != Err(rustix::io::Errno::CONNREFUSED) {
                return Err(ListenError::InUse { path: path.to_owned() });
            }
            std::fs::remove_file(path).map_err(error)?;
        }
        let socket = stream_socket().map_err(error)?;
        bind(&socket, &address).map_err(|cause| error(cause.into()))?;
        // Nobody can connect before `listen`.
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).map_err(error)?;
        let metadata = path.symlink_metadata().map_err(error)?;
        listen(&socket, BACKLOG).map_err(|cause| error(cause.into()))?;
        let place = Place::Unix { path: path.to_owned(), device: metadata.dev(), inode: metadata.ino() };
        Ok(Self { socket, place })
    }

    /// Listens at an address; with port 0 the host chooses one.
    pub fn tcp(address: SocketAddr) -> Result<Self, ListenError> {
        let error = |cause| ListenError::Tcp { address, cause };
        let listener = TcpListener::bind(address).map_err(error)?;
        let address = listener.local_addr().map_err(error)?;
        listener.set_nonblocking(true).map_err(error)?;
        Ok(Self { socket: listener.into(), place: Place::Tcp { address } })
    }

    /// The address of a TCP listener.
    pub fn address(&self) -> Option<SocketAddr> {
        match self.place {
            Place::Unix { .. } => None,
            Place::Tcp { address } => Some(address),
        }
    }

    pub(super) fn is_tcp(&self) -> bool {
        matches!(self.place, Place::Tcp { .. })
    }

    pub(super) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Place::Unix { path, device, inode } = &self.place {
            // Not if somebody else listens there now.
            if path.symlink_metadata().is_ok_and(|metadata| (metadata.dev(), metadata.ino()) == (*device, *inode)) {
                let _ = std::fs::remove_file(path);
            }
        }
    }
}

fn stream_socket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?)
}
