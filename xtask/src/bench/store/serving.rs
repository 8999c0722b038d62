//! Rows of disks served over NBD, beside qemu-nbd and nbdkit.

use super::Row;
use super::fio::{Job, Length};
use super::report::{Side, Table, Unit};
use super::server::{Server, Target};
use super::session::{Runner, Sample, Session, number, text};
use crate::command::run;
use anyhow::Result;
use serde_json::Value;
use std::path::PathBuf;
use std::process::Command;

pub const POLDER: &str = "polder";
const RAW: &str = "qemu-nbd raw";
const QCOW2: &str = "qemu-nbd qcow2";
const NBDKIT: &str = "nbdkit file";
const PLAIN: &str = "a plain file";

/// What polder's own caches hold whole.
const SMALL_RANGE: u64 = 32 << 20;
const CHAIN: u32 = 100;
const SNAPSHOTS: u32 = 1000;
/// Bytes that the row of a long write has, by the size of the disk: more than a log holds.
const LONG_FACTOR: u64 = 3;

pub const ROWS: &[Row] = &[
    Row { name: "read", about: "4 KiB random reads from memory, one at a time", long: false, measure: read },
    Row { name: "read-small", about: "the same within 32 MiB", long: false, measure: read_small },
    Row { name: "write", about: "4 KiB random writes, one at a time", long: false, measure: write },
    Row { name: "flush", about: "a flush after each 4 KiB write", long: false, measure: flush },
    Row { name: "read-32", about: "4 KiB random reads from memory, 32 at a time", long: false, measure: read_32 },
    Row { name: "write-32", about: "4 KiB random writes, 32 at a time", long: false, measure: write_32 },
    Row { name: "read-long", about: "sequential reads of 1 MiB from memory", long: false, measure: read_long },
    Row { name: "read-cold", about: "sequential reads of 1 MiB from the disk", long: false, measure: read_cold },
    Row { name: "write-long", about: "sequential writes of 1 MiB and a flush", long: false, measure: write_long },
    Row { name: "write-sustained", about: "the same, more than a log holds", long: false, measure: write_sustained },
    Row { name: "history", about: "4 KiB random reads behind many snapshots", long: false, measure: history },
];

/// The four servers, each with a disk of its own if it is written.
fn targets(session: &Session, own: bool) -> Result<Vec<(&'static str, Target)>> {
    let raw = |name| if own { session.raw_copy(name) } else { session.raw() };
    Ok(vec![
        (POLDER, Target::Polder(session.volume("disk")?)),
        (RAW, Target::QemuRaw(raw("qemu.raw")?)),
        (QCOW2, Target::QemuQcow2(session.qcow2("qemu.qcow2")?)),
        (NBDKIT, Target::Nbdkit(raw("nbdkit.raw")?)),
    ])
}

/// Servers that stay for all rounds, for disks that are read only.
pub fn by_servers(session: &Session, targets: &[(&str, Target)], job: Job) -> Result<super::session::Turns> {
    let servers: Vec<(String, Server)> = targets
        .iter()
        .map(|(name, target)| {
            let server = Server::start(session, target)?;
            server.warm()?;
            Ok(((*name).to_owned(), server))
        })
        .collect::<Result<_>>()?;
    let runners = servers
        .iter()
        .map(|(name, server)| Runner::new(name.as_str(), move |seed| job.run(session, &server.uri, seed)))
        .collect();
    session.by_turns(runners)
}

