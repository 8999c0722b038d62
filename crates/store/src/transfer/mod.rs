//! Transfer by difference: images and snapshots from one store to another over a stream of bytes.
//!
//! Whoever gets leads: it compares names from the node down and asks for what it lacks, as bits of nodes that it was given before.
//! So nothing can be asked for that is not part of what was offered. Requests are so small, and so few bytes of them are on their way, that
//! they fit into any socket's buffer: both sides work with one thread and a stream that blocks. docs/transfer.md draws the messages.

mod sink;
mod source;
mod wire;

#[cfg(any(test, feature = "testbench"))]
pub mod testbench;
#[cfg(test)]
mod tests;

use std::io::{Read, Write};
use std::sync::Arc;

use crate::catalog::{ImageRow, Replace, check_name};
use crate::error::StoreError;
use crate::name::Name;
use crate::node::Node;
use crate::pace::Pace;
use crate::store::{Batch, Store};
use crate::upkeep::collect::Watcher;
use sink::Sink;
use source::Source;
use wire::{Link, Message};

/// Something of a store that has a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NodeRef {
    Image(String),
    Snapshot {
        volume: String,
        snapshot: String,
    },
    /// Its newest snapshot; a volume without one gets a snapshot for the time of the transfer.
    Volume(String),
}

impl std::fmt::Display for NodeRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            NodeRef::Image(name) => write!(f, "image {name}"),
            NodeRef::Snapshot { volume, snapshot } => write!(f, "snapshot {snapshot} of volume {volume}"),
            NodeRef::Volume(name) => write!(f, "volume {name}"),
        }
    }
}

/// How something is transferred.
#[derive(Debug, Clone)]
pub struct TransferOptions {
    /// The image that it is afterwards, in the store that gets it.
    pub image: String,
    pub replace: Replace,
    /// Bytes of the stream a second at most.
    pub bytes_per_second: Option<u64>,
}

impl TransferOptions {
    pub fn new(image: impl Into<String>) -> Self {
        TransferOptions { image: image.into(), replace: Replace::No, bytes_per_second: None }
    }
}

/// What a transfer moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Transferred {
    pub records: u64,
    /// Bytes of records that travelled.
    pub record_bytes: u64,
    /// All bytes that were received and sent.
    pub received_bytes: u64,
    pub sent_bytes: u64,
}

