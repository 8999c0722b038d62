//! Operations of the host that fail, and bits that flip.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::SeqCst;

use polder_store::{Content, StoreError, Volume};

use super::child::Task;
use super::model::Shared;
use super::power_disk::{Disk, Faults, PowerDisk};
use super::random::{Random, nightly};
use super::workload::{open_store, options};

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
    let task = |mounted: &PowerDisk, seed| Task {
        store: mounted.path(),
        model: folder.path().join("model"),
        seed,
        may_fail: true,
    };
    let Some(mounted) = PowerDisk::mount(Disk::default()) else { return };
    task(&mounted, 0).run("power::a_child_makes_a_store").unwrap();
    let mut disk = mounted.disk().clone();
    drop(mounted);
    for turn in 0..if nightly() { 1000 } else { 16 } {
        let Some(mounted) = PowerDisk::mount(disk) else { panic!("it was mounted before") };
        let of = ["log-", ".open", "head", "catalog.db-wal"][turn % 4];
        {
            let mut disk = mounted.disk();
            let from = disk.changes + random.below(2000);
            disk.faults = Faults { syncs_of: Some(of), from };
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
