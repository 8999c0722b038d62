//! The side of a transfer that gets what it lacks, and leads.
//!
//! It compares names from the node down. What it has whole (a record and everything below it, which it finds out by looking, as an earlier
//! transfer may have been cut anywhere) is not asked for. All the while it holds a batch, so that what it found stays. Answers come in the order
//! of the requests: so it always knows which record comes next, and takes no other.

use std::collections::{HashSet, VecDeque};
use std::hash::BuildHasherDefault;
use std::io::{Read, Write};
use std::sync::Arc;

use super::wire::{BITS_LEN_MAX, Incoming, Link, Message, Want};
use super::{TransferError, Transferred};
use crate::catalog::{ImageRow, Replace};
use crate::domain::OPEN_DOMAIN;
use crate::error::{Result, StoreError};
use crate::name::{Kind, Name};
use crate::node::{Node, Tree};
use crate::records::cache::NameHasher;
use crate::records::record::{self, CONTENT_LEN_MAX, HEADER_LEN, Header};
use crate::store::{Batch, Store};
use crate::tree::{self, FAN_OUT, NODE_LEN, NodeSource, TreeNode};
use crate::upkeep::collect::{Step, Watcher};
use crate::volume::now_ns;

/// Bytes of content that were asked for and have not come: enough for 100 ms at a gigabit a second.
const WINDOW_BYTES_MAX: usize = 16 << 20;
/// Bytes of requests that may be unread: fewer than any pipe or socket holds, so that sending one never waits for the other side,
/// which may be waiting for us.
const WANT_BYTES_MAX: usize = 3 << 10;
/// Nodes of a level that are kept ready to be looked into.
const AHEAD: usize = 64;
/// Names of nodes that are remembered. Beyond, some may be looked at twice.
const NAMES_MAX: usize = 2 << 20;

/// Bytes of records after which the index is looked after: a look-up asks each of its parts.
const TIDY_BYTES: u64 = 128 << 20;

type NameSet = HashSet<Name, BuildHasherDefault<NameHasher>>;

/// A record that will come.
struct Expected {
    name: Name,
    what: What,
    /// Bytes of requests that the other side has read when this comes.
    want_bytes: usize,
}

#[derive(Clone, Copy)]
enum What {
    Node,
    /// A node of a tree, open at the other side under a handle.
    Tree {
        place: Place,
        handle: u32,
    },
    Chunk {
        len: u32,
    },
}

/// Where in a tree a node is.
#[derive(Clone, Copy)]
struct Place {
    level: u8,
    chunk_len: u32,
}

/// A node of a tree that is open at the other side, and is to be looked into.
struct Open {
    handle: u32,
    node: Arc<TreeNode>,
    place: Place,
}

pub(super) struct Sink<'a, S> {
    store: &'a Arc<Store>,
    link: &'a mut Link<S>,
    batch: Batch,
    record_bytes_max: u64,
    expected: VecDeque<Expected>,
    expected_bytes: usize,
    /// Chunks among what is expected.
    coming: NameSet,
    /// Bytes of requests that may be unread, and those among them that no expected record stands for yet.
    want_bytes: usize,
    want_bytes_unbound: usize,
    next_handle: u32,
    /// By level, the leaves at 1.
    open: [VecDeque<Open>; 9],
    /// Nodes of a level that will come.
    coming_nodes: [usize; 9],
    trees: VecDeque<(u16, Tree)>,
    /// Nodes of trees that are whole, or are being got.
    whole: NameSet,
    started: NameSet,
    bytes_done: u64,
    bytes_total: u64,
}

fn protocol(what: impl Into<String>) -> TransferError {
    TransferError::Protocol(what.into())
}

impl<'a, S: Read + Write> Sink<'a, S> {
    pub fn new(store: &'a Arc<Store>, link: &'a mut Link<S>, record_bytes_max: u64) -> Result<Self> {
        Ok(Sink {
            store,
            link,
            batch: store.batch()?,
            record_bytes_max,
            expected: VecDeque::new(),
            expected_bytes: 0,
            coming: NameSet::default(),
            want_bytes: 0,
            want_bytes_unbound: 0,
            next_handle: 1,
            open: Default::default(),
            coming_nodes: [0; 9],
            trees: VecDeque::new(),
            whole: NameSet::default(),
            started: NameSet::default(),
            bytes_done: 0,
            bytes_total: 0,
        })
    }

