//! Rows of an encrypted volume beside an open one with the same content, in one store.

use super::Row;
use super::fio::{Job, Length};
use super::report::{Side, Table, Unit};
use super::server::Target;
use super::serving::{by_fresh_servers, by_servers};
use super::session::{Runner, Session, number, text};
use crate::command::capture;
use anyhow::Result;
use std::time::Instant;

const OPEN: &str = "open";
const ENCRYPTED: &str = "encrypted";
/// What encryption may leave of a throughput.
const SHARE_MIN: f64 = 0.9;

pub const ROWS: &[Row] = &[
    Row { name: "encrypted-read", about: "an encrypted volume is read beside an open one", long: false, measure: read },
    Row { name: "encrypted-write", about: "the same written", long: false, measure: write },
    Row { name: "encrypted-import", about: "a raw disk becomes an encrypted image", long: false, measure: import },
    Row { name: "sealing", about: "the steps of a chunk, in memory", long: false, measure: steps },
];

/// Two volumes that begin as the same disk.
fn targets(session: &Session) -> Result<Vec<(&'static str, Target)>> {
    session.volume(OPEN)?;
    capture(session.polder().args(["volume", "create", "--image", "base", "--encrypt", ENCRYPTED]))?;
    Ok([OPEN, ENCRYPTED].map(|name| (name, Target::Polder(name.to_owned()))).into())
}

/// A table of throughputs, and what is asked of it.
fn beside(turns: &super::session::Turns, name: impl Into<String>, unit: Unit, value: &str) -> Table {
    turns.table(name, unit, value).ratio(ENCRYPTED, OPEN, Side::AtLeast, SHARE_MIN)
}

fn read(session: &Session) -> Result<Vec<Table>> {
    let targets = targets(session)?;
    let mut tables = Vec::new();
    for depth in [1, 32] {
        let turns = by_servers(session, &targets, Job::random(session, "randread", depth))?;
        let name = format!("encrypted-read: 4 KiB at random places, {depth} at a time");
        tables.push(beside(&turns, name, Unit::PerSecond, "rate"));
    }
    let turns = in_process(session, "read")?;
    tables.push(beside(&turns, "encrypted-read: the same in process, 32 at a time", Unit::PerSecond, "rate"));
    let job = Job::sequential("read", session.disk_bytes, Length::Seconds(session.seconds));
    let turns = by_servers(session, &targets, job)?;
    tables.push(beside(&turns, "encrypted-read: 1 MiB one after the other", Unit::BytesPerSecond, "speed"));
    Ok(tables)
}

fn write(session: &Session) -> Result<Vec<Table>> {
    let targets = targets(session)?;
    let mut tables = Vec::new();
    for depth in [1, 32] {
        let job = Job::random(session, "randwrite", depth);
        let turns = session.by_turns(by_fresh_servers(session, targets.clone(), job))?;
        let name = format!("encrypted-write: 4 KiB at random places, {depth} at a time");
        tables.push(beside(&turns, name, Unit::PerSecond, "rate"));
    }
    let turns = in_process(session, "write")?;
    tables.push(beside(&turns, "encrypted-write: the same in process, 32 at a time", Unit::PerSecond, "rate"));
    // Half the disk, so that the log takes it; then it is moved into the tree.
    let bytes = session.disk_bytes / 2;
    let job = Job { fresh_bytes: true, ..Job::sequential("write", bytes, Length::Once) };
    let runners = by_fresh_servers(session, targets, job);
    let turns = session.by_turns(runners)?;
    tables.push(beside(
        &turns,
        "encrypted-write: 1 MiB one after the other, with a flush",
        Unit::BytesPerSecond,
        "speed",
    ));
    let whole = |name: &str| -> Vec<f64> {
        let (speed, ending) = (turns.values(name, "speed"), turns.values(name, "ending"));
        speed.iter().zip(ending).map(|(speed, ending)| bytes as f64 / (bytes as f64 / speed + ending)).collect()
    };
    tables.push(
        Table::new("encrypted-write: the same until all is in the tree", Unit::BytesPerSecond)
            .with(OPEN, whole(OPEN))
            .with(ENCRYPTED, whole(ENCRYPTED))
            .ratio(ENCRYPTED, OPEN, Side::AtLeast, SHARE_MIN),
    );
    Ok(tables)
}

/// 4 KiB at random places without a server.
fn in_process(session: &Session, operation: &'static str) -> Result<super::session::Turns> {
    let runners = [OPEN, ENCRYPTED].map(|name| {
        Runner::new(name, move |seed| {
            let arguments = [
                ("op", operation.to_owned()),
                ("depth", "32".to_owned()),
                ("seconds", session.seconds.to_string()),
                ("seed", seed.to_string()),
            ];
            let told = session.measure_volume("load", name, &arguments)?;
            session.place.sync()?;
            Ok(vec![("rate", number(&told, "/operations/per_second")?)])
        })
    });
    session.by_turns(runners.into())
}

fn import(session: &Session) -> Result<Vec<Table>> {
    let source = session.raw()?;
    let bytes = session.disk_bytes as f64;
    let runners = [OPEN, ENCRYPTED].map(|name| {
        let source = &source;
        Runner::new(name, move |_| {
            // An empty store: nothing of the image is there already.
            let _ = std::fs::remove_dir_all(session.store());
            capture(session.polder().args(["store", "domain", "create", ENCRYPTED]))?;
            session.place.sync()?;
            let mut import = session.polder();
            import.args(["image", "import", "--format", "raw"]).arg(source).arg(name);
            if name == ENCRYPTED {
                import.args(["--domain", ENCRYPTED]);
            }
            let begin = Instant::now();
            capture(&mut import)?;
            Ok(vec![("speed", bytes / begin.elapsed().as_secs_f64())])
        })
    });
    let turns = session.by_long_turns(runners.into())?;
    let name = format!("encrypted-import: {} MiB, from memory", session.disk_bytes >> 20);
    Ok(vec![beside(&turns, name, Unit::BytesPerSecond, "speed")])
}

/// What each step of storing and reading a chunk takes, least of many rounds.
fn steps(session: &Session) -> Result<Vec<Table>> {
    let told = session.measure("sealing", &[("file", text(&session.raw()?))])?;
    let of = |step: &str| Ok::<_, anyhow::Error>(vec![number(&told, &format!("/{step}"))?]);
    let mut table = Table::new("sealing: a chunk of 16 KiB", Unit::Nanoseconds);
    for step in ["name", "pack", "copy", "seal", "open", "unpack", "log_block"] {
        table = table.with(step.replace('_', " "), of(step)?);
    }
    let (open, sealed) = (number(&told, "/storing")?, number(&told, "/storing_sealed")?);
    let (read, opened) = (number(&told, "/reading")?, number(&told, "/reading_sealed")?);
    Ok(vec![
        table.note("`seal` with its copy; of the disk's chunks half cannot be packed."),
        Table::new("sealing: name, pack and copy", Unit::Nanoseconds)
            .with(OPEN, vec![open])
            .with(ENCRYPTED, vec![sealed])
            .ratio(OPEN, ENCRYPTED, Side::AtLeast, SHARE_MIN),
        Table::new("sealing: copy and unpack", Unit::Nanoseconds).with(OPEN, vec![read]).with(ENCRYPTED, vec![opened]),
    ])
}
