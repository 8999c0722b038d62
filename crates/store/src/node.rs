//! Nodes: what an instance was at one time. Disks, memory, the machine's state, where it came from and what people say of it,
//! in one record whose name is the snapshot's identity.
//!
//! Tagged data (protobuf's wire format): later releases add fields, and a field that is not known is kept out of nobody's way.
//! A node names its parent and does not keep it: what an earlier snapshot held goes when that is removed.

use std::collections::BTreeMap;

use prost::Message;

use crate::error::{Result, StoreError};
use crate::name::{Kind, Name};
use crate::store::{Batch, Expected, Read, Store};
use crate::tree::Root;

/// The version of nodes that this release writes, and the newest that it reads.
const FORMAT: u32 = 1;

/// A node of a life tree.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Node {
    pub disks: Vec<Tree>,
    pub memories: Vec<Tree>,
    /// Files that belong to it: a kernel, the machine's state.
    pub files: Vec<Tree>,
    pub parent: Option<Name>,
    /// Nanoseconds since 1970-01-01 00:00 UTC.
    pub created_ns: u64,
    pub facts: BTreeMap<String, String>,
}

/// A disk, a memory or a file of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tree {
    pub name: String,
    pub root: Root,
    pub len_bytes: u64,
    pub chunk_len: u32,
    /// The domain of this store that its chunks are in.
    pub domain: u32,
}

impl Node {
    /// All trees that the node keeps.
    pub fn trees(&self) -> impl Iterator<Item = &Tree> {
        self.disks.iter().chain(&self.memories).chain(&self.files)
    }

    /// The file of that name.
    pub fn file(&self, name: &str) -> Option<&Tree> {
        self.files.iter().find(|file| file.name == name)
    }

    pub(crate) fn put(&self, batch: &mut Batch) -> Result<Name> {
        Ok(batch.put(Kind::Node, &self.to_bytes())?.0)
    }

    pub fn to_bytes(&self) -> Vec<u8> {
        let trees = |trees: &[Tree]| trees.iter().map(wire::Tree::from).collect();
        wire::Node {
            format: FORMAT,
            disks: trees(&self.disks),
            memories: trees(&self.memories),
            files: trees(&self.files),
            parent: self.parent.map_or_else(Vec::new, |name| name.0.to_vec()),
            created_ns: self.created_ns,
            facts: self
                .facts
                .iter()
                .map(|(key, value)| wire::Fact { key: key.clone(), value: value.clone() })
                .collect(),
        }
        .encode_to_vec()
    }

    /// The node that bytes of a file or peer are.
    pub fn from_bytes(bytes: &[u8]) -> Result<Node, String> {
        let node = wire::Node::decode(bytes).map_err(|error| format!("a node that cannot be read: {error}"))?;
        if node.format != FORMAT {
            return Err(format!("a node of format {}, and this release knows {FORMAT}", node.format));
        }
        let trees = |trees: Vec<wire::Tree>| trees.into_iter().map(Tree::try_from).collect::<Result<Vec<_>, _>>();
        let parent = match node.parent.is_empty() {
            true => None,
            false => Some(Name(node.parent.try_into().map_err(|_| "a node with a parent that is no name".to_owned())?)),
        };
        Ok(Node {
            disks: trees(node.disks)?,
            memories: trees(node.memories)?,
            files: trees(node.files)?,
            parent,
            created_ns: node.created_ns,
            facts: node.facts.into_iter().map(|fact| (fact.key, fact.value)).collect(),
        })
    }
}

impl Store {
    /// Reads a node as it is: for what needs no keys.
    pub fn load_node(&self, name: &Name) -> Result<Node> {
        self.parse_node(self.read(name, Expected::Anything)?)
    }

    /// Reads a node and compares it with its name, if its domain is not locked. One whose domain is has nothing in another.
    pub(crate) fn load_checked_node(&self, name: &Name) -> Result<Node> {
        let read = self.read(name, Expected::Anything)?;
        let (domain, location) = (read.domain, read.location);
        let secret = match self.unlocked(domain) {
            Err(StoreError::Locked { .. }) => Err(()),
            found => Ok(found?),
        };
        let is_whole = match &secret {
            Ok(found) => {
                let namer = found.as_ref().map_or(self.namer(), |domain| &domain.namer);
                namer.name(Kind::Node, &read.content) == *name
            }
            Err(()) => true,
        };
        let node = self.parse_node(read)?;
        if !is_whole || node.trees().any(|tree| tree.domain != domain) {
            return Err(StoreError::Damaged {
                path: self.segment_path(location),
                offset: location.offset(),
                what: format!("node {name} holds something else"),
            });
        }
        Ok(node)
    }

