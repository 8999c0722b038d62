//! Orders to a machine's process, one line a connection.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use polder_vmm::{Control, GuestShare};

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
    /// Say how much of its memory the guest has.
    Balloon,
    /// Ask the guest to have so many bytes of its memory.
    SetBalloon { share_bytes: u64 },
}

impl Order {
    fn line(self) -> String {
        match self {
            Order::PowerButton => "power-button".to_owned(),
            Order::Stop => "stop".to_owned(),
            Order::Balloon => "balloon".to_owned(),
            Order::SetBalloon { share_bytes } => format!("balloon {share_bytes}"),
        }
    }

    fn parse(line: &str) -> Option<Self> {
        match line {
            "power-button" => Some(Order::PowerButton),
            "stop" => Some(Order::Stop),
            "balloon" => Some(Order::Balloon),
            _ => {
                let share_bytes = line.strip_prefix("balloon ")?.parse().ok()?;
                Some(Order::SetBalloon { share_bytes })
            }
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
    match Order::parse(line.trim_end()) {
        Some(Order::PowerButton) => control.press_power_button(),
        Some(Order::Stop) => control.stop(),
        Some(Order::Balloon) => return stream.write_all(share_line(control).as_bytes()),
        Some(Order::SetBalloon { share_bytes }) => {
            control.set_guest_share(share_bytes);
            return stream.write_all(share_line(control).as_bytes());
        }
        None => return stream.write_all(b"unknown\n"),
    }
    stream.write_all(b"ok\n")
}

/// `ok`, then memory, target and actual in bytes, and 1 if a driver hears; `none` while there is no machine.
fn share_line(control: &Control) -> String {
    control.guest_share().map_or("none\n".to_owned(), |share| {
        let GuestShare { ram_bytes, target_bytes, actual_bytes, is_heard } = share;
        format!("ok {ram_bytes} {target_bytes} {actual_bytes} {}\n", u8::from(is_heard))
    })
}

fn parse_share(answer: &str) -> Option<GuestShare> {
    let mut numbers = answer.strip_prefix("ok ")?.split_ascii_whitespace().map(|word| word.parse::<u64>().ok());
    let mut next = || numbers.next().flatten();
    Some(GuestShare { ram_bytes: next()?, target_bytes: next()?, actual_bytes: next()?, is_heard: next()? != 0 })
}

/// Gives an order to the process behind a socket.
pub fn send(socket: &Path, order: Order) -> Result<()> {
    match ask(socket, order)?.as_str() {
        "ok\n" => Ok(()),
        _ => bail!("the machine's process does not know the order {}", order.line()),
    }
}

/// Asks the process behind a socket how much of its memory the guest has, and with `share_bytes` sets that first.
pub fn guest_share(socket: &Path, share_bytes: Option<u64>) -> Result<GuestShare> {
    let order = share_bytes.map_or(Order::Balloon, |share_bytes| Order::SetBalloon { share_bytes });
    let answer = ask(socket, order)?;
    if answer == "none\n" {
        bail!("the machine is not there yet, or not any more");
    }
    parse_share(&answer).context("the machine's process was started by another release, which has no balloon")
}

fn ask(socket: &Path, order: Order) -> Result<String> {
    let mut stream = UnixStream::connect(socket).context("the machine's process cannot be reached")?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(format!("{}\n", order.line()).as_bytes()).context("the machine's process takes no orders")?;
    let mut answer = String::new();
    stream.take(LINE_LEN_MAX).read_to_string(&mut answer).context("the machine's process does not answer")?;
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_guest_has_survives_the_socket() {
        let share = parse_share("ok 4096 2048 1024 1\n").unwrap();
        assert_eq!((share.ram_bytes, share.target_bytes, share.actual_bytes, share.is_heard), (4096, 2048, 1024, true));
        assert_eq!(parse_share("ok 4096 2048\n"), None);
        assert_eq!(parse_share("unknown\n"), None);
    }

    #[test]
    fn orders_are_answered_and_nonsense_is_refused() {
        let path = std::env::temp_dir().join(format!("polder-control-{}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        serve(UnixListener::bind(&path).unwrap(), Control::new()).unwrap();
        send(&path, Order::PowerButton).unwrap();
        assert!(guest_share(&path, Some(1 << 20)).unwrap_err().to_string().contains("not there"));
        for nonsense in [&b"format-disk\n"[..], &[0xff; 200], b"\n", b"balloon -1\n", b"balloon 1 2\n"] {
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
