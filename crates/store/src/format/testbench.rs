//! Bodies of fuzz targets: what `fuzz/fuzz_targets` feeds with bytes, and what tests feed with damaged images.
//!
//! Each holds that no input makes a reader panic, hang or grow beyond its bounds.

use super::ext4::Ext4Options;
use super::qcow2::{OpenOptions, Qcow2};
use super::{Content, FormatError, Source, Target, tar_stream_to_ext4};
use rustix::fs::MemfdFlags;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

/// How much of each end of a disk is read, in bytes.
const READ_LEN: u64 = 4 << 20;
/// Extents that are asked for, at most.
const EXTENTS_MAX: u32 = 10_000;

/// Bytes as a file without a name; the path is good while the file is open.
fn memory_file(bytes: &[u8]) -> (File, PathBuf) {
    let file = rustix::fs::memfd_create("polder-testbench", MemfdFlags::CLOEXEC).expect("the host has memfd");
    let file = File::from(file);
    file.write_all_at(bytes, 0).expect("the host has memory");
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    (file, path)
}

/// Opens bytes as a qcow2 image and reads both ends of its disk.
pub fn read_qcow2(bytes: &[u8]) {
    let (_file, path) = memory_file(bytes);
    let Ok(image) = Qcow2::open(&path, &OpenOptions::default()) else { return };
    for snapshot in image.snapshots() {
        let options = OpenOptions { snapshot: Some(snapshot.name.clone()), ..OpenOptions::default() };
        if let Ok(image) = Qcow2::open(&path, &options) {
            read_both_ends(&image);
        }
    }
    read_both_ends(&image);
}

fn read_both_ends(image: &dyn Source) {
    let len = image.len();
    let mut at = 0;
    for _ in 0..EXTENTS_MAX {
        if at == len {
            break;
        }
        let Ok(extent) = image.extent_at(at, len - at) else { break };
        assert!(extent.len > 0 && at + extent.len <= len, "{extent:?} at {at} of {len}");
        if extent.content == Content::Zeros && at < READ_LEN {
            let mut bytes = vec![1; extent.len.min(READ_LEN) as usize];
            image.read_at(at, &mut bytes).expect("what is known to be zeros can be read");
            assert!(super::is_zero(&bytes), "zeros at {at} are no zeros");
        }
        at += extent.len;
    }
    let mut bytes = vec![0; READ_LEN.min(len) as usize];
    for start in [0, len - bytes.len() as u64] {
        let _ = image.read_at(start, &mut bytes);
        let _ = bytes
            .chunks_mut(5000)
            .enumerate()
            .try_for_each(|(index, piece)| image.read_at(start + index as u64 * 5000, piece));
    }
}

/// Bytes of the disk that archives go to.
const DISK_LEN: u64 = 16 << 20;

/// A disk that forgets, and fails a test that writes beyond it.
struct Nowhere;

impl Target for Nowhere {
    fn len(&self) -> u64 {
        DISK_LEN
    }

    fn granule(&self) -> usize {
        4096
    }

    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> Result<(), FormatError> {
        assert!(offset + bytes.len() as u64 <= DISK_LEN, "{} bytes at {offset}", bytes.len());
        Ok(())
    }

    fn zero(&mut self, offset: u64, len: u64) -> Result<(), FormatError> {
        assert!(offset + len <= DISK_LEN, "{len} zeros at {offset}");
        Ok(())
    }

    fn finish(&mut self) -> Result<(), FormatError> {
        Ok(())
    }
}

/// Makes a disk of bytes as if they were an archive.
pub fn import_tar(bytes: &[u8]) {
    let _ = tar_stream_to_ext4(bytes, "archive", &mut Nowhere, Ext4Options::default());
}

/// Looks at bytes as a VMDK file.
pub fn look_at_vmdk(bytes: &[u8]) {
    super::vmdk::look_at_bytes(bytes);
    let (_file, path) = memory_file(bytes);
    let _ = super::look_at_vmdk(&path);
}
