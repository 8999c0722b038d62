//! The programs of the host that make an image: are they there, and running them.

use anyhow::{Context, Result, bail};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A program and the Debian package that has it.
struct Tool {
    program: &'static str,
    package: &'static str,
}

const TOOLS: &[Tool] = &[
    Tool { program: "mmdebstrap", package: "mmdebstrap" },
    Tool { program: "mke2fs", package: "e2fsprogs" },
    Tool { program: "zstd", package: "zstd" },
];
/// What a user other than root needs besides.
const ROOTLESS: &[Tool] = &[Tool { program: "newuidmap", package: "uidmap" }];
/// Lines of a failed program's output that are shown.
const SHOWN_LINES_MAX: usize = 15;

/// Fails with the exact command to run if something is missing.
pub fn check() -> Result<()> {
    let root = rustix::process::geteuid().is_root();
    let needed = TOOLS.iter().chain(if root { &[] } else { ROOTLESS });
    let missing: Vec<&str> = needed.filter(|tool| find(tool.program).is_none()).map(|tool| tool.package).collect();
    if !missing.is_empty() {
        bail!(
            "making an image needs programs that are not installed; as root run `apt-get install --yes {}`, then try again",
            missing.join(" ")
        );
    }
    Ok(())
}

/// Where a program is: in `$PATH` or in the folders of system programs, which are not in every user's path.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain([PathBuf::from("/usr/sbin"), PathBuf::from("/sbin")])
        .map(|folder| folder.join(program))
        .find(|path| path.is_file())
}

/// Runs a command with its output in `log`; on failure the last lines of the log become the error.
pub fn run(command: &mut Command, log: &Path) -> Result<()> {
    let output = File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
    let program = command.get_program().to_string_lossy().into_owned();
    let status = command
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output)
        .status()
        .with_context(|| format!("cannot start {program}"))?;
    if status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&std::fs::read(log).unwrap_or_default()).into_owned();
    let lines: Vec<&str> = text.lines().collect();
    let shown = &lines[lines.len().saturating_sub(SHOWN_LINES_MAX)..];
    bail!("{program} ended with {status}; its last lines were:\n  {}", shown.join("\n  "))
}

/// What apt's messages in a log mean for whoever asked for the packages, to follow a sentence; nothing if they mean nothing known.
pub fn apt_complaint(log: &str) -> String {
    let unknown: Vec<&str> = log
        .lines()
        .filter_map(|line| {
            let line = line.strip_prefix("E: ")?;
            let located = line.strip_prefix("Unable to locate package ");
            located.or_else(|| line.strip_prefix("Package '")?.strip_suffix("' has no installation candidate"))
        })
        .collect();
    if !unknown.is_empty() {
        return format!(": Debian has no package {} (see --include)", unknown.join(" and no package "));
    }
    if log.lines().any(|line| line.starts_with("E: Failed to fetch")) {
        return " (is Debian's package archive within reach?)".to_owned();
    }
    String::new()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_package_is_named_and_an_archive_out_of_reach_asked_about() {
        let unknown = "Building dependency tree...\nE: Unable to locate package no-such\nE: Package 'gone' has no installation candidate\n";
        assert_eq!(apt_complaint(unknown), ": Debian has no package no-such and no package gone (see --include)");
        let unreachable = "E: Failed to fetch http://archive/InRelease  Could not connect\n";
        assert!(apt_complaint(unreachable).contains("within reach"));
        assert_eq!(apt_complaint("E: mmdebstrap failed to run\n"), "");
    }
}
