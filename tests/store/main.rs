//! Promise: disks in the store are made, served, compared, brought in and out, collected and moved between stores by the commands
//! that docs/volumes.md and docs/store.md show, and other people's programs agree about every byte.

mod image_build;
mod object_server;
mod object_store;

use polder_tests::{Outcome, Scratch, polder};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// Bytes of a chunk where nobody chose.
const CHUNK_LEN: usize = 16 << 10;
const LIMIT: Duration = Duration::from_secs(120);

/// A state folder, and files beside it.
struct Home {
    scratch: Scratch,
    folder: PathBuf,
    /// What its commands find in their environment besides.
    environment: Vec<(&'static str, String)>,
}

impl Home {
    fn new() -> Self {
        Home::with(Vec::new())
    }

    fn with(environment: Vec<(&'static str, String)>) -> Self {
        let scratch = Scratch::new();
        let folder = scratch.path().join("home");
        Home { scratch, folder, environment }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.bare_command(arguments);
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        command
    }

    /// A command with nothing of the home's own in its environment.
    fn bare_command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(polder());
        command.args(arguments).env("POLDER_HOME", &self.folder);
        command
    }

    fn polder(&self, arguments: &[&str]) -> Outcome {
        Outcome::of(&mut self.command(arguments), LIMIT)
    }

    /// Runs a command that has to succeed; what it says.
    #[track_caller]
    fn done(&self, arguments: &[&str]) -> String {
        let outcome = self.polder(arguments);
        outcome.expect_status(0);
        outcome.console
    }

    fn path(&self, name: &str) -> String {
        self.scratch.path().join(name).to_str().expect("paths of tests are UTF-8").to_owned()
    }

