//! Rows of garbage collection and of bringing disks into the store.

use super::Row;
use super::report::{Side, Table, Unit};
use super::session::{Runner, Session, number, text};
use crate::command::capture;
use anyhow::Result;
use std::time::Instant;

const WITHOUT: &str = "without";
const WITH: &str = "with a collection";
const IMPORT: &str = "polder image import";
const DISK_WRITE: &str = "the disk's writes";
const DISK_READ: &str = "the disk's reads";
/// Share of an imported disk that is data, in percent; half of that cannot be packed.
const DATA_PERCENT: u64 = 60;

pub const ROWS: &[Row] = &[
    Row { name: "collect", about: "reads and writes beside a garbage collection", long: false, measure: beside_load },
    Row { name: "collect-flat", about: "collections with 10 to 10,000 snapshots", long: false, measure: flat },
    Row { name: "import", about: "a raw disk becomes an image", long: false, measure: import },
];

fn beside_load(session: &Session) -> Result<Vec<Table>> {
    session.volume("disk")?;
    let seconds = if session.quick { 2.0 } else { 5.0 };
    let runners = [(WITHOUT, 0), (WITH, 1)].map(|(name, collect)| {
        Runner::new(name, move |seed| {
            let arguments =
                [("collect", collect.to_string()), ("seconds", seconds.to_string()), ("seed", seed.to_string())];
            let told = session.measure_volume("collect-beside-load", "disk", &arguments)?;
            session.place.sync()?;
            Ok(vec![
                ("p50", number(&told, "/operations/p50_ns")?),
                ("p99", number(&told, "/operations/p99_ns")?),
                ("rate", number(&told, "/operations/per_second")?),
            ])
        })
    });
    let turns = session.by_turns(runners.into())?;
    Ok(vec![
        turns.table("collect: p99 of reads and writes", Unit::Nanoseconds, "p99").ratio(
            WITH,
            WITHOUT,
            Side::AtMost,
            1.1,
        ),
        turns.table("collect: p50", Unit::Nanoseconds, "p50"),
        turns.table("collect: operations", Unit::PerSecond, "rate"),
    ])
}

fn flat(session: &Session) -> Result<Vec<Table>> {
    let counts: &[u64] = if session.quick { &[10, 1000] } else { &[10, 1000, 10_000] };
    capture(session.polder().args(["volume", "create", "flat", "--size", &session.disk_bytes.to_string()]))?;
    let list: Vec<String> = counts.iter().map(u64::to_string).collect();
    let arguments = [("bytes", session.disk_bytes.to_string()), ("snapshots", list.join(","))];
    let told = session.measure_volume("collect-flat", "flat", &arguments)?;
    let mut table = Table::new(format!("collect-flat: {} MiB of content", session.disk_bytes >> 20), Unit::Seconds);
    for (index, count) in counts.iter().enumerate() {
        let seconds = number(&told, &format!("/times/{index}/seconds"))?;
        table = table.with(format!("{count} snapshots"), vec![seconds]);
    }
    let (first, last) = (format!("{} snapshots", counts[0]), format!("{} snapshots", counts[counts.len() - 1]));
    // The same content whatever the number: what is left is a look at each snapshot's record.
    Ok(vec![table.ratio(&last, &first, Side::AtMost, 1.25)])
}

fn import(session: &Session) -> Result<Vec<Table>> {
    let bytes = 2 * session.disk_bytes;
    let source = session.place.path("source.raw");
    let arguments = [("file", text(&source)), ("bytes", bytes.to_string()), ("data_percent", DATA_PERCENT.to_string())];
    let data_bytes = number(&session.measure("make-data", &arguments)?, "/data_bytes")?;
    let runners = vec![
        Runner::new(IMPORT, |seed| {
            let name = format!("import-{seed}");
            // An empty store: nothing of the image is there already.
            let _ = std::fs::remove_dir_all(session.store());
            session.place.sync()?;
            session.evict(std::slice::from_ref(&source))?;
            let begin = Instant::now();
            capture(session.polder().args(["image", "import", "--format", "raw"]).arg(&source).arg(&name))?;
            Ok(vec![("speed", data_bytes / begin.elapsed().as_secs_f64())])
        }),
        Runner::new("the disk", |_| {
            session.place.sync()?;
            let file = session.place.path("speed.raw");
            let told =
                session.measure("disk-speed", &[("file", text(&file)), ("bytes", (data_bytes as u64).to_string())])?;
            Ok(vec![
                ("write", number(&told, "/write_bytes_per_second")?),
                ("read", number(&told, "/read_bytes_per_second")?),
            ])
        }),
    ];
    let turns = session.by_long_turns(runners)?;
    let (size, data) = (bytes >> 20, data_bytes as u64 >> 20);
    let table = Table::new(format!("import: {size} MiB, of which {data} MiB are data"), Unit::BytesPerSecond)
        .with(IMPORT, turns.values(IMPORT, "speed"))
        .with(DISK_WRITE, turns.values("the disk", "write"))
        .with(DISK_READ, turns.values("the disk", "read"));
    Ok(vec![table.ratio(IMPORT, DISK_WRITE, Side::AtLeast, 0.5).ratio(IMPORT, DISK_READ, Side::AtLeast, 0.5).note(
        "Speeds are of the data. Files leave the host's page cache before they are read; writes end with a sync.",
    )])
}
