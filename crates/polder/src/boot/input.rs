//! Keys from standard input to the guest's serial port.

use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use polder_vmm::Control;

const ESCAPE: u8 = 0x01;
/// How soon typing is tried again when the guest has not read what was typed before.
const RETRY: Duration = Duration::from_millis(5);

/// Whether Ctrl-A means something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keys {
    /// Ctrl-A x leaves, Ctrl-A Ctrl-A types Ctrl-A.
    Terminal,
    /// Every byte goes to the guest.
    Plain,
}

/// Says whether somebody left with Ctrl-A x.
pub struct Left(Arc<AtomicBool>);

impl Left {
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

/// Finds Ctrl-A and what follows it, over the borders of reads.
pub struct Escapes {
    keys: Keys,
    pending: bool,
}

/// What a read means.
#[derive(Debug, PartialEq, Eq)]
pub enum Typed {
    Bytes(Vec<u8>),
    /// These bytes, and then the end.
    Leave(Vec<u8>),
}

impl Escapes {
    /// Nothing typed so far.
    pub fn new(keys: Keys) -> Self {
        Escapes { keys, pending: false }
    }

    /// Takes what was read; gives what is to be typed.
    pub fn filter(&mut self, bytes: &[u8]) -> Typed {
        if self.keys == Keys::Plain {
            return Typed::Bytes(bytes.to_vec());
        }
        let mut typed = Vec::with_capacity(bytes.len());
        for &byte in bytes {
            match (std::mem::take(&mut self.pending), byte) {
                (false, ESCAPE) => self.pending = true,
                (true, b'x' | b'X') => return Typed::Leave(typed),
                (true, ESCAPE) | (false, _) => typed.push(byte),
                (true, _) => typed.extend([ESCAPE, byte]),
            }
        }
        Typed::Bytes(typed)
    }
}

/// Starts the thread that reads standard input to its end. It is left alone at the end of the process, for nothing ends a read.
pub fn start(control: Control, keys: Keys) -> Result<Left> {
    let left = Arc::new(AtomicBool::new(false));
    let for_thread = left.clone();
    let body = move || {
        let mut escapes = Escapes::new(keys);
        let mut buffer = [0; 4096];
        loop {
            let read = match std::io::stdin().lock().read(&mut buffer) {
                Ok(0) | Err(_) => return,
                Ok(count) => &buffer[..count],
            };
            match escapes.filter(read) {
                Typed::Bytes(bytes) => type_all(&control, &bytes),
                Typed::Leave(bytes) => {
                    control.type_in(&bytes);
                    for_thread.store(true, Ordering::SeqCst);
                    control.stop();
                    return;
                }
            }
        }
    };
    std::thread::Builder::new().name("console input".to_owned()).spawn(body).context("the host gave no thread")?;
    Ok(Left(left))
}

/// Types everything, as fast as the guest reads; the port holds only so much.
fn type_all(control: &Control, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        let taken = control.type_in(bytes);
        bytes = &bytes[taken..];
        if taken == 0 {
            std::thread::sleep(RETRY);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ctrl_a_x_leaves_even_when_it_comes_in_two_reads() {
        let mut escapes = Escapes { keys: Keys::Terminal, pending: false };
        assert_eq!(escapes.filter(b"ls\x01"), Typed::Bytes(b"ls".to_vec()));
        assert_eq!(escapes.filter(b"xmore"), Typed::Leave(Vec::new()));
    }

    #[test]
    fn other_keys_after_ctrl_a_are_typed() {
        let mut escapes = Escapes { keys: Keys::Terminal, pending: false };
        assert_eq!(escapes.filter(b"\x01\x01a\x01b"), Typed::Bytes(b"\x01a\x01b".to_vec()));
    }

    #[test]
    fn a_pipe_has_no_escapes() {
        let mut escapes = Escapes { keys: Keys::Plain, pending: false };
        assert_eq!(escapes.filter(b"\x01x"), Typed::Bytes(b"\x01x".to_vec()));
    }
}
