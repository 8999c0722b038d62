//! The private copy of an image's disk.
//!
//! A file system with reflinks (btrfs, XFS) shares the blocks until they are written; others get a copy of the parts that hold
//! data. Either way the copy is as large as the image's disk and its holes stay holes.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use polder_basics::ByteSize;
use rustix::fs::{SeekFrom, copy_file_range, fstatvfs, ioctl_ficlone, seek};
use rustix::io::Errno;

/// Bytes copied at a time.
const STEP_LEN: usize = 16 << 20;
/// Room that is left on the file system at least.
const RESERVE_BYTES: u64 = 64 << 20;

/// Copies the disk at `source` to `target`, which must not exist.
pub fn copy(source: &Path, target: &Path) -> Result<()> {
    let from = File::open(source).with_context(|| format!("cannot read the image's disk {}", source.display()))?;
    let to = File::options().write(true).create_new(true).open(target);
    let to = to.with_context(|| format!("cannot make the instance's disk {}", target.display()))?;
    if ioctl_ficlone(&to, &from).is_ok() {
        return Ok(());
    }
    let metadata = from.metadata().with_context(|| format!("cannot read the image's disk {}", source.display()))?;
    check_room(&to, metadata.blocks() * 512, target)?;
    copy_data(&from, &to, metadata.len()).map_err(|error| match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => no_room(metadata.blocks() * 512, target),
        _ => anyhow!(error).context(format!("cannot copy the image's disk to {}", target.display())),
    })
}

fn no_room(needed_bytes: u64, target: &Path) -> anyhow::Error {
    anyhow!(
        "there is no room for the instance's disk {}: it needs up to {} (remove instances with `polder rm`, or set POLDER_HOME to a folder on a larger disk)",
        target.display(),
        ByteSize(needed_bytes.next_multiple_of(1 << 20)),
    )
}

/// Refuses a copy that cannot fit before it fills the host's disk.
fn check_room(to: &File, needed_bytes: u64, target: &Path) -> Result<()> {
    let Ok(system) = fstatvfs(to) else { return Ok(()) };
    let available = system.f_bavail.saturating_mul(system.f_frsize);
    if available < needed_bytes.saturating_add(RESERVE_BYTES) {
        bail!(no_room(needed_bytes, target));
    }
    Ok(())
}

/// Copies what is data and leaves holes.
fn copy_data(from: &File, to: &File, len: u64) -> io::Result<()> {
    to.set_len(len)?;
    let mut position = 0;
    while position < len {
        let start = match seek(from, SeekFrom::Data(position)) {
            Ok(start) => start,
            // Nothing but a hole is left.
            Err(Errno::NXIO) => break,
            // A file system that knows no holes has nothing but data.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => position,
            Err(error) => return Err(error.into()),
        };
        let end = seek(from, SeekFrom::Hole(start)).unwrap_or(len).min(len);
        copy_range(from, to, start, end)?;
        position = end.max(start + 1);
    }
    Ok(())
}

fn copy_range(from: &File, to: &File, start: u64, end: u64) -> io::Result<()> {
    let (mut read_at, mut write_at) = (start, start);
    while read_at < end {
        let step = usize::try_from(end - read_at).unwrap_or(STEP_LEN).min(STEP_LEN);
        match copy_file_range(from, Some(&mut read_at), to, Some(&mut write_at), step) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(_) | Err(Errno::INTR) => {}
            Err(Errno::XDEV | Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS) => {
                return copy_by_hand(from, to, read_at, end);
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn copy_by_hand(from: &File, to: &File, mut position: u64, end: u64) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    let mut bytes = vec![0; 1 << 20];
    while position < end {
        let step = usize::try_from(end - position).unwrap_or(bytes.len()).min(bytes.len());
        let len = from.read_at(&mut bytes[..step], position)?;
        if len == 0 {
            return Err(ErrorKind::UnexpectedEof.into());
        }
        to.write_all_at(&bytes[..len], position)?;
        position += len as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;
    use std::path::PathBuf;

    fn paths(name: &str) -> (PathBuf, PathBuf) {
        let base = std::env::temp_dir().join(format!("polder-disk-{name}-{}", std::process::id()));
        let (source, target) = (base.with_extension("source"), base.with_extension("target"));
        let _ = std::fs::remove_file(&target);
        (source, target)
    }

    #[test]
    fn a_sparse_disk_is_copied_with_its_data_and_its_holes() {
        let (source, target) = paths("sparse");
        let disk = File::create(&source).unwrap();
        disk.set_len(64 << 20).unwrap();
        for offset in [0, 5 << 20, (64 << 20) - 4096] {
            disk.write_all_at(&[offset as u8 | 1; 4096], offset).unwrap();
        }
        copy(&source, &target).unwrap();
        assert!(std::fs::read(&source).unwrap() == std::fs::read(&target).unwrap());
        let blocks = std::fs::metadata(&target).unwrap().blocks();
        assert!(blocks * 512 < 8 << 20, "{blocks} blocks");
        for path in [source, target] {
            std::fs::remove_file(path).unwrap();
        }
    }

    #[test]
    fn copying_by_hand_gives_the_same_bytes() {
        let (source, target) = paths("hand");
        let bytes: Vec<u8> = (0..3_000_000u32).map(|index| (index % 251) as u8).collect();
        std::fs::write(&source, &bytes).unwrap();
        let to = File::create(&target).unwrap();
        copy_by_hand(&File::open(&source).unwrap(), &to, 0, bytes.len() as u64).unwrap();
        assert!(std::fs::read(&target).unwrap() == bytes);
        for path in [source, target] {
            std::fs::remove_file(path).unwrap();
        }
    }

    #[test]
    fn a_disk_that_cannot_fit_is_refused_with_a_hint() {
        let (source, target) = paths("full");
        std::fs::write(&source, "x").unwrap();
        let error = check_room(&File::create(&target).unwrap(), u64::MAX / 2, &target).unwrap_err().to_string();
        assert!(error.contains("no room") && error.contains("polder rm"), "{error}");
        for path in [source, target] {
            std::fs::remove_file(path).unwrap();
        }
    }

    #[test]
    fn a_missing_image_disk_is_named() {
        let (source, target) = paths("missing");
        let error = format!("{:#}", copy(&source.with_extension("nowhere"), &target).unwrap_err());
        assert!(error.contains("nowhere"), "{error}");
    }
}
