//! Garbage collection: what it costs others, and whether snapshots make it dearer.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use polder_store::{CollectOptions, OpenDisk, Store, StoreError};
use serde_json::json;

use crate::Outcome;
use crate::arguments::{Arguments, close};
use crate::load::{Kind, Load, warm};
use crate::random::Random;

const BLOCK: usize = 4096;

/// `store= volume= range= seconds= seed= collect=0|1`: reads and writes of 4 KiB, seven to three, four at a time, with a collection
/// beside them at its usual rate or without. The collection rewrites every segment, so that it has work all the time.
pub fn beside_load(arguments: &Arguments) -> Outcome {
    let collects = arguments.number::<u8>("collect")? == 1;
    let store = arguments.store()?;
    let disk = Arc::new(OpenDisk::Volume(arguments.volume(&store)?));
    let range = arguments.number("range")?;
    warm(&disk, range)?;
    let load =
        Load { kind: Kind::Mixed(70), depth: 4, block: BLOCK, range, rate: None, seed: arguments.number("seed")? };
    let stop = AtomicBool::new(false);
    let ((figures, whole), collections) = std::thread::scope(|scope| {
        let collector = collects.then(|| scope.spawn(|| collect_until(&store, &stop)));
        let figures = load.run_for(&disk, arguments.duration("seconds")?, 1);
        stop.store(true, Ordering::Relaxed);
        let collections =
            collector.map_or(Ok(0), |collector| collector.join().map_err(|_| "the collector panicked")?);
        Outcome::Ok((figures?, collections?))
    })?;
    close(disk)?;
    Ok(json!({ "operations": figures.summary(whole), "collections": collections }))
}

/// Collects again and again; gives how many collections came to their end.
fn collect_until(store: &Arc<Store>, stop: &AtomicBool) -> Result<u64, String> {
    let options = CollectOptions { needed_percent_min: 101, ..CollectOptions::default() };
    let mut ended = 0;
    while !stop.load(Ordering::Relaxed) {
        let collected = store.collect(options, &mut |_| match stop.load(Ordering::Relaxed) {
            true => Err(StoreError::Refused("the load has ended".to_owned())),
            false => Ok(()),
        });
        match collected {
            Ok(_) => ended += 1,
            Err(_) if stop.load(Ordering::Relaxed) => {}
            Err(error) => return Err(error.to_string()),
        }
    }
    Ok(ended)
}

/// `store= volume= bytes= snapshots=N,N,...`: time of a collection that finds nothing to remove, with so many snapshots of the same content.
pub fn flat(arguments: &Arguments) -> Outcome {
    let store = arguments.store()?;
    let volume = arguments.volume(&store)?;
    let mut random = Random::new(11);
    let mut part = vec![0; 1 << 20];
    for at in (0..arguments.number("bytes")?).step_by(part.len()) {
        random.fill(&mut part);
        volume.write_at(at, &part)?;
    }
    let mut taken = 0;
    let mut times = Vec::new();
    for wanted in arguments.text("snapshots")?.split(',') {
        let wanted: u64 = wanted.parse()?;
        for number in taken..wanted {
            volume.snapshot(&format!("same-{number}"))?;
        }
        taken = wanted;
        volume.compact()?;
        store.seal()?;
        // The first one joins what compactions left in small segments.
        store.collect(CollectOptions::default(), &mut |_| Ok(()))?;
        let mut shortest = Duration::MAX;
        for _ in 0..3 {
            let begin = Instant::now();
            store.collect(CollectOptions::default(), &mut |_| Ok(()))?;
            shortest = shortest.min(begin.elapsed());
        }
        times.push(json!({ "snapshots": wanted, "seconds": shortest.as_secs_f64() }));
    }
    volume.close()?;
    Ok(json!({ "times": times }))
}
