//! A disk whose host file does not answer keeps nobody from ending the machine.

use std::fs::{DirEntry, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use polder_tests::{Kernel, Outcome, Scratch, can_open, inside_namespaces, polder};
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

use crate::held_file::HeldFile;

const MIB: u64 = 1 << 20;
const BOOT_LIMIT: Duration = Duration::from_secs(60);
/// Less than a second on a machine with nothing else to do; 90 seconds if the disk is waited for.
const END_LIMIT: Duration = Duration::from_secs(8);

/// What a guest asks of its disk that is not answered.
const READS: &str = "dd if=/dev/vda of=/dev/null bs=64k skip=16 count=1 iflag=direct";
const FLUSHES: &str = "dd if=/dev/zero of=/dev/vda bs=64k seek=16 count=1 oflag=direct conv=fsync";

/// Enough of both for a volume's log to reach the part that is not answered.
const WRITES: &str = "dd if=/dev/zero of=/dev/vda bs=64k count=80 oflag=direct conv=fsync";

/// A file of which a part is neither read nor written until the test is over.
struct Silent {
    /// What a machine is given: the file or a block device over it, and `,ro`.
    disk: String,
    /// Which of both its guest does.
    asks: &'static str,
    held: Arc<AtomicUsize>,
    over: Arc<AtomicBool>,
    scratch: Scratch,
}

impl Silent {
    fn new() -> Self {
        Self::holding(MIB..7 * MIB)
    }

    /// A file of which those bytes are held.
    fn holding(held_bytes: std::ops::Range<u64>) -> Self {
        let scratch = Scratch::new();
        let (held, over) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let (count, ended) = (held.clone(), over.clone());
        let path = HeldFile { len: 8 * MIB, held: held_bytes }.mount(&scratch.path().join("silent.raw"), move |held| {
            count.store(held, Ordering::SeqCst);
            ended.load(Ordering::SeqCst)
        });
        Silent { disk: format!("{},ro", path.display()), asks: READS, held, over, scratch }
    }

    /// The file as a block device of this host, which is nothing that polder could know to be slow. Nothing where the host has none.
    fn behind_a_block_device(asks: &'static str) -> Option<Self> {
        // What follows a log's end is looked at when the volume is opened: two MiB.
        let mut silent = if asks == WRITES { Self::holding(3 * MIB..7 * MIB) } else { Self::new() };
        let file = silent.scratch.path().join("silent.raw");
        let made = Command::new("/sbin/losetup").args(["--find", "--show"]).arg(file).output();
        let Some(made) = made.ok().filter(|made| made.status.success()) else {
            eprintln!("left out: the host gave no loop device");
            return None;
        };
        let access = if asks == READS { ",ro" } else { "" };
        silent.disk = format!("{}{access}", String::from_utf8_lossy(&made.stdout).trim());
        silent.asks = asks;
        Some(silent)
    }

    /// Boots a guest that asks what is not answered, and comes back when it does.
    fn boot(&self, options: &[&str], input: impl Into<Stdio>) -> Child {
        let before = self.held.load(Ordering::SeqCst);
        let mut child = Command::new(polder())
            .args(["boot", "--engine", "software", "--memory", "256M", "--kernel"])
            .arg(Kernel::Cloud.image())
            .arg("--initrd")
            .arg(Kernel::Cloud.initramfs())
            .args(["--append", &self.command_line()])
            .arg("--disk")
            .arg(&self.disk)
            .args(options)
            .stdin(input)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("polder starts");
        let lines = BufReader::new(child.stdout.as_mut().expect("it is a pipe")).lines();
        assert!(lines.map_while(Result::ok).any(|line| line.contains("POLDER-GUEST READY")), "the guest boots");
        self.wait_until_asked(before);
        child
    }

    /// Has the kernel's guest ask, and sleep.
    fn command_line(&self) -> String {
        format!("console=ttyS0 quiet panic=-1 polder_run=\"{} & sleep 1000\"", self.asks)
    }

    /// Waits until more is held than before.
    fn wait_until_asked(&self, before: usize) {
        let end = Instant::now() + BOOT_LIMIT;
        while self.held.load(Ordering::SeqCst) <= before {
            assert!(Instant::now() < end, "the guest asks nothing of its disk");
            std::thread::park_timeout(Duration::from_millis(5));
        }
    }

    /// Answers, and waits until no process has it as a disk: what the host's kernel would not let go ends with the answer.
    fn is_left_by_all(&self) {
        self.over.store(true, Ordering::SeqCst);
        self.wait_for_processes();
    }

    /// Kills every process that has this as a disk.
    fn kill_all(&self) {
        for pid in self.processes() {
            kill_process(pid, Signal::KILL).expect("a process of ours can be signalled");
        }
        self.wait_for_processes();
    }

    fn wait_for_processes(&self) {
        let end = Instant::now() + BOOT_LIMIT;
        while !self.processes().is_empty() {
            assert!(Instant::now() < end, "a process is left in {}", self.scratch.path().display());
            std::thread::park_timeout(Duration::from_millis(20));
        }
    }

    /// Processes that have this as a disk: they name it, or are of a state folder beside the file.
    fn processes(&self) -> Vec<Pid> {
        let folder = self.scratch.path().to_string_lossy().into_owned();
        let entries = std::fs::read_dir("/proc").expect("/proc is there").flatten();
        let names = |path: PathBuf, what: &str| std::fs::read(path).is_ok_and(|line| contains(&line, what.as_bytes()));
        let uses = |path: PathBuf| {
            names(path.join("cmdline"), &self.disk) || names(path.join("environ"), &format!("POLDER_HOME={folder}"))
        };
        let pid = |entry: DirEntry| Pid::from_raw(entry.file_name().to_str()?.parse().ok()?);
        entries.filter(|entry| uses(entry.path())).filter_map(pid).collect()
    }
}

impl Drop for Silent {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
        if self.disk.starts_with("/dev") {
            let device = self.disk.split(',').next().unwrap_or_default();
            let _ = Command::new("/sbin/losetup").args(["--detach", device]).status();
        }
        // A folder with a file that is mounted cannot be removed.
        let _ = unmount(self.scratch.path().join("silent.raw"), UnmountFlags::DETACH);
    }
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

/// Waits for the process and for all it wrote; its status and its errors.
fn ended(mut child: Child, since: Instant, limit: Duration) -> (Option<i32>, String) {
    let status = child.wait().expect("a child can be waited for");
    let (mut console, mut errors) = (Vec::new(), String::new());
    let read = |from: Option<&mut dyn Read>, to: &mut Vec<u8>| from.map(|from| from.read_to_end(to));
    read(child.stdout.as_mut().map(|from| from as &mut dyn Read), &mut console);
    let mut bytes = Vec::new();
    read(child.stderr.as_mut().map(|from| from as &mut dyn Read), &mut bytes);
    errors.push_str(&String::from_utf8_lossy(&bytes));
    assert!(since.elapsed() < limit, "the machine ended after {:?}: {errors}", since.elapsed());
    (status.code(), errors)
}

#[test]
fn a_machine_ends_though_its_disk_does_not_answer() {
    if !can_open("/dev/fuse") || !inside_namespaces("silent_disk::a_machine_ends_though_its_disk_does_not_answer") {
        return;
    }
    let silent = Silent::new();
    every_order_ends_a_machine(|| &silent);
    silent.is_left_by_all();
}

/// Its I/O goes by io_uring. A read that was asked for can be left; the host's kernel holds who waits for a flush.
#[test]
fn a_machine_ends_though_a_block_device_of_the_host_does_not_answer() {
    let test = "silent_disk::a_machine_ends_though_a_block_device_of_the_host_does_not_answer";
    if !can_open("/dev/fuse") || !can_open("/dev/loop-control") || !inside_namespaces(test) {
        return;
    }
    for asks in [READS, FLUSHES] {
        // A loop device asks one thing after the other: each machine has one of its own.
        let silent: Option<Vec<Silent>> = (0..ORDERS).map(|_| Silent::behind_a_block_device(asks)).collect();
        let Some(silent) = silent else { return };
        let mut next = silent.iter().cycle();
        every_order_ends_a_machine(|| next.next().expect("there are some"));
        silent.iter().for_each(Silent::is_left_by_all);
    }
}

/// How many machines are ended.
const ORDERS: usize = 3;

/// Ends a machine in each way, each on the next disk.
fn every_order_ends_a_machine<'a>(mut silent: impl FnMut() -> &'a Silent) {
    let child = silent().boot(&[], Stdio::piped());
    let start = Instant::now();
    kill_process(Pid::from_child(&child), Signal::TERM).expect("a child can be signalled");
    let (status, errors) = ended(child, start, END_LIMIT);
    assert_eq!(status, Some(1), "{errors}");
    assert!(errors.contains("stopped by SIGTERM") && errors.contains("does not answer a disk"), "{errors}");

    let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("the host has pseudo-terminals");
    grantpt(&ours).and_then(|()| unlockpt(&ours)).expect("a pseudo-terminal can be unlocked");
    let name = ptsname(&ours, Vec::new()).expect("a pseudo-terminal has a name").into_string().expect("it is text");
    let theirs = File::options().read(true).write(true).open(name).expect("the terminal opens");
    let child = silent().boot(&[], theirs);
    let start = Instant::now();
    File::from(ours.try_clone().expect("a descriptor can be copied")).write_all(b"\x01x").expect("it takes keys");
    let (status, errors) = ended(child, start, END_LIMIT);
    assert_eq!(status, Some(1), "{errors}");
    assert!(errors.contains("stopped by Ctrl-A x"), "{errors}");

    let start = Instant::now();
    let timeout = Duration::from_secs(20);
    let child = silent().boot(&["--timeout", &timeout.as_secs().to_string()], Stdio::piped());
    let (status, errors) = ended(child, start, timeout + END_LIMIT);
    assert_eq!(status, Some(124), "{errors}");
}

