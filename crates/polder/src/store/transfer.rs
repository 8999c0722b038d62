//! `polder store push`, `pull` and `serve`: images and snapshots between the stores of two hosts, or a host and an object store.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;
use polder_basics::ByteSize;
use polder_store::transfer::{self, Names, NodeRef, ServeOptions, TransferOptions, Transferred};
use polder_store::{Replace, Store};
use polder_trust::tls::{
    ClientCertificates, ClientConfig, ClientConnection, IdentityFiles, ServerConfig, ServerConnection, ServerName,
    client_config, server_config,
};

use super::remote::{self, S3Url, ServerArguments};
use super::{Progress, rough};
use crate::boot::StopSignals;

/// How long a peer may be silent.
const PATIENCE: Duration = Duration::from_secs(60);
/// Peers that are served at a time.
const PEERS_MAX: usize = 64;

/// Where something goes to, or comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Other {
    Store(Place),
    Bucket(S3Url),
}

impl FromStr for Other {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.starts_with("s3:") {
            true => text.parse().map(Other::Bucket),
            false => {
                let wrong = || "write unix:PATH, tcp:HOST:PORT or s3://BUCKET/PREFIX".to_owned();
                text.parse().map(Other::Store).map_err(|_: String| wrong())
            }
        }
    }
}

/// Where another store is.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    Unix(PathBuf),
    Tcp { host: String, port: u16 },
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || "write unix:PATH or tcp:HOST:PORT".to_owned();
        if let Some(path) = text.strip_prefix("unix:").filter(|path| !path.is_empty()) {
            return Ok(Place::Unix(path.into()));
        }
        let (host, port) = text.strip_prefix("tcp:").and_then(|rest| rest.rsplit_once(':')).ok_or_else(wrong)?;
        let port = port.parse().map_err(|_| wrong())?;
        match host.trim_start_matches('[').trim_end_matches(']') {
            "" => Err(wrong()),
            host => Ok(Place::Tcp { host: host.to_owned(), port }),
        }
    }
}

#[derive(Args)]
struct TlsOptions {
    /// The authority that signs the other side's certificate; TLS is used on TCP if it is given
    #[arg(long, value_name = "FILE")]
    tls_authority: Option<PathBuf>,
    /// Our certificate, with the ones between it and its authority
    #[arg(long, value_name = "FILE", requires = "tls_key", requires = "tls_authority")]
    tls_certificate: Option<PathBuf>,
    /// The certificate's private key
    #[arg(long, value_name = "FILE", requires = "tls_certificate")]
    tls_key: Option<PathBuf>,
}

impl TlsOptions {
    fn identity(&self) -> Option<IdentityFiles> {
        let (certificate, key) = (self.tls_certificate.clone()?, self.tls_key.clone()?);
        Some(IdentityFiles { certificate, key })
    }

    /// Refuses them where nobody would look at them.
    fn must_be_empty(&self) -> Result<()> {
        match self.tls_authority.is_some() {
            true => bail!(
                "an object store is reached by TLS where --endpoint begins with https://: it takes no --tls-authority"
            ),
            false => Ok(()),
        }
    }

    fn client(&self) -> Result<Option<Arc<ClientConfig>>> {
        let Some(authority) = &self.tls_authority else { return Ok(None) };
        Ok(Some(client_config(authority, self.identity().as_ref())?))
    }

    fn server(&self) -> Result<Option<Arc<ServerConfig>>> {
        let Some(authority) = &self.tls_authority else { return Ok(None) };
        let Some(identity) = self.identity() else {
            bail!("a server shows a certificate: --tls-certificate and --tls-key")
        };
        Ok(Some(server_config(&identity, &ClientCertificates::RequiredFrom(authority.clone()))?))
    }
}

#[derive(Args)]
pub struct TransferArguments {
    /// An image; VOLUME@SNAPSHOT; or volume:NAME for its newest snapshot
    what: String,
    /// The other store: unix:PATH, tcp:HOST:PORT or s3://BUCKET/PREFIX
    place: Other,
    /// Name of the image that it becomes there [default: its own, or the volume's]
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Replace an image of the same name
    #[arg(long)]
    force: bool,
    /// Bytes a second at most
    #[arg(long, value_name = "SIZE")]
    rate: Option<ByteSize>,
    #[command(flatten)]
    tls: TlsOptions,
    #[command(flatten)]
    server: ServerArguments,
}

