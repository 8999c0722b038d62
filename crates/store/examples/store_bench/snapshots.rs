//! Snapshots and clones: what one costs, what they cost others, and very many of them.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use polder_store::{Content, OpenDisk, Volume};
use serde_json::json;

use crate::Outcome;
use crate::arguments::{Arguments, close, volume_of};
use crate::figures::Figures;
use crate::files::Syncs;
use crate::load::{Kind, Load, warm};
use crate::random::Random;

const BLOCK: usize = 4096;

/// Writes some blocks at random places.
fn write_some(volume: &Volume, random: &mut Random, range: u64, blocks: u64) -> Outcome<()> {
    let mut block = vec![0; BLOCK];
    for _ in 0..blocks {
        random.fill(&mut block);
        volume.write_at(random.below(range / BLOCK as u64) * BLOCK as u64, &block)?;
    }
    Ok(())
}

/// `store= volume= range= steps= blocks= snapshots=`: steps of some writes each, the same whatever the number of snapshots, which are taken
/// after the last steps.
pub fn history(arguments: &Arguments) -> Outcome {
    let store = arguments.store()?;
    let volume = arguments.volume(&store)?;
    let (steps, snapshots): (u64, u64) = (arguments.number("steps")?, arguments.number("snapshots")?);
    let (range, blocks) = (arguments.number("range")?, arguments.number("blocks")?);
    let mut random = Random::new(7);
    for step in 0..steps {
        write_some(&volume, &mut random, range, blocks)?;
        if step + snapshots >= steps {
            volume.snapshot(&format!("step-{step}"))?;
        }
    }
    volume.close()?;
    Ok(json!({}))
}

/// What is done beside the load.
#[derive(Clone, Copy)]
enum Act {
    Nothing,
    Snapshot,
    /// A clone of a snapshot.
    Clone,
}

/// `store= volume= range= file= seconds= rate= act= seed=`: a reader and a writer of 4 KiB, each at a rate of its own, and beside them by turns,
/// each so many times a second, the act and a write to a plain file with fdatasync. What the disk does in a bad moment so comes to both.
pub fn beside_load(arguments: &Arguments) -> Outcome {
    let act = match arguments.text("act")? {
        "nothing" => Act::Nothing,
        "snapshot" => Act::Snapshot,
        "clone" => Act::Clone,
        other => return Err(format!("there is no act {other}").into()),
    };
    let seed: u64 = arguments.number("seed")?;
    let store = arguments.store()?;
    let disk = Arc::new(OpenDisk::Volume(arguments.volume(&store)?));
    let range = arguments.number("range")?;
    warm(&disk, range)?;
    let load = |kind, seed| Load { kind, depth: 1, block: BLOCK, range, rate: Some(1000.0), seed };
    let (reader, writer) = (load(Kind::Read, seed), load(Kind::Write, seed + 1));
    let stop = AtomicBool::new(false);
    let whole = arguments.duration("seconds")?;
    let (acts, read, written) = std::thread::scope(|scope| {
        let run = |load: &Load| load.run(&disk, &stop, None).map(|(figures, time)| figures.summary(time));
        let reader = scope.spawn(move || run(&reader).map_err(|error| error.to_string()));
        let writer = scope.spawn(move || run(&writer).map_err(|error| error.to_string()));
        let acts = repeat(arguments, act, seed, &disk);
        stop.store(true, Ordering::Relaxed);
        let ended = |thread: std::thread::ScopedJoinHandle<'_, Result<_, String>>| {
            thread.join().map_err(|_| "a load panicked".to_owned()).and_then(|result| result)
        };
        (acts, ended(reader), ended(writer))
    });
    close(disk)?;
    let (acts, syncs) = acts?;
    Ok(json!({ "acts": acts.summary(whole), "syncs": syncs.summary(whole), "reader": read?, "writer": written? }))
}

/// Does it so many times a second, and a sync in the middle between two. Gives the times of both.
fn repeat(arguments: &Arguments, act: Act, seed: u64, disk: &OpenDisk) -> Outcome<(Figures, Figures)> {
    let (seconds, rate): (f64, f64) = (arguments.number("seconds")?, arguments.number("rate")?);
    let volume = volume_of(disk)?;
    let file = File::options().read(true).write(true).open(arguments.path("file")?)?;
    let mut random = Random::new(seed);
    let mut syncs = Syncs::new(&file, &mut random)?;
    let origin = match act {
        Act::Clone => Some(volume.snapshot(&format!("origin-{seed}"))?),
        _ => None,
    };
    let mut figures = Figures::default();
    let begin = Instant::now();
    let wait_until = |moment: f64| {
        std::thread::sleep(Duration::from_secs_f64(moment / rate).saturating_sub(begin.elapsed()));
    };
    for number in 0..(seconds * rate) as u64 {
        wait_until(number as f64);
        let name = format!("beside-{seed}-{number}");
        let begin = Instant::now();
        match (act, &origin) {
            (Act::Snapshot, _) => drop(volume.snapshot(&name)?),
            (Act::Clone, Some(origin)) => drop(volume.store().create_volume(&name, &Content::Snapshot(origin))?),
            _ => {}
        }
        if !matches!(act, Act::Nothing) {
            figures.add(begin.elapsed());
        }
        wait_until(number as f64 + 0.5);
        syncs.once()?;
    }
    Ok((figures, syncs.both))
}

/// `store= volume= range= count= seconds=`: that many snapshots of one volume, one after the other, with a few writes in between.
pub fn many(arguments: &Arguments) -> Outcome {
    /// Snapshots that are timed together.
    const GROUP: u64 = 1000;
    /// Snapshots between two writes.
    const UNCHANGED: u64 = 100;
    let store = arguments.store()?;
    let disk = Arc::new(OpenDisk::Volume(arguments.volume(&store)?));
    let (count, range): (u64, u64) = (arguments.number("count")?, arguments.number("range")?);
    let read = Load { kind: Kind::Read, depth: 1, block: BLOCK, range, rate: None, seed: 3 };
    let reads = || {
        warm(&disk, range)?;
        let (figures, whole) = read.run_for(&disk, arguments.duration("seconds")?, 1)?;
        Outcome::Ok(figures.summary(whole))
    };
    let before = reads()?;
    let mut random = Random::new(5);
    let mut groups = Vec::new();
    let begin = Instant::now();
    let mut group = Instant::now();
    for number in 0..count {
        if number.is_multiple_of(UNCHANGED) {
            write_some(volume_of(&disk)?, &mut random, range, 1)?;
        }
        volume_of(&disk)?.snapshot(&format!("many-{number}"))?;
        if (number + 1).is_multiple_of(GROUP) {
            groups.push(group.elapsed().as_secs_f64());
            group = Instant::now();
        }
    }
    let taken = begin.elapsed();
    let begin = Instant::now();
    volume_of(&disk)?.compact()?;
    let settling = begin.elapsed();
    let size = |name: &str| std::fs::metadata(store.folder().join(name)).map_or(0, |facts| facts.len());
    let log = size("catalog.db-wal");
    let after = reads()?;
    close(disk)?;
    Ok(json!({
        "seconds": taken.as_secs_f64(), "group_seconds": groups, "settling_seconds": settling.as_secs_f64(),
        "catalog_bytes": size("catalog.db"), "catalog_log_bytes": log,
        "reads_before": before, "reads_after": after,
    }))
}
