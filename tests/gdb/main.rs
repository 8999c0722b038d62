//! Promise: gdb attaches to a guest: registers, memory, breakpoints, watchpoints, single steps, a thread for each vCPU, Ctrl-C, detach
//! and the guest's end. The judge is gdb itself.

use polder_tests::{Boot, Kernel, Outcome, Scratch, polder, tiny};
use std::io::{BufRead, BufReader, Read};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Bound for one gdb.
const PATIENCE: Duration = Duration::from_secs(180);
/// Status of a tiny guest that found everything as it should be, and how gdb writes it.
const GOOD: i32 = 85;
const GOOD_FOR_GDB: &str = "exited with code 0125";

/// A machine that runs beside its gdb.
struct Debuggee {
    socket: PathBuf,
    machine: JoinHandle<Outcome>,
    _scratch: Scratch,
}

impl Debuggee {
    /// `waits`: nothing runs before gdb says so.
    fn start(boot: Boot, waits: bool) -> Self {
        let scratch = Scratch::new();
        let socket = scratch.path().join("gdb");
        let word = format!("{}{}", socket.display(), if waits { ",wait" } else { "" });
        let machine = std::thread::spawn(move || boot.option("--gdb", &word).run());
        let start = Instant::now();
        while !socket.exists() && !machine.is_finished() {
            assert!(start.elapsed() < PATIENCE, "no socket for gdb appeared");
            std::thread::yield_now();
        }
        Debuggee { socket, machine, _scratch: scratch }
    }

    /// What a gdb says that attaches and carries out `commands`.
    fn gdb(&self, program: Option<&Path>, commands: &[&str]) -> String {
        let outcome = Outcome::of(&mut gdb(program, &self.socket.display().to_string(), commands), PATIENCE);
        format!("{}\n{}", outcome.console, outcome.errors)
    }

    fn end(self) -> Outcome {
        self.machine.join().expect("the machine's thread ends well")
    }
}

fn gdb(program: Option<&Path>, place: &str, commands: &[&str]) -> Command {
    let mut gdb = Command::new("gdb");
    gdb.args(["-nx", "-nh", "-q", "-batch"]);
    for setting in ["debuginfod enabled off", "pagination off", "confirm off", "width 0", "remotetimeout 60"] {
        gdb.arg("-iex").arg(format!("set {setting}"));
    }
    gdb.args(["-ex", "set architecture i386:x86-64"]);
    if let Some(program) = program {
        gdb.arg("-ex").arg(format!("file {}", program.display()));
    }
    gdb.arg("-ex").arg(format!("target remote {place}"));
    for command in commands {
        gdb.arg("-ex").arg(command);
    }
    gdb
}

/// Fails unless `said` holds the words, one after the other.
#[track_caller]
fn expect(said: &str, words: &[&str]) {
    let mut rest = said;
    for word in words {
        match rest.find(word) {
            Some(at) => rest = &rest[at + word.len()..],
            None => panic!("gdb did not say {word:?} where it should have:\n{said}"),
        }
    }
}

#[test]
fn gdb_breaks_steps_reads_and_writes_and_hears_of_the_end() {
    for translate in ["auto", "never", "always"] {
        let guest = Debuggee::start(Boot::tiny("hello").option("--translate", translate).timeout_s(120), true);
        let program = tiny("hello");
        let said = guest.gdb(
            Some(&program),
            &[
                "info registers rip cr0",
                "break main",
                "continue",
                "x/i $pc",
                "stepi",
                "x/i $pc",
                "print $rdi == (long)&text",
                "x/s (char *)&text",
                "set {char}&text = 'H'",
                "print $xmm3.v4_float",
                "set $xmm3.v4_float[1] = 1.5",
                "print $xmm3.v4_float",
                "print $cs",
                "print $fs_base",
                "set $fs_base = 0x123456789a",
                "print/x $fs_base",
                "info registers cr4 efer st0 mxcsr",
                "print $ymm3.v8_float[0]",
                "hbreak print",
                "continue",
                "info breakpoints",
                "delete",
                "rwatch *((char *)&text + 1)",
                "continue",
                "x/i $pc",
                "delete",
                "continue",
            ],
        );
        expect(
            &said,
            &[
                "cr0 ",
                "Breakpoint 1, 0x",
                " in main ()",
                "lea ",
                "jmp ",
                "= 1",
                "\"hello from a tiny guest\\n\"",
                "= {0, 0, 0, 0}",
                "= {0, 1.5, 0, 0}",
                "= 8",
                "= 0",
                "= 0x123456789a",
                "cr4 ",
                "0x40620",
                "efer ",
                "0x500",
                "Breakpoint 2, 0x",
                " in print ()",
                "breakpoint already hit 1 time",
                "Hardware read watchpoint 3",
                "Value = 101 'e'",
                "test ",
                GOOD_FOR_GDB,
            ],
        );
        guest.end().expect_status(GOOD).expect_console("Hello from a tiny guest");
    }
}

