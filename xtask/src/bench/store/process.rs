//! Rows of the same operations without a server: through a queue of the disk in one process.

use super::Row;
use super::fio::{Job, Length};
use super::report::{Side, Table, Unit};
use super::server::{Server, Target};
use super::session::{Runner, Session, number};
use anyhow::Result;

pub const PROCESS: &str = "polder in process";
const NBD: &str = "polder over NBD";

pub const ROWS: &[Row] = &[
    Row { name: "process-read", about: "4 KiB random reads in process beside NBD", long: false, measure: read },
    Row { name: "process-write", about: "4 KiB random writes in process beside NBD", long: false, measure: write },
];

fn read(session: &Session) -> Result<Vec<Table>> {
    beside_nbd(session, "process-read", "read", "randread", Length::Seconds(session.seconds))
}

fn write(session: &Session) -> Result<Vec<Table>> {
    // As many on both ways, half of what the log holds: a time would fill it in process alone, and what is measured then is how fast the
    // log is moved.
    beside_nbd(session, "process-write", "write", "randwrite", Length::Operations(session.disk_bytes / 4096 / 2))
}

fn beside_nbd(
    session: &Session,
    row: &str,
    operation: &'static str,
    pattern: &'static str,
    length: Length,
) -> Result<Vec<Table>> {
    session.volume("disk")?;
    let mut tables = Vec::new();
    // A virtio disk has a queue for each vCPU: two threads here, and two connections there.
    for (depth, queues) in [(1, 1), (32, 1), (16, 2)] {
        let nbd = move |seed| {
            let server = Server::start(session, &Target::Polder("disk".to_owned()))?;
            if operation == "read" {
                server.warm()?;
            }
            let job = Job { connections: queues, length, ..Job::random(session, pattern, depth) };
            let sample = job.run(session, &server.uri, seed)?;
            server.stop()?;
            session.place.sync()?;
            Ok(sample)
        };
        let process = move |seed: u64| {
            let arguments = [
                ("op", operation.to_owned()),
                ("depth", depth.to_string()),
                ("queues", queues.to_string()),
                match length {
                    Length::Operations(operations) => ("operations", operations.to_string()),
                    _ => ("seconds", session.seconds.to_string()),
                },
                ("seed", seed.to_string()),
            ];
            let told = session.measure_volume("load", "disk", &arguments)?;
            session.place.sync()?;
            Ok(vec![
                ("rate", number(&told, "/operations/per_second")?),
                ("p50", number(&told, "/operations/p50_ns")?),
                ("p99", number(&told, "/operations/p99_ns")?),
            ])
        };
        let turns = session.by_turns(vec![Runner::new(PROCESS, process), Runner::new(NBD, nbd)])?;
        let load = match queues {
            1 => format!("{depth} at a time"),
            _ => format!("{depth} at a time of each of {queues}"),
        };
        let rate = turns.table(format!("{row}: operations, {load}"), Unit::PerSecond, "rate");
        tables.push(rate.ratio(PROCESS, NBD, Side::AtLeast, 2.0));
        tables.push(turns.table(format!("{row}: p50, {load}"), Unit::Nanoseconds, "p50"));
        tables.push(turns.table(format!("{row}: p99, {load}"), Unit::Nanoseconds, "p99"));
    }
    Ok(tables)
}