/// A server for each turn: what it left to do when it was written is done when the next turn begins.
pub fn by_fresh_servers<'a>(session: &'a Session, targets: Vec<(&'static str, Target)>, job: Job) -> Vec<Runner<'a>> {
    targets
        .into_iter()
        .map(|(name, target)| {
            Runner::new(name, move |seed| {
                let server = Server::start(session, &target)?;
                let mut sample = job.run(session, &server.uri, seed)?;
                sample.push(("ending", server.stop()?));
                session.place.sync()?;
                Ok(sample)
            })
        })
        .collect()
}

fn read(session: &Session) -> Result<Vec<Table>> {
    let turns = by_servers(session, &targets(session, false)?, Job::random(session, "randread", 1))?;
    Ok(vec![
        turns.table("read: p50", Unit::Nanoseconds, "p50").ratio(POLDER, RAW, Side::AtMost, 1.15),
        turns.table("read: p99", Unit::Nanoseconds, "p99"),
        turns.table("read: operations", Unit::PerSecond, "rate"),
    ])
}

fn read_small(session: &Session) -> Result<Vec<Table>> {
    let job = Job { range: SMALL_RANGE, ..Job::random(session, "randread", 1) };
    let turns = by_servers(session, &targets(session, false)?, job)?;
    Ok(vec![turns.table("read-small: p50", Unit::Nanoseconds, "p50").ratio(POLDER, RAW, Side::AtMost, 1.15)])
}

fn write(session: &Session) -> Result<Vec<Table>> {
    let job = Job::random(session, "randwrite", 1);
    let turns = session.by_turns(by_fresh_servers(session, targets(session, true)?, job))?;
    Ok(vec![
        turns.table("write: p50", Unit::Nanoseconds, "p50").ratio(POLDER, RAW, Side::AtMost, 1.0),
        turns.table("write: p99", Unit::Nanoseconds, "p99"),
        turns.table("write: operations", Unit::PerSecond, "rate"),
        turns.table("write: seconds until the server has ended, and all is in its place", Unit::Seconds, "ending"),
    ])
}

fn flush(session: &Session) -> Result<Vec<Table>> {
    let job = Job { flush_every: Some(1), ..Job::random(session, "randwrite", 1) };
    let mut runners = by_fresh_servers(session, targets(session, true)?, job);
    session.volume("in-process")?;
    runners.push(Runner::new(super::process::PROCESS, move |seed| {
        let arguments =
            [("op", "flush".to_owned()), ("seconds", session.seconds.to_string()), ("seed", seed.to_string())];
        let told = session.measure_volume("load", "in-process", &arguments)?;
        session.place.sync()?;
        flushes(&told, "/operations")
    }));
    let file = session.raw_copy("plain.raw")?;
    runners.push(Runner::new(PLAIN, move |seed| {
        let arguments = [("file", text(&file)), ("seconds", session.seconds.to_string()), ("seed", seed.to_string())];
        let told = session.measure("sync-loop", &arguments)?;
        session.place.sync()?;
        flushes(&told, "/sync")
    }));
    let turns = session.by_turns(runners)?;
    let p50 = turns.table("flush: p50 of the flush", Unit::Nanoseconds, "flush");
    let p50 = p50.ratio(POLDER, RAW, Side::AtMost, 1.1).ratio(super::process::PROCESS, PLAIN, Side::AtMost, 1.1);
    let p50 = p50.ratio(POLDER, PLAIN, Side::AtMost, 1.1);
    Ok(vec![p50, turns.table("flush: p99 of the flush", Unit::Nanoseconds, "flush_p99")])
}

fn flushes(told: &Value, at: &str) -> Result<Sample> {
    Ok(vec![("flush", number(told, &format!("{at}/p50_ns"))?), ("flush_p99", number(told, &format!("{at}/p99_ns"))?)])
}

fn read_32(session: &Session) -> Result<Vec<Table>> {
    let turns = by_servers(session, &targets(session, false)?, Job::random(session, "randread", 32))?;
    Ok(vec![turns.table("read-32: operations", Unit::PerSecond, "rate")])
}

fn write_32(session: &Session) -> Result<Vec<Table>> {
    let job = Job::random(session, "randwrite", 32);
    let turns = session.by_turns(by_fresh_servers(session, targets(session, true)?, job))?;
    Ok(vec![turns.table("write-32: operations", Unit::PerSecond, "rate")])
}

fn read_long(session: &Session) -> Result<Vec<Table>> {
    let job = Job::sequential("read", session.disk_bytes, Length::Seconds(session.seconds));
    let turns = by_servers(session, &targets(session, false)?, job)?;
    Ok(vec![turns.table("read-long: speed", Unit::BytesPerSecond, "speed").ratio(POLDER, RAW, Side::AtLeast, 0.9)])
}

fn read_cold(session: &Session) -> Result<Vec<Table>> {
    let job = Job::sequential("read", session.disk_bytes, Length::Once);
    let targets = targets(session, true)?;
    session.place.sync()?;
    let runners = targets.into_iter().map(|(name, target)| {
        Runner::new(name, move |seed| {
            let files = match &target {
                Target::Polder(_) => session.store(),
                Target::QemuRaw(file) | Target::QemuQcow2(file) | Target::Nbdkit(file) => file.clone(),
            };
            session.evict(&[files])?;
            let server = Server::start(session, &target)?;
            let sample = job.run(session, &server.uri, seed)?;
            server.stop()?;
            Ok(sample)
        })
    });
    let turns = session.by_turns(runners.collect())?;
    let table = turns.table("read-cold: speed", Unit::BytesPerSecond, "speed").ratio(POLDER, RAW, Side::AtLeast, 0.9);
    Ok(vec![table.note(
        "Before each turn the server starts anew and its files leave the host's page cache (posix_fadvise); what is below the host's file system keeps what it holds.",
    )])
}

fn write_long(session: &Session) -> Result<Vec<Table>> {
    // Half the disk, so that the log takes it.
    let job = Job::sequential("write", session.disk_bytes / 2, Length::Once);
    let turns = session.by_turns(by_fresh_servers(session, targets(session, true)?, job))?;
    Ok(vec![
        turns.table("write-long: speed", Unit::BytesPerSecond, "speed").ratio(POLDER, RAW, Side::AtLeast, 0.9),
        turns.table("write-long: seconds until the server has ended", Unit::Seconds, "ending"),
    ])
}

fn write_sustained(session: &Session) -> Result<Vec<Table>> {
    let bytes = LONG_FACTOR * session.disk_bytes;
    let file = session.place.path("sustained.raw");
    session.measure("make-data", &[("file", text(&file)), ("bytes", bytes.to_string())])?;
    session.place.sync()?;
    let job = Job { fresh_bytes: true, ..Job::sequential("write", bytes, Length::Once) };
    let size = bytes.to_string();
    let runners = vec![
        Runner::new(POLDER, move |seed| {
            let name = format!("sustained-{seed}");
            run(session.polder().args(["volume", "create", &name, "--size", &size]))?;
            let server = Server::start(session, &Target::Polder(name.clone()))?;
            let mut sample = job.run(session, &server.uri, seed)?;
            sample.push(("ending", server.stop()?));
            // The next turn finds the room that this one took.
            run(session.polder().args(["volume", "rm", &name]))?;
            crate::command::capture(session.polder().args(["store", "gc", "--rate", "10G", "--json"]))?;
            session.place.sync()?;
            Ok(sample)
        }),
        Runner::new(RAW, move |seed| {
            let server = Server::start(session, &Target::QemuRaw(file.clone()))?;
            let mut sample = job.run(session, &server.uri, seed)?;
            sample.push(("ending", server.stop()?));
            session.place.sync()?;
            Ok(sample)
        }),
    ];
    let turns = session.by_long_turns(runners)?;
    let speed = turns.table(format!("write-sustained: speed of {} MiB", bytes >> 20), Unit::BytesPerSecond, "speed");
    Ok(vec![
        speed.ratio(POLDER, RAW, Side::AtLeast, 0.9),
        turns.table("write-sustained: seconds until the server has ended", Unit::Seconds, "ending"),
    ])
}

fn history(session: &Session) -> Result<Vec<Table>> {
    let snapshots = if session.quick { SNAPSHOTS / 10 } else { SNAPSHOTS };
    let many = format!("polder, {snapshots} snapshots");
    let one = "polder, one snapshot";
    let chain_name = format!("qemu-nbd, a chain of {CHAIN}");
    let chain = chain(session)?;
    let mut targets = Vec::new();
    for (name, volume, count) in [(many.as_str(), "many", snapshots), (one, "one", 1)] {
        session.volume(volume)?;
        let arguments = [("steps", snapshots), ("blocks", 8), ("snapshots", count)];
        session.measure_volume("history", volume, &arguments.map(|(key, value)| (key, value.to_string())))?;
        targets.push((name, Target::Polder(volume.to_owned())));
    }
    targets.push((RAW, Target::QemuRaw(session.raw()?)));
    targets.push((&chain_name, Target::QemuQcow2(chain)));
    // Two processes may use one store, and do here.
    let turns = by_servers(session, &targets, Job::random(session, "randread", 1))?;
    Ok(vec![
        turns.table("history: operations", Unit::PerSecond, "rate").ratio(&many, one, Side::AtLeast, 0.97),
        turns.table("history: p50", Unit::Nanoseconds, "p50").ratio(&many, one, Side::AtMost, 1.03),
    ])
}

/// A disk of qcow2 files, each of which lies over the one before and has some clusters of its own.
fn chain(session: &Session) -> Result<PathBuf> {
    let mut below = session.qcow2("chain-0.qcow2")?;
    for link in 1..=CHAIN {
        let file = session.place.path(&format!("chain-{link}.qcow2"));
        let mut create = Command::new("qemu-img");
        create.args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"]).arg(&below).arg(&file);
        run(&mut create)?;
        let mut write = Command::new("qemu-io");
        write.args(["-f", "qcow2"]);
        for place in 0..8u64 {
            let clusters = session.disk_bytes / (64 << 10);
            let at = (u64::from(link) * 8 + place) * 7919 % clusters;
            write.args(["-c", &format!("write -q -P {} {}k 64k", link % 250 + 1, at * 64)]);
        }
        run(write.arg(&file))?;
        below = file;
    }
    Ok(below)
}
