//! The transmission phase, byte by byte.

use super::budget::Budget;
use super::context::Context;
use super::exports::{Export, Exports};
use super::negotiation::Agreed;
use super::protocol::{
    EXTENDED_REQUEST_LEN, ErrorNumber, Form, REQUEST_LEN, Request, command, command_flag, u16_at, u32_at, u64_at,
};
use super::transmission::Transmission;
use super::{HELD_BYTES_MAX, PAYLOAD_LEN_MAX, REQUESTS_IN_FLIGHT_MAX, SERVER_HELD_BYTES_MAX, STATUS_LEN_MAX};
use crate::disk::memory::{CHUNK_LEN, MemoryDisk, OperationKind};
use crate::disk::{Disk, DiskError};
use std::sync::Arc;

const DISK_LEN: u64 = 96 << 20;
const FORMS: [Form; 3] = [Form::Simple, Form::Structured, Form::Extended];
const COOKIE: u64 = 0x0102_0304_0506_0708;

struct Client {
    disk: Arc<MemoryDisk>,
    transmission: Transmission<MemoryDisk>,
    form: Form,
}

/// A reply, put together.
#[derive(Debug, PartialEq, Eq)]
struct Reply {
    cookie: u64,
    error: u32,
    /// Data by offset; nothing stands for zeros that were not sent.
    parts: Vec<(u64, usize, Option<Vec<u8>>)>,
    status: Vec<(u32, Vec<(u64, u64)>)>,
}

impl Client {
    fn new(form: Form) -> Self {
        Self::with_export(form, |export| export, &[])
    }

    fn with_export(
        form: Form,
        change: impl FnOnce(Export<MemoryDisk>) -> Export<MemoryDisk>,
        contexts: &[&str],
    ) -> Self {
        Self::with(form, change, contexts, Budget::default())
    }

    fn with(
        form: Form,
        change: impl FnOnce(Export<MemoryDisk>) -> Export<MemoryDisk>,
        contexts: &[&str],
        budget: Budget,
    ) -> Self {
        let disk = Arc::new(MemoryDisk::new(DISK_LEN));
        disk.snapshot("first");
        let exports = Exports::new();
        exports.add(change(Export::new("disk", disk.clone()))).unwrap();
        let contexts = Context::select(&*disk, contexts).unwrap();
        let agreed = Agreed { export: exports.find("disk").unwrap(), form, contexts };
        Self { disk, transmission: Transmission::new(agreed, budget).unwrap(), form }
    }

    fn take_sent(&mut self) -> Vec<u8> {
        let mut sent = Vec::new();
        while !self.transmission.outgoing().is_empty() {
            let slices = self.transmission.outgoing().slices();
            // An odd number of bytes, so that every way to be interrupted is taken.
            let bytes: Vec<u8> = slices.iter().flat_map(|slice| slice.iter().copied()).take(1009).collect();
            drop(slices);
            self.transmission.sent(bytes.len());
            sent.extend_from_slice(&bytes);
        }
        sent
    }

    fn send(&mut self, request: Request, data: &[u8]) {
        let mut bytes = request.to_bytes(self.form);
        bytes.extend_from_slice(data);
        let used = self.transmission.feed(&bytes);
        assert_eq!(used, bytes.len());
        self.transmission.complete();
    }

    /// Asks as a client does that keeps to the protocol: with extended headers, a write says that data follow.
    fn ask(&mut self, command: u16, flags: u16, offset: u64, len: u64, data: &[u8]) -> Reply {
        let says_so = self.form == Form::Extended && command == command::WRITE;
        let flags = if says_so { flags | command_flag::PAYLOAD_LEN } else { flags };
        self.ask_with(flags, command, offset, len, data)
    }

