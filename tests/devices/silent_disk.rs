//! A disk whose host file does not answer keeps nobody from ending the machine.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use polder_tests::{Kernel, Scratch, can_open, inside_namespaces, polder};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};

use crate::held_file::HeldFile;

const MIB: u64 = 1 << 20;
const BOOT_LIMIT: Duration = Duration::from_secs(60);
/// Less than a second on a machine with nothing else to do; 90 seconds if the disk is waited for.
const END_LIMIT: Duration = Duration::from_secs(8);

/// A file of which a part is not read until the test is over.
struct Silent {
    path: PathBuf,
    reads: Arc<AtomicUsize>,
    over: Arc<AtomicBool>,
    scratch: Scratch,
}

impl Silent {
    fn new() -> Self {
        let scratch = Scratch::new();
        let (reads, over) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let (count, ended) = (reads.clone(), over.clone());
        let path =
            HeldFile { len: 8 * MIB, held: MIB..7 * MIB }.mount(&scratch.path().join("silent.raw"), move |held| {
                count.store(held, Ordering::SeqCst);
                ended.load(Ordering::SeqCst)
            });
        Silent { path, reads, over, scratch }
    }

    /// Boots a guest that reads what is not answered, and comes back when it does.
    fn boot(&self, options: &[&str], input: impl Into<Stdio>) -> Child {
        let script = "dd if=/dev/vda of=/dev/null bs=64k skip=16 count=1 iflag=direct & sleep 1000";
        let before = self.reads.load(Ordering::SeqCst);
        let mut child = Command::new(polder())
            .args(["boot", "--engine", "software", "--memory", "256M", "--kernel"])
            .arg(Kernel::Cloud.image())
            .arg("--initrd")
            .arg(Kernel::Cloud.initramfs())
            .args(["--append", &format!("console=ttyS0 quiet panic=-1 polder_run=\"{script}\"")])
            .arg("--disk")
            .arg(format!("{},ro", self.path.display()))
            .args(options)
            .stdin(input)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("polder starts");
        let lines = BufReader::new(child.stdout.as_mut().expect("it is a pipe")).lines();
        assert!(lines.map_while(Result::ok).any(|line| line.contains("POLDER-GUEST READY")), "the guest boots");
        let end = Instant::now() + BOOT_LIMIT;
        while self.reads.load(Ordering::SeqCst) == before {
            assert!(Instant::now() < end, "the guest does not read its disk");
            std::thread::park_timeout(Duration::from_millis(5));
        }
        child
    }

    /// Processes that have this file as a disk.
    fn processes(&self) -> usize {
        let disk = format!("{},ro", self.path.display());
        let entries = std::fs::read_dir("/proc").expect("/proc is there").flatten();
        let uses =
            |path: PathBuf| std::fs::read(path.join("cmdline")).is_ok_and(|line| contains(&line, disk.as_bytes()));
        entries.filter(|entry| uses(entry.path())).count()
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

    let child = silent.boot(&[], Stdio::piped());
    let start = Instant::now();
    kill_process(Pid::from_child(&child), Signal::TERM).expect("a child can be signalled");
    let (status, errors) = ended(child, start, END_LIMIT);
    assert_eq!(status, Some(1), "{errors}");
    assert!(errors.contains("stopped by SIGTERM"), "{errors}");

    let ours = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("the host has pseudo-terminals");
    grantpt(&ours).and_then(|()| unlockpt(&ours)).expect("a pseudo-terminal can be unlocked");
    let name = ptsname(&ours, Vec::new()).expect("a pseudo-terminal has a name").into_string().expect("it is text");
    let theirs = File::options().read(true).write(true).open(name).expect("the terminal opens");
    let child = silent.boot(&[], theirs);
    let start = Instant::now();
    File::from(ours.try_clone().expect("a descriptor can be copied")).write_all(b"\x01x").expect("it takes keys");
    let (status, errors) = ended(child, start, END_LIMIT);
    assert_eq!(status, Some(1), "{errors}");
    assert!(errors.contains("stopped by Ctrl-A x"), "{errors}");

    let start = Instant::now();
    let child = silent.boot(&["--timeout", "10"], Stdio::piped());
    let (status, errors) = ended(child, start, Duration::from_secs(10) + END_LIMIT);
    assert_eq!(status, Some(124), "{errors}");

    // What the host's kernel would not let go ends with the answer.
    silent.over.store(true, Ordering::SeqCst);
    let end = Instant::now() + BOOT_LIMIT;
    while silent.processes() > 0 {
        assert!(Instant::now() < end, "a process is left in {}", silent.scratch.path().display());
        std::thread::park_timeout(Duration::from_millis(20));
    }
}
