//! The thread of one block queue: takes requests, has at most a queue's worth of them in flight, gives them back.

use std::sync::Arc;

use super::QUEUE_SIZE;
use super::request::{Disk, Operation, Request, Status};
use crate::virtio::{Buffers, DeviceInterrupts, Queue, QueueError, Signal};

/// What carries out the operations of a queue, and raises the worker's signal, or one of its own, when something completed.
pub(super) trait Backend {
    /// Begins an operation under a token that is free.
    fn start(&mut self, token: usize, operation: Operation);
    /// Sends off what was begun.
    fn submit(&mut self);
    /// What completed since the last time.
    fn completions(&mut self) -> Vec<(usize, Status)>;
    /// Sleeps until the signal is raised or something completed.
    fn wait(&self, signal: &Signal);
}

/// A request that the host works on.
struct InFlight {
    head: u16,
    status: Buffers,
    data_len: u32,
}

/// Why a worker stopped taking requests.
enum Fault {
    Queue(QueueError),
    /// A request without a status byte.
    NoStatus,
}

/// The state of a queue's thread.
pub(super) struct QueueWorker {
    disk: Arc<Disk>,
    queue: Queue,
    interrupts: Arc<dyn DeviceInterrupts>,
    signal: Arc<Signal>,
    /// Indexed by token.
    slots: Vec<Option<InFlight>>,
    free: Vec<usize>,
    /// The size that the driver knows of.
    sectors: u64,
}

/// Requests that a queue has in flight at most.
pub(super) fn depth(queue: &Queue) -> usize {
    QUEUE_SIZE.min(queue.size()).into()
}

impl QueueWorker {
    pub fn new(disk: Arc<Disk>, queue: Queue, interrupts: Arc<dyn DeviceInterrupts>, signal: Arc<Signal>) -> Self {
        let (depth, sectors) = (depth(&queue), disk.sectors());
        QueueWorker {
            disk,
            queue,
            interrupts,
            signal,
            slots: (0..depth).map(|_| None).collect(),
            free: (0..depth).rev().collect(),
            sectors,
        }
    }

    /// Works until the signal says stop and nothing is in flight.
    pub fn run(mut self, backend: &mut impl Backend) {
        let mut broken = false;
        loop {
            self.take_completions(backend);
            self.tell_of_size();
            let stopped = self.signal.is_stopped();
            if stopped && self.free.len() == self.slots.len() {
                return;
            }
            let mut again = false;
            if !stopped && !broken {
                match self.take_requests(backend) {
                    Ok(more) => again = more,
                    Err(fault) => {
                        broken = true;
                        let error = match fault {
                            Fault::Queue(error) => error.to_string(),
                            Fault::NoStatus => "a request has no status byte".to_owned(),
                        };
                        tracing::warn!(error, "a block queue is broken");
                        self.interrupts.needs_reset();
                    }
                }
            }
            backend.submit();
            // What needed no waiting is told of together with what came before.
            again |= self.take_completions(backend);
            self.queue.tell(&*self.interrupts);
            if !again {
                backend.wait(&self.signal);
            }
        }
    }

    /// Tells the driver if the disk got another size (5.2.5). Each queue does: once more does no harm.
    fn tell_of_size(&mut self) {
        let sectors = self.disk.sectors();
        if std::mem::replace(&mut self.sectors, sectors) != sectors {
            self.interrupts.config_changed();
        }
    }

    /// Whether a slot became free.
    fn take_completions(&mut self, backend: &mut impl Backend) -> bool {
        let completions = backend.completions();
        let any = !completions.is_empty();
        for (token, status) in completions {
            if let Some(request) = self.slots.get_mut(token).and_then(Option::take) {
                self.free.push(token);
                self.finish(request.head, &request.status, request.data_len, status);
            }
        }
        any
    }

    /// Takes requests while there are free slots. Returns whether more came since notifications were asked for.
    fn take_requests(&mut self, backend: &mut impl Backend) -> Result<bool, Fault> {
        self.queue.disable_notifications();
        while let Some(&token) = self.free.last() {
            let Some(chain) = self.queue.pop().map_err(Fault::Queue)? else {
                return self.queue.enable_notifications().map_err(Fault::Queue);
            };
            let Request { head, status, data_len, action } =
                Request::parse(&chain, &self.disk).ok_or(Fault::NoStatus)?;
            match action {
                Ok(operation) => {
                    self.free.pop();
                    self.slots[token] = Some(InFlight { head, status, data_len });
                    backend.start(token, operation);
                }
                Err(at_once) => self.finish(head, &status, data_len, at_once),
            }
        }
        // A completion will free a slot and bring us back; until then no doorbell is needed.
        Ok(false)
    }

    fn finish(&mut self, head: u16, status_byte: &Buffers, data_len: u32, status: Status) {
        // The buffer has one byte, checked when the request was parsed.
        let _ = status_byte.write(0, &[status as u8]);
        self.queue.add_used(head, data_len.saturating_add(1));
    }
}
