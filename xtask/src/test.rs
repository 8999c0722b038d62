//! `cargo xtask test`: the set-up, then every test.
//!
//! First the tests of the crates, then the whole-product tests of `tests/`, which run the release binary and need the test
//! guests. The normal form ends within 25 minutes on two cores; `--nightly` runs the long forms as well.

use crate::command::{cargo, exists, run, step};
use anyhow::Result;
use clap::Args;

#[derive(Args)]
pub struct TestArguments {
    /// Also the long forms: hundreds of boots, millions of random instructions
    #[arg(long)]
    nightly: bool,
    /// Only tests whose names contain this
    filter: Option<String>,
}

/// The whole-product tests' package; the other tests need neither guests nor the release binary.
const PRODUCT: &str = "polder-tests";

/// Does the set-up and runs every test.
pub fn test(arguments: &TestArguments) -> Result<()> {
    crate::setup::install()?;
    if arguments.nightly {
        crate::setup::install_nightly_tools()?;
    }
    crate::guests::all()?;
    crate::build::build()?;
    crate::guests::image::build(arguments.nightly)?;
    step("tests of the crates");
    run_tests(&["--workspace", "--exclude", PRODUCT], arguments)?;
    step("whole-product tests");
    run_tests(&["--package", PRODUCT], arguments)
}

fn run_tests(selection: &[&str], arguments: &TestArguments) -> Result<()> {
    let mut command = cargo();
    // Tests that take too long for every day are marked `#[ignore]`; the nightly form runs them too.
    if exists("cargo-nextest") {
        command.args(["nextest", "run", "--no-fail-fast", "--no-tests=pass"]).args(selection).args(&arguments.filter);
        if arguments.nightly {
            command.args(["--run-ignored", "all"]);
        }
    } else {
        command.args(["test", "--no-fail-fast"]).args(selection).args(&arguments.filter);
        if arguments.nightly {
            command.args(["--", "--include-ignored"]);
        }
    }
    if arguments.nightly {
        command.env("POLDER_TEST_NIGHTLY", "1");
    }
    command.env("POLDER_TEST_GUESTS", crate::project::guests());
    command.env("POLDER_TEST_BINARY", crate::project::polder());
    run(&mut command)
}
