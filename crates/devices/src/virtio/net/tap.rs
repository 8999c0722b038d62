//! A TAP interface of the host as a network backend.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use super::{NetBackend, Offloads};

/// The interface cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// Linux allows 1 to 15 bytes.
    #[error("`{name}` is no name of a network interface: 1 to 15 characters without `/` or spaces")]
    Name { name: String },
    /// The host has no TUN driver, or we may not use it.
    #[error("/dev/net/tun cannot be opened")]
    Device(#[source] io::Error),
    /// The interface does not exist and may not be made, is no TAP interface, or is in use.
    #[error("the TAP interface `{name}` cannot be attached")]
    Attach {
        name: String,
        #[source]
        source: io::Error,
    },
}

/// An attached TAP interface. Frames carry the 12-byte virtio header on the host's side too.
pub struct Tap {
    file: OwnedFd,
}

// The layout of `struct ifreq` that TUNSETIFF reads: name and flags, in a union of 24 bytes.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; libc::IFNAMSIZ],
    flags: libc::c_short,
    padding: [u8; 22],
}

impl Tap {
    /// Attaches to the interface, which is made if it does not exist and we may.
    pub fn open(name: &str) -> Result<Self, TapError> {
        let bytes = name.as_bytes();
        let printable = bytes.iter().all(|byte| byte.is_ascii_graphic() && *byte != b'/' && *byte != b'%');
        if bytes.is_empty() || bytes.len() >= libc::IFNAMSIZ || !printable {
            return Err(TapError::Name { name: name.to_owned() });
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK)
            .open("/dev/net/tun")
            .map_err(TapError::Device)?;
        let attach = |source| TapError::Attach { name: name.to_owned(), source };
        let mut request = InterfaceRequest {
            name: [0; libc::IFNAMSIZ],
            flags: (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short,
            padding: [0; 22],
        };
        request.name[..bytes.len()].copy_from_slice(bytes);
        // SAFETY: TUNSETIFF reads and writes one ifreq, which the request is laid out as and as long as.
        if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) } < 0 {
            return Err(attach(io::Error::last_os_error()));
        }
        let header_len: libc::c_int = super::HEADER_LEN as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads one int.
        if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const header_len) } < 0 {
            return Err(attach(io::Error::last_os_error()));
        }
        Ok(Tap { file: file.into() })
    }
}

impl NetBackend for Tap {
    fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    fn offloads(&self) -> Offloads {
        Offloads { checksum: true, tcp4: true, tcp6: true, ecn: true }
    }

    fn set_offloads(&self, guest: Offloads) -> io::Result<()> {
        let mut flags = 0;
        for (wanted, flag) in [
            (guest.checksum, libc::TUN_F_CSUM),
            (guest.tcp4, libc::TUN_F_TSO4),
            (guest.tcp6, libc::TUN_F_TSO6),
            (guest.ecn, libc::TUN_F_TSO_ECN),
        ] {
            if wanted {
                flags |= flag;
            }
        }
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        if unsafe { libc::ioctl(self.file.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(flags)) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impossible_names_are_refused_before_the_host_is_asked() {
        for name in ["", "sixteen-bytes-ab", "a/b", "a b", "tap%d", "näh"] {
            assert!(matches!(Tap::open(name), Err(TapError::Name { .. })), "{name}");
        }
    }

    /// Needs the right to make interfaces (root in most places); without it there is nothing to show.
    #[test]
    fn a_new_interface_takes_offloads_and_is_in_use_once() {
        let name = format!("plt{}", std::process::id());
        let tap = match Tap::open(&name) {
            Ok(tap) => tap,
            Err(TapError::Device(error)) => return println!("skipped: /dev/net/tun: {error}"),
            Err(TapError::Attach { source, .. }) if source.kind() == io::ErrorKind::PermissionDenied => {
                return println!("skipped: {source}");
            }
            Err(error) => panic!("{error}"),
        };
        for offloads in [Offloads::default(), tap.offloads(), Offloads { checksum: true, ..Offloads::default() }] {
            tap.set_offloads(offloads).unwrap();
        }
        assert!(matches!(Tap::open(&name), Err(TapError::Attach { .. })));
        // The interface is down: nothing to read, and a frame is refused rather than waited for.
        let mut frame = [0; 64];
        assert_eq!(rustix::io::read(tap.file(), &mut frame), Err(rustix::io::Errno::AGAIN));
        assert_eq!(rustix::io::write(tap.file(), &frame), Err(rustix::io::Errno::IO));
        drop(tap);
        drop(Tap::open(&name).unwrap());
    }
}
