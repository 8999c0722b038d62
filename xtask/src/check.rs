//! `cargo xtask check`: everything that is wrong without running a test.

use crate::command::{cargo, run, step};
use anyhow::Result;

/// Runs the format check, clippy with warnings denied, and tidy.
pub fn check() -> Result<()> {
    crate::setup::install()?;
    step("cargo fmt --check");
    run(cargo().args(["fmt", "--all", "--check"]))?;
    step("cargo clippy");
    run(cargo().args(["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"]))?;
    crate::tidy::tidy()
}
