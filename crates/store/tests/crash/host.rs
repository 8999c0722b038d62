//! Programs of the host: file systems in files, mounted.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use super::fuse::unmount;

/// Runs a program that has to succeed; what it says otherwise.
pub fn run(program: &str, arguments: &[&str]) -> Result<String, String> {
    let output = Command::new(program).args(arguments).output().map_err(|error| format!("{program}: {error}"))?;
    let said = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    match output.status.success() {
        true => Ok(said),
        false => Err(format!("{program} {arguments:?}: {}: {said}", output.status)),
    }
}

/// Makes an ext4 with a journal of its own in a file or device.
pub fn make_ext4(file: &Path) -> Result<(), String> {
    let options = ["-q", "-F", "-b", "4096", "-J", "size=4", "-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard"];
    run("mke2fs", &[&["-t", "ext4"], &options[..], &[text(file)]].concat()).map(drop)
}

/// A file system that lies in a file, mounted through a loop device until this is dropped.
pub struct LoopMount(PathBuf);

impl LoopMount {
    /// Mounts it at a folder, which is made.
    pub fn new(file: &Path, folder: &Path) -> Result<LoopMount, String> {
        std::fs::create_dir_all(folder).unwrap();
        run("mount", &["-t", "ext4", "-o", "loop,discard,errors=remount-ro", text(file), text(folder)])?;
        Ok(LoopMount(folder.to_path_buf()))
    }

    /// Unmounts it, with everything written.
    pub fn end(self) -> Result<(), String> {
        let begin = Instant::now();
        loop {
            match run("umount", &[text(&self.0)]) {
                // A process that another thread starts has our files until it runs its program.
                Err(what) if what.contains("busy") && begin.elapsed() < Duration::from_secs(10) => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                other => return other.map(drop),
            }
        }
    }
}

impl Drop for LoopMount {
    fn drop(&mut self) {
        // One that was ended is no mount any more.
        unmount(&self.0);
    }
}

/// Gives this thread, and the threads and processes that it starts, mounts of their own. A process elsewhere that gets a mount
/// namespace at any moment (a build of an image does) would take our mounts along, and what is mounted there too is still the same file
/// system after we unmounted it: who mounts the file again finds what it was before.
pub fn own_mounts() {
    // SAFETY: the call takes no pointers, and changes where this thread sees files.
    if unsafe { libc::unshare(libc::CLONE_NEWNS) } != 0 {
        return;
    }
    // SAFETY: the strings end with a zero; a null pointer is what the other arguments may be.
    unsafe {
        libc::mount(
            c"none".as_ptr(),
            c"/".as_ptr(),
            std::ptr::null(),
            libc::MS_REC | libc::MS_PRIVATE,
            std::ptr::null(),
        )
    };
}

/// Whether a file system in a file can be mounted here, by a thread that then has mounts of its own; says why not.
pub fn can_mount_files() -> bool {
    own_mounts();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("disk");
    std::fs::File::create(&file).and_then(|file| file.set_len(16 << 20)).unwrap();
    let mounted = make_ext4(&file).and_then(|()| LoopMount::new(&file, &folder.path().join("mounted"))?.end());
    mounted.inspect_err(|what| eprintln!("not run: a file system in a file cannot be mounted: {what}")).is_ok()
}

fn text(path: &Path) -> &str {
    path.to_str().expect("paths of tests are UTF-8")
}
