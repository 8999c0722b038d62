//! The side of a transfer that has what the other wants.
//!
//! It gives out what the other side points at: children of nodes that it gave out before, and nothing else of the store.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Write};
use std::sync::Arc;

use super::wire::{Incoming, Link, Message, Want};
use super::{Offered, TransferError};
use crate::error::Result;
use crate::name::Name;
use crate::records::record::{self, HEADER_LEN, Header};
use crate::records::segment::read_up_to;
use crate::store::Store;
use crate::tree::{NodeSource, Root, TreeNode};
use crate::upkeep::collect::{Step, Watcher};

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
    ahead: Ahead,
}

impl<'a, S: Read + Write> Source<'a, S> {
    pub fn new(store: &'a Arc<Store>, link: &'a mut Link<S>, offered: &'a Offered) -> Self {
        let open = HashMap::from([(0, Open::Offer(offered.name))]);
        Source { store, link, offered, open, next_handle: 1, ahead: Ahead::default() }
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
                let name = child.name();
                if !self.ahead.holds(&name) {
                    self.ahead.go_to(self.store, &name)?;
                }
                let header = match self.ahead.take(&name) {
                    Some((header, packed)) => {
                        self.link.send(&Message::Record(&header.to_bytes(), packed))?;
                        header
                    }
                    // The long way finds another copy, or says what is wrong.
                    None => {
                        let (header, packed) = self.store.read_packed(&name)?;
                        self.link.send(&Message::Record(&header.to_bytes(), &packed))?;
                        header
                    }
                };
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

/// Bytes that are read together where records follow one another.
const AHEAD_LEN_MAX: usize = 256 << 10;

/// What lies behind the last record in its segment: most often the next one that is asked for, which then needs no look-up.
#[derive(Default)]
struct Ahead {
    file: Option<Arc<File>>,
    /// Of the file, where `bytes` begin.
    offset: u64,
    bytes: Vec<u8>,
    at: usize,
    /// Bytes to read the next time; more while records follow one another.
    len: usize,
}

impl Ahead {
    /// Sees to it that so many bytes are there, if the file has them.
    fn fill(&mut self, len: usize) -> bool {
        if self.bytes.len() - self.at >= len {
            return true;
        }
        let Some(file) = &self.file else { return false };
        self.offset += self.at as u64;
        self.at = 0;
        self.len = (self.len * 2).clamp(len, AHEAD_LEN_MAX);
        self.bytes.resize(self.len, 0);
        let read = read_up_to(file, &mut self.bytes, self.offset).unwrap_or(0);
        self.bytes.truncate(read);
        read >= len
    }

    fn header(&mut self) -> Option<Header> {
        self.fill(HEADER_LEN).then(|| Header::from_bytes(&self.bytes[self.at..]).ok()).flatten()
    }

    /// Whether the next record is the named one.
    fn holds(&mut self, name: &Name) -> bool {
        self.header().is_some_and(|header| header.name == *name)
    }

    /// Goes to where a record lies.
    fn go_to(&mut self, store: &Store, name: &Name) -> Result<()> {
        self.file = None;
        self.bytes.clear();
        self.at = 0;
        if let Some(&location) = store.index().find(name)?.first() {
            self.file = store.file_of(location).ok();
            self.offset = location.offset();
            self.len = location.read_len() / 2;
        }
        Ok(())
    }

    /// The next record, if it is the named one and whole.
    fn take(&mut self, name: &Name) -> Option<(Header, &[u8])> {
        let header = self.header().filter(|header| header.name == *name)?;
        let len = HEADER_LEN + header.packed_len as usize;
        if !self.fill(len) {
            return None;
        }
        let start = self.at;
        self.at = (start + header.record_len()).min(self.bytes.len());
        record::split(&self.bytes[start..start + len]).ok()
    }
}

/// The numbers of the bits that are set, in order.
fn set_bits(bits: &[u8]) -> impl Iterator<Item = usize> {
    (0..bits.len() * 8).filter(|index| bits[index / 8] >> (index % 8) & 1 == 1)
}
