//! The second phase of a connection: requests and their replies.
//!
//! Bytes in, bytes out: no socket here. The owner hands bytes to [`Transmission::feed`] (or receives them straight into
//! [`Transmission::payload_space`]), takes completions with [`Transmission::complete`] and sends what is in `outgoing`.
//!
//! What one client can make the server hold is bounded by [`REQUESTS_IN_FLIGHT_MAX`] and [`HELD_BYTES_MAX`]: at a bound nothing
//! more is taken from the client until replies have left.

use super::budget::Budget;
use super::buffer::{BufferPool, DATA_START, Holes, RequestBuffer};
use super::chunks::write_chunks;
use super::context::Context;
use super::exports::Export;
use super::negotiation::Agreed;
use super::outgoing::Outgoing;
use super::protocol::{
    ChunkType, Form, Last, Request, SIMPLE_REPLY_LEN, chunk_head, command, command_flag, data_head, simple_reply,
};
use super::refusal::{Refusal, Rules};
use super::{
    CACHE_LEN_MAX, EXTENTS_MAX, HELD_BYTES_MAX, HOLE_LEN_MIN, OUTGOING_BYTES_MAX, REQUESTS_IN_FLIGHT_MAX,
    ROUND_BYTES_MAX, STATUS_LEN_MAX,
};
use crate::disk::{Completion, Disk, DiskError, Durability, Operation, Queue, SECTOR_LEN};
use rustix::event::{PollFd, PollFlags, poll};
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, PoisonError};

/// What comes from the client next.
enum Receiving {
    Head,
    /// The data of a write; `filled` bytes of them are there.
    Payload {
        request: Request,
        buffer: RequestBuffer,
        filled: usize,
    },
    /// The data of a request that is refused.
    Refused {
        request: Request,
        remaining: u64,
        refusal: Refusal,
    },
    /// The client has said that it goes, or has broken the protocol.
    Nothing,
}

/// A request that the disk works on.
struct Pending {
    request: Request,
    /// Bytes before the requested ones that were read because the disk knows whole sectors only.
    skip: usize,
}

/// The transmission phase of one connection.
pub(super) struct Transmission<D: Disk> {
    export: Arc<Export<D>>,
    form: Form,
    contexts: Vec<Context>,
    queue: D::Queue<RequestBuffer>,
    pending: Vec<Option<Pending>>,
    free_tokens: Vec<usize>,
    receiving: Receiving,
    pool: BufferPool,
    /// Bytes of buffers that the disk or an unfinished write has.
    buffer_bytes: usize,
    outgoing: Outgoing,
    budget: Budget,
    /// Bytes that requests of this round of [`Transmission::feed`] read.
    round_bytes: usize,
}

impl<D: Disk> Transmission<D> {
    /// Opens a queue of the chosen disk for the thread that calls.
    pub fn new(agreed: Agreed<D>, budget: Budget) -> Result<Self, DiskError> {
        let mut queue = agreed.export.disk().open_queue()?;
        queue.let_flushes_wait();
        Ok(Self {
            export: agreed.export,
            form: agreed.form,
            contexts: agreed.contexts,
            queue,
            pending: Vec::new(),
            free_tokens: Vec::new(),
            receiving: Receiving::Head,
            pool: BufferPool::default(),
            buffer_bytes: 0,
            outgoing: Outgoing::default(),
            budget,
            round_bytes: 0,
        })
    }

    /// What waits to be sent.
    pub fn outgoing(&self) -> &Outgoing {
        &self.outgoing
    }

    /// `sent` bytes of [`Transmission::outgoing`] have been sent.
    pub fn sent(&mut self, sent: usize) {
        self.outgoing.advance(sent, &mut self.pool);
        self.budget.charge(self.held_bytes());
    }

    /// Requests that the disk has not finished.
    pub fn in_flight(&self) -> usize {
        self.pending.len() - self.free_tokens.len()
    }

    /// Gives back the memory that is kept for the next requests.
    pub fn rest(&mut self) {
        self.pool.clear();
    }

