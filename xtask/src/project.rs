//! Where the project's files lie.

use std::path::{Path, PathBuf};

/// The repository's top folder.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the repository's top folder").to_path_buf()
}

/// Cargo's build folder: `$CARGO_TARGET_DIR`, else `target`.
pub fn target() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(folder) => root().join(folder),
        None => root().join("target"),
    }
}

/// The cache of test guests.
pub fn guests() -> PathBuf {
    target().join("guests")
}

/// The release binary.
pub fn polder() -> PathBuf {
    target().join("release/polder")
}

/// The guest agent, statically linked.
pub fn agent() -> PathBuf {
    target().join("release/polder-agent")
}