/// The instance is started once with its own disk and killed, so that its volume keeps a log; then its process is started with a silent
/// file in the place of that log.
#[test]
fn polder_stop_ends_though_the_disk_of_the_instance_does_not_answer() {
    let test = "silent_disk::polder_stop_ends_though_the_disk_of_the_instance_does_not_answer";
    if !can_open("/dev/fuse") || !can_open("/dev/loop-control") || !inside_namespaces(test) {
        return;
    }
    let Some(silent) = Silent::behind_a_block_device(WRITES) else { return };
    let home = silent.scratch.path().join("home");
    let image = home.join("images/tiny");
    std::fs::create_dir_all(&image).expect("the scratch folder can be written");
    std::fs::copy(Kernel::Cloud.image(), image.join("kernel")).expect("the kernel is there");
    std::fs::copy(Kernel::Cloud.initramfs(), image.join("initrd")).expect("the initramfs is there");
    std::fs::write(image.join("disk.raw"), vec![0; 8 << 20]).expect("the scratch folder can be written");
    let record = serde_json::json!({
        "format": 1, "name": "tiny", "created_utc": "2026-01-01T00:00:00Z", "kernel_package": "none",
        "root_disk_bytes": 8 << 20, "command_line": silent.command_line(),
    });
    std::fs::write(image.join("image.json"), record.to_string()).expect("the scratch folder can be written");
    let command = |arguments: &[&str]| {
        let mut command = Command::new(polder());
        command.args(arguments).env("POLDER_HOME", &home);
        command
    };
    Outcome::of(&mut command(&["run", "-d", "--name", "web", "tiny"]), BOOT_LIMIT).expect_status(0);
    silent.kill_all();

    let volumes = std::fs::read_dir(home.join("store/volumes")).expect("the instance has a volume");
    let volume = volumes.map(|entry| entry.expect("the folder can be read").path()).next().expect("there is one");
    let log = volume.join("log-00000001");
    let header = std::fs::read(&log).expect("the volume has a log");
    let device = File::options().write(true).open(&silent.disk).expect("the block device can be written");
    std::os::unix::fs::FileExt::write_all_at(&device, &header[..4096], 0).expect("the block device can be written");
    std::fs::remove_file(&log).expect("the log can be removed");
    std::os::unix::fs::symlink(&silent.disk, &log).expect("a link can be made");
    // Its sockets were left where they were; `polder start` would make the folder anew.
    for socket in ["console", "control", "vsock"] {
        std::fs::remove_file(home.join("instances/web").join(socket)).expect("a machine has sockets");
    }
    let mut machine = command(&["machine-process", "web"]);
    let mut machine = machine.stdin(Stdio::null()).stdout(Stdio::null()).spawn().expect("polder starts");
    silent.wait_until_asked(0);
    let start = Instant::now();
    Outcome::of(&mut command(&["stop", "--timeout", "0", "web"]), BOOT_LIMIT).expect_status(0);
    assert!(start.elapsed() < END_LIMIT, "{:?}", start.elapsed());
    let listed = Outcome::of(&mut command(&["ps"]), BOOT_LIMIT);
    listed.expect_status(0).expect_console("inactive (stopped)");
    machine.wait().expect("a child can be waited for");
    assert!(start.elapsed() < END_LIMIT, "{:?}", start.elapsed());
    silent.is_left_by_all();
}
