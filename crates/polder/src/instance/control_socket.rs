//! Orders to a machine's process, one word a connection.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use polder_vmm::Control;

/// How long either side waits for the other.
const PATIENCE: Duration = Duration::from_secs(3);
const LINE_LEN_MAX: u64 = 64;

/// What can be asked of a machine's process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// Press the power button.
    PowerButton,
    /// Pull the plug.
    Stop,
}

impl Order {
    fn word(self) -> &'static str {
        match self {
            Order::PowerButton => "power-button",
            Order::Stop => "stop",
        }
    }
}

/// Serves orders until the process ends.
pub fn serve(listener: UnixListener, control: Control) -> Result<()> {
    let body = move || {
        for stream in listener.incoming() {
            match stream {
                // A client that says nothing is given up after a while; the next one waits so long.
                Ok(stream) => drop(answer(stream, &control)),
                Err(error) if error.kind() == ErrorKind::ConnectionAborted => {}
                // Out of descriptors: others may be closed meanwhile.
                Err(_) => std::thread::sleep(Duration::from_millis(100)),
            }
        }
    };
    std::thread::Builder::new().name("control".to_owned()).spawn(body).context("the host gave no thread")?;
    Ok(())
}

fn answer(mut stream: UnixStream, control: &Control) -> std::io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut line = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new((&stream).take(LINE_LEN_MAX)), &mut line)?;
    let order = [Order::PowerButton, Order::Stop].into_iter().find(|order| order.word() == line.trim_end());
    match order {
        Some(Order::PowerButton) => control.press_power_button(),
        Some(Order::Stop) => control.stop(),
        None => return stream.write_all(b"unknown\n"),
    }
    stream.write_all(b"ok\n")
}

/// Gives an order to the process behind a socket.
pub fn send(socket: &Path, order: Order) -> Result<()> {
    let mut stream = UnixStream::connect(socket).context("the machine's process cannot be reached")?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(format!("{}\n", order.word()).as_bytes()).context("the machine's process takes no orders")?;
    let mut answer = String::new();
    stream.take(LINE_LEN_MAX).read_to_string(&mut answer).context("the machine's process does not answer")?;
    if answer != "ok\n" {
        bail!("the machine's process does not know the order {}", order.word());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_are_answered_and_nonsense_is_refused() {
        let path = std::env::temp_dir().join(format!("polder-control-{}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        serve(UnixListener::bind(&path).unwrap(), Control::new()).unwrap();
        send(&path, Order::PowerButton).unwrap();
        for nonsense in [&b"format-disk\n"[..], &[0xff; 200], b"\n"] {
            let mut stream = UnixStream::connect(&path).unwrap();
            stream.write_all(nonsense).unwrap();
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            let mut answer = Vec::new();
            // Bytes that are no text end the connection without a word.
            let _ = stream.read_to_end(&mut answer);
            assert!(answer.is_empty() || answer == b"unknown\n");
        }
        send(&path, Order::Stop).unwrap();
        std::fs::remove_file(&path).unwrap();
    }
}
