//! `polder volume serve`: volumes and snapshots for NBD clients.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use polder_store::nbd::{Export, Exports, Listener, Server, ServerOptions, Tls};
use polder_store::{FixedDisk, OpenDisk, Store, Volume, VolumeOptions};
use polder_trust::tls::{ClientCertificates, IdentityFiles, server_config};

use super::DiskName;
use crate::boot::StopSignals;

/// Who may use the socket: its owner.
const SOCKET_MODE: u32 = 0o600;

/// Serve volumes and snapshots to NBD clients, until SIGTERM or Ctrl-C
///
/// A volume is exported under its name and can be written; VOLUME@SNAPSHOT is read-only. The first one is also the default export.
/// Says "ready" on standard output when clients can connect.
#[derive(Args)]
#[command(verbatim_doc_comment)]
pub struct ServeArguments {
    /// VOLUME or VOLUME@SNAPSHOT
    #[arg(required = true)]
    disks: Vec<DiskName>,
    /// Listen at this Unix socket
    #[arg(long, value_name = "PATH", required_unless_present = "listen")]
    socket: Option<PathBuf>,
    /// Listen at this address and port
    #[arg(long, value_name = "ADDRESS:PORT")]
    listen: Option<SocketAddr>,
    /// Clients cannot write
    #[arg(long)]
    read_only: bool,
    /// Whether clients may or must use TLS
    #[arg(long, value_enum, default_value = "off")]
    tls: TlsWish,
    /// The server's certificate, with the ones between it and its authority
    #[arg(long, value_name = "FILE", required_if_eq_any([("tls", "allowed"), ("tls", "required")]))]
    tls_certificate: Option<PathBuf>,
    /// The certificate's private key
    #[arg(long, value_name = "FILE", required_if_eq_any([("tls", "allowed"), ("tls", "required")]))]
    tls_key: Option<PathBuf>,
    /// Clients must show a certificate signed by this authority
    #[arg(long, value_name = "FILE")]
    tls_authority: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum TlsWish {
    Off,
    /// Clients choose
    Allowed,
    Required,
}

/// Carries out `polder volume serve`.
pub fn serve(store: &Arc<Store>, arguments: &ServeArguments) -> Result<ExitCode> {
    let signals = StopSignals::block().context("the signals that stop the server cannot be caught")?;
    let tls = tls(arguments)?;
    if arguments.listen.is_some_and(|address| !address.ip().is_loopback()) && arguments.tls != TlsWish::Required {
        eprintln!(
            "polder: everyone who reaches the port can read and write the volumes; --tls required asks for certificates"
        );
    }
    let exports = Arc::new(Exports::new());
    let mut disks = Vec::new();
    for name in &arguments.disks {
        let disk = Arc::new(open_disk(store, name)?);
        let mut export = Export::new(name.to_string(), disk.clone());
        if arguments.read_only {
            export = export.read_only();
        }
        exports.add(export)?;
        disks.push(disk);
    }
    let mut listeners = Vec::new();
    if let Some(path) = &arguments.socket {
        listeners.push(Listener::unix(path, SOCKET_MODE)?);
    }
    if let Some(address) = arguments.listen {
        listeners.push(Listener::tcp(address)?);
    }
    let addresses: Vec<SocketAddr> = listeners.iter().filter_map(Listener::address).collect();
    let options = ServerOptions { tls, ..ServerOptions::default() };
    let server = Server::start(listeners, exports.clone(), options).context("the server cannot start")?;
    let stop = server.stop_handle();
    signals.on_arrival(move || stop.stop())?;
    for address in addresses {
        println!("listening at {address}");
    }
    println!("ready");
    server.join();
    drop(exports);
    for disk in disks {
        // Connections have ended, and their queues with them.
        match Arc::try_unwrap(disk) {
            Ok(disk) => disk.close()?,
            Err(_) => bail!("a volume is still in use"),
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn open_disk(store: &Arc<Store>, name: &DiskName) -> Result<OpenDisk> {
    Ok(match &name.snapshot {
        None => OpenDisk::Volume(Volume::open(store, &name.volume, VolumeOptions::default())?),
        Some(snapshot) => OpenDisk::Fixed(FixedDisk::new(store, &store.settled_disk(&name.volume, Some(snapshot))?)),
    })
}

fn tls(arguments: &ServeArguments) -> Result<Tls> {
    let (Some(certificate), Some(key)) = (&arguments.tls_certificate, &arguments.tls_key) else {
        return Ok(Tls::Off);
    };
    let identity = IdentityFiles { certificate: certificate.clone(), key: key.clone() };
    let clients = match &arguments.tls_authority {
        Some(authority) => ClientCertificates::RequiredFrom(authority.clone()),
        None => ClientCertificates::NotAsked,
    };
    Ok(match arguments.tls {
        TlsWish::Off => bail!("a certificate is given and TLS is off: say --tls allowed or --tls required"),
        TlsWish::Allowed => Tls::Allowed(server_config(&identity, &clients)?),
        TlsWish::Required => Tls::Required(server_config(&identity, &clients)?),
    })
}