    fn ask_with(&mut self, flags: u16, command: u16, offset: u64, len: u64, data: &[u8]) -> Reply {
        self.send(Request { flags, command, cookie: COOKIE, offset, len }, data);
        let simple_len = if command == command::READ && self.form == Form::Simple { len as usize } else { 0 };
        let sent = self.take_sent();
        let (reply, used) = parse_reply(&sent, self.form, offset, simple_len);
        assert_eq!(used, sent.len(), "one reply to one request");
        assert_eq!(reply.cookie, COOKIE);
        reply
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        assert_eq!(self.ask(command::WRITE, 0, offset, data.len() as u64, data).error, 0);
    }

    /// Reads with whatever chunks the server chooses.
    fn read(&mut self, offset: u64, len: u32) -> Vec<u8> {
        let reply = self.ask(command::READ, 0, offset, len.into(), &[]);
        assert_eq!(reply.error, 0);
        let mut bytes = vec![0xcc; len as usize];
        let mut covered = 0;
        for (at, part_len, data) in reply.parts {
            let from = (at - offset) as usize;
            bytes[from..from + part_len].copy_from_slice(&data.unwrap_or_else(|| vec![0; part_len]));
            covered += part_len;
        }
        assert_eq!(covered, len as usize);
        bytes
    }

    fn error(&mut self, command: u16, flags: u16, offset: u64, len: u64, data: &[u8]) -> u32 {
        self.ask(command, flags, offset, len, data).error
    }
}

/// Parses the first reply of `bytes`, to a request at `offset`; a simple one has `simple_len` bytes of data behind it.
fn parse_reply(bytes: &[u8], form: Form, offset: u64, simple_len: usize) -> (Reply, usize) {
    let mut reply = Reply { cookie: 0, error: 0, parts: Vec::new(), status: Vec::new() };
    if u32_at(bytes, 0) == 0x6744_6698 {
        assert_ne!(form, Form::Extended);
        (reply.error, reply.cookie) = (u32_at(bytes, 4), u64_at(bytes, 8));
        let len = if reply.error == 0 { simple_len } else { 0 };
        if len > 0 {
            reply.parts.push((0, len, Some(bytes[16..16 + len].to_vec())));
        }
        return (reply, 16 + len);
    }
    let mut used = 0;
    loop {
        let head = &bytes[used..];
        let (magic, head_len, len) = match form {
            Form::Extended => (0x6e8a_278c, 32, u64_at(head, 24) as usize),
            _ => (0x668e_33ef, 20, u32_at(head, 16) as usize),
        };
        assert_eq!(u32_at(head, 0), magic);
        assert!(form != Form::Extended || u64_at(head, 16) == offset);
        let (last, kind) = (u16_at(head, 4) == 1, u16_at(head, 6));
        reply.cookie = u64_at(head, 8);
        let payload = &head[head_len..head_len + len];
        match kind {
            0 => assert!(last && len == 0),
            1 => reply.parts.push((u64_at(payload, 0), len - 8, Some(payload[8..].to_vec()))),
            2 => reply.parts.push((u64_at(payload, 0), u32_at(payload, 8) as usize, None)),
            5 => {
                assert_ne!(form, Form::Extended);
                let extents = payload[4..].chunks_exact(8);
                let extents = extents.map(|extent| (u32_at(extent, 0).into(), u32_at(extent, 4).into()));
                reply.status.push((u32_at(payload, 0), extents.collect()));
            }
            6 => {
                assert_eq!(form, Form::Extended);
                let extents = payload[8..].chunks_exact(16);
                assert_eq!(u32_at(payload, 4) as usize, extents.len());
                let extents = extents.map(|extent| (u64_at(extent, 0), u64_at(extent, 8)));
                reply.status.push((u32_at(payload, 0), extents.collect()));
            }
            0x8001 => {
                reply.error = u32_at(payload, 0);
                assert_eq!(usize::from(u16_at(payload, 4)), len - 6);
                assert!(std::str::from_utf8(&payload[6..]).is_ok());
            }
            _ => panic!("chunk of type {kind}"),
        }
        used += head_len + len;
        if last {
            return (reply, used);
        }
    }
}

