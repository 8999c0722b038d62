//! virtio vsock (5.10): streams between the guest and Unix sockets on the host.
//!
//! Modules: `packet` (headers), `connection` (one stream and its credit), `multiplexer` (all streams and the host's sockets).
//!
//! This file is the device: its queues, and the one thread that moves packets between them and the multiplexer.

mod connection;
mod multiplexer;
mod packet;
#[cfg(test)]
mod tests;

use std::io;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;

use polder_basics::Clock;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use self::multiplexer::Multiplexer;
use self::packet::{HEADER_LEN, Header, PAYLOAD_LEN_MAX};
use super::{
    ActivateError, Activation, Chain, DeviceInterrupts, DeviceType, Queue, QueueError, Signal, VirtioDevice, Worker,
    WorkerSlot, copy_config,
};

pub use self::packet::{GUEST_CID_MIN, HOST_CID};

const QUEUE_RECEIVE: u16 = 0;
const QUEUE_TRANSMIT: u16 = 1;
/// Entries of the receive, transmit and event queues.
const QUEUE_SIZES: [u16; 3] = [256, 256, 16];

/// Packets moved in one direction before the other has its turn.
const BATCH_LEN_MAX: usize = 64;

/// The vsock device of one guest.
pub struct Vsock {
    guest_cid: u64,
    listener: Arc<UnixListener>,
    path: PathBuf,
    clock: Arc<dyn Clock>,
    worker: WorkerSlot,
}

impl Vsock {
    /// A device for a guest with this context id ([`GUEST_CID_MIN`] or more) whose host side is the listening socket at `path`.
    pub fn new(guest_cid: u64, listener: UnixListener, path: PathBuf, clock: Arc<dyn Clock>) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        Ok(Vsock { guest_cid, listener: Arc::new(listener), path, clock, worker: WorkerSlot::default() })
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> DeviceType {
        DeviceType::Vsock
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> Vec<u16> {
        QUEUE_SIZES.to_vec()
    }

    fn config_read(&self, offset: u64, target: &mut [u8]) {
        copy_config(&self.guest_cid.to_le_bytes(), offset, target);
    }

    fn activate(&self, mut activation: Activation) -> Result<(), ActivateError> {
        let receive = activation.take_queue(QUEUE_RECEIVE)?;
        let transmit = activation.take_queue(QUEUE_TRANSMIT)?;
        let multiplexer =
            Multiplexer::new(self.guest_cid, self.listener.clone(), self.path.clone(), self.clock.clone());
        let mut work = Work { receive, transmit, multiplexer, payload: vec![0; PAYLOAD_LEN_MAX] };
        let interrupts = activation.interrupts;
        let worker = Worker::spawn("vsock", move |signal| {
            if let Err(error) = work.run(&signal, &*interrupts) {
                tracing::warn!(%error, "a vsock queue is malformed; the device stops");
                interrupts.needs_reset();
            }
        })?;
        self.worker.fill(worker);
        Ok(())
    }

    fn notify(&self, _queue: u16) {
        self.worker.raise();
    }

    fn reset(&self) {
        self.worker.empty();
    }
}

struct Work {
    receive: Queue,
    transmit: Queue,
    multiplexer: Multiplexer,
    payload: Vec<u8>,
}

impl Work {
    fn run(&mut self, signal: &Signal, interrupts: &dyn DeviceInterrupts) -> Result<(), QueueError> {
        while !signal.is_stopped() {
            let sent = self.move_from_guest()?;
            let received = self.move_to_guest()?;
            self.transmit.tell(interrupts);
            self.receive.tell(interrupts);
            if sent == BATCH_LEN_MAX || received == BATCH_LEN_MAX {
                self.wait(signal, Some(0));
                continue;
            }
            let more_sent = self.multiplexer.can_take() && self.transmit.enable_notifications()?;
            let more_room = self.multiplexer.has_packet() && self.receive.enable_notifications()?;
            if !more_sent && !more_room {
                self.wait(signal, self.multiplexer.timeout_ns());
            }
        }
        Ok(())
    }

    /// Takes packets from the guest; how many.
    fn move_from_guest(&mut self) -> Result<usize, QueueError> {
        let mut moved = 0;
        while moved < BATCH_LEN_MAX && self.multiplexer.can_take() {
            let Some(chain) = self.transmit.pop()? else { break };
            take_chain(&mut self.multiplexer, &chain, &mut self.payload);
            self.transmit.add_used(chain.head, 0);
            moved += 1;
        }
        Ok(moved)
    }

    /// Gives packets to the guest as far as it has room; how many.
    fn move_to_guest(&mut self) -> Result<usize, QueueError> {
        let mut moved = 0;
        while moved < BATCH_LEN_MAX && self.multiplexer.has_packet() {
            let Some(chain) = self.receive.pop()? else { break };
            let Some(room) = chain.writable.len().checked_sub(HEADER_LEN) else {
                // A buffer that holds no header is given back empty.
                self.receive.add_used(chain.head, 0);
                moved += 1;
                continue;
            };
            let room = usize::try_from(room).unwrap_or(PAYLOAD_LEN_MAX).min(PAYLOAD_LEN_MAX);
            let Some(header) = self.multiplexer.next_packet(&mut self.payload[..room]) else {
                self.receive.unpop(1);
                break;
            };
            let len = (header.len as usize).min(room);
            // Both fit: the room was measured above.
            let _ = chain.writable.write_value(0, &header);
            let _ = chain.writable.write(HEADER_LEN, &self.payload[..len]);
            self.receive.add_used(chain.head, HEADER_LEN as u32 + len as u32);
            moved += 1;
        }
        Ok(moved)
    }

    /// Waits for the guest, for a socket, or for a deadline.
    fn wait(&mut self, signal: &Signal, timeout_ns: Option<u64>) {
        let sources = self.multiplexer.sources();
        let mut fds = vec![PollFd::new(signal, PollFlags::IN)];
        fds.extend(sources.iter().map(|(_, fd, events)| PollFd::from_borrowed_fd(*fd, *events)));
        let timeout = timeout_ns.map(|ns| Timespec {
            tv_sec: (ns / 1_000_000_000) as i64,
            // Rounded up: waking too early would only mean waiting again.
            tv_nsec: (ns % 1_000_000_000) as i64,
        });
        if poll(&mut fds, timeout.as_ref()).is_err() {
            return;
        }
        if !fds[0].revents().is_empty() {
            signal.lower();
        }
        let events: Vec<_> = sources.iter().zip(&fds[1..]).map(|((source, ..), fd)| (*source, fd.revents())).collect();
        drop(sources);
        self.multiplexer.handle(&events);
    }
}

/// Reads a packet out of a chain: the header once, then as much payload as it says.
fn take_chain(multiplexer: &mut Multiplexer, chain: &Chain, payload: &mut [u8]) {
    // Without a whole header there is nobody to answer.
    let Ok(header) = chain.readable.read_value::<Header>(0) else { return };
    let Some(target) = payload.get_mut(..header.len as usize) else { return multiplexer.refuse_packet(&header) };
    match chain.readable.read(HEADER_LEN, target) {
        Ok(()) => multiplexer.take_packet(&header, target),
        Err(_) => multiplexer.refuse_packet(&header),
    }
}
