//! A volume's head: what of it is in the tree, and where its log goes on from there.
//!
//! A file of two pages that are written in turn: a crash while one is written leaves the other.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::error::{Result, StoreError};
use crate::id::Id;
use crate::tree::Root;
use crate::volume::extent_map::LogPlace;
use crate::volume::log_file::{settle, sync_folder};
use crate::volume::log_record::Position;

const SLOT_LEN: u64 = 4096;
const CONTENT_LEN: usize = 128;
const MAGIC: &[u8; 16] = b"polder head\0\0\0\0\0";
const FORMAT: u32 = 1;

/// What a head says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct State {
    pub volume: Id,
    /// Grows with every process that opens the volume for writing.
    pub epoch: u32,
    pub root: Root,
    pub capacity_bytes: u64,
    /// Everything before this is in the tree.
    pub position: Position,
}

/// The head of a volume that is open.
pub(crate) struct Head {
    path: PathBuf,
    file: File,
    generation: u64,
    pub state: State,
}

impl Head {
    /// The file of a volume's folder.
    fn path(folder: &Path) -> PathBuf {
        folder.join("head")
    }

    /// Makes the head of a new volume.
    pub fn create(folder: &Path, state: State) -> Result<Self> {
        let path = Head::path(folder);
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path);
        let file = file.map_err(StoreError::file("make", &path))?;
        let mut head = Head { path, file, generation: 0, state };
        head.write(state)?;
        sync_folder(folder)?;
        Ok(head)
    }

    /// Opens the head of a volume, if it has one.
    pub fn open(folder: &Path) -> Result<Option<Self>> {
        let path = Head::path(folder);
        let file = match File::options().read(true).write(true).open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(StoreError::file("open", &path)(error)),
        };
        // The next state takes the place of the older page: which one that is the disk has to say, not a cache that holds what an
        // earlier process could not sync.
        settle(&file).map_err(StoreError::file("read", &path))?;
        match read(&file, &path)? {
            Some((generation, state)) => Ok(Some(Head { path, file, generation, state })),
            None => Ok(None),
        }
    }

    /// What the head of a volume says that somebody else may have open.
    pub fn peek(folder: &Path) -> Result<Option<State>> {
        let path = Head::path(folder);
        match File::open(&path) {
            Ok(file) => {
                settle(&file).map_err(StoreError::file("read", &path))?;
                Ok(read(&file, &path)?.map(|(_, state)| state))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(StoreError::file("open", &path)(error)),
        }
    }

    /// Writes another state; it is stable when this comes back.
    pub fn write(&mut self, state: State) -> Result<()> {
        let generation = self.generation + 1;
        let bytes = to_bytes(generation, &state);
        self.file
            .write_all_at(&bytes, generation % 2 * SLOT_LEN)
            .and_then(|()| self.file.sync_data())
            .map_err(StoreError::file("write", &self.path))?;
        self.generation = generation;
        self.state = state;
        Ok(())
    }
}

fn to_bytes(generation: u64, state: &State) -> [u8; CONTENT_LEN] {
    let mut bytes = [0; CONTENT_LEN];
    bytes[..16].copy_from_slice(MAGIC);
    bytes[16..20].copy_from_slice(&FORMAT.to_le_bytes());
    bytes[20..24].copy_from_slice(&state.epoch.to_le_bytes());
    bytes[24..32].copy_from_slice(&generation.to_le_bytes());
    bytes[32..48].copy_from_slice(&state.volume.0);
    bytes[48..56].copy_from_slice(&state.capacity_bytes.to_le_bytes());
    bytes[56..64].copy_from_slice(&state.position.place.0.to_le_bytes());
    bytes[64..72].copy_from_slice(&state.position.sequence.to_le_bytes());
    bytes[72..72 + Root::LEN].copy_from_slice(&state.root.to_bytes());
    bytes[108..112].copy_from_slice(&state.position.epoch.to_le_bytes());
    let checksum = crc32c::crc32c(&bytes[..CONTENT_LEN - 4]);
    bytes[CONTENT_LEN - 4..].copy_from_slice(&checksum.to_le_bytes());
    bytes
}

