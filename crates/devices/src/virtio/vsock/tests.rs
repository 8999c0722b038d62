//! The multiplexer over real Unix sockets, driven packet by packet by a guest that the test plays.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use polder_basics::ManualClock;
use rustix::event::{PollFd, Timespec, poll};

use super::Vsock;
use super::connection::BUFFER_LEN;
use super::multiplexer::{CONNECTIONS_MAX, HANDSHAKES_MAX, Multiplexer, RESETS_MAX};
use super::packet::*;
use crate::virtio::testing::{CONFIG, DATA, Driver};
use crate::virtio::{FEATURE_EVENT_INDEX, FEATURE_VERSION_1};
use polder_machine::AccessSize;
use zerocopy::{FromBytes, IntoBytes};

const CID: u64 = 3;
const AGENT: u32 = 1024;

struct Bench {
    multiplexer: Multiplexer,
    clock: Arc<ManualClock>,
    folder: PathBuf,
}

impl Drop for Bench {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

impl Bench {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::SeqCst);
        let folder = std::env::temp_dir().join(format!("polder-vsock-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let path = folder.join("vsock");
        let listener = UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        let clock = Arc::new(ManualClock::new(0));
        let multiplexer = Multiplexer::new(CID, Arc::new(listener), path, clock.clone());
        Bench { multiplexer, clock, folder }
    }

    /// Handles everything that the sockets have to say now.
    fn settle(&mut self) {
        loop {
            let sources = self.multiplexer.sources();
            let mut fds: Vec<_> = sources.iter().map(|(_, fd, flags)| PollFd::from_borrowed_fd(*fd, *flags)).collect();
            let count = poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).unwrap();
            let events: Vec<_> = sources.iter().zip(&fds).map(|((source, ..), fd)| (*source, fd.revents())).collect();
            drop(fds);
            drop(sources);
            self.multiplexer.handle(&events);
            if count == 0 {
                return;
            }
        }
    }

    fn next(&mut self) -> Option<(Header, Vec<u8>)> {
        self.settle();
        let mut payload = vec![0; 4096];
        let header = self.multiplexer.next_packet(&mut payload)?;
        payload.truncate(header.len as usize);
        Some((header, payload))
    }

    fn next_op(&mut self) -> Option<u16> {
        self.next().map(|(header, _)| header.op)
    }

    fn send(&mut self, header: Header, payload: &[u8]) {
        self.multiplexer.take_packet(&Header { len: payload.len() as u32, ..header }, payload);
    }

    fn connect(&self, line: &str) -> UnixStream {
        let mut socket = UnixStream::connect(self.folder.join("vsock")).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        socket.write_all(line.as_bytes()).unwrap();
        socket
    }

    /// A connection that the host opened and the guest accepted.
    fn established(&mut self) -> (UnixStream, Ports) {
        let mut socket = self.connect("CONNECT 1024\n");
        let (request, _) = self.next().unwrap();
        assert_eq!((request.op, { request.target_port }), (OP_REQUEST, AGENT));
        let ports = Ports { host: request.source_port, guest: AGENT };
        self.send(from_guest(ports, OP_RESPONSE), &[]);
        let mut line = [0; 14];
        socket.read_exact(&mut line).unwrap();
        assert_eq!(line, *format!("OK {}\n", ports.host).as_bytes());
        (socket, ports)
    }

    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.folder.join(format!("vsock_{port}"))).unwrap()
    }
}

fn from_guest(ports: Ports, op: u16) -> Header {
    Header {
        source_cid: CID,
        target_cid: HOST_CID,
        source_port: ports.guest,
        target_port: ports.host,
        socket_type: TYPE_STREAM,
        op,
        buffer_len: 8192,
        ..Header::default()
    }
}

fn is_closed(socket: &mut UnixStream) -> bool {
    matches!(socket.read(&mut [0; 16]), Ok(0) | Err(_))
}

#[test]
fn a_host_program_reaches_a_guest_port_and_bytes_flow_both_ways() {
    let mut bench = Bench::new();
    let (mut socket, ports) = bench.established();
    socket.write_all(b"to guest").unwrap();
    let (header, payload) = bench.next().unwrap();
    assert_eq!((header.op, payload.as_slice()), (OP_DATA, &b"to guest"[..]));
    bench.send(from_guest(ports, OP_DATA), b"to host");
    let mut bytes = [0; 7];
    socket.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"to host");
    assert!(bench.next().is_none());
}

