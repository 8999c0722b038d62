//! The small static program inside guests: runs programs for the host, over vsock.
//!
//! It listens on [`polder_basics::agent_protocol::AGENT_PORT`]; each connection is one session on a thread of its own. Nothing is
//! configured, nothing is kept, and whatever a connection sends can end only that connection.
//!
//! Modules: `listener` (the vsock socket), `session` (one connection), `program` (one running program), `power` (switching off).

mod listener;
mod power;
mod program;
mod session;

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use polder_basics::agent_protocol::AGENT_PORT;

/// Sessions at one time; further ones are told that the agent is busy.
const SESSIONS_MAX: usize = 64;

fn main() -> ExitCode {
    if std::env::args_os().nth(1).is_some_and(|argument| argument == "--version") {
        println!("polder-agent {}", env!("CARGO_PKG_VERSION"));
        return ExitCode::SUCCESS;
    }
    match listen() {
        Ok(never) => match never {},
        Err(error) => {
            eprintln!("polder-agent: cannot listen on vsock port {AGENT_PORT}: {error}");
            ExitCode::FAILURE
        }
    }
}

fn listen() -> std::io::Result<std::convert::Infallible> {
    let listener = listener::VsockListener::bind(AGENT_PORT)?;
    let sessions = Arc::new(AtomicUsize::new(0));
    loop {
        let stream = listener.accept()?;
        let open = sessions.fetch_add(1, Ordering::SeqCst);
        let for_thread = sessions.clone();
        let body = move || {
            if open < SESSIONS_MAX {
                session::serve(stream);
            } else {
                session::refuse_busy(stream, SESSIONS_MAX);
            }
            for_thread.fetch_sub(1, Ordering::SeqCst);
        };
        if std::thread::Builder::new().name("session".to_owned()).spawn(body).is_err() {
            // The guest is out of threads: the connection closes with the closure, which gave its number back to nobody.
            sessions.fetch_sub(1, Ordering::SeqCst);
        }
    }
}