    /// Gets everything that is missing, and gives the node its name.
    pub fn run(mut self, image: &str, replace: Replace, watcher: Watcher<'_>) -> Result<ImageRow, TransferError> {
        let outcome = self.get(watcher).and_then(|node| {
            let added = self.batch.sync()?;
            tracing::debug!(image, ?added, "a transfer is complete");
            let row = ImageRow { name: image.to_owned(), created_ns: now_ns(), node };
            self.store.catalog().add_image(&row, replace)?;
            Ok(row)
        });
        match outcome {
            Ok(row) => {
                self.link.send(&Message::Done)?;
                self.link.flush()?;
                Ok(row)
            }
            Err(error) => {
                // What came serves the next try.
                if let Err(error) = self.batch.sync() {
                    tracing::warn!(%error, "what a transfer brought before it ended cannot be kept");
                }
                Err(self.link.tell(error))
            }
        }
    }

    fn get(&mut self, watcher: Watcher<'_>) -> Result<Name, TransferError> {
        let name = match self.link.receive()? {
            Incoming::Offer(name) => name,
            Incoming::Refused(why) => return Err(TransferError::Refused(why.to_owned())),
            _ => return Err(protocol("an offer was to come")),
        };
        self.begin(name)?;
        loop {
            self.ask()?;
            let Some(expected) = self.expected.pop_front() else { break };
            self.link.flush()?;
            self.take(&expected, watcher)?;
        }
        self.link.flush()?;
        Ok(name)
    }

    /// Opens the node, and gets it if it is not here.
    fn begin(&mut self, name: Name) -> Result<(), TransferError> {
        let ours = match self.has(&name)? {
            true => self.store.load_node(&name).ok(),
            false => None,
        };
        let open_only = ours.is_some();
        self.want(Want { handle: 0, open_only, last: true, bits: &[1] })?;
        self.next_handle = 2;
        match ours {
            Some(node) => self.add_trees(&node),
            None => {
                self.expect(name, What::Node);
                Ok(())
            }
        }
    }

    fn add_trees(&mut self, node: &Node) -> Result<(), TransferError> {
        for (index, tree) in node.trees().enumerate() {
            if index >= BITS_LEN_MAX * 8 {
                return Err(protocol("a node with more trees than can be asked for"));
            }
            let chunks = tree.len_bytes.div_ceil(u64::from(tree.chunk_len));
            if tree.root.levels != tree::levels(chunks) {
                return Err(protocol(format!("tree {:?} has not the height of its size", tree.name)));
            }
            self.bytes_total += tree.len_bytes;
            self.trees.push_back((index as u16, tree.clone()));
        }
        Ok(())
    }

    // Asking

    /// Asks for as much as may be on its way.
    fn ask(&mut self) -> Result<(), TransferError> {
        loop {
            let nothing_comes = self.expected.is_empty();
            if !nothing_comes && (self.expected_bytes >= WINDOW_BYTES_MAX || self.want_bytes >= WANT_BYTES_MAX) {
                return Ok(());
            }
            // The lowest level first: what is open at a time stays little, and chunks come in the order of the disk.
            let level = (1..self.open.len()).find(|&level| {
                !self.open[level].is_empty()
                    && (level == 1 || self.open[level - 1].len() + self.coming_nodes[level - 1] < AHEAD)
            });
            if let Some(level) = level
                && let Some(open) = self.open[level].pop_front()
            {
                match level {
                    1 => self.ask_for_chunks(&open)?,
                    _ => self.ask_for_nodes(&open)?,
                }
                continue;
            }
            let Some((_, tree)) = self.trees.front() else { return Ok(()) };
            let level = usize::from(tree.root.levels);
            if self.open[level].len() + self.coming_nodes[level] >= AHEAD {
                return Ok(());
            }
            self.ask_for_tree()?;
        }
    }

    fn ask_for_tree(&mut self) -> Result<(), TransferError> {
        let Some((index, tree)) = self.trees.pop_front() else { return Ok(()) };
        let place = Place { level: tree.root.levels, chunk_len: tree.chunk_len };
        let mut bits = vec![0; usize::from(index) / 8 + 1];
        bits[usize::from(index) / 8] |= 1 << (index % 8);
        let last = self.trees.is_empty();
        match self.what_to_do(&tree.root.name, place)? {
            Todo::Nothing => {
                self.done(tree.len_bytes);
                if last {
                    self.want(Want { handle: 1, open_only: false, last, bits: &[] })?;
                }
            }
            Todo::Open(node) => {
                self.want(Want { handle: 1, open_only: true, last, bits: &bits })?;
                self.opened(node, place)?;
            }
            Todo::Get => {
                self.want(Want { handle: 1, open_only: false, last, bits: &bits })?;
                self.expect_node(tree.root.name, place)?;
            }
        }
        Ok(())
    }

