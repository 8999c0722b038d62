//! virtio-net (5.1): a network card over a backend that moves frames, a TAP interface for one.
//!
//! One worker thread moves frames both ways. Nothing waits for the other direction: a frame that finds no receive buffer is kept
//! until there is one while sending goes on, and a frame that the host does not take yet stays in the queue while
//! receiving goes on.
//!
//! Modules: `tap` (the backend), `worker` (the thread).

mod tap;
mod worker;

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex};

pub use self::tap::{Tap, TapError};
use super::{ActivateError, Activation, DeviceInterrupts, DeviceType, VirtioDevice, Worker, copy_config};
use crate::lock;

const FEATURE_CHECKSUM: u64 = 1 << 0;
const FEATURE_GUEST_CHECKSUM: u64 = 1 << 1;
const FEATURE_MTU: u64 = 1 << 3;
const FEATURE_MAC: u64 = 1 << 5;
const FEATURE_GUEST_TSO4: u64 = 1 << 7;
const FEATURE_GUEST_TSO6: u64 = 1 << 8;
const FEATURE_GUEST_ECN: u64 = 1 << 9;
const FEATURE_HOST_TSO4: u64 = 1 << 11;
const FEATURE_HOST_TSO6: u64 = 1 << 12;
const FEATURE_HOST_ECN: u64 = 1 << 13;
const FEATURE_MERGEABLE: u64 = 1 << 15;
const FEATURE_STATUS: u64 = 1 << 16;

const QUEUE_SIZE: u16 = 256;
const RECEIVE: u16 = 0;
const SEND: u16 = 1;
const STATUS_LINK_UP: u16 = 1;

/// Bytes of the header before each frame (5.1.6), whose last field is the number of merged buffers.
pub const HEADER_LEN: usize = 12;
/// The longest frame: a segment of 64 KiB to be cut by the receiver, with its Ethernet header.
pub const FRAME_LEN_MAX: usize = 65536 + 18;

/// What one side can leave to the other: checksums, and cutting large TCP segments.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offloads {
    pub checksum: bool,
    pub tcp4: bool,
    pub tcp6: bool,
    pub ecn: bool,
}

/// Moves frames between the card and the world. Each read or write of the file is one frame after a 12-byte virtio header; neither
/// blocks.
pub trait NetBackend: Send + Sync {
    /// A file that can be polled.
    fn file(&self) -> BorrowedFd<'_>;

    /// What the backend can take from the guest and may hand to it.
    fn offloads(&self) -> Offloads;

    /// Says what the guest can take from the backend. Called when the driver is ready.
    fn set_offloads(&self, guest: Offloads) -> io::Result<()>;
}

/// A card's address and the largest packet of its network.
#[derive(Debug, Clone, Copy)]
pub struct NetOptions {
    pub mac: [u8; 6],
    pub mtu: Option<u16>,
}

struct State {
    link_up: bool,
    interrupts: Option<Arc<dyn DeviceInterrupts>>,
    worker: Option<Worker>,
}

/// A network card.
pub struct Net {
    backend: Arc<dyn NetBackend>,
    options: NetOptions,
    state: Mutex<State>,
}

impl Net {
    /// A card with its link up.
    pub fn new(backend: Arc<dyn NetBackend>, options: NetOptions) -> Self {
        Net { backend, options, state: Mutex::new(State { link_up: true, interrupts: None, worker: None }) }
    }

    /// Plugs the cable in or out, as the guest sees it.
    pub fn set_link(&self, up: bool) {
        let mut state = lock(&self.state);
        if std::mem::replace(&mut state.link_up, up) != up
            && let Some(interrupts) = &state.interrupts
        {
            interrupts.config_changed();
        }
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> DeviceType {
        DeviceType::Net
    }

    fn features(&self) -> u64 {
        let Offloads { checksum, tcp4, tcp6, ecn } = self.backend.offloads();
        let mut features = FEATURE_MAC | FEATURE_MERGEABLE | FEATURE_STATUS;
        for (offered, bits) in [
            (checksum, FEATURE_CHECKSUM | FEATURE_GUEST_CHECKSUM),
            (tcp4, FEATURE_HOST_TSO4 | FEATURE_GUEST_TSO4),
            (tcp6, FEATURE_HOST_TSO6 | FEATURE_GUEST_TSO6),
            (ecn, FEATURE_HOST_ECN | FEATURE_GUEST_ECN),
            (self.options.mtu.is_some(), FEATURE_MTU),
        ] {
            if offered {
                features |= bits;
            }
        }
        features
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 2]
    }

    fn config_read(&self, offset: u64, target: &mut [u8]) {
        let status = if lock(&self.state).link_up { STATUS_LINK_UP } else { 0 };
        let mut config = [0; 12];
        config[..6].copy_from_slice(&self.options.mac);
        config[6..8].copy_from_slice(&status.to_le_bytes());
        // One pair of queues.
        config[8..10].copy_from_slice(&1u16.to_le_bytes());
        config[10..12].copy_from_slice(&self.options.mtu.unwrap_or(0).to_le_bytes());
        copy_config(&config, offset, target);
    }

    fn activate(&self, mut activation: Activation) -> Result<(), ActivateError> {
        let receive = activation.take_queue(RECEIVE)?;
        let send = activation.take_queue(SEND)?;
        let has = |bit: u64| activation.features & bit != 0;
        self.backend.set_offloads(Offloads {
            checksum: has(FEATURE_GUEST_CHECKSUM),
            tcp4: has(FEATURE_GUEST_TSO4),
            tcp6: has(FEATURE_GUEST_TSO6),
            ecn: has(FEATURE_GUEST_ECN),
        })?;
        let buffers = if has(FEATURE_MERGEABLE) { worker::Buffering::Merged } else { worker::Buffering::Single };
        let (backend, interrupts) = (self.backend.clone(), activation.interrupts.clone());
        let started = Worker::spawn("virtio-net", move |signal| {
            worker::FrameMover::new(backend, receive, send, interrupts, signal, buffers).run();
        })?;
        let mut state = lock(&self.state);
        state.interrupts = Some(activation.interrupts);
        state.worker = Some(started);
        Ok(())
    }

    fn notify(&self, _queue: u16) {
        if let Some(worker) = &lock(&self.state).worker {
            worker.raise();
        }
    }

    fn reset(&self) {
        let mut state = lock(&self.state);
        state.interrupts = None;
        let worker = state.worker.take();
        drop(state);
        drop(worker);
    }
}

#[cfg(test)]
mod tests;
