//! Kernels into memory: which kind a file is, where its parts go, and the registers of vCPU 0 at its first instruction.
//!
//! [`load`] does it all. A kernel file, an initrd and a command line are hostile: every offset is checked, everything unpacked is
//! bounded by [`KERNEL_LEN_MAX`], and what cannot work is an error in one sentence.
//!
//! Modules: `image` (what is this file), `decompress` (a bzImage's payload), `elf` (segments and notes), `linux64` (the 64-bit
//! Linux protocol), `pvh` and `multiboot` (32-bit entries), `entry` (GDT, page tables and registers), `place` (initrd and command line).

mod bytes;
mod decompress;
mod elf;
mod entry;
mod error;
mod image;
mod linux64;
mod multiboot;
mod place;
mod pvh;

use polder_basics::ByteSize;
use polder_memory::GuestMemory;

use crate::VcpuState;
pub use decompress::KERNEL_LEN_MAX;
pub use error::BootError;
pub use image::{KernelKind, identify};
pub use place::Initrd;

/// What a machine boots.
pub struct Boot<'a> {
    /// The kernel file's bytes.
    pub kernel: &'a [u8],
    /// The kernel file's name: multiboot kernels find it before their command line.
    pub kernel_name: &'a str,
    pub initrd: Option<Initrd<'a>>,
    pub command_line: &'a str,
    /// The ACPI root pointer's address.
    pub rsdp: u64,
}

/// Puts a kernel and everything it needs into memory and returns the state in which vCPU 0 starts. Nothing is written to memory
/// if the file is not a kernel.
pub fn load(memory: &GuestMemory, boot: Boot<'_>) -> Result<VcpuState, BootError> {
    if boot.kernel.len() as u64 > KERNEL_LEN_MAX {
        return Err(BootError::KernelTooLarge { max: ByteSize(KERNEL_LEN_MAX) });
    }
    let kind = identify(boot.kernel)?;
    if boot.command_line.contains('\0') {
        return Err(BootError::CommandLineNul);
    }
    match kind {
        KernelKind::BzImage => linux64::load_bzimage(memory, boot),
        KernelKind::Elf64 | KernelKind::Elf32 => {
            let elf = elf::Elf::parse(boot.kernel)?;
            match (elf.pvh_entry(), kind) {
                (Some(entry), _) => pvh::load(memory, &elf, entry, boot),
                (None, KernelKind::Elf64) => linux64::load_vmlinux(memory, &elf, boot),
                (None, _) => Err(BootError::UnknownKernel {
                    what: "it is a 32-bit ELF file with neither a PVH note nor a multiboot header",
                }),
            }
        }
        KernelKind::Multiboot => multiboot::load(memory, boot),
    }
}

#[cfg(test)]
mod tests;
