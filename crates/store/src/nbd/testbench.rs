//! The body of a fuzz target: a whole connection, fed with arbitrary bytes.

use super::budget::Budget;
use super::context::Context;
use super::exports::{Export, Exports};
use super::negotiation::{Agreed, Negotiation, Step, TlsPolicy};
use super::protocol::{Form, Request, command, u16_at, u32_at, u64_at};
use super::transmission::Transmission;
use super::{HELD_BYTES_MAX, PAYLOAD_LEN_MAX};
use crate::disk::DiskError;
use crate::disk::memory::{MemoryDisk, OperationKind};
use std::sync::Arc;

const CAPACITY: u64 = 256 << 10;
const CONTEXTS: [&str; 2] = ["base:allocation", "polder:changed:snapshot"];

/// Bytes that say how the others are delivered.
const CONTROL_LEN: usize = 4;

/// Lets a client say `input`, but for its first bytes, which choose how it is cut and what the disk does.
///
/// Holds: no panic; what the server holds stays below its bound; with structured replies what it sends is well formed and
/// answers every request once.
pub fn converse(input: &[u8]) {
    let Some((control, said)) = input.split_at_checked(CONTROL_LEN) else { return };
    let disk = Arc::new(MemoryDisk::new(CAPACITY));
    disk.snapshot("snapshot");
    if control[0] & 1 != 0 {
        disk.lag();
    }
    if control[0] & 2 != 0 {
        disk.fail_when(|kind, offset, _| match kind {
            OperationKind::Read if offset % 1536 == 512 => Some(DiskError::Damaged { what: "a test".into() }),
            OperationKind::Write if offset % 1536 == 1024 => Some(DiskError::NoSpace),
            _ => None,
        });
    }
    let exports = Arc::new(Exports::new());
    for export in [Export::new("disk", disk.clone()), Export::new("", disk.clone()).read_only()] {
        exports.add(export.with_description("A disk.")).expect("the names differ");
    }
    let cut = usize::from(u16_at(control, 2)).max(1);
    if control[0] & 4 != 0 {
        // Straight to the second phase.
        let form = match (control[0] & 8 != 0, control[0] & 32 != 0) {
            (false, _) => Form::Simple,
            (true, false) => Form::Structured,
            (true, true) => Form::Extended,
        };
        let contexts: &[&str] = if form == Form::Simple { &[] } else { &CONTEXTS };
        let contexts = Context::select(&*disk, contexts).expect("the snapshot is there");
        let export = exports.find(if control[0] & 16 != 0 { "" } else { "disk" }).expect("both are there");
        return transmit(Agreed { export, form, contexts }, said, cut);
    }
    let policy = [TlsPolicy::Off, TlsPolicy::Allowed, TlsPolicy::Required][usize::from(control[1]) % 3];
    let mut negotiation = Negotiation::new(exports, policy);
    let (mut start, mut end) = (0, 0);
    loop {
        let mut output = Vec::new();
        let (used, step) = negotiation.step(&said[start..end], &mut output);
        start += used;
        match step {
            Step::Continue => {}
            Step::NeedMore if end == said.len() => return,
            Step::NeedMore => end = said.len().min(end + cut),
            Step::StartTls => negotiation.secured(),
            Step::Transmit(agreed) => return transmit(agreed, &said[start..], cut),
            Step::Close => return,
        }
    }
}

fn transmit(agreed: Agreed<MemoryDisk>, said: &[u8], cut: usize) {
    let form = agreed.form;
    let mut transmission = Transmission::new(agreed, Budget::default()).expect("a disk in memory has queues");
    let (mut start, mut end) = (0, 0);
    let mut sent = Vec::new();
    loop {
        // As the thread of a connection does, but that nobody waits.
        let used = match transmission.payload_space() {
            Some(space) if used_directly(cut) => {
                let count = space.len().min(end - start);
                space[..count].copy_from_slice(&said[start..start + count]);
                transmission.payload_received(count);
                count
            }
            _ => transmission.feed(&said[start..end]),
        };
        start += used;
        let paused = transmission.paused();
        transmission.complete();
        assert!(transmission.held_bytes() <= HELD_BYTES_MAX + PAYLOAD_LEN_MAX as usize + (1 << 20));
        let slices = transmission.outgoing().slices();
        let bytes: Vec<u8> = slices.iter().flat_map(|slice| slice.iter().copied()).take(cut.max(64) * 7).collect();
        drop(slices);
        transmission.sent(bytes.len());
        sent.extend_from_slice(&bytes);
        let is_idle = transmission.in_flight() == 0 && transmission.outgoing().is_empty();
        if used == 0 && !paused && end == said.len() && is_idle {
            break;
        }
        if transmission.ends() && is_idle {
            break;
        }
        end = said.len().min(end + cut);
    }
    if form != Form::Simple {
        let mut answered = answers(&sent);
        let mut asked = requests(&said[..start], form);
        answered.sort_unstable();
        asked.sort_unstable();
        assert_eq!(answered, asked, "each request has one answer");
    }
}