#[test]
fn what_is_written_is_read_with_replies_of_each_form() {
    for form in FORMS {
        let mut client = Client::new(form);
        let data: Vec<u8> = (0..100_000u32).map(|index| index as u8).collect();
        client.write(512, &data[..4096]);
        client.write(1 << 20, &data[..65_536]);
        let reply = client.ask(command::READ, 0, 512, 4096, &[]);
        assert_eq!(reply.parts[0].2.as_deref(), Some(&data[..4096]));
        let reply = client.ask(command::READ, 0, 1 << 20, 65_536, &[]);
        assert_eq!(reply.parts[0].2.as_deref(), Some(&data[..65_536]));
    }
}

#[test]
fn any_byte_can_be_written_and_read() {
    let mut client = Client::new(Form::Structured);
    let mut expected = vec![0; 4 * CHUNK_LEN];
    client.write(0, &vec![7; 4 * CHUNK_LEN]);
    expected.fill(7);
    let mut fill = 10u8;
    for (offset, len) in [(1, 1), (511, 2), (512, 511), (1000, 3000), (CHUNK_LEN - 1, 2), (CHUNK_LEN, 513), (3, 20_000)]
    {
        fill += 1;
        client.write(offset as u64, &vec![fill; len]);
        expected[offset..offset + len].fill(fill);
        assert_eq!(client.read(offset as u64, len as u32), expected[offset..offset + len]);
    }
    for (offset, len) in [(5, 3), (510, 4), (2000, 5000), (512, 700), (700, 324)] {
        assert_eq!(client.error(command::WRITE_ZEROES, 0, offset as u64, len as u64, &[]), 0);
        expected[offset..offset + len].fill(0);
    }
    assert_eq!(client.read(0, expected.len() as u32), expected);
    assert_eq!(client.read(1, expected.len() as u32 - 2), expected[1..expected.len() - 1]);
    assert_eq!(client.read(DISK_LEN - 1, 1), [0]);
    client.write(DISK_LEN - 1, &[9]);
    assert_eq!(client.read(DISK_LEN - 2, 2), [0, 9]);
}

#[test]
fn parts_without_data_are_sent_as_holes_unless_the_client_wants_one_chunk() {
    let mut client = Client::new(Form::Structured);
    let chunk = CHUNK_LEN as u64;
    client.write(chunk, &[1; CHUNK_LEN]);
    client.write(3 * chunk, &[3; CHUNK_LEN]);
    let reply = client.ask(command::READ, 0, 0, 5 * chunk, &[]);
    let expected = vec![
        (0, CHUNK_LEN, None),
        (chunk, CHUNK_LEN, Some(vec![1; CHUNK_LEN])),
        (2 * chunk, CHUNK_LEN, None),
        (3 * chunk, CHUNK_LEN, Some(vec![3; CHUNK_LEN])),
        (4 * chunk, CHUNK_LEN, None),
    ];
    assert_eq!(reply.parts, expected);
    // A few bytes of a hole are not worth a chunk; whatever was in the buffer before is not sent.
    let reply = client.ask(command::READ, 0, chunk - 100, 200, &[]);
    assert_eq!(reply.parts, vec![(chunk - 100, 200, Some([[0; 100], [1; 100]].concat()))]);
    let reply = client.ask(command::READ, command_flag::DF, 0, 5 * chunk, &[]);
    assert_eq!(reply.parts.len(), 1);
    let data = reply.parts[0].2.as_ref().unwrap();
    for (index, part) in data.chunks_exact(CHUNK_LEN).enumerate() {
        let value = if index % 2 == 1 { index as u8 } else { 0 };
        assert!(part.iter().all(|byte| *byte == value));
    }
    let reply = client.ask(command::READ, command_flag::DF, 8 * chunk, chunk, &[]);
    assert_eq!(reply.parts, vec![(8 * chunk, CHUNK_LEN, None)]);
}

