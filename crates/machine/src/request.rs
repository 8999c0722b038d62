//! What a guest asks of the machine that it runs on.

/// A guest's request to whoever runs the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuestRequest {
    /// ACPI S5: switch the machine off.
    PowerOff,
    /// The reset register (or the keyboard controller, port 0xcf9): start anew.
    Reset,
    /// pvpanic: the guest kernel panicked.
    Panicked,
    /// pvpanic: the guest kernel panicked and its own crash kernel takes over; the machine runs on.
    CrashLoaded,
    /// A value was written to the test device's debug-exit port.
    DebugExit(u32),
}

/// Takes the requests; the machine's control thread implements it. Callable from any thread; never blocks.
pub trait RequestSink: Send + Sync {
    fn request(&self, request: GuestRequest);
}