    fn ask_for_nodes(&mut self, open: &Open) -> Result<(), TransferError> {
        let place = Place { level: open.place.level - 1, ..open.place };
        let (mut opening, mut getting) = ([0; FAN_OUT / 8], [0; FAN_OUT / 8]);
        let mut opened = Vec::new();
        let mut missing = Vec::new();
        for (index, name) in open.node.children.iter().enumerate() {
            let (byte, bit) = (index / 8, 1 << (index % 8));
            match self.what_to_do(name, place)? {
                Todo::Nothing => self.done(span_bytes(place)),
                Todo::Open(node) => {
                    opening[byte] |= bit;
                    opened.push(node);
                }
                Todo::Get => {
                    getting[byte] |= bit;
                    missing.push(*name);
                }
            }
        }
        if !opened.is_empty() {
            self.want(Want { handle: open.handle, open_only: true, last: missing.is_empty(), bits: &opening })?;
            opened.into_iter().try_for_each(|node| self.opened(node, place))?;
        }
        if !missing.is_empty() {
            self.want(Want { handle: open.handle, open_only: false, last: true, bits: &getting })?;
            missing.into_iter().try_for_each(|name| self.expect_node(name, place))?;
        } else if opening == [0; FAN_OUT / 8] {
            self.want(Want { handle: open.handle, open_only: false, last: true, bits: &[] })?;
        }
        Ok(())
    }

    fn ask_for_chunks(&mut self, open: &Open) -> Result<(), TransferError> {
        let mut bits = [0; FAN_OUT / 8];
        let mut missing = Vec::new();
        for (index, name) in open.node.children.iter().enumerate() {
            if name.is_none() || self.coming.contains(name) || self.has(name)? {
                self.done(u64::from(open.place.chunk_len));
                continue;
            }
            bits[index / 8] |= 1 << (index % 8);
            self.coming.insert(*name);
            missing.push(*name);
        }
        let bits: &[u8] = if missing.is_empty() { &[] } else { &bits };
        self.want(Want { handle: open.handle, open_only: false, last: true, bits })?;
        for name in missing {
            self.expect(name, What::Chunk { len: open.place.chunk_len });
        }
        Ok(())
    }

    fn want(&mut self, want: Want<'_>) -> Result<(), TransferError> {
        let before = self.link.unsent_len();
        self.link.send(&Message::Want(want))?;
        let bytes = self.link.unsent_len() - before;
        self.want_bytes += bytes;
        self.want_bytes_unbound += bytes;
        Ok(())
    }

    fn expect(&mut self, name: Name, what: What) {
        let want_bytes = std::mem::take(&mut self.want_bytes_unbound);
        self.expected.push_back(Expected { name, what, want_bytes });
        self.expected_bytes += content_len(what);
    }

    fn expect_node(&mut self, name: Name, place: Place) -> Result<(), TransferError> {
        let handle = self.new_handle()?;
        self.coming_nodes[usize::from(place.level)] += 1;
        self.expect(name, What::Tree { place, handle });
        Ok(())
    }

    fn opened(&mut self, node: Arc<TreeNode>, place: Place) -> Result<(), TransferError> {
        let handle = self.new_handle()?;
        self.open[usize::from(place.level)].push_back(Open { handle, node, place });
        Ok(())
    }

    /// The other side counts the nodes that it opens just so.
    fn new_handle(&mut self) -> Result<u32, TransferError> {
        let handle = self.next_handle;
        self.next_handle = handle.checked_add(1).ok_or_else(|| protocol("more nodes than can be counted"))?;
        Ok(handle)
    }

    // Knowing

    fn has(&self, name: &Name) -> Result<bool> {
        Ok(self.store.find_for_reuse(name)?.is_some())
    }