    fn parse_node(&self, read: Read) -> Result<Node> {
        Node::from_bytes(&read.content).map_err(|what| StoreError::Damaged {
            path: self.segment_path(read.location),
            offset: read.location.offset(),
            what,
        })
    }
}

/// Chunks are 4, 16 or 64 KiB long.
pub(crate) fn is_chunk_len(len: u32) -> bool {
    matches!(len, 4096 | 16_384 | 65_536)
}

impl From<&Tree> for wire::Tree {
    fn from(tree: &Tree) -> Self {
        wire::Tree {
            name: tree.name.clone(),
            root: tree.root.to_bytes().to_vec(),
            len_bytes: tree.len_bytes,
            chunk_len: tree.chunk_len,
            domain: tree.domain,
        }
    }
}

impl TryFrom<wire::Tree> for Tree {
    type Error = String;

    fn try_from(tree: wire::Tree) -> Result<Self, String> {
        let root = Root::from_bytes(&tree.root).ok_or_else(|| format!("tree {:?} without a root", tree.name))?;
        if !is_chunk_len(tree.chunk_len) || tree.len_bytes > crate::volume::CAPACITY_BYTES_MAX {
            return Err(format!("tree {:?} of impossible size", tree.name));
        }
        Ok(Tree { name: tree.name, root, len_bytes: tree.len_bytes, chunk_len: tree.chunk_len, domain: tree.domain })
    }
}

mod wire {
    //! Nodes as they are written. Numbers of fields are never used again for something else.

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Node {
        #[prost(uint32, tag = "1")]
        pub format: u32,
        #[prost(message, repeated, tag = "2")]
        pub disks: Vec<Tree>,
        #[prost(message, repeated, tag = "3")]
        pub memories: Vec<Tree>,
        #[prost(message, repeated, tag = "4")]
        pub files: Vec<Tree>,
        #[prost(bytes = "vec", tag = "5")]
        pub parent: Vec<u8>,
        #[prost(uint64, tag = "6")]
        pub created_ns: u64,
        #[prost(message, repeated, tag = "7")]
        pub facts: Vec<Fact>,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Tree {
        #[prost(string, tag = "1")]
        pub name: String,
        #[prost(bytes = "vec", tag = "2")]
        pub root: Vec<u8>,
        #[prost(uint64, tag = "3")]
        pub len_bytes: u64,
        #[prost(uint32, tag = "4")]
        pub chunk_len: u32,
        #[prost(uint32, tag = "5")]
        pub domain: u32,
    }

    #[derive(Clone, PartialEq, prost::Message)]
    pub struct Fact {
        #[prost(string, tag = "1")]
        pub key: String,
        #[prost(string, tag = "2")]
        pub value: String,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn node() -> Node {
        let tree = |name: &str, levels| Tree {
            name: name.to_owned(),
            root: Root { name: Name([levels; 32]), levels },
            len_bytes: 1 << 30,
            chunk_len: 16_384,
            domain: 3,
        };
        Node {
            disks: vec![tree("root", 3)],
            memories: vec![tree("memory", 2)],
            files: vec![tree("kernel", 1)],
            parent: Some(Name([9; 32])),
            created_ns: 1_795_367_047_000_000_000,
            facts: [("command line", "console=ttyS0")].map(|(key, value)| (key.to_owned(), value.to_owned())).into(),
        }
    }

    #[test]
    fn a_node_comes_back_from_its_bytes() {
        assert_eq!(Node::from_bytes(&node().to_bytes()), Ok(node()));
        let mut newer = wire::Node::decode(&node().to_bytes()[..]).unwrap();
        newer.format = 7;
        let error = Node::from_bytes(&newer.encode_to_vec()).unwrap_err();
        assert!(error.contains("format 7"), "{error}");
    }

    proptest! {
        #[test]
        fn bytes_that_are_no_node_are_refused(at in 0..200usize, value: u8, cut in 0..200usize) {
            let mut bytes = node().to_bytes();
            let len = bytes.len();
            bytes[at % len] = value;
            bytes.truncate(len - cut % len);
            if let Ok(read) = Node::from_bytes(&bytes) {
                prop_assert!(read.trees().all(|tree| is_chunk_len(tree.chunk_len)));
            }
        }
    }
}
