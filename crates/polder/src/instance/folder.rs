//! Where an instance's files lie.
//!
//! Socket paths have room for 107 bytes and state folders can lie deep, so sockets are reached through a descriptor of their
//! folder: `/proc/self/fd/N/console` is short whatever the folder is called.

use std::io::ErrorKind;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::fs::{Mode, OFlags};

use crate::state_folder::StateFolder;

/// The folder of one instance, held open.
pub struct InstanceFolder {
    path: PathBuf,
    descriptor: OwnedFd,
}

impl InstanceFolder {
    /// Makes the folder of a new instance. A folder without a row is what a crash left; it is emptied.
    pub fn make(state: &StateFolder, name: &str) -> Result<Self> {
        Self::remove(state, name)?;
        let path = Self::locate(state, name);
        // A guest's disk and console are nobody else's business.
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&path)
            .with_context(|| format!("cannot make the instance's folder {}", path.display()))?;
        Self::open(state, name)
    }

    /// Opens the folder of an instance that is there.
    pub fn open(state: &StateFolder, name: &str) -> Result<Self> {
        let path = Self::locate(state, name);
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let descriptor = rustix::fs::open(&path, flags, Mode::empty())
            .with_context(|| format!("cannot reach the instance's folder {}", path.display()))?;
        Ok(InstanceFolder { path, descriptor })
    }

    /// Removes the folder of an instance, if it is there.
    pub fn remove(state: &StateFolder, name: &str) -> Result<()> {
        let path = Self::locate(state, name);
        match std::fs::remove_dir_all(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(error).with_context(|| format!("cannot remove the instance's folder {}", path.display()))
            }
            _ => Ok(()),
        }
    }

    fn locate(state: &StateFolder, name: &str) -> PathBuf {
        state.path().join("instances").join(name)
    }

    fn socket(&self, name: &str) -> PathBuf {
        Path::new("/proc/self/fd").join(self.descriptor.as_raw_fd().to_string()).join(name)
    }

    /// What the machine's process has to say.
    pub fn log(&self) -> PathBuf {
        self.path.join("log")
    }

    /// The console's last output, written when the machine ends.
    pub fn console_log(&self) -> PathBuf {
        self.path.join("console.log")
    }

    /// The console's socket.
    pub fn console_socket(&self) -> PathBuf {
        self.socket("console")
    }

    /// The socket for orders to the machine's process.
    pub fn control_socket(&self) -> PathBuf {
        self.socket("control")
    }

    /// The machine's vsock socket.
    pub fn vsock_socket(&self) -> PathBuf {
        self.socket("vsock")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::{UnixListener, UnixStream};

    #[test]
    fn only_its_owner_enters_a_folder_and_sockets_work_however_deep_it_lies() {
        let top = std::env::temp_dir().join(format!("polder-folder-{}", std::process::id()));
        let deep = top.join("d".repeat(100)).join("e".repeat(100));
        std::fs::create_dir_all(&deep).unwrap();
        let state = StateFolder::at(deep.clone());
        let folder = InstanceFolder::make(&state, "web").unwrap();
        let mode = std::fs::metadata(deep.join("instances/web")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
        let _listener = UnixListener::bind(folder.console_socket()).unwrap();
        UnixStream::connect(InstanceFolder::open(&state, "web").unwrap().console_socket()).unwrap();
        InstanceFolder::remove(&state, "web").unwrap();
        InstanceFolder::remove(&state, "web").unwrap();
        std::fs::remove_dir_all(top).unwrap();
    }
}