    fn node_here(&self, name: &Name) -> Result<Option<Arc<TreeNode>>> {
        if !self.has(name)? {
            return Ok(None);
        }
        match self.store.node(name) {
            Ok(node) => Ok(Some(node)),
            // A copy that cannot be read is as good as none.
            Err(StoreError::Damaged { .. } | StoreError::Missing { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn what_to_do(&mut self, name: &Name, place: Place) -> Result<Todo> {
        if name.is_none() || self.started.contains(name) || self.is_whole(name, place.level)? {
            return Ok(Todo::Nothing);
        }
        remember(&mut self.started, *name);
        Ok(self.node_here(name)?.map_or(Todo::Get, Todo::Open))
    }

    /// Whether a node and everything below it is here.
    fn is_whole(&mut self, name: &Name, level: u8) -> Result<bool> {
        if self.whole.contains(name) {
            return Ok(true);
        }
        let Some(node) = self.node_here(name)? else { return Ok(false) };
        for child in node.children.iter().filter(|child| !child.is_none()) {
            let here = match level {
                1 => self.has(child)?,
                _ => self.is_whole(child, level - 1)?,
            };
            if !here {
                return Ok(false);
            }
        }
        remember(&mut self.whole, *name);
        Ok(true)
    }

    // Getting

    /// Takes the next record.
    fn take(&mut self, expected: &Expected, watcher: Watcher<'_>) -> Result<(), TransferError> {
        self.want_bytes -= expected.want_bytes;
        self.expected_bytes -= content_len(expected.what);
        let bytes = match self.link.receive()? {
            Incoming::Record(bytes) => bytes,
            Incoming::Refused(why) => return Err(TransferError::Refused(why.to_owned())),
            _ => return Err(protocol("a record was to come")),
        };
        let len = bytes.len() as u64;
        let (header, content) =
            check(self.store, expected, bytes).map_err(|what| protocol(format!("{}: {what}", expected.name)))?;
        self.batch.put_packed(&header, &bytes[HEADER_LEN..])?;
        let Transferred { records, record_bytes, .. } = &mut self.link.transferred;
        *records += 1;
        *record_bytes += len;
        let tidy = *record_bytes / TIDY_BYTES != (*record_bytes - len) / TIDY_BYTES;
        if *record_bytes > self.record_bytes_max {
            return Err(StoreError::Refused(format!("more than {} bytes", self.record_bytes_max)).into());
        }
        if tidy {
            self.store.tidy()?;
        }
        match expected.what {
            What::Node => {
                let node = Node::from_bytes(&content).map_err(protocol)?;
                if node.trees().any(|tree| tree.domain != OPEN_DOMAIN) {
                    return Err(protocol("a node of an encrypted domain".to_owned()));
                }
                self.add_trees(&node)?;
            }
            What::Tree { place, handle } => {
                let node =
                    TreeNode::from_bytes(&content, OPEN_DOMAIN).ok_or_else(|| tree::not_a_node(&expected.name))?;
                let level = usize::from(place.level);
                self.coming_nodes[level] -= 1;
                self.open[level].push_back(Open { handle, node: Arc::new(node), place });
            }
            What::Chunk { len } => {
                self.coming.remove(&expected.name);
                self.done(u64::from(len));
            }
        }
        let done = self.bytes_done.min(self.bytes_total);
        watcher(Step { what: "receiving", done, total: self.bytes_total })?;
        Ok(())
    }

    fn done(&mut self, bytes: u64) {
        self.bytes_done = self.bytes_done.saturating_add(bytes);
    }
}

/// What a node of a tree needs.
enum Todo {
    Nothing,
    /// It is here, and something below it is not.
    Open(Arc<TreeNode>),
    Get,
}

/// Bytes of a disk below a node.
fn span_bytes(place: Place) -> u64 {
    (FAN_OUT as u64).pow(u32::from(place.level)).saturating_mul(u64::from(place.chunk_len))
}

fn content_len(what: What) -> usize {
    match what {
        What::Node => CONTENT_LEN_MAX,
        What::Tree { .. } => NODE_LEN,
        What::Chunk { len } => len as usize,
    }
}

fn remember(names: &mut NameSet, name: Name) {
    if names.len() >= NAMES_MAX {
        names.clear();
    }
    names.insert(name);
}

/// The header and content of the record that bytes of a peer are, if it is the one that is expected and holds what its name says.
fn check(store: &Store, expected: &Expected, bytes: &[u8]) -> Result<(Header, Arc<[u8]>), String> {
    let (header, packed) = record::split(bytes)?;
    if HEADER_LEN + packed.len() != bytes.len() {
        return Err("a record with something behind it".to_owned());
    }
    let kind = match expected.what {
        What::Node => Kind::Node,
        What::Tree { .. } => Kind::Tree,
        What::Chunk { .. } => Kind::Data,
    };
    let len_fits = match expected.what {
        What::Node => true,
        _ => header.content_len as usize == content_len(expected.what),
    };
    if header.kind != kind || header.name != expected.name || !len_fits {
        return Err("another record came".to_owned());
    }
    if header.domain != 0 {
        return Err("a record that is sealed for another domain".to_owned());
    }
    let content = record::unpack(&header, packed)?;
    if store.namer().name(kind, &content) != expected.name {
        return Err("a record that holds something else than its name says".to_owned());
    }
    Ok((header, content))
}
