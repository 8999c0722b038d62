//! Which of the host's file systems may leave a call without an answer.
//!
//! A program or another machine answers for some file systems. When it does not, the host's kernel holds the thread that asked, in
//! many cases so that not even a signal ends it: such a call is never made by a thread that others wait for.

use std::os::fd::AsFd;
use std::path::Path;

/// The numbers of `linux/magic.h` and of the file systems themselves: FUSE (virtiofs too), NFS, SMB in three versions, 9P, Ceph, AFS
/// twice, Coda, Lustre, GPFS.
const REMOTE: [u64; 12] = [
    0x6573_5546,
    0x6969,
    0x517b,
    0xff53_4d42,
    0xfe53_4d42,
    0x0102_1997,
    0x00c3_6400,
    0x5346_414f,
    0x6b41_4653,
    0x7375_7245,
    0x0bd0_0bd0,
    0x4750_4653,
];

/// Whether calls to this file may stay without an answer.
pub fn may_not_answer(path: &Path) -> bool {
    let Ok(facts) = rustix::fs::statfs(path) else {
        // A file that is not there is found missing when it is opened; one that answers this badly is no local one.
        return path.exists();
    };
    is_remote(facts.f_type as u64)
}

/// The same for an open file.
pub(crate) fn file_may_not_answer(file: impl AsFd) -> bool {
    rustix::fs::fstatfs(file).map_or(true, |facts| is_remote(facts.f_type as u64))
}

fn is_remote(kind: u64) -> bool {
    // Some architectures' kernels sign-extend it.
    REMOTE.contains(&(kind & 0xffff_ffff))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_this_machine_answer() {
        assert!(!may_not_answer(Path::new("/proc/self/status")));
        assert!(!file_may_not_answer(std::fs::File::open("/proc/self/status").unwrap()));
        assert!(!may_not_answer(Path::new("/no/such/file")));
        assert!(is_remote(0xffff_ffff_ff53_4d42));
    }
}