    /// Starts a command that serves, and waits until it is ready.
    fn serve(&self, arguments: &[&str]) -> Server {
        let mut child = self.command(arguments).stdout(Stdio::piped()).spawn().expect("polder starts");
        let lines = BufReader::new(child.stdout.as_mut().expect("it is a pipe")).lines();
        assert!(lines.map_while(Result::ok).any(|line| line == "ready"), "{arguments:?} gets ready");
        Server(child)
    }
}

/// A server that ends with the test.
struct Server(Child);

impl Server {
    fn stop(mut self) {
        let process = rustix::process::Pid::from_child(&self.0);
        rustix::process::kill_process(process, rustix::process::Signal::TERM).expect("it runs");
        assert!(self.0.wait().expect("it is a child").success());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // One that was stopped is gone already.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs another program that has to succeed; what it says.
#[track_caller]
fn other(program: &str, arguments: &[&str]) -> String {
    let outcome = Outcome::of(Command::new(program).args(arguments), LIMIT);
    outcome.expect_status(0);
    outcome.console
}

/// Bytes that do not repeat and do not pack, with holes between them.
fn disk_content(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut bytes = vec![0; len];
    for (index, chunk) in bytes.chunks_mut(64 << 10).enumerate() {
        if index % 3 == 1 {
            continue;
        }
        for word in chunk.chunks_exact_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
    }
    bytes
}

#[test]
fn an_image_goes_through_every_format_and_comes_back_the_same() {
    let home = Home::new();
    let bytes = disk_content(12 << 20);
    let raw = home.path("disk.raw");
    std::fs::write(&raw, &bytes).unwrap();
    home.done(&["image", "import", "--format", "raw", &raw, "first"]);
    let mut name = "first".to_owned();
    for format in ["qcow2", "vmdk", "vhdx", "raw"] {
        let file = home.path(&format!("disk.{format}-again"));
        home.done(&["image", "export", "--format", format, &name, &file]);
        other("qemu-img", &["compare", "-f", "raw", "-F", format, &raw, &file]);
        if format != "raw" {
            other("qemu-img", &["check", "-f", format, &file]);
        }
        name = format!("from-{format}");
        home.done(&["image", "import", "--format", format, &file, &name]);
    }
    // All of them are one disk to the store.
    let status: serde_json::Value = serde_json::from_str(&home.done(&["store", "status", "--json"])).unwrap();
    assert!(status["stored_bytes"].as_u64().unwrap() < 9 << 20, "{status}");
    let listed = home.done(&["image", "ls"]);
    assert!(listed.lines().count() == 6 && listed.contains("from-vhdx"), "{listed}");
    home.done(&["image", "rm", "first", "from-qcow2"]);
    home.done(&["store", "gc"]);
    let last = home.path("last.raw");
    home.done(&["image", "export", "from-raw", &last]);
    assert!(std::fs::read(last).unwrap() == bytes);
}

#[test]
fn the_format_of_an_image_is_never_guessed() {
    let home = Home::new();
    let file = home.path("disk.qcow2");
    other("qemu-img", &["create", "-q", "-f", "qcow2", &file, "1M"]);
    let outcome = home.polder(&["image", "import", &file, "x"]);
    outcome.expect_status(1);
    assert!(outcome.errors.contains("--format") && outcome.errors.contains("looks like qcow2"), "{outcome}");
    // As raw it is the bytes of the file, header and all.
    home.done(&["image", "import", "--format", "raw", &file, "x"]);
    let out = home.path("out.raw");
    home.done(&["image", "export", "x", &out]);
    let (before, after) = (std::fs::read(&file).unwrap(), std::fs::read(out).unwrap());
    // A disk is whole sectors.
    assert!(after.starts_with(&before) && after.len() == before.len().next_multiple_of(512));
    for (arguments, words) in [
        (&["image", "import", "--format", "qcow2", "/dev/null", "y"][..], "no file or block device"),
        (&["image", "import", "--format", "tar", "/dev/null", "y"], "--size"),
        (&["image", "import", "--format", "raw", "/nowhere", "y"], "/nowhere"),
        (&["image", "import", "--format", "raw", &file, "x"], "already"),
        (&["image", "import", "--format", "raw", &file, "../x"], "no name"),
        (&["image", "export", "nothing", "/tmp/never"], "no image nothing"),
    ] {
        let outcome = home.polder(arguments);
        outcome.expect_status(1);
        assert!(outcome.errors.contains(words), "{arguments:?}: {outcome}");
    }
}

#[test]
fn an_archive_becomes_a_disk_with_its_files() {
    let home = Home::new();
    let folder = home.scratch.path().join("tree");
    std::fs::create_dir_all(folder.join("etc")).unwrap();
    std::fs::write(folder.join("etc/motd"), "land won from the sea\n").unwrap();
    std::os::unix::fs::symlink("etc/motd", folder.join("motd")).unwrap();
    let (tree, archive) = (home.path("tree"), home.path("tree.tar.gz"));
    other("tar", &["-C", &tree, "-czf", &archive, "."]);
    for (format, file, name) in [
        (&["--format", "tar.gz"][..], &archive, "archive"),
        (&["--format", "folder"], &tree, "folder"),
        (&[], &tree, "folder-unsaid"),
    ] {
        home.done(&[&["image", "import", "--size", "64M", file, name], format].concat());
        let disk = home.path(&format!("{name}.raw"));
        home.done(&["image", "export", name, &disk]);
        other("/usr/sbin/e2fsck", &["-fn", &disk]);
        let said = other("/usr/sbin/debugfs", &["-R", "cat /etc/motd", &disk]);
        assert!(said.contains("land won from the sea"), "{said}");
    }
}

#[test]
fn volumes_are_made_served_snapshotted_compared_and_rolled_back() {
    let home = Home::new();
    home.done(&["volume", "create", "--size", "64M", "disk"]);
    let socket = home.path("socket");
    let uri = format!("nbd+unix:///disk?socket={socket}");
    let raw = home.path("disk.raw");
    let bytes = disk_content(64 << 20);
    std::fs::write(&raw, &bytes).unwrap();

    let server = home.serve(&["volume", "serve", "disk", "--socket", &socket]);
    let busy = home.polder(&["volume", "serve", "disk", "--socket", &home.path("other")]);
    busy.expect_status(1);
    assert!(busy.errors.contains("in use by process"), "{busy}");
    other("nbdcopy", &["--connections=4", &raw, &uri]);
    home.done(&["volume", "snapshot", "create", "disk", "full"]);
    other("qemu-io", &["-f", "raw", "-c", "write -P 7 4M 1M", "-c", "discard 8M 2M", "-c", "flush", &uri]);
    let map = other("nbdinfo", &["--map=polder:changed:full", &uri]);
    let changed: u64 = map
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .filter(|words| words[2] == "1")
        .map(|words| words[1].parse::<u64>().unwrap())
        .sum();
    let mut expected = bytes.clone();
    expected[4 << 20..5 << 20].fill(7);
    expected[8 << 20..10 << 20].fill(0);
    let differing = bytes.chunks(CHUNK_LEN).zip(expected.chunks(CHUNK_LEN)).filter(|(before, after)| before != after);
    let differing = differing.count() * CHUNK_LEN;
    assert_eq!(changed, differing as u64, "{map}");
    home.done(&["volume", "resize", "disk", "80M"]);
    let smaller = home.polder(&["volume", "resize", "disk", "8M"]);
    smaller.expect_status(1);
    assert!(smaller.errors.contains("--shrink"), "{smaller}");
    server.stop();

    let clone = |source: &str, name: &str| home.done(&["volume", "clone", source, name]);
    clone("disk@full", "then");
    clone("disk", "now");
    let export = |name: &str| {
        let file = home.path(&format!("{name}.out"));
        home.done(&["image", "export", "--volume", name, &file]);
        let bytes = std::fs::read(&file).unwrap();
        std::fs::remove_file(file).unwrap();
        bytes
    };
    assert!(export("then") == bytes);
    expected.resize(80 << 20, 0);
    assert!(export("now") == expected);
    let diff: serde_json::Value =
        serde_json::from_str(&home.done(&["volume", "diff", "--json", "disk@full", "disk"])).unwrap();
    assert_eq!(diff["bytes"], differing, "{diff}");
    home.done(&["volume", "rollback", "disk", "full"]);
    assert!(export("disk") == bytes);
    home.done(&["volume", "rm", "disk", "now"]);
    home.done(&["store", "gc"]);
    assert!(export("then") == bytes);
    home.done(&["store", "verify"]);

    let listed = home.done(&["volume", "ls"]);
    assert!(listed.lines().count() == 2 && listed.contains("then"), "{listed}");
    for (arguments, words) in [
        (&["volume", "rm", "nothing"][..], "no volume nothing"),
        (&["volume", "create", "--size", "1", "odd"], "512"),
        (&["volume", "create", "--size", "1M", "then"], "already"),
        (&["volume", "clone", "then@never", "x"], "no snapshot never"),
        (&["volume", "rollback", "then", "never"], "no snapshot never"),
    ] {
        let outcome = home.polder(arguments);
        outcome.expect_status(1);
        assert!(outcome.errors.contains(words), "{arguments:?}: {outcome}");
    }
}

#[test]
fn a_damaged_store_says_what_is_lost_and_where() {
    let home = Home::new();
    let raw = home.path("disk.raw");
    std::fs::write(&raw, disk_content(4 << 20)).unwrap();
    home.done(&["image", "import", "--format", "raw", &raw, "disk"]);
    let segments = home.folder.join("store/segments");
    let segment = std::fs::read_dir(&segments).unwrap().next().unwrap().unwrap().path();
    flip(&segment, 1 << 20);
    let verified = home.polder(&["store", "verify"]);
    verified.expect_status(3);
    assert!(verified.console.contains("lost: image disk at byte"), "{verified}");
    let repaired = home.polder(&["store", "repair"]);
    repaired.expect_status(3);
    assert!(repaired.console.contains("lost: image disk at byte"), "{repaired}");
    // Brought in again, what was lost is there.
    home.done(&["image", "import", "--format", "raw", "--force", &raw, "disk"]);
    home.done(&["store", "verify"]);
}

fn flip(file: &Path, at: usize) {
    let mut bytes = std::fs::read(file).unwrap();
    bytes[at] ^= 0x40;
    std::fs::write(file, bytes).unwrap();
}

#[test]
fn an_image_goes_to_another_store_and_only_what_is_missing_travels() {
    let (here, there) = (Home::new(), Home::new());
    let raw = here.path("disk.raw");
    let mut bytes = disk_content(16 << 20);
    std::fs::write(&raw, &bytes).unwrap();
    here.done(&["image", "import", "--format", "raw", &raw, "one"]);
    bytes[..1 << 20].fill(0x55);
    std::fs::write(&raw, &bytes).unwrap();
    here.done(&["image", "import", "--format", "raw", &raw, "two"]);
    let place = format!("unix:{}", there.path("socket"));
    let server = there.serve(&["store", "serve", &place, "--push", "one,two"]);
    here.done(&["store", "push", "one", &place]);
    let said = here.done(&["store", "push", "two", &place]);
    assert!(said.contains("KiB") || said.contains(" B"), "{said}");
    let refused = here.polder(&["store", "push", "two", &place, "--name", "three"]);
    refused.expect_status(1);
    let pull = here.polder(&["store", "pull", "one", &place, "--name", "back"]);
    pull.expect_status(1);
    server.stop();
    let out = there.path("two.raw");
    there.done(&["image", "export", "two", &out]);
    assert!(std::fs::read(out).unwrap() == bytes);
    there.done(&["store", "verify"]);
    let outcome = there.polder(&["store", "serve", &place]);
    outcome.expect_status(1);
    assert!(outcome.errors.contains("nothing is allowed"), "{outcome}");
}

#[test]
fn what_is_in_an_encrypted_domain_needs_its_key_and_is_gone_when_it_is_erased() {
    let home = Home::new();
    let (raw, out) = (home.path("disk.raw"), home.path("out.raw"));
    let text: Vec<u8> = b"the dike at Kinderdijk is leaking ".iter().copied().cycle().take(4 << 20).collect();
    std::fs::write(&raw, &text).unwrap();
    home.done(&["store", "domain", "create", "vault"]);
    home.done(&["image", "import", "--format", "raw", "--domain", "vault", &raw, "disk"]);
    home.done(&["volume", "create", "--image", "disk", "data"]);
    home.done(&["volume", "create", "--size", "8M", "--encrypt", "own"]);
    let domains = home.done(&["store", "domain", "ls"]);
    assert!(domains.contains("vault") && domains.contains("own.key"), "{domains}");
    let export = |name: &str| {
        let _ = std::fs::remove_file(&out);
        home.polder(&["image", "export", "--volume", name, &out])
    };
    export("data").expect_status(0);
    assert!(std::fs::read(&out).unwrap() == text);
    for entry in walk(&home.folder) {
        let content = std::fs::read(&entry).unwrap();
        assert!(!content.windows(34).any(|window| window == &text[..34]), "{}", entry.display());
    }
    // Elsewhere for a while.
    let (key, aside) = (home.folder.join("keys/vault.key"), home.path("aside"));
    std::fs::rename(&key, &aside).unwrap();
    let locked = export("data");
    locked.expect_status(1);
    assert!(locked.errors.contains("domain vault is locked") && locked.errors.contains("vault.key"), "{locked}");
    let verified = home.done(&["store", "verify"]);
    assert!(verified.contains("records of locked domains"), "{verified}");
    std::fs::rename(&aside, &key).unwrap();
    let other = home.path("other.key");
    home.done(&["store", "domain", "rewrap", "vault", "--key-file", &other]);
    std::fs::remove_file(&key).unwrap();
    export("data").expect_status(0);
    let refused = home.polder(&["store", "domain", "erase", "vault"]);
    assert!(refused.errors.contains("--yes"), "{refused}");
    let erased = home.done(&["store", "domain", "erase", "vault", "--yes"]);
    assert!(erased.contains("Copies of the store"), "{erased}");
    assert!(!Path::new(&other).exists());
    let gone = export("data");
    gone.expect_status(1);
    assert!(gone.errors.contains("it was erased"), "{gone}");
    export("own").expect_status(0);
}

#[test]
fn a_volume_is_encrypted_under_a_key_of_its_own_or_not_made_at_all() {
    let home = Home::new();
    let (raw, out) = (home.path("disk.raw"), home.path("out.raw"));
    let bytes = disk_content(3 << 20);
    std::fs::write(&raw, &bytes).unwrap();
    home.done(&["image", "import", "--format", "raw", &raw, "open"]);
    // What cannot be made leaves neither a domain nor a key.
    for arguments in [&["--size", "1000"][..], &["--image", "missing"]] {
        home.polder(&[&["volume", "create", "own", "--encrypt"], arguments].concat()).expect_status(1);
        assert_eq!(home.done(&["store", "domain", "ls", "--json"]).trim(), "[]", "{arguments:?}");
        assert!(!home.folder.join("keys/own.key").exists(), "{arguments:?}");
    }
    // A copy of what is open.
    home.done(&["volume", "create", "own", "--encrypt", "--image", "open"]);
    home.done(&["volume", "clone", "own", "shared"]);
    home.done(&["volume", "clone", "own", "other", "--encrypt"]);
    let volumes: serde_json::Value = serde_json::from_str(&home.done(&["volume", "ls", "--json"])).unwrap();
    let domains: Vec<_> = volumes.as_array().unwrap().iter().map(|volume| volume["domain"].as_str().unwrap()).collect();
    assert_eq!(domains, ["other", "own", "own"]);
    assert_eq!(home.done(&["volume", "ls"]).matches(" own ").count(), 2);
    for name in ["own", "shared", "other"] {
        home.done(&["image", "export", "--volume", name, &out]);
        assert!(std::fs::read(&out).unwrap() == bytes, "{name}");
        std::fs::remove_file(&out).unwrap();
    }
    // The key of one opens none of the other's.
    home.done(&["store", "domain", "erase", "other", "--yes"]);
    home.polder(&["image", "export", "--volume", "other", &out]).expect_status(1);
    home.done(&["image", "export", "--volume", "shared", &out]);
    home.done(&["volume", "rm", "shared"]);
    let said = home.done(&["volume", "rm", "own"]);
    assert!(said.contains("polder store domain erase own --yes"), "{said}");
    home.done(&["store", "domain", "erase", "own", "--yes"]);
    home.done(&["volume", "create", "own", "--encrypt", "--size", "1M"]);
}

/// All files below a folder.
fn walk(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => found.extend(walk(&path)),
            false if path.is_file() => found.push(path),
            false => {}
        }
    }
    found
}
