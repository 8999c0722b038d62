//! What a volume may hold after a crash, in memory that outlives the process that writes the volume.
//!
//! Every sector says which sector it is, and its version. For each the model knows the newest version that was handed to the volume, the
//! newest that a flush promised, and the newest that made it zeros; of snapshots, every sector's version. A volume holds what it promised if
//! each sector's version lies between the two.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};

use super::mapped::{Mapped, Shareable};

pub const SECTOR_LEN: usize = 512;
/// Of the volume, at its largest.
pub const SECTORS: usize = 6000;
pub const SNAPSHOTS: usize = 24;
const MAGIC: u32 = 0x5ec7_0123;

/// What is known of a snapshot.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Known {
    /// It was never asked for.
    Nothing = 0,
    /// Asked for: it can be there.
    Asked = 1,
    /// It is there.
    There = 2,
    /// Its removal was asked for: it can be gone.
    Removing = 3,
    Gone = 4,
}

#[repr(C)]
pub struct Sector {
    pub issued: AtomicU32,
    pub done: AtomicU32,
    pub promised: AtomicU32,
    pub newest_zero: AtomicU32,
    /// What it held after the last crash, and the newest version written before: those between the two are gone for ever.
    pub kept: AtomicU32,
    pub lost: AtomicU32,
}

#[repr(C)]
pub struct Snapshot {
    pub known: AtomicU32,
    pub sectors: AtomicU64,
    pub versions: [AtomicU32; SECTORS],
    /// Whether the version is that of zeros.
    pub zeros: [AtomicU32; SECTORS],
}

#[repr(C)]
pub struct Model {
    pub sectors: [Sector; SECTORS],
    pub snapshots: [Snapshot; SNAPSHOTS],
    /// The size that was promised, and the one that was asked for last.
    pub size_promised: AtomicU64,
    pub size_asked: AtomicU64,
    /// Operations that were promised: a test in which nothing happened shows nothing.
    pub promises: AtomicU64,
}

// SAFETY: everything in it is atomic.
unsafe impl Shareable for Model {}

/// The model in a file's memory, which processes share; a new one is of a volume never written.
pub type Shared = Mapped<Model>;

/// A sector's bytes.
pub fn sector(index: usize, version: u32) -> [u8; SECTOR_LEN] {
    let mut bytes = [0; SECTOR_LEN];
    let mut state = (index as u64) << 32 | u64::from(version) | 1;
    for word in bytes[12..].chunks_mut(4) {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        word.copy_from_slice(&((state >> 33) as u32).to_le_bytes());
    }
    bytes[..4].copy_from_slice(&MAGIC.to_le_bytes());
    bytes[4..8].copy_from_slice(&(index as u32).to_le_bytes());
    bytes[8..12].copy_from_slice(&version.to_le_bytes());
    bytes
}

/// The version that a sector's bytes say; none if they are zeros.
fn version(index: usize, bytes: &[u8]) -> Result<Option<u32>, String> {
    if bytes.iter().all(|&byte| byte == 0) {
        return Ok(None);
    }
    let found = u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]);
    match sector(index, found) == bytes {
        true => Ok(Some(found)),
        false => {
            Err(format!("sector {index} holds what was never written there, beginning with {:02x?}", &bytes[..12]))
        }
    }
}

impl Model {
    pub fn snapshot_name(slot: usize) -> String {
        format!("s{slot}")
    }

    /// Checks a volume's content after a crash; from then on it is what the volume is promised to hold.
    pub fn check(&self, content: &[u8]) -> Result<(), String> {
        let size = content.len() as u64;
        let sizes = [self.size_promised.load(SeqCst), self.size_asked.load(SeqCst)];
        if !sizes.contains(&size) {
            return Err(format!("the volume has {size} bytes and not one of {sizes:?}"));
        }
        for (index, model) in self.sectors.iter().enumerate() {
            let [issued, promised, zero] =
                [&model.issued, &model.promised, &model.newest_zero].map(|at| at.load(SeqCst));
            let bytes = content.get(index * SECTOR_LEN..(index + 1) * SECTOR_LEN);
            let now = match bytes {
                // Cut off by a smaller size, and zeros should it grow again.
                None => None,
                Some(bytes) => {
                    let found = version(index, bytes)?;
                    match found {
                        Some(found) if found < promised || found > issued => {
                            return Err(format!(
                                "sector {index} has version {found}, where {promised} was promised and {issued} written"
                            ));
                        }
                        Some(found) if found != model.kept.load(SeqCst) && found <= model.lost.load(SeqCst) => {
                            return Err(format!(
                                "sector {index} has version {found} again, which an earlier crash lost"
                            ));
                        }
                        None if zero < promised => {
                            return Err(format!(
                                "sector {index} is zeros, where version {promised} was promised; last zeros {zero}"
                            ));
                        }
                        _ => {}
                    }
                    found
                }
            };
            match now {
                Some(found) => {
                    model.newest_zero.store(0, SeqCst);
                    model.lost.store(issued, SeqCst);
                    for at in [&model.kept, &model.done, &model.promised] {
                        at.store(found, SeqCst);
                    }
                }
                None => {
                    // As if it were written as zeros now.
                    model.lost.store(issued, SeqCst);
                    for at in [&model.kept, &model.issued, &model.done, &model.promised, &model.newest_zero] {
                        at.store(issued + 1, SeqCst);
                    }
                }
            }
        }
        self.size_promised.store(size, SeqCst);
        self.size_asked.store(size, SeqCst);
        Ok(())
    }

    /// Whether sectors are zeros now.
    pub fn is_zero(&self, index: usize) -> bool {
        let sector = &self.sectors[index];
        sector.newest_zero.load(SeqCst) == sector.issued.load(SeqCst)
    }
}

impl Snapshot {
    pub fn known(&self) -> Known {
        match self.known.load(SeqCst) {
            1 => Known::Asked,
            2 => Known::There,
            3 => Known::Removing,
            4 => Known::Gone,
            _ => Known::Nothing,
        }
    }

    pub fn set(&self, known: Known) {
        self.known.store(known as u32, SeqCst);
    }

    /// Whether a snapshot may be there, or not.
    pub fn check_presence(&self, there: bool) -> Result<(), String> {
        let right = match self.known() {
            Known::Nothing | Known::Gone => !there,
            Known::There => there,
            Known::Asked | Known::Removing => true,
        };
        if !right {
            return Err(format!("known as {:?}, and {}", self.known(), if there { "there" } else { "not there" }));
        }
        self.set(if there { Known::There } else { Known::Gone });
        Ok(())
    }

    pub fn check(&self, content: &[u8]) -> Result<(), String> {
        let sectors = self.sectors.load(SeqCst);
        if content.len() as u64 != sectors * SECTOR_LEN as u64 {
            return Err(format!("{} bytes and not {sectors} sectors", content.len()));
        }
        for (index, bytes) in content.chunks(SECTOR_LEN).enumerate() {
            let expected = match self.zeros[index].load(SeqCst) {
                0 => Some(self.versions[index].load(SeqCst)),
                _ => None,
            };
            let found = version(index, bytes)?;
            if found != expected {
                return Err(format!("sector {index} has version {found:?} and not {expected:?}"));
            }
        }
        Ok(())
    }
}
