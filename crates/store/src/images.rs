//! Images: nodes that instances start from, and disks and files brought into the store and out of it.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::catalog::{ImageRow, Replace, VolumeRow, check_name};
use crate::disk::SECTOR_LEN;
use crate::domain::OPEN_DOMAIN;
use crate::error::{Result, StoreError};
use crate::format::{self, Extent, FormatError, Source};
use crate::id::Id;
use crate::name::Name;
use crate::node::{Node, Tree};
use crate::store::{Batch, Store};
use crate::tree::reader::TreeReader;
use crate::tree::{self, FAN_OUT, Root};
use crate::upkeep::collect::{Step, Watcher};
use crate::volume::volumes::{CHUNK_LEN_DEFAULT, Content};
use crate::volume::{check_capacity, now_ns};

/// Threads that read and pack at a time: two for each core, of which one waits for the disk; and at most.
const THREADS_PER_CORE: usize = 2;
const THREADS_MAX: usize = 8;

/// A node that is not in the store yet, and holds its parts until it is.
pub struct NewNode {
    store: Arc<Store>,
    batch: Batch,
    node: Node,
    domain: u32,
}

impl Store {
    /// Begins a node. What is added to it is kept from garbage collections; nothing of it stays unless it gets a name.
    pub fn new_node(self: &Arc<Self>, facts: BTreeMap<String, String>) -> Result<NewNode> {
        self.new_node_in(facts, None)
    }

    /// Begins a node of a domain.
    pub fn new_node_in(self: &Arc<Self>, facts: BTreeMap<String, String>, domain: Option<&str>) -> Result<NewNode> {
        let domain = domain.map_or(Ok(OPEN_DOMAIN), |domain| self.usable_domain(domain).map(|row| row.id))?;
        let node = Node { created_ns: now_ns(), facts, ..Node::default() };
        Ok(NewNode { store: self.clone(), batch: self.batch_in(self.unlocked(domain)?)?, node, domain })
    }

    /// All images, by name, with their nodes.
    pub fn images(&self) -> Result<Vec<(ImageRow, Node)>> {
        let rows = self.catalog().images()?;
        rows.into_iter().map(|row| self.load_node(&row.node).map(|node| (row, node))).collect()
    }

    pub fn image(&self, name: &str) -> Result<(ImageRow, Node)> {
        let row = self.catalog().image(name)?;
        let node = self.load_checked_node(&row.node)?;
        Ok((row, node))
    }

    /// Makes a volume in a domain, or in the open one, whose content begins as that of a volume, snapshot or image of another. What is shared with
    /// that is nothing: all of it is read, and stored anew.
    pub fn copy_volume(
        self: &Arc<Self>,
        name: &str,
        content: &Content<'_>,
        domain: Option<&str>,
        watcher: Watcher<'_>,
    ) -> Result<VolumeRow> {
        check_name("volume", name)?;
        if self.volume(name).is_ok() {
            return Err(StoreError::Exists { what: "volume", name: name.to_owned() });
        }
        // Settling waits for a volume's thread, which makes batches of its own.
        let settled = match content {
            Content::Zeros { .. } => return self.create_volume_in(name, content, domain),
            Content::Snapshot(snapshot) => Some(self.settled_root(snapshot)?),
            Content::Image(_) => None,
        };
        let mut node = self.new_node_in(BTreeMap::new(), domain)?;
        // What is read is kept from garbage collections by the batch, if it is there now.
        let source = match (content, settled) {
            (Content::Snapshot(snapshot), Some(root)) => {
                let now = self.catalog().snapshot_by_id(snapshot.id)?;
                now.ok_or_else(|| StoreError::NotFound { what: "snapshot", name: snapshot.name.clone() })?;
                let (len_bytes, chunk_len) = (snapshot.capacity_bytes, snapshot.chunk_len);
                Tree { name: name.to_owned(), root, len_bytes, chunk_len, domain: snapshot.domain }
            }
            (Content::Image(image), _) => self.first_disk(image)?,
            _ => unreachable!("both were looked at above"),
        };
        check_capacity(source.len_bytes)?;
        let copy = node.import(name, &TreeSource::new(self, &source), source.chunk_len, watcher)?;
        node.batch.sync()?;
        let row = VolumeRow {
            id: Id::random(),
            name: name.to_owned(),
            created_ns: now_ns(),
            domain: copy.domain,
            chunk_len: copy.chunk_len,
            capacity_bytes: copy.len_bytes,
            root: copy.root,
            origin: None,
        };
        self.catalog().add_volume(&row)?;
        drop(node);
        self.tidy()?;
        Ok(row)
    }

