//! Images in an object store, from the command line: pushed, pulled, attached, run while they are still there, and what happens
//! when the server does not answer.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use polder_tests::{Kernel, Outcome};
use rustix::process::{Pid, Signal, kill_process};

use crate::object_server::{ACCESS_KEY, ObjectServer, SECRET_KEY};
use crate::{Home, LIMIT, disk_content, other};

const PLACE: &str = "s3://images/prod/eu";
const DISK_LEN: usize = 24 << 20;
/// A part of the disk that a guest reads: not zeros, and far from its beginning.
const PART_LEN: usize = 64 << 10;
const PART: usize = 200;
/// Longer than a server is waited for in these tests.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
/// Less than a second on a machine with nothing else to do; 30 seconds if the server is waited for.
const END_LIMIT: Duration = Duration::from_secs(10);

/// The home of a host that has credentials for a server.
fn host_of(server: &ObjectServer) -> Home {
    Home::with(vec![
        ("AWS_ACCESS_KEY_ID", ACCESS_KEY.to_owned()),
        ("AWS_SECRET_ACCESS_KEY", SECRET_KEY.to_owned()),
        ("AWS_ENDPOINT_URL", server.endpoint()),
        ("AWS_REGION", "nowhere".to_owned()),
    ])
}

impl Home {
    /// Puts the image `web` there: a stock kernel that runs `script`, and a disk with these bytes.
    fn push_image(&self, script: &str) -> Vec<u8> {
        let bytes = disk_content(DISK_LEN);
        let raw = self.path("disk.raw");
        std::fs::write(&raw, &bytes).unwrap();
        let (kernel, initrd) = (Kernel::Cloud.image(), Kernel::Cloud.initramfs());
        let append = format!("console=ttyS0 quiet panic=-1 polder_run=\"{script}\"");
        let mut import = self.bare_command(&["image", "import", "--format", "raw", &raw, "web", "--append", &append]);
        import.arg("--kernel").arg(kernel).arg("--initrd").arg(initrd);
        Outcome::of(&mut import, LIMIT).expect_status(0);
        self.done(&["store", "push", "web", PLACE]);
        bytes
    }

    fn inspected(&self, image: &str) -> serde_json::Value {
        serde_json::from_str(&self.done(&["image", "inspect", image])).unwrap()
    }
}

/// What a guest does to show the part of its disk.
fn show_part() -> String {
    format!("dd if=/dev/vda bs=64k skip={PART} count=1 iflag=direct 2>/dev/null | md5sum")
}

fn md5_of(host: &Home, bytes: &[u8]) -> String {
    let part = host.path("part");
    std::fs::write(&part, &bytes[PART * PART_LEN..(PART + 1) * PART_LEN]).unwrap();
    other("md5sum", &[&part]).split_whitespace().next().unwrap().to_owned()
}

