//! Processes of the test's own: what is killed, and what uses a file system that the test serves, which cannot be the same process
//! (the kernel holds locks of a process's memory while it waits for the file system).

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

const STORE: &str = "POLDER_CRASH_STORE";
const MODEL: &str = "POLDER_CRASH_MODEL";
const SEED: &str = "POLDER_CRASH_SEED";
const MAY_FAIL: &str = "POLDER_CRASH_MAY_FAIL";
const OUTSIDE: &str = "POLDER_CRASH_OUTSIDE";

/// What a child is to do.
pub struct Task {
    pub store: PathBuf,
    pub model: PathBuf,
    pub seed: u64,
    /// Whether operations may fail.
    pub may_fail: bool,
    /// A file or folder beside the store that the task is about.
    pub outside: PathBuf,
}

impl Task {
    /// A task at a store and its model.
    pub fn new(store: impl Into<PathBuf>, model: impl Into<PathBuf>, seed: u64) -> Task {
        Task { store: store.into(), model: model.into(), seed, may_fail: false, outside: PathBuf::new() }
    }

    /// The same, where operations may fail.
    pub fn that_may_fail(self) -> Task {
        Task { may_fail: true, ..self }
    }

    /// Starts a process that runs one test, which is a task and not run otherwise.
    pub fn start(&self, test: &str) -> Child {
        Command::new(std::env::current_exe().unwrap())
            .args(["--exact", test, "--ignored", "--nocapture", "--test-threads=1"])
            .env(STORE, &self.store)
            .env(MODEL, &self.model)
            .env(SEED, self.seed.to_string())
            .env(MAY_FAIL, self.may_fail.to_string())
            .env(OUTSIDE, &self.outside)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    /// Runs such a process to its end: what it said, if it failed.
    pub fn run(&self, test: &str) -> Result<(), String> {
        let output = self.start(test).wait_with_output().unwrap();
        match output.status.success() {
            true => Ok(()),
            false => Err(format!("{}: {}", output.status, String::from_utf8_lossy(&output.stderr))),
        }
    }

    /// The task of this process, if it is one.
    pub fn of_this_process() -> Option<Task> {
        Some(Task {
            store: std::env::var_os(STORE)?.into(),
            model: std::env::var_os(MODEL)?.into(),
            seed: std::env::var(SEED).ok()?.parse().ok()?,
            may_fail: std::env::var(MAY_FAIL).ok()?.parse().ok()?,
            outside: std::env::var_os(OUTSIDE)?.into(),
        })
    }
}
