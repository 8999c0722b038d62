//! Debian images for the whole-product tests, in a state folder of their own (`target/guests/home`).

use super::Flavour;
use crate::command::{run, step};
use anyhow::Result;
use std::path::PathBuf;
use std::process::Command;

/// An image and the options of its build.
struct Image {
    name: &'static str,
    options: &'static [&'static str],
}

/// The image of the normal tests.
const NORMAL: Image = Image { name: "debian", options: &[] };
/// The image of the long ones, with programs whose right results are known.
const WORK: Image = Image {
    name: "polder-test-work",
    options: &[
        "--include",
        "gcc,libc6-dev,openssl,stress-ng,python3,libpython3.11-testsuite,python3-distutils,\
         luajit,nodejs,php8.2-cli,php8.2-opcache,sbcl,openjdk-17-jdk-headless",
    ],
};
/// The normal image with Debian's other kernel, for the boot bench.
const GENERIC: Image = Image { name: "debian-generic", options: &["--kernel", "generic"] };

/// Makes the image of the normal tests, and with `long` the other one too. Needs the release binary and the agent.
pub fn build(long: bool) -> Result<()> {
    make(&NORMAL)?;
    if long {
        make(&WORK)?;
    }
    Ok(())
}

/// The folder of a Debian image with this kernel; it is made if it is missing.
pub fn with_kernel(flavour: Flavour) -> Result<PathBuf> {
    make(match flavour {
        Flavour::Cloud => &NORMAL,
        Flavour::Generic => &GENERIC,
    })
}

fn make(image: &Image) -> Result<PathBuf> {
    let name = image.name;
    let home = crate::project::guests().join("home");
    std::fs::create_dir_all(&home)?;
    let folder = home.join("images").join(name);
    // An image is as its options, its builder and its agent made it: another of these, another image.
    let mut made_from = image.options.join("\n").into_bytes();
    made_from.extend(ingredients()?);
    let stamp = home.join(format!("{name}.made-from"));
    if folder.exists() && std::fs::read(&stamp).is_ok_and(|used| used == made_from) {
        return Ok(folder);
    }
    step(&format!("polder image build debian --name {name}"));
    let mut command = Command::new(crate::project::polder());
    command.env("POLDER_HOME", &home).args(["image", "build", "debian", "--force", "--name", name]);
    run(command.args(image.options))?;
    std::fs::write(stamp, &made_from)?;
    Ok(folder)
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
