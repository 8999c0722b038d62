//! Programs in the guest, through its agent: waiting until it answers, and running one with this process' streams.

use std::ffi::OsString;
use std::io::{IsTerminal, Read, Write};
use std::os::unix::ffi::OsStringExt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use indicatif::ProgressBar;
use polder_basics::agent_protocol::{AgentErrorKind, CHUNK_LEN_MAX, Command, Message, TerminalSize};
use polder_vmm::agent_client::{self, AgentError, AgentReceiver, AgentSender};

use super::folder::InstanceFolder;
use crate::boot::RawTerminal;

/// How long a guest may take from power-on until its agent answers. The software engine needs a good part of it.
pub const BOOT_TIMEOUT: Duration = Duration::from_secs(15 * 60);
/// How long one attempt waits: a guest whose driver is not there yet answers nothing.
const ATTEMPT: Duration = Duration::from_secs(20);
const RETRY: Duration = Duration::from_millis(200);
/// How often a terminal is looked at for a new size.
const RESIZE_LOOK: Duration = Duration::from_millis(300);

/// Exit status for a program that does not exist, and for one that cannot be run; what shells use.
const STATUS_NOT_FOUND: u8 = 127;
const STATUS_NOT_EXECUTABLE: u8 = 126;

/// Whether the program gets a terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TerminalWish {
    Terminal,
    Pipes,
}

/// Waits until the guest's agent answers. `has_ended` says that the machine is gone.
pub fn wait_for_agent(folder: &InstanceFolder, name: &str, mut has_ended: impl FnMut() -> bool) -> Result<()> {
    let start = Instant::now();
    let mut spinner: Option<ProgressBar> = None;
    loop {
        match agent_client::ping(&folder.vsock_socket(), ATTEMPT) {
            Ok(()) => break,
            Err(AgentError::NoAgent | AgentError::NoMachine(_) | AgentError::Closed | AgentError::Broken(_)) => {}
            Err(error) => return Err(error).context("the guest's agent cannot be used"),
        }
        if has_ended() {
            bail!("the machine of {name} ended before its agent answered");
        }
        if start.elapsed() > BOOT_TIMEOUT {
            bail!(
                "the agent in {name} did not answer within {} s (see what the guest says: `polder console {name}`)",
                BOOT_TIMEOUT.as_secs()
            );
        }
        spinner.get_or_insert_with(|| waiting(name)).tick();
        std::thread::sleep(RETRY);
    }
    if let Some(spinner) = spinner {
        spinner.finish_and_clear();
    }
    Ok(())
}

/// Shows on a terminal that something is waited for; elsewhere nothing is shown.
fn waiting(name: &str) -> ProgressBar {
    let spinner = ProgressBar::new_spinner().with_message(format!("waiting for {name} to boot"));
    spinner.enable_steady_tick(Duration::from_millis(120));
    spinner
}

/// The words of a command line, and what goes with them.
pub fn command(words: &[OsString], environment: &[OsString], directory: Option<&OsString>) -> Command {
    let bytes = |word: &OsString| word.clone().into_vec();
    Command {
        arguments: words.iter().map(bytes).collect(),
        environment: environment.iter().map(bytes).collect(),
        directory: directory.map(bytes),
        terminal: None,
    }
}

/// Runs a program in the guest on this process' input and output; the exit status as a shell would show it.
pub fn execute(folder: &InstanceFolder, mut command: Command, wish: TerminalWish) -> Result<u8> {
    let (mut sender, mut receiver) = agent_client::connect(&folder.vsock_socket(), ATTEMPT)?;
    receiver.set_timeout(None)?;
    let raw = match wish {
        TerminalWish::Terminal => {
            command.terminal = Some(terminal_size().unwrap_or(TerminalSize { rows: 24, columns: 80 }));
            if let Ok(kind) = std::env::var("TERM") {
                command.environment.insert(0, format!("TERM={kind}").into_bytes());
            }
            let on_terminal = std::io::stdin().is_terminal();
            on_terminal.then(RawTerminal::enter).transpose().context("the terminal cannot be set up")?
        }
        TerminalWish::Pipes => None,
    };
    sender.send(&Message::Exec(command))?;
    let sender = Arc::new(Mutex::new(sender));
    start_input(sender.clone())?;
    if wish == TerminalWish::Terminal {
        start_resizing(sender)?;
    }
    let result = copy_output(&mut receiver);
    drop(raw);
    result
}

fn copy_output(receiver: &mut AgentReceiver) -> Result<u8> {
    let (mut output, mut errors) = (std::io::stdout().lock(), std::io::stderr().lock());
    loop {
        match receiver.receive()? {
            Message::Stdout(bytes) => {
                output.write_all(&bytes).and_then(|()| output.flush()).context("cannot write the program's output")?;
            }
            Message::Stderr(bytes) => {
                errors.write_all(&bytes).and_then(|()| errors.flush()).context("cannot write the program's errors")?;
            }
            Message::Exit(status) => return Ok(status.shell_code()),
            Message::Error { kind, text } => {
                let status = match kind {
                    AgentErrorKind::NotFound => STATUS_NOT_FOUND,
                    AgentErrorKind::NotExecutable => STATUS_NOT_EXECUTABLE,
                    _ => bail!("the agent refused: {text}"),
                };
                let _ = writeln!(errors, "polder: {text}");
                return Ok(status);
            }
            other => bail!("the agent sent what nobody asked for: {other:?}"),
        }
    }
}

fn send(sender: &Mutex<AgentSender>, message: &Message) -> bool {
    sender.lock().unwrap_or_else(PoisonError::into_inner).send(message).is_ok()
}

/// Starts the thread that sends standard input. It is left alone at the end, for nothing ends a read.
fn start_input(sender: Arc<Mutex<AgentSender>>) -> Result<()> {
    let body = move || {
        let mut bytes = vec![0; CHUNK_LEN_MAX];
        loop {
            match std::io::stdin().lock().read(&mut bytes) {
                Ok(0) | Err(_) => break,
                Ok(len) if send(&sender, &Message::Stdin(bytes[..len].to_vec())) => {}
                Ok(_) => return,
            }
        }
        send(&sender, &Message::StdinEnd);
    };
    std::thread::Builder::new().name("input".to_owned()).spawn(body).context("the host gave no thread")?;
    Ok(())
}

fn terminal_size() -> Option<TerminalSize> {
    let size = rustix::termios::tcgetwinsize(rustix::stdio::stdout()).ok()?;
    (size.ws_row > 0 && size.ws_col > 0).then_some(TerminalSize { rows: size.ws_row, columns: size.ws_col })
}

/// Starts the thread that tells the guest of a new size of the terminal.
fn start_resizing(sender: Arc<Mutex<AgentSender>>) -> Result<()> {
    let body = move || {
        let mut told = terminal_size();
        loop {
            std::thread::sleep(RESIZE_LOOK);
            let size = terminal_size();
            if size != told
                && let Some(size) = size
                && !send(&sender, &Message::Resize(size))
            {
                return;
            }
            told = size;
        }
    };
    std::thread::Builder::new().name("resizing".to_owned()).spawn(body).context("the host gave no thread")?;
    Ok(())
}
