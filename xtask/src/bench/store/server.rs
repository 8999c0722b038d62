//! Who serves a disk to NBD clients: polder, qemu-nbd or nbdkit.

use super::session::Session;
use crate::command::{capture, run};
use anyhow::{Context, Result, bail};
use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long a server may take until it can be reached, and to end: a log may have to be moved.
const PATIENCE: Duration = Duration::from_secs(300);

/// What is served, and by whom.
#[derive(Clone)]
pub enum Target {
    /// A volume.
    Polder(String),
    QemuRaw(PathBuf),
    QemuQcow2(PathBuf),
    Nbdkit(PathBuf),
}

/// A server that runs.
pub struct Server {
    child: Child,
    pub uri: String,
}

impl Server {
    pub fn start(session: &Session, target: &Target) -> Result<Self> {
        let (name, export) = match target {
            Target::Polder(volume) => (format!("polder-{volume}"), volume.as_str()),
            Target::QemuRaw(_) => ("qemu-raw".to_owned(), ""),
            Target::QemuQcow2(_) => ("qemu-qcow2".to_owned(), ""),
            Target::Nbdkit(_) => ("nbdkit".to_owned(), ""),
        };
        let socket = session.place.socket(&name);
        // A server that was killed leaves its socket.
        let _ = std::fs::remove_file(&socket);
        let mut command = match target {
            Target::Polder(volume) => {
                let mut command = session.polder();
                command.args(["volume", "serve", volume, "--socket"]).arg(&socket);
                command
            }
            Target::QemuRaw(file) => qemu_nbd("raw", file, &socket),
            Target::QemuQcow2(file) => qemu_nbd("qcow2", file, &socket),
            Target::Nbdkit(file) => {
                let mut command = Command::new("nbdkit");
                command.args(["--foreground", "--unix"]).arg(&socket).arg("file").arg(file);
                command
            }
        };
        // Whoever asks whether a server is there and goes without a word makes it complain: that is shown only if it ends.
        let complaints = session.place.socket(&format!("{name}.said"));
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(File::create(&complaints)?).spawn();
        let uri = format!("nbd+unix:///{export}?socket={}", socket.display());
        let mut server = Server { child: child.with_context(|| format!("cannot start {name}"))?, uri };
        let begin = Instant::now();
        while UnixStream::connect(&socket).is_err() {
            if let Some(status) = server.child.try_wait()? {
                bail!("{name} ended with {status}: {}", std::fs::read_to_string(&complaints)?.trim());
            }
            if begin.elapsed() > PATIENCE {
                bail!("{name} cannot be reached");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(server)
    }

    /// Reads the whole disk once, so that the host and the server hold what they can of it.
    pub fn warm(&self) -> Result<()> {
        capture(Command::new("nbdcopy").args([&self.uri, "null:"])).map(drop)
    }

    /// Ends the server as its user would, and waits until it has put everything in order. Gives the seconds that took.
    pub fn stop(mut self) -> Result<f64> {
        let begin = Instant::now();
        run(Command::new("sh").args(["-c", "kill -TERM \"$0\"", &self.child.id().to_string()]))?;
        while self.child.try_wait()?.is_none() {
            if begin.elapsed() > PATIENCE {
                bail!("the server at {} does not end", self.uri);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(begin.elapsed().as_secs_f64())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may have ended by itself; either way it is waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// With a volatile write cache, as a volume has one.
fn qemu_nbd(format: &str, file: &std::path::Path, socket: &std::path::Path) -> Command {
    let mut command = Command::new("qemu-nbd");
    command.args(["--persistent", "--shared=8", "--cache=writeback", &format!("--format={format}")]);
    command.arg("--socket").arg(socket).arg(file);
    command
}
