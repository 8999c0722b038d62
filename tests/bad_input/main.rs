//! Promise: bad input to `polder boot` ends with one clear sentence and a status that says whose fault it is.

use polder_tests::{Kernel, Outcome, Scratch, polder, tiny};
use std::ffi::OsStr;
use std::process::Command;
use std::time::Duration;

/// `polder boot` with these arguments, which must refuse.
#[track_caller]
fn refused<S: AsRef<OsStr>>(arguments: &[S], status: i32, word: &str) {
    let outcome = Outcome::of(Command::new(polder()).arg("boot").args(arguments), Duration::from_secs(60));
    outcome.expect_status(status);
    assert!(outcome.errors.contains(word), "the message does not name {word:?}\n{outcome}");
    assert!(!outcome.errors.contains("panicked"), "polder panicked\n{outcome}");
    assert!(outcome.console.is_empty(), "nothing was to be printed\n{outcome}");
}

fn text(path: &std::path::Path) -> String {
    path.to_string_lossy().into_owned()
}

#[test]
fn a_missing_file_is_named() {
    let kernel = text(&Kernel::Cloud.image());
    refused(&["--kernel", "/nowhere/vmlinuz"], 1, "/nowhere/vmlinuz");
    refused(&["--kernel", &kernel, "--initrd", "/nowhere/initrd"], 1, "/nowhere/initrd");
    refused(&["--kernel", &kernel, "--disk", "/nowhere/disk"], 1, "/nowhere/disk");
}

#[test]
fn a_file_that_is_no_kernel_is_refused() {
    let scratch = Scratch::new();
    let cloud = std::fs::read(Kernel::Cloud.image()).expect("the kernel can be read");
    let cases: [(&str, Vec<u8>); 5] = [
        ("empty", Vec::new()),
        ("text", b"this is no kernel\n".repeat(1000)),
        ("truncated", cloud[..cloud.len() / 2].to_vec()),
        ("short", cloud[..600].to_vec()),
        ("elf", std::fs::read("/bin/true").expect("/bin/true can be read")),
    ];
    for (name, content) in cases {
        let kernel = text(&scratch.file(name, &content));
        refused(&["--kernel", &kernel], 1, &kernel);
    }
    let folder = text(scratch.path());
    refused(&["--kernel", &folder], 1, &folder);
}

#[test]
fn an_empty_disk_or_a_folder_as_disk_is_refused() {
    let scratch = Scratch::new();
    let kernel = text(&tiny("hello"));
    let empty = text(&scratch.file("empty.raw", b""));
    refused(&["--kernel", &kernel, "--disk", &empty], 1, &empty);
    let folder = text(scratch.path());
    refused(&["--kernel", &kernel, "--disk", &folder], 1, &folder);
}

#[test]
fn options_that_make_no_sense_are_wrong_usage() {
    let kernel = text(&tiny("hello"));
    refused(&["--kernel", &kernel, "--cpus", "0"], 2, "cpus");
    refused(&["--kernel", &kernel, "--cpus", "9"], 2, "cpus");
    refused(&["--kernel", &kernel, "--cpus", "many"], 2, "cpus");
    refused(&["--kernel", &kernel, "--memory", "1M"], 2, "memory");
    refused(&["--kernel", &kernel, "--memory", "64T"], 2, "memory");
    refused(&["--kernel", &kernel, "--memory", "lots"], 2, "memory");
    refused(&["--kernel", &kernel, "--engine", "warp"], 2, "engine");
    refused(&["--kernel", &kernel, "--timeout", "-1"], 2, "timeout");
    refused(&["--kernel", &kernel, "--no-such-option"], 2, "--no-such-option");
    refused::<&str>(&[], 2, "--kernel");
}

#[test]
fn a_kernel_that_does_not_fit_into_memory_is_refused() {
    let scratch = Scratch::new();
    let initrd = text(&scratch.sparse("large.initrd", 100 << 20));
    let kernel = text(&Kernel::Cloud.image());
    refused(&["--kernel", &kernel, "--initrd", &initrd, "--memory", "64M"], 1, "memory");
}
