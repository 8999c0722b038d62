//! The thread that moves a card's frames.

use std::io::IoSliceMut;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::{FRAME_LEN_MAX, HEADER_LEN, NetBackend};
use crate::virtio::{Chain, DeviceInterrupts, Queue, QueueError, Signal};

/// Frames moved in one direction before the other gets its turn.
const TURN_LEN: usize = 64;
/// The shortest frame worth sending: an Ethernet header.
const FRAME_LEN_MIN: u64 = 14;

/// How a received frame may lie in the guest's buffers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Buffering {
    /// In one buffer, or not at all.
    Single,
    /// In as many as it takes (5.1.6.4).
    Merged,
}

/// What a direction waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Waits {
    /// Its turn: there is more to do.
    Turn,
    /// The guest's doorbell.
    Guest,
    /// The backend's file.
    Backend,
}

pub(super) struct FrameMover {
    backend: Arc<dyn NetBackend>,
    receive: Queue,
    send: Queue,
    interrupts: Arc<dyn DeviceInterrupts>,
    signal: Arc<Signal>,
    buffering: Buffering,
    /// A frame that has been read from the backend, with its header; `frame_len` is zero if there is none.
    frame: Vec<u8>,
    frame_len: usize,
}

impl FrameMover {
    pub fn new(
        backend: Arc<dyn NetBackend>,
        receive: Queue,
        send: Queue,
        interrupts: Arc<dyn DeviceInterrupts>,
        signal: Arc<Signal>,
        buffering: Buffering,
    ) -> Self {
        let frame = vec![0; HEADER_LEN + FRAME_LEN_MAX];
        FrameMover { backend, receive, send, interrupts, signal, buffering, frame, frame_len: 0 }
    }

    /// Works until the signal says stop.
    pub fn run(mut self) {
        loop {
            // Lowered before anything is looked at: a doorbell and the order to end are seen either below or by the next poll.
            self.signal.lower();
            if self.signal.is_stopped() {
                return;
            }
            let waits = self.send_frames().and_then(|sending| Ok((sending, self.receive_frames()?)));
            self.send.tell(&*self.interrupts);
            self.receive.tell(&*self.interrupts);
            match waits {
                Ok((sending, receiving)) => self.wait(sending, receiving),
                Err(error) => {
                    tracing::warn!(%error, "a network queue is broken");
                    self.interrupts.needs_reset();
                    while self.signal.wait() {}
                }
            }
        }
    }

    fn wait(&self, sending: Waits, receiving: Waits) {
        if sending == Waits::Turn || receiving == Waits::Turn {
            return;
        }
        let mut events = PollFlags::empty();
        if receiving == Waits::Backend {
            events |= PollFlags::IN;
        }
        if sending == Waits::Backend {
            events |= PollFlags::OUT;
        }
        let file = self.backend.file();
        let signal = self.signal.as_fd();
        let mut files = [PollFd::new(&signal, PollFlags::IN), PollFd::new(&file, events)];
        // A file that nobody waits for is left out: poll reports its errors whatever is asked, and would not sleep.
        let count = if events.is_empty() { 1 } else { 2 };
        let _ = poll(&mut files[..count], None);
        if files[1].revents().intersects(PollFlags::ERR | PollFlags::HUP | PollFlags::NVAL) {
            // The backend went away: there will be no more frames, only doorbells.
            let _ = poll(&mut files[..1], None);
        }
    }

    fn send_frames(&mut self) -> Result<Waits, QueueError> {
        self.send.disable_notifications();
        for _ in 0..TURN_LEN {
            let Some(chain) = self.send.pop()? else {
                let more = self.send.enable_notifications()?;
                return Ok(if more { Waits::Turn } else { Waits::Guest });
            };
            if self.send_frame(&chain) == Err(Errno::AGAIN) {
                self.send.unpop(1);
                return Ok(Waits::Backend);
            }
            self.send.add_used(chain.head, 0);
        }
        Ok(Waits::Turn)
    }

