//! Images in an S3-compatible object store: pushed and pulled by difference, and used while they are still there.
//!
//! A remote store is objects below a prefix: segments as they lie in a store, an index of them, and a name for each image. An
//! attached image is in our store by its name at once; its records come when they are read, and stay. docs/transfer.md draws
//! the objects and tells the rules.
//!
//! What always holds: nothing is kept that is not what its name says; a call that the network does not answer ends when its patience does;
//! no thread of a device waits here (what has to be looked up is done by a store's workers).

mod address;
mod bucket;
mod collect;
mod error;
mod fetch;
mod known;
mod layout;
mod push;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use crate::catalog::{ImageRow, check_name};
use crate::error::Result;
use crate::name::Name;
use crate::node::Node;
use crate::store::Store;
use crate::transfer::{NodeRef, TransferOptions};
use crate::upkeep::collect::Watcher;
use crate::volume::now_ns;
use bucket::{Client, S3};
use fetch::Fetcher;
use known::Known;

pub use address::{Credentials, PATIENCE_DEFAULT, PATIENCE_MAX, REGION_DEFAULT, RemoteAddress, RemoteOptions};
pub use collect::{GRACE_DEFAULT, RemoteCollected};
pub use error::RemoteError;
pub use known::{Elsewhere, Locality, attached, detach, needed_by};
pub use layout::RemoteImage;
pub use push::Pushed;

/// A remote store.
pub struct Remote {
    client: Arc<Client>,
    address: RemoteAddress,
}

impl Remote {
    /// A remote store by its address. Nothing is asked of it yet.
    pub fn open(options: &RemoteOptions) -> Result<Self, RemoteError> {
        let (bucket, prefix) = S3::open(options)?;
        Ok(Remote {
            client: Arc::new(Client::new(Box::new(bucket), &prefix, options.address.patience)),
            address: options.address.clone(),
        })
    }

    /// The images, by name.
    pub fn list(&self) -> Result<Vec<RemoteImage>, RemoteError> {
        let mut images = Vec::new();
        for object in self.client.list(layout::IMAGES)? {
            // Not what a push has put there.
            if check_name("image", &object.name).is_err() {
                continue;
            }
            // One may be removed meanwhile.
            if let Some(bytes) = self.client.find(&layout::path(layout::IMAGES, &object.name))? {
                images.push(layout::read_image(&object.name, &bytes)?);
            }
        }
        images.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(images)
    }

    /// Puts something of a store there, as an image.
    pub fn push(
        &self,
        store: &Arc<Store>,
        what: &NodeRef,
        options: &TransferOptions,
        watcher: Watcher<'_>,
    ) -> Result<Pushed, RemoteError> {
        push::push(&self.client, store, what, options, watcher)
    }

    /// Gets an image from there whole.
    pub fn pull(
        &self,
        store: &Arc<Store>,
        image: &str,
        options: &TransferOptions,
        watcher: Watcher<'_>,
    ) -> Result<ImageRow, RemoteError> {
        check_name("image", &options.image)?;
        let found = self.find(store, image)?;
        let fetcher = Fetcher::new(self.client.clone(), Known::load(&self.client, None)?, None);
        let mut batch = store.batch()?;
        fetcher.must_bring(store, &found.node, 0)?;
        let node = store.load_node(&found.node)?;
        let filled = fetcher.fill(store, &node, &[], options.bytes_per_second, watcher);
        // What came serves the next try.
        batch.sync()?;
        filled?;
        let row = ImageRow { name: options.image.clone(), created_ns: now_ns(), node: found.node };
        store.catalog().add_image(&row, options.replace)?;
        Ok(row)
    }

    /// Makes an image from there an image of a store at once. What it is made of comes when it is read, as long as this process has the store
    /// open; another one has to [`resume`](Self::resume).
    pub fn attach(&self, store: &Arc<Store>, image: &str, options: &TransferOptions) -> Result<Attached, RemoteError> {
        check_name("image", &options.image)?;
        let found = self.find(store, image)?;
        let folder = known::make_folder(store, &self.address)?;
        let known = Known::load(&self.client, Some(&folder))?;
        let attached = self.attached(store, Fetcher::new(self.client.clone(), known, Some(folder)));
        let mut batch = store.batch()?;
        attached.fetcher.must_bring(store, &found.node, 0)?;
        batch.sync()?;
        let row = ImageRow { name: options.image.clone(), created_ns: now_ns(), node: found.node };
        store.catalog().add_image(&row, options.replace)?;
        Ok(attached)
    }

