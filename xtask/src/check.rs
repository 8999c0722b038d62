//! `cargo xtask check`: everything that is wrong without running a test.
//!
//! The fuzz targets are a workspace of their own, which only a nightly toolchain links; that they compile is checked here.

use crate::command::{cargo, run, step};
use anyhow::Result;

/// Runs the format check, clippy with warnings denied, the check of the fuzz targets, and tidy.
pub fn check() -> Result<()> {
    crate::setup::install()?;
    step("cargo fmt --check");
    run(cargo().args(["fmt", "--all", "--check"]))?;
    step("cargo clippy");
    run(cargo().args(["clippy", "--quiet", "--workspace", "--all-targets", "--", "-D", "warnings"]))?;
    step("cargo check (fuzz targets)");
    let mut check = cargo();
    check.args(["check", "--quiet", "--locked", "--manifest-path", "fuzz/Cargo.toml", "--target-dir", "target/fuzz"]);
    // Nothing is linked: the fuzzer's own library, in C++, need not be built.
    run(check.env("CUSTOM_LIBFUZZER_PATH", "/dev/null"))?;
    crate::tidy::tidy()
}