#[test]
fn what_is_wrong_is_refused_with_the_number_of_the_protocol() {
    let (invalid, no_space) = (ErrorNumber::Invalid as u32, ErrorNumber::NoSpace as u32);
    let too_long = u64::from(PAYLOAD_LEN_MAX) + 1;
    for form in FORMS {
        let mut client = Client::new(form);
        assert_eq!(client.error(99, 0, 0, 0, &[]), invalid);
        assert_eq!(client.error(command::READ, 0, DISK_LEN - 511, 512, &[]), invalid);
        assert_eq!(client.error(command::READ, 0, u64::MAX, 512, &[]), invalid);
        assert_eq!(client.error(command::WRITE, 0, DISK_LEN, 512, &[0; 512]), no_space);
        assert_eq!(client.error(command::WRITE_ZEROES, 0, DISK_LEN - 512, 1024, &[]), no_space);
        assert_eq!(client.error(command::TRIM, 0, DISK_LEN - 512, 1024, &[]), invalid);
        assert_eq!(client.error(command::CACHE, 0, DISK_LEN - 512, 1024, &[]), invalid);
        assert_eq!(client.error(command::FLUSH, 0, 1, 0, &[]), invalid);
        assert_eq!(client.error(command::FLUSH, command_flag::DF, 0, 0, &[]), invalid);
        assert_eq!(client.error(command::WRITE, command_flag::NO_HOLE, 0, 512, &[0; 512]), invalid);
        assert_eq!(client.error(command::READ, 1 << 15, 0, 512, &[]), invalid);
        assert_eq!(client.error(command::BLOCK_STATUS, 0, 0, 512, &[]), invalid);
        let overflow = if form != Form::Simple { ErrorNumber::Overflow as u32 } else { invalid };
        assert_eq!(client.error(command::READ, 0, 0, too_long, &[]), overflow);
        let payload = vec![0; too_long as usize];
        assert_eq!(client.error(command::WRITE, 0, 0, too_long, &payload), invalid);
        if form == Form::Simple {
            assert_eq!(client.error(command::READ, command_flag::DF, 0, 512, &[]), invalid);
        }
        // None of this has ended the connection or put it out of step.
        client.write(0, &[5; 512]);
        assert_eq!(client.error(command::READ, command_flag::FUA, 0, 512, &[]), 0);
        assert_eq!(client.error(command::CACHE, 0, 0, 1 << 20, &[]), 0);
    }
}

#[test]
fn a_request_for_nothing_succeeds() {
    for form in FORMS {
        let mut client = Client::new(form);
        for command in [command::READ, command::WRITE, command::TRIM, command::WRITE_ZEROES, command::CACHE] {
            assert_eq!(client.error(command, 0, 512, 0, &[]), 0);
            assert_eq!(client.error(command, 0, DISK_LEN, 0, &[]), 0);
        }
    }
}

#[test]
fn a_read_only_export_refuses_every_change() {
    let mut client = Client::with_export(Form::Structured, Export::read_only, &[]);
    for command in [command::WRITE, command::TRIM, command::WRITE_ZEROES] {
        let data: &[u8] = if command == command::WRITE { &[1; 512] } else { &[] };
        assert_eq!(client.error(command, 0, 0, 512, data), ErrorNumber::NotPermitted as u32);
    }
    assert_eq!(client.read(0, 512), [0; 512]);
    assert_eq!(client.error(command::FLUSH, 0, 0, 0, &[]), 0);
}

#[test]
fn flush_and_fua_reach_the_disk() {
    let mut client = Client::new(Form::Simple);
    assert_eq!(client.error(command::WRITE, command_flag::FUA, 0, 512, &[1; 512]), 0);
    assert_eq!(client.error(command::WRITE, command_flag::FUA, 3, 5, &[1; 5]), 0);
    assert_eq!(client.error(command::TRIM, command_flag::FUA, 0, 512, &[]), 0);
    assert_eq!(client.error(command::WRITE_ZEROES, command_flag::FUA, 0, 512, &[]), 0);
    assert_eq!(client.disk.stable_writes(), 4);
    client.write(0, &[1; 512]);
    assert_eq!(client.disk.stable_writes(), 4);
    assert_eq!(client.error(command::FLUSH, 0, 0, 0, &[]), 0);
    assert_eq!(client.disk.flushes(), 1);
}

