//! `polder console`: attaches the terminal to an instance's serial console.

use std::io::{ErrorKind, IsTerminal, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use clap::Args;

use super::folder::InstanceFolder;
use super::record::InstanceTable;
use crate::boot::{Escapes, Keys, RawTerminal, Typed};
use crate::state_folder::StateFolder;

#[derive(Args)]
pub struct ConsoleArguments {
    /// Name of the instance
    name: String,
}

/// Why the console was left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Detached {
    /// The machine ended.
    MachineEnded,
    /// Somebody typed Ctrl-A x.
    Left,
}

/// Attaches to the console of an active instance until Ctrl-A x or the machine's end.
pub fn console(arguments: &ConsoleArguments) -> Result<ExitCode> {
    let state = StateFolder::open()?;
    let record = InstanceTable::open(&state)?.get_active(&arguments.name)?;
    let folder = InstanceFolder::open(&state, &record.name)?;
    attach(&folder)?;
    Ok(ExitCode::SUCCESS)
}

/// Connects standard input and output with the console.
pub fn attach(folder: &InstanceFolder) -> Result<Detached> {
    let mut stream = UnixStream::connect(folder.console_socket()).context("the console cannot be reached")?;
    let on_terminal = std::io::stdin().is_terminal();
    let terminal = on_terminal.then(RawTerminal::enter).transpose().context("the terminal cannot be set up")?;
    let keys = if on_terminal { Keys::Terminal } else { Keys::Plain };
    let left = Arc::new(AtomicBool::new(false));
    let (typing, for_thread) = (stream.try_clone().context("the console cannot be shared")?, left.clone());
    // The thread is left alone at the end: nothing ends a read of standard input.
    std::thread::Builder::new()
        .name("console input".to_owned())
        .spawn(move || type_at(typing, keys, &for_thread))
        .context("the host gave no thread")?;

    let mut output = std::io::stdout().lock();
    let mut bytes = [0; 16 * 1024];
    loop {
        match stream.read(&mut bytes) {
            Ok(0) => break,
            Ok(len) => {
                output
                    .write_all(&bytes[..len])
                    .and_then(|()| output.flush())
                    .context("cannot write the console's output")?;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    drop(terminal);
    Ok(if left.load(Ordering::SeqCst) { Detached::Left } else { Detached::MachineEnded })
}

/// Types what standard input has, to its end or to Ctrl-A x.
fn type_at(mut stream: UnixStream, keys: Keys, left: &AtomicBool) {
    let mut escapes = Escapes::new(keys);
    let mut bytes = [0; 4096];
    loop {
        let read = match std::io::stdin().lock().read(&mut bytes) {
            Ok(0) | Err(_) => break,
            Ok(len) => &bytes[..len],
        };
        match escapes.filter(read) {
            Typed::Bytes(typed) if stream.write_all(&typed).is_ok() => {}
            Typed::Bytes(_) => return,
            Typed::Leave(typed) => {
                let _ = stream.write_all(&typed);
                left.store(true, Ordering::SeqCst);
                let _ = stream.shutdown(Shutdown::Both);
                return;
            }
        }
    }
    // No more input; the output goes on.
    let _ = stream.shutdown(Shutdown::Write);
}
