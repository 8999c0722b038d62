//! Operations of the host that fail, and bits that flip.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::SeqCst;
use std::time::{Duration, Instant};

use polder_store::{Content, StoreError, Volume, VolumeOptions};

use super::child::Task;
use super::model::Shared;
use super::power_disk::{Call, Faults, PowerDisk};
use super::random::{Random, nightly};
use super::workload::{explain, open_store, options, work_on_every_file};

/// Everything that is read of a store: the volume, and its clone.
fn read_all(folder: &Path) -> Result<Vec<Vec<u8>>, StoreError> {
    let store = open_store(folder)?;
    let mut contents = Vec::new();
    for name in ["disk", "clone"] {
        let volume = Volume::open(&store, name, options())?;
        let mut bytes = vec![0; volume.capacity_bytes() as usize];
        volume.read_at(0, &mut bytes)?;
        contents.push(bytes);
    }
    Ok(contents)
}

fn files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => files(&path, found),
            false => found.push(path),
        }
    }
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        match path.is_dir() {
            true => copy(&path, &target),
            false if path.is_file() => drop(std::fs::copy(&path, &target).unwrap()),
            false => {}
        }
    }
}

#[test]
fn a_flipped_bit_in_any_file_is_named_or_harmless() {
    let seed = Random::seed();
    let mut random = Random::new(seed);
    let folder = tempfile::tempdir().unwrap();
    let original = folder.path().join("original");
    {
        let store = open_store(&original).unwrap();
        store.create_volume("disk", &Content::Zeros { capacity_bytes: 4 << 20, chunk_len: 4096 }).unwrap();
        let volume = Volume::open(&store, "disk", options()).unwrap();
        // Many small segments, so that their tables are merged into runs.
        for round in 0..20 {
            let bytes: Vec<u8> = (0..40_960).map(|_| random.next() as u8).collect();
            volume.write_at(round * 40_960, &bytes).unwrap();
            volume.compact().unwrap();
            store.seal().unwrap();
        }
        volume.snapshot("one").unwrap();
        volume.compact().unwrap();
        let snapshot = store.snapshot("disk", "one").unwrap();
        store.create_volume("clone", &Content::Snapshot(&snapshot)).unwrap();
        drop(Volume::open(&store, "clone", options()).unwrap());
        for round in 0..6 {
            volume.write_at(round * 81_920, &vec![round as u8 + 1; 8192]).unwrap();
            volume.flush().unwrap();
        }
        // The flush before the last record promised all but that.
        volume.write_at(4096, &[7; 4096]).unwrap();
        volume.flush().unwrap();
        volume.write_at(4096, &[7; 4096]).unwrap();
        copy(&original, &folder.path().join("crashed"));
    }
    let crashed = folder.path().join("crashed");
    let expected = {
        let copied = folder.path().join("expected");
        copy(&crashed, &copied);
        read_all(&copied).unwrap()
    };
    let mut all = Vec::new();
    files(&crashed, &mut all);
    all.retain(|path| !path.file_name().unwrap().to_string_lossy().starts_with("catalog"));
    let (mut named, mut harmless) = (0, 0);
    for turn in 0..if nightly() { 5000 } else { 60 } {
        let path = &all[random.below(all.len() as u64) as usize];
        let len = std::fs::metadata(path).unwrap().len();
        if len == 0 {
            continue;
        }
        // Files of the log are long and mostly empty.
        let bit = random.below(len.min(300_000) * 8);
        let copied = folder.path().join("flipped");
        let _ = std::fs::remove_dir_all(&copied);
        copy(&crashed, &copied);
        let flipped = copied.join(path.strip_prefix(&crashed).unwrap());
        let file = std::fs::File::options().read(true).write(true).open(&flipped).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, bit / 8).unwrap();
        file.write_all_at(&[byte[0] ^ 1 << (bit % 8)], bit / 8).unwrap();
        match read_all(&copied) {
            Ok(found) => {
                assert!(
                    found == expected,
                    "turn {turn} of seed {seed}: bit {bit} of {} changes what is read",
                    path.display()
                );
                harmless += 1;
            }
            Err(_) => named += 1,
        }
    }
    println!("{named} named, {harmless} harmless");
    assert!(harmless > 0);
}