#[test]
fn a_trim_touches_whole_sectors_only() {
    let mut client = Client::new(Form::Simple);
    client.write(0, &[1; 2048]);
    assert_eq!(client.error(command::TRIM, 0, 10, 100, &[]), 0);
    assert_eq!(client.error(command::TRIM, 0, 500, 1000, &[]), 0);
    let expected = [vec![1; 512], vec![0; 512], vec![1; 1024]].concat();
    let reply = client.ask(command::READ, 0, 0, 2048, &[]);
    assert_eq!(reply.parts[0].2.as_ref(), Some(&expected));
}

#[test]
fn block_status_tells_what_is_allocated_and_what_has_changed() {
    [Form::Structured, Form::Extended].into_iter().for_each(block_status_tells_in);
}

fn block_status_tells_in(form: Form) {
    let contexts = ["base:allocation", "polder:changed:first", "qemu:dirty-bitmap:second"];
    let mut client = Client::with_export(form, |export| export, &contexts[..2]);
    assert_eq!(Context::select(&*client.disk, &contexts).unwrap().len(), 2, "there is no second snapshot");
    let chunk = CHUNK_LEN as u64;
    client.write(chunk, &[1; CHUNK_LEN]);
    let reply = client.ask(command::BLOCK_STATUS, 0, 0, 4 * chunk, &[]);
    assert_eq!(
        reply.status,
        [(0, vec![(chunk, 3), (chunk, 0), (2 * chunk, 3)]), (1, vec![(chunk, 0), (chunk, 1), (2 * chunk, 0)])]
    );
    let reply = client.ask(command::BLOCK_STATUS, command_flag::REQ_ONE, 100, 4 * chunk, &[]);
    assert_eq!(reply.status, [(0, vec![(chunk - 100, 3)]), (1, vec![(chunk - 100, 0)])]);
    let reply = client.ask(command::BLOCK_STATUS, 0, 2 * chunk - 7, 10, &[]);
    assert_eq!(reply.status, [(0, vec![(7, 0), (3, 3)]), (1, vec![(7, 1), (3, 0)])]);
    let end = client.error(command::BLOCK_STATUS, 0, DISK_LEN - 1, 2, &[]);
    assert_eq!(end, ErrorNumber::Invalid as u32);
}

#[test]
fn an_error_of_the_disk_reaches_the_client_that_asked() {
    for form in FORMS {
        let mut client = Client::new(form);
        client.disk.fail_when(|kind, offset, _| match kind {
            OperationKind::Write if offset == 0 => Some(DiskError::NoSpace),
            OperationKind::Read if offset == 512 => Some(DiskError::Damaged { what: "a test".into() }),
            OperationKind::Flush => Some(DiskError::Fenced),
            _ => None,
        });
        assert_eq!(client.error(command::WRITE, 0, 0, 512, &[1; 512]), 28);
        assert_eq!(client.error(command::WRITE, 0, 5, 6, &[1; 6]), 28);
        assert_eq!(client.error(command::READ, 0, 512, 512, &[]), 5);
        assert_eq!(client.error(command::WRITE, 0, 600, 6, &[1; 6]), 5);
        assert_eq!(client.error(command::FLUSH, 0, 0, 0, &[]), 108);
        client.write(1024, &[1; 512]);
        assert_eq!(client.error(command::READ, 0, 1024, 512, &[]), 0);
    }
}

