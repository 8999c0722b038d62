//! `polder store`: what the store holds, giving room back, and whether everything in it is whole.

mod domain;
mod progress;
mod remote;
mod transfer;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use clap::{Args, Subcommand};
use polder_basics::ByteSize;
use polder_store::remote::Attached;
use polder_store::{CollectOptions, Lost, Store, StoreOptions, Usage};
use serde_json::json;

pub use domain::create_for as create_domain_for;
pub use progress::Progress;
pub use remote::{attached_options, elsewhere};

use crate::state_folder::StateFolder;

/// Exit status of `verify` and `repair` when something is damaged or lost.
const STATUS_DAMAGED: u8 = 3;

#[derive(Args)]
pub struct StoreArguments {
    #[command(subcommand)]
    command: StoreCommand,
}

#[derive(Subcommand)]
enum StoreCommand {
    /// Show what the store holds and what of it is of use
    Status {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Give back the room of what nothing needs; the store can be used meanwhile
    Gc {
        /// Bytes that are read and written a second at most
        #[arg(long, value_name = "SIZE", default_value = "100M")]
        rate: ByteSize,
        /// Pack what was stored that many days ago or earlier tighter: a quarter less room, and slower reads
        #[arg(long, value_name = "DAYS")]
        tighten: Option<u32>,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Read everything and compare it with its names; exit status 3 if something is damaged
    Verify {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Make, list, rekey and erase encrypted domains
    Domain(domain::DomainArguments),
    /// Put an image or snapshot into another host's store or an object store; only what is missing there travels
    Push(transfer::TransferArguments),
    /// Get an image or snapshot of another host's store, or an image of an object store
    Pull(transfer::TransferArguments),
    Attach(remote::AttachArguments),
    Prefetch(remote::PrefetchArguments),
    Detach(remote::DetachArguments),
    /// List, remove and collect what is in an object store
    Remote {
        #[command(subcommand)]
        command: remote::RemoteCommand,
    },
    Serve(transfer::ServeArguments),
    /// Make the best of a damaged store: exit status 3 if something is lost
    Repair {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
}

/// Opens the store of the state folder, which finds what is not here in the remote stores of which images are attached.
pub fn open(state: &StateFolder) -> Result<Arc<Store>> {
    Ok(open_with_remotes(state)?.0)
}

fn open_with_remotes(state: &StateFolder) -> Result<(Arc<Store>, Vec<Attached>)> {
    let store = Store::open(&state.store(), StoreOptions::default())?;
    let remotes = remote::resume(&store)?;
    Ok((store, remotes))
}

/// Carries out `polder store ...`.
pub fn store(arguments: &StoreArguments) -> Result<ExitCode> {
    let state = StateFolder::open()?;
    let (store, remotes) = open_with_remotes(&state)?;
    match &arguments.command {
        StoreCommand::Status { json } => status(&store, *json),
        StoreCommand::Gc { rate, tighten, json } => collect(&store, *rate, *tighten, *json),
        StoreCommand::Verify { json } => verify(&store, *json),
        StoreCommand::Repair { json } => repair(&store, *json),
        StoreCommand::Domain(arguments) => domain::domain(&state, &store, arguments),
        StoreCommand::Push(arguments) => transfer::push(&store, arguments),
        StoreCommand::Pull(arguments) => transfer::pull(&store, arguments),
        StoreCommand::Attach(arguments) => remote::attach(&store, arguments),
        StoreCommand::Prefetch(arguments) => remote::prefetch(&store, &remotes, arguments),
        StoreCommand::Detach(arguments) => remote::detach(&store, arguments),
        StoreCommand::Remote { command } => remote::remote(&store, command),
        StoreCommand::Serve(arguments) => transfer::serve(&store, arguments),
    }
}

/// A size as lists show it: three digits are enough.
pub fn rough(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 || value >= 100.0 {
        format!("{value:.0} {}", units[unit])
    } else {
        format!("{value:.1} {}", units[unit])
    }
}

/// How often the needed bytes are used, as a factor.
fn ratio(usage: &Usage) -> f64 {
    if usage.needed_bytes == 0 { 1.0 } else { usage.used_bytes as f64 / usage.needed_bytes as f64 }
}

fn status(store: &Arc<Store>, as_json: bool) -> Result<ExitCode> {
    let mut progress = Progress::new();
    let usage = store.usage(&mut |step| progress.show(step))?;
    progress.finish();
    let index = store.index_figures();
    let (volumes, images) = (store.volumes()?, store.images()?);
    let snapshots: usize = volumes.iter().map(|volume| volume.snapshots).sum();
    if as_json {
        let value = json!({
            "volumes": volumes.len(), "snapshots": snapshots, "images": images.len(),
            "used_bytes": usage.used_bytes, "stored_bytes": usage.stored_bytes, "needed_bytes": usage.needed_bytes,
            "reclaimable_bytes": usage.reclaimable_bytes(), "dedup_ratio": ratio(&usage),
            "segments": usage.segments, "records": usage.records, "lost": usage.lost.len(),
            "index_entries": index.entries, "index_runs": index.runs,
            "index_memory_bytes": index.memory_bytes, "index_file_bytes": index.file_bytes,
        });
        println!("{value:#}");
        return Ok(ExitCode::SUCCESS);
    }
    println!("volumes      {:>10}  snapshots {snapshots}, images {}", volumes.len(), images.len());
    println!(
        "used         {:>10}  what volumes, snapshots and images hold, parts that they share counted each time",
        rough(usage.used_bytes)
    );
    println!(
        "stored       {:>10}  {} records in {} segments",
        rough(usage.stored_bytes),
        usage.records,
        usage.segments
    );
    println!("reclaimable  {:>10}  `polder store gc` gives it back", rough(usage.reclaimable_bytes()));
    println!("dedup ratio  {:>10.2}  used by needed", ratio(&usage));
    println!(
        "index        {:>10}  {} entries in {} runs, {} in memory",
        rough(index.file_bytes),
        index.entries,
        index.runs,
        rough(index.memory_bytes as u64)
    );
    Ok(told(&usage.lost))
}

fn collect(store: &Arc<Store>, rate: ByteSize, tighten_days: Option<u32>, as_json: bool) -> Result<ExitCode> {
    let mut progress = Progress::new();
    let tighten_after = tighten_days.map(|days| Duration::from_secs(24 * 3600) * days);
    let options = CollectOptions { bytes_per_second: rate.0, tighten_after, ..CollectOptions::default() };
    let collected = store.collect(options, &mut |step| progress.show(step))?;
    progress.finish();
    let freed = collected.freed_bytes.saturating_sub(collected.rewritten_bytes);
    if as_json {
        let value = json!({
            "freed_bytes": freed, "removed_segments": collected.removed_segments,
            "rewritten_bytes": collected.rewritten_bytes, "pause_us": collected.pause.as_micros() as u64,
        });
        println!("{value:#}");
    } else {
        println!(
            "{} given back: {} segments removed, {} of what they held is needed and was written anew",
            rough(freed),
            collected.removed_segments,
            rough(collected.rewritten_bytes)
        );
    }
    Ok(ExitCode::SUCCESS)
}

fn verify(store: &Arc<Store>, as_json: bool) -> Result<ExitCode> {
    let mut progress = Progress::new();
    let verified = store.verify(&mut |step| progress.show(step))?;
    progress.finish();
    if as_json {
        let damages: Vec<_> = verified
            .damages
            .iter()
            .map(|damage| json!({ "segment": damage.segment, "offset": damage.offset, "what": damage.what }))
            .collect();
        let value = json!({ "records": verified.records, "bytes": verified.bytes, "locked": verified.locked, "damages": damages, "lost": listed(&verified.lost) });
        println!("{value:#}");
    } else {
        for damage in &verified.damages {
            println!("{} at byte {}: {}", damage.segment.display(), damage.offset, damage.what);
        }
        if verified.locked > 0 {
            println!("{} records of locked domains: only their checksums were compared", verified.locked);
        }
        println!("{} records of {} read, {} damaged", verified.records, rough(verified.bytes), verified.damages.len());
    }
    let status = if as_json { ExitCode::SUCCESS } else { told(&verified.lost) };
    Ok(if verified.damages.is_empty() && verified.lost.is_empty() { status } else { ExitCode::from(STATUS_DAMAGED) })
}

fn repair(store: &Arc<Store>, as_json: bool) -> Result<ExitCode> {
    let mut progress = Progress::new();
    let repaired = store.repair(&mut |step| progress.show(step))?;
    progress.finish();
    if as_json {
        let value = json!({
            "damages": repaired.found.damages.len(), "rewritten_segments": repaired.rewritten_segments,
            "lost": listed(&repaired.lost),
        });
        println!("{value:#}");
        return Ok(if repaired.lost.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(STATUS_DAMAGED) });
    }
    println!(
        "{} damaged records found, {} segments written anew",
        repaired.found.damages.len(),
        repaired.rewritten_segments
    );
    Ok(told(&repaired.lost))
}

fn listed(lost: &[Lost]) -> Vec<serde_json::Value> {
    lost.iter()
        .map(|lost| json!({ "owner": lost.owner, "offset": lost.offset, "chunk": lost.name.to_string() }))
        .collect()
}

/// Says what is lost; the exit status.
fn told(lost: &[Lost]) -> ExitCode {
    for lost in lost {
        match lost.offset {
            Some(offset) => println!("lost: {} at byte {offset} (chunk {}): {}", lost.owner, lost.name, lost.why),
            None => println!("lost: a part of the tree of {} ({}): {}", lost.owner, lost.name, lost.why),
        }
    }
    if lost.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(STATUS_DAMAGED) }
}
