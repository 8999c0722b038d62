//! A file system and applications on a volume: ext4 of the host, a database, and files that are written and renamed as careful programs
//! do it.
//!
//! Everything that the store does to its files meanwhile goes to a [`Disk`], which is kept as it was right before each sync:
//! between two syncs anything can be lost, and the most is right before the second. Afterwards the power is cut at each of those
//! moments, once with all lost that was not synced and otherwise with parts of it; the store recovers, the host mounts what the volume
//! holds then, and the applications look for what they had been promised.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use polder_store::{CollectOptions, Content, Volume};
use rusqlite::Connection;

use super::child::Task;
use super::fuse::{Mount, unmount};
use super::host::{LoopMount, can_mount_files, make_ext4, run};
use super::mapped::{Mapped, Shareable};
use super::power_disk::{Disk, PowerDisk};
use super::random::{Random, nightly};
use super::volume_file::{NAME, VolumeFile};
use super::workload::{open_store, options};

const CAPACITY_BYTES: u64 = 24 << 20;
/// Files that are written in turn.
const FILES: u64 = 4;

/// Rounds that each application was promised.
#[repr(C)]
pub struct Promises {
    database: AtomicU64,
    files: AtomicU64,
    lines: AtomicU64,
}

// SAFETY: everything in it is atomic.
unsafe impl Shareable for Promises {}

#[derive(Debug, Clone, Copy)]
struct Promised {
    database: u64,
    files: u64,
    lines: u64,
}

impl Promises {
    fn now(&self) -> Promised {
        let [database, files, lines] = [&self.database, &self.files, &self.lines].map(|at| at.load(SeqCst));
        Promised { database, files, lines }
    }
}

/// What a round writes: bytes that say which round it is, to the last.
fn content(round: u64) -> Vec<u8> {
    let mut random = Random::new(round);
    let words = 8 + random.below(4000);
    [round, words].into_iter().chain((0..words).map(|_| random.next())).flat_map(u64::to_le_bytes).collect()
}

/// The round whose content this is.
fn round_of(bytes: &[u8]) -> Result<u64, String> {
    let round = bytes.first_chunk().map(|first| u64::from_le_bytes(*first));
    let round = round.ok_or_else(|| format!("{} bytes", bytes.len()))?;
    match content(round) == bytes {
        true => Ok(round),
        false => Err(format!("it begins as round {round}, and is not what that wrote")),
    }
}

/// The applications, one round after the other. Told is what they were promised: after each call that promises.
fn work_in(folder: &Path, promises: &Promises, rounds: u64) {
    let database = Connection::open(folder.join("database")).unwrap();
    // With less a journal that was removed can come back, and take the last round with it.
    database.pragma_update(None, "synchronous", "EXTRA").unwrap();
    database.execute_batch("CREATE TABLE IF NOT EXISTS round (number INTEGER PRIMARY KEY, content BLOB)").unwrap();
    let mut lines = File::options().create(true).append(true).open(folder.join("lines")).unwrap();
    let names = File::open(folder).unwrap();
    names.sync_all().unwrap();
    for round in 1..=rounds {
        // Half with a journal that is removed, half with one that is written ahead: the two ways of a database.
        if round == rounds / 2 {
            database.pragma_update(None, "journal_mode", "WAL").unwrap();
        }
        database.execute("INSERT INTO round VALUES (?1, ?2)", (round, content(round))).unwrap();
        promises.database.store(round, SeqCst);

        let new = folder.join("new");
        let mut file = File::create(&new).unwrap();
        file.write_all(&content(round)).unwrap();
        file.sync_all().unwrap();
        std::fs::rename(&new, folder.join(format!("file-{}", round % FILES))).unwrap();
        names.sync_all().unwrap();
        promises.files.store(round, SeqCst);

        writeln!(lines, "{round}").unwrap();
        lines.sync_data().unwrap();
        promises.lines.store(round, SeqCst);

        // What nobody is promised: written over, cut off and removed while the rest goes on.
        let idle = File::options().create(true).truncate(false).write(true).open(folder.join("idle")).unwrap();
        idle.write_all_at(&content(round), round * 8192 % (1 << 20)).unwrap();
        if round % 3 == 0 {
            idle.set_len(4096).unwrap();
            let _ = std::fs::remove_dir_all(folder.join("folder"));
            std::fs::create_dir_all(folder.join("folder/in/a/folder")).unwrap();
        }
    }
}

