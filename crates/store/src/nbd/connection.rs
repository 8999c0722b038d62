//! The thread of one client: its socket on one side, its disk's queue on the other.

use super::budget::Budget;
use super::exports::Exports;
use super::negotiation::{Agreed, Negotiation, Step, TlsPolicy};
use super::server::{ServerOptions, Tls};
use super::stream::{Stream, Wait, wait_for_any};
use super::transmission::{Transmission, clear};
use super::{INPUT_LEN, REST_TIMEOUT};
use crate::disk::Disk;
use rustix::event::PollFlags;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Bytes that were received and not used yet.
struct Input {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Input {
    fn new() -> Self {
        Self { bytes: vec![0; INPUT_LEN].into(), start: 0, end: 0 }
    }

    fn bytes(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    fn used(&mut self, count: usize) {
        self.start += count;
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    /// Room for more, after what is not used yet. There is always some: a request's head and an option fit in.
    fn space(&mut self) -> &mut [u8] {
        if self.start > 0 {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        &mut self.bytes[self.end..]
    }

    fn received(&mut self, count: usize) {
        self.end += count;
    }
}

/// Serves one client until it goes or the server stops.
pub(super) fn serve<D: Disk>(
    mut stream: Stream,
    exports: Arc<Exports<D>>,
    options: &ServerOptions,
    budget: Budget,
    stopping: &AtomicBool,
) -> io::Result<()> {
    let mut input = Input::new();
    if let Some(agreed) = negotiate(&mut stream, exports, options, &mut input)? {
        let transmission = Transmission::new(agreed, budget).map_err(io::Error::other)?;
        stream.wait_at_most(REST_TIMEOUT);
        transmit(&mut stream, transmission, &mut input, options, stopping)?;
    }
    stream.close();
    Ok(())
}

fn negotiate<D: Disk>(
    stream: &mut Stream,
    exports: Arc<Exports<D>>,
    options: &ServerOptions,
    input: &mut Input,
) -> io::Result<Option<Agreed<D>>> {
    let deadline = Instant::now() + options.negotiation_timeout;
    let (policy, config) = match &options.tls {
        Tls::Off => (TlsPolicy::Off, None),
        Tls::Allowed(config) => (TlsPolicy::Allowed, Some(config)),
        Tls::Required(config) => (TlsPolicy::Required, Some(config)),
    };
    let mut negotiation = Negotiation::new(exports, policy);
    let mut output = Negotiation::<D>::greeting().to_vec();
    loop {
        stream.send_all(&output, deadline)?;
        output.clear();
        let (used, step) = negotiation.step(input.bytes(), &mut output);
        input.used(used);
        match step {
            Step::Continue => {}
            Step::NeedMore => match stream.receive_before(input.space(), deadline)? {
                0 => return Ok(None),
                count => input.received(count),
            },
            Step::StartTls => {
                stream.send_all(&output, deadline)?;
                output.clear();
                // What came before TLS is nothing that the client has said under it.
                let Some(config) = config.filter(|_| input.bytes().is_empty()) else {
                    return Ok(None);
                };
                stream.start_tls(config, deadline)?;
                negotiation.secured();
            }
            Step::Transmit(agreed) => {
                stream.send_all(&output, deadline)?;
                return Ok(Some(agreed));
            }
            Step::Close => {
                stream.send_all(&output, deadline)?;
                return Ok(None);
            }
        }
    }
}

fn transmit<D: Disk>(
    stream: &mut Stream,
    mut transmission: Transmission<D>,
    input: &mut Input,
    options: &ServerOptions,
    stopping: &AtomicBool,
) -> io::Result<()> {
    // Since when the client takes nothing of what waits for it.
    let mut send_since: Option<Instant> = None;
    loop {
        let used = transmission.feed(input.bytes());
        input.used(used);
        let was_full = !transmission.wants_input();
        transmission.complete();
        if stopping.load(Ordering::Relaxed) {
            transmission.end();
        }
        let has_replies = !transmission.outgoing().is_empty() || stream.has_unsent();
        if has_replies {
            match stream.send(&transmission.outgoing().slices()) {
                Ok(count) => {
                    transmission.sent(count);
                    send_since = None;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        let has_replies = !transmission.outgoing().is_empty() || stream.has_unsent();
        let idle = transmission.in_flight() == 0 && !has_replies;
        if transmission.ends() && idle {
            return Ok(());
        }
        if transmission.paused() || was_full && transmission.wants_input() {
            continue;
        }
        if stream.has_received() && transmission.wants_input() {
            receive(stream, &mut transmission, input, Wait::No)?;
            continue;
        }
        if idle {
            // To look for requests a while before sleeping was tried: it gains where client and server run on two idle
            // processors, and loses ten times that where they share one with somebody else.
            receive(stream, &mut transmission, input, Wait::Yes)?;
            continue;
        }
        let mut flags = PollFlags::empty();
        flags.set(PollFlags::IN, transmission.wants_input());
        flags.set(PollFlags::OUT, has_replies);
        let send_by = has_replies.then(|| *send_since.get_or_insert_with(Instant::now) + options.send_timeout);
        let woken = wait_for_any(stream.socket(), flags, transmission.signal(), send_by)?;
        if woken.signaled {
            clear(transmission.signal());
        }
        if woken.readable {
            receive(stream, &mut transmission, input, Wait::No)?;
        }
    }
}

fn receive<D: Disk>(
    stream: &mut Stream,
    transmission: &mut Transmission<D>,
    input: &mut Input,
    wait: Wait,
) -> io::Result<()> {
    // What was received before and not used is data no more: the data of a write have used it up.
    let payload = transmission.payload_space().unwrap_or_default();
    let payload_len = payload.len();
    let count = match stream.receive(payload, input.space(), wait) {
        Ok(0) => {
            transmission.end();
            return Ok(());
        }
        Ok(count) => count,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
            if wait == Wait::Yes {
                transmission.rest();
            }
            return Ok(());
        }
        Err(error) => return Err(error),
    };
    input.received(count.saturating_sub(payload_len));
    if payload_len > 0 {
        transmission.payload_received(count.min(payload_len));
    }
    Ok(())
}
