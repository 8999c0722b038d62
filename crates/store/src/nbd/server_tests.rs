//! Sockets, threads and the end of a server.

use super::protocol::{Form, OPTION_MAGIC, Request, SIMPLE_REPLY_LEN, command, option, u32_at, u64_at};
use super::{Export, Exports, ListenError, Listener, REQUESTS_IN_FLIGHT_MAX, Server, ServerOptions, Tls};
use crate::disk::memory::MemoryDisk;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

const CAPACITY: u64 = 64 << 20;

/// A path for a socket that nobody else uses.
struct Place(PathBuf);

impl Place {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("polder-nbd-server-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        Self(std::env::temp_dir().join(name))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn start(place: &Place, options: ServerOptions) -> (Server, Arc<MemoryDisk>) {
    let disk = Arc::new(MemoryDisk::new(CAPACITY));
    let exports = Arc::new(Exports::new());
    exports.add(Export::new("disk", disk.clone())).unwrap();
    let listener = Listener::unix(&place.0, 0o600).unwrap();
    (Server::start(vec![listener], exports, options).unwrap(), disk)
}

/// An old client that has chosen the default export.
fn connect(place: &Place) -> UnixStream {
    let mut socket = UnixStream::connect(&place.0).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    socket.read_exact(&mut [0; 18]).unwrap();
    socket.write_all(&3u32.to_be_bytes()).unwrap();
    socket.write_all(&option_head(option::EXPORT_NAME)).unwrap();
    socket.read_exact(&mut [0; 10]).unwrap();
    socket
}

fn option_head(option: u32) -> Vec<u8> {
    [&OPTION_MAGIC.to_be_bytes()[..], &option.to_be_bytes(), &[0; 4]].concat()
}

fn request(command: u16, cookie: u64, len: u64) -> Vec<u8> {
    Request { flags: 0, command, cookie, offset: 0, len }.to_bytes(Form::Simple)
}

/// The error and the cookie of the next reply.
fn receive(socket: &mut UnixStream, data_len: usize) -> (u32, u64) {
    let mut head = [0; SIMPLE_REPLY_LEN];
    socket.read_exact(&mut head).unwrap();
    socket.read_exact(&mut vec![0; data_len]).unwrap();
    (u32_at(&head, 4), u64_at(&head, 8))
}

fn is_closed(socket: &mut UnixStream) -> bool {
    match socket.read(&mut [0; 1]) {
        Ok(count) => count == 0,
        Err(error) => error.kind() == ErrorKind::ConnectionReset,
    }
}

fn wait_until(happened: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !happened() {
        assert!(Instant::now() < deadline, "it has not happened in time");
        std::thread::yield_now();
    }
}

#[test]
fn what_is_in_flight_is_answered_before_the_server_ends() {
    let place = Place::new();
    let (server, disk) = start(&place, ServerOptions::default());
    let mut client = connect(&place);
    let mut idle = connect(&place);
    disk.hold();
    client.write_all(&request(command::FLUSH, 1, 0)).unwrap();
    client.write_all(&request(command::FLUSH, 2, 0)).unwrap();
    wait_until(|| disk.held_operations() == 2);
    server.stop_handle().stop();
    assert!(is_closed(&mut idle));
    disk.release();
    let mut cookies = [receive(&mut client, 0), receive(&mut client, 0)].map(|(error, cookie)| {
        assert_eq!(error, 0);
        cookie
    });
    cookies.sort_unstable();
    assert_eq!(cookies, [1, 2]);
    assert!(is_closed(&mut client));
    server.join();
    assert!(!place.0.exists(), "the socket is removed");
}

#[test]
fn a_client_that_says_nothing_holds_up_no_end() {
    let place = Place::new();
    let (server, _disk) = start(&place, ServerOptions::default());
    let mut silent = UnixStream::connect(&place.0).unwrap();
    silent.read_exact(&mut [0; 18]).unwrap();
    let start = Instant::now();
    drop(server);
    assert!(start.elapsed() < Duration::from_secs(4));
    assert!(is_closed(&mut silent));
}

#[test]
fn a_client_that_takes_no_replies_hurts_nobody_else() {
    let place = Place::new();
    let (server, _disk) = start(&place, ServerOptions::default());
    let mut greedy = connect(&place);
    greedy.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
    // More than the server takes: it stops to receive, and so this client has to stop.
    let reads = request(command::READ, 1, 32 << 20).repeat(10);
    greedy.write_all(&reads).unwrap();
    let flushes = request(command::FLUSH, 2, 0).repeat(1000);
    let full = loop {
        if let Err(error) = greedy.write_all(&flushes) {
            break error;
        }
    };
    assert_eq!(full.kind(), ErrorKind::WouldBlock);
    let mut client = connect(&place);
    for cookie in 0..100 {
        client.write_all(&request(command::READ, cookie, 4096)).unwrap();
        assert_eq!(receive(&mut client, 4096), (0, cookie));
    }
    // It gets its replies when it wants them.
    for _ in 0..10 {
        assert_eq!(receive(&mut greedy, 32 << 20), (0, 1));
    }
    drop(client);
    drop(server);
}

#[test]
fn a_client_that_takes_too_long_is_left() {
    let place = Place::new();
    let short = Duration::from_millis(200);
    let options = ServerOptions { negotiation_timeout: short, send_timeout: short, ..ServerOptions::default() };
    let (server, _disk) = start(&place, options);
    let mut silent = UnixStream::connect(&place.0).unwrap();
    silent.read_exact(&mut [0; 18]).unwrap();
    let mut greedy = connect(&place);
    greedy.write_all(&request(command::READ, 1, 32 << 20)).unwrap();
    let mut idle = connect(&place);
    assert!(is_closed(&mut silent));
    wait_until(|| server.connections() == 1);
    // Who has nothing to take may wait as long as it likes.
    idle.write_all(&request(command::READ, 2, 512)).unwrap();
    assert_eq!(receive(&mut idle, 512), (0, 2));
}

#[test]
fn a_flood_of_requests_is_answered_one_by_one() {
    let place = Place::new();
    let (_server, _disk) = start(&place, ServerOptions::default());
    let mut client = connect(&place);
    let mut sender = client.try_clone().unwrap();
    let count = 20 * REQUESTS_IN_FLIGHT_MAX as u64;
    let thread = std::thread::spawn(move || {
        for cookie in 0..count {
            let len = 512 * (1 + cookie % 70);
            sender.write_all(&request(command::READ, cookie, len)).unwrap();
        }
        sender.write_all(&request(command::DISC, 0, 0)).unwrap();
    });
    for cookie in 0..count {
        let len = 512 * (1 + cookie as usize % 70);
        assert_eq!(receive(&mut client, len), (0, cookie));
    }
    assert!(is_closed(&mut client));
    thread.join().unwrap();
}

#[test]
fn one_client_too_many_is_closed_and_may_come_again() {
    let place = Place::new();
    let options = ServerOptions { connections_max: 2, ..ServerOptions::default() };
    let (server, _disk) = start(&place, options);
    let (_first, second) = (connect(&place), connect(&place));
    assert!(is_closed(&mut UnixStream::connect(&place.0).unwrap()));
    assert_eq!(server.connections(), 2);
    drop(second);
    wait_until(|| server.connections() == 1);
    connect(&place);
}

#[test]
fn a_socket_that_was_left_behind_is_replaced_and_one_in_use_is_not() {
    let place = Place::new();
    drop(std::os::unix::net::UnixListener::bind(&place.0).unwrap());
    assert!(place.0.exists());
    let (server, _disk) = start(&place, ServerOptions::default());
    assert_eq!(place.0.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    assert!(matches!(Listener::unix(&place.0, 0o600), Err(ListenError::InUse { .. })));
    connect(&place);
    drop(server);
    assert!(!place.0.exists());
    std::fs::write(&place.0, b"somebody's file").unwrap();
    assert!(matches!(Listener::unix(&place.0, 0o600), Err(ListenError::NoSocket { .. })));
    assert_eq!(std::fs::read(&place.0).unwrap(), b"somebody's file");
}

#[test]
fn an_export_that_is_removed_serves_its_old_clients_only() {
    let place = Place::new();
    let disk = Arc::new(MemoryDisk::new(CAPACITY));
    let exports = Arc::new(Exports::new());
    exports.add(Export::new("disk", disk.clone())).unwrap();
    assert!(exports.add(Export::new("disk", disk)).is_err(), "the name is taken");
    let listener = Listener::unix(&place.0, 0o600).unwrap();
    let _server = Server::start(vec![listener], exports.clone(), ServerOptions::default()).unwrap();
    let mut client = connect(&place);
    assert!(exports.remove("disk") && !exports.remove("disk"));
    client.write_all(&request(command::READ, 1, 512)).unwrap();
    assert_eq!(receive(&mut client, 512), (0, 1));
    let mut late = UnixStream::connect(&place.0).unwrap();
    late.read_exact(&mut [0; 18]).unwrap();
    late.write_all(&3u32.to_be_bytes()).unwrap();
    late.write_all(&option_head(option::EXPORT_NAME)).unwrap();
    assert!(is_closed(&mut late));
}

#[test]
fn what_comes_with_the_wish_for_tls_is_not_taken_for_something_said_under_it() {
    let folder = Place::new();
    std::fs::create_dir(&folder.0).unwrap();
    let openssl = std::process::Command::new("openssl")
        .args("req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=server".split(' '))
        .args(["-keyout", "key.pem", "-out", "cert.pem"])
        .current_dir(&folder.0)
        .output()
        .expect("this test needs openssl: `cargo xtask setup` installs it");
    assert!(openssl.status.success());
    let identity =
        polder_trust::tls::IdentityFiles { certificate: folder.0.join("cert.pem"), key: folder.0.join("key.pem") };
    let config = polder_trust::tls::server_config(&identity, &polder_trust::tls::ClientCertificates::NotAsked).unwrap();
    std::fs::remove_dir_all(&folder.0).unwrap();
    let place = Place::new();
    let (_server, _disk) = start(&place, ServerOptions { tls: Tls::Required(config), ..ServerOptions::default() });
    let mut client = UnixStream::connect(&place.0).unwrap();
    client.read_exact(&mut [0; 18]).unwrap();
    let said = [&3u32.to_be_bytes()[..], &option_head(option::STARTTLS), &option_head(option::LIST)].concat();
    client.write_all(&said).unwrap();
    let mut heard = Vec::new();
    let _ = client.read_to_end(&mut heard);
    assert_eq!(heard.len(), 20, "TLS is granted, and then there is silence");
}
