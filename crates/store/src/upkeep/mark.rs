//! Which records are needed: everything that can be reached from volumes, snapshots and images, and what the logs of volumes name.
//!
//! A node of a tree is looked into once, however many trees share it: the cost is that of what is different, not of the number of
//! snapshots. Of a snapshot itself there is a row of the catalog and a record with its node; those records are looked up and read in the
//! order in which they lie. What is remembered is four bytes a chunk.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::sync::Arc;

use crate::domain::is_sealed;
use crate::error::{Result, StoreError};
use crate::id::Id;
use crate::name::Name;
use crate::node::Node;
use crate::records::cache::{NameHasher, NameMap};
use crate::records::record;
use crate::records::segment::{self, Location, SegmentNumber};
use crate::remote::Elsewhere;
use crate::store::{Local, Store};
use crate::tree::{self, NodeSource, Root};
use crate::volume::head::Head;
use crate::volume::log_read::{NamedChunks, read_named_chunks};
use crate::volume::log_record::Position;

/// Who keeps something. What it is called is looked up for those who ask: of snapshots there can be very many.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Owner {
    /// A volume or an image, as people call it.
    Named(String),
    /// The row of a snapshot.
    Snapshot(i64),
}

impl Owner {
    /// The owner as people call it.
    pub fn name(&self, store: &Store) -> Result<Cow<'_, str>> {
        Ok(match self {
            Owner::Named(name) => name.into(),
            Owner::Snapshot(row) => match store.catalog().snapshot_and_volume(*row)? {
                Some((snapshot, volume)) => format!("snapshot {snapshot} of volume {volume}").into(),
                None => "a snapshot that was removed meanwhile".into(),
            },
        })
    }
}

/// A tree that something keeps, and what that is.
#[derive(Debug, Clone)]
pub(crate) struct Kept {
    pub owner: Owner,
    pub root: Root,
    pub chunk_len: u32,
}

/// What is kept: trees, and nodes of life trees.
#[derive(Debug, Default)]
pub(crate) struct Roots {
    pub trees: Vec<Kept>,
    pub nodes: Vec<(Owner, Name)>,
    pub chunks: Vec<KeptChunks>,
}

/// Chunks that the log of a volume names, which are not in its tree yet.
#[derive(Debug)]
pub(crate) struct KeptChunks {
    pub owner: Owner,
    /// In the volume.
    pub offset: u64,
    pub chunk_len: u32,
    pub names: Arc<[Name]>,
    /// They must be there; others a crash may have taken.
    pub promised: bool,
}

impl KeptChunks {
    /// The chunks and where they lie in the volume.
    pub fn chunks(&self) -> impl Iterator<Item = (u64, &Name)> {
        let offsets = (self.offset..).step_by(self.chunk_len as usize);
        offsets.zip(self.names.iter()).filter(|(_, name)| !name.is_none())
    }
}

/// Up to where the logs of volumes were looked at, each under the epoch that its head had.
pub(crate) type LogsSeen = BTreeMap<Id, (u32, Position)>;

impl Store {
    /// What volumes, snapshots and images keep now; of what logs keep that which lies behind what was `seen`.
    pub(crate) fn roots(&self, seen: &mut LogsSeen) -> Result<Roots> {
        // Before volumes: a clone of a snapshot that is not there any more is then among those.
        let mut snapshots = Roots::default();
        self.catalog().for_each_snapshot(|row, root, chunk_len, node| {
            let owner = Owner::Snapshot(row);
            snapshots.nodes.extend(node.map(|node| (owner.clone(), node)));
            snapshots.trees.extend(root.map(|root| Kept { owner, root, chunk_len }));
        })?;
        let mut roots = Roots::default();
        for volume in self.catalog().volumes()? {
            // A volume that was opened has a head, and what it began as is of no account any more.
            let folder = self.volume_folder(volume.id);
            let head = Head::peek(&folder)?;
            let owner = Owner::Named(format!("volume {}", volume.name));
            if let Some(head) = &head {
                let start = match seen.get(&volume.id) {
                    Some((epoch, at)) if *epoch == head.epoch && at.sequence >= head.position.sequence => *at,
                    _ => head.position,
                };
                let (found, mut end, promised) = read_named_chunks(&folder, volume.id, volume.chunk_len.into(), start)?;
                for NamedChunks { at, offset, names } in found {
                    let kept = KeptChunks {
                        owner: owner.clone(),
                        offset,
                        chunk_len: volume.chunk_len,
                        names,
                        promised: at.sequence < promised,
                    };
                    // It may be one that does not count, and others may come in its place.
                    if at.sequence < end.sequence && !self.knows_all(kept.chunks().map(|(_, name)| name))? {
                        end = at;
                    }
                    roots.chunks.push(kept);
                }
                seen.insert(volume.id, (head.epoch, end));
            }
            let root = head.map_or(volume.root, |head| head.root);
            roots.trees.push(Kept { owner, root, chunk_len: volume.chunk_len });
        }
        roots.trees.append(&mut snapshots.trees);
        roots.nodes.append(&mut snapshots.nodes);
        for image in self.catalog().images()? {
            roots.nodes.push((Owner::Named(format!("image {}", image.name)), image.node));
        }
        Ok(roots)
    }
}

