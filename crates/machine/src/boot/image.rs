//! What kind of kernel a file is. Decided by its contents alone, before anything is written to memory.

use super::bytes::{array, u16_at, u32_at};
use super::{BootError, multiboot};

/// The kinds of files that can be booted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KernelKind {
    /// A Linux kernel as distributions install it (Linux boot protocol 2.08 or later, 64-bit).
    BzImage,
    /// A 64-bit ELF file: an unpacked Linux kernel, or another one with a PVH note.
    Elf64,
    /// A file with a multiboot 1 header, ELF or flat.
    Multiboot,
    /// A 32-bit ELF file, which must have a PVH note.
    Elf32,
}

const ELF_MAGIC: [u8; 4] = *b"\x7fELF";
const MACHINE_386: u16 = 3;
const MACHINE_X86_64: u16 = 62;
/// Offsets in a bzImage (Linux, Documentation/arch/x86/boot.rst).
pub(super) const BOOT_FLAG: usize = 0x1fe;
pub(super) const HEADER_MAGIC: usize = 0x202;

/// Looks at a kernel file.
pub fn identify(file: &[u8]) -> Result<KernelKind, BootError> {
    if file.is_empty() {
        return Err(BootError::KernelEmpty);
    }
    if u16_at(file, BOOT_FLAG) == Some(0xaa55) && array(file, HEADER_MAGIC) == Some(*b"HdrS") {
        return Ok(KernelKind::BzImage);
    }
    if array(file, 0) == Some(ELF_MAGIC) {
        return identify_elf(file);
    }
    if multiboot::find_header(file).is_some() {
        return Ok(KernelKind::Multiboot);
    }
    Err(BootError::UnknownKernel { what: describe(file) })
}

fn identify_elf(file: &[u8]) -> Result<KernelKind, BootError> {
    let truncated = BootError::BadElf { what: "its header is incomplete" };
    let [class, data] = array(file, 4).ok_or(truncated)?;
    if data != 1 {
        return Err(BootError::ForeignKernel { what: "a big-endian machine".to_owned() });
    }
    let machine = u16_at(file, 18).ok_or(BootError::BadElf { what: "its header is incomplete" })?;
    match (class, machine) {
        (1, MACHINE_386) | (2, MACHINE_X86_64) if multiboot::find_header(file).is_some() => Ok(KernelKind::Multiboot),
        (1, MACHINE_386) => Ok(KernelKind::Elf32),
        (2, MACHINE_X86_64) => Ok(KernelKind::Elf64),
        (_, 183) => Err(BootError::ForeignKernel { what: "64-bit Arm".to_owned() }),
        (_, 40) => Err(BootError::ForeignKernel { what: "32-bit Arm".to_owned() }),
        (_, 243) => Err(BootError::ForeignKernel { what: "RISC-V".to_owned() }),
        (_, 8) => Err(BootError::ForeignKernel { what: "MIPS".to_owned() }),
        _ => Err(BootError::ForeignKernel { what: format!("ELF machine number {machine}, class {class}") }),
    }
}

/// What an unbootable file looks like, for the error.
fn describe(file: &[u8]) -> &'static str {
    match file {
        [0x1f, 0x8b, ..] => "it is a gzip file (an initrd, or a kernel packed once more)",
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "it is a zstd file (an initrd, or a kernel packed once more)",
        [0xfd, b'7', b'z', b'X', b'Z', ..] => "it is an xz file (an initrd, or a kernel packed once more)",
        [b'0', b'7', b'0', b'7', b'0', ..] => "it is a cpio archive, which is what an initrd is",
        [b'!', b'<', b'a', b'r', b'c', b'h', b'>', ..] => "it is a package or an archive",
        [b'Q', b'F', b'I', 0xfb, ..] => "it is a qcow2 disk image",
        [b'#', b'!', ..] => "it is a script",
        [b'M', b'Z', ..] if u32_at(file, 56) == Some(0x644d_5241) => "it is a kernel for 64-bit Arm",
        [b'M', b'Z', ..] => "it is an EFI program without a Linux boot header",
        _ if u16_at(file, BOOT_FLAG) == Some(0xaa55) => "it is a boot sector or a disk image",
        _ => "it is neither a bzImage nor an x86 ELF file nor a multiboot image",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_files_are_refused_with_what_they_are() {
        assert!(matches!(identify(&[]), Err(BootError::KernelEmpty)));
        let message = |file: &[u8]| identify(file).unwrap_err().to_string();
        assert!(message(b"\x1f\x8b\x08rest").contains("gzip"));
        assert!(message(b"070701rest").contains("initrd"));
        assert!(message(b"hello").contains("neither"));
        assert!(message(b"\x7fELF").contains("incomplete"));
        let mut arm = vec![0; 64];
        arm[..6].copy_from_slice(b"\x7fELF\x02\x01");
        arm[18] = 183;
        assert!(message(&arm).contains("Arm"));
        let mut sector = vec![0; 512];
        sector[BOOT_FLAG] = 0x55;
        sector[BOOT_FLAG + 1] = 0xaa;
        assert!(message(&sector).contains("disk"));
    }
}
