//! Trees: a disk as the names of its chunks, 128 to a node.
//!
//! A node is the names of its 128 children one after the other (4 KiB); a leaf's children are chunks. The number of levels follows
//! from the size of the disk, so that equal disks have equal roots. A node whose children are all absent is absent itself.

pub(crate) mod reader;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Result, StoreError};
use crate::name::Name;
use crate::records::segment::Location;

/// Children of a node.
pub(crate) const FAN_OUT: usize = 128;
const FAN_OUT_BITS: u32 = 7;
/// Bytes of a node.
pub(crate) const NODE_LEN: usize = FAN_OUT * Name::LEN;
/// Levels of the largest tree: 128 to the eighth chunks.
const LEVELS_MAX: u8 = 8;

/// The content of a disk at one time: the name of its tree's top node, and how many levels that has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Root {
    pub name: Name,
    pub levels: u8,
}

impl Root {
    pub const LEN: usize = Name::LEN + 1;

    /// A disk of that many chunks of zeros.
    pub fn empty(chunks: u64) -> Self {
        Root { name: Name::NONE, levels: levels(chunks) }
    }

    pub fn to_bytes(self) -> [u8; Root::LEN] {
        let mut bytes = [0; Root::LEN];
        bytes[..Name::LEN].copy_from_slice(&self.name.0);
        bytes[Name::LEN] = self.levels;
        bytes
    }

    /// The root that bytes of a file or peer are.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; Root::LEN] = bytes.try_into().ok()?;
        let mut name = Name::NONE;
        name.0.copy_from_slice(&bytes[..Name::LEN]);
        let levels = bytes[Name::LEN];
        (1..=LEVELS_MAX).contains(&levels).then_some(Root { name, levels })
    }
}

/// Levels of the tree of so many chunks; at least one.
pub(crate) fn levels(chunks: u64) -> u8 {
    let bits = 64 - chunks.saturating_sub(1).leading_zeros();
    (bits.div_ceil(FAN_OUT_BITS) as u8).clamp(1, LEVELS_MAX)
}

/// Chunks below one child of a node of that level (a leaf has level one).
pub(crate) fn child_span(level: u8) -> u64 {
    1 << (FAN_OUT_BITS * u32::from(level - 1))
}

fn child_of(level: u8, chunk: u64) -> usize {
    (chunk / child_span(level)) as usize % FAN_OUT
}

/// A node in memory. A leaf remembers where its chunks lie once that was looked up.
pub(crate) struct TreeNode {
    pub children: Box<[Name; FAN_OUT]>,
    /// The domain that its record is in, and so its children are.
    pub domain: u32,
    locations: Box<[AtomicU64; FAN_OUT]>,
}

impl TreeNode {
    pub const EMPTY: [Name; FAN_OUT] = [Name::NONE; FAN_OUT];

    pub fn new(children: Box<[Name; FAN_OUT]>, domain: u32) -> Self {
        TreeNode { children, domain, locations: Box::new([const { AtomicU64::new(0) }; FAN_OUT]) }
    }

    pub fn from_bytes(bytes: &[u8], domain: u32) -> Option<Self> {
        if bytes.len() != NODE_LEN {
            return None;
        }
        let mut children = Box::new(Self::EMPTY);
        for (child, bytes) in children.iter_mut().zip(bytes.chunks_exact(Name::LEN)) {
            child.0.copy_from_slice(bytes);
        }
        Some(TreeNode::new(children, domain))
    }

    /// Where a child's record lies, if that was looked up before.
    pub fn location(&self, child: usize) -> Option<Location> {
        match self.locations[child].load(Ordering::Relaxed) {
            0 => None,
            bits => Some(Location::from_bits(bits)),
        }
    }

    pub fn set_location(&self, child: usize, location: Location) {
        self.locations[child].store(location.to_bits(), Ordering::Relaxed);
    }

    /// The location turned out to be wrong: the segment is gone.
    pub fn forget_location(&self, child: usize) {
        self.locations[child].store(0, Ordering::Relaxed);
    }
}

fn to_bytes(children: &[Name; FAN_OUT]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(NODE_LEN);
    children.iter().for_each(|child| bytes.extend_from_slice(&child.0));
    bytes
}

/// Where nodes come from.
pub(crate) trait NodeSource {
    fn node(&self, name: &Name) -> Result<Arc<TreeNode>>;
}