impl Store {
    fn knows_all<'n>(&self, mut names: impl Iterator<Item = &'n Name>) -> Result<bool> {
        names.try_fold(true, |all, name| Ok(all && !self.index().find(name)?.is_empty()))
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
    counted: HashSet<(Owner, Name)>,
    /// Bytes of all trees without zeros, what trees share counted for each.
    pub used_bytes: u64,
    pub lost: Vec<Lost>,
    pub logs: LogsSeen,
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
        let mut nodes: Vec<&(Owner, Name)> = roots.nodes.iter().filter(|(_, name)| self.seen.insert(*name)).collect();
        nodes.sort_unstable_by_key(|(_, name)| *name);
        self.add_nodes(store, &nodes, visited)?;
        roots.trees.iter().try_for_each(|kept| self.add_tree(store, kept, visited))?;
        for kept in &roots.chunks {
            for (offset, name) in kept.chunks() {
                if kept.promised || store.knows_all(std::iter::once(name))? {
                    self.need(store, *name, &kept.owner, Some(offset))?;
                }
            }
        }
        Ok(())
    }

    /// Marks nodes of life trees, which come in the order of their names, and what they keep.
    fn add_nodes(
        &mut self,
        store: &Store,
        nodes: &[&(Owner, Name)],
        visited: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        let names: Vec<Name> = nodes.iter().map(|(_, name)| *name).collect();
        let copies = store.index().first_copies(&names)?;
        let mut places: Vec<(Option<Location>, &(Owner, Name))> =
            copies.into_iter().zip(nodes.iter().copied()).collect();
        // Neighbours were made one after the other, and are read together.
        places.sort_unstable_by_key(|(location, _)| *location);
        let mut reader = NodeReader::new(store);
        for (location, (owner, name)) in places {
            let known = match location {
                Some(location) => {
                    self.mark(location);
                    reader.read(name, location)
                }
                None => {
                    self.need(store, *name, owner, None)?;
                    None
                }
            };
            match known.map_or_else(|| store.load_node(name), Ok) {
                Ok(node) => {
                    for tree in node.trees() {
                        let kept = Kept { owner: owner.clone(), root: tree.root, chunk_len: tree.chunk_len };
                        self.add_tree(store, &kept, visited)?;
                    }
                }
                Err(error) => self.lose(store, *name, owner, None, &error)?,
            }
        }
        Ok(())
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
                    self.lose(store, name, &kept.owner, None, &error)?;
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

    fn need(&mut self, store: &Store, name: Name, owner: &Owner, offset: Option<u64>) -> Result<()> {
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
            Some(&location) => {
                self.mark(location);
                Ok(())
            }
            None => self.lose(store, name, owner, offset, &StoreError::Missing { name }),
        }
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

    fn lose(
        &mut self,
        store: &Store,
        name: Name,
        owner: &Owner,
        offset: Option<u64>,
        error: &StoreError,
    ) -> Result<()> {
        if self.lost.len() < LOST_MAX {
            let owner = owner.name(store)?.into_owned();
            self.lost.push(Lost { name, owner, offset, why: error.to_string() });
        }
        Ok(())
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

/// Reads records of nodes that come in the order in which they lie.
struct NodeReader<'a> {
    store: &'a Store,
    segment: Option<(SegmentNumber, Arc<File>)>,
    /// Where in the segment `bytes` begins.
    start: u64,
    bytes: Vec<u8>,
}

/// Bytes that are read at a time.
const READ_LEN: usize = 64 << 10;

impl<'a> NodeReader<'a> {
    fn new(store: &'a Store) -> Self {
        NodeReader { store, segment: None, start: 0, bytes: Vec::new() }
    }

    /// The node at a place. None if it cannot be read there: the long way finds another copy, or says what is wrong.
    fn read(&mut self, name: &Name, location: Location) -> Option<Node> {
        let (header, packed) = record::split(self.bytes_at(location)?).ok()?;
        let content = record::unpack(&header, packed).ok()?;
        if header.name != *name || is_sealed(&header) {
            return None;
        }
        Node::from_bytes(&content).ok()
    }

    fn bytes_at(&mut self, location: Location) -> Option<&[u8]> {
        let number = location.segment();
        if self.segment.as_ref().is_none_or(|(open, _)| *open != number) {
            self.segment = Some((number, self.store.file_of(location).ok()?));
            self.bytes.clear();
        }
        let from = location.offset().checked_sub(self.start).map(|from| from as usize);
        let is_there = |from: &usize| from + location.read_len() <= self.bytes.len();
        let from = match from.filter(is_there) {
            Some(from) => from,
            None => {
                let (_, file) = self.segment.as_ref()?;
                self.start = location.offset();
                self.bytes.resize(READ_LEN.max(location.read_len()), 0);
                let len = segment::read_up_to(file, &mut self.bytes, self.start).ok()?;
                self.bytes.truncate(len);
                0
            }
        };
        self.bytes.get(from..)
    }
}
