//! Which records are needed: everything that can be reached from volumes, snapshots and images.
//!
//! A node of a tree is looked into once, however many trees share it: the cost is that of what is different, not of the number of
//! snapshots. What is remembered is four bytes a chunk.

use std::collections::{BTreeMap, HashSet};

use crate::error::{Result, StoreError};
use crate::name::Name;
use crate::records::cache::{NameHasher, NameMap};
use crate::records::segment::{Location, SegmentNumber};
use crate::remote::Elsewhere;
use crate::store::{Local, Store};
use crate::tree::{self, NodeSource, Root};
use crate::volume::head::Head;

/// A tree that something keeps, and what that is.
#[derive(Debug, Clone)]
pub(crate) struct Kept {
    pub owner: String,
    pub root: Root,
    pub chunk_len: u32,
}

/// What is kept: trees, and nodes of life trees.
#[derive(Debug, Default)]
pub(crate) struct Roots {
    pub trees: Vec<Kept>,
    pub nodes: Vec<(String, Name)>,
}

impl Store {
    /// What volumes, snapshots and images keep now.
    pub(crate) fn roots(&self) -> Result<Roots> {
        let mut roots = Roots::default();
        for volume in self.catalog().volumes()? {
            // A volume that was opened has a head, and what it began as is of no account any more.
            let root = Head::peek(&self.volume_folder(volume.id))?.map_or(volume.root, |head| head.root);
            let owner = format!("volume {}", volume.name);
            roots.trees.push(Kept { owner, root, chunk_len: volume.chunk_len });
        }
        let names: BTreeMap<_, _> = self.catalog().volumes()?.into_iter().map(|row| (row.id, row.name)).collect();
        for snapshot in self.catalog().snapshots(None)? {
            let volume = names.get(&snapshot.volume).map_or("?", String::as_str);
            let owner = format!("snapshot {} of volume {volume}", snapshot.name);
            roots.nodes.extend(snapshot.node.map(|node| (owner.clone(), node)));
            roots.trees.extend(snapshot.root.map(|root| Kept { owner, root, chunk_len: snapshot.chunk_len }));
        }
        for image in self.catalog().images()? {
            roots.nodes.push((format!("image {}", image.name), image.node));
        }
        Ok(roots)
    }
}

type Names = HashSet<Name, std::hash::BuildHasherDefault<NameHasher>>;

/// A record that is needed and cannot be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lost {
    pub name: Name,
    /// Who needs it.
    pub owner: String,
    /// Where in the owner it is, if it is a chunk.
    pub offset: Option<u64>,
    pub why: String,
}

/// The marks that were set so far.
#[derive(Default)]
pub(crate) struct Marks {
    /// Nodes of life trees that were looked into.
    seen: Names,
    /// Offsets of needed records in each segment, in units of 64 bytes.
    needed: BTreeMap<SegmentNumber, Vec<u32>>,
    /// Chunks below each node of a tree that was looked into.
    chunks: NameMap<Name, u64>,
    /// Trees whose bytes were counted: who keeps them, and their roots.
    counted: HashSet<(String, Name)>,
    /// Bytes of all trees without zeros, what trees share counted for each.
    pub used_bytes: u64,
    pub lost: Vec<Lost>,
    elsewhere: Option<Elsewhere>,
    sorted: bool,
}

/// Lost records that are listed; of more there is only the number.
const LOST_MAX: usize = 1000;

impl Marks {
    /// No marks, and what is to count as being elsewhere.
    pub fn with_elsewhere(elsewhere: Elsewhere) -> Self {
        Marks { elsewhere: Some(elsewhere), ..Marks::default() }
    }