/// Looks for what the applications were promised.
fn check_in(folder: &Path, promised: Promised) -> Result<(), String> {
    let text = |error: rusqlite::Error| format!("the database: {error}");
    let database = Connection::open(folder.join("database")).map_err(text)?;
    let whole: String = database.query_row("PRAGMA integrity_check", [], |row| row.get(0)).map_err(text)?;
    if whole != "ok" {
        return Err(format!("the database: {whole}"));
    }
    if promised.database > 0 {
        let mut rows = database.prepare("SELECT number, content FROM round ORDER BY number").map_err(text)?;
        let rows = rows.query_map([], |row| Ok((row.get(0)?, row.get(1)?))).map_err(text)?;
        let rows: Vec<(u64, Vec<u8>)> = rows.collect::<Result<_, _>>().map_err(text)?;
        let right =
            rows.iter().zip(1..).all(|((round, bytes), expected)| *round == expected && *bytes == content(expected));
        if !right || (rows.len() as u64) < promised.database {
            return Err(format!("the database has {} rounds, right: {right}", rows.len()));
        }
    }
    for file in 0..FILES {
        // The newest round that wrote this file.
        let Some(least) =
            (0..FILES).filter_map(|back| promised.files.checked_sub(back)).find(|round| round % FILES == file)
        else {
            continue;
        };
        if least == 0 {
            continue;
        }
        let bytes =
            std::fs::read(folder.join(format!("file-{file}"))).map_err(|error| format!("file {file}: {error}"))?;
        let round = round_of(&bytes).map_err(|what| format!("file {file}: {what}"))?;
        if round < least || round % FILES != file {
            return Err(format!("file {file} is of round {round}, where {least} was promised"));
        }
    }
    let lines = match promised.lines {
        0 => String::new(),
        _ => std::fs::read_to_string(folder.join("lines")).map_err(|error| format!("the lines: {error}"))?,
    };
    let right = lines.lines().zip(1..).take_while(|(line, round)| *line == round.to_string()).count() as u64;
    match right < promised.lines {
        true => Err(format!("{right} lines are right")),
        false => Ok(()),
    }
}

#[test]
#[ignore = "other tests run it as a process of its own"]
fn a_child_makes_a_volume_for_a_file_system() {
    let Some(task) = Task::of_this_process() else { return };
    let content = Content::Zeros { capacity_bytes: CAPACITY_BYTES, chunk_len: 16_384 };
    open_store(&task.store).unwrap().create_volume("disk", &content).unwrap();
}

/// Serves the volume as a file, until that is unmounted. What upkeep there is goes on beside it.
#[test]
#[ignore = "other tests run it as a process of its own"]
fn a_child_serves_a_volume_as_a_file() {
    let Some(task) = Task::of_this_process() else { return };
    let store = open_store(&task.store).unwrap();
    let volume = Arc::new(Volume::open(&store, "disk", options()).unwrap());
    let mount = Mount::new(&task.outside, Arc::new(VolumeFile(volume.clone()))).unwrap();
    let ended = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for turn in 0.. {
                if ended.load(SeqCst) == 1 {
                    break;
                }
                volume.snapshot(&format!("s{turn}")).unwrap();
                if turn >= 3 {
                    store.remove_snapshot("disk", &format!("s{}", turn - 3)).unwrap();
                }
                store.seal().unwrap();
                let at_once = CollectOptions { bytes_per_second: u64::MAX, ..CollectOptions::default() };
                store.collect(at_once, &mut |_| Ok(())).unwrap();
                std::thread::sleep(Duration::from_millis(100));
            }
        });
        mount.wait();
        ended.store(1, SeqCst);
    });
}

#[test]
#[ignore = "other tests run it as a process of its own"]
fn a_child_works_in_a_file_system() {
    let Some(task) = Task::of_this_process() else { return };
    work_in(&task.outside, &Mapped::open(&task.model), task.seed);
}

#[test]
#[ignore = "other tests run it as a process of its own"]
fn a_child_brings_a_volume_out() {
    let Some(task) = Task::of_this_process() else { return };
    let store = open_store(&task.store).unwrap();
    let volume = Volume::open(&store, "disk", options()).unwrap();
    let file = File::create(&task.outside).unwrap();
    file.set_len(volume.capacity_bytes()).unwrap();
    let mut bytes = vec![0; 64 << 10];
    for offset in (0..volume.capacity_bytes()).step_by(bytes.len()) {
        volume.read_at(offset, &mut bytes).unwrap();
        if bytes.iter().any(|&byte| byte != 0) {
            file.write_all_at(&bytes, offset).unwrap();
        }
    }
    volume.close().unwrap();
    store.seal().unwrap();
    let verified = store.verify(&mut |_| Ok(())).unwrap();
    assert!(verified.damages.is_empty() && verified.lost.is_empty(), "{verified:?}");
}

