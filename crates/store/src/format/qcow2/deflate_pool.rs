//! Threads that compress clusters; results come back in the order of the questions.

use super::compression::Deflater;
use std::collections::VecDeque;
use std::num::NonZeroUsize;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

/// Threads that compress for one image, at most.
const THREADS_MAX: usize = 16;
/// Clusters on their way, for each thread.
const IN_FLIGHT_PER_THREAD: usize = 8;

/// A cluster that was compressed.
pub(super) struct Packed {
    /// Its number in the disk.
    pub(super) cluster: u64,
    /// The bytes themselves.
    pub(super) bytes: Vec<u8>,
    /// The same compressed, unless that is no shorter.
    pub(super) compressed: Option<Vec<u8>>,
}

struct Job {
    cluster: u64,
    bytes: Vec<u8>,
    answer: SyncSender<Packed>,
}

/// The threads, and what they have in work.
pub(super) struct DeflatePool {
    jobs: Option<Sender<Job>>,
    in_flight: VecDeque<Receiver<Packed>>,
    in_flight_max: usize,
    threads: Vec<JoinHandle<()>>,
}

impl DeflatePool {
    pub(super) fn new(threads: NonZeroUsize, make: impl Fn() -> Deflater + Clone + Send + 'static) -> Self {
        let threads = threads.get().min(THREADS_MAX);
        let (jobs, job_list) = channel::<Job>();
        let job_list = Arc::new(Mutex::new(job_list));
        let spawn = |_| {
            let (job_list, make) = (job_list.clone(), make.clone());
            std::thread::spawn(move || compress_jobs(&mut make(), &job_list))
        };
        DeflatePool {
            jobs: Some(jobs),
            in_flight: VecDeque::new(),
            in_flight_max: threads * IN_FLIGHT_PER_THREAD,
            threads: (0..threads).map(spawn).collect(),
        }
    }

    /// Adds a cluster. When enough are on their way, the oldest is waited for and handed out.
    pub(super) fn push(&mut self, cluster: u64, bytes: Vec<u8>) -> Option<Packed> {
        let oldest = if self.in_flight.len() >= self.in_flight_max { self.pop() } else { None };
        let (answer, packed) = sync_channel(1);
        let jobs = self.jobs.as_ref().expect("closed only when dropped");
        jobs.send(Job { cluster, bytes, answer }).expect("the threads live as long as the pool");
        self.in_flight.push_back(packed);
        oldest
    }

    /// Waits for the oldest cluster; nothing when none is on its way.
    pub(super) fn pop(&mut self) -> Option<Packed> {
        let oldest = self.in_flight.pop_front()?;
        Some(oldest.recv().expect("a thread answers every job"))
    }
}

fn compress_jobs(deflater: &mut Deflater, jobs: &Mutex<Receiver<Job>>) {
    loop {
        let job = jobs.lock().expect("no holder panics").recv();
        let Ok(Job { cluster, bytes, answer }) = job else { return };
        let compressed = deflater.deflate(&bytes);
        // The writer may have gone after an error.
        let _ = answer.send(Packed { cluster, bytes, compressed });
    }
}

impl Drop for DeflatePool {
    fn drop(&mut self) {
        self.jobs = None;
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