#[test]
fn replies_come_in_the_order_in_which_the_disk_finishes() {
    let mut client = Client::new(Form::Simple);
    client.disk.hold();
    for cookie in 1..=3 {
        client.send(Request { flags: 0, command: command::FLUSH, cookie, offset: 0, len: 0 }, &[]);
    }
    assert!(client.take_sent().is_empty());
    client.disk.release();
    client.transmission.complete();
    let sent = client.take_sent();
    let cookies: Vec<u64> = sent.chunks_exact(16).map(|reply| u64_at(reply, 8)).collect();
    assert_eq!(cookies, [3, 2, 1]);
    assert_eq!(client.transmission.in_flight(), 0);
}

#[test]
fn requests_beyond_the_bounds_are_not_received_until_replies_have_left() {
    let mut client = Client::new(Form::Structured);
    client.disk.hold();
    let flush = Request { flags: 0, command: command::FLUSH, cookie: 1, offset: 0, len: 0 }.to_bytes(Form::Structured);
    let many = flush.repeat(REQUESTS_IN_FLIGHT_MAX + 5);
    assert_eq!(client.transmission.feed(&many), REQUESTS_IN_FLIGHT_MAX * REQUEST_LEN);
    assert!(!client.transmission.wants_input());
    client.disk.release();
    client.transmission.complete();
    assert!(client.transmission.wants_input());
    client.take_sent();

    client.disk.hold();
    let read = |len| Request { flags: 0, command: command::READ, cookie: 1, offset: 0, len }.to_bytes(Form::Structured);
    let mut held = 0;
    while client.transmission.wants_input() {
        assert_eq!(client.transmission.feed(&read(PAYLOAD_LEN_MAX.into())), REQUEST_LEN);
        held += PAYLOAD_LEN_MAX as usize;
    }
    assert!((HELD_BYTES_MAX..HELD_BYTES_MAX + PAYLOAD_LEN_MAX as usize).contains(&held));
    client.disk.release();
    client.transmission.complete();
    client.take_sent();
    assert!(client.transmission.wants_input());
}

#[test]
fn where_all_connections_hold_much_each_gets_one_request_at_a_time() {
    let total = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let mut others = Budget::new(total.clone());
    let mut client = Client::with(Form::Structured, |export| export, &[], Budget::new(total));
    client.disk.hold();
    let read =
        Request { flags: 0, command: command::READ, cookie: 1, offset: 0, len: 1 << 20 }.to_bytes(Form::Structured);
    assert_eq!(client.transmission.feed(&read), REQUEST_LEN);
    assert!(client.transmission.wants_input());
    others.charge(SERVER_HELD_BYTES_MAX);
    assert!(!client.transmission.wants_input());
    client.disk.release();
    client.transmission.complete();
    client.take_sent();
    assert!(client.transmission.wants_input());
}

#[test]
fn nothing_is_taken_after_a_disconnect_or_a_wrong_magic_number() {
    let disconnect = Request { flags: 0, command: command::DISC, cookie: 0, offset: 0, len: 0 };
    let flush = Request { command: command::FLUSH, ..disconnect };
    for (form, bytes, len) in [
        (Form::Simple, disconnect.to_bytes(Form::Simple), REQUEST_LEN),
        (Form::Simple, vec![0; REQUEST_LEN], REQUEST_LEN),
        (Form::Simple, flush.to_bytes(Form::Extended), REQUEST_LEN),
        (Form::Extended, disconnect.to_bytes(Form::Extended), EXTENDED_REQUEST_LEN),
        (Form::Extended, flush.to_bytes(Form::Structured), EXTENDED_REQUEST_LEN),
    ] {
        let mut client = Client::new(form);
        let used = client.transmission.feed(&bytes.repeat(2));
        assert_eq!(used, len);
        assert!(client.transmission.ends() && !client.transmission.wants_input());
        assert!(client.take_sent().is_empty());
    }
}

#[test]
fn a_resized_disk_is_believed_at_once() {
    let mut client = Client::new(Form::Simple);
    client.disk.resize(DISK_LEN + 512).unwrap();
    client.write(DISK_LEN, &[1; 512]);
    client.disk.resize(512).unwrap();
    assert_eq!(client.error(command::WRITE, 0, 512, 512, &[0; 512]), ErrorNumber::NoSpace as u32);
}