/// Serve this store to others, until SIGTERM or Ctrl-C
///
/// Others can do only what an option allows. Says "ready" on standard output when they can connect.
#[derive(Args)]
#[command(verbatim_doc_comment)]
pub struct ServeArguments {
    /// Where to listen: unix:PATH or tcp:HOST:PORT
    place: Place,
    /// Images that may be pulled, separated by commas; "all" for every one
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    pull: Vec<String>,
    /// Volumes whose snapshots may be pulled
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    pull_volumes: Vec<String>,
    /// Images that a push may make
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    push: Vec<String>,
    /// A push may replace an image
    #[arg(long)]
    replace: bool,
    /// What one push may bring at most
    #[arg(long, value_name = "SIZE")]
    push_limit: Option<ByteSize>,
    #[command(flatten)]
    tls: TlsOptions,
}

trait Stream: Read + Write {}

impl<S: Read + Write> Stream for S {}

/// What a word means, and the name in it.
pub fn node_ref(word: &str) -> (NodeRef, &str) {
    match (word.strip_prefix("volume:"), word.split_once('@')) {
        (Some(volume), _) => (NodeRef::Volume(volume.to_owned()), volume),
        (None, Some((volume, snapshot))) => {
            (NodeRef::Snapshot { volume: volume.to_owned(), snapshot: snapshot.to_owned() }, volume)
        }
        (None, None) => (NodeRef::Image(word.to_owned()), word),
    }
}

/// What is meant, and the name of the image that it becomes.
fn meant(arguments: &TransferArguments) -> (NodeRef, String) {
    let (what, name) = node_ref(&arguments.what);
    (what, arguments.name.clone().unwrap_or_else(|| name.to_owned()))
}

fn options(arguments: &TransferArguments, image: &str) -> TransferOptions {
    let replace = if arguments.force { Replace::Yes } else { Replace::No };
    TransferOptions { replace, bytes_per_second: arguments.rate.map(|rate| rate.0), ..TransferOptions::new(image) }
}

fn connect(place: &Place, tls: &TlsOptions) -> Result<Box<dyn Stream>> {
    let client = tls.client()?;
    match place {
        Place::Unix(path) => {
            let stream = UnixStream::connect(path).with_context(|| format!("cannot reach {}", path.display()))?;
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.set_write_timeout(Some(PATIENCE))?;
            Ok(Box::new(stream))
        }
        Place::Tcp { host, port } => {
            let stream = TcpStream::connect((host.as_str(), *port));
            let stream = stream.with_context(|| format!("cannot reach {host} port {port}"))?;
            prepare(&stream)?;
            let Some(client) = client else { return Ok(Box::new(stream)) };
            let name = ServerName::try_from(host.clone()).with_context(|| format!("{host} is no name for TLS"))?;
            Ok(Box::new(rustls::StreamOwned::new(ClientConnection::new(client, name)?, stream)))
        }
    }
}

fn prepare(stream: &TcpStream) -> Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(())
}

/// Carries out `polder store push`.
pub fn push(store: &Arc<Store>, arguments: &TransferArguments) -> Result<ExitCode> {
    let (what, image) = meant(arguments);
    let options = options(arguments, &image);
    let place = match &arguments.place {
        Other::Bucket(place) => {
            arguments.tls.must_be_empty()?;
            remote::push(store, &what, place, &arguments.server, &options)?;
            return Ok(ExitCode::SUCCESS);
        }
        Other::Store(place) => place,
    };
    let stream = connect(place, &arguments.tls)?;
    let mut progress = Progress::new();
    let moved = transfer::push(store, &what, stream, &options, &mut |step| progress.show(step))?;
    progress.finish();
    tell(&what, &image, "there", &moved);
    Ok(ExitCode::SUCCESS)
}

/// Carries out `polder store pull`.
pub fn pull(store: &Arc<Store>, arguments: &TransferArguments) -> Result<ExitCode> {
    let (what, image) = meant(arguments);
    let options = options(arguments, &image);
    let place = match &arguments.place {
        Other::Bucket(place) => {
            arguments.tls.must_be_empty()?;
            remote::pull(store, &what, place, &arguments.server, &options)?;
            return Ok(ExitCode::SUCCESS);
        }
        Other::Store(place) => place,
    };
    let stream = connect(place, &arguments.tls)?;
    let mut progress = Progress::new();
    let pulled = transfer::pull(store, &what, stream, &options, &mut |step| progress.show(step))?;
    progress.finish();
    tell(&what, &image, "here", &pulled.1);
    Ok(ExitCode::SUCCESS)
}

