//! Power cuts: what was not synced is lost, in part and in any order.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use super::child::Task;
use super::model::Shared;
use super::power_disk::PowerDisk;
use super::random::{Random, nightly};
use super::workload::{check, make};

#[test]
#[ignore = "other tests run it as a process of its own"]
fn a_child_makes_a_store() {
    let Some(task) = Task::of_this_process() else { return };
    make(&task.store, &Shared::open(&task.model)).unwrap();
}

#[test]
#[ignore = "other tests run it as a process of its own"]
fn a_child_checks_a_store() {
    let Some(task) = Task::of_this_process() else { return };
    check(&task.store, &Shared::open(&task.model)).unwrap();
}

#[test]
fn nothing_that_was_promised_is_lost_when_the_power_goes_at_any_moment() {
    let seed = Random::seed();
    let mut random = Random::new(seed);
    let time = Duration::from_secs(if nightly() { 3600 } else { 12 });
    let folder = tempfile::tempdir().unwrap();
    let model = Shared::open(&folder.path().join("model"));
    let task = |mounted: &PowerDisk, seed| Task::new(mounted.path(), folder.path().join("model"), seed).that_may_fail();
    let Some(mounted) = PowerDisk::new() else { return };
    task(&mounted, 0).run("power::a_child_makes_a_store").unwrap();
    // A store that was made is promised.
    let mut disk = mounted.disk().after_power_loss(&mut random);
    drop(mounted);
    let begin = Instant::now();
    let mut cuts = 0;
    while begin.elapsed() < time {
        let Some(mounted) = PowerDisk::mount(disk) else { panic!("it was mounted before") };
        mounted.disk().cut_at = 1 + random.below(if cuts % 3 == 0 { 100 } else { 3000 });
        let worked = task(&mounted, random.next()).run("killed::a_child_works_until_it_is_killed");
        // SQLite has the index of the catalog's log mapped into memory. Once the power is gone a page of it that the host has dropped
        // cannot be read again, which ends the process.
        if let Err(what) = worked
            && !(mounted.disk().cut && what.starts_with("signal: 7 "))
        {
            panic!("at cut {cuts} of seed {seed}: {what}");
        }
        disk = mounted.disk().after_power_loss(&mut random);
        drop(mounted);
        cuts += 1;
        let Some(mounted) = PowerDisk::mount(disk) else { panic!("it was mounted before") };
        if let Err(what) = task(&mounted, 0).run("power::a_child_checks_a_store") {
            panic!("after cut {cuts} of seed {seed}: {what}");
        }
        disk = mounted.disk().clone();
    }
    let promises = model.promises.load(SeqCst);
    println!("{cuts} cuts, {promises} promises");
    assert!(cuts >= 5 && promises > 20, "{cuts} cuts, {promises} promises");
}

/// A disk that judges the store has no faults of its own.
#[test]
fn a_file_that_somebody_opens_while_it_is_written_holds_what_was_written() {
    let Some(mounted) = PowerDisk::new() else { return };
    let path = mounted.path();
    let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
    let read = |file: &File| {
        let mut bytes = [0; 4096];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    };
    file.write_all_at(&[1; 4096], 0).unwrap();
    assert!(read(&file) == [1; 4096]);
    mounted.disk().faults.stuck = Some("store");
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| file.write_all_at(&[2; 100], 0));
        while !mounted.disk().faults.held {
            std::thread::sleep(Duration::from_millis(1));
        }
        // The write is on its way to the disk: who reads sees it, or does not yet.
        read(&File::open(&path).unwrap());
        mounted.disk().faults.stuck = None;
        writer.join().unwrap().unwrap();
    });
    assert!(read(&file)[..101] == [[2; 100].as_slice(), &[1]].concat());
}
