//! INTx: four level-triggered wires that all slots share.

use std::sync::{Arc, Mutex};

use polder_machine::InterruptLine;

use crate::lock;

/// A wire that is high while any of its holders wants it so.
pub struct SharedLine {
    line: Arc<dyn InterruptLine>,
    /// One bit a slot.
    asserted: Mutex<u32>,
}

impl SharedLine {
    /// Shares a wire to an interrupt controller.
    pub fn new(line: Arc<dyn InterruptLine>) -> Arc<Self> {
        Arc::new(SharedLine { line, asserted: Mutex::new(0) })
    }

    /// One slot's end of the wire (slot < 32).
    pub fn end(self: &Arc<Self>, slot: u8) -> Arc<dyn InterruptLine> {
        Arc::new(LineEnd { shared: self.clone(), bit: 1 << (slot & 31) })
    }
}

struct LineEnd {
    shared: Arc<SharedLine>,
    bit: u32,
}

impl InterruptLine for LineEnd {
    fn set(&self, asserted: bool) {
        // The wire is driven under the lock, so that levels reach the controller in the order of the changes.
        let mut bits = lock(&self.shared.asserted);
        let before = *bits != 0;
        *bits = if asserted { *bits | self.bit } else { *bits & !self.bit };
        let after = *bits != 0;
        if before != after {
            self.shared.line.set(after);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Recorder(Mutex<Vec<bool>>);

    impl InterruptLine for Recorder {
        fn set(&self, asserted: bool) {
            self.0.lock().unwrap().push(asserted);
        }
    }

    #[test]
    fn a_shared_wire_falls_when_its_last_holder_lets_go() {
        let recorder = Arc::new(Recorder(Mutex::new(Vec::new())));
        let shared = SharedLine::new(recorder.clone());
        let (first, second) = (shared.end(1), shared.end(5));
        first.set(true);
        second.set(true);
        first.set(false);
        first.set(false);
        assert_eq!(*recorder.0.lock().unwrap(), [true]);
        second.set(false);
        assert_eq!(*recorder.0.lock().unwrap(), [true, false]);
    }
}
