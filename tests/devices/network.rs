//! The network card on a TAP interface of the host, from both sides.

use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use polder_tests::{Boot, Kernel, busybox, can_open, inside_namespaces};

const HOST: &str = "192.168.77.1";
const GUEST: &str = "192.168.77.2";
const PORT: u16 = 5000;
/// A guest that is not there after this will not come.
const PATIENCE: Duration = Duration::from_secs(120);
const SENT_LEN: usize = 3 << 20;

fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status().expect("iproute2 is installed");
    assert!(status.success(), "ip {arguments} ended with {status}");
}

/// Pings the guest until it answers, then sends it the bytes.
fn meet(bytes: &[u8]) -> Result<(), String> {
    let end = Instant::now() + PATIENCE;
    let ping = || {
        let mut command = Command::new(busybox());
        command.args(["ping", "-c", "1", "-W", "1", GUEST]).stdout(Stdio::null()).stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    };
    while !ping() {
        if Instant::now() >= end {
            return Err(format!("{GUEST} did not answer"));
        }
    }
    let guest: SocketAddr = format!("{GUEST}:{PORT}").parse().map_err(|error| format!("{error}"))?;
    // The guest listens before it says who it is, but may take its time to accept.
    let mut stream = loop {
        match TcpStream::connect_timeout(&guest, PATIENCE) {
            Ok(stream) => break stream,
            Err(error) if Instant::now() >= end => return Err(format!("cannot connect: {error}")),
            Err(_) => std::thread::park_timeout(Duration::from_millis(50)),
        }
    };
    stream.write_all(bytes).map_err(|error| format!("cannot send: {error}"))
}

#[test]
fn host_and_guest_reach_each_other_over_a_tap_interface() {
    let name = "network::host_and_guest_reach_each_other_over_a_tap_interface";
    if !can_open("/dev/net/tun") || !inside_namespaces(name) {
        return;
    }
    ip("tuntap add polder0 mode tap vnet_hdr");
    ip(&format!("addr add {HOST}/24 dev polder0"));
    ip("link set polder0 up");
    let bytes: Vec<u8> = (0..SENT_LEN as u64 / 8).flat_map(|number| (number * number).to_le_bytes()).collect();
    let scratch = polder_tests::Scratch::new();
    let sum = Command::new(busybox()).arg("sha256sum").arg(scratch.file("sent", &bytes)).output();
    let sum = String::from_utf8(sum.expect("busybox runs").stdout).expect("a sum is text");
    let sum = sum.split(' ').next().unwrap_or_default().to_string();
    assert_eq!(sum.len(), 64);

    let sender = std::thread::spawn(move || meet(&bytes));
    let script = format!(
        "ifconfig eth0 {GUEST} netmask 255.255.255.0 up && nc -l -p {PORT} | sha256sum && ping -c 3 {HOST} && cat /proc/net/dev"
    );
    let outcome = Boot::linux(Kernel::Cloud, &script).tap("polder0").cpus(2).timeout_s(180).run();
    assert_eq!(sender.join().expect("the sender ends"), Ok(()), "{outcome}");
    outcome.expect_status(0).expect_console(&sum).expect_console("3 packets received");
}
