//! A stock kernel packed with gzip: Linux can be built so, but Debian packs none of its kernels that way.

use super::kernel::Kernel;
use crate::command::step;
use anyhow::{Context, Result, bail};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

/// Offsets in a bzImage (Linux, Documentation/arch/x86/boot.rst).
const SETUP_SECTORS: usize = 0x1f1;
const PROTECTED_PARAGRAPHS: usize = 0x1f4;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LEN: usize = 0x24c;
/// The build appends the unpacked size to what xz and zstd made; gzip ends with it anyway.
const APPENDED_LEN: usize = 4;

/// Makes a folder with that kernel packed with gzip, and its initramfs.
pub fn gzip(kernel: &Kernel) -> Result<()> {
    let folder = crate::project::guests().join("generic-gzip");
    let stamp = folder.join("version");
    if std::fs::read_to_string(&stamp).is_ok_and(|release| release == kernel.release) {
        return Ok(());
    }
    step(&format!("gzip the kernel {}", kernel.release));
    let _ = std::fs::remove_dir_all(&folder);
    std::fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let image = std::fs::read(kernel.folder.join("vmlinuz"))?;
    let (before, payload, after) = parts(&image).context("the kernel is no bzImage with a payload")?;
    let elf = unpacked(payload)?;
    if !elf.starts_with(b"\x7fELF") {
        bail!("what the kernel {} holds is no ELF file", kernel.release);
    }
    let packed = piped(Command::new("gzip").args(["--no-name", "--best"]), &elf)?;
    std::fs::write(folder.join("vmlinuz"), image_of(before, &packed, after))?;
    std::os::unix::fs::symlink(
        Path::new("..").join(file_name(kernel)?).join("initramfs.cpio"),
        folder.join("initramfs.cpio"),
    )?;
    std::fs::write(stamp, &kernel.release)?;
    Ok(())
}

fn file_name(kernel: &Kernel) -> Result<&Path> {
    kernel.folder.file_name().map(Path::new).context("a kernel has a folder")
}

fn word(bytes: &[u8], at: usize) -> Option<usize> {
    let word = bytes.get(at..at + 4)?;
    Some(u32::from_le_bytes(word.try_into().ok()?) as usize)
}

/// What is before the payload, the payload, and what is behind it.
fn parts(image: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let start = 512 * (usize::from(*image.get(SETUP_SECTORS)?) + 1) + word(image, PAYLOAD_OFFSET)?;
    let end = start + word(image, PAYLOAD_LEN)?;
    Some((image.get(..start)?, image.get(start..end)?, image.get(end..)?))
}

/// The image with another payload, and a header that says so. The unpacker in it is still the one for the payload before: such a kernel
/// boots only where the host unpacks it.
fn image_of(before: &[u8], payload: &[u8], after: &[u8]) -> Vec<u8> {
    let mut image = [before, payload, after].concat();
    let protected = 512 * (usize::from(before[SETUP_SECTORS]) + 1);
    image.resize(protected + (image.len() - protected).next_multiple_of(16), 0);
    let paragraphs = (image.len() - protected) / 16;
    for (at, value) in [(PROTECTED_PARAGRAPHS, paragraphs), (PAYLOAD_LEN, payload.len())] {
        image[at..at + 4].copy_from_slice(&(value as u32).to_le_bytes());
    }
    image
}

/// The kernel's ELF file.
fn unpacked(payload: &[u8]) -> Result<Vec<u8>> {
    let program = match payload {
        [0xfd, b'7', b'z', b'X', ..] => "xz",
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "zstd",
        _ => bail!("the kernel is packed in a way that neither xz nor zstd unpacks"),
    };
    let file = &payload[..payload.len() - APPENDED_LEN];
    piped(Command::new(program).args(["--decompress", "--stdout"]), file)
}

/// What a program writes when it reads `input`.
fn piped(command: &mut Command, input: &[u8]) -> Result<Vec<u8>> {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("cannot start the packer")?;
    let mut to = child.stdin.take().context("it was given a pipe")?;
    let output = std::thread::scope(|scope| {
        // A program that fails has said why; what it did not read is not missed.
        scope.spawn(move || drop(to.write_all(input)));
        child.wait_with_output()
    })?;
    if !output.status.success() {
        bail!("{command:?} failed ({})", output.status);
    }
    Ok(output.stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_payload_lies_where_the_header_says() {
        let mut image = vec![0; 512 * 3 + 100];
        image[SETUP_SECTORS] = 2;
        image[PAYLOAD_OFFSET] = 20;
        image[PAYLOAD_LEN] = 30;
        image[512 * 3 + 20..][..30].fill(7);
        image[512 * 3 + 50..].fill(9);
        let (before, payload, after) = parts(&image).unwrap();
        assert_eq!((payload, after), (&[7; 30][..], &[9; 50][..]));
        let other = image_of(before, &[8; 45], after);
        let (again, payload, after) = parts(&other).unwrap();
        assert_eq!((again.len(), payload), (before.len(), &[8; 45][..]));
        assert_eq!((&after[..50], after.len()), (&[9; 50][..], 63));
        assert_eq!(word(&other, PROTECTED_PARAGRAPHS), Some(8));
    }
}
