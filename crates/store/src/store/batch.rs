//! Adding records to a store.

use std::collections::BTreeSet;
use std::fs::File;
use std::sync::Arc;

use polder_trust::seal::Suite;

use crate::domain::{Domain, OPEN_DOMAIN, is_sealed};
use crate::error::{Result, StoreError};
use crate::name::{Kind, Name};
use crate::records::record::{CONTENT_LEN_MAX, HEADER_LEN, Header, Packer};
use crate::records::segment::Location;
use crate::store::{InDomain, NODE_WEIGHT, Store};
use crate::tree::{NodeSink, NodeSource, TreeNode};

/// What a batch did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Added {
    /// Records that were asked for and are not all zeros.
    pub records: u64,
    /// Those that were there already.
    pub reused: u64,
    /// Bytes of new records.
    pub stored_bytes: u64,
}

/// Records that are being added. What it added counts when [`Batch::sync`] came back; a batch that is dropped leaves at most
/// records behind that nothing needs.
pub(crate) struct Batch {
    _lock: File,
    store: Arc<Store>,
    /// None: nothing is encrypted.
    domain: Option<Arc<Domain>>,
    /// Of the store when the batch began.
    failures: u64,
    added: Added,
    packer: Packer,
    /// A record that is appended at once.
    record: Vec<u8>,
    waiting: Waiting,
}

/// Adds the packed bytes of a record to those of others; gives its header.
fn pack_onto(
    packer: &mut Packer,
    domain: Option<&Domain>,
    (kind, name): (Kind, Name),
    content: &[u8],
    records: &mut Vec<u8>,
) -> Header {
    let (packing, packed) = packer.pack(content);
    let header = Header {
        kind,
        packing,
        packed_len: packed.len() as u32,
        content_len: content.len() as u32,
        name,
        domain: domain.map_or(OPEN_DOMAIN, |domain| domain.id),
        suite: Suite::Aes256Gcm,
        checksum: 0,
    };
    match domain {
        Some(domain) if is_sealed(&header) => domain.seal_onto(&header, packed, records),
        _ => {
            records.extend_from_slice(packed);
            Header { checksum: crc32c::crc32c(packed), ..header }
        }
    }
}

/// Bytes of records that are appended together.
const WAITING_LEN: usize = 512 << 10;

/// Records that are appended soon.
#[derive(Default)]
struct Waiting {
    headers: Vec<Header>,
    /// Their packed bytes, one behind the other.
    packed: Vec<u8>,
    /// Those of the headers once more: of chunks that pack well thousands wait, and each that comes is looked for among them.
    names: BTreeSet<Name>,
}

impl Waiting {
    fn records(&self) -> impl Iterator<Item = (&Header, &[u8])> {
        let mut rest = &self.packed[..];
        self.headers.iter().map(move |header| {
            let (packed, behind) = rest.split_at(header.packed_len as usize);
            rest = behind;
            (header, packed)
        })
    }

    fn clear(&mut self) {
        self.headers.clear();
        self.packed.clear();
        self.names.clear();
    }
}

impl Batch {
    pub(super) fn new(lock: File, store: Arc<Store>, domain: Option<Arc<Domain>>, failures: u64) -> Self {
        Batch {
            _lock: lock,
            store,
            domain,
            failures,
            added: Added::default(),
            packer: Packer::default(),
            record: Vec::new(),
            waiting: Waiting::default(),
        }
    }

    /// The name of `content`, which is in the store afterwards. Chunks of zeros have none.
    pub fn put_chunk(&mut self, content: &[u8]) -> Result<Name> {
        if is_zero(content) {
            return Ok(Name::NONE);
        }
        self.put(Kind::Data, content).map(|(name, _)| name)
    }

    /// As [`put_chunk`](Self::put_chunk) for bytes that may be zeros, and for the store's own records.
    pub fn put(&mut self, kind: Kind, content: &[u8]) -> Result<(Name, Location)> {
        if content.len() > CONTENT_LEN_MAX {
            return Err(StoreError::Refused(format!(
                "a record of {} bytes is longer than {CONTENT_LEN_MAX}",
                content.len()
            )));
        }
        let (name, found) = self.ask_for(kind, content)?;
        if let Some(location) = found {
            return Ok((name, location));
        }
        self.record.clear();
        let domain = self.domain.as_deref();
        let header = pack_onto(&mut self.packer, domain, (kind, name), content, &mut self.record);
        let location = self.store.append(&header, &self.record)?;
        self.added.stored_bytes += (HEADER_LEN + self.record.len()) as u64;
        Ok((name, location))
    }