    /// Readable when [`Transmission::complete`] may find something.
    pub fn signal(&self) -> BorrowedFd<'_> {
        self.queue.signal()
    }

    /// Nothing more is taken from the client.
    pub fn ends(&self) -> bool {
        matches!(self.receiving, Receiving::Nothing)
    }

    /// Takes nothing more from the client; what is in flight is still answered.
    pub fn end(&mut self) {
        self.receiving = Receiving::Nothing;
    }

    /// Whether more bytes of the client can be used now.
    pub fn wants_input(&self) -> bool {
        match self.receiving {
            Receiving::Head => !self.is_full(),
            Receiving::Payload { .. } | Receiving::Refused { .. } => true,
            Receiving::Nothing => false,
        }
    }

    fn is_full(&self) -> bool {
        self.in_flight() >= REQUESTS_IN_FLIGHT_MAX
            || self.outgoing.held_bytes() >= OUTGOING_BYTES_MAX
            || self.held_bytes() >= HELD_BYTES_MAX
            || self.held_bytes() > 0 && self.budget.is_exhausted()
    }

    /// Bytes of buffers in flight and of replies.
    pub fn held_bytes(&self) -> usize {
        self.buffer_bytes + self.outgoing.held_bytes()
    }

    /// Where the next bytes of a write's data belong, if that is what the client sends now.
    pub fn payload_space(&mut self) -> Option<&mut [u8]> {
        match &mut self.receiving {
            Receiving::Payload { request, buffer, filled } => Some(payload(request, buffer, *filled)),
            _ => None,
        }
    }

    /// `count` bytes have been received into [`Transmission::payload_space`].
    pub fn payload_received(&mut self, count: usize) {
        if let Receiving::Payload { request, buffer, mut filled } = self.receive_next() {
            filled += count;
            self.receiving = Receiving::Payload { request, buffer, filled };
            self.finish_payload();
        }
    }

    /// Uses bytes that the client has sent; says how many. The rest is to be handed in again, with more behind it or after
    /// replies have left.
    pub fn feed(&mut self, input: &[u8]) -> usize {
        let mut used = 0;
        self.round_bytes = 0;
        while self.wants_input() && !self.paused() {
            let rest = &input[used..];
            match &mut self.receiving {
                Receiving::Head => {
                    let Some((request, head_len)) = Request::parse(rest, self.form) else { break };
                    used += head_len;
                    match request {
                        Some(request) => self.start(request),
                        None => self.end(),
                    }
                }
                Receiving::Payload { request, buffer, filled } => {
                    let space = payload(request, buffer, *filled);
                    let count = space.len().min(rest.len());
                    space[..count].copy_from_slice(&rest[..count]);
                    *filled += count;
                    used += count;
                    if !self.finish_payload() {
                        break;
                    }
                }
                Receiving::Refused { remaining, .. } => {
                    let count = (*remaining).min(rest.len() as u64);
                    *remaining -= count;
                    used += count as usize;
                    if *remaining > 0 {
                        break;
                    }
                    if let Receiving::Refused { request, refusal, .. } = self.receive_next() {
                        self.refuse(&request, &refusal);
                    }
                }
                Receiving::Nothing => break,
            }
            self.budget.charge(self.held_bytes());
        }
        used
    }

    /// Whether [`Transmission::feed`] has left bytes so that replies can be sent before more is read.
    pub fn paused(&self) -> bool {
        self.round_bytes >= ROUND_BYTES_MAX
    }

    /// Takes what the disk has finished and makes replies of it.
    pub fn complete(&mut self) {
        while let Some(completion) = self.queue.next_completion() {
            self.finish(completion);
        }
    }

    fn receive_next(&mut self) -> Receiving {
        std::mem::replace(&mut self.receiving, Receiving::Head)
    }

    /// Starts the write whose data are there; says whether they are.
    fn finish_payload(&mut self) -> bool {
        match self.receive_next() {
            Receiving::Payload { request, buffer, filled } if filled == request.len as usize => {
                self.write(request, buffer);
                true
            }
            other => {
                self.receiving = other;
                false
            }
        }
    }

    fn start(&mut self, request: Request) {
        if request.command == command::DISC {
            return self.end();
        }
        let rules = Rules {
            form: self.form,
            access: self.export.access(),
            capacity_bytes: self.export.disk().capacity_bytes(),
            has_contexts: !self.contexts.is_empty(),
        };
        match rules.check(&request) {
            Err(refusal) if request.payload_len(self.form) > 0 => {
                self.receiving = Receiving::Refused { request, remaining: request.payload_len(self.form), refusal };
            }
            Err(refusal) => self.refuse(&request, &refusal),
            Ok(()) => self.start_checked(request),
        }
    }

    fn start_checked(&mut self, request: Request) {
        let (offset, len) = (request.offset, request.len);
        if len == 0 && request.command != command::FLUSH {
            return self.succeed(&request);
        }
        match request.command {
            command::READ => {
                let range = whole_sectors_around(offset, len);
                let holes = match self.form {
                    Form::Simple => Holes::Filled,
                    Form::Structured | Form::Extended => Holes::Remembered,
                };
                let buffer = self.buffer((range.end - range.start) as usize, holes);
                let skip = (offset - range.start) as usize;
                self.round_bytes += request.len as usize;
                self.submit(request, skip, Operation::Read { offset: range.start, buffer });
            }
            command::WRITE => {
                let range = whole_sectors_around(offset, len);
                let buffer = self.buffer((range.end - range.start) as usize, Holes::Filled);
                self.receiving = Receiving::Payload { request, buffer, filled: 0 };
            }
            command::FLUSH => self.submit(request, 0, Operation::Flush),
            command::TRIM => {
                // Only a hint: the ends that are no whole sectors stay as they are.
                let range = whole_sectors_inside(offset, len);
                if range.is_empty() {
                    return self.succeed(&request);
                }
                let len = range.end - range.start;
                self.submit(
                    request,
                    0,
                    Operation::Discard { offset: range.start, len, durability: durability(&request) },
                );
            }
            command::WRITE_ZEROES if is_whole_sectors(offset, len) => {
                // A block without holes is no different: nothing is overwritten in place, so no space can be set aside.
                self.submit(request, 0, Operation::WriteZeroes { offset, len, durability: durability(&request) });
            }
            command::WRITE_ZEROES => {
                let result = self.zero_unaligned(&request);
                self.answer(&request, result);
            }
            command::CACHE => {
                let range = whole_sectors_around(offset, len.min(CACHE_LEN_MAX));
                let buffer = RequestBuffer::sink((range.end - range.start) as usize);
                self.submit(request, 0, Operation::Read { offset: range.start, buffer });
            }
            _ => self.block_status(&request),
        }
    }

    fn write(&mut self, request: Request, buffer: RequestBuffer) {
        let (offset, durability) = (request.offset, durability(&request));
        if is_whole_sectors(offset, request.len) {
            return self.submit(request, 0, Operation::Write { offset, buffer, durability });
        }
        self.wait_for_disk();
        let export = self.export.clone();
        let _edges = export.edges.lock().unwrap_or_else(PoisonError::into_inner);
        self.buffer_bytes -= buffer.capacity_bytes();
        let result = self.change_sectors(offset, request.len, buffer, durability);
        self.answer(&request, result);
    }

    fn answer(&mut self, request: &Request, result: Result<(), DiskError>) {
        match result {
            Ok(()) => self.succeed(request),
            Err(error) => self.refuse(request, &error.into()),
        }
    }

    fn submit(&mut self, request: Request, skip: usize, operation: Operation<RequestBuffer>) {
        let pending = Some(Pending { request, skip });
        let token = match self.free_tokens.pop() {
            Some(token) => {
                self.pending[token] = pending;
                token
            }
            None => {
                self.pending.push(pending);
                self.pending.len() - 1
            }
        };
        self.queue.submit(token as u64, operation);
    }

    fn finish(&mut self, completion: Completion<RequestBuffer>) {
        let token = completion.token as usize;
        let Some(Pending { request, skip }) = self.pending.get_mut(token).and_then(Option::take) else {
            return;
        };
        self.free_tokens.push(token);
        match (completion.result, completion.buffer) {
            (Ok(()), Some(buffer)) if request.command == command::READ => {
                self.buffer_bytes -= buffer.capacity_bytes();
                self.succeed_read(&request, skip, buffer);
            }
            (result, buffer) => {
                if let Some(buffer) = buffer {
                    self.take_back(buffer);
                }
                self.answer(&request, result);
            }
        }
    }

    fn buffer(&mut self, len: usize, holes: Holes) -> RequestBuffer {
        let buffer = self.pool.get(len, holes);
        self.buffer_bytes += buffer.capacity_bytes();
        buffer
    }

    fn take_back(&mut self, buffer: RequestBuffer) {
        self.buffer_bytes -= buffer.capacity_bytes();
        self.pool.put(buffer.into_parts().0);
    }

    fn succeed(&mut self, request: &Request) {
        match self.form {
            Form::Structured if request.command != command::READ => {
                self.outgoing.push_short(&simple_reply(0, request.cookie));
            }
            Form::Simple => self.outgoing.push_short(&simple_reply(0, request.cookie)),
            form => self.outgoing.push_short(&chunk_head(form, Last::Yes, ChunkType::None, request, 0)),
        }
    }

    fn refuse(&mut self, request: &Request, refusal: &Refusal) {
        let error = refusal.error as u32;
        if self.form == Form::Simple {
            return self.outgoing.push_short(&simple_reply(error, request.cookie));
        }
        let text = refusal.message.as_bytes();
        let text = &text[..text.len().min(ERROR_TEXT_LEN_MAX)];
        let payload_len = 6 + text.len() as u32;
        let mut message = chunk_head(self.form, Last::Yes, ChunkType::Error, request, payload_len).to_vec();
        message.extend_from_slice(&error.to_be_bytes());
        message.extend_from_slice(&(text.len() as u16).to_be_bytes());
        message.extend_from_slice(text);
        self.outgoing.push_short(&message);
    }

    /// Sends what was read. Heads are written into the buffer itself: before the data, and where holes are.
    fn succeed_read(&mut self, request: &Request, skip: usize, buffer: RequestBuffer) {
        let (mut bytes, holes) = buffer.into_parts();
        let (start, end) = (DATA_START + skip, DATA_START + skip + request.len as usize);
        if self.form == Form::Simple {
            let head = start - SIMPLE_REPLY_LEN;
            bytes[head..start].copy_from_slice(&simple_reply(0, request.cookie));
            return self.outgoing.push(bytes, head..end);
        }
        if holes.is_empty() {
            let head = data_head(self.form, Last::Yes, request, request.offset, request.len as u32);
            let head_start = start - head.len();
            bytes[head_start..start].copy_from_slice(&head);
            return self.outgoing.push(bytes, head_start..end);
        }
        let mut holes: Vec<Range<usize>> = holes
            .into_iter()
            .map(|hole| (hole.start + DATA_START).max(start)..(hole.end + DATA_START).min(end))
            .filter(|hole| !hole.is_empty())
            .collect();
        let whole = request.flags & command_flag::DF != 0;
        holes.retain(|hole| {
            let sent = hole.len() >= HOLE_LEN_MIN && (!whole || *hole == (start..end));
            if !sent {
                bytes[hole.clone()].fill(0);
            }
            sent
        });
        let ranges = write_chunks(&mut bytes, self.form, request, start..end, &holes);
        self.outgoing.push_ranges(bytes, ranges);
    }

    fn block_status(&mut self, request: &Request) {
        let one = request.flags & command_flag::REQ_ONE != 0;
        let extents_max = if one { 1 } else { EXTENTS_MAX };
        let end = request.offset + request.len.min(STATUS_LEN_MAX);
        let range = whole_sectors_around(request.offset, end - request.offset);
        let mut message = Vec::new();
        for (id, context) in self.contexts.iter().enumerate() {
            let extents =
                self.export.disk().extents(context.question(), range.start, range.end - range.start, extents_max);
            let extents = match extents {
                Ok(extents) => extents,
                Err(error) => return self.refuse(request, &error.into()),
            };
            let last = if id + 1 == self.contexts.len() { Last::Yes } else { Last::No };
            let mut payload = (id as u32).to_be_bytes().to_vec();
            if self.form == Form::Extended {
                payload.extend_from_slice(&(extents.len() as u32).to_be_bytes());
            }
            for extent in &extents {
                // The disk speaks of sectors, the client of bytes; a length is at most that of the request.
                let len = (extent.offset + extent.len).min(end) - extent.offset.max(request.offset);
                let status = context.status(extent.set);
                if self.form == Form::Extended {
                    payload.extend_from_slice(&len.to_be_bytes());
                    payload.extend_from_slice(&u64::from(status).to_be_bytes());
                } else {
                    payload.extend_from_slice(&(len as u32).to_be_bytes());
                    payload.extend_from_slice(&status.to_be_bytes());
                }
            }
            let chunk = match self.form {
                Form::Extended => ChunkType::BlockStatusExtended,
                Form::Simple | Form::Structured => ChunkType::BlockStatus,
            };
            message.extend_from_slice(&chunk_head(self.form, last, chunk, request, payload.len() as u32));
            message.append(&mut payload);
        }
        let len = message.len();
        self.outgoing.push(message, 0..len);
    }

    /// Writes zeros where they are no whole sectors.
    fn zero_unaligned(&mut self, request: &Request) -> Result<(), DiskError> {
        self.wait_for_disk();
        let export = self.export.clone();
        let _edges = export.edges.lock().unwrap_or_else(PoisonError::into_inner);
        let (offset, end) = (request.offset, request.offset + request.len);
        let durability = durability(request);
        let inside = whole_sectors_inside(offset, request.len);
        let parts = match inside.is_empty() {
            true => [offset..end, end..end],
            false => [offset..inside.start, inside.end..end],
        };
        for part in parts.into_iter().filter(|part| !part.is_empty()) {
            let len = part.end - part.start;
            let around = whole_sectors_around(part.start, len);
            let mut buffer = self.pool.get((around.end - around.start) as usize, Holes::Filled);
            buffer.data().fill(0);
            self.change_sectors(part.start, len, buffer, durability)?;
        }
        if inside.is_empty() {
            return Ok(());
        }
        let len = inside.end - inside.start;
        self.run(Operation::WriteZeroes { offset: inside.start, len, durability }).map(|_| ())
    }

    /// Writes a buffer of whole sectors of which only `len` bytes, which belong at `offset`, are there: what is around them is
    /// read first. It waits for the disk. What this client has asked for before has ended, and no other such change of this
    /// export is under way.
    fn change_sectors(
        &mut self,
        offset: u64,
        len: u64,
        mut buffer: RequestBuffer,
        durability: Durability,
    ) -> Result<(), DiskError> {
        let around = whole_sectors_around(offset, len);
        let end = offset + len;
        let (first, last) = (around.start, around.end - SECTOR_LEN);
        for (sector, missing) in [(first, first..offset), (last, end..around.end)] {
            if missing.is_empty() {
                continue;
            }
            let read = self.pool.get(SECTOR_LEN as usize, Holes::Filled);
            let mut read = self.run(Operation::Read { offset: sector, buffer: read })?;
            let into = (missing.start - first) as usize..(missing.end - first) as usize;
            let from = (missing.start - sector) as usize..(missing.end - sector) as usize;
            buffer.data()[into].copy_from_slice(&read.data()[from]);
            self.pool.put(read.into_parts().0);
        }
        let buffer = self.run(Operation::Write { offset: first, buffer, durability })?;
        self.pool.put(buffer.into_parts().0);
        Ok(())
    }

    /// Runs one operation and waits for its end.
    fn run(&mut self, operation: Operation<RequestBuffer>) -> Result<RequestBuffer, DiskError> {
        self.queue.submit(ALONE, operation);
        loop {
            if let Some(completion) = self.queue.next_completion() {
                return completion.result.map(|()| completion.buffer.unwrap_or_else(|| RequestBuffer::sink(0)));
            }
            wait_for(self.queue.signal());
        }
    }

    /// Waits until nothing is in flight.
    pub fn wait_for_disk(&mut self) {
        self.complete();
        while self.in_flight() > 0 {
            wait_for(self.queue.signal());
            self.complete();
        }
    }
}

