//! virtio 1.2 devices over PCI.
//!
//! A device implements [`VirtioDevice`]: it says what it is and, once the driver is ready, gets its [`Queue`]s in an
//! [`Activation`] and works on them on threads of its own ([`Worker`]). [`VirtioPciFunction`] is everything between the device
//! and the PCI bus. Section numbers are those of "Virtual I/O Device (VIRTIO) Version 1.2".
//!
//! Invariants:
//! - A descriptor chain is copied out of guest memory once and checked; a [`Chain`] holds only ranges that are RAM.
//! - A malformed queue stops the device with DEVICE_NEEDS_RESET; it never stops the machine.
//! - After [`VirtioDevice::reset`] has returned, the device touches no guest memory.
//!
//! Modules: `queue` and `chain` (split virtqueues), `device` (the trait), `worker` (threads that end), `interrupts` (from a device
//! to MSI-X or INTx), `common_config` (the registers of 4.1.4.3), `transport` (the PCI function), and one for each device.

pub mod balloon;
pub mod block;
mod chain;
mod common_config;
pub mod console;
mod device;
mod interrupts;
pub mod net;
mod queue;
#[cfg(test)]
mod queue_tests;
pub mod rng;
#[cfg(test)]
pub(crate) mod testing;
mod transport;
#[cfg(test)]
mod transport_tests;
pub mod vsock;
mod worker;

pub use chain::{BufferError, Buffers, Chain};
pub use device::{ActivateError, Activation, DeviceInterrupts, DeviceType, VirtioDevice, copy_config};
pub use queue::{CHAIN_LEN_MAX, QUEUE_SIZE_MAX, Queue, QueueError, QueuePlace};
pub use transport::VirtioPciFunction;
pub use worker::{Signal, Worker, WorkerSlot};

/// The driver may use indirect descriptor tables (2.7.5.3).
pub const FEATURE_INDIRECT: u64 = 1 << 28;
/// Both sides say by index when they want to hear of each other (2.7.10).
pub const FEATURE_EVENT_INDEX: u64 = 1 << 29;
/// The device is not a legacy one (6.1).
pub const FEATURE_VERSION_1: u64 = 1 << 32;
