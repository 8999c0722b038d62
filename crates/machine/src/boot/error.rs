//! Why a kernel cannot be started, each in one sentence.

use polder_basics::ByteSize;
use polder_memory::MemoryError;

/// The machine cannot be started with these files.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    #[error("the kernel file is empty")]
    KernelEmpty,
    #[error("the kernel file is larger than {max}")]
    KernelTooLarge { max: ByteSize },
    #[error("the kernel file is not one that polder can boot: {what}")]
    UnknownKernel { what: &'static str },
    #[error("the kernel is for {what}; polder's machine is x86-64")]
    ForeignKernel { what: String },
    #[error("the bzImage is truncated or damaged: {what}")]
    BadBzImage { what: &'static str },
    #[error("the bzImage speaks boot protocol {major}.{minor:02}; 2.08 or later is needed")]
    OldBzImage { major: u8, minor: u8 },
    #[error("the kernel's payload is compressed with {method}, which polder does not unpack")]
    UnknownCompression { method: &'static str },
    #[error("the kernel's {method} payload is truncated or damaged")]
    BadPayload {
        method: &'static str,
        #[source]
        source: std::io::Error,
    },
    #[error("the kernel's payload unpacks to more than {max}")]
    PayloadTooLarge { max: ByteSize },
    #[error("the ELF file is truncated or damaged: {what}")]
    BadElf { what: &'static str },
    #[error("the multiboot header is damaged: {what}")]
    BadMultiboot { what: &'static str },
    #[error("the kernel wants memory from {start:#x} to {end:#x}, and a machine with {ram} of memory has none there")]
    NoRoomForKernel { start: u64, end: u64, ram: ByteSize },
    #[error("the initrd of {initrd} does not fit beside the kernel in a machine with {ram} of memory")]
    NoRoomForInitrd { initrd: ByteSize, ram: ByteSize },
    #[error("the initrd file ended early")]
    InitrdTruncated,
    #[error("the initrd file cannot be read")]
    InitrdRead(#[source] std::io::Error),
    #[error("the command line has {len} bytes; this kernel takes at most {max}")]
    CommandLineTooLong { len: usize, max: usize },
    #[error("the command line holds a NUL byte")]
    CommandLineNul,
    #[error("the machine's memory has no room for the boot structures")]
    Memory(#[from] MemoryError),
}
