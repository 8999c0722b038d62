//! Rows of snapshots and clones: what one takes, what it does to those who read and write meanwhile, and very many of them.

use super::Row;
use super::report::{Side, Table, Unit};
use super::session::{Runner, Session, number, text};
use anyhow::{Context, Result};

const NOTHING: &str = "fdatasync of a plain file alone";
const SNAPSHOT: &str = "snapshots";
const CLONE: &str = "clones";

pub const ROWS: &[Row] = &[
    Row {
        name: "snapshots",
        about: "100 snapshots or clones a second beside a load",
        long: false,
        measure: beside_load,
    },
    Row { name: "many-snapshots", about: "100,000 snapshots of one volume", long: false, measure: many },
];

fn beside_load(session: &Session) -> Result<Vec<Table>> {
    let file = session.raw_copy("plain.raw")?;
    let seconds = if session.quick { 2.0 } else { 10.0 };
    let runners = [(NOTHING, "nothing"), (SNAPSHOT, "snapshot"), (CLONE, "clone")].map(|(name, act)| {
        let file = text(&file);
        session.volume(act)?;
        Ok(Runner::new(name, move |seed| {
            let arguments = [
                ("act", act.to_owned()),
                ("file", file.clone()),
                ("seconds", seconds.to_string()),
                ("rate", "100".to_owned()),
                ("seed", seed.to_string()),
            ];
            let told = session.measure_volume("snapshots", act, &arguments)?;
            session.place.sync()?;
            let mut sample = vec![
                ("reader", number(&told, "/reader/max_ns")?),
                ("reader_p99", number(&told, "/reader/p99_ns")?),
                ("writer", number(&told, "/writer/max_ns")?),
                ("writer_p99", number(&told, "/writer/p99_ns")?),
                ("sync_p50", number(&told, "/syncs/p50_ns")?),
                ("sync_p99", number(&told, "/syncs/p99_ns")?),
            ];
            if act != "nothing" {
                let p99 = number(&told, "/acts/p99_ns")?;
                sample.push(("p50", number(&told, "/acts/p50_ns")?));
                sample.push(("p99", p99));
                sample.push(("over", p99 - number(&told, "/syncs/p99_ns")?));
                sample.push(("rate", number(&told, "/acts/per_second")?));
            }
            Ok(sample)
        }))
    });
    let turns = session.by_long_turns(runners.into_iter().collect::<Result<_>>()?)?;
    let within = 200_000.0;
    let stall = 1_000_000.0;
    let mut p99 = turns.table("snapshots: p99", Unit::Nanoseconds, "p99");
    for act in [SNAPSHOT, CLONE] {
        let text = format!("{act} - fdatasync by turns with them, in ns");
        p99 = p99.bar(text, turns.values(act, "over"), Side::AtMost, within);
    }
    let mut tables = vec![
        turns.table("snapshots: p50", Unit::Nanoseconds, "p50"),
        p99,
        turns.table("snapshots: p50 of fdatasync by turns with", Unit::Nanoseconds, "sync_p50"),
        turns.table("snapshots: p99 of fdatasync by turns with", Unit::Nanoseconds, "sync_p99"),
        turns.table("snapshots: acts", Unit::PerSecond, "rate"),
    ];
    for (who, longest, p99) in [("reader", "reader", "reader_p99"), ("writer", "writer", "writer_p99")] {
        let table = turns.table(format!("snapshots: the longest wait of a {who} beside"), Unit::Nanoseconds, longest);
        tables.push(table.difference(SNAPSHOT, NOTHING, Side::AtMost, stall).difference(
            CLONE,
            NOTHING,
            Side::AtMost,
            stall,
        ));
        tables.push(turns.table(format!("snapshots: p99 of a {who} beside"), Unit::Nanoseconds, p99));
    }
    Ok(tables)
}

fn many(session: &Session) -> Result<Vec<Table>> {
    let count = if session.quick { 3000 } else { 100_000 };
    session.volume("many")?;
    let arguments = [("count", count.to_string()), ("seconds", session.seconds.to_string())];
    let told = session.measure_volume("many-snapshots", "many", &arguments)?;
    let groups: Vec<f64> =
        told["group_seconds"].as_array().into_iter().flatten().filter_map(|value| value.as_f64()).collect();
    let (first, last) = groups.first().zip(groups.last()).context("no group of snapshots was timed")?;
    let one = |path| number(&told, path).map(|value| vec![value]);
    let (before, after) = ("reads before", "reads after");
    Ok(vec![
        Table::new(format!("many-snapshots: {count} of one volume"), Unit::Seconds)
            .with("all", one("/seconds")?)
            .with("the first thousand", vec![*first])
            .with("the last thousand", vec![*last])
            .with("moving them into the tree", one("/settling_seconds")?),
        Table::new("many-snapshots: the catalog", Unit::Bytes)
            .with("its tables", one("/catalog_bytes")?)
            .with("its log, at most", one("/catalog_log_bytes")?),
        Table::new("many-snapshots: reads in process", Unit::PerSecond)
            .with(before, one("/reads_before/per_second")?)
            .with(after, one("/reads_after/per_second")?)
            .ratio(after, before, Side::AtLeast, 0.97),
        Table::new("many-snapshots: reads in process, p50", Unit::Nanoseconds)
            .with(before, one("/reads_before/p50_ns")?)
            .with(after, one("/reads_after/p50_ns")?)
            .ratio(after, before, Side::AtMost, 1.03),
    ])
}