/// Where new nodes go.
pub(crate) trait NodeSink: NodeSource {
    fn put_node(&mut self, bytes: &[u8]) -> Result<Name>;
}

/// The leaf that a chunk belongs to; none if nothing is stored there.
pub(crate) fn find_leaf(source: &impl NodeSource, root: Root, chunk: u64) -> Result<Option<Arc<TreeNode>>> {
    let mut failure = None;
    let found = find_leaf_if(root, chunk, |name| source.node(name).map_err(|error| failure = Some(error)).ok());
    match failure {
        Some(error) => Err(error),
        None => Ok(found.flatten()),
    }
}

/// As [`find_leaf`] with nodes that may not be to be had; none if one on the way is not.
pub(crate) fn find_leaf_if(
    root: Root,
    chunk: u64,
    mut node: impl FnMut(&Name) -> Option<Arc<TreeNode>>,
) -> Option<Option<Arc<TreeNode>>> {
    if chunk >= child_span(root.levels + 1) {
        return Some(None);
    }
    let mut name = root.name;
    for level in (2..=root.levels).rev() {
        if name.is_none() {
            return Some(None);
        }
        name = node(&name)?.children[child_of(level, chunk)];
    }
    if name.is_none() {
        return Some(None);
    }
    node(&name).map(Some)
}

/// The root after chunks got other names. `changes` are in the order of their chunks, each once.
pub(crate) fn update(sink: &mut impl NodeSink, root: Root, changes: &[(u64, Name)]) -> Result<Root> {
    debug_assert!(changes.windows(2).all(|pair| pair[0].0 < pair[1].0));
    debug_assert!(changes.last().is_none_or(|last| last.0 < child_span(root.levels + 1)));
    let name = update_node(sink, root.name, root.levels, changes)?;
    Ok(Root { name, ..root })
}

fn update_node(sink: &mut impl NodeSink, name: Name, level: u8, changes: &[(u64, Name)]) -> Result<Name> {
    if changes.is_empty() {
        return Ok(name);
    }
    let mut children = match name.is_none() {
        true => Box::new(TreeNode::EMPTY),
        false => sink.node(&name)?.children.clone(),
    };
    let before = children.clone();
    if level == 1 {
        for &(chunk, new) in changes {
            children[child_of(1, chunk)] = new;
        }
    } else {
        for group in changes.chunk_by(|a, b| a.0 / child_span(level) == b.0 / child_span(level)) {
            let child = child_of(level, group[0].0);
            children[child] = update_node(sink, children[child], level - 1, group)?;
        }
    }
    put(sink, name, &before, &children)
}

/// Stores a node that changed.
fn put(sink: &mut impl NodeSink, name: Name, before: &[Name; FAN_OUT], children: &[Name; FAN_OUT]) -> Result<Name> {
    if children == before {
        return Ok(name);
    }
    if *children == TreeNode::EMPTY {
        return Ok(Name::NONE);
    }
    sink.put_node(&to_bytes(children))
}

/// The root of a disk that now has that many chunks: what lies beyond is gone.
pub(crate) fn resize(sink: &mut impl NodeSink, root: Root, chunks: u64) -> Result<Root> {
    let mut root = clear(sink, root, chunks..u64::MAX)?;
    let wanted = levels(chunks);
    while root.levels < wanted {
        if !root.name.is_none() {
            let mut children = TreeNode::EMPTY;
            children[0] = root.name;
            root.name = sink.put_node(&to_bytes(&children))?;
        }
        root.levels += 1;
    }
    while root.levels > wanted {
        if !root.name.is_none() {
            root.name = sink.node(&root.name)?.children[0];
        }
        root.levels -= 1;
    }
    Ok(root)
}

/// The root of a disk in which the chunks of a range are zeros.
pub(crate) fn clear(sink: &mut impl NodeSink, root: Root, range: Range<u64>) -> Result<Root> {
    Ok(Root { name: clear_node(sink, root.name, root.levels, 0, &range)?, ..root })
}

/// Clears what of a range lies in a node whose first chunk is `first`.
fn clear_node(sink: &mut impl NodeSink, name: Name, level: u8, first: u64, range: &Range<u64>) -> Result<Name> {
    let span = child_span(level);
    if name.is_none() || range.start <= first && range.end >= first + child_span(level + 1) {
        return Ok(Name::NONE);
    }
    let before = sink.node(&name)?.children.clone();
    let mut children = before.clone();
    for (child, chunk) in children.iter_mut().zip((first..).step_by(span as usize)) {
        if chunk >= range.end || chunk + span <= range.start {
            continue;
        }
        *child = match level {
            1 => Name::NONE,
            _ => clear_node(sink, *child, level - 1, chunk, range)?,
        };
    }
    put(sink, name, &before, &children)
}