fn used_directly(cut: usize) -> bool {
    cut.is_multiple_of(2)
}

/// The cookies of the requests that are whole.
fn requests(mut said: &[u8], form: Form) -> Vec<u64> {
    let mut cookies = Vec::new();
    while let Some((request, head_len)) = Request::parse(said, form) {
        let Some(request) = request.filter(|request| request.command != command::DISC) else { break };
        let Some(end) = request.payload_len(form).checked_add(head_len as u64) else { break };
        let Some((_, rest)) = said.split_at_checked(end as usize) else { break };
        said = rest;
        cookies.push(request.cookie);
    }
    cookies
}

/// The cookies of the replies, which end where the bytes end.
fn answers(mut sent: &[u8]) -> Vec<u64> {
    let mut cookies = Vec::new();
    while !sent.is_empty() {
        let (is_last, len) = match u32_at(sent, 0) {
            0x6744_6698 => (true, 16),
            0x668e_33ef => (u16_at(sent, 4) == 1, 20 + u32_at(sent, 16) as usize),
            0x6e8a_278c => (u16_at(sent, 4) == 1, 32 + u64_at(sent, 24) as usize),
            magic => panic!("{magic:#x} begins no reply"),
        };
        if is_last {
            cookies.push(u64_at(sent, 8));
        }
        sent = &sent[len..];
    }
    cookies
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nbd::protocol::command_flag;
    use proptest::prelude::*;

    /// Requests that mostly make sense, so that most of them reach the disk.
    fn request(form: Form) -> impl Strategy<Value = Vec<u8>> {
        let flags = prop_oneof![8 => Just(0u16), 1 => 0u16..64];
        let offset = prop_oneof![8 => 0..CAPACITY, 1 => any::<u64>()];
        let len = prop_oneof![8 => 0u64..20_000, 1 => any::<u32>().prop_map(u64::from), 1 => any::<u64>()];
        let parts = (flags, 0u16..9, 0u64..4, offset, len, any::<u8>());
        parts.prop_map(move |(mut flags, command, cookie, offset, mut len, fill)| {
            // A client that goes is rare.
            let command = if command == command::DISC && fill > 10 { command::READ } else { command };
            if form == Form::Extended && command == command::WRITE && fill > 10 {
                flags |= command_flag::PAYLOAD_LEN;
            }
            let mut request = Request { flags, command, cookie, offset, len };
            if request.payload_len(form) > 0 {
                len %= 50_000;
                request.len = len;
            }
            let mut bytes = request.to_bytes(form);
            bytes.resize(bytes.len() + request.payload_len(form) as usize, fill);
            bytes
        })
    }

    /// What a client says with heads of that form, which `control` goes along with.
    fn conversation() -> impl Strategy<Value = (u8, Vec<Vec<u8>>)> {
        prop_oneof![Just((8, Form::Structured)), Just((8 | 32, Form::Extended))]
            .prop_flat_map(|(bits, form)| (Just(bits), prop::collection::vec(request(form), 0..30)))
    }

    proptest! {
        #[test]
        fn each_request_of_a_random_conversation_has_one_answer(
            control: [u8; CONTROL_LEN],
            (bits, requests) in conversation(),
            tail in prop::collection::vec(any::<u8>(), 0..40),
        ) {
            let mut input = control.to_vec();
            input[0] = input[0] & !32 | 4 | bits;
            input.extend(requests.concat());
            input.extend(tail);
            converse(&input);
        }

        #[test]
        fn a_conversation_of_arbitrary_bytes_ends(input in prop::collection::vec(any::<u8>(), 0..3000)) {
            converse(&input);
        }
    }
}