#[test]
fn every_vcpu_is_a_thread_and_meets_the_breakpoint() {
    for cpus in [2, 4] {
        let boot = Boot::tiny("smp").cpus(cpus).append(&format!("cpus={cpus}")).timeout_s(120);
        let guest = Debuggee::start(boot, true);
        let mut commands = vec!["info threads", "break work"];
        commands.extend(vec!["continue"; cpus as usize]);
        // Steps of one vCPU while the others stay, then while they run.
        commands.extend(["set scheduler-locking on", "stepi", "set scheduler-locking off", "stepi", "info threads"]);
        commands.extend(["delete", "continue"]);
        let said = guest.gdb(Some(&tiny("smp")), &commands);
        expect(&said, &["vCPU 0, runs", "vCPU 1, waits for its start"]);
        for vcpu in 1..=cpus {
            assert_eq!(said.matches(&format!("Thread {vcpu} hit Breakpoint 1")).count(), 1, "{said}");
        }
        expect(&said, &[GOOD_FOR_GDB]);
        guest.end().expect_status(GOOD).expect_console(&format!("smp good {cpus:08x}"));
    }
}

#[test]
fn a_watchpoint_of_written_data_stops_after_the_write() {
    let guest = Debuggee::start(Boot::tiny("smp").append("cpus=1").timeout_s(120), true);
    let commands = ["watch *(int *)&finished", "continue", "x/i $pc", "delete", "continue"];
    let said = guest.gdb(Some(&tiny("smp")), &commands);
    expect(&said, &["Old value = 0", "New value = 1", "in work ()", "ret", GOOD_FOR_GDB]);
    guest.end().expect_status(GOOD);
}

/// Where a symbol of the kernel lies without address randomization, by the kernel's own word.
fn kernel_symbol(name: &str) -> String {
    let script = format!("grep -w {name} /proc/kallsyms");
    let outcome = Boot::linux(Kernel::Cloud, &script).append("nokaslr").timeout_s(120).run();
    outcome.expect_status(0);
    let line = outcome.console.lines().find(|line| line.ends_with(&format!(" {name}"))).map(str::to_owned);
    let line = line.unwrap_or_else(|| panic!("the kernel does not name {name}\n{outcome}"));
    format!("0x{}", line.split(' ').next().unwrap_or_default().trim())
}

#[test]
fn a_kernel_stops_at_start_kernel_and_boots_on_after_gdb_is_gone() {
    let start_kernel = kernel_symbol("start_kernel");
    for (cpus, set) in [(1, "hbreak"), (2, "break")] {
        let boot = Boot::linux(Kernel::Cloud, "echo seen $(grep -c processor /proc/cpuinfo)").append("nokaslr");
        let guest = Debuggee::start(boot.cpus(cpus).timeout_s(180), true);
        let said = guest.gdb(
            None,
            &[
                "info threads",
                &format!("{set} *{start_kernel}"),
                "continue",
                "info registers rip",
                "x/3i $pc",
                "stepi",
                "stepi",
                "x/i $pc",
                "print $gs_base != 0",
                "print/x $cr3 & 1",
                "detach",
            ],
        );
        let at = start_kernel.trim_start_matches("0x").trim_start_matches('0');
        expect(
            &said,
            &["vCPU 0", "reakpoint 1", &format!("rip            0x{at}"), &format!("=> 0x{at}:"), "=> 0x", "detached"],
        );
        guest.end().expect_status(0).expect_console(&format!("seen {cpus}"));
    }
}

