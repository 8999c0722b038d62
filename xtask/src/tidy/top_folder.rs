//! The top of the repository holds what the house style lists and nothing else.

use super::source::Sources;
use std::collections::BTreeSet;

const ALLOWED: &[&str] = &[
    "README.md",
    "ARCHITECTURE.md",
    "SPECIFICATION.md",
    "THREAT-MODEL.md",
    "CHANGELOG.md",
    "LICENSE",
    "LICENSE-APACHE",
    "LICENSE-MIT",
    "Cargo.toml",
    "Cargo.lock",
    "deny.toml",
    "rustfmt.toml",
    "crates",
    "tests",
    "guests",
    "docs",
    "benches",
    "fuzz",
    "xtask",
];

/// Names at the top that do not belong there; names that start with a dot are the tools' own.
pub fn check(sources: &Sources) -> Vec<String> {
    let top: BTreeSet<&str> = sources.files.iter().filter_map(|file| file.split('/').next()).collect();
    top.into_iter()
        .filter(|name| !name.starts_with('.') && !ALLOWED.contains(name))
        .map(|name| format!("{name}: does not belong at the top of the repository"))
        .collect()
}
