//! The terminal in raw mode: every key goes to the guest.

use std::io;
use std::os::fd::OwnedFd;

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

/// While this lives, standard input is in raw mode; dropping it restores what was before.
pub struct RawTerminal {
    terminal: OwnedFd,
    before: Termios,
}

impl RawTerminal {
    /// Puts standard input, which is a terminal, in raw mode.
    pub fn enter() -> io::Result<Self> {
        let terminal = rustix::io::dup(rustix::stdio::stdin())?;
        let before = tcgetattr(&terminal)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&terminal, OptionalActions::Drain, &raw)?;
        Ok(RawTerminal { terminal, before })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // A terminal that is gone needs no restoring.
        let _ = tcsetattr(&self.terminal, OptionalActions::Now, &self.before);
    }
}
