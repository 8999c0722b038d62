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
use std::time::{Duration, Instant};

/// How long the next request is looked for before the thread goes to sleep.
const LOOK_TIME: Duration = Duration::from_micros(50);

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
    let mut looking = Looking::default();
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
            if looking.is_worth_it() {
                let found = look_for_input(stream)?;
                looking.ended(found);
                if found {
                    receive(stream, &mut transmission, input, Wait::No)?;
                    continue;
                }
            }
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

/// Whether to look for the next request a while before going to sleep. That gains the time of a wake-up where client and server run on two
/// processors, and loses what it takes where they share one, or the client has something else to do: so each look that finds nothing
/// doubles the number of requests until the next one.
struct Looking {
    skipped: u32,
    skip: u32,
}

impl Default for Looking {
    fn default() -> Self {
        Looking { skipped: 0, skip: 1 }
    }
}

impl Looking {
    const SKIP_MAX: u32 = 1024;

    fn is_worth_it(&mut self) -> bool {
        self.skipped += 1;
        self.skipped >= self.skip
    }

    fn ended(&mut self, found: bool) {
        self.skipped = 0;
        self.skip = if found { 1 } else { (self.skip * 2).min(Self::SKIP_MAX) };
    }
}

/// Looks for input for as long as a client takes that sends its next request at once.
fn look_for_input(stream: &Stream) -> io::Result<bool> {
    let begin = Instant::now();
    while begin.elapsed() < LOOK_TIME {
        if stream.has_input()? {
            return Ok(true);
        }
        std::hint::spin_loop();
    }
    Ok(false)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looks_that_find_nothing_become_rare_and_one_that_does_brings_them_back() {
        let mut looking = Looking::default();
        let mut looks = 0;
        for _ in 0..10_000 {
            if looking.is_worth_it() {
                looking.ended(false);
                looks += 1;
            }
        }
        assert!((10..30).contains(&looks), "{looks}");
        while !looking.is_worth_it() {}
        looking.ended(true);
        assert!(looking.is_worth_it());
    }
}