#[test]
fn a_guest_boots_from_an_image_that_is_still_in_an_object_store() {
    let server = ObjectServer::start();
    let (here, there, third) = (host_of(&server), host_of(&server), host_of(&server));
    let bytes = here.push_image(&show_part());
    let md5 = md5_of(&here, &bytes);
    let listed = here.done(&["store", "remote", "ls", PLACE]);
    assert!(listed.lines().count() == 2 && listed.contains("web"), "{listed}");
    // Everything is known there.
    let again = here.done(&["store", "push", "web", PLACE, "--name", "web2"]);
    assert!(again.contains(" 0 records"), "{again}");

    let before = server.sent_bytes();
    there.done(&["store", "attach", "web", PLACE]);
    assert!(server.sent_bytes() - before < 1 << 20, "{}", server.sent_bytes() - before);
    let inspected = there.inspected("web");
    assert!(inspected["is_local"] == false && inspected["local_bytes"].as_u64().unwrap() < 1 << 20, "{inspected}");
    let run = there.polder(&["run", "--memory", "256M", "--record-profile", "web"]);
    run.expect_status(0).expect_console(&md5);
    // The kernel and the initramfs came, and hardly anything of the disk.
    let sent = server.sent_bytes() - before;
    assert!(sent < server.stored_bytes() * 2 / 3, "{sent} of {}", server.stored_bytes());
    assert!(server.has("/profiles/"));
    let listed = there.done(&["image", "ls"]);
    assert!(listed.contains("MiB") && !listed.contains(" all "), "{listed}");

    // The disk alone, for a kernel that is here; a volume shares what was read.
    there.done(&["volume", "create", "--image", "web", "data"]);
    let mut boot = there.command(&["boot", "--engine", "software", "--memory", "256M", "--volume", "data"]);
    boot.arg("--kernel").arg(Kernel::Cloud.image()).arg("--initrd").arg(Kernel::Cloud.initramfs());
    boot.args(["--append", &format!("console=ttyS0 quiet panic=-1 polder_run=\"{}\"", show_part())]);
    Outcome::of(&mut boot, LIMIT).expect_status(0).expect_console(&md5);

    // Another host begins with what this one read.
    third.done(&["store", "attach", "web", PLACE]);
    server.take_keys();
    third.polder(&["run", "--memory", "256M", "web"]).expect_status(0).expect_console(&md5);
    assert!(server.take_keys().iter().any(|key| key.contains("/profiles/")));

    let refused = there.polder(&["store", "detach", PLACE]);
    refused.expect_status(1);
    assert!(refused.errors.contains("image web") && refused.errors.contains("prefetch"), "{refused}");
    there.done(&["store", "prefetch", "web"]);
    assert_eq!(there.inspected("web")["is_local"], true);
    let address = there.done(&["store", "remote", "ls"]);
    assert!(address.contains(PLACE) && address.contains(&server.endpoint()), "{address}");
    assert!(!address.contains(SECRET_KEY));
    there.done(&["store", "detach", PLACE]);
    // Nobody is asked any more.
    server.set_silent(true);
    let out = there.path("out.raw");
    Outcome::of(&mut there.bare_command(&["image", "export", "web", &out]), LIMIT).expect_status(0);
    assert!(std::fs::read(&out).unwrap() == bytes);
    Outcome::of(&mut there.bare_command(&["store", "verify"]), LIMIT).expect_status(0);
}

/// A machine whose console is read as it comes.
struct Machine {
    child: Child,
    lines: mpsc::Receiver<String>,
}

impl Machine {
    fn start(mut command: Command) -> Self {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("polder starts");
        let output = child.stdout.take().expect("it is a pipe");
        let (send, lines) = mpsc::channel();
        std::thread::spawn(move || {
            // Nobody may listen any more.
            BufReader::new(output).lines().map_while(Result::ok).try_for_each(|line| send.send(line)).ok()
        });
        Machine { child, lines }
    }

    /// Waits for a line with that text.
    #[track_caller]
    fn wait_for(&self, text: &str) -> String {
        let end = Instant::now() + ANSWER_LIMIT;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let line = self.lines.recv_timeout(left).unwrap_or_else(|_| panic!("the console never shows {text:?}"));
            if line.contains(text) {
                return line;
            }
        }
    }

    /// Waits until the guest has read, and fails unless `dd` ended with that status.
    #[track_caller]
    fn expect_read(&self, status: i32) {
        let line = self.wait_for("READ ");
        assert!(line.trim_end().ends_with(&format!("READ {status}")), "{line:?}");
    }

    fn press_enter(&mut self) {
        self.child.stdin.as_mut().expect("it is a pipe").write_all(b"\n").expect("the machine takes keys");
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // One that was stopped is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn wait_until_held(server: &ObjectServer) {
    let end = Instant::now() + ANSWER_LIMIT;
    while server.held() == 0 {
        assert!(Instant::now() < end, "nothing is asked of the server");
        std::thread::park_timeout(Duration::from_millis(5));
    }
}

