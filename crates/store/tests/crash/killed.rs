//! Processes that are killed at any moment.
//!
//! The long form can be run anywhere from the binary of these tests alone: POLDER_CRASH_KILLS says how many kills, POLDER_CRASH_WORKERS
//! how many volumes are worked on at a time, each in a store of its own, POLDER_CRASH_FOLDER where, and POLDER_SEED with which seed.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::{Duration, Instant};

use polder_store::Volume;

use super::child::Task;
use super::model::Shared;
use super::random::{Random, nightly};
use super::workload::{check, make, open_store, options, work};

/// The process that is killed: works on the volume until then.
#[test]
#[ignore = "other tests run it as a process of its own"]
fn a_child_works_until_it_is_killed() {
    let Some(task) = Task::of_this_process() else { return };
    let model = Shared::open(&task.model);
    // When the power is gone everything may fail, opening included.
    let Ok(store) = open_store(&task.store) else { return };
    let Ok(volume) = Volume::open(&store, "disk", options()) else { return };
    let failed = work(&store, &volume, &model, task.seed, &AtomicBool::new(false)).unwrap_err();
    assert!(task.may_fail, "{failed:?}");
}

/// How often to kill, and for how long.
struct Plan {
    kills: u64,
    time: Duration,
    workers: u64,
    /// All kills are wanted, however long they take.
    all: bool,
}

impl Plan {
    fn of_this_run() -> Plan {
        let number =
            |name| std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name}: {text}")));
        let workers = number("POLDER_CRASH_WORKERS").unwrap_or(1);
        match number("POLDER_CRASH_KILLS") {
            Some(kills) => Plan { kills, time: Duration::MAX, workers, all: true },
            None if nightly() => Plan { kills: 10_000, time: Duration::from_secs(7200), workers, all: false },
            None => Plan { kills: 400, time: Duration::from_secs(12), workers, all: false },
        }
    }
}

/// A folder for stores: in memory if it can be, since a kill loses nothing that was handed to the host.
fn folder() -> tempfile::TempDir {
    match std::env::var_os("POLDER_CRASH_FOLDER") {
        Some(folder) => tempfile::tempdir_in(folder).unwrap(),
        None => tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap(),
    }
}

/// Kills processes that work in a folder, one after the other, while there are kills left and there is time. Gives what was promised.
fn kill_again_and_again(folder: &Path, seed: u64, left: &AtomicU64, until: &dyn Fn() -> bool) -> Result<u64, String> {
    let mut random = Random::new(seed);
    let [store, model]: [PathBuf; 2] = ["store", "model"].map(|name| folder.join(name));
    let shared = Shared::open(&model);
    make(&store, &shared).map_err(|error| error.to_string())?;
    let begin = Instant::now();
    let mut killed = 0;
    while !until() && left.fetch_update(SeqCst, SeqCst, |left| left.checked_sub(1)).is_ok() {
        let mut child = Task::new(&store, &model, random.next()).start("killed::a_child_works_until_it_is_killed");
        std::thread::sleep(Duration::from_micros(random.below(90_000)));
        child.kill().unwrap();
        let output = child.wait_with_output().unwrap();
        if std::os::unix::process::ExitStatusExt::signal(&output.status) != Some(libc::SIGKILL) {
            return Err(format!("kill {killed}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr)));
        }
        killed += 1;
        if killed % 100 == 0 {
            println!("{} kills are left after {:?}", left.load(SeqCst), begin.elapsed());
        }
        check(&store, &shared).map_err(|what| format!("after kill {killed}: {what}"))?;
    }
    Ok(shared.promises.load(SeqCst))
}

#[test]
fn nothing_that_was_promised_is_lost_when_the_process_is_killed_at_any_moment() {
    let seed = Random::seed();
    let plan = Plan::of_this_run();
    let folder = folder();
    let begin = Instant::now();
    let (left, failed) = (AtomicU64::new(plan.kills), AtomicBool::new(false));
    let ended = || failed.load(SeqCst) || begin.elapsed() >= plan.time;
    let results: Vec<_> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..plan.workers)
            .map(|worker| {
                let folder = folder.path().join(format!("worker-{worker}"));
                let (left, failed, ended) = (&left, &failed, &ended);
                scope.spawn(move || {
                    std::fs::create_dir(&folder).unwrap();
                    let result = kill_again_and_again(&folder, seed ^ worker << 48, left, ended);
                    failed.fetch_or(result.is_err(), SeqCst);
                    result.map_err(|what| format!("worker {worker} of seed {seed}: {what}"))
                })
            })
            .collect();
        workers.into_iter().map(|worker| worker.join().unwrap()).collect()
    });
    let promises: u64 = match results.into_iter().collect::<Result<Vec<_>, _>>() {
        Ok(promises) => promises.iter().sum(),
        Err(what) if plan.all => panic!("{what}; the stores are kept in {}", folder.keep().display()),
        Err(what) => panic!("{what}"),
    };
    let killed = plan.kills - left.load(SeqCst);
    println!("{killed} kills in {:?}, {promises} promises", begin.elapsed());
    assert!(killed >= if plan.all { plan.kills } else { 20 } && promises > 100, "{killed} kills, {promises} promises");
}