#[test]
fn gdb_comes_and_goes_interrupts_and_kills() {
    let guest = Debuggee::start(Boot::tiny("hang").timeout_s(120), false);
    // Left by the end of a script, then by a word.
    expect(&guest.gdb(None, &["print $rip != 0"]), &["= 1"]);
    expect(&guest.gdb(None, &["print $cs", "detach"]), &["= 8", "detached"]);
    let place = guest.socket.display().to_string();
    // What gdb sends is told on standard error: the moment when the guest runs.
    let commands = ["set debug remote 1", "continue", "info registers cs", "kill"];
    let mut child = gdb(None, &place, &commands)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("gdb can be started");
    let mut output = child.stdout.take().expect("its output is a pipe");
    let mut told = BufReader::new(child.stderr.take().expect("its errors are a pipe")).lines().map_while(Result::ok);
    told.find(|line| line.contains("vCont;c")).expect("gdb lets the guest run");
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("gdb lives");
    told.for_each(drop);
    let mut said = String::new();
    output.read_to_string(&mut said).expect("gdb writes text");
    child.wait().expect("gdb ends");
    expect(&said, &["SIGINT", "cs ", "0x8", "killed"]);
    let outcome = guest.end();
    outcome.expect_status(1).expect_console("halting for ever");
    assert!(outcome.errors.contains("stopped"), "{outcome}");
}

#[test]
fn breakpoints_stay_over_a_reset_and_a_triple_fault_is_shown() {
    let guest = Debuggee::start(Boot::tiny("reset").reboot().timeout_s(120), true);
    let said = guest
        .gdb(Some(&tiny("reset")), &["break main", "continue", "continue", "continue", "info breakpoints", "kill"]);
    assert_eq!(said.matches("Breakpoint 1, 0x").count(), 3, "{said}");
    expect(&said, &["already hit 3 times", "killed"]);
    guest.end().expect_status(1);
    let guest = Debuggee::start(Boot::tiny("triple").timeout_s(120), true);
    let said = guest.gdb(None, &["continue", "x/i $pc", "continue"]);
    expect(&said, &["SIGSEGV", "=> 0x", "exited with code 013"]);
    guest.end().expect_status(11);
}

#[test]
fn a_gdb_that_dies_takes_its_breakpoints_along() {
    let guest = Debuggee::start(Boot::tiny("smp").cpus(2).append("cpus=2").timeout_s(120), true);
    let mut child =
        gdb(Some(&tiny("smp")), &guest.socket.display().to_string(), &["break work", "continue", "shell cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("gdb can be started");
    let output = BufReader::new(child.stdout.take().expect("its output is a pipe"));
    output.lines().map_while(Result::ok).find(|line| line.contains("Breakpoint 1, ")).expect("the breakpoint is met");
    child.kill().expect("gdb lives");
    child.wait().expect("gdb ends");
    guest.end().expect_status(GOOD).expect_console("smp good 00000002");
}

#[test]
fn a_port_of_the_host_serves_gdb_and_one_that_is_taken_is_named() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("there is a free port");
    let port = taken.local_addr().expect("it has an address").port().to_string();
    let kernel = tiny("hello");
    let boot = |gdb: &str| {
        let mut command = Command::new(polder());
        command.arg("boot").arg("--kernel").arg(&kernel).args(["--test-devices", "--gdb", gdb]);
        Outcome::of(&mut command, Duration::from_secs(60))
    };
    let outcome = boot(&port);
    outcome.expect_status(1);
    assert!(outcome.errors.contains(&format!("port {port} of 127.0.0.1: Address already in use")), "{outcome}");
    drop(taken);
    let machine = std::thread::spawn({
        let word = format!("{port},wait");
        move || Boot::tiny("hello").option("--gdb", &word).timeout_s(120).run()
    });
    let place = format!("localhost:{port}");
    let outcome = Outcome::of(&mut gdb(None, &place, &["continue"]), PATIENCE);
    expect(&outcome.console, &[GOOD_FOR_GDB]);
    machine.join().expect("the machine's thread ends well").expect_status(GOOD);
}

#[test]
fn a_place_for_gdb_that_makes_no_sense_is_refused() {
    let scratch = Scratch::new();
    let file = scratch.file("file", b"precious");
    let kernel = tiny("hello");
    let refused = |gdb: &str, status: i32, word: &str| {
        let mut command = Command::new(polder());
        command.arg("boot").arg("--kernel").arg(&kernel).args(["--gdb", gdb]);
        let outcome = Outcome::of(&mut command, Duration::from_secs(60));
        outcome.expect_status(status);
        assert!(outcome.errors.contains(word) && !outcome.errors.contains("panicked"), "{outcome}");
        assert!(outcome.console.is_empty(), "{outcome}");
    };
    for nonsense in ["", "0", "65536", "localhost:1234", ":1234", ",wait"] {
        refused(nonsense, 2, "--gdb");
    }
    refused(&file.display().to_string(), 1, "gdb cannot be served at the socket");
    refused("/nowhere/gdb", 1, "/nowhere/gdb");
    assert_eq!(std::fs::read(&file).expect("the file is there"), b"precious");
}
