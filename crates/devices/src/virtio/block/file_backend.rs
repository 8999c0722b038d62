//! A disk that is a file or block device of the host.

use std::fs::File;
use std::io;
use std::sync::Arc;

use super::engine::{Call, Engine, EngineChoice, Vectors};
use super::request::{Operation, Status};
use super::worker::Backend;
use crate::virtio::Signal;

/// An operation that the host works on.
struct InFlight {
    operation: Operation,
    /// Bytes of a read or write that are done.
    done: u64,
    call: Call,
}

/// Hands operations to the host.
pub(super) struct FileBackend {
    engine: Engine,
    write_through: bool,
    /// Indexed by token.
    in_flight: Vec<Option<InFlight>>,
}

impl FileBackend {
    pub fn new(
        choice: EngineChoice,
        file: &File,
        signal: &Arc<Signal>,
        depth: usize,
        write_through: bool,
    ) -> io::Result<Self> {
        let engine = Engine::new(choice, file, signal, depth as u16)?;
        Ok(FileBackend { engine, write_through, in_flight: (0..depth).map(|_| None).collect() })
    }

    /// Takes in the result of a call: the operation's outcome, unless another call follows.
    fn complete(&mut self, token: usize, result: i32) -> Option<Status> {
        let mut request = self.in_flight.get_mut(token).and_then(Option::take)?;
        match next_call(&mut request, result, self.write_through) {
            Next::Call(call) => {
                self.engine.push(token as u64, &call);
                request.call = call;
                self.in_flight[token] = Some(request);
                None
            }
            Next::Done(status) => {
                if let Operation::Read { data, .. } = &request.operation {
                    data.mark_written(request.done);
                }
                Some(status)
            }
        }
    }
}

impl Backend for FileBackend {
    fn start(&mut self, token: usize, operation: Operation) {
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
        self.engine.push(token as u64, &call);
        self.in_flight[token] = Some(InFlight { operation, done: 0, call });
    }

    fn submit(&mut self) {
        self.engine.submit();
    }

    fn completions(&mut self) -> Vec<(usize, Status)> {
        let results = self.engine.completions();
        let ended =
            |(token, result): (u64, i32)| self.complete(token as usize, result).map(|status| (token as usize, status));
        let ended: Vec<_> = results.into_iter().filter_map(ended).collect();
        // Calls that follow others go at once: whoever waits next waits for them.
        self.engine.submit();
        ended
    }

    fn wait(&self, signal: &Signal) {
        signal.wait_raised();
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