#[test]
fn bytes_right_after_the_greeting_line_reach_the_guest() {
    let mut bench = Bench::new();
    let _socket = bench.connect("CONNECT 1024\nearly");
    let (request, _) = bench.next().unwrap();
    bench.send(from_guest(Ports { host: request.source_port, guest: AGENT }, OP_RESPONSE), &[]);
    assert_eq!(bench.next().unwrap().1, b"early");
}

#[test]
fn a_wrong_greeting_is_closed_and_never_reaches_the_guest() {
    let mut bench = Bench::new();
    for line in ["HELLO\n", "CONNECT -1\n", "CONNECT 99999999999\n", "CONNECT 12345678901234567890", "\n"] {
        let mut socket = bench.connect(line);
        assert!(bench.next().is_none(), "{line}");
        assert!(is_closed(&mut socket), "{line}");
    }
}

#[test]
fn a_greeting_that_never_ends_is_closed_in_time() {
    let mut bench = Bench::new();
    let mut sockets: Vec<_> = (0..HANDSHAKES_MAX + 1).map(|_| bench.connect("CONN")).collect();
    bench.settle();
    assert!(bench.multiplexer.timeout_ns().is_some());
    bench.clock.advance_ns(11_000_000_000);
    bench.settle();
    assert!(is_closed(&mut sockets[0]));
    // The one beyond the bound waited in the listener and has its turn now.
    sockets[HANDSHAKES_MAX].write_all(b"ECT 7\n").unwrap();
    assert_eq!(bench.next_op(), Some(OP_REQUEST));
}

#[test]
fn a_refused_connection_is_closed_for_the_host() {
    let mut bench = Bench::new();
    let mut socket = bench.connect("CONNECT 1024\n");
    let (request, _) = bench.next().unwrap();
    bench.send(from_guest(Ports { host: request.source_port, guest: AGENT }, OP_RESET), &[]);
    assert!(is_closed(&mut socket));
    assert!(bench.next().is_none());
}

#[test]
fn a_guest_that_never_answers_is_given_up() {
    let mut bench = Bench::new();
    let mut socket = bench.connect("CONNECT 1024\n");
    assert_eq!(bench.next_op(), Some(OP_REQUEST));
    bench.clock.advance_ns(11_000_000_000);
    assert_eq!(bench.next_op(), Some(OP_RESET));
    assert!(is_closed(&mut socket));
}

#[test]
fn the_guest_reaches_a_listening_program_of_the_host() {
    let mut bench = Bench::new();
    let listener = bench.listen(52);
    let ports = Ports { host: 52, guest: 4000 };
    bench.send(from_guest(ports, OP_REQUEST), &[]);
    let (mut socket, _) = listener.accept().unwrap();
    let (response, _) = bench.next().unwrap();
    assert_eq!((response.op, { response.buffer_len }), (OP_RESPONSE, BUFFER_LEN));
    bench.send(from_guest(ports, OP_DATA), b"hello");
    let mut bytes = [0; 5];
    socket.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"hello");
}

#[test]
fn a_port_without_listener_and_a_port_in_use_are_refused() {
    let mut bench = Bench::new();
    let ports = Ports { host: 53, guest: 4000 };
    bench.send(from_guest(ports, OP_REQUEST), &[]);
    assert_eq!(bench.next_op(), Some(OP_RESET));
    let _listener = bench.listen(53);
    bench.send(from_guest(ports, OP_REQUEST), &[]);
    assert_eq!(bench.next_op(), Some(OP_RESPONSE));
    bench.send(from_guest(ports, OP_REQUEST), &[]);
    assert_eq!(bench.next_op(), Some(OP_RESET));
}

#[test]
fn the_host_sends_no_more_than_the_guests_credit() {
    let mut bench = Bench::new();
    let (mut socket, ports) = bench.established();
    socket.write_all(&vec![7; 20_000]).unwrap();
    let mut received = 0;
    while let Some((header, payload)) = bench.next() {
        if header.op == OP_CREDIT_REQUEST {
            break;
        }
        received += payload.len();
    }
    assert_eq!(received, 8192);
    assert!(bench.next().is_none(), "credit is asked for once");
    bench.send(Header { forwarded: 8000, ..from_guest(ports, OP_CREDIT_UPDATE) }, &[]);
    let mut more = 0;
    while let Some((OP_DATA, len)) = bench.next().map(|(header, payload)| (header.op, payload.len())) {
        more += len;
    }
    assert_eq!(more, 8000);
}