/// The newer of the two pages; none if neither was ever written whole.
fn read(file: &File, path: &Path) -> Result<Option<(u64, State)>> {
    let mut newest = None;
    for slot in 0..2 {
        let mut bytes = [0; CONTENT_LEN];
        match file.read_exact_at(&mut bytes, slot * SLOT_LEN) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => continue,
            Err(error) => return Err(StoreError::file("read", path)(error)),
        }
        if &bytes[..16] != MAGIC || bytes[CONTENT_LEN - 4..] != crc32c::crc32c(&bytes[..CONTENT_LEN - 4]).to_le_bytes()
        {
            continue;
        }
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        if word(16) != FORMAT {
            return Err(StoreError::UnknownFormat { path: path.to_path_buf(), found: word(16), known: FORMAT });
        }
        let mut volume = Id([0; 16]);
        volume.0.copy_from_slice(&bytes[32..48]);
        let damaged = || StoreError::Damaged {
            path: path.to_path_buf(),
            offset: slot * SLOT_LEN,
            what: "the root has an impossible number of levels".to_owned(),
        };
        let state = State {
            volume,
            epoch: word(20),
            root: Root::from_bytes(&bytes[72..72 + Root::LEN]).ok_or_else(damaged)?,
            capacity_bytes: long(48),
            position: Position { place: LogPlace(long(56)), sequence: long(64), epoch: word(108) },
        };
        if newest.is_none_or(|(generation, _)| generation < long(24)) {
            newest = Some((long(24), state));
        }
    }
    Ok(newest)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::name::{Kind, Namer};

    fn state(epoch: u32) -> State {
        State {
            volume: Id([3; 16]),
            epoch,
            root: Root { name: Namer::open().name(Kind::Tree, &epoch.to_le_bytes()), levels: 3 },
            capacity_bytes: 1 << 33,
            position: Position { place: LogPlace::new(4, 8192), sequence: 99, epoch },
        }
    }

    #[test]
    fn a_torn_page_leaves_the_state_before() {
        let folder = tempfile::tempdir().unwrap();
        assert!(Head::open(folder.path()).unwrap().is_none());
        let mut head = Head::create(folder.path(), state(1)).unwrap();
        for epoch in 2..8 {
            head.write(state(epoch)).unwrap();
            assert_eq!(Head::peek(folder.path()).unwrap(), Some(state(epoch)));
            let path = Head::path(folder.path());
            let whole = std::fs::read(&path).unwrap();
            let slot = (head.generation % 2 * SLOT_LEN) as usize;
            for bit in (0..8 * CONTENT_LEN).step_by(37) {
                let mut torn = whole.clone();
                torn[slot + bit / 8] ^= 1 << (bit % 8);
                std::fs::write(&path, torn).unwrap();
                assert_eq!(Head::open(folder.path()).unwrap().unwrap().state, state(epoch - 1));
            }
            std::fs::write(&path, whole).unwrap();
            head = Head::open(folder.path()).unwrap().unwrap();
        }
    }

    #[test]
    fn a_head_of_a_later_release_is_refused_by_its_format() {
        let folder = tempfile::tempdir().unwrap();
        Head::create(folder.path(), state(1)).unwrap();
        let path = Head::path(folder.path());
        let mut bytes = std::fs::read(&path).unwrap();
        let slot = SLOT_LEN as usize;
        bytes[slot + 16] = 9;
        let checksum = crc32c::crc32c(&bytes[slot..slot + CONTENT_LEN - 4]);
        bytes[slot + CONTENT_LEN - 4..slot + CONTENT_LEN].copy_from_slice(&checksum.to_le_bytes());
        std::fs::write(&path, bytes).unwrap();
        let error = Head::open(folder.path()).map(drop).unwrap_err().to_string();
        assert!(error.contains("format 9"), "{error}");
    }
}
