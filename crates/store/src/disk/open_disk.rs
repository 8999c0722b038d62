//! A disk of the store as front ends see it: a volume that is written, or something that never changes.

use std::ops::Range;
use std::sync::Arc;

use crate::disk::queue::DiskQueue;
use crate::disk::{Access, Buffer, Disk, DiskError, Extent, Question};
use crate::error::{Result, StoreError};
use crate::node::Tree;
use crate::store::Store;
use crate::tree::Root;
use crate::tree::reader::TreeReader;
use crate::volume::core::Core;
use crate::volume::extent_map::Place;
use crate::volume::layers::{Piece, chunk_pieces};
use crate::volume::{Volume, check_range};

/// Bytes of a disk that are looked at together to answer a question about its parts.
const WINDOW_LEN: u64 = 1 << 30;

/// A disk of the store.
pub enum OpenDisk {
    Volume(Volume),
    Fixed(FixedDisk),
}

/// A snapshot or an image's disk: it never changes.
#[derive(Clone)]
pub struct FixedDisk(Arc<Fixed>);

/// What a disk that never changes is made of.
pub(crate) struct Fixed {
    store: Arc<Store>,
    root: Root,
    chunk_len: u32,
    capacity_bytes: u64,
    domain: u32,
}

impl FixedDisk {
    pub fn new(store: &Arc<Store>, tree: &Tree) -> Self {
        FixedDisk(Arc::new(Fixed {
            store: store.clone(),
            root: tree.root,
            chunk_len: tree.chunk_len,
            capacity_bytes: tree.len_bytes,
            domain: tree.domain,
        }))
    }
}

/// What a queue works on.
#[derive(Clone)]
pub(crate) enum View {
    Volume(Arc<Core>),
    Fixed(Arc<Fixed>),
}

impl View {
    pub fn store(&self) -> &Arc<Store> {
        match self {
            View::Volume(core) => &core.store,
            View::Fixed(fixed) => &fixed.store,
        }
    }

    /// The domain that its tree is in.
    pub fn domain(&self) -> u32 {
        match self {
            View::Volume(core) => core.row.domain,
            View::Fixed(fixed) => fixed.domain,
        }
    }

    /// What a range is made of now, and the tree that its chunks are in.
    pub fn plan(&self, offset: u64, len: usize, pieces: &mut Vec<Piece>) -> Result<Root> {
        match self {
            View::Volume(core) => core.plan(offset, len, pieces),
            View::Fixed(fixed) => {
                pieces.clear();
                check_range(offset, len as u64, fixed.capacity_bytes)?;
                chunk_pieces(offset, len, fixed.chunk_len as usize, pieces);
                Ok(fixed.root)
            }
        }
    }

    /// Bytes of a chunk.
    pub fn chunk_len(&self) -> usize {
        match self {
            View::Volume(core) => core.chunk_len(),
            View::Fixed(fixed) => fixed.chunk_len as usize,
        }
    }

    /// Reads, waiting for the host's disk.
    pub fn read_at(&self, offset: u64, bytes: &mut [u8]) -> Result<()> {
        match self {
            View::Volume(core) => core.read_at(offset, bytes),
            View::Fixed(fixed) => {
                let mut pieces = Vec::new();
                let root = self.plan(offset, bytes.len(), &mut pieces)?;
                let mut reader = TreeReader::new(&fixed.store, root, fixed.chunk_len as usize, fixed.domain);
                let mut rest = bytes;
                for piece in &pieces {
                    let (part, behind) = rest.split_at_mut(piece.len());
                    if let Piece::Chunk { index, from, .. } = piece {
                        reader.read(*index, *from, part)?;
                    }
                    rest = behind;
                }
                Ok(())
            }
        }
    }

    /// The volume, if it can be written.
    pub fn volume(&self) -> Result<&Arc<Core>, DiskError> {
        match self {
            View::Volume(core) => Ok(core),
            View::Fixed(_) => Err(DiskError::ReadOnly),
        }
    }
}

impl OpenDisk {
    pub(crate) fn view(&self) -> View {
        match self {
            OpenDisk::Volume(volume) => View::Volume(volume.core().clone()),
            OpenDisk::Fixed(FixedDisk(fixed)) => View::Fixed(fixed.clone()),
        }
    }

    /// Ends with everything in the store.
    pub fn close(self) -> Result<()> {
        match self {
            OpenDisk::Volume(volume) => volume.close(),
            OpenDisk::Fixed(_) => Ok(()),
        }
    }

    /// The parts of a window of the tree that are there, or differ from another tree, in bytes.
    fn tree_parts(&self, trees: [Root; 2], chunk_len: u32, window: Range<u64>) -> Result<Vec<Range<u64>>> {
        let mut parts = Vec::new();
        let store = match self {
            OpenDisk::Volume(volume) => volume.store(),
            OpenDisk::Fixed(FixedDisk(fixed)) => &fixed.store,
        };
        store.differences(trees, chunk_len, window, &mut |range| {
            parts.push(range);
            Ok(())
        })?;
        Ok(parts)
    }

