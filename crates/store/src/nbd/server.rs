//! Accepts clients, gives each a thread, and stops in good order.

use super::STOP_TIMEOUT;
use super::budget::Budget;
use super::connection::serve;
use super::exports::Exports;
use super::listener::Listener;
use super::stream::Stream;
use crate::disk::Disk;
use polder_trust::tls::ServerConfig;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::net::sockopt;
use rustix::net::{Shutdown, SocketFlags, accept_with, shutdown};
use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long no client is accepted after the host had no descriptor or thread for one.
const PAUSE_MS: i64 = 100;
/// How long a TCP client may be silent before it is asked whether it is still there.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
/// How often it is asked, and how long between.
const KEEPALIVE_COUNT: u32 = 4;
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(15);
/// Bytes that the host may keep for a client that is slower than the disk, if its limits allow.
const SEND_BUFFER_LEN: usize = 1 << 20;

/// Whether a server talks TLS with its clients.
#[derive(Debug, Clone, Default)]
pub enum Tls {
    #[default]
    Off,
    /// Clients choose.
    Allowed(Arc<ServerConfig>),
    /// Without it clients are told so, and nothing else.
    Required(Arc<ServerConfig>),
}

/// What can be chosen about a server.
#[derive(Debug, Clone)]
pub struct ServerOptions {
    pub tls: Tls,
    /// Clients at once. One more is accepted and closed.
    pub connections_max: usize,
    /// How long a client may take to choose an export.
    pub negotiation_timeout: Duration,
    /// How long a client may take none of the replies that wait for it.
    pub send_timeout: Duration,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            tls: Tls::Off,
            connections_max: 256,
            negotiation_timeout: Duration::from_secs(60),
            send_timeout: Duration::from_secs(60),
        }
    }
}

/// A server that runs. Dropping it stops it.
pub struct Server {
    shared: Arc<Shared>,
    acceptor: Option<JoinHandle<()>>,
}

/// Stops a server from any thread.
#[derive(Clone)]
pub struct StopHandle {
    shared: Arc<Shared>,
}

struct Shared {
    stopping: AtomicBool,
    /// Wakes the thread that accepts.
    wake: OwnedFd,
    connections: Mutex<HashMap<u64, Arc<OwnedFd>>>,
    ended: Condvar,
    /// What all connections hold.
    held_bytes: Arc<AtomicUsize>,
    options: ServerOptions,
}

impl Server {
    /// Serves `exports` to whoever connects to one of `listeners`.
    pub fn start<D: Disk>(
        listeners: Vec<Listener>,
        exports: Arc<Exports<D>>,
        options: ServerOptions,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            stopping: AtomicBool::new(false),
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            connections: Mutex::new(HashMap::new()),
            ended: Condvar::new(),
            held_bytes: Arc::default(),
            options,
        });
        let acceptor = std::thread::Builder::new().name("nbd-accept".into()).spawn({
            let shared = shared.clone();
            move || shared.accept_all(&listeners, &exports)
        })?;
        Ok(Self { shared, acceptor: Some(acceptor) })
    }

    /// A way to stop it from another thread.
    pub fn stop_handle(&self) -> StopHandle {
        StopHandle { shared: self.shared.clone() }
    }

    /// Clients that are connected.
    pub fn connections(&self) -> usize {
        self.shared.connections().len()
    }

    /// Waits until somebody stops it and its clients have ended.
    pub fn join(mut self) {
        self.wait();
    }

    fn wait(&mut self) {
        if let Some(acceptor) = self.acceptor.take() {
            // It panics only for want of memory; then nobody is accepted any more either.
            let _ = acceptor.join();
            self.shared.wait_for_connections();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.stop();
        self.wait();
    }
}

impl StopHandle {
    /// No client is accepted any more, and no request received. What is in flight is still answered, and the sockets are
    /// removed. Does not wait for any of this: [`Server::join`] does.
    pub fn stop(&self) {
        self.shared.stop();
    }
}

