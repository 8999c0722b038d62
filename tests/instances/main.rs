//! Promise: an instance has one name, one process and one folder; every command knows its true state, and what was to last as long
//! as its command leaves nothing behind, whoever is killed.
//!
//! The image is the tiny guest `echo`, so these tests are about polder and not about a guest's system; only the balloon needs one
//! that has a driver for it.

use polder_tests::{Kernel, Outcome, Scratch, polder, tiny};
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(60);

/// A state folder with the image `tiny`.
struct Home(Scratch);

impl Home {
    fn new() -> Self {
        let scratch = Scratch::new();
        let image = scratch.path().join("images/tiny");
        std::fs::create_dir_all(&image).unwrap();
        let record = r#"{"format":1,"name":"tiny","created_utc":"2026-01-01T00:00:00Z","kernel_package":"none",
            "command_line":"","root_disk_bytes":1048576}"#;
        std::fs::write(image.join("image.json"), record).unwrap();
        std::fs::copy(tiny("echo"), image.join("kernel")).unwrap();
        std::fs::write(image.join("initrd"), "nothing").unwrap();
        std::fs::write(image.join("disk.raw"), vec![7; 1 << 20]).unwrap();
        Home(scratch)
    }

    /// Puts a stock kernel and the small initramfs, which runs `script`, in the place of the tiny guest.
    fn with_linux(self, script: &str) -> Self {
        let image = self.0.path().join("images/tiny");
        std::fs::copy(Kernel::Cloud.image(), image.join("kernel")).unwrap();
        std::fs::copy(Kernel::Cloud.initramfs(), image.join("initrd")).unwrap();
        let record = std::fs::read_to_string(image.join("image.json")).unwrap();
        let line = format!(r#"console=ttyS0 quiet panic=-1 polder_run=\"{script}\""#);
        let record = record.replace(r#""command_line":"""#, &format!(r#""command_line":"{line}""#));
        std::fs::write(image.join("image.json"), record).unwrap();
        self
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(polder());
        command.args(arguments).env("POLDER_HOME", self.0.path());
        command
    }

    fn polder(&self, arguments: &[&str]) -> Outcome {
        Outcome::of(&mut self.command(arguments), LIMIT)
    }

    fn typing(&self, arguments: &[&str], input: &str) -> Outcome {
        Outcome::of_typing(&mut self.command(arguments), input, LIMIT)
    }

    /// What `polder ps` says below its heading.
    fn listed(&self) -> String {
        let outcome = self.polder(&["ps"]);
        outcome.expect_status(0);
        outcome.console.lines().skip(1).collect::<Vec<_>>().join("\n")
    }

    /// Waits until the list of instances is as it should be.
    #[track_caller]
    fn wait_until(&self, what: &str, holds: impl Fn(&str) -> bool) {
        let end = Instant::now() + LIMIT;
        loop {
            let listed = self.listed();
            if holds(&listed) {
                return;
            }
            assert!(Instant::now() < end, "{what} did not come true; the list is:\n{listed}");
        }
    }

    fn folders(&self) -> Vec<PathBuf> {
        let Ok(entries) = std::fs::read_dir(self.0.path().join("instances")) else { return Vec::new() };
        entries.map(|entry| entry.unwrap().path()).collect()
    }

    /// Starts an instance in the background.
    fn start(&self, name: &str) {
        self.polder(&["run", "tiny", "-d", "--memory", "64M", "--name", name]).expect_status(0).expect_console(name);
    }

    /// The machines' processes: those whose environment names this state folder.
    fn machines(&self) -> Vec<u32> {
        let marker = format!("POLDER_HOME={}", self.0.path().display());
        let processes = std::fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok());
        let pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        pids.filter(|pid: &u32| {
            let read = |file: &str| std::fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
            let has =
                |bytes: Vec<u8>, wanted: &str| bytes.split(|byte| *byte == 0).any(|part| part == wanted.as_bytes());
            has(read("environ"), &marker) && has(read("cmdline"), "machine-process")
        })
        .collect()
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        for pid in self.machines() {
            kill(pid);
        }
    }
}

fn kill(pid: u32) {
    let pid = rustix::process::Pid::from_raw(pid as i32).unwrap();
    // It may have ended by itself meanwhile.
    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
}