#[test]
fn lengths_of_64_bits_are_taken_where_nothing_of_that_length_is_sent() {
    const LEN: u64 = 40 << 30;
    let mut client = Client::with_export(Form::Extended, |export| export, &["base:allocation"]);
    client.disk.resize(LEN).unwrap();
    client.write(5 << 30, &[1; CHUNK_LEN]);
    client.write(LEN - 512, &[2; 512]);
    // An extent is longer than 32 bits can say; the answer ends before the request does.
    let reply = client.ask(command::BLOCK_STATUS, 0, 0, LEN, &[]);
    let data = 5 << 30;
    let chunk = CHUNK_LEN as u64;
    assert_eq!(reply.status, [(0, vec![(data, 3), (chunk, 0), (STATUS_LEN_MAX - data - chunk, 3)])]);
    assert_eq!(client.error(command::TRIM, 0, 0, 6 << 30, &[]), 0);
    assert_eq!(client.read(5 << 30, 512), [0; 512]);
    client.write(5 << 30, &[1; 512]);
    assert_eq!(client.error(command::WRITE_ZEROES, command_flag::FAST_ZERO, 7, LEN - 7, &[]), 0);
    assert_eq!(client.read(5 << 30, 512), [0; 512]);
    assert_eq!(client.read(LEN - 512, 512), [0; 512]);
    assert_eq!(client.error(command::CACHE, 0, 0, LEN, &[]), 0);
    let (invalid, overflow) = (ErrorNumber::Invalid as u32, ErrorNumber::Overflow as u32);
    assert_eq!(client.error(command::READ, 0, 0, LEN, &[]), overflow);
    assert_eq!(client.error(command::READ, 0, 512, u64::MAX, &[]), overflow);
    assert_eq!(client.error(command::TRIM, 0, 512, u64::MAX, &[]), invalid);
    assert_eq!(client.error(command::WRITE_ZEROES, 0, 512, LEN, &[]), ErrorNumber::NoSpace as u32);
}

#[test]
fn what_says_that_data_follow_is_followed_by_them_whatever_comes_of_it() {
    let mut client = Client::with_export(Form::Extended, |export| export, &["base:allocation"]);
    let invalid = ErrorNumber::Invalid as u32;
    let payload_len = command_flag::PAYLOAD_LEN;
    for command in [command::READ, command::TRIM, command::WRITE_ZEROES, command::CACHE, command::BLOCK_STATUS, 99] {
        assert_eq!(client.ask_with(payload_len, command, 0, 1000, &[7; 1000]).error, invalid, "{command}");
        // Nothing follows, so nothing is skipped.
        assert_eq!(client.ask_with(payload_len, command, 0, 0, &[]).error, invalid, "{command}");
    }
    // The data of a write follow whether it says so or not.
    assert_eq!(client.ask_with(0, command::WRITE, 0, 512, &[7; 512]).error, 0);
    assert_eq!(client.read(0, 512), [7; 512]);
    client.write(0, &[1; 512]);
    assert_eq!(client.read(0, 512), [1; 512]);
    for form in [Form::Simple, Form::Structured] {
        let mut client = Client::new(form);
        assert_eq!(client.ask_with(payload_len, command::WRITE, 0, 512, &[7; 512]).error, invalid);
        assert_eq!(client.ask_with(payload_len, command::READ, 0, 512, &[]).error, invalid);
        client.write(0, &[1; 512]);
    }
}

#[test]
fn nothing_is_held_for_data_that_only_a_length_announces() {
    let mut client = Client::new(Form::Extended);
    let flags = command_flag::PAYLOAD_LEN;
    for (command, len) in [(command::WRITE, u64::MAX), (command::WRITE, 1 << 40), (command::READ, u64::MAX)] {
        let request = Request { flags, command, cookie: 1, offset: 0, len };
        let mut transmission = std::mem::replace(&mut client, Client::new(Form::Extended)).transmission;
        assert_eq!(transmission.feed(&request.to_bytes(Form::Extended)), EXTENDED_REQUEST_LEN);
        assert_eq!(transmission.feed(&[0; 100_000]), 100_000);
        assert!(transmission.wants_input() && transmission.held_bytes() == 0 && transmission.outgoing().is_empty());
    }
}

