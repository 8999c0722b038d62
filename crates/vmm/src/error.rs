//! Why a machine could not be made or could not go on.

use std::io;
use std::path::PathBuf;

use polder_basics::ByteSize;
use polder_devices::pci::PciError;
use polder_devices::virtio::block::BlockError;
use polder_devices::virtio::net::TapError;
use polder_machine::boot::BootError;
use polder_machine::{BusError, EngineError};
use polder_memory::MemoryError;
use polder_software::CpuModelError;

/// A machine cannot be made, or cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    #[error("a machine has 1 to {max} vCPUs, not {asked}")]
    Cpus { asked: u32, max: u32 },
    #[error("a machine has {min} to {max} of memory in whole pages, not {asked}")]
    Ram { asked: ByteSize, min: ByteSize, max: ByteSize },
    #[error("a machine has at most {max} disks, not {asked}")]
    Disks { asked: usize, max: usize },
    #[error("a code cache has {min} to {max} in whole pages, not {asked}")]
    CodeCache { asked: ByteSize, min: ByteSize, max: ByteSize },
    #[error("the {what} {} cannot be opened", path.display())]
    Open {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the {what} {} is {kind}, not a file", path.display())]
    NotAFile { what: &'static str, path: PathBuf, kind: &'static str },
    #[error("the {what} {} cannot be read", path.display())]
    Read {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("the disk {name} cannot be used")]
    Disk {
        name: String,
        #[source]
        source: BlockError,
    },
    #[error("the volume {name} cannot be used")]
    Volume {
        name: String,
        #[source]
        source: polder_store::StoreError,
    },
    #[error("the profile of image {image} cannot be kept")]
    Profile {
        image: String,
        #[source]
        source: polder_store::remote::RemoteError,
    },
    #[error("the kernel {} cannot be started", path.display())]
    Boot {
        path: PathBuf,
        #[source]
        source: BootError,
    },
    #[error("the network card has no network")]
    Net(#[from] TapError),
    #[error("the vsock socket {} cannot be made", path.display())]
    Vsock {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("gdb cannot be served at {place}")]
    Gdb {
        place: crate::GdbPlace,
        #[source]
        source: io::Error,
    },
    #[error("the {engine} engine lets no debugger in")]
    NoDebugger { engine: String },
    #[error("the KVM engine is not built yet")]
    NoKvmEngine,
    #[error("the engine cannot run this machine")]
    Engine(#[from] EngineError),
    #[error("the CPU model cannot be had")]
    CpuModel(#[from] CpuModelError),
    #[error("the machine's memory cannot be made or filled")]
    Memory(#[from] MemoryError),
    #[error("two devices claim the same addresses")]
    Bus(#[from] BusError),
    #[error("a PCI device cannot be added")]
    Pci(#[from] PciError),
    #[error("the host gave no {what}")]
    Host {
        what: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("vCPU {index} ended unexpectedly: a bug in polder")]
    VcpuDied { index: usize },
}