/// A part of a tree that [`walk`] comes by.
pub(crate) enum Visit {
    /// A node; whether to look inside.
    Node(Name),
    /// A chunk by its index.
    Chunk(u64, Name),
}

/// Comes by every node and chunk of a tree, in order. `visit` says for a node whether to go into it; its answer for chunks is of no
/// account.
pub(crate) fn walk(source: &impl NodeSource, root: Root, visit: &mut dyn FnMut(Visit) -> Result<bool>) -> Result<()> {
    walk_node(source, root.name, root.levels, 0, visit)
}

fn walk_node(
    source: &impl NodeSource,
    name: Name,
    level: u8,
    first: u64,
    visit: &mut dyn FnMut(Visit) -> Result<bool>,
) -> Result<()> {
    if name.is_none() || !visit(Visit::Node(name))? {
        return Ok(());
    }
    let node = source.node(&name)?;
    for (child, chunk) in node.children.iter().zip((first..).step_by(child_span(level) as usize)) {
        if child.is_none() {
            continue;
        }
        if level == 1 {
            visit(Visit::Chunk(chunk, *child))?;
        } else {
            walk_node(source, *child, level - 1, chunk, visit)?;
        }
    }
    Ok(())
}

/// Comes by every chunk of a range that differs between two trees, in order, with its two names. Parts that are equal are not
/// looked into.
pub(crate) fn differences(
    source: &impl NodeSource,
    trees: [Root; 2],
    range: Range<u64>,
    differs: &mut dyn FnMut(u64, [Name; 2]) -> Result<()>,
) -> Result<()> {
    // The lower tree is the first child of nodes that are not there.
    let levels = trees[0].levels.max(trees[1].levels);
    let top = |root: Root| if root.levels == levels { Top::Whole(root.name) } else { Top::First(root) };
    differ_nodes(source, [top(trees[0]), top(trees[1])], levels, 0, &range, differs)
}

/// One side of a comparison: a node of the level that is looked at, or a lower tree that lies in its first place.
#[derive(Clone, Copy, PartialEq)]
enum Top {
    Whole(Name),
    First(Root),
}

impl Top {
    fn children(self, source: &impl NodeSource, level: u8) -> Result<Box<[Top; FAN_OUT]>> {
        let mut tops = Box::new([Top::Whole(Name::NONE); FAN_OUT]);
        match self {
            Top::Whole(name) if name.is_none() => {}
            Top::Whole(name) => {
                let node = source.node(&name)?;
                for (top, child) in tops.iter_mut().zip(node.children.iter()) {
                    *top = Top::Whole(*child);
                }
            }
            Top::First(root) if root.levels + 1 == level => tops[0] = Top::Whole(root.name),
            Top::First(root) => tops[0] = Top::First(root),
        }
        Ok(tops)
    }
}

fn differ_nodes(
    source: &impl NodeSource,
    sides: [Top; 2],
    level: u8,
    first: u64,
    range: &Range<u64>,
    differs: &mut dyn FnMut(u64, [Name; 2]) -> Result<()>,
) -> Result<()> {
    if sides[0] == sides[1] {
        return Ok(());
    }
    let [ours, theirs] = [sides[0].children(source, level)?, sides[1].children(source, level)?];
    let span = child_span(level);
    for (index, pair) in ours.iter().zip(theirs.iter()).enumerate() {
        let chunk = first + index as u64 * span;
        if chunk >= range.end || chunk + span <= range.start || pair.0 == pair.1 {
            continue;
        }
        match (level, *pair.0, *pair.1) {
            (1, Top::Whole(a), Top::Whole(b)) => differs(chunk, [a, b])?,
            _ => differ_nodes(source, [*pair.0, *pair.1], level - 1, chunk, range, differs)?,
        }
    }
    Ok(())
}

/// The record of a node is none.
pub(crate) fn not_a_node(name: &Name) -> StoreError {
    StoreError::Refused(format!("node {name} of a tree has not the length of one"))
}

#[cfg(test)]
mod tests;
