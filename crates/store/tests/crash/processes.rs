//! Several processes at one store.

use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use polder_store::{CollectOptions, Content, Store, StoreError, Volume};

use super::child::Task;
use super::model::Shared;
use super::random::{Random, nightly};
use super::workload::{check, make, open_store, options};

#[test]
fn a_second_process_is_refused_and_told_who_was_first_until_that_is_killed_even_if_it_was_stopped() {
    let folder = tempfile::tempdir().unwrap();
    let task = Task::new(folder.path().join("store"), folder.path().join("model"), 1);
    let model = Shared::open(&task.model);
    make(&task.store, &model).unwrap();
    let mut child = task.start("killed::a_child_works_until_it_is_killed");
    let begin = Instant::now();
    while model.promises.load(SeqCst) == 0 {
        assert!(begin.elapsed() < Duration::from_secs(20));
        std::thread::sleep(Duration::from_millis(2));
    }
    let store = open_store(&task.store).unwrap();
    let refused = || match Volume::open(&store, "disk", options()) {
        Err(StoreError::InUse { process, .. }) => Some(process),
        Ok(volume) => {
            drop(volume);
            None
        }
        Err(error) => panic!("{error}"),
    };
    let name = child.id().to_string();
    assert_eq!(refused().as_ref(), Some(&name));
    // SAFETY: no pointers; the process is ours.
    assert_eq!(unsafe { libc::kill(child.id() as i32, libc::SIGSTOP) }, 0);
    for _ in 0..3 {
        assert_eq!(refused().as_ref(), Some(&name));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    check(&task.store, &model).unwrap();
}

#[test]
#[ignore = "other tests run it as a process of its own"]
fn a_child_uses_a_store_among_others() {
    let Some(task) = Task::of_this_process() else { return };
    let mut random = Random::new(task.seed);
    let begin = Instant::now();
    let mut round = 0;
    while begin.elapsed() < Duration::from_secs(if nightly() { 60 } else { 4 }) {
        round += 1;
        one_round(&task, &mut random, round).unwrap_or_else(|error| panic!("round {round}: {error:?}"));
    }
}

/// Opens the store anew, makes a volume, writes, snapshots, clones and compares, and removes all of it again.
fn one_round(task: &Task, random: &mut Random, round: u64) -> Result<(), StoreError> {
    let store = open_store(&task.store)?;
    let name = format!("disk-{}-{round}", task.seed);
    store.create_volume(&name, &Content::Zeros { capacity_bytes: 4 << 20, chunk_len: 16_384 })?;
    let volume = Volume::open(&store, &name, options())?;
    // All processes write from the same few contents: what one removes another needs.
    let mut bytes = vec![0; 1 << 20];
    for part in bytes.chunks_mut(16_384) {
        part.fill(random.below(7) as u8);
        part[..8].copy_from_slice(&random.below(40).to_le_bytes());
    }
    volume.write_at(0, &bytes)?;
    volume.snapshot("one")?;
    let clone = format!("{name}-clone");
    store.create_volume(&clone, &Content::Snapshot(&store.snapshot(&name, "one")?))?;
    volume.write_at(0, &[9; 4096])?;
    volume.flush()?;
    match random.below(3) {
        0 => volume.close()?,
        1 => drop(volume),
        _ => {
            volume.compact()?;
            drop(volume);
            collect(&store)?;
        }
    }
    let mut found = vec![0; bytes.len()];
    let opened = Volume::open(&store, &clone, options())?;
    opened.read_at(0, &mut found)?;
    assert!(found == bytes, "the clone of round {round} holds something else");
    drop(opened);
    let opened = Volume::open(&store, &name, options())?;
    opened.read_at(0, &mut found)?;
    assert!(
        found[..4096] == [9; 4096] && found[4096..] == bytes[4096..],
        "the volume of round {round} holds something else"
    );
    drop(opened);
    store.remove_volume(&name)?;
    store.remove_volume(&clone)
}

fn collect(store: &std::sync::Arc<Store>) -> Result<(), StoreError> {
    let options = CollectOptions { bytes_per_second: u64::MAX, ..CollectOptions::default() };
    match store.collect(options, &mut |_| Ok(())) {
        Err(StoreError::Refused(why)) if why.contains("another") => Ok(()),
        other => other.map(drop),
    }
}

#[test]
fn processes_that_open_clone_snapshot_and_collect_one_store_at_once_lose_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let store = folder.path().join("store");
    drop(open_store(&store).unwrap());
    let children: Vec<_> = (0..5)
        .map(|seed| {
            let task = Task::new(&store, folder.path().join("model"), seed);
            task.start("processes::a_child_uses_a_store_among_others")
        })
        .collect();
    for child in children {
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    let store = open_store(&store).unwrap();
    let verified = store.verify(&mut |_| Ok(())).unwrap();
    assert!(verified.damages.is_empty() && verified.lost.is_empty(), "{verified:?}");
    collect(&store).unwrap();
}
