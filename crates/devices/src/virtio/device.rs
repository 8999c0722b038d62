//! What the transport asks of a device.

use std::sync::Arc;

use polder_memory::GuestMemory;

use super::Queue;

/// Device types (section 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceType {
    Net = 1,
    Block = 2,
    Console = 3,
    Rng = 4,
    Balloon = 5,
    Vsock = 19,
}

/// The device could not start. The driver sees DEVICE_NEEDS_RESET.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// A queue that the device cannot do without was not set up.
    #[error("the driver did not enable queue {queue}")]
    MissingQueue { queue: u16 },
    /// The host gave no thread or file descriptor.
    #[error("the host could not start the device's worker")]
    Host(#[from] std::io::Error),
}

/// Interrupts from a device to its driver. Callable from any thread; never blocks.
pub trait DeviceInterrupts: Send + Sync {
    /// Chains were given back on a queue. Call through [`Queue::tell`], which asks whether the driver wants it.
    fn queue_used(&self, queue: u16);
    /// The device's configuration changed.
    fn config_changed(&self);
    /// The device found a fault of the driver and stopped (2.1.2).
    fn needs_reset(&self);
}

/// What a device gets when the driver is ready.
pub struct Activation {
    pub memory: GuestMemory,
    /// One for each of [`VirtioDevice::queue_sizes`]; `None` where the driver enabled none.
    pub queues: Vec<Option<Queue>>,
    pub interrupts: Arc<dyn DeviceInterrupts>,
    /// The negotiated features.
    pub features: u64,
}

impl Activation {
    /// Takes a queue that the device cannot do without.
    pub fn take_queue(&mut self, index: u16) -> Result<Queue, ActivateError> {
        let queue = self.queues.get_mut(index as usize).and_then(Option::take);
        queue.ok_or(ActivateError::MissingQueue { queue: index })
    }
}

/// A virtio device behind a transport. Methods are called on vCPU threads and lock inside; none but `reset` may wait for I/O.
///
/// Order: `activate` at most once, then any number of `notify`, then `reset`; after `reset` the device is as new.
/// `config_read`, `config_write` and `features` can come at any time.
pub trait VirtioDevice: Send + Sync {
    fn device_type(&self) -> DeviceType;

    /// The device's own feature bits. The transport adds VERSION_1, INDIRECT_DESC and EVENT_IDX.
    fn features(&self) -> u64;

    /// The largest size of each queue: powers of two up to [`super::QUEUE_SIZE_MAX`].
    fn queue_sizes(&self) -> Vec<u16>;

    /// Reads configuration space from `offset`; bytes past its end stay zero ([`copy_config`] does just that).
    fn config_read(&self, offset: u64, target: &mut [u8]);

    /// Writes configuration space. Most devices have nothing to write.
    fn config_write(&self, _offset: u64, _source: &[u8]) {}

    /// The driver is ready: starts work. The queues may hold chains already.
    fn activate(&self, activation: Activation) -> Result<(), ActivateError>;

    /// The driver rang a queue's doorbell; wake whoever works on it. Queues that do not exist never come.
    fn notify(&self, queue: u16);

    /// Stops all work and waits until nothing is in flight: afterwards the device touches no guest memory. Runs on a thread of its
    /// own, so it may wait for the host; the device may not have been activated.
    fn reset(&self);
}

/// Copies the part of a device's configuration structure that an access at `offset` covers; the rest becomes zero.
pub fn copy_config(config: &[u8], offset: u64, target: &mut [u8]) {
    target.fill(0);
    let start = usize::try_from(offset).unwrap_or(usize::MAX).min(config.len());
    let available = &config[start..];
    let len = available.len().min(target.len());
    target[..len].copy_from_slice(&available[..len]);
}