    /// The disk of an image.
    pub(crate) fn first_disk(&self, image: &str) -> Result<Tree> {
        let (_, node) = self.image(image)?;
        let disk = node.disks.into_iter().next();
        disk.ok_or_else(|| StoreError::Refused(format!("image {image} has no disk")))
    }

    /// Takes the image's name away. What volumes need of it stays.
    pub fn remove_image(&self, name: &str) -> Result<()> {
        self.catalog().remove_image(name)
    }

    /// A file of a node, whole.
    pub fn read_file(&self, file: &Tree) -> Result<Vec<u8>> {
        let mut bytes = vec![0; file.len_bytes as usize];
        let mut reader = TreeReader::new(self, file.root, file.chunk_len as usize, file.domain);
        for (index, part) in bytes.chunks_mut(file.chunk_len as usize).enumerate() {
            reader.read(index as u64, 0, part)?;
        }
        Ok(bytes)
    }
}

impl NewNode {
    /// Adds a disk. One whose last sector is not whole gets zeros behind it.
    pub fn add_disk(&mut self, name: &str, source: &dyn Source, watcher: Watcher<'_>) -> Result<()> {
        let len_bytes = source.len().next_multiple_of(SECTOR_LEN);
        check_capacity(len_bytes)?;
        let tree = self.import(name, source, CHUNK_LEN_DEFAULT, watcher)?;
        self.node.disks.push(Tree { len_bytes, ..tree });
        Ok(())
    }

    /// Adds a disk that the store has.
    pub fn add_tree(&mut self, tree: Tree) -> Result<()> {
        if tree.domain != self.domain {
            return Err(StoreError::Refused(format!(
                "disk {} is in another domain than what it is to be part of",
                tree.name
            )));
        }
        self.node.disks.push(tree);
        Ok(())
    }

    /// Adds a file.
    pub fn add_file(&mut self, name: &str, source: &dyn Source, watcher: Watcher<'_>) -> Result<()> {
        let tree = self.import(name, source, CHUNK_LEN_DEFAULT, watcher)?;
        self.node.files.push(tree);
        Ok(())
    }

    pub fn set_parent(&mut self, parent: Name) {
        self.node.parent = Some(parent);
    }

    /// Puts the node into the store under an image's name.
    pub fn save_as_image(mut self, name: &str, replace: Replace) -> Result<ImageRow> {
        check_name("image", name)?;
        let node = self.node.put(&mut self.batch)?;
        self.batch.sync()?;
        let row = ImageRow { name: name.to_owned(), created_ns: self.node.created_ns, node };
        self.store.catalog().add_image(&row, replace)?;
        drop(self.batch);
        self.store.tidy()?;
        Ok(row)
    }

    /// Brings a disk into the store: threads take a leaf's worth of it at a time, read, hash and pack.
    fn import(&mut self, name: &str, source: &dyn Source, chunk_len: u32, watcher: Watcher<'_>) -> Result<Tree> {
        let chunks = source.len().div_ceil(u64::from(chunk_len));
        let leaves = chunks.div_ceil(FAN_OUT as u64);
        let import = Import {
            source,
            chunk_len: chunk_len as usize,
            next: AtomicU64::new(0),
            leaves,
            failed: AtomicBool::new(false),
        };
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = (threads * THREADS_PER_CORE).min(THREADS_MAX);
        let mut changes = Vec::new();
        let (send, receive) = std::sync::mpsc::sync_channel(threads * 2);
        let domain = self.store.unlocked(self.domain)?;
        let batches = (0..threads).map(|_| self.store.batch_in(domain.clone())).collect::<Result<Vec<_>>>()?;
        std::thread::scope(|scope| {
            for batch in batches {
                let (import, send) = (&import, send.clone());
                scope.spawn(move || import.work(batch, &send));
            }
            drop(send);
            let mut done = 0;
            let mut outcome = Ok(());
            for part in receive {
                let seen = part.and_then(|part: Vec<(u64, Name)>| {
                    changes.extend(part);
                    done += 1;
                    let total = source.len();
                    let bytes = (done * FAN_OUT as u64 * u64::from(chunk_len)).min(total);
                    watcher(Step { what: "importing", done: bytes, total })
                });
                if seen.is_err() && outcome.is_ok() {
                    import.failed.store(true, Ordering::Relaxed);
                    outcome = seen;
                }
            }
            outcome
        })?;
        changes.sort_unstable_by_key(|&(chunk, _)| chunk);
        let root = tree::update(&mut self.batch, Root::empty(chunks), &changes)?;
        Ok(Tree { name: name.to_owned(), root, len_bytes: source.len(), chunk_len, domain: self.domain })
    }
}

