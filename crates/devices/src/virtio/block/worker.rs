//! The thread of one block queue: takes requests, has at most a queue's worth of them in flight, gives them back.

use std::sync::Arc;

use super::QUEUE_SIZE;
use super::engine::{Call, Engine, EngineChoice, Vectors};
use super::request::{Disk, Operation, Request, Status};
use crate::virtio::{Buffers, DeviceInterrupts, Queue, QueueError, Signal};

/// A request that the host works on.
struct InFlight {
    head: u16,
    status: Buffers,
    data_len: u32,
    operation: Operation,
    /// Bytes of a read or write that are done.
    done: u64,
    call: Call,
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
    choice: EngineChoice,
    write_through: bool,
    /// Indexed by token.
    slots: Vec<Option<InFlight>>,
    free: Vec<usize>,
}

impl QueueWorker {
    pub fn new(
        disk: Arc<Disk>,
        queue: Queue,
        interrupts: Arc<dyn DeviceInterrupts>,
        signal: Arc<Signal>,
        choice: EngineChoice,
        write_through: bool,
    ) -> Self {
        let depth = QUEUE_SIZE.min(queue.size()) as usize;
        QueueWorker {
            disk,
            queue,
            interrupts,
            signal,
            choice,
            write_through,
            slots: (0..depth).map(|_| None).collect(),
            free: (0..depth).rev().collect(),
        }
    }

    /// Works until the signal says stop and nothing is in flight.
    pub fn run(mut self) {
        let engine = Engine::new(self.choice, &self.disk.file, &self.signal, self.slots.len() as u16);
        let mut engine = match engine {
            Ok(engine) => engine,
            Err(error) => {
                tracing::error!(%error, "a disk has neither io_uring nor threads");
                return self.interrupts.needs_reset();
            }
        };
        let mut broken = false;
        loop {
            for (token, result) in engine.completions() {
                self.complete(&mut engine, token, result);
            }
            let stopped = self.signal.is_stopped();
            if stopped && self.free.len() == self.slots.len() {
                return;
            }
            let mut again = false;
            if !stopped && !broken {
                match self.take_requests(&mut engine) {
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
            engine.submit();
            self.queue.tell(&*self.interrupts);
            if !again {
                self.signal.wait_raised();
            }
        }
    }

    /// Takes requests while there are free slots. Returns whether more came since notifications were asked for.
    fn take_requests(&mut self, engine: &mut Engine) -> Result<bool, Fault> {
        self.queue.disable_notifications();
        while !self.free.is_empty() {
            let Some(chain) = self.queue.pop().map_err(Fault::Queue)? else {
                return self.queue.enable_notifications().map_err(Fault::Queue);
            };
            let request = Request::parse(&chain, &self.disk).ok_or(Fault::NoStatus)?;
            self.start(engine, request);
        }
        // A completion will free a slot and bring us back; until then no doorbell is needed.
        Ok(false)
    }

    fn start(&mut self, engine: &mut Engine, request: Request) {
        let Request { head, status, data_len, action } = request;
        let operation = match action {
            Ok(operation) => operation,
            Err(at_once) => return self.finish(head, &status, data_len, at_once),
        };
        let call = match &operation {
            Operation::Read { offset, data } => {
                Call::Read { offset: *offset, vectors: Arc::new(Vectors::new(data, 0)) }
            }
            Operation::Write { offset, data } => Call::Write {
                offset: *offset,
                vectors: Arc::new(Vectors::new(data, 0)),
                write_through: self.write_through,
            },
            Operation::Flush => Call::Flush,
            Operation::Discard { offset, len } => Call::Allocate { mode: PUNCH, offset: *offset, len: *len },
            Operation::WriteZeroes { offset, len, unmap } => {
                Call::Allocate { mode: if *unmap { PUNCH } else { ZERO }, offset: *offset, len: *len }
            }
        };
        let Some(token) = self.free.pop() else { return };
        engine.push(token as u64, &call);
        self.slots[token] = Some(InFlight { head, status, data_len, operation, done: 0, call });
    }

    fn complete(&mut self, engine: &mut Engine, token: u64, result: i32) {
        let token = token as usize;
        let Some(mut request) = self.slots.get_mut(token).and_then(Option::take) else { return };
        match next_call(&mut request, result, self.write_through) {
            Next::Call(call) => {
                engine.push(token as u64, &call);
                request.call = call;
                self.slots[token] = Some(request);
            }
            Next::Done(status) => {
                if let Operation::Read { data, .. } = &request.operation {
                    data.mark_written(request.done);
                }
                self.free.push(token);
                self.finish(request.head, &request.status, request.data_len, status);
            }
        }
    }

    fn finish(&mut self, head: u16, status_byte: &Buffers, data_len: u32, status: Status) {
        // The buffer has one byte, checked when the request was parsed.
        let _ = status_byte.write(0, &[status as u8]);
        self.queue.add_used(head, data_len.saturating_add(1));
    }
}

const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

enum Next {
    Done(Status),
    Call(Call),
}

/// What follows a call's result: the rest of a short read or write, another way to zero a range, or the end.
fn next_call(request: &mut InFlight, result: i32, write_through: bool) -> Next {
    if result == -libc::EINTR {
        return Next::Call(request.call.clone());
    }
    let unsupported = result == -libc::EOPNOTSUPP || result == -libc::ENOSYS;
    let moved = u64::try_from(result).unwrap_or(0);
    match &request.operation {
        Operation::Read { offset, data } | Operation::Write { offset, data } => {
            // Zero bytes: the file has become shorter than the disk. Negative: the host refused.
            if moved == 0 {
                return Next::Done(Status::IoError);
            }
            request.done = request.done.saturating_add(moved).min(data.len());
            if request.done == data.len() {
                return Next::Done(Status::Ok);
            }
            let offset = offset + request.done;
            let vectors = Arc::new(Vectors::new(data, request.done));
            Next::Call(match request.operation {
                Operation::Read { .. } => Call::Read { offset, vectors },
                _ => Call::Write { offset, vectors, write_through },
            })
        }
        // A discard is a hint: a file system without holes may ignore it.
        Operation::Discard { .. } if unsupported => Next::Done(Status::Ok),
        Operation::WriteZeroes { offset, len, .. } => match request.call {
            Call::Allocate { mode, .. } if unsupported => Next::Call(if mode == ZERO {
                Call::Allocate { mode: PUNCH, offset: *offset, len: *len }
            } else {
                Call::Write { offset: *offset, vectors: Arc::new(Vectors::zeros(*len)), write_through }
            }),
            Call::Write { .. } if moved > 0 => {
                request.done = request.done.saturating_add(moved).min(*len);
                if request.done == *len {
                    return Next::Done(Status::Ok);
                }
                let vectors = Arc::new(Vectors::zeros(*len - request.done));
                Next::Call(Call::Write { offset: offset + request.done, vectors, write_through })
            }
            _ => Next::Done(if result == 0 { Status::Ok } else { Status::IoError }),
        },
        Operation::Flush | Operation::Discard { .. } => {
            Next::Done(if result >= 0 { Status::Ok } else { Status::IoError })
        }
    }
}