/// Why something was not transferred.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    #[error("the connection broke; what arrived stays, and the same again sends only what is missing")]
    Cut(#[source] std::io::Error),
    #[error("the other side refuses: {0}")]
    Refused(String),
    #[error("the other side speaks versions {first} to {last} of the protocol, and this release speaks {ours}", ours = wire::VERSION)]
    Version { first: u16, last: u16 },
    #[error("the other store names its chunks under another secret")]
    OtherDomain,
    #[error("the other side does not keep to the protocol: {0}")]
    Protocol(String),
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Which names a peer may use.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Names {
    #[default]
    None,
    All,
    Listed(Vec<String>),
}

impl Names {
    fn allow(&self, name: &str) -> bool {
        match self {
            Names::None => false,
            Names::All => true,
            Names::Listed(names) => names.iter().any(|listed| listed == name),
        }
    }
}

/// What a peer may do.
#[derive(Debug, Clone, Default)]
pub struct ServeOptions {
    /// Images that may be pulled.
    pub pull_images: Names,
    /// Volumes whose snapshots may be pulled.
    pub pull_volumes: Names,
    /// Images that a push may make.
    pub push_images: Names,
    /// Whether a push may give an existing image's name to another node.
    pub replace: bool,
    /// Bytes of records that one push may bring.
    pub push_bytes_max: Option<u64>,
    /// Bytes of the stream a second at most.
    pub bytes_per_second: Option<u64>,
}

/// Puts something of our store into a peer's.
pub fn push<S: Read + Write>(
    store: &Arc<Store>,
    what: &NodeRef,
    stream: S,
    options: &TransferOptions,
    watcher: Watcher<'_>,
) -> Result<Transferred, TransferError> {
    check_name("image", &options.image)?;
    let offered = Offered::new(store, what)?;
    let mut link = Link::new(stream, Pace::limited(options.bytes_per_second));
    link.greet(store)?;
    link.send(&Message::Push { image: &options.image, replace: options.replace == Replace::Yes })?;
    link.flush()?;
    link.expect_accept()?;
    Source::new(store, &mut link, &offered).run(watcher)?;
    Ok(link.transferred())
}

/// Gets something of a peer's store into ours, as an image.
pub fn pull<S: Read + Write>(
    store: &Arc<Store>,
    what: &NodeRef,
    stream: S,
    options: &TransferOptions,
    watcher: Watcher<'_>,
) -> Result<(ImageRow, Transferred), TransferError> {
    check_name("image", &options.image)?;
    let mut link = Link::new(stream, Pace::limited(options.bytes_per_second));
    link.greet(store)?;
    link.send(&Message::Pull(what.clone()))?;
    link.flush()?;
    link.expect_accept()?;
    let row = Sink::new(store, &mut link, u64::MAX)?.run(&options.image, options.replace, watcher)?;
    Ok((row, link.transferred()))
}

/// Does what a peer asks for, until it closes the stream. How long a peer may be silent is up to the stream's own time limits.
pub fn serve<S: Read + Write>(
    store: &Arc<Store>,
    stream: S,
    options: &ServeOptions,
    watcher: Watcher<'_>,
) -> Result<Transferred, TransferError> {
    let mut link = Link::new(stream, Pace::limited(options.bytes_per_second));
    link.greet(store)?;
    while let Some(request) = link.receive_request()? {
        let outcome = match request {
            wire::Request::Push { image, replace } => serve_push(store, &mut link, options, &image, replace, watcher),
            wire::Request::Pull(what) => serve_pull(store, &mut link, options, &what, watcher),
        };
        match outcome {
            Ok(()) => {}
            // Said to the peer, which may ask for something else.
            Err(Failure::Refused(why)) => {
                link.send(&Message::Refused(&why))?;
                link.flush()?;
            }
            Err(Failure::Ended(error)) => return Err(link.tell(error)),
        }
    }
    Ok(link.transferred())
}

/// Why a request came to nothing.
enum Failure {
    /// The request cannot be met; the peer waits for an answer.
    Refused(String),
    /// The stream is of no use any more.
    Ended(TransferError),
}

impl<E: Into<TransferError>> From<E> for Failure {
    fn from(error: E) -> Self {
        Failure::Ended(error.into())
    }
}

fn serve_push<S: Read + Write>(
    store: &Arc<Store>,
    link: &mut Link<S>,
    options: &ServeOptions,
    image: &str,
    replace: bool,
    watcher: Watcher<'_>,
) -> Result<(), Failure> {
    check_name("image", image).map_err(|error| Failure::Refused(error.to_string()))?;
    if !options.push_images.allow(image) {
        return Err(Failure::Refused(format!("image {image} may not be pushed")));
    }
    let replace = if replace && options.replace { Replace::Yes } else { Replace::No };
    // Said before anything travels.
    if replace == Replace::No && store.catalog().image(image).is_ok() {
        return Err(Failure::Refused(format!("there is an image {image} already")));
    }
    link.send(&Message::Accepted)?;
    link.flush()?;
    Sink::new(store, link, options.push_bytes_max.unwrap_or(u64::MAX))?.run(image, replace, watcher)?;
    Ok(())
}

fn serve_pull<S: Read + Write>(
    store: &Arc<Store>,
    link: &mut Link<S>,
    options: &ServeOptions,
    what: &NodeRef,
    watcher: Watcher<'_>,
) -> Result<(), Failure> {
    let allowed = match what {
        NodeRef::Image(name) => options.pull_images.allow(name),
        NodeRef::Snapshot { volume, .. } | NodeRef::Volume(volume) => options.pull_volumes.allow(volume),
    };
    // What may not be had and what is not there look the same from outside.
    let refused = || Failure::Refused(format!("there is no {what} to pull"));
    if !allowed {
        return Err(refused());
    }
    let offered = match Offered::new(store, what) {
        Err(StoreError::NotFound { .. }) => return Err(refused()),
        Err(error @ StoreError::Encrypted { .. }) => return Err(Failure::Refused(error.to_string())),
        offered => offered?,
    };
    link.send(&Message::Accepted)?;
    link.flush()?;
    Source::new(store, link, &offered).run(watcher)?;
    Ok(())
}

/// A node that a peer may have, kept while this lives.
pub(crate) struct Offered {
    pub name: Name,
    pub node: Node,
    /// No collection removes what is offered, even if its image goes meanwhile.
    _batch: Batch,
    _snapshot: Option<PassingSnapshot>,
}

impl Offered {
    pub fn new(store: &Arc<Store>, what: &NodeRef) -> Result<Self, StoreError> {
        let mut passing = None;
        let snapshot = match what {
            NodeRef::Image(_) => None,
            NodeRef::Snapshot { volume, snapshot } => Some((volume, snapshot.clone())),
            NodeRef::Volume(volume) => {
                let newest = store.snapshots(volume)?.pop().map(|newest| newest.name);
                let name = match newest {
                    Some(name) => name,
                    None => {
                        let name = format!("transfer-{}", crate::id::Id::random());
                        store.take_snapshot(volume, &name)?;
                        let (store, volume, name) = (store.clone(), volume.clone(), name);
                        passing.insert(PassingSnapshot { store, volume, name }).name.clone()
                    }
                };
                Some((volume, name))
            }
        };
        // Before the batch: settling waits for a volume's thread, which makes batches of its own.
        if let Some((volume, name)) = &snapshot {
            store.settled_root(&store.snapshot(volume, name)?)?;
        }
        let batch = store.batch()?;
        // What is named now stays while the batch lasts.
        let name = match (&snapshot, what) {
            (Some((volume, name)), _) => store.snapshot(volume, name)?.node,
            (None, NodeRef::Image(name)) => Some(store.catalog().image(name)?.node),
            (None, _) => None,
        };
        let name = name.ok_or_else(|| StoreError::NotFound { what: "node", name: what.to_string() })?;
        let node = store.load_node(&name)?;
        store.check_may_leave(&what.to_string(), &node)?;
        Ok(Offered { name, node, _batch: batch, _snapshot: passing })
    }
}

/// A snapshot that is there for a transfer only.
struct PassingSnapshot {
    store: Arc<Store>,
    volume: String,
    name: String,
}

impl Drop for PassingSnapshot {
    fn drop(&mut self) {
        if let Err(error) = self.store.remove_snapshot(&self.volume, &self.name) {
            tracing::warn!(volume = self.volume, snapshot = self.name, %error, "the snapshot of a transfer stays");
        }
    }
}