    /// The names of chunks, which are in the store afterwards, as [`put_chunk`](Self::put_chunk) gives them one at a time: for threads that
    /// store many beside others.
    pub fn put_chunks<'a>(&mut self, chunks: impl Iterator<Item = &'a [u8]>) -> Result<Vec<Name>> {
        let names = chunks.map(|chunk| self.put_soon(chunk)).collect();
        let appended = self.append_waiting();
        appended.and(names)
    }

    fn put_soon(&mut self, chunk: &[u8]) -> Result<Name> {
        if is_zero(chunk) {
            return Ok(Name::NONE);
        }
        let (name, found) = self.ask_for(Kind::Data, chunk)?;
        if found.is_some() {
            return Ok(name);
        }
        if self.waiting.names.contains(&name) {
            self.added.reused += 1;
            return Ok(name);
        }
        let (waiting, domain) = (&mut self.waiting, self.domain.as_deref());
        let header = pack_onto(&mut self.packer, domain, (Kind::Data, name), chunk, &mut waiting.packed);
        waiting.names.insert(name);
        waiting.headers.push(header);
        if self.waiting.packed.len() >= WAITING_LEN {
            self.append_waiting()?;
        }
        Ok(name)
    }

    fn append_waiting(&mut self) -> Result<()> {
        let added = &mut self.added;
        let appended = self.store.append_all(self.waiting.records(), |header, _| {
            added.stored_bytes += HEADER_LEN as u64 + u64::from(header.packed_len);
        });
        self.waiting.clear();
        appended
    }

    /// The name of a record, and where it lies if it is stored already.
    fn ask_for(&mut self, kind: Kind, content: &[u8]) -> Result<(Name, Option<Location>)> {
        let namer = self.domain.as_ref().map_or(&self.store.namer, |domain| &domain.namer);
        let name = namer.name(kind, content);
        self.added.records += 1;
        let found = self.store.find_for_reuse(&name)?;
        self.added.reused += u64::from(found.is_some());
        Ok((name, found))
    }

    /// Adds a record as it lies in a segment. That it holds what its name says is for the caller to have checked.
    pub fn put_packed(&mut self, header: &Header, packed: &[u8]) -> Result<Location> {
        self.added.stored_bytes += (HEADER_LEN + packed.len()) as u64;
        self.store.append(header, packed)
    }

    /// Makes everything stable that the batch added or found; the lock stays until the batch is dropped, which is to be after the root
    /// that needs the records is stable too.
    pub fn sync(&mut self) -> Result<Added> {
        self.store.sync_records(self.failures)?;
        Ok(self.added)
    }

    /// How often the store had failed to keep records when the batch began.
    pub fn failures(&self) -> u64 {
        self.failures
    }
}

impl Batch {
    fn domain_id(&self) -> u32 {
        self.domain.as_ref().map_or(OPEN_DOMAIN, |domain| domain.id)
    }
}

impl NodeSource for Batch {
    fn node(&self, name: &Name) -> Result<Arc<TreeNode>> {
        InDomain(&self.store, self.domain_id()).node(name)
    }
}

impl NodeSink for Batch {
    fn put_node(&mut self, bytes: &[u8]) -> Result<Name> {
        let (name, _) = self.put(Kind::Tree, bytes)?;
        if self.store.cached_node(&name).is_none()
            && let Some(node) = TreeNode::from_bytes(bytes, self.domain_id())
        {
            self.store.nodes.insert(name, Arc::new(node), NODE_WEIGHT);
        }
        Ok(name)
    }
}

/// Whether there is nothing but zeros.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    let mut blocks = bytes.chunks_exact(64);
    let zero = |block: &[u8]| block.iter().fold(0, |any, &byte| any | byte) == 0;
    blocks.by_ref().all(zero) && zero(blocks.remainder())
}
