//! Image formats: what `polder image import` and `export` read and write.
//!
//! A [`Source`] is a virtual disk that lies in some format, a [`Target`] one that is being written; [`copy()`] brings one into
//! the other. Everything here is plain and blocking: import and export are batch work on threads of their own.
//!
//! What always holds:
//! - The format is named by the caller. A guest may have written any byte of a raw disk, so its content decides nothing;
//!   [`looks_like`] exists for hints only.
//! - A name inside an image never makes us open a file unless the caller allowed it.
//! - No content makes a reader panic, hang or grow beyond the bounds that its module names.
//!
//! Modules: `copy`, `detect` (what a file looks like), `error`, `raw`, `qcow2`; `import` and `folder` (archives and folders that
//! become disks), `tar`, `ext4`; `qemu_img` (formats of others), `vmdk` (what their descriptors name); `testbench` (bodies of fuzz targets).

mod copy;
mod detect;
mod error;
pub mod ext4;
mod folder;
#[cfg(test)]
mod foreign_tests;
mod import;
#[cfg(test)]
mod import_tests;
pub mod qcow2;
mod qemu_img;
mod raw;
mod tar;
#[cfg(test)]
mod test_folder;
#[cfg(any(test, feature = "testbench"))]
pub mod testbench;
mod vmdk;

pub use copy::{COPY_CHUNK_LEN, copy};
pub use detect::looks_like;
pub use error::FormatError;
pub use folder::{FOLDER_DEPTH_MAX, folder_to_ext4};
pub use import::{Imported, Packing, tar_stream_to_ext4, tar_to_ext4};
pub use qemu_img::QemuImg;
pub use raw::{RawSource, RawTarget};
pub use tar::{EXTENDED_LEN_MAX, GLOBAL_LEN_MAX};
pub use vmdk::{DESCRIPTOR_LEN_MAX, Vmdk, look_at_vmdk};

/// The largest virtual disk that is read or written, in bytes: 64 TiB.
pub const VIRTUAL_LEN_MAX: u64 = 64 << 40;

/// Threads that read for one copy, at most.
pub const COPY_THREADS_MAX: usize = 16;

/// The formats, as users name them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// The bytes of the disk and nothing else.
    Raw,
    /// QEMU's copy-on-write format, versions 2 and 3.
    Qcow2,
    /// VMware's disks.
    Vmdk,
    /// Hyper-V's disks since 2012.
    Vhdx,
    /// VirtualBox's disks.
    Vdi,
    /// Virtual PC's disks (`.vhd`), as `qemu-img` names them.
    Vpc,
}

impl Format {
    /// All of them.
    pub const ALL: [Format; 6] = [Format::Raw, Format::Qcow2, Format::Vmdk, Format::Vhdx, Format::Vdi, Format::Vpc];

    /// The name on the command line and in `qemu-img`.
    pub fn name(self) -> &'static str {
        match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
            Format::Vmdk => "vmdk",
            Format::Vhdx => "vhdx",
            Format::Vdi => "vdi",
            Format::Vpc => "vpc",
        }
    }
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let known = Format::ALL.into_iter().find(|format| format.name() == text);
        known.ok_or_else(|| {
            let names: Vec<&str> = Format::ALL.iter().map(|format| format.name()).collect();
            format!("the formats are {}", names.join(", "))
        })
    }
}

/// What a range of a disk holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Bytes that have to be read.
    Data,
    /// It reads as zeros, and nothing has to be read to know it.
    Zeros,
}

/// A range that starts where [`Source::extent_at`] was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Bytes, at least one; never beyond the limit or the end of the disk.
    pub len: u64,
    /// What all of them are.
    pub content: Content,
}

/// A virtual disk to read.
///
/// Several threads may call every method of one source at the same time. All calls block.
pub trait Source: Send + Sync {
    /// Bytes of the virtual disk.
    fn len(&self) -> u64;

    /// Whether the disk has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Fills `bytes` from the disk at `offset`. `offset + bytes.len()` is at most [`Source::len`].
    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> Result<(), FormatError>;

    /// What lies at `offset`, which is below [`Source::len`], and how far that goes. Nothing beyond `limit` bytes, at least one,
    /// is looked at. A neighbour may be of the same kind: long ranges may come in pieces. `Data` may hold zeros.
    fn extent_at(&self, offset: u64, limit: u64) -> Result<Extent, FormatError>;
}

/// A virtual disk to write. What is never written reads as zeros.
///
/// One thread calls, and all calls block. Ranges lie inside the disk. A target that takes ranges in ascending order only says so.
pub trait Target: Send {
    /// Bytes of the virtual disk.
    fn len(&self) -> u64;

    /// Whether the disk has no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The unit in which zeros can be left out: shorter or unaligned ranges of them are as good as data.
    fn granule(&self) -> usize;

    /// Writes bytes at `offset`.
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> Result<(), FormatError>;

    /// Makes a range read as zeros, and takes no room for it where the format can.
    fn zero(&mut self, offset: u64, len: u64) -> Result<(), FormatError>;

    /// Writes what is still held back and flushes to the host's disk. Called once, last; without it the image is not whole.
    fn finish(&mut self) -> Result<(), FormatError>;
}

/// Whether all bytes are zeros.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    // Without an early exit inside a piece the compiler uses vector instructions.
    bytes.chunks(1024).all(|piece| piece.iter().fold(0, |all, byte| all | byte) == 0)
}