/// As after a sync that the host's disk refused: what was written since the last one is gone, whatever the host's cache says.
#[test]
fn nothing_that_was_promised_is_lost_when_syncs_fail() {
    let seed = Random::seed();
    let mut random = Random::new(seed);
    let folder = tempfile::tempdir().unwrap();
    let model = Shared::open(&folder.path().join("model"));
    let task = |mounted: &PowerDisk, seed| Task::new(mounted.path(), folder.path().join("model"), seed).that_may_fail();
    let Some(mounted) = PowerDisk::new() else { return };
    task(&mounted, 0).run("power::a_child_makes_a_store").unwrap();
    let mut disk = mounted.disk().clone();
    drop(mounted);
    for turn in 0..if nightly() { 1000 } else { 16 } {
        let Some(mounted) = PowerDisk::mount(disk) else { panic!("it was mounted before") };
        let of = ["log-", ".open", "head", "catalog.db-wal"][turn % 4];
        {
            let mut disk = mounted.disk();
            let from = disk.changes + random.below(2000);
            disk.faults = Faults { syncs_of: Some(of), from, ..Faults::default() };
            // Not every kind of file is synced soon.
            disk.cut_at = from + 3000;
        }
        if let Err(what) = task(&mounted, random.next()).run("killed::a_child_works_until_it_is_killed") {
            panic!("turn {turn} of seed {seed}, {of}: {what}");
        }
        {
            let mut disk = mounted.disk();
            (disk.faults, disk.cut, disk.cut_at) = (Faults::default(), false, u64::MAX);
        }
        // The same host goes on, with its cache; or another.
        let again = match turn % 2 {
            0 => mounted,
            _ => {
                let after = mounted.disk().after_power_loss(&mut random);
                drop(mounted);
                let Some(mounted) = PowerDisk::mount(after) else { panic!("it was mounted before") };
                mounted
            }
        };
        if let Err(what) = task(&again, 0).run("power::a_child_checks_a_store") {
            panic!("after turn {turn} of seed {seed}, {of}: {what}");
        }
        disk = again.disk().clone();
    }
    let promises = model.promises.load(SeqCst);
    assert!(promises > 20, "{promises} promises");
}

/// Goes on until something fails, or everything was done.
#[test]
#[ignore = "other tests run it as a process of its own"]
fn a_child_says_what_failed() {
    let Some(task) = Task::of_this_process() else { return };
    let model = Shared::open(&task.model);
    let done = (|| {
        let store = open_store(&task.store)?;
        let volume = Volume::open(&store, "disk", options())?;
        volume.read_at(0, &mut vec![0; volume.capacity_bytes() as usize])?;
        work_on_every_file(&store, &volume, &model, task.seed)?;
        volume.close()?;
        store.seal()
    })();
    let said = done.err().map(|error| explain(&error)).unwrap_or_default();
    std::fs::write(&task.outside, said).unwrap();
}

/// A disk with a bad place, or a cable that was loose for a moment: one read or write fails, and the next one does not.
#[test]
fn one_read_or_write_that_fails_is_named_loses_nothing_and_does_not_fail_again() {
    let seed = Random::seed();
    let mut random = Random::new(seed);
    let folder = tempfile::tempdir().unwrap();
    let (model, said) = (folder.path().join("model"), folder.path().join("said"));
    let Some(mounted) = PowerDisk::new() else { return };
    Task::new(mounted.path(), &model, 0).run("power::a_child_makes_a_store").unwrap();
    let mut disk = mounted.disk().clone();
    drop(mounted);
    let mut failed = std::collections::BTreeMap::new();
    // The word of a file's name by which an error says which it is, and what else it may say.
    let kinds: [(&str, &[&str]); 7] = [
        ("log-", &["/log-"]),
        ("head", &["/head"]),
        (".open", &["/segments/", ".open"]),
        (".seg", &["/segments/"]),
        (".run", &["/index"]),
        (".making", &["/index"]),
        ("catalog.db", &["catalog"]),
    ];
    for turn in 0..if nightly() { 600 } else { 42 } {
        let (of, names) = kinds[turn % kinds.len()];
        let call = [Call::Write, Call::Read][turn / kinds.len() % 2];
        // The first few now and then: a store that is opened reads and writes little.
        let before = random.below([3, 40][turn / 2 / kinds.len() % 2]);
        // Nothing is in the host's cache when a file system is mounted anew.
        let Some(mounted) = PowerDisk::mount(disk) else { panic!("it was mounted before") };
        mounted.disk().faults = Faults { once: Some((call, of, before)), ..Faults::default() };
        let task = Task { outside: said.clone(), ..Task::new(mounted.path(), &model, random.next()) };
        let what = format!("turn {turn} of seed {seed}, {call:?} {before} of {of}");
        task.run("faults::a_child_says_what_failed").unwrap_or_else(|said| panic!("{what}: {said}"));
        let said = std::fs::read_to_string(&said).unwrap();
        let faults = std::mem::take(&mut mounted.disk().faults);
        match faults.failed {
            Some(file) => {
                *failed.entry((of, call == Call::Read)).or_insert(0) += 1;
                println!("{call:?} of {file}: {said}");
                // What can be done again, or without, may have been.
                // The last write of a head only says that the log is empty: without it the volume keeps its log.
                let must_say = call == Call::Write && of == "log-";
                let named = names.iter().any(|name| said.contains(name));
                assert!(named || said.is_empty() && !must_say, "{what}, {file}: {said}");
            }
            None => assert_eq!(said, "", "{what}: nothing failed"),
        }
        // The same host goes on, with what it has in its cache, or another does.
        let again = match turn / 3 % 2 {
            0 => mounted,
            _ => {
                let after = mounted.disk().after_power_loss(&mut random);
                drop(mounted);
                let Some(mounted) = PowerDisk::mount(after) else { panic!("it was mounted before") };
                mounted
            }
        };
        let task = Task::new(again.path(), &model, 0);
        task.run("power::a_child_checks_a_store").unwrap_or_else(|said| panic!("after {what}: {said}"));
        disk = again.disk().clone();
    }
    println!("failed, by file and whether it was a read: {failed:?}");
    assert!(failed.len() >= 8, "{failed:?}");
}