    /// Hands a frame over, straight from guest memory. A frame that the backend refuses is lost, as on any network.
    fn send_frame(&self, chain: &Chain) -> Result<(), Errno> {
        let len = chain.readable.len();
        if len < HEADER_LEN as u64 + FRAME_LEN_MIN || len > (HEADER_LEN + FRAME_LEN_MAX) as u64 {
            return Ok(());
        }
        let ranges = chain.readable.host_ranges();
        let vectors: Vec<libc::iovec> =
            ranges.map(|range| libc::iovec { iov_base: range.pointer.cast(), iov_len: range.len }).collect();
        loop {
            // SAFETY: the ranges are guest memory, which the queue keeps mapped; the kernel copies from it and a guest that
            // writes there meanwhile only changes its own frame.
            let sent = unsafe {
                libc::writev(self.backend.file().as_raw_fd(), vectors.as_ptr(), vectors.len() as libc::c_int)
            };
            if sent >= 0 {
                return Ok(());
            }
            match Errno::from_io_error(&std::io::Error::last_os_error()) {
                Some(Errno::INTR) => {}
                Some(error) => return Err(error),
                None => return Ok(()),
            }
        }
    }

    fn receive_frames(&mut self) -> Result<Waits, QueueError> {
        self.receive.disable_notifications();
        for _ in 0..TURN_LEN {
            if self.frame_len == 0 && !self.read_frame() {
                return Ok(Waits::Backend);
            }
            if !self.deliver_frame()? {
                let more = self.receive.enable_notifications_of_more()?;
                // More buffers than at the last look: try again. The same ones: wait for the guest.
                return Ok(if more { Waits::Turn } else { Waits::Guest });
            }
        }
        Ok(Waits::Turn)
    }

    /// Reads the next frame; whether there was one.
    fn read_frame(&mut self) -> bool {
        loop {
            return match rustix::io::readv(self.backend.file(), &mut [IoSliceMut::new(&mut self.frame)]) {
                Ok(len) if len > HEADER_LEN => {
                    self.frame_len = len;
                    true
                }
                Err(Errno::INTR) => continue,
                // An empty frame, nothing to read, or a backend that is gone.
                Ok(_) | Err(_) => false,
            };
        }
    }

    /// Copies the waiting frame into receive buffers. Returns false if there are not enough of them yet.
    fn deliver_frame(&mut self) -> Result<bool, QueueError> {
        let len = self.frame_len as u64;
        let mut chains: Vec<Chain> = Vec::new();
        let mut room = 0;
        while room < len {
            let all_taken = chains.len() == self.receive.size() as usize;
            let too_small = self.buffering == Buffering::Single && !chains.is_empty();
            if all_taken || too_small {
                // No number of buffers will do: the frame is lost, the buffers stay.
                self.receive.unpop(chains.len() as u16);
                self.frame_len = 0;
                return Ok(true);
            }
            match self.receive.pop()? {
                Some(chain) => {
                    room += chain.writable.len();
                    chains.push(chain);
                }
                None => {
                    self.receive.unpop(chains.len() as u16);
                    return Ok(false);
                }
            }
        }
        self.frame[HEADER_LEN - 2..HEADER_LEN].copy_from_slice(&(chains.len() as u16).to_le_bytes());
        let mut rest = &self.frame[..self.frame_len];
        for (position, chain) in chains.iter().enumerate() {
            let step = rest.len().min(chain.writable.len() as usize);
            let (part, after) = rest.split_at(step);
            // The part is no longer than the buffer.
            let _ = chain.writable.write(0, part);
            self.receive.set_used(position as u16, chain.head, step as u32);
            rest = after;
        }
        // All buffers of a frame become visible at once: the first one's header counts them.
        self.receive.publish_used(chains.len() as u16);
        self.frame_len = 0;
        Ok(true)
    }
}
