//! Interrupts between devices and engines: messages, lines, and the end of an interrupt.

use std::sync::Arc;

/// A message-signalled interrupt: a 32-bit write of `data` to `address` (SDM vol. 3, 11.11).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct MsiMessage {
    pub address: u64,
    pub data: u32,
}

/// Takes interrupt messages; an engine implements it. Callable from any thread; never blocks.
pub trait MsiSink: Send + Sync {
    fn send(&self, message: MsiMessage);
}

/// Told that a local APIC ended a level-triggered interrupt; the I/O APIC implements it. Called on vCPU threads.
pub trait EoiListener: Send + Sync {
    fn end_of_interrupt(&self, vector: u8);
}

/// A wire to an interrupt controller's pin; the I/O APIC makes these. Callable from any thread.
pub trait InterruptLine: Send + Sync {
    /// Sets the level of the wire. An edge-triggered pin interrupts on the change from low to high.
    fn set(&self, asserted: bool);

    /// A short pulse: high, then low.
    fn pulse(&self) {
        self.set(true);
        self.set(false);
    }
}

/// A wire that leads nowhere.
impl InterruptLine for () {
    fn set(&self, _asserted: bool) {}
}

impl<T: InterruptLine + ?Sized> InterruptLine for Arc<T> {
    fn set(&self, asserted: bool) {
        (**self).set(asserted);
    }
}