    /// Has a store look here for records that it does not hold, as images of this remote store are attached to it. Nothing is read or asked
    /// before one is missing.
    pub fn resume(&self, store: &Arc<Store>) -> Attached {
        self.attached(store, Fetcher::late(self.client.clone(), self.address.folder_in(store)))
    }

    fn attached(&self, store: &Arc<Store>, fetcher: Fetcher) -> Attached {
        let fetcher = Arc::new(fetcher);
        store.add_origin(fetcher.clone());
        Attached { client: self.client.clone(), store: store.clone(), fetcher }
    }

    /// Takes an image's name away. What only it needs goes with later collections; a store that has it attached loses what it does not hold.
    pub fn remove(&self, image: &str) -> Result<(), RemoteError> {
        let path = layout::path(layout::IMAGES, image);
        if self.client.find(&path)?.is_none() {
            return Err(RemoteError::NoImage { image: image.to_owned() });
        }
        self.client.remove(&path)
    }

    /// Lists what no image needs, and removes what was listed before, at least `grace` ago. Nodes of trees that the local store does not hold
    /// are fetched.
    pub fn collect(
        &self,
        store: &Arc<Store>,
        grace: Duration,
        watcher: Watcher<'_>,
    ) -> Result<RemoteCollected, RemoteError> {
        collect::collect(&self.client, store, &self.list()?, grace, watcher)
    }

    fn find(&self, store: &Store, image: &str) -> Result<RemoteImage, RemoteError> {
        let missing = || RemoteError::NoImage { image: image.to_owned() };
        let format = self.client.find(layout::FORMAT_OBJECT)?.ok_or_else(missing)?;
        layout::check_format(store.namer(), &format)?;
        let bytes = self.client.find(&layout::path(layout::IMAGES, image))?.ok_or_else(missing)?;
        layout::read_image(image, &bytes)
    }
}

/// A remote store that a store looks into for records that it does not hold.
pub struct Attached {
    client: Arc<Client>,
    store: Arc<Store>,
    fetcher: Arc<Fetcher>,
}

impl Attached {
    /// Brings what something needs and the store does not hold yet: first what is usually read first of an image, then the rest. For a
    /// thread of its own; reads of others go first where they wait for the same.
    pub fn prefetch(
        &self,
        what: &NodeRef,
        bytes_per_second: Option<u64>,
        watcher: Watcher<'_>,
    ) -> Result<(), RemoteError> {
        let disk = |tree| Node { disks: vec![tree], ..Node::default() };
        let (node, profile) = match what {
            NodeRef::Image(image) => {
                let (row, node) = self.node(image)?;
                (node, self.kept_profile(&row)?)
            }
            NodeRef::Volume(volume) => (disk(self.store.settled_disk(volume, None)?), Vec::new()),
            NodeRef::Snapshot { volume, snapshot } => {
                (disk(self.store.settled_disk(volume, Some(snapshot))?), Vec::new())
            }
        };
        self.fetcher.fill(&self.store, &node, &profile, bytes_per_second, watcher)
    }

    /// Brings what is usually read first of an image, and nothing else. For a thread of its own, too.
    pub fn prefetch_profile(&self, image: &str) -> Result<(), RemoteError> {
        let (row, _) = self.node(image)?;
        let profile = self.kept_profile(&row)?;
        self.fetcher.fill(&self.store, &Node::default(), &profile, None, &mut |_| Ok(()))
    }

    /// Whether the remote store has the image, as far as is known here.
    pub fn has(&self, image: &str) -> Result<bool, RemoteError> {
        self.fetcher.knows(&self.node(image)?.0.node)
    }

    fn kept_profile(&self, row: &ImageRow) -> Result<Vec<Name>, RemoteError> {
        let path = layout::path(layout::PROFILES, row.node);
        match self.client.find(&path)? {
            Some(bytes) => layout::read_profile(&path, &bytes),
            None => Ok(Vec::new()),
        }
    }

    /// Keeps, beside the image there, what was read of it until now and in which order: the next one who attaches it gets that first.
    pub fn save_profile(&self, image: &str) -> Result<(), RemoteError> {
        let (row, _) = self.node(image)?;
        self.client.put(&layout::path(layout::PROFILES, row.node), &layout::profile_object(&self.profile()))
    }

    /// The names of what somebody waited for, in the order in which it was asked for.
    pub fn profile(&self) -> Vec<Name> {
        self.fetcher.profile()
    }

    /// Bytes that came from there.
    pub fn fetched_bytes(&self) -> u64 {
        self.fetcher.fetched_bytes()
    }

    fn node(&self, image: &str) -> Result<(ImageRow, Node), RemoteError> {
        Ok(self.store.image(image)?)
    }
}
