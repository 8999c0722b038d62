//! A server in a folder of its own, and clients as child processes.

use polder_store::disk::Disk;
use polder_store::disk::memory::MemoryDisk;
use polder_store::nbd::{Export, Exports, Listener, Server, ServerOptions};
use std::io::Read;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a client may take before the test fails.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(60);

/// A folder that is removed at the end.
pub struct Folder(PathBuf);

impl Folder {
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("polder-nbd-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).expect("the folder of temporary files is writable");
        Self(path)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A server of two exports: `disk`, which is the default one, and `read-only`, which is the same disk.
pub struct TestServer<D = MemoryDisk> {
    // First: clients have gone before their disk does.
    pub server: Server,
    pub disk: Arc<D>,
    pub address: SocketAddr,
    pub folder: Folder,
}

impl TestServer {
    /// Serves a disk in memory.
    pub fn new(capacity_bytes: u64) -> Self {
        Self::with_options(Folder::new(), capacity_bytes, ServerOptions::default())
    }

    pub fn with_options(folder: Folder, capacity_bytes: u64, options: ServerOptions) -> Self {
        Self::with_disk(folder, Arc::new(MemoryDisk::new(capacity_bytes)), options)
    }
}

impl<D: Disk> TestServer<D> {
    pub fn with_disk(folder: Folder, disk: Arc<D>, options: ServerOptions) -> Self {
        let exports = Arc::new(Exports::new());
        exports.add(Export::new("disk", disk.clone()).with_description("A disk for tests.")).unwrap();
        exports.add(Export::new("read-only", disk.clone()).read_only()).unwrap();
        let unix = Listener::unix(&folder.path("socket"), 0o600).unwrap();
        let tcp = Listener::tcp("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = tcp.address().expect("TCP has addresses");
        let server = Server::start(vec![unix, tcp], exports, options).unwrap();
        Self { server, disk, address, folder }
    }

    /// An export, for libnbd and QEMU.
    pub fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.folder.path("socket").display())
    }

    /// The same by TCP.
    pub fn tcp_uri(&self, export: &str) -> String {
        format!("nbd://{}/{export}", self.address)
    }

    /// Runs Python with libnbd: `h` is connected to the export.
    pub fn nbdsh(&self, export: &str, script: &str) -> String {
        run("nbdsh", &["-u", &self.uri(export), "-c", script])
    }
}

/// Runs a client that is to succeed; returns what it printed.
pub fn run(program: &str, arguments: &[&str]) -> String {
    let output = output(program, arguments);
    let (text, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program} {arguments:?}: {}\n{text}\n{errors}", output.status);
    text.into_owned()
}

/// Runs a client that is to fail; returns what it complained about.
pub fn fail(program: &str, arguments: &[&str]) -> String {
    let output = output(program, arguments);
    let (text, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(!output.status.success(), "{program} {arguments:?} has succeeded:\n{text}\n{errors}");
    errors.into_owned()
}

fn output(program: &str, arguments: &[&str]) -> Output {
    let child = Command::new(program)
        .args(arguments)
        // Debian's programs: its Python knows libnbd, and nbd-client lies in /usr/sbin.
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .current_dir(std::env::temp_dir())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = match child {
        Ok(child) => child,
        Err(error) => panic!("{program} cannot run ({error}): `cargo xtask setup` installs it"),
    };
    // Both pipes are read beside, so that no client waits for us.
    let (stdout, stderr) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
    let (stdout, stderr) = (read_beside(stdout), read_beside(stderr));
    let deadline = Instant::now() + CLIENT_TIMEOUT;
    let status = loop {
        match child.try_wait().expect("a child can be waited for") {
            Some(status) => break status,
            None if Instant::now() > deadline => {
                child.kill().expect("a child can be killed");
                panic!("{program} {arguments:?} takes more than {CLIENT_TIMEOUT:?}");
            }
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    };
    Output { status, stdout: stdout.join().unwrap(), stderr: stderr.join().unwrap() }
}

fn read_beside(mut pipe: impl Read + Send + 'static) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        pipe.read_to_end(&mut bytes).expect("a pipe can be read");
        bytes
    })
}

/// Waits for something that another thread does.
pub fn wait_until(happened: impl Fn() -> bool) {
    let deadline = Instant::now() + CLIENT_TIMEOUT;
    while !happened() {
        assert!(Instant::now() < deadline, "it has not happened in time");
        std::thread::yield_now();
    }
}

/// A path as an argument.
pub fn text(path: &Path) -> &str {
    path.to_str().expect("paths of tests are text")
}

/// Bytes that do not repeat, with a part of zeros in every other 64 KiB.
pub fn image(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut bytes = vec![0; len];
    for block in bytes.chunks_mut(64 << 10).step_by(2) {
        for word in block.chunks_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes()[..word.len()]);
        }
    }
    bytes
}