#[test]
fn a_guest_that_lies_about_its_credit_gets_nothing() {
    let mut bench = Bench::new();
    let (mut socket, ports) = bench.established();
    bench.send(Header { forwarded: 1, buffer_len: u32::MAX - 1, ..from_guest(ports, OP_CREDIT_UPDATE) }, &[]);
    socket.write_all(b"secret").unwrap();
    assert_ne!(bench.next_op(), Some(OP_DATA));
}

#[test]
fn a_guest_that_sends_beyond_our_credit_is_reset() {
    let mut bench = Bench::new();
    let (_socket, ports) = bench.established();
    // Nobody reads, so the socket's own buffer and ours fill up; then one byte too many breaks the connection.
    let payload = vec![1; PAYLOAD_LEN_MAX];
    let mut ops = Vec::new();
    for _ in 0..64 {
        bench.send(from_guest(ports, OP_DATA), &payload);
        ops.extend(std::iter::from_fn(|| bench.next_op()));
    }
    assert!(ops.contains(&OP_RESET));
}

#[test]
fn a_slow_host_holds_the_guest_back_and_then_frees_it() {
    let mut bench = Bench::new();
    let (mut socket, ports) = bench.established();
    let (mut sent, mut free) = (0u32, BUFFER_LEN);
    while free >= 4096 {
        bench.send(from_guest(ports, OP_DATA), &[1; 4096]);
        sent += 4096;
        free -= 4096;
        while let Some((header, _)) = bench.next() {
            free = header.buffer_len - sent.wrapping_sub(header.forwarded);
        }
    }
    assert!(bench.next().is_none());
    let mut taken = vec![0; sent as usize];
    let reader = std::thread::spawn(move || socket.read_exact(&mut taken).map(|()| socket));
    let mut forwarded = 0;
    while forwarded < sent {
        bench.send(from_guest(ports, OP_CREDIT_REQUEST), &[]);
        let (header, _) = bench.next().unwrap();
        assert_eq!({ header.op }, OP_CREDIT_UPDATE);
        forwarded = header.forwarded;
    }
    reader.join().unwrap().unwrap();
}

#[test]
fn half_a_close_by_the_host_leaves_the_other_half_open() {
    let mut bench = Bench::new();
    let (mut socket, ports) = bench.established();
    socket.write_all(b"last").unwrap();
    socket.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(bench.next().unwrap().1, b"last");
    let (shutdown, _) = bench.next().unwrap();
    assert_eq!((shutdown.op, { shutdown.flags }), (OP_SHUTDOWN, SHUTDOWN_SEND));
    bench.send(from_guest(ports, OP_DATA), b"answer");
    let mut bytes = [0; 6];
    socket.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"answer");
    drop(socket);
    let (shutdown, _) = bench.next().unwrap();
    assert_eq!((shutdown.op, { shutdown.flags }), (OP_SHUTDOWN, SHUTDOWN_SEND | SHUTDOWN_RECEIVE));
    // A guest that does not let go is reset in the end.
    bench.clock.advance_ns(3_000_000_000);
    assert_eq!(bench.next_op(), Some(OP_RESET));
}

#[test]
fn half_a_close_by_the_guest_leaves_the_other_half_open() {
    let mut bench = Bench::new();
    let (mut socket, ports) = bench.established();
    bench.send(from_guest(ports, OP_DATA), b"last");
    bench.send(Header { flags: SHUTDOWN_SEND, ..from_guest(ports, OP_SHUTDOWN) }, &[]);
    let mut text = Vec::new();
    socket.read_to_end(&mut text).unwrap();
    assert_eq!(text, b"last");
    socket.write_all(b"answer").unwrap();
    assert_eq!(bench.next().unwrap().1, b"answer");
    bench.send(from_guest(ports, OP_DATA), b"after the end");
    assert_eq!(bench.next_op(), Some(OP_RESET));
}

#[test]
fn a_full_close_by_the_guest_is_answered_with_a_reset() {
    let mut bench = Bench::new();
    let (mut socket, ports) = bench.established();
    bench.send(from_guest(ports, OP_DATA), b"bye");
    bench.send(Header { flags: 3, ..from_guest(ports, OP_SHUTDOWN) }, &[]);
    assert_eq!(bench.next_op(), Some(OP_RESET));
    let mut text = Vec::new();
    socket.read_to_end(&mut text).unwrap();
    assert_eq!(text, b"bye");
    assert!(bench.next().is_none());
}

