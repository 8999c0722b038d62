//! A Unix socket that the machine listens on: the way to the guest's vsock ports, and the way of a debugger.

use std::io::{self, ErrorKind};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// A listening socket; dropping it removes the file.
#[derive(Debug)]
pub(crate) struct ListeningSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl ListeningSocket {
    /// Listens at `path`. A socket file that nobody listens on, left by a process that died, is replaced.
    pub(crate) fn bind(path: &Path) -> io::Result<Self> {
        let listener = match UnixListener::bind(path) {
            Err(error) if error.kind() == ErrorKind::AddrInUse && is_abandoned(path) => {
                std::fs::remove_file(path)?;
                UnixListener::bind(path)?
            }
            result => result?,
        };
        Ok(ListeningSocket { listener, path: path.to_owned() })
    }

    /// The listening end, for a device.
    pub(crate) fn listener(&self) -> io::Result<UnixListener> {
        self.listener.try_clone()
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

fn is_abandoned(path: &Path) -> bool {
    // Connecting to a plain file is refused as well.
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket());
    is_socket && UnixStream::connect(path).is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused)
}

impl Drop for ListeningSocket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_socket_left_behind_is_replaced_and_one_in_use_is_not() {
        let path = std::env::temp_dir().join(format!("polder-listening-socket-{}", std::process::id()));
        drop(UnixListener::bind(&path).unwrap());
        let first = ListeningSocket::bind(&path).unwrap();
        assert_eq!(ListeningSocket::bind(&path).unwrap_err().kind(), ErrorKind::AddrInUse);
        drop(first);
        assert!(!path.exists());
    }

    #[test]
    fn a_file_that_is_no_socket_is_left_alone() {
        let path = std::env::temp_dir().join(format!("polder-listening-file-{}", std::process::id()));
        std::fs::write(&path, "precious").unwrap();
        assert!(ListeningSocket::bind(&path).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
        std::fs::remove_file(&path).unwrap();
    }
}
