//! `cargo xtask demo`: from a fresh Debian machine to a command run inside a virtual machine.

use crate::command::{run, step};
use anyhow::Result;
use std::process::Command;

/// Builds polder, makes a Debian image if there is none yet, boots it, runs a command inside and shuts it down.
pub fn demo() -> Result<()> {
    crate::setup::install()?;
    let polder = crate::build::build()?;
    let home = crate::project::target().join("demo");
    std::fs::create_dir_all(&home)?;
    let on = |arguments: &[&str]| {
        let mut command = Command::new(&polder);
        command.args(arguments).env("POLDER_HOME", &home);
        command
    };
    if crate::command::capture(&mut on(&["image", "inspect", "debian"])).is_err() {
        step("polder image build debian");
        run(&mut on(&["image", "build", "debian"]))?;
    }
    step("polder doctor");
    run(&mut on(&["doctor"]))?;
    step("polder run debian -- uname -a; the guest's system and processors");
    run(&mut on(&[
        "run",
        "debian",
        "--",
        "sh",
        "-c",
        "uname -a; grep PRETTY /etc/os-release; nproc; systemctl is-system-running || true",
    ]))?;
    step("the guest is shut down and its private disk is gone; the image stays in target/demo");
    Ok(())
}
