//! Tests of the reader and the writer: with `qemu-img` as the judge, and with files that lie.

mod hostile;
mod qemu;
mod writer;

use super::super::test_folder::TestFolder;
use super::super::{Content, Source};
use super::{OpenOptions, Qcow2};
use std::path::Path;
use std::process::Command;

/// Runs `qemu-img`, which has to succeed, and gives its output.
fn qemu_img(folder: &TestFolder, arguments: &str) -> String {
    let output = Command::new("qemu-img")
        .args(arguments.split_whitespace())
        .current_dir(folder.root())
        .output()
        .expect("qemu-img is installed (`cargo xtask setup`)");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "qemu-img {arguments}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

/// Runs `qemu-io` commands on an image.
fn qemu_io(folder: &TestFolder, format: &str, file: &str, commands: &[&str]) {
    let mut command = Command::new("qemu-io");
    command.current_dir(folder.root()).args(["-f", format]);
    for text in commands {
        command.args(["-c", text]);
    }
    let output = command.arg(file).output().expect("qemu-io is installed (`cargo xtask setup`)");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && !text.contains("failed"), "qemu-io {commands:?}: {text}");
}

/// Random numbers that come back with their seed: xorshift.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new() -> Self {
        let seed = std::env::var("POLDER_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(0x0071_636f_7732_u64);
        println!("POLDER_SEED={seed}");
        Random(seed | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

/// A disk with what real ones have: zeros, text that compresses, noise that does not.
fn sample_disk(len: usize, random: &mut Random) -> Vec<u8> {
    let mut bytes = vec![0; len];
    let mut at = 0;
    while at < len {
        let end = (at + 1 + random.below(200_000) as usize).min(len);
        match random.below(3) {
            0 => {}
            1 => bytes[at..end].iter_mut().for_each(|byte| *byte = b'a' + (random.next() % 3) as u8),
            _ => bytes[at..end].iter_mut().for_each(|byte| *byte = random.next() as u8),
        }
        at = end;
    }
    bytes
}

fn open(path: &Path) -> Qcow2 {
    Qcow2::open(path, &OpenOptions::default()).unwrap()
}

/// Reads all of a disk: in pieces of odd length, and what is said to be zeros is checked to be.
fn read_all(source: &dyn Source) -> Vec<u8> {
    let mut bytes = vec![0xee; source.len() as usize];
    for (index, piece) in bytes.chunks_mut(300_007).enumerate() {
        source.read_at(index as u64 * 300_007, piece).unwrap();
    }
    let mut at = 0;
    while at < source.len() {
        let extent = source.extent_at(at, u64::MAX).unwrap();
        if extent.content == Content::Zeros {
            assert!(
                super::super::is_zero(&bytes[at as usize..(at + extent.len) as usize]),
                "zeros at {at}: {extent:?}"
            );
        }
        at += extent.len;
    }
    assert_eq!(at, source.len());
    bytes
}
