//! Debian images for the whole-product tests, in a state folder of their own (`target/guests/home`).

use crate::command::{run, step};
use anyhow::Result;
use std::process::Command;

/// The image of the normal tests, and of the long ones the image with programs whose right results are known.
const NORMAL: (&str, &str) = ("debian", "");
const WORK: (&str, &str) =
    ("polder-test-work", "gcc,libc6-dev,openssl,stress-ng,python3,libpython3.11-testsuite,python3-distutils");

/// Makes the image of the normal tests, and with `long` the other one too. Needs the release binary and the agent.
pub fn build(long: bool) -> Result<()> {
    let home = crate::project::guests().join("home");
    std::fs::create_dir_all(&home)?;
    // An image is as its builder and its agent made it: another of these, another image.
    let made_from = ingredients()?;
    for (name, packages) in [NORMAL].into_iter().chain(long.then_some(WORK)) {
        let stamp = home.join(format!("{name}.made-from"));
        if home.join("images").join(name).exists() && std::fs::read(&stamp).is_ok_and(|used| used == made_from) {
            continue;
        }
        step(&format!("polder image build debian --name {name}"));
        let mut command = Command::new(crate::project::polder());
        command.env("POLDER_HOME", &home).args(["image", "build", "debian", "--force", "--name", name]);
        if !packages.is_empty() {
            command.args(["--include", packages]);
        }
        run(&mut command)?;
        std::fs::write(stamp, &made_from)?;
    }
    Ok(())
}

/// The agent and the sources of the image builder.
fn ingredients() -> Result<Vec<u8>> {
    let mut bytes = std::fs::read(crate::project::agent())?;
    let mut sources = Vec::new();
    for entry in std::fs::read_dir(crate::project::root().join("crates/polder/src/image"))? {
        sources.push(entry?.path());
    }
    sources.sort();
    for source in sources.iter().filter(|source| source.is_file()) {
        bytes.extend(std::fs::read(source)?);
    }
    Ok(bytes)
}
