//! Tests that mount or make network interfaces do so in namespaces of their own, which vanish with them.

use std::path::Path;
use std::process::Command;

const INSIDE: &str = "POLDER_TEST_INSIDE";

/// Whether this host lets us use a device of its kernel; if not, the test that needs it says so and is left out.
pub fn can_open(device: &str) -> bool {
    let opened = std::fs::OpenOptions::new().read(true).write(true).open(Path::new(device));
    if let Err(error) = &opened {
        eprintln!("left out: {device} cannot be opened ({error})");
    }
    opened.is_ok()
}

/// True in the namespaces. Else this runs the test of that name again inside them, root there whoever we are here, and the
/// caller is done: a failure inside is a failure here.
#[track_caller]
pub fn inside_namespaces(test: &str) -> bool {
    if std::env::var(INSIDE).is_ok_and(|inside| inside == test) {
        return true;
    }
    let mut command = Command::new("unshare");
    command.args(["--mount", "--net"]);
    if !rustix::process::geteuid().is_root() {
        command.args(["--user", "--map-root-user"]);
    }
    let ourselves = std::env::current_exe().expect("a running program has a path");
    command.arg(ourselves).args(["--exact", test, "--nocapture", "--include-ignored"]).env(INSIDE, test);
    let status = command.status().expect("unshare of util-linux is installed");
    assert!(status.success(), "{test} failed inside its namespaces ({status})");
    false
}
