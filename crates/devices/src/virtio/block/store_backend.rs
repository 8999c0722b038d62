//! A disk of the store.

use std::os::fd::AsFd;
use std::sync::Arc;

use polder_store::disk::{Buffer, Disk, DiskError, Durability, Operation as DiskOperation, Queue};
use polder_store::{DiskQueue, OpenDisk};
use rustix::event::{PollFd, PollFlags, poll};

use super::request::{Operation, Status};
use super::worker::Backend;
use crate::virtio::{Buffers, Signal};

/// Guest memory as the store reads and writes it. The ranges were checked to be RAM, so that no access fails.
struct GuestBuffer(Buffers);

impl Buffer for GuestBuffer {
    fn len(&self) -> usize {
        self.0.len() as usize
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        let _ = self.0.write(at as u64, bytes);
    }

    fn put_zeros(&mut self, at: usize, len: usize) {
        static ZEROS: [u8; 1 << 16] = [0; 1 << 16];
        for start in (0..len).step_by(ZEROS.len()) {
            self.put(at + start, &ZEROS[..ZEROS.len().min(len - start)]);
        }
    }

    fn take(&self, at: usize, bytes: &mut [u8]) {
        let _ = self.0.read(at as u64, bytes);
    }
}

/// Hands operations to a queue of the store's disk.
pub(super) struct StoreBackend {
    queue: DiskQueue<GuestBuffer>,
    durability: Durability,
}

impl StoreBackend {
    pub fn new(disk: &Arc<OpenDisk>, write_through: bool) -> Result<Self, DiskError> {
        let durability = if write_through { Durability::Stable } else { Durability::Cached };
        let mut queue: DiskQueue<GuestBuffer> = disk.open_queue()?;
        // The worker of a device's queue has a thread of its own.
        queue.let_flushes_wait();
        Ok(StoreBackend { queue, durability })
    }
}

impl Backend for StoreBackend {
    fn start(&mut self, token: usize, operation: Operation) {
        let durability = self.durability;
        let operation = match operation {
            Operation::Read { offset, data } => DiskOperation::Read { offset, buffer: GuestBuffer(data) },
            Operation::Write { offset, data } => DiskOperation::Write { offset, buffer: GuestBuffer(data), durability },
            Operation::Flush => DiskOperation::Flush,
            Operation::Discard { offset, len } => DiskOperation::Discard { offset, len, durability },
            Operation::WriteZeroes { offset, len, .. } => DiskOperation::WriteZeroes { offset, len, durability },
        };
        self.queue.submit(token as u64, operation);
    }

    fn submit(&mut self) {}

    fn completions(&mut self) -> Vec<(usize, Status)> {
        let mut ended = Vec::new();
        while let Some(completion) = self.queue.next_completion() {
            let status = match completion.result {
                Ok(()) => Status::Ok,
                Err(error) => {
                    tracing::warn!(%error, "a request of a guest to its disk failed");
                    Status::IoError
                }
            };
            ended.push((completion.token as usize, status));
        }
        ended
    }

    fn wait(&self, signal: &Signal) {
        let store = self.queue.signal();
        let mut fds =
            [PollFd::from_borrowed_fd(signal.as_fd(), PollFlags::IN), PollFd::from_borrowed_fd(store, PollFlags::IN)];
        // A failed poll makes one idle turn; an interrupted one is repeated.
        while poll(&mut fds, None) == Err(rustix::io::Errno::INTR) {}
        signal.lower();
        let _ = rustix::io::read(store, &mut [0; 8]);
    }
}