/// A disk that several threads bring into the store.
struct Import<'a> {
    source: &'a dyn Source,
    chunk_len: usize,
    /// The next leaf that nobody has taken.
    next: AtomicU64,
    leaves: u64,
    failed: AtomicBool,
}

type Part = Result<Vec<(u64, Name)>>;

impl Import<'_> {
    fn work(&self, mut batch: Batch, send: &std::sync::mpsc::SyncSender<Part>) {
        let mut bytes = vec![0; FAN_OUT * self.chunk_len];
        loop {
            let leaf = self.next.fetch_add(1, Ordering::Relaxed);
            if leaf >= self.leaves || self.failed.load(Ordering::Relaxed) {
                return;
            }
            if send.send(self.leaf(&mut batch, leaf, &mut bytes)).is_err() {
                return;
            }
        }
    }

    /// Stores the chunks of a leaf that are not zeros.
    fn leaf(&self, batch: &mut Batch, leaf: u64, bytes: &mut [u8]) -> Part {
        let first = leaf * FAN_OUT as u64;
        let start = first * self.chunk_len as u64;
        let len = (FAN_OUT * self.chunk_len) as u64;
        let end = (start + len).min(self.source.len());
        // Bytes of the leaf that are known.
        let mut known = 0;
        let mut at = start;
        while at < end {
            let extent = self.source.extent_at(at, end - at)?;
            let from = (at - start) as usize;
            at += extent.len;
            if extent.content == format::Content::Data {
                bytes[known..from].fill(0);
                known = from + extent.len as usize;
                self.source.read_at(start + from as u64, &mut bytes[from..known])?;
            }
        }
        // What is behind them is a hole, and often the whole leaf is.
        let data_end = known.next_multiple_of(self.chunk_len);
        bytes[known..data_end].fill(0);
        let stored = batch.put_chunks(bytes[..data_end].chunks(self.chunk_len))?;
        Ok((first..).zip(stored).filter(|(_, name)| !name.is_none()).collect())
    }
}

/// A disk or file of the store as a source of an export.
pub struct TreeSource {
    store: Arc<Store>,
    tree: Tree,
    /// What was asked last, as an export asks for neighbours one after the other.
    parts: Mutex<Vec<std::ops::Range<u64>>>,
    window: AtomicU64,
}

/// Bytes of a disk whose parts are found together.
const WINDOW_LEN: u64 = 1 << 30;

impl TreeSource {
    pub fn new(store: &Arc<Store>, tree: &Tree) -> Self {
        TreeSource {
            store: store.clone(),
            tree: tree.clone(),
            parts: Mutex::default(),
            window: AtomicU64::new(u64::MAX),
        }
    }

    fn failure(&self, error: StoreError) -> FormatError {
        FormatError::Io {
            file: self.store.folder().display().to_string(),
            act: format!("read {}", self.tree.name),
            source: io::Error::other(error),
        }
    }
}

impl Source for TreeSource {
    fn len(&self) -> u64 {
        self.tree.len_bytes
    }

    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> Result<(), FormatError> {
        let chunk_len = self.tree.chunk_len as usize;
        let mut reader = TreeReader::new(&self.store, self.tree.root, chunk_len, self.tree.domain);
        let (mut at, mut rest) = (offset, bytes);
        while !rest.is_empty() {
            let from = (at % chunk_len as u64) as usize;
            let len = (chunk_len - from).min(rest.len());
            let (part, behind) = rest.split_at_mut(len);
            reader.read(at / chunk_len as u64, from, part).map_err(|error| self.failure(error))?;
            at += len as u64;
            rest = behind;
        }
        Ok(())
    }

    fn extent_at(&self, offset: u64, limit: u64) -> Result<Extent, FormatError> {
        let window = offset / WINDOW_LEN;
        let end = ((window + 1) * WINDOW_LEN).min(self.tree.len_bytes);
        let mut parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        if self.window.load(Ordering::Relaxed) != window {
            let nothing = Root { name: Name::NONE, levels: self.tree.root.levels };
            parts.clear();
            let found = self.store.differences(
                [nothing, self.tree.root],
                self.tree.chunk_len,
                window * WINDOW_LEN..end,
                &mut |range| {
                    parts.push(range);
                    Ok(())
                },
            );
            found.map_err(|error| self.failure(error))?;
            self.window.store(window, Ordering::Relaxed);
        }
        let next = parts.partition_point(|part| part.end <= offset);
        let (content, stop) = match parts.get(next) {
            Some(part) if part.start <= offset => (format::Content::Data, part.end),
            Some(part) => (format::Content::Zeros, part.start),
            None => (format::Content::Zeros, end),
        };
        Ok(Extent { len: (stop.min(end) - offset).min(limit), content })
    }
}
