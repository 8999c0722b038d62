//! A full disk: the one that the test serves, and an ext4 of the host.

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::{Duration, Instant};

use polder_store::{CollectOptions, Content, Store, Volume};

use super::child::Task;
use super::host::{LoopMount, can_mount_files, make_ext4, run};
use super::model::Shared;
use super::power_disk::PowerDisk;
use super::random::{Random, nightly};
use super::workload::{check, make, open_store, options, work_on_full_disk};

#[test]
#[ignore = "other tests run it as a process of its own"]
fn a_child_works_on_a_full_disk() {
    let Some(task) = Task::of_this_process() else { return };
    let model = Shared::open(&task.model);
    let store = open_store(&task.store).unwrap();
    let volume = Volume::open(&store, "disk", options()).unwrap();
    let error = work_on_full_disk(&store, &volume, &model, task.seed, &AtomicBool::new(false)).unwrap_err();
    // The parent looks at it if it did not cut the power.
    eprintln!("{error:?}");
}

#[test]
fn a_full_disk_makes_writes_wait_and_loses_nothing_that_was_promised() {
    let seed = Random::seed();
    let mut random = Random::new(seed);
    let folder = tempfile::tempdir().unwrap();
    let model = Shared::open(&folder.path().join("model"));
    let Some(mounted) = PowerDisk::new() else { return };
    let task = |mounted: &PowerDisk, seed| Task::new(mounted.path(), folder.path().join("model"), seed).that_may_fail();
    task(&mounted, 0).run("power::a_child_makes_a_store").unwrap();
    let mut disk = mounted.disk().clone();
    drop(mounted);
    for turn in 0..if nightly() { 300 } else { 3 } {
        let Some(mounted) = PowerDisk::mount(disk) else { panic!("it was mounted before") };
        // With a warning every other time.
        mounted.disk().tells_space = turn % 2 == 1;
        let mut child = task(&mounted, random.next()).start("full::a_child_works_on_a_full_disk");
        for _ in 0..4 {
            std::thread::sleep(Duration::from_millis(random.below(150)));
            let mut disk = mounted.disk();
            disk.space = disk.used_bytes() + random.below(3 << 20);
            drop(disk);
            std::thread::sleep(Duration::from_millis(100 + random.below(300)));
            mounted.disk().space = u64::MAX;
            // It goes on by itself.
            let before = model.promises.load(SeqCst);
            let begin = Instant::now();
            while model.promises.load(SeqCst) == before {
                if begin.elapsed() > Duration::from_secs(20) {
                    child.kill().unwrap();
                    let output = child.wait_with_output().unwrap();
                    let said = String::from_utf8_lossy(&output.stderr);
                    panic!("turn {turn} of seed {seed}: nothing goes on: {said}");
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        mounted.disk().cut = true;
        let _ = child.wait_with_output().unwrap();
        let after = mounted.disk().after_power_loss(&mut random);
        drop(mounted);
        let Some(mounted) = PowerDisk::mount(after) else { panic!("it was mounted before") };
        if let Err(what) = task(&mounted, 0).run("power::a_child_checks_a_store") {
            panic!("after turn {turn} of seed {seed}: {what}");
        }
        disk = mounted.disk().clone();
    }
}

#[test]
#[ignore = "other tests run it as a process of its own"]
fn a_child_fills_a_store() {
    let Some(task) = Task::of_this_process() else { return };
    let store = open_store(&task.store).unwrap();
    for (name, len) in [("kept", 24 << 20), ("gone", 48 << 20)] {
        store.create_volume(name, &Content::Zeros { capacity_bytes: 64 << 20, chunk_len: 16_384 }).unwrap();
        let volume = Volume::open(&store, name, options()).unwrap();
        let mut random = Random::new(name.len() as u64 + u64::from(name.as_bytes()[0]));
        let bytes: Vec<u8> = (0..len).map(|_| random.next() as u8).collect();
        volume.write_at(0, &bytes).unwrap();
        volume.close().unwrap();
    }
}

/// Fills a store so that each of its segments has something of both volumes: a third is of the one that is kept.
#[test]
#[ignore = "other tests run it as a process of its own"]
fn a_child_fills_segments_of_two_volumes() {
    let Some(task) = Task::of_this_process() else { return };
    let store = open_store(&task.store).unwrap();
    let volumes = ["kept", "gone"].map(|name| {
        store.create_volume(name, &Content::Zeros { capacity_bytes: 64 << 20, chunk_len: 16_384 }).unwrap();
        Volume::open(&store, name, options()).unwrap()
    });
    let mut random = Random::new(task.seed);
    for round in 0..8 {
        for (volume, len) in volumes.iter().zip([4 << 20, 8 << 20]) {
            volume.write_at(round * len, &noise(&mut random, len as usize)).unwrap();
            volume.compact().unwrap();
        }
    }
    volumes.into_iter().for_each(|volume| volume.close().unwrap());
}

/// Removes the volume `gone` where other programs have taken all the room but 3 MiB, and collects.
#[test]
#[ignore = "other tests run it as a process of its own"]
fn a_child_makes_room_with_little() {
    let Some(task) = Task::of_this_process() else { return };
    let store = open_store(&task.store).unwrap();
    let collect =
        || store.collect(CollectOptions { bytes_per_second: u64::MAX, ..CollectOptions::default() }, &mut |_| Ok(()));
    // Files that logs could go on in are not what makes the room.
    assert_eq!(collect().unwrap().freed_bytes, 0);
    let mut ballast = std::fs::File::create(&task.outside).unwrap();
    while ballast.write_all(&[7; 64 << 10]).is_ok() {}
    ballast.set_len(ballast.metadata().unwrap().len() - (3 << 20)).unwrap();
    store.remove_volume("gone").unwrap();
    let collected = collect().unwrap();
    assert!(collected.freed_bytes > collected.rewritten_bytes + (60 << 20), "{collected:?}");
    let volume = Volume::open(&store, "kept", options()).unwrap();
    let mut random = Random::new(task.seed);
    for round in 0..8 {
        let expected = noise(&mut random, 4 << 20);
        noise(&mut random, 8 << 20);
        let mut bytes = vec![0; expected.len()];
        volume.read_at(round * (4 << 20), &mut bytes).unwrap();
        assert!(bytes == expected, "{round}");
    }
}

fn noise(random: &mut Random, len: usize) -> Vec<u8> {
    (0..len / 8).flat_map(|_| random.next().to_le_bytes()).collect()
}

/// Removes the volume `gone` and collects what only that needed.
fn remove_and_collect(store: &Arc<Store>) {
    store.remove_volume("gone").unwrap();
    let options = CollectOptions { bytes_per_second: u64::MAX, ..CollectOptions::default() };
    let collected = store.collect(options, &mut |_| Ok(())).unwrap();
    assert!(collected.freed_bytes > 15 << 20, "{collected:?}");
}

#[test]
#[ignore = "other tests run it as a process of its own"]
fn a_child_makes_room() {
    let Some(task) = Task::of_this_process() else { return };
    remove_and_collect(&open_store(&task.store).unwrap());
}

#[test]
#[ignore = "other tests run it as a process of its own"]
fn a_child_verifies_a_store() {
    let Some(task) = Task::of_this_process() else { return };
    let verified = open_store(&task.store).unwrap().verify(&mut |_| Ok(())).unwrap();
    assert!(verified.damages.is_empty() && verified.lost.is_empty(), "{verified:?}");
}

/// A child that writes one volume until its parent ends it, and counts what it wrote where the parent sees it.
#[test]
#[ignore = "other tests run it as a process of its own"]
fn a_child_writes_and_counts() {
    let Some(task) = Task::of_this_process() else { return };
    let store = open_store(&task.store).unwrap();
    let volume = Volume::open(&store, "kept", options()).unwrap();
    let model = Shared::open(&task.model);
    let mut random = Random::new(task.seed);
    for round in 0.. {
        let bytes: Vec<u8> = (0..8 << 10).flat_map(|_| random.next().to_le_bytes()).collect();
        volume.write_at(round % 512 * (64 << 10), &bytes).unwrap();
        volume.flush().unwrap();
        model.promises.fetch_add(1, SeqCst);
    }
}

#[test]
fn the_last_room_of_a_disk_is_left_for_what_makes_more() {
    let folder = tempfile::tempdir().unwrap();
    let Some(mounted) = PowerDisk::new() else { return };
    let model = Shared::open(&folder.path().join("model"));
    let task = Task::new(mounted.path(), folder.path().join("model"), 0).that_may_fail();
    task.run("full::a_child_fills_a_store").unwrap();
    {
        let mut disk = mounted.disk();
        disk.tells_space = true;
        disk.space = disk.used_bytes() + (12 << 20);
    }
    let mut child = task.start("full::a_child_writes_and_counts");
    let free = || {
        let disk = mounted.disk();
        disk.space - disk.used_bytes()
    };
    let begin = Instant::now();
    let mut seen = (0, begin);
    while seen.0 == 0 || seen.1.elapsed() < Duration::from_secs(1) {
        assert!(child.try_wait().unwrap().is_none() && free() > 2 << 20, "{} bytes are left", free());
        assert!(begin.elapsed() < Duration::from_secs(60), "the disk is never full");
        if model.promises.load(SeqCst) != seen.0 {
            seen = (model.promises.load(SeqCst), Instant::now());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    assert!(free() < 11 << 20, "{} bytes are left", free());
    task.run("full::a_child_makes_room").unwrap();
    let before = model.promises.load(SeqCst);
    let begin = Instant::now();
    while model.promises.load(SeqCst) == before {
        assert!(begin.elapsed() < Duration::from_secs(20), "writes do not go on");
        std::thread::sleep(Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_volume_can_be_removed_and_collected_on_a_full_disk() {
    let folder = tempfile::tempdir().unwrap();
    let Some(mounted) = PowerDisk::new() else { return };
    let task = Task::new(mounted.path(), folder.path().join("model"), 0);
    task.run("full::a_child_fills_a_store").unwrap();
    {
        let mut disk = mounted.disk();
        disk.space = disk.used_bytes();
    }
    let freed_from = mounted.disk().used_bytes();
    task.run("full::a_child_makes_room").unwrap();
    task.run("full::a_child_verifies_a_store").unwrap();
    assert!(mounted.disk().used_bytes() + (15 << 20) < freed_from);
}

/// An ext4 of the host that is soon full, and room beside it.
struct SmallExt4 {
    // Ends before its folder goes.
    mount: LoopMount,
    folder: tempfile::TempDir,
}

impl SmallExt4 {
    /// None, with a message, where files cannot be mounted.
    fn new(len: u64) -> Option<Self> {
        if !can_mount_files() {
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("disk");
        std::fs::File::create(&file).and_then(|file| file.set_len(len)).unwrap();
        make_ext4(&file).unwrap();
        let mount = LoopMount::new(&file, &folder.path().join("mounted")).unwrap();
        Some(SmallExt4 { mount, folder })
    }

    /// Where it is mounted.
    fn at(&self) -> PathBuf {
        self.folder.path().join("mounted")
    }

    /// A task at a store on it, whose model is not.
    fn task(&self) -> Task {
        Task::new(self.at().join("store"), self.folder.path().join("model"), Random::seed())
    }

    /// Unmounts it, and has another program check it.
    fn end(self) {
        self.mount.end().unwrap();
        run("e2fsck", &["-f", "-n", self.folder.path().join("disk").to_str().unwrap()]).unwrap();
    }
}

#[test]
fn a_little_room_is_enough_to_collect_much() {
    let Some(disk) = SmallExt4::new(192 << 20) else { return };
    let task = Task { outside: disk.at().join("ballast"), ..disk.task() };
    task.run("full::a_child_fills_segments_of_two_volumes").unwrap();
    task.run("full::a_child_makes_room_with_little").unwrap();
    task.run("full::a_child_verifies_a_store").unwrap();
    disk.end();
}

#[test]
fn a_little_room_is_enough_on_a_disk_that_does_not_say_what_is_free() {
    let folder = tempfile::tempdir().unwrap();
    let Some(mounted) = PowerDisk::new() else { return };
    let task = Task::new(mounted.path().join("store"), folder.path().join("model"), Random::seed());
    let task = Task { outside: mounted.path().join("ballast"), ..task };
    mounted.disk().space = 160 << 20;
    task.run("full::a_child_fills_segments_of_two_volumes").unwrap();
    task.run("full::a_child_makes_room_with_little").unwrap();
    task.run("full::a_child_verifies_a_store").unwrap();
}

#[test]
fn writes_to_a_full_ext4_go_on_once_another_process_has_collected_and_nothing_is_lost() {
    let Some(disk) = SmallExt4::new(320 << 20) else { return };
    let at = disk.at();
    let task = disk.task().that_may_fail();
    let model = Shared::open(&task.model);
    task.run("full::a_child_fills_a_store").unwrap();
    make(&task.store, &model).unwrap();
    let mut child = task.start("full::a_child_works_on_a_full_disk");
    let mut wait = |what: &str, patience: u64, until: &mut dyn FnMut() -> bool| {
        let begin = Instant::now();
        while !until() {
            if begin.elapsed() > Duration::from_secs(patience) || child.try_wait().unwrap().is_some() {
                let _ = child.kill();
                let mut said = String::new();
                let _ = std::io::Read::read_to_string(&mut child.stderr.take().unwrap(), &mut said);
                let free = rustix::fs::statvfs(&at).unwrap();
                panic!("{what}, with {} KiB free: {said}", (free.f_bfree * free.f_frsize) >> 10);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    };
    let promises = || model.promises.load(SeqCst);
    wait("nothing is promised", 20, &mut || promises() > 20);
    // Somebody else takes all the room that there is.
    let mut ballast = std::fs::File::create(at.join("ballast")).unwrap();
    let mut seen = (promises(), Instant::now());
    wait("writes go on without room", 60, &mut || {
        while ballast.write_all(&[7; 64 << 10]).is_ok() {}
        while ballast.write_all(&[7; 512]).is_ok() {}
        if promises() != seen.0 {
            seen = (promises(), Instant::now());
        }
        seen.1.elapsed() > Duration::from_secs(1)
    });
    task.run("full::a_child_makes_room").unwrap();
    let before = promises();
    wait("writes do not go on", 20, &mut || promises() > before + 20);
    child.kill().unwrap();
    child.wait().unwrap();
    check(&task.store, &model).unwrap();
    drop(ballast);
    disk.end();
}