#[test]
fn a_guest_goes_on_while_its_object_store_does_not_answer_and_gets_an_error_in_the_end() {
    let server = ObjectServer::start();
    let (here, there) = (host_of(&server), host_of(&server));
    here.push_image("true");
    there.done(&["store", "attach", "web", PLACE, "--patience", "5"]);
    there.done(&["volume", "create", "--image", "web", "data"]);
    let read = format!("dd if=/dev/vda of=/dev/null bs=64k skip={PART} count=1 iflag=direct 2>/dev/null; echo READ $?");
    let script = format!("(while sleep 0.1; do echo ALIVE; done) & read x; {read}; read x; {read}; read x; {read}");
    let mut boot = there.command(&["boot", "--engine", "software", "--memory", "256M", "--volume", "data"]);
    boot.arg("--kernel").arg(Kernel::Cloud.image()).arg("--initrd").arg(Kernel::Cloud.initramfs());
    boot.args(["--append", &format!("console=ttyS0 quiet panic=-1 polder_run=\"{script}\"")]);
    let mut machine = Machine::start(boot);
    machine.wait_for("READY");
    server.set_silent(true);
    machine.press_enter();
    wait_until_held(&server);
    // Its one vCPU runs on, and the read has not failed yet.
    let alive = (0..3).map(|_| machine.lines.recv_timeout(ANSWER_LIMIT).expect("the guest goes on"));
    alive.for_each(|line| assert!(!line.contains("READ"), "{line}"));
    machine.expect_read(1);
    server.set_silent(false);
    machine.press_enter();
    machine.expect_read(0);
    // What came stays, whatever the server does.
    server.set_silent(true);
    machine.press_enter();
    machine.expect_read(0);
    let start = Instant::now();
    kill_process(Pid::from_child(&machine.child), Signal::TERM).expect("a child can be signalled");
    machine.child.wait().expect("a child can be waited for");
    assert!(start.elapsed() < END_LIMIT, "{:?}", start.elapsed());
}

#[test]
fn polder_stop_ends_an_instance_whose_object_store_does_not_answer() {
    let server = ObjectServer::start();
    let (here, there) = (host_of(&server), host_of(&server));
    here.push_image("sleep 1000");
    there.done(&["store", "attach", "web", PLACE]);
    there.done(&["run", "-d", "--name", "web", "--memory", "256M", "web"]);
    // The kernel is loaded; the first thing that the guest wants of its disk is the table of partitions.
    server.set_silent(true);
    wait_until_held(&server);
    let start = Instant::now();
    there.done(&["stop", "--timeout", "0", "web"]);
    assert!(start.elapsed() < END_LIMIT, "{:?}", start.elapsed());
    let listed = there.done(&["ps"]);
    assert!(listed.contains("inactive (stopped)"), "{listed}");
    server.set_silent(false);
    there.done(&["rm", "web"]);
}

