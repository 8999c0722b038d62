//! Device threads that sleep until they are signalled, and that end.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use crate::lock::lock;

/// A wake-up call for a worker: an eventfd, and whether the worker is to end.
pub struct Signal {
    event: OwnedFd,
    stop: AtomicBool,
}

impl Signal {
    /// A signal that is not raised.
    pub fn new() -> io::Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Signal { event, stop: AtomicBool::new(false) })
    }

    /// Wakes the worker. Never blocks.
    pub fn raise(&self) {
        // The only failure is a counter at its maximum: then the signal is raised already.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }

    /// Asks the worker to end.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        self.raise();
    }

    /// Whether the worker is to end.
    pub fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    /// Lowers the signal. Call before looking for work and at [`Signal::is_stopped`], so that what comes meanwhile raises it again.
    pub fn lower(&self) {
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.event, &mut count);
    }

    /// Sleeps until the signal is raised, then lowers it. Returns whether to go on.
    pub fn wait(&self) -> bool {
        if !self.is_stopped() {
            self.wait_raised();
        }
        !self.is_stopped()
    }

    /// Sleeps until the signal is raised or the time is over; lowers it. Returns whether to go on.
    pub fn wait_at_most(&self, time: Duration) -> bool {
        let time = rustix::time::Timespec {
            tv_sec: time.as_secs().try_into().unwrap_or(i64::MAX),
            tv_nsec: time.subsec_nanos().into(),
        };
        if !self.is_stopped() {
            // An early return costs the caller one look at its clock.
            let _ = poll(&mut [PollFd::new(&self.event, PollFlags::IN)], Some(&time));
            self.lower();
        }
        !self.is_stopped()
    }

    /// Sleeps until the signal is raised, even if the worker is to end: for those who wait for what is in flight.
    pub fn wait_raised(&self) {
        // A failed poll (the kernel is short of memory) makes one idle turn; an interrupted one is repeated.
        while poll(&mut [PollFd::new(&self.event, PollFlags::IN)], None) == Err(rustix::io::Errno::INTR) {}
        self.lower();
    }
}

impl AsFd for Signal {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

/// A thread and its signal. Dropping it ends the thread and waits for that.
pub struct Worker {
    signal: Arc<Signal>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Starts a thread. `body` returns soon after its signal says stop.
    pub fn spawn(name: &str, body: impl FnOnce(Arc<Signal>) + Send + 'static) -> io::Result<Self> {
        let signal = Arc::new(Signal::new()?);
        let for_thread = signal.clone();
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || body(for_thread))?;
        Ok(Worker { signal, thread: Some(thread) })
    }

    /// Wakes the thread.
    pub fn raise(&self) {
        self.signal.raise();
    }

    /// The thread's signal, for others that wake it.
    pub fn signal(&self) -> &Arc<Signal> {
        &self.signal
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.signal.stop();
        if let Some(thread) = self.thread.take() {
            // A panic of the worker is a bug that the thread has reported; the device is stopped either way.
            let _ = thread.join();
        }
    }
}

/// A device's worker: there between activation and reset.
#[derive(Default)]
pub struct WorkerSlot(Mutex<Option<Worker>>);

impl WorkerSlot {
    /// Takes in the worker of a device that was activated.
    pub fn fill(&self, worker: Worker) {
        *lock(&self.0) = Some(worker);
    }

    /// Wakes the worker, if there is one.
    pub fn raise(&self) {
        if let Some(worker) = &*lock(&self.0) {
            worker.raise();
        }
    }

    /// Ends the worker and waits for that, without the lock: its device may be notified meanwhile.
    pub fn empty(&self) {
        let worker = lock(&self.0).take();
        drop(worker);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn a_dropped_worker_has_ended() {
        let (sender, receiver) = mpsc::channel();
        let worker = Worker::spawn("test", move |signal| {
            while signal.wait() {
                sender.send(()).unwrap();
            }
        })
        .unwrap();
        worker.raise();
        receiver.recv_timeout(Duration::from_secs(10)).unwrap();
        drop(worker);
        assert!(matches!(receiver.try_recv(), Err(mpsc::TryRecvError::Disconnected)));
    }
}
