//! A writer that never blocks: bytes wait in a bounded queue for a thread that may.
//!
//! Serial and console output go through it, so that a terminal that has stopped (Ctrl-S) or a slow pipe stops the guest's output and
//! never a vCPU. At the bound it says `WouldBlock`; when there is room again it calls back, once for each time it was full.

use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    waiting: Vec<u8>,
    /// The thread is writing bytes that it took out of `waiting`.
    writing: bool,
    /// Somebody was told `WouldBlock` since the last call back.
    was_full: bool,
    /// The writer failed: nobody will ever read the rest.
    broken: bool,
    closed: bool,
    on_room: Option<Arc<dyn Fn() + Send + Sync>>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The non-blocking end. Dropping it lets the thread write what waits and end.
pub struct QueuedWriter {
    shared: Arc<Shared>,
    waiting_len_max: usize,
    thread: Option<JoinHandle<()>>,
}

/// Waits for the bytes to be written; sets the call back. Cheap to clone.
#[derive(Clone)]
pub struct QueuedWriterHandle {
    shared: Arc<Shared>,
}

impl QueuedWriter {
    /// Starts a thread that writes to `target` what this end takes. At most `waiting_len_max` bytes wait.
    pub fn spawn(name: &str, target: impl Write + Send + 'static, waiting_len_max: usize) -> io::Result<Self> {
        let shared = Arc::new(Shared { state: Mutex::default(), changed: Condvar::new() });
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn({
            let shared = shared.clone();
            move || write_all(&shared, target)
        })?;
        Ok(QueuedWriter { shared, waiting_len_max, thread: Some(thread) })
    }

    /// A handle to wait and to be called back.
    pub fn handle(&self) -> QueuedWriterHandle {
        QueuedWriterHandle { shared: self.shared.clone() }
    }
}

impl QueuedWriterHandle {
    /// Sets what is called, on the writing thread, when there is room again after `WouldBlock`.
    pub fn set_on_room(&self, on_room: impl Fn() + Send + Sync + 'static) {
        self.shared.lock().on_room = Some(Arc::new(on_room));
    }

    /// Waits until everything taken so far is written, at most `timeout`; whether it is.
    pub fn drain(&self, timeout: std::time::Duration) -> bool {
        let state = self.shared.lock();
        let unwritten = |state: &mut State| (!state.waiting.is_empty() || state.writing) && !state.broken;
        let result = self.shared.changed.wait_timeout_while(state, timeout, unwritten);
        !result.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }
}

fn write_all(shared: &Shared, mut target: impl Write) {
    loop {
        let mut state = shared.lock();
        state.writing = false;
        shared.changed.notify_all();
        while state.waiting.is_empty() && !state.closed {
            state = shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if state.waiting.is_empty() {
            return;
        }
        let bytes = std::mem::take(&mut state.waiting);
        state.writing = true;
        let on_room = if std::mem::take(&mut state.was_full) { state.on_room.clone() } else { None };
        drop(state);
        if let Some(on_room) = on_room {
            on_room();
        }
        if target.write_all(&bytes).and_then(|()| target.flush()).is_err() {
            let mut state = shared.lock();
            state.broken = true;
            state.waiting = Vec::new();
            shared.changed.notify_all();
            return;
        }
    }
}

impl Write for QueuedWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut state = self.shared.lock();
        if state.broken {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let taken = bytes.len().min(self.waiting_len_max.saturating_sub(state.waiting.len()));
        if taken == 0 && !bytes.is_empty() {
            state.was_full = true;
            return Err(io::ErrorKind::WouldBlock.into());
        }
        state.waiting.extend_from_slice(&bytes[..taken]);
        self.shared.changed.notify_all();
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for QueuedWriter {
    fn drop(&mut self) {
        self.shared.lock().closed = true;
        self.shared.changed.notify_all();
        // The thread may be stuck in a write to somebody who never reads; it holds nothing but its own buffer and ends by itself.
        drop(self.thread.take());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::time::Duration;

    /// Blocks in each write until it is told to go on.
    struct Gate(mpsc::Receiver<()>, mpsc::Sender<Vec<u8>>);

    impl Write for Gate {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.1.send(bytes.to_vec()).map_err(|_| io::ErrorKind::BrokenPipe)?;
            self.0.recv().map_err(|_| io::ErrorKind::BrokenPipe)?;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_stuck_reader_fills_the_queue_and_room_is_announced() {
        let (go, gate) = mpsc::channel();
        let (written, seen) = mpsc::channel();
        let mut writer = QueuedWriter::spawn("test output", Gate(gate, written), 4).unwrap();
        let (room, had_room) = mpsc::channel();
        writer.handle().set_on_room(move || room.send(()).unwrap());
        assert_eq!(writer.write(b"ab").unwrap(), 2);
        assert_eq!(seen.recv_timeout(Duration::from_secs(10)).unwrap(), b"ab");
        assert_eq!(writer.write(b"cdefgh").unwrap(), 4);
        assert_eq!(writer.write(b"gh").unwrap_err().kind(), io::ErrorKind::WouldBlock);
        go.send(()).unwrap();
        had_room.recv_timeout(Duration::from_secs(10)).unwrap();
        assert_eq!(seen.recv_timeout(Duration::from_secs(10)).unwrap(), b"cdef");
        go.send(()).unwrap();
        assert!(writer.handle().drain(Duration::from_secs(10)));
    }

    #[test]
    fn a_reader_that_went_away_breaks_the_writer() {
        let (_, gate) = mpsc::channel();
        let (written, seen) = mpsc::channel();
        drop(seen);
        let mut writer = QueuedWriter::spawn("test output", Gate(gate, written), 4).unwrap();
        writer.write_all(b"x").unwrap();
        assert!(writer.handle().drain(Duration::from_secs(10)));
        assert_eq!(writer.write(b"y").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }
}