/// The token of an operation that nothing else is in flight beside.
const ALONE: u64 = u64::MAX;

/// Bytes of the longest message that says why a request failed.
const ERROR_TEXT_LEN_MAX: usize = 1024;

fn wait_for(signal: BorrowedFd<'_>) {
    let mut fds = [PollFd::from_borrowed_fd(signal, PollFlags::IN)];
    if poll(&mut fds, None).is_ok() {
        clear(signal);
    }
}

/// Empties the counter behind a disk's signal, so that it is readable again only after something new.
pub(super) fn clear(signal: BorrowedFd<'_>) {
    // It says "would block" if it is empty already.
    let _ = rustix::io::read(signal, &mut [0; 8]);
}

/// Where the data of a write belong that come next.
fn payload<'a>(request: &Request, buffer: &'a mut RequestBuffer, filled: usize) -> &'a mut [u8] {
    let start = (request.offset % SECTOR_LEN) as usize;
    &mut buffer.data()[start + filled..start + request.len as usize]
}

fn durability(request: &Request) -> Durability {
    match request.flags & command_flag::FUA {
        0 => Durability::Cached,
        _ => Durability::Stable,
    }
}

fn is_whole_sectors(offset: u64, len: u64) -> bool {
    offset.is_multiple_of(SECTOR_LEN) && len.is_multiple_of(SECTOR_LEN)
}

/// The smallest range of whole sectors with all of these bytes. They are on the disk, which ends with a sector.
fn whole_sectors_around(offset: u64, len: u64) -> Range<u64> {
    offset - offset % SECTOR_LEN..(offset + len).next_multiple_of(SECTOR_LEN)
}

/// The whole sectors among these bytes; an empty range if there is none.
fn whole_sectors_inside(offset: u64, len: u64) -> Range<u64> {
    let end = offset + len;
    offset.next_multiple_of(SECTOR_LEN)..end - end % SECTOR_LEN
}
