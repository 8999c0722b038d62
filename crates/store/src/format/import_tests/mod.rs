//! Tests of archives and folders that become disks. Judges: e2fsck, GNU tar, and the kernel where we may mount.

mod archive;
mod hostile;
mod judged;

use super::ext4::Ext4Options;
use super::test_folder::TestFolder;
use super::{FormatError, Imported, RawTarget, Target, tar_stream_to_ext4};
use std::path::Path;
use std::process::Command;

/// Runs a program that has to succeed, and gives its output.
fn run(folder: &TestFolder, program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .current_dir(folder.root())
        .output()
        .unwrap_or_else(|error| panic!("{program} is installed (`cargo xtask setup`): {error}"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{program} {arguments:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

/// e2fsck finds nothing, and says so without having asked anything.
fn check(folder: &TestFolder, disk: &str) {
    let text = run(folder, "e2fsck", &["-fn", disk]);
    let complaints: Vec<&str> = text.lines().filter(|line| line.contains('?') || line.contains("WARNING")).collect();
    assert!(complaints.is_empty(), "{text}");
}

/// Makes a disk of an archive.
fn import(folder: &TestFolder, disk: &str, len: u64, archive: &[u8]) -> Result<Imported, FormatError> {
    let path = folder.path(disk);
    let _ = std::fs::remove_file(&path);
    let mut target = RawTarget::create(&path, len).unwrap();
    let imported = tar_stream_to_ext4(archive, "archive", &mut target, Ext4Options::default())?;
    target.finish()?;
    Ok(imported)
}

/// What debugfs says of a path: needs no root.
fn stat(folder: &TestFolder, disk: &str, path: &str) -> String {
    run(folder, "debugfs", &["-R", &format!("stat \"{path}\""), disk])
}

fn content(folder: &TestFolder, disk: &str, path: &str) -> Vec<u8> {
    let command = format!("dump \"{path}\" dumped");
    run(folder, "debugfs", &["-R", &command, disk]);
    std::fs::read(folder.path("dumped")).unwrap()
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// A disk that is mounted until this is dropped.
struct Mount<'a>(&'a Path);

impl<'a> Mount<'a> {
    fn new(folder: &TestFolder, disk: &str, at: &'a Path) -> Self {
        std::fs::create_dir_all(at).unwrap();
        run(folder, "mount", &["-o", "loop,ro", disk, at.to_str().unwrap()]);
        Mount(at)
    }
}

impl Drop for Mount<'_> {
    fn drop(&mut self) {
        // Lazily: a child that another test is just starting may hold one of our handles for a moment.
        let _ = Command::new("umount").arg("--lazy").arg(self.0).status();
    }
}
