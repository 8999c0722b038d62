//! Debian images for the whole-product tests, in a state folder of their own (`target/guests/home`).

use super::Flavour;
use crate::command::{capture, run, step};
use anyhow::Result;
use std::path::PathBuf;
use std::process::Command;

/// An image and the options of its build.
struct Image<'a> {
    name: &'a str,
    options: &'a [&'a str],
}

/// The image of the normal tests.
const NORMAL: Image<'static> = Image { name: "debian", options: &[] };
/// The image of the long ones, with programs whose right results are known.
const WORK: Image<'static> = Image {
    name: "polder-test-work",
    options: &[
        "--include",
        "gcc,libc6-dev,openssl,stress-ng,python3,libpython3.11-testsuite,python3-distutils,\
         luajit,nodejs,php8.2-cli,php8.2-opcache,sbcl,openjdk-17-jdk-headless",
    ],
};
/// The normal image with Debian's other kernel, for the boot bench.
const GENERIC: Image<'static> = Image { name: "debian-generic", options: &["--kernel", "generic"] };

/// Makes the image of the normal tests, and with `long` the other one too. Needs the release binary and the agent.
pub fn build(long: bool) -> Result<()> {
    make(&NORMAL)?;
    if long {
        make(&WORK)?;
    }
    Ok(())
}

/// The folder of a Debian image with this kernel, as files for any monitor; it is made if it is missing.
pub fn with_kernel(flavour: Flavour) -> Result<PathBuf> {
    let image = match flavour {
        Flavour::Cloud => &NORMAL,
        Flavour::Generic => &GENERIC,
    };
    let exported = make(image)?.join("exported").join(image.name);
    if exported.exists() {
        return Ok(exported);
    }
    let making = exported.with_extension("making");
    let _ = std::fs::remove_dir_all(&making);
    std::fs::create_dir_all(&making)?;
    for (part, file) in [("disk", "disk.raw"), ("kernel", "kernel"), ("initrd", "initrd")] {
        run(polder().args(["image", "export", image.name, "--part", part]).arg(making.join(file)))?;
    }
    let record = capture(polder().args(["image", "inspect", image.name]))?;
    std::fs::write(making.join("image.json"), record)?;
    std::fs::rename(&making, &exported)?;
    Ok(exported)
}

/// The raw disk of a Debian image with these packages besides; it is made if it is missing.
pub fn disk_with(name: &str, packages: &str) -> Result<PathBuf> {
    let exported = make(&Image { name, options: &["--include", packages] })?.join("exported").join(name);
    let disk = exported.join("disk.raw");
    if !disk.exists() {
        let making = exported.with_extension("making");
        let _ = std::fs::remove_dir_all(&making);
        std::fs::create_dir_all(&making)?;
        run(polder().args(["image", "export", name, "--part", "disk"]).arg(making.join("disk.raw")))?;
        std::fs::rename(&making, &exported)?;
    }
    Ok(disk)
}

fn polder() -> Command {
    let mut command = Command::new(crate::project::polder());
    command.env("POLDER_HOME", home());
    command
}

fn home() -> PathBuf {
    crate::project::guests().join("home")
}

/// Makes an image if it is missing; the state folder that it is in.
fn make(image: &Image<'_>) -> Result<PathBuf> {
    let name = image.name;
    let home = home();
    std::fs::create_dir_all(&home)?;
    // An image is as its options, its builder and its agent made it: another of these, another image.
    let mut made_from = image.options.join("\n").into_bytes();
    made_from.extend(ingredients()?);
    let stamp = home.join(format!("{name}.made-from"));
    let there = || capture(polder().args(["image", "inspect", name])).is_ok();
    if std::fs::read(&stamp).is_ok_and(|used| used == made_from) && there() {
        return Ok(home);
    }
    step(&format!("polder image build debian --name {name}"));
    run(polder().args(["image", "build", "debian", "--force", "--name", name]).args(image.options))?;
    let _ = std::fs::remove_dir_all(home.join("exported").join(name));
    std::fs::write(stamp, &made_from)?;
    Ok(home)
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