fn quiet(command: &mut Command) -> Child {
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

#[test]
fn run_attaches_the_console_and_leaves_nothing_behind() {
    let home = Home::new();
    let outcome = home.typing(&["run", "tiny", "--memory", "64M"], "typed text q");
    outcome.expect_status(0).expect_console("echo ready").expect_console("typed text ");
    assert_eq!(home.listed(), "");
    assert!(home.folders().is_empty() && home.machines().is_empty());
}

#[test]
fn a_panic_of_the_guest_is_the_status() {
    let home = Home::new();
    home.typing(&["run", "tiny", "--memory", "64M"], "c").expect_status(11);
}

#[test]
fn an_instance_in_the_background_lives_until_it_is_removed() {
    let home = Home::new();
    home.start("web");
    assert!(home.listed().contains("active"));
    let console = home.typing(&["console", "web"], "hello q");
    console.expect_status(0).expect_console("echo ready").expect_console("hello ");
    home.wait_until("the end", |listed| listed.contains("inactive (powered off)"));
    let refused = home.polder(&["exec", "web", "--", "true"]);
    refused.expect_status(1);
    assert!(refused.errors.contains("not active"), "{refused}");
    home.polder(&["rm", "web"]).expect_status(0);
    assert_eq!(home.listed(), "");
    assert!(home.folders().is_empty());
}

#[test]
fn a_guest_that_does_not_listen_is_stopped_in_time() {
    let home = Home::new();
    home.start("deaf");
    let refused = home.polder(&["rm", "deaf"]);
    refused.expect_status(1);
    assert!(refused.errors.contains("polder stop deaf"), "{refused}");
    let stopped = home.polder(&["stop", "--timeout", "1", "deaf"]);
    stopped.expect_status(0);
    assert!(stopped.errors.contains("did not switch itself off"), "{stopped}");
    assert!(home.listed().contains("inactive (stopped)"));
    home.polder(&["stop", "deaf"]).expect_status(0);
    home.start("other");
    home.polder(&["rm", "--force", "deaf", "other"]).expect_status(0);
    assert!(home.folders().is_empty() && home.machines().is_empty());
}

#[test]
fn an_instance_in_the_background_outlives_the_terminal_it_was_started_from() {
    let home = Home::new();
    let started = format!("{} run tiny -d --memory 64M --name web", polder().display());
    // The kernel hangs up all processes of the terminal's session when the command, which leads it, has ended.
    let mut terminal = Command::new("script");
    terminal.args(["--quiet", "--return", "--command", &started, "/dev/null"]).env("POLDER_HOME", home.0.path());
    Outcome::of(&mut terminal, LIMIT).expect_status(0);
    let stopped = home.polder(&["stop", "--timeout", "2", "web"]);
    stopped.expect_status(0);
    assert!(stopped.errors.contains("did not switch itself off"), "it ran until it was stopped\n{stopped}");
}

#[test]
fn a_balloon_takes_memory_from_a_guest_and_gives_it_back() {
    const FREE: &str = "free_mib() { awk '/^MemFree/ {print int($2 / 1024)}' /proc/meminfo; }";
    let script = format!(
        "{FREE}; before=$(free_mib); while [ $(free_mib) -gt $((before - 100)) ]; do sleep 0.2; done; echo LENT; \
        while [ $(free_mib) -lt $((before - 28)) ]; do sleep 0.2; done; echo BACK; while :; do sleep 9; done"
    );
    let home = Home::new().with_linux(&script);
    home.polder(&["run", "tiny", "-d", "--memory", "256M", "--name", "web"]).expect_status(0);
    let mut console = home.command(&["console", "web"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(console.stdout.take().unwrap()).lines();
    let mut wait_for = |text: &str| {
        let found = lines.by_ref().map_while(Result::ok).any(|line| line.contains(text));
        assert!(found, "the console ended without {text}");
    };
    wait_for("POLDER-GUEST READY");
    let shown = home.polder(&["balloon", "web"]);
    shown.expect_status(0).expect_console("memory  256 MiB\ntarget  256 MiB\nactual  256 MiB\n");
    let shown = home.polder(&["balloon", "web", "128M", "--timeout", "50"]);
    shown.expect_status(0).expect_console("memory  256 MiB\ntarget  128 MiB\nactual  128 MiB\n");
    assert_eq!(shown.errors, "");
    wait_for("LENT");
    let shown = home.polder(&["balloon", "web", "256M", "--timeout", "50"]);
    shown.expect_status(0).expect_console("target  256 MiB\nactual  256 MiB\n");
    wait_for("BACK");
    // More than it can spare: it keeps what it needs, and that is said.
    let shown = home.polder(&["balloon", "web", "32M", "--timeout", "2"]);
    shown.expect_status(0).expect_console("target  32 MiB\n");
    assert!(shown.errors.contains("has not come to its target"), "{shown}");
    let refused = home.polder(&["balloon", "web", "512M"]);
    refused.expect_status(1);
    assert!(refused.errors.contains("has 256 MiB of memory"), "{refused}");
    home.polder(&["balloon", "web", "1M"]).expect_status(2);
    home.polder(&["rm", "--force", "web"]).expect_status(0);
    let refused = home.polder(&["balloon", "web"]);
    refused.expect_status(1);
    console.wait().unwrap();
}

#[test]
fn a_guest_without_a_driver_leaves_the_balloon_empty_and_that_is_said() {
    let home = Home::new();
    home.start("web");
    let shown = home.polder(&["balloon", "web", "48M", "--timeout", "0"]);
    shown.expect_status(0).expect_console("memory  64 MiB\ntarget  48 MiB\nactual  64 MiB\n");
    assert!(shown.errors.contains("no driver"), "{shown}");
    home.polder(&["rm", "--force", "web"]).expect_status(0);
}

#[test]
fn a_name_belongs_to_one_instance() {
    let home = Home::new();
    home.start("web");
    let second = home.polder(&["run", "tiny", "-d", "--name", "web"]);
    second.expect_status(1);
    assert!(second.errors.contains("in use") && second.errors.contains("active"), "{second}");
    assert_eq!(home.folders().len(), 1);
}

#[test]
fn a_killed_command_takes_its_instance_along() {
    let home = Home::new();
    let mut command = quiet(&mut home.command(&["run", "tiny", "--memory", "64M"]));
    home.wait_until("the start", |listed| listed.contains(" active"));
    command.kill().unwrap();
    command.wait().unwrap();
    home.wait_until("the end", str::is_empty);
    assert!(home.folders().is_empty());
}

#[test]
fn a_machine_that_was_killed_is_shown_as_dead_and_can_be_removed() {
    let home = Home::new();
    home.start("web");
    home.machines().into_iter().for_each(kill);
    home.wait_until("the death", |listed| listed.contains("inactive (its process died)"));
    home.polder(&["stop", "web"]).expect_status(0);
    home.polder(&["rm", "web"]).expect_status(0);
    assert!(home.folders().is_empty());
}

#[test]
fn a_machine_that_cannot_start_is_explained_and_leaves_nothing() {
    let home = Home::new();
    std::fs::write(home.0.path().join("images/tiny/kernel"), "no kernel").unwrap();
    let outcome = home.polder(&["run", "tiny", "-d", "--name", "web"]);
    outcome.expect_status(1);
    assert!(outcome.errors.contains("kernel"), "{outcome}");
    assert_eq!(home.listed(), "");
    assert!(home.folders().is_empty());
}

#[test]
fn every_instance_has_a_disk_of_its_own() {
    let home = Home::new();
    home.start("one");
    home.start("two");
    let volumes = || home.polder(&["volume", "ls"]).console;
    assert!(volumes().contains("instance.one") && volumes().contains("instance.two"), "{}", volumes());
    // Also while the machine has it open.
    let export = |name: &str| {
        let file = home.0.path().join(format!("{name}.raw"));
        home.polder(&["image", "export", "--volume", name, file.to_str().unwrap()]).expect_status(0);
        std::fs::read(file).unwrap()
    };
    assert!(export("instance.one") == vec![7; 1 << 20]);
    home.polder(&["rm", "--force", "one"]).expect_status(0);
    assert!(!volumes().contains("instance.one"), "{}", volumes());
    home.polder(&["store", "gc"]).expect_status(0);
    assert!(export("instance.two") == vec![7; 1 << 20]);
    home.polder(&["store", "verify"]).expect_status(0);
}

#[test]
fn options_of_run_that_make_no_sense_are_wrong_usage() {
    let home = Home::new();
    for arguments in [
        &["run", "tiny", "--cpus", "0"][..],
        &["run", "tiny", "--cpus", "9"],
        &["run", "tiny", "--memory", "1M"],
        &["run", "tiny", "-t"],
        &["run", "tiny", "-d", "--", "true"],
        &["run"],
        &["exec", "web"],
        &["rm"],
    ] {
        home.polder(arguments).expect_status(2);
    }
    for arguments in [["run", "nowhere"], ["stop", "nowhere"], ["rm", "nowhere"], ["console", "nowhere"]] {
        let outcome = home.polder(&arguments);
        outcome.expect_status(1);
        assert!(outcome.errors.contains("nowhere"), "{outcome}");
    }
    assert!(home.folders().is_empty());
}

#[test]
fn gdb_attaches_to_an_instance_that_waits_for_it() {
    let home = Home::new();
    let socket = home.0.path().join("gdb").display().to_string();
    let wait = format!("{socket},wait");
    home.polder(&["run", "tiny", "-d", "--memory", "64M", "--name", "debugged", "--gdb", &wait]).expect_status(0);
    let mut gdb = Command::new("gdb");
    gdb.args(["-nx", "-nh", "-q", "-batch", "-iex", "set debuginfod enabled off"]);
    gdb.args(["-ex", "set architecture i386:x86-64", "-ex", &format!("target remote {socket}")]);
    gdb.args(["-ex", "info threads", "-ex", "print $cr0 & 1", "-ex", "detach"]);
    Outcome::of(&mut gdb, LIMIT).expect_status(0).expect_console("vCPU 0, runs").expect_console("= 1");
    // A second one cannot have the same place; nothing is left of it.
    let outcome = home.polder(&["run", "tiny", "-d", "--memory", "64M", "--name", "second", "--gdb", &socket]);
    outcome.expect_status(1);
    assert!(outcome.errors.contains("gdb cannot be served at the socket"), "{outcome}");
    assert_eq!(home.folders().len(), 1);
    home.polder(&["rm", "--force", "debugged"]).expect_status(0);
    assert!(!std::path::Path::new(&socket).exists());
}
