//! What a volume is made of at a moment: records of its log, the newest on top, and the tree below them.

use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use crate::catalog::SnapshotRow;
use crate::error::{Result, StoreError};
use crate::name::Name;
use crate::tree::Root;
use crate::volume::extent_map::{BLOCK_LEN, ChunkPlace, ExtentMap, LogPlace, Place};
use crate::volume::log_file::LogFile;
use crate::volume::log_record::{Appended, Change, Position};
use crate::volume::log_seal::{self, LogSealer, Opening, SealedPart, SealedRecord, salt_of};

/// A record of the log that is not in the tree yet.
pub(crate) struct Pending {
    pub change: Change,
    pub place: LogPlace,
    pub payload_len: u32,
    pub snapshot: Option<Box<SnapshotRow>>,
    /// Who sealed it, if it is sealed.
    pub opening: Option<Arc<Opening>>,
    /// Of the chunks that it says, if it does.
    pub names: Option<Arc<[Name]>>,
}

/// Records of the log, and what they make of the volume.
#[derive(Default)]
pub(crate) struct Generation {
    pub extents: ExtentMap,
    pub records: Vec<Pending>,
    /// How many chunks the records name.
    pub named: u64,
}

impl Generation {
    /// The record that a place of the log is in.
    fn record(&self, place: LogPlace) -> Option<&Pending> {
        // Records lie in their order.
        self.records.get(self.records.partition_point(|record| record.place <= place).checked_sub(1)?)
    }

    /// The chunk that a record names, and how far into it a place is, in bytes.
    pub fn named_chunk(&self, place: ChunkPlace, chunk_len: usize) -> Option<(Name, usize)> {
        let at = u64::from(place.block) * BLOCK_LEN;
        let names = self.record(place.record)?.names.as_ref()?;
        Some((*names.get((at / chunk_len as u64) as usize)?, (at % chunk_len as u64) as usize))
    }

    /// A part of what was written at a place of the log; `skipped` bytes behind it. None if no record is there.
    pub fn piece(&self, files: &[Arc<LogFile>], place: LogPlace, skipped: u64, len: usize) -> Option<Piece> {
        let file = file_of(files, place)?.clone();
        let record = self.record(place)?;
        let Some(opening) = &record.opening else {
            return Some(Piece::Log { file, offset: place.offset() + skipped, len });
        };
        let (Change::Sealed { offset, number, .. }, Some(blocks)) =
            (record.change, log_seal::blocks_in(record.payload_len))
        else {
            return None;
        };
        let from = place.0 - record.place.0 + skipped;
        let record = SealedRecord { opening: opening.clone(), offset, number, place: record.place, blocks };
        Some(Piece::Sealed(Box::new(SealedPart { file, record, from, len })))
    }
}

/// What a volume is made of at a moment, the newest on top.
pub(crate) struct Layers {
    pub(super) active: Generation,
    pub(super) frozen: Option<Arc<Frozen>>,
    /// Files of the log that the generations point into, by their numbers.
    pub(super) files: Vec<Arc<LogFile>>,
    pub(super) root: Root,
    /// Of the tree.
    pub(super) root_capacity: u64,
    pub(super) capacity_bytes: u64,
}

impl Layers {
    /// The generation that a place of the log is in.
    fn generation(&self, place: LogPlace) -> &Generation {
        // What is active is behind what is frozen.
        let frozen = self.frozen.as_ref().filter(|frozen| place < frozen.end.place);
        frozen.map_or(&self.active, |frozen| &frozen.generation)
    }

    pub(super) fn log_piece(&self, place: LogPlace, skipped: u64, len: usize) -> Option<Piece> {
        self.generation(place).piece(&self.files, place, skipped, len)
    }

    /// The pieces of `len` bytes that lie in chunks which the log names, `skipped` bytes behind a place. None if no record is there.
    pub(super) fn named_pieces(
        &self,
        place: ChunkPlace,
        skipped: u64,
        len: usize,
        chunk_len: usize,
        pieces: &mut Vec<Piece>,
    ) -> Option<()> {
        let generation = self.generation(place.record);
        let (mut at, end) = (skipped, skipped + len as u64);
        while at < end {
            let block = ChunkPlace { block: place.block + (at / BLOCK_LEN) as u32, ..place };
            let (name, from) = generation.named_chunk(block, chunk_len)?;
            let from = from + (at % BLOCK_LEN) as usize;
            let len = (chunk_len - from).min((end - at) as usize);
            pieces.push(if name.is_none() { Piece::Zeros { len } } else { Piece::Named { name, from, len } });
            at += len as u64;
        }
        Some(())
    }

    /// What of some blocks lies over the tree, in order; the rest as `None`.
    pub(super) fn parts(&self, blocks: Range<u64>, add: &mut dyn FnMut(Range<u64>, Option<Place>)) {
        for (part, place) in self.active.extents.parts(blocks) {
            match (&place, &self.frozen) {
                (None, Some(frozen)) => {
                    frozen.generation.extents.parts(part).for_each(|(part, place)| add(part, place))
                }
                _ => add(part, place),
            }
        }
    }
}

/// A generation that is being moved into the tree.
pub(crate) struct Frozen {
    pub generation: Generation,
    /// The content of the log's files.
    pub files: Vec<Arc<LogFile>>,
    /// What it lies over.
    pub root: Root,
    pub root_capacity: u64,
    /// Behind its last record.
    pub end: Position,
    pub capacity_bytes: u64,
}

pub(super) fn file_of(files: &[Arc<LogFile>], place: LogPlace) -> Option<&Arc<LogFile>> {
    files.binary_search_by_key(&place.file(), |file| file.number).ok().map(|at| &files[at])
}

