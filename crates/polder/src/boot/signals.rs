//! The signals that end polder stop the machine first, so that the terminal is restored and the guest's output is written.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

use anyhow::{Context, Result};
use polder_vmm::Control;

const SIGNALS: [(libc::c_int, &str); 4] =
    [(libc::SIGINT, "SIGINT"), (libc::SIGTERM, "SIGTERM"), (libc::SIGHUP, "SIGHUP"), (libc::SIGQUIT, "SIGQUIT")];

/// The signals, blocked in this thread and in all that it starts.
pub struct StopSignals(libc::sigset_t);

/// Which signal arrived, if one did.
pub struct Caught(Arc<AtomicI32>);

impl Caught {
    /// Starts a thread that stops the machine when a number of a signal comes from `orders`, or its end.
    pub fn listen(&self, orders: OwnedFd, control: Control) -> Result<()> {
        let caught = self.0.clone();
        let body = move || {
            let mut number = [0];
            if matches!(File::from(orders).read(&mut number), Ok(1)) {
                caught.store(number[0].into(), Ordering::SeqCst);
            }
            control.stop();
        };
        std::thread::Builder::new().name("orders".to_owned()).spawn(body).context("the host gave no thread")?;
        Ok(())
    }

    pub fn name(&self) -> Option<&'static str> {
        let number = self.0.load(Ordering::SeqCst);
        SIGNALS.iter().find(|(signal, _)| *signal == number).map(|(_, name)| *name)
    }
}

impl StopSignals {
    /// A descriptor from which the signals are read as they arrive, by a process that waits for more than signals.
    pub fn descriptor(&self) -> io::Result<File> {
        // SAFETY: the set is valid.
        let descriptor = unsafe { libc::signalfd(-1, &self.0, libc::SFD_CLOEXEC) };
        if descriptor < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call made the descriptor, and nobody else owns it.
        Ok(unsafe { File::from_raw_fd(descriptor) })
    }

    /// Blocks the signals. Call while the process has one thread.
    pub fn block() -> io::Result<Self> {
        // SAFETY: a sigset_t of zeros is valid storage, and sigemptyset makes it a set before it is used.
        let set = unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&mut set);
            for (signal, _) in SIGNALS {
                libc::sigaddset(&mut set, signal);
            }
            set
        };
        // SAFETY: both pointers are valid or null, as the call allows.
        match unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) } {
            0 => Ok(StopSignals(set)),
            error => Err(io::Error::from_raw_os_error(error)),
        }
    }

    /// Starts the thread that waits for the signals and stops the machine. A second signal ends the process at once.
    pub fn stop_on_arrival(self, control: Control) -> Result<Caught> {
        self.on_arrival(move || control.stop())
    }

    /// As [`stop_on_arrival`](Self::stop_on_arrival) for what is not a machine.
    pub fn on_arrival(self, stop: impl FnOnce() + Send + 'static) -> Result<Caught> {
        let caught = Arc::new(AtomicI32::new(0));
        let for_thread = caught.clone();
        let body = move || {
            let mut signal = 0;
            // SAFETY: the set and the result are valid for the call.
            if unsafe { libc::sigwait(&self.0, &mut signal) } == 0 {
                for_thread.store(signal, Ordering::SeqCst);
                stop();
            }
            // SAFETY: the set is valid; the signals' default action is wanted from here on.
            unsafe { libc::pthread_sigmask(libc::SIG_UNBLOCK, &self.0, std::ptr::null_mut()) };
            loop {
                std::thread::park();
            }
        };
        std::thread::Builder::new().name("signals".to_owned()).spawn(body).context("the host gave no thread")?;
        Ok(Caught(caught))
    }
}
