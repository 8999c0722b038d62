//! Promise: `polder run debian` boots a Debian image, runs a command inside and ends with its output and exit status.
//!
//! The image is made once into the cache of test guests; every test runs on private copies of its disk.

use polder_tests::{Outcome, image_home, polder};
use std::process::Command;
use std::sync::Mutex;
use std::time::Duration;

/// An interpreted Debian takes about a minute to its agent.
const BOOT_LIMIT: Duration = Duration::from_secs(600);
const COMMAND_LIMIT: Duration = Duration::from_secs(60);
/// One Debian at a time: two would slow each other down beyond their limits on a small host. (nextest: .config/nextest.toml)
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn run(arguments: &[&str], limit: Duration) -> Outcome {
    Outcome::of(Command::new(polder()).args(arguments).env("POLDER_HOME", image_home()), limit)
}

#[test]
fn a_command_runs_in_a_debian_and_its_output_and_status_come_back() {
    let _alone = ONE_AT_A_TIME.lock();
    let script = "grep ^PRETTY /etc/os-release; echo to-stderr >&2; exit 37";
    let outcome = run(&["run", "debian", "--", "sh", "-c", script], BOOT_LIMIT);
    outcome.expect_status(37).expect_console("PRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"");
    assert!(outcome.errors.contains("to-stderr"), "standard error comes back\n{outcome}");
}

#[test]
fn an_instance_in_the_background_is_listed_used_and_removed() {
    let _alone = ONE_AT_A_TIME.lock();
    let _ = run(&["rm", "--force", "background"], COMMAND_LIMIT);
    run(&["run", "-d", "--name", "background", "debian"], COMMAND_LIMIT).expect_status(0);
    run(&["ps"], COMMAND_LIMIT).expect_status(0).expect_console("background");
    run(&["exec", "background", "--", "hostname"], BOOT_LIMIT).expect_status(0).expect_console("background");
    run(&["exec", "background", "--", "false"], COMMAND_LIMIT).expect_status(1);
    run(&["stop", "background"], BOOT_LIMIT).expect_status(0);
    run(&["rm", "background"], COMMAND_LIMIT).expect_status(0);
    let listed = run(&["ps"], COMMAND_LIMIT);
    assert!(!listed.console.contains("background"), "a removed instance is not listed\n{listed}");
}

#[test]
fn an_image_or_instance_that_is_not_there_is_named() {
    for arguments in [["run", "no-such-image"], ["stop", "no-such-instance"], ["rm", "no-such-instance"]] {
        let outcome = run(&arguments, COMMAND_LIMIT);
        outcome.expect_status(1);
        assert!(outcome.errors.contains(arguments[1]), "the message names {}\n{outcome}", arguments[1]);
    }
}

/// The repository is made inside the guest, so that the test needs no network.
#[test]
fn apt_get_installs_a_package_from_a_local_repository_inside() {
    let _alone = ONE_AT_A_TIME.lock();
    let script = "set -e\n\
        mkdir -p /srv/repository /tmp/p/DEBIAN /tmp/p/usr/bin\n\
        printf 'Package: polder-greeting\\nVersion: 1\\nArchitecture: all\\nMaintainer: nobody <nobody@localhost>\\nDescription: a greeting\\n' > /tmp/p/DEBIAN/control\n\
        printf '#!/bin/sh\\necho greeted-$((6 * 7))\\n' > /tmp/p/usr/bin/polder-greeting\n\
        chmod 755 /tmp/p/usr/bin/polder-greeting\n\
        cd /srv/repository && dpkg-deb --build /tmp/p greeting.deb\n\
        { dpkg-deb --field greeting.deb; echo 'Filename: ./greeting.deb'; echo \"Size: $(stat -c %s greeting.deb)\"; echo \"SHA256: $(sha256sum greeting.deb | cut -d' ' -f1)\"; } > Packages\n\
        rm -f /etc/apt/sources.list.d/*\n\
        echo 'deb [trusted=yes] file:/srv/repository ./' > /etc/apt/sources.list\n\
        apt-get update\n\
        apt-get install --yes polder-greeting\n\
        polder-greeting";
    let outcome = run(&["run", "debian", "--", "sh", "-c", script], BOOT_LIMIT);
    outcome.expect_status(0).expect_console("greeted-42");
}

/// A script of programs whose right results are known, in an image that has them (`polder-test-work`, made by `cargo xtask test --nightly`). It names each part that went well.
fn known_results(cpus: &str, script: &str, parts: &[&str]) {
    let _alone = ONE_AT_A_TIME.lock();
    let arguments = ["run", "--cpus", cpus, "--memory", "2G", "polder-test-work", "--", "sh", "-c", script];
    let outcome = run(&arguments, Duration::from_secs(3600));
    outcome.expect_status(0);
    for part in parts {
        outcome.expect_console(&format!("{part}-good"));
    }
}

fn known_programs_run(cpus: &str) {
    known_results(cpus, include_str!("known_programs.sh"), &["gcc", "openssl", "python", "stress"]);
}

fn code_is_made_at_run_time(cpus: &str) {
    known_results(cpus, include_str!("code_at_run_time.sh"), &["luajit", "node", "php", "sbcl", "java"]);
}

#[test]
#[ignore = "takes long: cargo xtask test --nightly runs it"]
fn known_programs_give_their_known_results_inside() {
    known_programs_run("1");
}

#[test]
#[ignore = "takes long: cargo xtask test --nightly runs it"]
fn known_programs_give_their_known_results_on_four_vcpus() {
    known_programs_run("4");
}

#[test]
#[ignore = "takes long: cargo xtask test --nightly runs it"]
fn compilers_at_run_time_give_their_known_results_inside() {
    code_is_made_at_run_time("1");
}

#[test]
#[ignore = "takes long: cargo xtask test --nightly runs it"]
fn compilers_at_run_time_give_their_known_results_on_two_vcpus() {
    code_is_made_at_run_time("2");
}