mod random {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug, Clone)]
    enum Act {
        Write(u64, usize, u8),
        Zero(u64, usize),
        Read(u64, usize),
    }

    const SPACE: u64 = 6 * CHUNK_LEN as u64;

    fn act() -> impl Strategy<Value = Act> {
        let range = (0..SPACE).prop_flat_map(|offset| (Just(offset), 1..=((SPACE - offset) as usize).min(40_000)));
        (range, 0..3, any::<u8>()).prop_map(|((offset, len), kind, value)| match kind {
            0 => Act::Write(offset, len, value),
            1 => Act::Zero(offset, len),
            _ => Act::Read(offset, len),
        })
    }

    proptest! {
        #[test]
        fn random_requests_leave_what_they_say(
            acts in prop::collection::vec(act(), 1..40), form in prop::sample::select(&FORMS[1..]),
        ) {
            let mut client = Client::new(form);
            let mut expected = vec![0u8; SPACE as usize];
            for act in acts {
                match act {
                    Act::Write(offset, len, value) => {
                        client.write(offset, &vec![value; len]);
                        expected[offset as usize..offset as usize + len].fill(value);
                    }
                    Act::Zero(offset, len) => {
                        prop_assert_eq!(client.error(command::WRITE_ZEROES, 0, offset, len as u64, &[]), 0);
                        expected[offset as usize..offset as usize + len].fill(0);
                    }
                    Act::Read(offset, len) => {
                        let read = client.read(offset, len as u32);
                        prop_assert_eq!(&read[..], &expected[offset as usize..offset as usize + len]);
                    }
                }
            }
        }

        #[test]
        fn cuts_between_bytes_change_nothing(
            acts in prop::collection::vec(act(), 1..12),
            cuts in prop::collection::vec(1usize..3000, 1..50),
            form in prop::sample::select(&FORMS[1..]),
        ) {
            let mut stream = Vec::new();
            for (cookie, act) in acts.iter().enumerate() {
                let (command, offset, len) = match act {
                    Act::Write(offset, len, _) => (command::WRITE, *offset, *len),
                    Act::Zero(offset, len) => (command::WRITE_ZEROES, *offset, *len),
                    Act::Read(offset, len) => (command::READ, *offset, *len),
                };
                let says_so = form == Form::Extended && command == command::WRITE;
                let flags = if says_so { command_flag::PAYLOAD_LEN } else { 0 };
                let head = Request { flags, command, cookie: cookie as u64, offset, len: len as u64 };
                stream.extend_from_slice(&head.to_bytes(form));
                if let Act::Write(_, len, value) = act {
                    stream.resize(stream.len() + len, *value);
                }
            }
            let sent = |cuts: &[usize]| {
                let mut client = Client::new(form);
                let (mut start, mut end) = (0, 0);
                let mut sent = Vec::new();
                for cut in cuts.iter().cycle() {
                    if start == stream.len() {
                        break;
                    }
                    end = (end + cut).min(stream.len());
                    start += client.transmission.feed(&stream[start..end]);
                    client.transmission.complete();
                    sent.extend(client.take_sent());
                }
                sent
            };
            prop_assert_eq!(sent(&cuts), sent(&[usize::MAX / 2]));
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..4000), form in prop::sample::select(&FORMS[..])) {
            let mut client = Client::new(form);
            let mut start = 0;
            while start < bytes.len() && client.transmission.wants_input() {
                let used = client.transmission.feed(&bytes[start..]);
                client.transmission.complete();
                client.take_sent();
                if used == 0 {
                    break;
                }
                start += used;
            }
        }
    }
}