#[test]
fn strange_packets_are_answered_with_resets() {
    let mut bench = Bench::new();
    let ports = Ports { host: 1, guest: 2 };
    let good = from_guest(ports, OP_DATA);
    let strange = [
        good,
        Header { source_cid: 99, ..good },
        Header { target_cid: 99, ..good },
        Header { socket_type: 2, op: OP_REQUEST, ..good },
        Header { op: 0, ..good },
        Header { op: u16::MAX, ..good },
        from_guest(ports, OP_RESPONSE),
        from_guest(ports, OP_SHUTDOWN),
    ];
    for header in strange {
        bench.send(header, &[]);
        assert_eq!(bench.next_op(), Some(OP_RESET), "{header:?}");
    }
    bench.send(from_guest(ports, OP_RESET), &[]);
    bench.send(Header { source_cid: 9, ..from_guest(ports, OP_RESET) }, &[]);
    assert!(bench.next().is_none(), "a reset is never answered");
}

#[test]
fn a_response_that_nobody_waits_for_ends_the_connection() {
    let mut bench = Bench::new();
    let (mut socket, ports) = bench.established();
    bench.send(from_guest(ports, OP_RESPONSE), &[]);
    assert_eq!(bench.next_op(), Some(OP_RESET));
    assert!(is_closed(&mut socket));
}

#[test]
fn resets_that_the_guest_does_not_take_stop_it_from_sending() {
    let mut bench = Bench::new();
    for guest in 0..RESETS_MAX as u32 {
        assert!(bench.multiplexer.can_take());
        bench.send(from_guest(Ports { host: 1, guest }, OP_DATA), &[]);
    }
    assert!(!bench.multiplexer.can_take());
    bench.next();
    assert!(bench.multiplexer.can_take());
}

#[test]
fn connections_are_bounded() {
    let mut bench = Bench::new();
    let listener = bench.listen(52);
    let mut accepted = Vec::new();
    for guest in 0..CONNECTIONS_MAX as u32 {
        bench.send(from_guest(Ports { host: 52, guest }, OP_REQUEST), &[]);
        assert_eq!(bench.next_op(), Some(OP_RESPONSE));
        accepted.push(listener.accept().unwrap());
    }
    bench.send(from_guest(Ports { host: 52, guest: 9999 }, OP_REQUEST), &[]);
    assert_eq!(bench.next_op(), Some(OP_RESET));
}

#[test]
fn connections_take_turns() {
    let mut bench = Bench::new();
    let (mut first, _) = bench.established();
    let (mut second, _) = bench.established();
    first.write_all(&[1; 8000]).unwrap();
    second.write_all(&[2; 8000]).unwrap();
    let ports: Vec<u32> = (0..4).map(|_| bench.next().unwrap().0.source_port).collect();
    assert!(ports[0] != ports[1] && ports[0] == ports[2] || ports[1] == ports[2], "{ports:?}");
}

/// The device behind the transport, with a driver that the test plays.
fn device(bench: &Bench) -> Driver {
    let path = bench.folder.join("device");
    let listener = UnixListener::bind(&path).unwrap();
    let vsock = Vsock::new(CID, listener, path, bench.clock.clone()).unwrap();
    Driver::ready(Arc::new(vsock), FEATURE_VERSION_1 | FEATURE_EVENT_INDEX)
}

#[test]
fn a_packet_with_a_wrong_length_is_reset_and_the_queue_goes_on() {
    let bench = Bench::new();
    let mut driver = device(&bench);
    for _ in 0..4 {
        driver.send(0, &[(DATA + 0x1000, 4096, true)]);
    }
    let ports = Ports { host: 9, guest: 8 };
    // More payload than the chain holds; more than a packet may hold; no payload at all where some is announced.
    for (len, chain_len) in [(100, 50), (u32::MAX, 4096), (1, 0)] {
        driver.put(DATA, Header { len, ..from_guest(ports, OP_DATA) }.as_bytes());
        driver.send(1, &[(DATA, HEADER_LEN as u32 + chain_len, false)]);
        assert_eq!(driver.wait_used(1).1, 0);
        assert_eq!(driver.wait_used(0).1, HEADER_LEN as u32);
        let answer = Header::read_from_bytes(&driver.bytes(DATA + 0x1000, HEADER_LEN as usize)).unwrap();
        assert_eq!((answer.op, answer.ports()), (OP_RESET, Ports { host: ports.guest, guest: ports.host }));
    }
    // Less than a header is given back without an answer.
    driver.send(1, &[(DATA, 43, false)]);
    driver.wait_used(1);
    assert!(driver.take_used(0).is_none());
}