impl Shared {
    fn connections(&self) -> MutexGuard<'_, HashMap<u64, Arc<OwnedFd>>> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        // A full counter wakes as well.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        self.shut_down_all(Shutdown::Read);
    }

    fn shut_down_all(&self, how: Shutdown) {
        for socket in self.connections().values() {
            // A client that has gone already is as good.
            let _ = shutdown(socket, how);
        }
    }

    fn wait_for_connections(&self) {
        let deadline = Instant::now() + STOP_TIMEOUT;
        let mut connections = self.connections();
        while !connections.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            (connections, _) = self.ended.wait_timeout(connections, left).unwrap_or_else(PoisonError::into_inner);
        }
        drop(connections);
        // Whoever does not take its replies loses them; only the disk is waited for without a bound.
        self.shut_down_all(Shutdown::Both);
        let mut connections = self.connections();
        while !connections.is_empty() {
            connections = self.ended.wait(connections).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn accept_all<D: Disk>(self: &Arc<Self>, listeners: &[Listener], exports: &Arc<Exports<D>>) {
        let mut next_id = 0;
        while !self.stopping.load(Ordering::SeqCst) {
            let mut fds: Vec<PollFd<'_>> = vec![PollFd::new(&self.wake, PollFlags::IN)];
            fds.extend(listeners.iter().map(|listener| PollFd::from_borrowed_fd(listener.socket(), PollFlags::IN)));
            if poll(&mut fds, None).is_err() {
                continue;
            }
            let ready: Vec<bool> = fds[1..].iter().map(|fd| !fd.revents().is_empty()).collect();
            for (listener, _) in listeners.iter().zip(ready).filter(|(_, ready)| *ready) {
                next_id += 1;
                match accept_with(listener.socket(), SocketFlags::CLOEXEC) {
                    Ok(socket) => self.welcome(next_id, socket, listener.is_tcp(), exports),
                    Err(rustix::io::Errno::MFILE | rustix::io::Errno::NFILE | rustix::io::Errno::NOMEM) => self.pause(),
                    // The client has gone, or another thread was faster.
                    Err(_) => {}
                }
            }
        }
    }

    fn pause(&self) {
        let timeout = Timespec { tv_sec: 0, tv_nsec: PAUSE_MS * 1_000_000 };
        let _ = poll(&mut [PollFd::new(&self.wake, PollFlags::IN)], Some(&timeout));
    }

    fn welcome<D: Disk>(self: &Arc<Self>, id: u64, socket: OwnedFd, is_tcp: bool, exports: &Arc<Exports<D>>) {
        prepare(&socket, is_tcp);
        let socket = Arc::new(socket);
        {
            let mut connections = self.connections();
            if self.stopping.load(Ordering::SeqCst) {
                return;
            }
            if connections.len() >= self.options.connections_max {
                tracing::warn!(connections_max = connections.len(), "an NBD client too many is closed");
                return;
            }
            connections.insert(id, socket.clone());
        }
        let registration = Registration { shared: self.clone(), id };
        let exports = exports.clone();
        let spawned = std::thread::Builder::new().name(format!("nbd-{id}")).spawn(move || {
            let shared = &registration.shared;
            let budget = Budget::new(shared.held_bytes.clone());
            // Whatever went wrong concerns this client only, and it knows by its socket.
            match serve(Stream::new(socket), exports, &shared.options, budget, &shared.stopping) {
                Ok(()) => tracing::debug!(client = id, "an NBD client has gone"),
                Err(error) => tracing::info!(client = id, %error, "an NBD client was left"),
            }
            drop(registration);
        });
        if spawned.is_err() {
            self.pause();
        }
    }
}

/// A connection that counts until its thread ends, however it ends.
struct Registration {
    shared: Arc<Shared>,
    id: u64,
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.shared.connections().remove(&self.id);
        self.shared.ended.notify_all();
    }
}

fn prepare(socket: &OwnedFd, is_tcp: bool) {
    // Without any of these the connection works as well, only slower, or finds out later that its client has died.
    if is_tcp {
        let _ = sockopt::set_tcp_nodelay(socket, true);
        let _ = sockopt::set_socket_keepalive(socket, true);
        let _ = sockopt::set_tcp_keepidle(socket, KEEPALIVE_IDLE);
        let _ = sockopt::set_tcp_keepintvl(socket, KEEPALIVE_INTERVAL);
        let _ = sockopt::set_tcp_keepcnt(socket, KEEPALIVE_COUNT);
    } else {
        let _ = sockopt::set_socket_send_buffer_size(socket, SEND_BUFFER_LEN);
    }
}
