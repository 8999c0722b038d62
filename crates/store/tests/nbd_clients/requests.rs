//! Single requests, right and wrong, by libnbd's Python.

use crate::harness::{TestServer, run, wait_until};
use polder_store::disk::DiskError;
use polder_store::disk::memory::OperationKind;

const CAPACITY: u64 = 80 << 20;

/// Python that expects an error number from a call.
const EXPECT: &str = r#"
import errno

def expect(number, call, *arguments, **named):
    try:
        call(*arguments, **named)
    except nbd.Error as error:
        assert error.errnum == number, (error.errnum, number, error.string)
    else:
        assert False, "the call has succeeded"
"#;

/// Python for a client that sends what libnbd would not.
const RAW: &str = r#"
import socket, struct

class Raw:
    def __init__(self, path):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(path)
        self.socket.recv(18, socket.MSG_WAITALL)
        self.socket.sendall(struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", 1, 4) + b"disk")
        self.socket.recv(10, socket.MSG_WAITALL)

    def send(self, command, offset, length, payload):
        self.socket.sendall(struct.pack(">IHHQQI", 0x25609513, 0, command, 1, offset, length) + payload)

    def ask(self, *request):
        self.send(*request)
        magic, error, cookie = struct.unpack(">IIQ", self.socket.recv(16, socket.MSG_WAITALL))
        assert (magic, cookie) == (0x67446698, 1)
        return error
"#;

#[test]
fn odd_lengths_and_offsets_are_written_and_read() {
    let server = TestServer::new(CAPACITY);
    server.nbdsh(
        "disk",
        r#"
import random
random.seed(7)
size = 200000
expected = bytearray(size)
for _ in range(400):
    offset = random.randrange(size)
    length = random.randrange(1, min(9000, size - offset + 1))
    kind = random.randrange(4)
    if kind == 0:
        h.zero(length, offset)
        expected[offset:offset + length] = bytes(length)
    elif kind == 1:
        assert h.pread(length, offset) == expected[offset:offset + length]
    else:
        data = random.randbytes(length)
        h.pwrite(data, offset, flags=nbd.CMD_FLAG_FUA if kind == 2 else 0)
        expected[offset:offset + length] = data
assert h.pread(size, 0) == expected
"#,
    );
}

#[test]
fn flags_that_a_command_does_not_have_are_invalid() {
    let server = TestServer::new(CAPACITY);
    let script = r#"
h.set_strict_mode(0)
expect(errno.EINVAL, h.pread, 512, 0, flags=nbd.CMD_FLAG_REQ_ONE)
expect(errno.EINVAL, h.pwrite, b'1' * 512, 0, flags=nbd.CMD_FLAG_DF)
expect(errno.EINVAL, h.flush, flags=nbd.CMD_FLAG_NO_HOLE)
expect(errno.EINVAL, h.trim, 512, 0, flags=nbd.CMD_FLAG_FAST_ZERO)
h.zero(512, 0, flags=nbd.CMD_FLAG_FAST_ZERO | nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
h.trim(512, 0, flags=nbd.CMD_FLAG_FUA)
h.cache(1 << 20, 0)
size = h.get_size()
expect(errno.EINVAL, h.pread, 512, size)
expect(errno.ENOSPC, h.pwrite, b'1' * 512, size - 511)
expect(errno.ENOSPC, h.zero, 512, size - 511)
expect(errno.EINVAL, h.trim, 512, size)
expect(errno.EINVAL, h.cache, 512, size)
expect(errno.EINVAL, h.pread, 512, (1 << 63) - 512)
assert h.pread(4, 0) == bytes(4)
"#;
    server.nbdsh("disk", &format!("{EXPECT}{script}"));
    let script = r#"
h.set_strict_mode(0)
expect(errno.EPERM, h.pwrite, b'1' * 512, 0)
expect(errno.EPERM, h.zero, 512, 0)
expect(errno.EPERM, h.trim, 512, 0)
assert h.pread(4, 0) == bytes(4)
"#;
    server.nbdsh("read-only", &format!("{EXPECT}{script}"));
}

#[test]
fn requests_over_64_mib_are_refused_and_the_connection_goes_on() {
    let server = TestServer::new(CAPACITY);
    let script = format!(
        r#"
most = 64 << 20
data = bytes(range(256)) * (most // 256)
h.pwrite(data, 512)
assert h.pread(most, 512) == data
h.pwrite(data, 77)
assert h.pread(most, 77) == data
h.zero(h.get_size(), 0)
assert h.pread(most, 512) == bytes(most)
h.trim(h.get_size(), 0)
# libnbd sends nothing longer itself.
{RAW}
c = Raw("{}")
assert c.ask(0, 0, most + 1, b'') == errno.EINVAL
assert c.ask(1, 0, most + 1, bytes(most + 1)) == errno.EINVAL
assert c.ask(1, 0, 512, bytes(512)) == 0
"#,
        server.folder.path("socket").display()
    );
    server.nbdsh("disk", &format!("{EXPECT}{script}"));
}

#[test]
fn a_read_that_must_not_be_fragmented_comes_in_one_chunk() {
    let server = TestServer::new(CAPACITY);
    server.nbdsh(
        "disk",
        r#"
h.pwrite(b'1' * 65536, 65536)

def chunks(flags):
    found = []
    def chunk(data, offset, status, error):
        found.append((offset, len(data), status))
    assert h.pread_structured(262144, 0, chunk, flags) == bytes(65536) + b'1' * 65536 + bytes(131072)
    return found

assert h.can_df()
assert chunks(nbd.CMD_FLAG_DF) == [(0, 262144, nbd.READ_DATA)]
assert sorted(chunks(0)) == [(0, 65536, nbd.READ_HOLE), (65536, 65536, nbd.READ_DATA), (131072, 131072, nbd.READ_HOLE)]
"#,
    );
}

#[test]
fn contexts_are_chosen_and_asked() {
    let server = TestServer::new(CAPACITY);
    server.disk.snapshot("one");
    run(
        "nbdsh",
        &[
            "-c",
            &format!(
                r#"
h.set_opt_mode(True)
h.add_meta_context("base:allocation")
h.add_meta_context("polder:changed:one")
h.add_meta_context("polder:changed:missing")
h.connect_uri("{}")
contexts = []
h.opt_list_meta_context(contexts.append)
assert contexts == ["base:allocation", "polder:changed:one"], contexts
exports = []
h.opt_list(lambda name, description: exports.append(name))
assert exports == ["disk", "read-only"], exports
h.opt_info()
assert h.get_size() == {CAPACITY}
h.opt_go()
assert h.can_meta_context("base:allocation")
assert h.can_meta_context("polder:changed:one")
assert not h.can_meta_context("polder:changed:missing")
h.pwrite(b'1' * 16384, 16384)
answers = dict()
def extents(context, offset, entries, error):
    answers[context] = entries
h.block_status(65536, 0, extents)
assert answers["base:allocation"] == [16384, 3, 16384, 0, 32768, 3], answers
assert answers["polder:changed:one"] == [16384, 0, 16384, 1, 32768, 0], answers
h.block_status(65536, 100, extents, flags=nbd.CMD_FLAG_REQ_ONE)
assert answers["base:allocation"] == [16284, 3], answers
assert answers["polder:changed:one"] == [16284, 0], answers
h.block_status(65536, h.get_size() - 65536, extents)
assert answers["base:allocation"] == [65536, 3], answers
"#,
                server.uri("disk")
            ),
        ],
    );
}

#[test]
fn an_old_client_is_served_with_simple_replies() {
    let server = TestServer::new(CAPACITY);
    for flags in ["0", "nbd.HANDSHAKE_FLAG_FIXED_NEWSTYLE", "nbd.HANDSHAKE_FLAG_NO_ZEROES"] {
        run(
            "nbdsh",
            &[
                "-c",
                &format!(
                    r#"
h.set_handshake_flags({flags})
h.set_request_structured_replies(False)
h.set_export_name("disk")
h.connect_uri("{}")
assert not h.get_structured_replies_negotiated()
h.pwrite(b'old' * 1000, 77)
assert h.pread(3000, 77) == b'old' * 1000
h.flush()
h.shutdown()
"#,
                    server.uri("disk")
                ),
            ],
        );
    }
}

#[test]
fn a_client_that_goes_in_the_middle_of_a_request_leaves_the_others_alone() {
    let server = TestServer::new(CAPACITY);
    server.nbdsh(
        "disk",
        &format!(
            r#"
{RAW}
def half(command, length, payload):
    client = Raw("{}")
    client.send(command, 0, length, payload)
    client.socket.close()
for _ in range(20):
    half(1, 1 << 20, b'x' * 1000)
    half(1, 32 << 20, b'')
    half(0, 32 << 20, b'')
    half(0, 512, b'\x25\x60')
    half(9, 77, b'garbage' * 99)
h.pwrite(b'1' * 512, 1 << 20)
assert h.pread(512, 1 << 20) == b'1' * 512
assert h.pread(512, 0) == bytes(512)
"#,
            server.folder.path("socket").display()
        ),
    );
    // Only the client that behaves may still be connected, and it has gone.
    wait_until(|| server.server.connections() == 0);
}

#[test]
fn many_requests_at_once_are_answered_in_any_order() {
    let server = TestServer::new(CAPACITY);
    server.disk.hold();
    let disk = server.disk.clone();
    // The disk begins to answer, the last request first, when a good number is in flight.
    let releaser = std::thread::spawn(move || {
        wait_until(|| disk.held_operations() >= 64);
        disk.release();
    });
    server.nbdsh(
        "disk",
        r#"
buffers = []
for index in range(500):
    h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray([index % 256]) * 4096), index * 4096)
while h.aio_in_flight() > 0:
    h.poll(-1)
for index in range(500):
    buffer = nbd.Buffer(4096)
    buffers.append(buffer)
    h.aio_pread(buffer, index * 4096)
while h.aio_in_flight() > 0:
    h.poll(-1)
for index, buffer in enumerate(buffers):
    assert buffer.to_bytearray() == bytearray([index % 256]) * 4096
"#,
    );
    releaser.join().unwrap();
}

#[test]
fn errors_of_the_disk_have_their_numbers() {
    let server = TestServer::new(CAPACITY);
    server.disk.fail_when(|kind, offset, _| match (kind, offset) {
        (OperationKind::Read, 0) => Some(DiskError::Damaged { what: "a test".into() }),
        (OperationKind::Write, 0) => Some(DiskError::NoSpace),
        (OperationKind::Flush, _) => Some(DiskError::Fenced),
        _ => None,
    });
    let script = r#"
expect(errno.EIO, h.pread, 512, 0)
expect(errno.ENOSPC, h.pwrite, b'1' * 512, 0)
expect(errno.ESHUTDOWN, h.flush)
h.pwrite(b'1' * 512, 512)
assert h.pread(512, 512) == b'1' * 512
"#;
    server.nbdsh("disk", &format!("{EXPECT}{script}"));
}