#[test]
fn a_receive_buffer_without_room_for_a_header_is_given_back_empty() {
    let bench = Bench::new();
    let mut driver = device(&bench);
    driver.send(0, &[(DATA + 0x1000, 43, true)]);
    driver.send(0, &[(DATA + 0x2000, 44, true)]);
    driver.put(DATA, from_guest(Ports { host: 9, guest: 8 }, OP_DATA).as_bytes());
    driver.send(1, &[(DATA, 44, false)]);
    assert_eq!(driver.wait_used(0).1, 0);
    assert_eq!(driver.wait_used(0).1, 44);
}

#[test]
fn a_stream_passes_through_the_device() {
    let bench = Bench::new();
    let mut driver = device(&bench);
    for index in 0..8 {
        driver.send(0, &[(DATA + 0x1_0000 + 0x1000 * index, 4096, true)]);
    }
    let mut socket = UnixStream::connect(bench.folder.join("device")).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    socket.write_all(b"CONNECT 1024\n").unwrap();
    driver.wait_used(0);
    let request = Header::read_from_bytes(&driver.bytes(DATA + 0x1_0000, 44)).unwrap();
    assert_eq!((request.op, { request.target_port }), (OP_REQUEST, AGENT));
    let ports = Ports { host: request.source_port, guest: AGENT };
    driver.put(DATA, from_guest(ports, OP_RESPONSE).as_bytes());
    driver.send(1, &[(DATA, 44, false)]);
    let mut line = [0; 14];
    socket.read_exact(&mut line).unwrap();
    driver.put(DATA + 0x100, Header { len: 5, ..from_guest(ports, OP_DATA) }.as_bytes());
    driver.put(DATA + 0x200, b"guest");
    driver.send(1, &[(DATA + 0x100, 44, false), (DATA + 0x200, 5, false)]);
    let mut bytes = [0; 5];
    socket.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"guest");
    socket.write_all(b"host").unwrap();
    assert_eq!(driver.wait_used(0).1, 48);
    assert_eq!(driver.bytes(DATA + 0x1_1000 + 44, 4), b"host");
    // A reset closes every stream on the host.
    driver.set_status(0);
    assert!(is_closed(&mut socket));
}

#[test]
fn the_configuration_is_the_context_id() {
    let bench = Bench::new();
    let driver = device(&bench);
    assert_eq!(driver.read(CONFIG, AccessSize::Qword), CID);
    assert_eq!(driver.read(CONFIG + 4, AccessSize::Dword), 0);
}

#[test]
fn random_packets_are_survived() {
    let seed = std::env::var("POLDER_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(0x706f_6c64_6572u64);
    println!("POLDER_SEED={seed}");
    let mut state = seed | 1;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut bench = Bench::new();
    let listener = bench.listen(52);
    listener.set_nonblocking(true).unwrap();
    let mut sockets = Vec::new();
    for step in 0..20_000 {
        let op = (random() % 9) as u16;
        let ports = Ports { host: [52, 1 << 30, (1 << 30) + 1, 7][random() as usize % 4], guest: random() as u32 % 4 };
        let header = Header {
            flags: random() as u32 % 5,
            buffer_len: random() as u32 >> (random() % 32),
            forwarded: random() as u32 >> (random() % 32),
            ..from_guest(ports, op)
        };
        let payload = vec![step as u8; (random() % 300) as usize];
        if bench.multiplexer.can_take() {
            bench.send(header, &payload);
        }
        match random() % 8 {
            0 => sockets.extend(listener.accept().ok().map(|(socket, _)| socket)),
            1 if sockets.len() < 50 => sockets.push(bench.connect(&format!("CONNECT {}\nxyz", random() % 4))),
            2 if !sockets.is_empty() => drop(sockets.swap_remove(random() as usize % sockets.len())),
            3 => bench.clock.advance_ns(random() % 1_000_000_000),
            _ => {}
        }
        while bench.next().is_some() {}
    }
}
