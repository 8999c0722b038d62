//! What to try when something went wrong, for errors that people can do something about.

use std::io::ErrorKind;

use polder_machine::boot::BootError;
use polder_memory::MemoryError;
use polder_store::StoreError;
use polder_store::remote::RemoteError;
use polder_vmm::VmmError;

/// A hint for an error, from whatever cause in its chain has one.
pub fn hint(error: &anyhow::Error) -> Option<&'static str> {
    error.chain().find_map(|cause| {
        let boot = cause.downcast_ref().and_then(boot_hint);
        let memory = cause.downcast_ref().and_then(memory_hint);
        let remote = match cause.downcast_ref() {
            Some(StoreError::Remote(error)) => remote_hint(error),
            _ => cause.downcast_ref().and_then(remote_hint),
        };
        boot.or(memory).or(remote).or_else(|| cause.downcast_ref().and_then(vmm_hint))
    })
}

fn vmm_hint(error: &VmmError) -> Option<&'static str> {
    match error {
        VmmError::NoKvmEngine => Some("use --engine software, or --engine auto, which takes it"),
        VmmError::Open { source, .. } => match source.kind() {
            ErrorKind::NotFound => Some("check the path"),
            ErrorKind::PermissionDenied => {
                Some("check who may read it (a disk that the guest only reads can end with ,ro)")
            }
            ErrorKind::ReadOnlyFilesystem => Some("the guest may read a disk that it cannot write if it ends with ,ro"),
            _ => None,
        },
        VmmError::Disk { .. } => Some("a disk is a raw image; `truncate -s 1G FILE` makes an empty one"),
        VmmError::Net(_) => Some("`ip tuntap add NAME mode tap user $USER` makes an interface for you (as root)"),
        VmmError::Vsock { source, .. } if source.kind() == ErrorKind::AddrInUse => {
            Some("another machine may use the socket; if none does, remove the file")
        }
        VmmError::Gdb { source, .. } if source.kind() == ErrorKind::AddrInUse => {
            Some("something else is there already: choose another port, or remove the file if nothing uses it")
        }
        VmmError::Host { .. } => Some("see what limits processes and open files here: ulimit -a"),
        VmmError::VcpuDied { .. } => Some("please report it, with the lines above"),
        _ => None,
    }
}

fn boot_hint(error: &BootError) -> Option<&'static str> {
    match error {
        BootError::UnknownKernel { .. } | BootError::ForeignKernel { .. } | BootError::KernelEmpty => {
            Some("give a Linux kernel for x86-64, such as Debian's /boot/vmlinuz-*")
        }
        BootError::BadBzImage { .. } | BootError::BadPayload { .. } | BootError::BadElf { .. } => {
            Some("copy the kernel file again and compare the sizes")
        }
        BootError::NoRoomForKernel { .. } | BootError::NoRoomForInitrd { .. } => {
            Some("give the machine more with --memory")
        }
        BootError::UnknownCompression { .. } => Some("build the kernel with gzip, xz, lz4 or zstd"),
        BootError::OldBzImage { .. } => Some("take a kernel from 2008 (2.6.26) or later"),
        BootError::InitrdTruncated => Some("the file shrank while it was read: wait until it is written"),
        BootError::CommandLineTooLong { .. } => Some("shorten --append"),
        _ => None,
    }
}

fn memory_hint(error: &MemoryError) -> Option<&'static str> {
    match error {
        MemoryError::Host { .. } => Some("give the machine less with --memory; `polder doctor` says what is free"),
        _ => None,
    }
}

fn remote_hint(error: &RemoteError) -> Option<&'static str> {
    match error {
        RemoteError::NoCredentials { .. } => Some("set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        RemoteError::Credentials { .. } => {
            Some("compare AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY with the server's, and the clocks of both")
        }
        RemoteError::NoBucket { .. } => Some("make the bucket first, or check --endpoint and AWS_ENDPOINT_URL"),
        RemoteError::Region { .. } => Some("name the server's region with --region or AWS_REGION"),
        RemoteError::Gone { .. } => Some("check --endpoint and AWS_ENDPOINT_URL, and that the server runs"),
        RemoteError::NoImage { .. } => Some("`polder store remote ls` lists what is there"),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_disk_lacks_because_of_a_remote_store_gives_a_hint() {
        let error = RemoteError::NoCredentials { url: "s3://images".to_owned() };
        assert!(hint(&anyhow::Error::new(error.clone())).unwrap().contains("AWS_ACCESS_KEY_ID"));
        let error = VmmError::Volume { name: "data".to_owned(), source: StoreError::Remote(error) };
        assert!(hint(&anyhow::Error::new(error)).unwrap().contains("AWS_ACCESS_KEY_ID"));
    }

    #[test]
    fn the_cause_deep_in_a_chain_gives_the_hint() {
        let error = VmmError::Boot { path: "vmlinuz".into(), source: BootError::KernelEmpty };
        let error = anyhow::Error::new(error);
        assert!(hint(&error).unwrap().contains("vmlinuz"));
        assert_eq!(format!("{error:#}"), "the kernel vmlinuz cannot be started: the kernel file is empty");
        assert_eq!(hint(&anyhow::anyhow!("something else")), None);
    }
}
