//! `cargo xtask build`: the release binary and the guest agent.
//!
//! The agent runs inside guests whose C library we do not know, so it is linked statically, in a build folder of its own:
//! static linking is a setting of a whole build, and the rest of the workspace must not share it.

use crate::command::{cargo, run, step};
use anyhow::{Context, Result};
use std::path::PathBuf;

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Builds both and returns the path of the binary.
pub fn build() -> Result<PathBuf> {
    step("cargo build --release (polder)");
    run(cargo().args(["build", "--quiet", "--release", "--package", "polder"]))?;
    step("cargo build --release (agent, static)");
    let folder = crate::project::target().join("agent");
    run(cargo()
        .args(["build", "--quiet", "--release", "--package", "polder-agent", "--target", TARGET, "--target-dir"])
        .arg(&folder)
        .env("RUSTFLAGS", "-C target-feature=+crt-static"))?;
    let built = folder.join(TARGET).join("release/polder-agent");
    let agent = crate::project::agent();
    std::fs::copy(&built, &agent).with_context(|| format!("cannot copy {} to {}", built.display(), agent.display()))?;
    Ok(crate::project::polder())
}