/// A part of a range: bytes, and what lies there over the tree.
pub(crate) type LayeredPart = (Range<u64>, Option<Place>);

/// A part of what is to be read.
#[derive(Debug, Clone)]
pub(crate) enum Piece {
    Zeros {
        len: usize,
    },
    Log {
        file: Arc<LogFile>,
        offset: u64,
        len: usize,
    },
    /// As `Log`, sealed.
    Sealed(Box<SealedPart>),
    /// `len` bytes from `from` on of a chunk that the log names.
    Named {
        name: Name,
        from: usize,
        len: usize,
    },
    /// `len` bytes from `from` on of a chunk of the tree.
    Chunk {
        index: u64,
        from: usize,
        len: usize,
    },
}

impl std::fmt::Debug for LogFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.path().display())
    }
}

impl Piece {
    pub fn len(&self) -> usize {
        match self {
            Piece::Zeros { len } | Piece::Log { len, .. } | Piece::Named { len, .. } | Piece::Chunk { len, .. } => *len,
            Piece::Sealed(part) => part.len,
        }
    }

    /// Reads what is zeros or in the log, waiting for the host's disk; `chunk` reads the others.
    pub fn read(&self, bytes: &mut [u8], chunk: impl FnOnce(&Piece, &mut [u8]) -> Result<()>) -> Result<()> {
        match self {
            Piece::Zeros { .. } => {
                bytes.fill(0);
                Ok(())
            }
            Piece::Log { file, offset, .. } => {
                file.file.read_exact_at(bytes, *offset).map_err(StoreError::file("read", file.path()))
            }
            Piece::Sealed(part) => part.read(bytes),
            Piece::Named { .. } | Piece::Chunk { .. } => chunk(self, bytes),
        }
    }
}

impl Generation {
    /// Adds a record that was appended to a volume of `capacity_bytes`.
    pub(super) fn add(
        &mut self,
        appended: &Appended,
        snapshot: Option<Box<SnapshotRow>>,
        opening: Option<Arc<Opening>>,
        names: Option<Arc<[Name]>>,
        capacity_bytes: u64,
    ) {
        self.named += names.as_ref().map_or(0, |names| names.len() as u64);
        let change = appended.change;
        lay(&mut self.extents, change, appended.place, appended.payload_len, capacity_bytes);
        self.records.push(Pending {
            change,
            place: appended.place,
            payload_len: appended.payload_len,
            snapshot,
            opening,
            names,
        });
    }
}

/// Who sealed a record that was found in the log of a volume, or why the record cannot be.
pub(super) fn opening_of(
    sealer: Option<&LogSealer>,
    before: &Generation,
    appended: &Appended,
    payload: &[u8],
) -> Result<Option<Arc<Opening>>, &'static str> {
    match (appended.change, sealer) {
        (Change::Sealed { suite, .. }, Some(sealer)) if log_seal::blocks_in(appended.payload_len).is_some() => {
            let before = before.records.iter().rev().find_map(|record| record.opening.as_ref());
            Ok(sealer.opening(suite, appended.end.epoch, salt_of(payload), before))
        }
        (Change::Sealed { .. }, Some(_)) => Err("a sealed record of impossible length"),
        (Change::Sealed { .. }, None) => Err("a sealed record in the log of a volume that is not encrypted"),
        (Change::Write { .. }, Some(_)) => Err("a record that is not sealed in the log of an encrypted volume"),
        _ => Ok(None),
    }
}

/// Lays a change of a volume of `capacity_bytes` over what was there.
pub(crate) fn lay(extents: &mut ExtentMap, change: Change, place: LogPlace, payload_len: u32, capacity_bytes: u64) {
    match change {
        Change::Write { offset } => {
            let block = offset / BLOCK_LEN;
            extents.insert(block..block + u64::from(payload_len) / BLOCK_LEN, Place::Log(place));
        }
        Change::Sealed { offset, .. } => {
            let block = offset / BLOCK_LEN;
            let blocks = log_seal::blocks_in(payload_len).unwrap_or_default();
            extents.insert(block..block + blocks, Place::Log(place));
        }
        Change::Chunks { offset, len } => {
            let place = Place::Chunks(ChunkPlace { record: place, block: 0 });
            extents.insert(offset / BLOCK_LEN..(offset + len) / BLOCK_LEN, place);
        }
        Change::Zeros { offset, len } => {
            extents.insert(offset / BLOCK_LEN..(offset + len) / BLOCK_LEN, Place::Zeros);
        }
        // What lies behind the end of a smaller volume is zeros should it grow again.
        Change::Resize { capacity_bytes: new } if new < capacity_bytes => {
            extents.insert(new.div_ceil(BLOCK_LEN)..capacity_bytes.div_ceil(BLOCK_LEN), Place::Zeros);
        }
        Change::Snapshot | Change::Resize { .. } => {}
    }
}

/// Bytes of log between two places, as if its files followed one another without a gap.
pub(super) fn backlog(file_len: u64, from: LogPlace, to: LogPlace) -> u64 {
    let linear = |place: LogPlace| u64::from(place.file()) * file_len + place.offset();
    linear(to).saturating_sub(linear(from))
}

pub(crate) fn chunk_pieces(start: u64, len: usize, chunk_len: usize, pieces: &mut Vec<Piece>) {
    let (mut at, end) = (start, start + len as u64);
    while at < end {
        let index = at / chunk_len as u64;
        let from = (at % chunk_len as u64) as usize;
        let len = (chunk_len - from).min((end - at) as usize);
        pieces.push(Piece::Chunk { index, from, len });
        at += len as u64;
    }
}