    fn base_of(&self, question: &Question) -> Result<Option<Root>, DiskError> {
        let Question::ChangedSince(name) = question else { return Ok(None) };
        let missing = || DiskError::NoSuchSnapshot { name: name.clone() };
        let OpenDisk::Volume(volume) = self else { return Err(missing()) };
        let find = || volume.store().catalog().snapshot(volume.core().row.id, name);
        let mut snapshot = match find() {
            Err(StoreError::NotFound { .. }) => return Err(missing()),
            found => found?,
        };
        if snapshot.root.is_none() {
            volume.compact()?;
            snapshot = find()?;
        }
        snapshot.root.map(Some).ok_or_else(missing)
    }
}

impl Disk for OpenDisk {
    type Queue<B: Buffer> = DiskQueue<B>;

    fn open_queue<B: Buffer>(self: &Arc<Self>) -> Result<DiskQueue<B>, DiskError> {
        DiskQueue::new(self.clone())
    }

    fn capacity_bytes(&self) -> u64 {
        match self {
            OpenDisk::Volume(volume) => volume.capacity_bytes(),
            OpenDisk::Fixed(FixedDisk(fixed)) => fixed.capacity_bytes,
        }
    }

    fn access(&self) -> Access {
        match self {
            OpenDisk::Volume(_) => Access::ReadWrite,
            OpenDisk::Fixed(_) => Access::ReadOnly,
        }
    }

    fn block_bytes(&self) -> u32 {
        crate::volume::extent_map::BLOCK_LEN as u32
    }

    fn extents(
        &self,
        question: &Question,
        offset: u64,
        len: u64,
        extents_max: usize,
    ) -> Result<Vec<Extent>, DiskError> {
        check_range(offset, len, self.capacity_bytes())?;
        let base = self.base_of(question)?;
        let mut extents = Joined { extents: Vec::new(), max: extents_max };
        let end = offset + len;
        let mut at = offset;
        while at < end && !extents.is_full() {
            let window = at..end.min((at / WINDOW_LEN + 1) * WINDOW_LEN);
            at = window.end;
            let (layered, root, chunk_len) = match self {
                OpenDisk::Volume(volume) => {
                    let core = volume.core();
                    let (layered, root) = core.layered(window.clone());
                    (layered, root, core.row.chunk_len)
                }
                OpenDisk::Fixed(FixedDisk(fixed)) => (vec![(window.clone(), None)], fixed.root, fixed.chunk_len),
            };
            let against = base.unwrap_or(Root { name: crate::name::Name::NONE, levels: root.levels });
            let tree = self.tree_parts([against, root], chunk_len, window)?;
            for (range, place) in layered {
                match place {
                    Some(Place::Zeros) => extents.add(range, base.is_some()),
                    Some(Place::Log(_) | Place::Chunks(_)) => extents.add(range, true),
                    None => extents.add_parts(range, &tree),
                }
            }
        }
        Ok(extents.extents)
    }

    fn snapshot_names(&self, names_max: usize) -> Result<Vec<String>, DiskError> {
        let OpenDisk::Volume(volume) = self else { return Ok(Vec::new()) };
        let snapshots = volume.store().catalog().snapshots(Some(volume.core().row.id))?;
        Ok(snapshots.into_iter().rev().take(names_max).map(|snapshot| snapshot.name).collect())
    }

    fn resize(&self, capacity_bytes: u64) -> Result<(), DiskError> {
        match self {
            OpenDisk::Volume(volume) => Ok(volume.resize(capacity_bytes)?),
            OpenDisk::Fixed(_) => Err(DiskError::ReadOnly),
        }
    }
}

/// Extents of which neighbours with the same answer are one.
struct Joined {
    extents: Vec<Extent>,
    max: usize,
}

impl Joined {
    fn is_full(&self) -> bool {
        self.extents.len() >= self.max
    }

    fn add(&mut self, range: Range<u64>, set: bool) {
        if range.is_empty() {
            return;
        }
        let full = self.is_full();
        match self.extents.last_mut() {
            // Behind a part that was left out nothing counts any more.
            Some(last) if last.offset + last.len != range.start => {}
            Some(last) if last.set == set => last.len += range.end - range.start,
            _ if full => {}
            _ => self.extents.push(Extent { offset: range.start, len: range.end - range.start, set }),
        }
    }

    /// Adds a range of which the listed parts are set.
    fn add_parts(&mut self, range: Range<u64>, parts: &[Range<u64>]) {
        let mut at = range.start;
        let first = parts.partition_point(|part| part.end <= range.start);
        for part in &parts[first..] {
            if part.start >= range.end {
                break;
            }
            self.add(at..part.start.max(at), false);
            let end = part.end.min(range.end);
            self.add(part.start.max(at)..end, true);
            at = end;
        }
        self.add(at..range.end, false);
    }
}

impl From<StoreError> for DiskError {
    fn from(error: StoreError) -> Self {
        let text = {
            let mut text = error.to_string();
            let mut cause = std::error::Error::source(&error);
            while let Some(source) = cause {
                text += &format!(": {source}");
                cause = source.source();
            }
            text
        };
        match error {
            StoreError::OutOfRange { offset, end, capacity_bytes } => {
                DiskError::OutOfRange { offset, end, capacity_bytes }
            }
            _ if error.is_no_space() => DiskError::NoSpace,
            StoreError::Damaged { .. } | StoreError::Missing { .. } => DiskError::Damaged { what: text },
            StoreError::File { source, .. } => DiskError::Io(source),
            _ => DiskError::Io(std::io::Error::other(text)),
        }
    }
}