#[test]
fn images_of_an_object_store_are_listed_pulled_removed_and_collected() {
    let server = ObjectServer::start();
    let (here, there) = (host_of(&server), host_of(&server));
    let raw = here.path("disk.raw");
    let mut contents = Vec::new();
    for (index, name) in ["one", "two"].into_iter().enumerate() {
        let mut bytes = disk_content(4 << 20);
        bytes.rotate_left(index * 4096);
        std::fs::write(&raw, &bytes).unwrap();
        here.done(&["image", "import", "--format", "raw", &raw, name]);
        here.done(&["store", "push", name, PLACE]);
        contents.push(bytes);
    }
    let names = || {
        let listed: serde_json::Value =
            serde_json::from_str(&there.done(&["store", "remote", "ls", "--json", PLACE])).unwrap();
        listed.as_array().unwrap().iter().map(|image| image["name"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(names(), ["one", "two"]);
    let refused = here.polder(&["store", "push", "two", PLACE, "--name", "one"]);
    refused.expect_status(1);
    assert!(refused.errors.contains("already"), "{refused}");
    here.done(&["store", "push", "two", PLACE, "--name", "one", "--force"]);
    here.done(&["store", "push", "one", PLACE, "--name", "one", "--force"]);
    let pulled = there.done(&["store", "pull", "one", PLACE, "--name", "mine"]);
    assert!(pulled.contains("image mine here"), "{pulled}");
    assert_eq!(there.inspected("mine")["is_local"], true);

    here.done(&["store", "remote", "rm", PLACE, "one"]);
    assert_eq!(names(), ["two"]);
    let collect = || {
        let said = here.done(&["store", "remote", "gc", PLACE, "--grace", "0", "--json"]);
        serde_json::from_str::<serde_json::Value>(&said).unwrap()
    };
    let stored = server.stored_bytes();
    let listed = collect();
    assert!(listed["listed"] == 1 && listed["removed_segments"] == 0, "{listed}");
    let removed = collect();
    assert!(removed["removed_segments"] == 1 && server.stored_bytes() < stored * 2 / 3, "{removed}");
    there.done(&["store", "pull", "two", PLACE]);
    for (name, content) in ["mine", "two"].into_iter().zip(&contents) {
        let out = there.path("out.raw");
        let _ = std::fs::remove_file(&out);
        there.done(&["image", "export", name, &out]);
        assert!(std::fs::read(&out).unwrap() == *content, "{name}");
    }
}

#[test]
fn what_is_wrong_with_an_object_store_is_said_and_no_secret_is() {
    let server = ObjectServer::start();
    let host = host_of(&server);
    let raw = host.path("disk.raw");
    std::fs::write(&raw, disk_content(4 << 20)).unwrap();
    host.done(&["image", "import", "--format", "raw", &raw, "disk"]);
    let push = ["store", "push", "disk", PLACE];
    let failed = |command: &mut Command, words: &[&str]| {
        let outcome = Outcome::of(command.env("POLDER_LOG", "trace"), LIMIT);
        outcome.expect_status(1);
        assert!(words.iter().all(|word| outcome.errors.contains(word)), "{words:?}: {outcome}");
        assert!(!outcome.errors.contains(SECRET_KEY) && !outcome.console.contains(SECRET_KEY), "{outcome}");
    };
    failed(host.command(&push).env_remove("AWS_ACCESS_KEY_ID"), &["no credentials", "hint: set AWS_ACCESS_KEY_ID"]);
    failed(host.command(&push).env("AWS_ACCESS_KEY_ID", "AKIDSTRANGER"), &["credentials", "hint: compare"]);
    failed(&mut host.command(&["store", "push", "disk", "s3://other/prod"]), &["no bucket other", "hint:"]);
    failed(&mut host.command(&["store", "remote", "ls", "s3://other/prod"]), &["no bucket other"]);
    let closed = ["store", "push", "disk", PLACE, "--endpoint", "http://127.0.0.1:9", "--patience", "1"];
    failed(&mut host.command(&closed), &["did not answer in 1 s", "hint: check --endpoint"]);
    failed(&mut host.command(&["store", "pull", "never", PLACE]), &["no image never", "remote ls"]);
    failed(&mut host.command(&["store", "pull", "a@b", PLACE]), &["holds images"]);
    failed(&mut host.command(&["store", "prefetch", "never"]), &["no image never"]);
    failed(&mut host.command(&["store", "detach", PLACE]), &["no image of"]);
    host.polder(&["store", "push", "disk", "s3://"]).expect_status(2);
    host.done(&push);
    failed(&mut host.command(&["store", "attach", "disk", PLACE]), &["already"]);

    let there = host_of(&server);
    there.done(&["store", "attach", "disk", PLACE, "--patience", "1"]);
    // Without credentials or a server what is here can be had, and what is not says why.
    let export = ["image", "export", "disk", &there.path("out.raw")];
    failed(&mut there.bare_command(&export), &["no credentials", PLACE]);
    server.set_silent(true);
    failed(&mut there.command(&export), &["did not answer in 1 s"]);
    for arguments in [&["image", "ls"][..], &["image", "inspect", "disk"], &["store", "status"], &["store", "gc"]] {
        there.done(arguments);
    }
    server.set_silent(false);
    for entry in crate::walk(&there.folder) {
        let content = std::fs::read(&entry).unwrap();
        let secret = SECRET_KEY.as_bytes();
        assert!(!content.windows(secret.len()).any(|window| window == secret), "{}", entry.display());
    }
}
