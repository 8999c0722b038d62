//! A few threads for what has to wait: reads of parts of a tree that are not in memory, writes to parts of blocks, operations on a log
//! that is full.
//!
//! Jobs are bounded by those who hand them in: a front end has no more in flight than it takes requests.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};

/// Threads at most.
const THREADS_MAX: usize = 8;

type Job = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct Jobs {
    waiting: VecDeque<Job>,
    threads: usize,
    idle: usize,
}

/// The threads, which come when they are needed and go when the last handle does.
#[derive(Clone, Default)]
pub(crate) struct Workers(Arc<Shared>);

#[derive(Default)]
struct Shared {
    jobs: Mutex<Jobs>,
    available: Condvar,
}

impl Shared {
    fn jobs(&self) -> MutexGuard<'_, Jobs> {
        self.jobs.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

impl Workers {
    /// Has a job done by one of the threads; on this one if there can be none.
    pub fn run(&self, job: impl FnOnce() + Send + 'static) {
        let mut jobs = self.0.jobs();
        if jobs.idle <= jobs.waiting.len() && jobs.threads < THREADS_MAX {
            let shared = Arc::downgrade(&self.0);
            let thread = std::thread::Builder::new().name("store-worker".to_owned()).spawn(move || work(&shared));
            match thread {
                Ok(_) => jobs.threads += 1,
                Err(error) if jobs.threads == 0 => {
                    tracing::warn!(%error, "no thread can be had for the store");
                    drop(jobs);
                    return job();
                }
                Err(_) => {}
            }
        }
        jobs.waiting.push_back(Box::new(job));
        drop(jobs);
        self.0.available.notify_one();
    }
}

/// How long a thread waits for another job.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(10);

fn work(shared: &std::sync::Weak<Shared>) {
    while let Some(shared) = shared.upgrade() {
        let mut jobs = shared.jobs();
        let job = loop {
            if let Some(job) = jobs.waiting.pop_front() {
                break Some(job);
            }
            jobs.idle += 1;
            let (guard, waited) =
                shared.available.wait_timeout(jobs, PATIENCE).unwrap_or_else(|poisoned| poisoned.into_inner());
            jobs = guard;
            jobs.idle -= 1;
            if waited.timed_out() && jobs.waiting.is_empty() {
                jobs.threads -= 1;
                break None;
            }
        };
        drop(jobs);
        match job {
            Some(job) => job(),
            None => return,
        }
    }
}
