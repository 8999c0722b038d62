//! Stand-ins for a device's surroundings in unit tests.

use std::io::{self, Write};
use std::sync::{Arc, Mutex};

use polder_machine::{GuestRequest, InterruptLine, RequestSink};

/// A wire that remembers its level and counts its rising edges.
#[derive(Default)]
pub(crate) struct RecordingLine(Mutex<(bool, u32)>);

impl RecordingLine {
    pub(crate) fn level(&self) -> bool {
        self.0.lock().unwrap().0
    }

    pub(crate) fn rising_edges(&self) -> u32 {
        self.0.lock().unwrap().1
    }
}

impl InterruptLine for RecordingLine {
    fn set(&self, asserted: bool) {
        let mut state = self.0.lock().unwrap();
        if asserted && !state.0 {
            state.1 += 1;
        }
        state.0 = asserted;
    }
}

/// Remembers what a guest asked for.
#[derive(Default)]
pub(crate) struct RecordingRequests(Mutex<Vec<GuestRequest>>);

impl RecordingRequests {
    pub(crate) fn taken(&self) -> Vec<GuestRequest> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl RequestSink for RecordingRequests {
    fn request(&self, request: GuestRequest) {
        self.0.lock().unwrap().push(request);
    }
}

/// An output that remembers what was written and can be full.
#[derive(Default, Clone)]
pub(crate) struct SharedOutput(Arc<Mutex<(Vec<u8>, bool)>>);

impl SharedOutput {
    pub(crate) fn taken(&self) -> Vec<u8> {
        std::mem::take(&mut self.0.lock().unwrap().0)
    }

    pub(crate) fn set_full(&self, full: bool) {
        self.0.lock().unwrap().1 = full;
    }
}

impl Write for SharedOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut state = self.0.lock().unwrap();
        if state.1 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        state.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
