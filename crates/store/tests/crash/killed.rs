//! Processes that are killed at any moment.

use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
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

#[test]
fn nothing_that_was_promised_is_lost_when_the_process_is_killed_at_any_moment() {
    let seed = Random::seed();
    let mut random = Random::new(seed);
    let (kills, time) = match nightly() {
        true => (10_000, Duration::from_secs(7200)),
        false => (400, Duration::from_secs(12)),
    };
    // In memory if it can be: a kill loses nothing that was handed to the host.
    let folder = match tempfile::tempdir_in("/dev/shm") {
        Ok(folder) => folder,
        Err(_) => tempfile::tempdir().unwrap(),
    };
    let model = Shared::open(&folder.path().join("model"));
    make(&folder.path().join("store"), &model).unwrap();
    let task =
        |seed| Task { store: folder.path().join("store"), model: folder.path().join("model"), seed, may_fail: false };
    let begin = Instant::now();
    let mut killed = 0;
    while killed < kills && begin.elapsed() < time {
        let mut child = task(random.next()).start("killed::a_child_works_until_it_is_killed");
        std::thread::sleep(Duration::from_micros(random.below(90_000)));
        child.kill().unwrap();
        let status = child.wait().unwrap();
        assert_eq!(
            std::os::unix::process::ExitStatusExt::signal(&status),
            Some(libc::SIGKILL),
            "kill {killed}: {status}"
        );
        killed += 1;
        if let Err(what) = check(&folder.path().join("store"), &model) {
            panic!("after kill {killed} of seed {seed}: {what}");
        }
    }
    let promises = model.promises.load(SeqCst);
    println!("{killed} kills in {:?}, {promises} promises", begin.elapsed());
    assert!(killed >= 20 && promises > 100, "{killed} kills, {promises} promises");
}
