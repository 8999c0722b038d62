//! The side of a transfer that has what the other wants.
//!
//! It gives out what the other side points at: children of nodes that it gave out before, and nothing else of the store.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::sync::Arc;

use super::wire::{Incoming, Link, Message, Want};
use super::{Offered, TransferError};
use crate::collect::{Step, Watcher};
use crate::name::Name;
use crate::store::Store;
use crate::tree::{NodeSource, Root, TreeNode};

/// Nodes that the other side may have open. It needs some two hundred for each level of a tree.
const HANDLES_MAX: usize = 4096;

/// A node that the other side has open.
enum Open {
    /// What was offered: its only child is the node.
    Offer(Name),
    Node(Vec<Root>),
    Tree {
        node: Arc<TreeNode>,
        level: u8,
    },
}

/// A child of an open node.
#[derive(Clone, Copy)]
enum Child {
    Node(Name),
    Tree(Name, u8),
    Chunk(Name),
}

impl Child {
    fn name(self) -> Name {
        match self {
            Child::Node(name) | Child::Tree(name, _) | Child::Chunk(name) => name,
        }
    }
}

impl Open {
    fn child(&self, index: usize) -> Option<Child> {
        let child = match self {
            Open::Offer(name) => (index == 0).then_some(Child::Node(*name)),
            Open::Node(roots) => roots.get(index).map(|root| Child::Tree(root.name, root.levels)),
            Open::Tree { node, level: 1 } => node.children.get(index).copied().map(Child::Chunk),
            Open::Tree { node, level } => node.children.get(index).map(|&name| Child::Tree(name, level - 1)),
        };
        child.filter(|child| !child.name().is_none())
    }
}

pub(super) struct Source<'a, S> {
    store: &'a Arc<Store>,
    link: &'a mut Link<S>,
    offered: &'a Offered,
    open: HashMap<u32, Open>,
    next_handle: u32,
}

impl<'a, S: Read + Write> Source<'a, S> {
    pub fn new(store: &'a Arc<Store>, link: &'a mut Link<S>, offered: &'a Offered) -> Self {
        let open = HashMap::from([(0, Open::Offer(offered.name))]);
        Source { store, link, offered, open, next_handle: 1 }
    }

    /// Serves the other side until it has everything.
    pub fn run(mut self, watcher: Watcher<'_>) -> Result<(), TransferError> {
        let outcome = self.serve(watcher);
        outcome.map_err(|error| self.link.tell(error))
    }

    fn serve(&mut self, watcher: Watcher<'_>) -> Result<(), TransferError> {
        self.link.send(&Message::Offer(self.offered.name))?;
        self.link.flush()?;
        let mut bits = Vec::new();
        loop {
            let want = match self.link.receive()? {
                Incoming::Want(want) => {
                    bits.clear();
                    bits.extend_from_slice(want.bits);
                    Want { bits: &bits, ..want }
                }
                Incoming::Done => return Ok(()),
                Incoming::Refused(why) => return Err(TransferError::Refused(why.to_owned())),
                _ => return Err(TransferError::Protocol("a request for records was to come".to_owned())),
            };
            self.answer(want)?;
            self.link.flush()?;
            watcher(Step { what: "sending", done: self.link.transferred.record_bytes, total: 0 })?;
        }
    }

    fn answer(&mut self, want: Want<'_>) -> Result<(), TransferError> {
        let protocol = |what: &str| TransferError::Protocol(what.to_owned());
        for index in set_bits(want.bits) {
            let open = self.open.get(&want.handle).ok_or_else(|| protocol("it points at a node that is not open"))?;
            let child = open.child(index).ok_or_else(|| protocol("it asks for a child that is not there"))?;
            if !want.open_only {
                let (header, packed) = self.store.read_packed(&child.name())?;
                self.link.send(&Message::Record(&header.to_bytes(), &packed))?;
                self.link.transferred.records += 1;
                self.link.transferred.record_bytes += header.record_len() as u64;
            }
            let opened = match child {
                Child::Chunk(_) if want.open_only => return Err(protocol("it opens a chunk")),
                Child::Chunk(_) => continue,
                Child::Node(_) => Open::Node(self.offered.node.trees().map(|tree| tree.root).collect()),
                Child::Tree(name, level) => Open::Tree { node: self.store.node(&name)?, level },
            };
            if self.open.len() >= HANDLES_MAX {
                return Err(protocol("it has too many nodes open"));
            }
            self.open.insert(self.next_handle, opened);
            self.next_handle = self.next_handle.checked_add(1).ok_or_else(|| protocol("it opens nodes without end"))?;
        }
        if want.last {
            self.open.remove(&want.handle);
        }
        Ok(())
    }
}

/// The numbers of the bits that are set, in order.
fn set_bits(bits: &[u8]) -> impl Iterator<Item = usize> {
    (0..bits.len() * 8).filter(|index| bits[index / 8] >> (index % 8) & 1 == 1)
}
