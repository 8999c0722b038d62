//! Reads the chunks of a tree in their order.

use std::sync::Arc;

use crate::error::{Result, StoreError};
use crate::store::{InDomain, Store};
use crate::tree::{self, Root, TreeNode};

/// Reads chunks of a tree one after the other.
pub(crate) struct TreeReader<'a> {
    store: &'a Store,
    root: Root,
    domain: u32,
    chunk_len: usize,
    /// The leaf of the last chunk.
    leaf: Option<(u64, Option<Arc<TreeNode>>)>,
}

impl<'a> TreeReader<'a> {
    /// Of a tree of a domain: nothing of another is read, wherever the root leads.
    pub fn new(store: &'a Store, root: Root, chunk_len: usize, domain: u32) -> Self {
        TreeReader { store, root, domain, chunk_len, leaf: None }
    }

    /// The content of a chunk; none if it is zeros.
    pub fn chunk(&mut self, index: u64) -> Result<Option<Arc<[u8]>>> {
        let (leaf_index, place) = (index / tree::FAN_OUT as u64, (index % tree::FAN_OUT as u64) as usize);
        if self.leaf.as_ref().is_none_or(|(held, _)| *held != leaf_index) {
            let leaf = tree::find_leaf(&InDomain(self.store, self.domain), self.root, index)?;
            self.leaf = Some((leaf_index, leaf));
        }
        let Some((_, Some(leaf))) = &self.leaf else { return Ok(None) };
        if leaf.children[place].is_none() {
            return Ok(None);
        }
        let content = self.store.chunk_of(leaf, place)?;
        if content.len() != self.chunk_len {
            return Err(StoreError::Refused(format!(
                "chunk {} has {} bytes in a tree of chunks of {}",
                leaf.children[place],
                content.len(),
                self.chunk_len
            )));
        }
        Ok(Some(content))
    }

    /// Reads a part of a chunk.
    pub fn read(&mut self, index: u64, from: usize, bytes: &mut [u8]) -> Result<()> {
        match self.chunk(index)? {
            Some(content) => bytes.copy_from_slice(&content[from..from + bytes.len()]),
            None => bytes.fill(0),
        }
        Ok(())
    }
}