/// The host's files right before each sync, and what applications had been promised by then.
type Moments = Vec<(Disk, Promised)>;

/// Has applications work in a file system on a volume: what there was before each sync.
fn record(folder: &Path, rounds: u64) -> Option<Moments> {
    let mounted = PowerDisk::new()?;
    let (served, at) = (folder.join("served"), folder.join("mounted"));
    std::fs::create_dir_all(&served).unwrap();
    let promises = folder.join("promises");
    let task = Task { outside: served.clone(), ..Task::new(mounted.path(), &promises, rounds) };
    task.run("file_system::a_child_makes_a_volume_for_a_file_system").unwrap();
    let server = task.start("file_system::a_child_serves_a_volume_as_a_file");
    let begin = Instant::now();
    let file = served.join(NAME);
    while !file.exists() {
        assert!(begin.elapsed() < Duration::from_secs(20), "the volume is not served");
        std::thread::sleep(Duration::from_millis(2));
    }
    let worked = (|| {
        make_ext4(&file)?;
        let mount = LoopMount::new(&file, &at)?;
        run("sync", &["-f", at.to_str().unwrap()])?;
        let moments = Arc::new(Mutex::new(Moments::new()));
        let watcher = {
            let (moments, promises) = (moments.clone(), Mapped::<Promises>::open(&promises));
            move |disk: &Disk| {
                let mut moment = disk.clone();
                moment.before_sync = None;
                moments.lock().unwrap().push((moment, promises.now()));
            }
        };
        mounted.disk().before_sync = Some(Arc::new(watcher));
        let worked = Task { outside: at.clone(), ..Task::new(mounted.path(), &promises, rounds) }
            .run("file_system::a_child_works_in_a_file_system");
        mounted.disk().before_sync = None;
        mount.end()?;
        worked.map(|()| std::mem::take(&mut *moments.lock().unwrap()))
    })();
    // Also where something failed, so that nothing stays.
    unmount(&served);
    let output = server.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Some(worked.unwrap())
}

/// Cuts the power, and looks at what is left with the eyes of the host and the applications.
fn check_after_cut(disk: Disk, promised: Promised, folder: &Path) -> Result<(), String> {
    std::fs::create_dir_all(folder).unwrap();
    let raw = folder.join("raw");
    let Some(mounted) = PowerDisk::mount(disk) else { panic!("it was mounted before") };
    Task { outside: raw.clone(), ..Task::new(mounted.path(), folder.join("none"), 0) }
        .run("file_system::a_child_brings_a_volume_out")?;
    drop(mounted);
    // Mounting replays the journal.
    let at = folder.join("mounted");
    let mount = LoopMount::new(&raw, &at)?;
    let checked = check_in(&at, promised);
    mount.end()?;
    run("e2fsck", &["-f", "-n", raw.to_str().unwrap()])?;
    checked
}

#[test]
fn a_file_system_and_its_applications_find_what_they_were_promised_wherever_the_power_goes() {
    let seed = Random::seed();
    let folder = match tempfile::tempdir_in("/dev/shm") {
        Ok(folder) => folder,
        Err(_) => tempfile::tempdir().unwrap(),
    };
    if !can_mount_files() {
        return;
    }
    let (rounds, subsets) = if nightly() { (100, 20) } else { (10, 2) };
    let Some(moments) = record(folder.path(), rounds) else { return };
    let begin = Instant::now();
    let next = AtomicUsize::new(0);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for worker in 0..cores.min(16) {
            let (next, moments, folder) = (&next, &moments, folder.path().join(format!("worker-{worker}")));
            scope.spawn(move || {
                loop {
                    let moment = next.fetch_add(1, SeqCst);
                    let Some((disk, promised)) = moments.get(moment) else { break };
                    for subset in 0..=subsets {
                        let mut random = Random::new(seed ^ (moment as u64) << 32 ^ subset);
                        let left = match subset {
                            0 => disk.with_some_left(0, &mut random),
                            _ => disk.with_some_left(10 + random.below(91), &mut random),
                        };
                        if let Err(what) = check_after_cut(left, *promised, &folder) {
                            panic!("before sync {moment} of seed {seed}, subset {subset}, {promised:?}: {what}");
                        }
                    }
                }
            });
        }
    });
    println!("{} syncs, cut {} times each in {:?}", moments.len(), subsets + 1, begin.elapsed());
    assert!(moments.len() > 30, "{} syncs", moments.len());
    let (_, last) = moments.last().unwrap();
    assert!(last.database + 1 >= rounds && last.files + 1 >= rounds && last.lines + 1 >= rounds, "{last:?}");
}
