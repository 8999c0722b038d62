//! The store bench: what a volume costs beside a plain file, and what snapshots, collections and imports cost.
//!
//! Peers work on the same disk in the same run: `qemu-nbd` on raw, on qcow2 and on a chain of qcow2, `nbdkit file`, and loops over plain
//! files. Clients are fio's nbd engine over Unix sockets and a program of ours inside one process (`store_bench`). All take turns, and
//! what is told of a row are medians and ratios of the turns of one round: on a machine with other work a time alone says nothing.
//!
//! Modules: `report` (rows, bars, table and JSON), `place` (the folder under test), `session` (what the rows share), `server` and `fio`
//! (who serves and who asks); the rows are in `serving`, `process`, `snapshots`,
//! `room`, `upkeep` and `encryption`.

mod encryption;
mod fio;
mod place;
mod process;
mod report;
mod room;
mod server;
mod serving;
mod session;
mod snapshots;
mod upkeep;

use super::BenchArguments;
use crate::command::step;
use anyhow::{Result, bail};
use report::{Report, Table};
use session::Session;

const ROUNDS: u32 = 5;
const ROUNDS_QUICK: u32 = 2;

/// Something that is measured: it gives one or more tables.
struct Row {
    name: &'static str,
    about: &'static str,
    /// Left out unless it is named.
    long: bool,
    measure: fn(&Session) -> Result<Vec<Table>>,
}

/// The rows, in the order in which they are measured.
fn rows() -> Vec<Row> {
    [serving::ROWS, process::ROWS, snapshots::ROWS, upkeep::ROWS, encryption::ROWS, room::ROWS]
        .into_iter()
        .flatten()
        .copied()
        .collect()
}

impl Clone for Row {
    fn clone(&self) -> Self {
        *self
    }
}

impl Copy for Row {}

/// Measures the rows that are asked for, prints their tables and writes them as JSON, where rows of earlier runs stay.
pub fn measure(arguments: &BenchArguments) -> Result<()> {
    let known = rows();
    if let Some(name) = arguments.rows.iter().find(|name| known.iter().all(|row| row.name != **name)) {
        let names: Vec<String> = known.iter().map(|row| format!("  {:<16} {}", row.name, row.about)).collect();
        bail!("there is no row {name}:\n{}", names.join("\n"));
    }
    if !arguments.runners.is_empty() {
        bail!("the store bench always runs all its peers");
    }
    let wanted = |row: &Row| match arguments.rows.as_slice() {
        [] => !row.long,
        names => names.iter().any(|name| name == row.name),
    };
    // The peers are judges in the tests as well: all of them are among what testing needs.
    crate::setup::install()?;
    crate::build::build()?;
    let session = Session::open(
        arguments,
        arguments.rounds.unwrap_or(match arguments.quick {
            true => ROUNDS_QUICK,
            false => ROUNDS,
        }),
    )?;
    let file = crate::project::target().join("bench/store.json");
    let mut report = Report::open(&file, arguments.quick);
    let mut failures = Vec::new();
    for row in known.into_iter().filter(wanted) {
        step(&format!("{}: {}", row.name, row.about));
        match (row.measure)(&session) {
            Ok(tables) => {
                tables.iter().for_each(Table::print);
                report.put(row.name, row.about, &tables, session.rounds);
                report.write(&file)?;
            }
            Err(error) => {
                println!("{}: {error:#}", row.name);
                failures.push(row.name);
            }
        }
        session.clear()?;
    }
    println!("written to {}", file.display());
    if !failures.is_empty() {
        bail!("these rows were not measured: {}", failures.join(", "));
    }
    Ok(())
}