fn tell(what: &NodeRef, image: &str, place: &str, moved: &Transferred) {
    println!("{what} is image {image} {place}: {} records, {}", moved.records, rough(moved.record_bytes));
}

fn names(listed: &[String]) -> Names {
    match listed {
        [] => Names::None,
        [all] if all == "all" => Names::All,
        listed => Names::Listed(listed.to_vec()),
    }
}

/// Carries out `polder store serve`.
pub fn serve(store: &Arc<Store>, arguments: &ServeArguments) -> Result<ExitCode> {
    let signals = StopSignals::block().context("the signals that stop the server cannot be caught")?;
    let tls = arguments.tls.server()?;
    let options = Arc::new(ServeOptions {
        pull_images: names(&arguments.pull),
        pull_volumes: names(&arguments.pull_volumes),
        push_images: names(&arguments.push),
        replace: arguments.replace,
        push_bytes_max: arguments.push_limit.map(|limit| limit.0),
        bytes_per_second: None,
    });
    if options.pull_images == Names::None && options.pull_volumes == Names::None && options.push_images == Names::None {
        bail!("nothing is allowed: --pull, --pull-volumes and --push say what is");
    }
    let place = arguments.place.clone();
    // What a transfer brought is kept by the store; whoever is cut off comes back for the rest.
    signals.on_arrival(move || {
        if let Place::Unix(path) = &place {
            let _ = std::fs::remove_file(path);
        }
        std::process::exit(0);
    })?;
    let peers = Arc::new(AtomicUsize::new(0));
    let serve = |stream: Box<dyn Stream + Send>| {
        if peers.fetch_add(1, Ordering::SeqCst) >= PEERS_MAX {
            peers.fetch_sub(1, Ordering::SeqCst);
            return;
        }
        let (store, options, count) = (store.clone(), options.clone(), peers.clone());
        let body = move || {
            if let Err(error) = transfer::serve(&store, stream, &options, &mut |_| Ok(())) {
                eprintln!("polder: a transfer ended: {:#}", anyhow::Error::from(error));
            }
            // Others find what came at once, and this process may be killed.
            if let Err(error) = store.seal() {
                eprintln!("polder: {:#}", anyhow::Error::from(error));
            }
            count.fetch_sub(1, Ordering::SeqCst);
        };
        if std::thread::Builder::new().name("transfer".to_owned()).spawn(body).is_err() {
            peers.fetch_sub(1, Ordering::SeqCst);
        }
    };
    match &arguments.place {
        Place::Unix(path) => {
            let listener = UnixListener::bind(path).with_context(|| format!("cannot listen at {}", path.display()))?;
            std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
            println!("ready");
            for stream in listener.incoming() {
                let Ok(stream) = stream else { continue };
                stream.set_read_timeout(Some(PATIENCE))?;
                stream.set_write_timeout(Some(PATIENCE))?;
                serve(Box::new(stream));
            }
        }
        Place::Tcp { host, port } => {
            let listener = TcpListener::bind((host.as_str(), *port))
                .with_context(|| format!("cannot listen at {host} port {port}"))?;
            println!("listening at {}", listener.local_addr()?);
            println!("ready");
            for stream in listener.incoming() {
                let Ok(stream) = stream else { continue };
                if prepare(&stream).is_err() {
                    continue;
                }
                match &tls {
                    None => serve(Box::new(stream)),
                    Some(config) => {
                        let connection = ServerConnection::new(config.clone())?;
                        serve(Box::new(rustls::StreamOwned::new(connection, stream)));
                    }
                }
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_is_a_socket_a_host_with_a_port_or_a_bucket() {
        assert_eq!("unix:/run/x".parse(), Ok(Place::Unix("/run/x".into())));
        assert_eq!("tcp:a.example:99".parse(), Ok(Place::Tcp { host: "a.example".to_owned(), port: 99 }));
        assert_eq!("tcp:[::1]:99".parse(), Ok(Place::Tcp { host: "::1".to_owned(), port: 99 }));
        assert_eq!("unix:/run/x".parse(), Ok(Other::Store(Place::Unix("/run/x".into()))));
        assert!(matches!("s3://images/prod".parse(), Ok(Other::Bucket(_))));
        assert!("s3:images".parse::<Other>().is_err() && "images".parse::<Other>().is_err());
        for text in ["", "unix:", "tcp:a", "tcp::1", "tcp:a:b", "/run/x"] {
            assert!(text.parse::<Place>().is_err(), "{text}");
        }
    }
}