    /// Marks what roots need and was not marked before. `visited` hears of every node, so that whoever waits sees that it goes on.
    pub fn add(&mut self, store: &Store, roots: &Roots, visited: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        self.sorted = false;
        for (owner, name) in &roots.nodes {
            if !self.seen.insert(*name) {
                continue;
            }
            self.need(store, *name, owner, None)?;
            match store.load_node(name) {
                Ok(node) => {
                    for tree in node.trees() {
                        let kept = Kept { owner: owner.clone(), root: tree.root, chunk_len: tree.chunk_len };
                        self.add_tree(store, &kept, visited)?;
                    }
                }
                Err(error) => self.lose(*name, owner, None, &error),
            }
        }
        roots.trees.iter().try_for_each(|kept| self.add_tree(store, kept, visited))
    }

    fn add_tree(&mut self, store: &Store, kept: &Kept, visited: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        let chunks = self.add_part(store, kept, kept.root.name, kept.root.levels, 0, visited)?;
        if self.counted.insert((kept.owner.clone(), kept.root.name)) {
            self.used_bytes += chunks * u64::from(kept.chunk_len);
        }
        Ok(())
    }

    /// Marks a node of a tree and what is below it. Gives the chunks.
    fn add_part(
        &mut self,
        store: &Store,
        kept: &Kept,
        name: Name,
        level: u8,
        first: u64,
        visited: &mut dyn FnMut() -> Result<()>,
    ) -> Result<u64> {
        if name.is_none() {
            return Ok(0);
        }
        if let Some(&chunks) = self.chunks.get(&name) {
            return Ok(chunks);
        }
        visited()?;
        self.need(store, name, &kept.owner, None)?;
        let node = match Local(store).node(&name) {
            Ok(node) => node,
            Err(error) => {
                if !self.is_elsewhere(store, &name)? {
                    self.lose(name, &kept.owner, None, &error);
                }
                self.chunks.insert(name, 0);
                return Ok(0);
            }
        };
        let mut chunks = 0;
        for (child, chunk) in node.children.iter().zip((first..).step_by(tree::child_span(level) as usize)) {
            if child.is_none() {
                continue;
            }
            if level == 1 {
                chunks += 1;
                self.need(store, *child, &kept.owner, Some(chunk * u64::from(kept.chunk_len)))?;
            } else {
                chunks += self.add_part(store, kept, *child, level - 1, chunk, visited)?;
            }
        }
        self.chunks.insert(name, chunks);
        Ok(chunks)
    }

    fn need(&mut self, store: &Store, name: Name, owner: &str, offset: Option<u64>) -> Result<()> {
        // Of several copies the oldest one in a sealed segment is kept: others may not even be stable.
        let mut found = store.index().find_all(&name)?;
        if found.is_empty() {
            if self.is_elsewhere(store, &name)? {
                return Ok(());
            }
            store.index().refresh(store.catalog())?;
            found = store.index().find_all(&name)?;
        }
        match found.first() {
            Some(&location) => self.mark(location),
            None => self.lose(name, owner, offset, &StoreError::Missing { name }),
        }
        Ok(())
    }

    /// Whether a record that is not here is in a remote store of which an image is attached: it is not lost.
    pub fn is_elsewhere(&mut self, store: &Store, name: &Name) -> Result<bool> {
        let known = match &self.elsewhere {
            Some(known) => known,
            None => self.elsewhere.insert(Elsewhere::load(store)?),
        };
        Ok(known.contains(name))
    }

    fn mark(&mut self, location: Location) {
        self.needed.entry(location.segment()).or_default().push((location.offset() / 64) as u32);
    }

    fn lose(&mut self, name: Name, owner: &str, offset: Option<u64>, error: &StoreError) {
        if self.lost.len() < LOST_MAX {
            self.lost.push(Lost { name, owner: owner.to_owned(), offset, why: error.to_string() });
        }
    }

    /// The offsets of the needed records of a segment, in order.
    pub fn needed(&mut self, segment: SegmentNumber) -> &[u32] {
        if !self.sorted {
            for offsets in self.needed.values_mut() {
                offsets.sort_unstable();
                offsets.dedup();
            }
            self.sorted = true;
        }
        self.needed.get(&segment).map_or(&[], Vec::as_slice)
    }
}