/// Longest that a flush may take beside a disk that does nothing for segments, on a busy host.
const FLUSH_BUDGET: Duration = Duration::from_secs(2);

#[test]
#[ignore = "other tests run it as a process of its own"]
fn a_child_flushes_beside_segments_that_are_stuck() {
    let Some(task) = Task::of_this_process() else { return };
    let model = Shared::open(&task.model);
    let store = open_store(&task.store).unwrap();
    // Writers wait once the log has that much, which they must not before everything was measured.
    let options = VolumeOptions { log_bytes_max: 1 << 30, log_bytes_start: 1, ..options() };
    let volume = Volume::open(&store, "disk", options).unwrap();
    let mut longest = Duration::ZERO;
    let mut bytes = vec![0; 64 << 10];
    let mut random = Random::new(task.seed);
    let mut flush = |round: u64| {
        bytes.fill_with(|| random.next() as u8);
        volume.write_at(round % 40 * bytes.len() as u64, &bytes).unwrap();
        let begin = Instant::now();
        volume.flush().unwrap();
        longest = longest.max(begin.elapsed());
        model.promises.fetch_add(1, SeqCst);
    };
    let mut round = 0;
    // The parent says when it saw enough, in a place of the model that is its own here.
    while model.size_asked.load(SeqCst) == 0 {
        flush(round);
        round += 1;
    }
    std::fs::write(&task.outside, longest.as_millis().to_string()).unwrap();
    volume.close().unwrap();
}

#[test]
fn segments_that_are_stuck_delay_no_flush() {
    let folder = tempfile::tempdir().unwrap();
    let model = Shared::open(&folder.path().join("model"));
    let Some(mounted) = PowerDisk::new() else { return };
    let said = folder.path().join("said");
    let task = Task { outside: said.clone(), ..Task::new(mounted.path(), folder.path().join("model"), Random::seed()) };
    task.run("power::a_child_makes_a_store").unwrap();
    model.size_asked.store(0, SeqCst);
    mounted.disk().faults.stuck = Some(".open");
    let mut child = task.start("faults::a_child_flushes_beside_segments_that_are_stuck");
    let wait = |what: &str, until: &dyn Fn() -> bool| {
        let begin = Instant::now();
        while !until() {
            assert!(begin.elapsed() < Duration::from_secs(30), "{what}");
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    wait("nothing is moved into a segment", &|| mounted.disk().faults.held);
    let from = model.promises.load(SeqCst);
    // More than several files of the log.
    wait("flushes end", &|| model.promises.load(SeqCst) >= from + 120);
    model.size_asked.store(1, SeqCst);
    wait("the child says how long they took", &|| said.exists());
    assert_eq!(child.try_wait().unwrap(), None, "the volume was closed with what could not be moved");
    mounted.disk().faults.stuck = None;
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let longest = Duration::from_millis(std::fs::read_to_string(&said).unwrap().parse().unwrap());
    println!("the longest flush took {longest:?}");
    assert!(longest < FLUSH_BUDGET, "{longest:?}");
}
