//! Rows of room: what images and upgraded clones of them share.

use super::Row;
use super::report::{Side, Table, Unit};
use super::session::{Session, number};
use crate::command::{capture, step};
use crate::guests;
use anyhow::{Context, Result};
use serde_json::Value;
use std::path::Path;
use std::process::{Command, Stdio};

/// Package sets of three Debian images.
const SETS: [(&str, &str); 3] =
    [("store-web", "nginx"), ("store-python", "python3,git"), ("store-database", "postgresql")];

pub const ROWS: &[Row] = &[
    Row { name: "dedup", about: "three Debian images with different packages", long: false, measure: dedup },
    Row { name: "clones", about: "clones of a Debian, each booted and given packages", long: true, measure: clones },
];

fn status(session: &Session) -> Result<Value> {
    Ok(serde_json::from_str(&capture(session.polder().args(["store", "status", "--json"]))?)?)
}

fn dedup(session: &Session) -> Result<Vec<Table>> {
    let mut disks = Vec::new();
    for (name, packages) in SETS {
        disks.push(guests::image::disk_with(name, packages)?);
    }
    for (disk, (name, _)) in disks.iter().zip(SETS) {
        step(&format!("polder image import {name}"));
        capture(session.polder().args(["image", "import", "--format", "raw"]).arg(disk).arg(name))?;
    }
    let status = status(session)?;
    let ideal = session.ideal(&disks)?;
    let (stored, index) = (number(&status, "/stored_bytes")?, number(&status, "/index_memory_bytes")?);
    let (store, least) = ("the store's segments", "distinct chunks of 16 KiB");
    Ok(vec![
        Table::new("dedup: three Debian images", Unit::Bytes)
            .with(store, vec![stored])
            .with(least, vec![number(&ideal, "/bytes")?])
            .with("all files of the store", vec![folder_bytes(&session.store())? as f64])
            .ratio(store, least, Side::AtMost, 1.02),
        Table::new("dedup: chunks", Unit::Number)
            .with("of the disks", vec![number(&ideal, "/chunks")?])
            .with("distinct", vec![number(&ideal, "/distinct")?])
            .with("records in the store", vec![number(&status, "/records")?])
            .bar(
                "bytes of memory of the index for each entry".to_owned(),
                vec![index / number(&status, "/index_entries")?],
                Side::AtMost,
                20.0,
            ),
    ])
}

/// Bytes that the files in a folder take.
fn folder_bytes(folder: &Path) -> Result<u64> {
    let told = capture(Command::new("du").args(["--summarize", "--block-size=1"]).arg(folder))?;
    told.split_whitespace().next().and_then(|word| word.parse().ok()).context("du printed no number")
}

/// Installs what lies in the archive on standard input, as the guest of the programs bench does it. In memory, as no clone keeps packages.
const INSTALL: &str = "set -e; mkdir /run/repository; cd /run/repository; tar x; \
    echo 'deb [trusted=yes] file:/run/repository ./' > /run/sources; \
    apt-get -qq -o Dir::Etc::SourceList=/run/sources -o Dir::Etc::SourceParts=/dev/null update; \
    DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dir::Etc::SourceList=/run/sources -o Dir::Etc::SourceParts=/dev/null \
    install --yes --no-install-recommends $(cat install) > /run/installed; sync";

fn clones(session: &Session) -> Result<Vec<Table>> {
    let repository = super::super::programs::packages()?;
    let exported = guests::image::with_kernel(guests::Flavour::Cloud)?;
    let record: Value = serde_json::from_str(&std::fs::read_to_string(exported.join("image.json"))?)?;
    let command_line = record["command_line"].as_str().context("the image's record names no kernel command line")?;
    let mut import = session.polder();
    import.args(["image", "import", "--format", "raw"]).arg(exported.join("disk.raw")).arg("debian");
    import.arg("--kernel").arg(exported.join("kernel")).arg("--initrd").arg(exported.join("initrd"));
    capture(import.args(["--append", command_line]))?;
    let mut needed = Vec::new();
    for clone in 1..=session.clones {
        step(&format!("clone {clone} of {}", session.clones));
        upgrade(session, &format!("clone-{clone}"), &repository)?;
        if clone == 1 || clone == session.clones {
            capture(session.polder().args(["store", "gc", "--rate", "10G", "--json"]))?;
            needed.push((number(&status(session)?, "/needed_bytes")?, folder_bytes(&session.store())? as f64));
        }
    }
    let (one, all) = (needed[0], needed[needed.len() - 1]);
    let (first, many) = ("with one clone", format!("with {} clones", session.clones));
    Ok(vec![
        Table::new("clones: what the store needs", Unit::Bytes)
            .with(first, vec![one.0])
            .with(&many, vec![all.0])
            .ratio(&many, first, Side::AtMost, 1.15),
        Table::new("clones: all files of the store", Unit::Bytes)
            .with(first, vec![one.1])
            .with(&many, vec![all.1])
            .ratio(&many, first, Side::AtMost, 1.15),
    ])
}

/// Boots an instance, installs the packages and switches it off.
fn upgrade(session: &Session, name: &str, repository: &Path) -> Result<()> {
    capture(session.polder().args(["run", "--detach", "--name", name, "debian"]))?;
    let done = (|| {
        let mut tar = Command::new("tar").args(["c", "."]).current_dir(repository).stdout(Stdio::piped()).spawn()?;
        let archive = tar.stdout.take().context("tar has no standard output")?;
        let mut install = session.polder();
        install.args(["exec", name, "--", "sh", "-c", INSTALL]).stdin(archive);
        let status = install.status()?;
        anyhow::ensure!(tar.wait()?.success(), "tar failed");
        anyhow::ensure!(status.success(), "the packages could not be installed in {name}: {status}");
        Ok(())
    })();
    // The instance ends whether that went well or not.
    let stopped = capture(session.polder().args(["stop", name]));
    done?;
    stopped.map(drop)
}
