//! Verification and repair: every record is read, and its content compared with its name.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::catalog::SegmentRow;
use crate::error::{Result, StoreError};
use crate::name::Name;
use crate::records::behind::Writing;
use crate::records::record::{self, HEADER_LEN, Header};
use crate::records::segment;
use crate::room::Purpose;
use crate::store::Store;
use crate::upkeep::collect::{Step, Watcher};
use crate::upkeep::mark::{LogsSeen, Lost, Marks};

/// A record that is not what its name says, or a part of the index that cannot be trusted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// The file: a segment, or a run of the index.
    pub segment: std::path::PathBuf,
    pub offset: u64,
    /// Unknown if the header itself is damaged, or the index.
    pub name: Option<Name>,
    pub what: String,
}

/// What a verification found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Verified {
    pub records: u64,
    pub bytes: u64,
    /// Records of locked domains: their checksums are right, and what they hold was not compared with their names.
    pub locked: u64,
    pub damages: Vec<Damage>,
    /// What is needed and not to be had from any copy.
    pub lost: Vec<Lost>,
}

/// What a repair did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Repaired {
    pub found: Verified,
    /// Segments that were rewritten without what was damaged in them.
    pub rewritten_segments: u64,
    /// What is still missing: who needs it, and where.
    pub lost: Vec<Lost>,
}

/// How far a record was compared with its name.
enum Checked {
    Whole,
    /// Its domain is locked.
    Locked,
}

impl Store {
    /// Reads everything, and says what is damaged and what is lost.
    pub fn verify(self: &Arc<Self>, watcher: Watcher<'_>) -> Result<Verified> {
        self.index().refresh(self.catalog())?;
        let mut verified = Verified::default();
        let segments = self.catalog().segments()?;
        let total = segments.iter().map(|row| row.bytes).sum();
        for row in &segments {
            self.verify_segment(row, &mut verified)?;
            watcher(Step { what: "reading", done: verified.bytes, total })?;
        }
        for (segment, what) in self.index().check()? {
            verified.damages.push(Damage { segment, offset: 0, name: None, what });
        }
        verified.lost = self.lost(&verified.damages)?;
        Ok(verified)
    }

    fn verify_segment(&self, row: &SegmentRow, verified: &mut Verified) -> Result<()> {
        let path = self.segments().sealed(row.number);
        let damage = |offset, name, what| Damage { segment: path.clone(), offset, name, what };
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) => {
                // It may have been collected since it was listed.
                if self.catalog().segments()?.iter().any(|known| known.number == row.number) {
                    verified.damages.push(damage(0, None, format!("it cannot be read: {error}")));
                }
                return Ok(());
            }
        };
        verified.bytes += row.bytes;
        let end = (row.bytes as usize).min(bytes.len());
        let mut at = HEADER_LEN;
        while at < end {
            match Header::from_bytes(&bytes[at..end]) {
                Ok(header) => {
                    verified.records += 1;
                    let record = &bytes[at..end.min(at + header.record_len())];
                    match self.check(&header, record) {
                        Ok(Checked::Whole) => {}
                        Ok(Checked::Locked) => verified.locked += 1,
                        Err(what) => verified.damages.push(damage(at as u64, Some(header.name), what)),
                    }
                    at += header.record_len();
                }
                Err(what) => {
                    // Records begin at multiples of 64 bytes: the next whole header is where they go on.
                    verified.damages.push(damage(at as u64, None, what));
                    at += HEADER_LEN;
                    while at < end && Header::from_bytes(&bytes[at..end]).is_err() {
                        at += HEADER_LEN;
                    }
                }
            }
        }
        if (bytes.len() as u64) < row.bytes {
            verified.damages.push(damage(bytes.len() as u64, None, "it is cut off".to_owned()));
        } else if let Err(what) = segment::check_table(&bytes, row.number, row.bytes) {
            verified.damages.push(damage(row.bytes, None, what));
        }
        Ok(())
    }

    /// Whether a record holds what its name says.
    fn check(&self, header: &Header, bytes: &[u8]) -> Result<Checked, String> {
        let (header, packed) = record::split(bytes).map(|(_, packed)| (header, packed))?;
        let domain = match self.unlocked(header.domain) {
            Ok(domain) => domain,
            Err(_) => return Ok(Checked::Locked),
        };
        let content = self.unpack(header, packed).map_err(|error| error.to_string())??;
        let namer = domain.as_ref().map_or(self.namer(), |domain| &domain.namer);
        match namer.name(header.kind, &content) == header.name {
            true => Ok(Checked::Whole),
            false => Err(format!("chunk {} holds something else", header.name)),
        }
    }

    /// What of the damage concerns something that is kept, and has no other copy.
    fn lost(self: &Arc<Self>, damages: &[Damage]) -> Result<Vec<Lost>> {
        let mut marks = Marks::default();
        let roots = self.roots(&mut marks.logs)?;
        marks.add(self, &roots, &mut || Ok(()))?;
        let mut lost = std::mem::take(&mut marks.lost);
        let broken: BTreeSet<Name> =
            damages.iter().filter_map(|damage| damage.name).filter(|name| !self.is_whole(name)).collect();
        // Tables still lead to records whose headers are damaged.
        let headless = damages.iter().any(|damage| damage.name.is_none());
        let elsewhere = crate::remote::Elsewhere::load(self)?;
        if !broken.is_empty() || headless {
            self.find_needed(&mut |name, owner, offset| {
                let gone = match headless {
                    true => !self.is_whole(name),
                    false => broken.contains(name),
                };
                if gone
                    && !elsewhere.contains(name)
                    && !lost.iter().any(|known| known.name == *name && known.owner == owner && known.offset == offset)
                {
                    let why = "no copy of it is whole".to_owned();
                    lost.push(Lost { name: *name, owner: owner.to_owned(), offset, why });
                }
            })?;
        }
        Ok(lost)
    }

    /// Whether a copy of a record is what its name says, as far as can be told.
    fn is_whole(&self, name: &Name) -> bool {
        let Ok(locations) = self.index().find_all(name) else { return false };
        locations.into_iter().any(|location| {
            let Ok(file) = self.file_of(location) else { return false };
            let mut bytes = vec![0; location.read_len()];
            let Ok(len) = segment::read_up_to(&file, &mut bytes, location.offset()) else { return false };
            let header = Header::from_bytes(&bytes[..len]);
            header.is_ok_and(|header| header.name == *name && self.check(&header, &bytes[..len]).is_ok())
        })
    }

    /// Makes the best of what is there: segments that nobody knows are taken in, the index is made anew, and damaged segments are
    /// rewritten with what is whole in them and elsewhere. What cannot be had is named.
    pub fn repair(self: &Arc<Self>, watcher: Watcher<'_>) -> Result<Repaired> {
        let Some(_lock) = self.try_lock("collect.lock")? else {
            return Err(StoreError::Refused("a garbage collection is running".to_owned()));
        };
        self.recover_segments()?;
        let found = self.verify(watcher)?;
        let mut repaired = Repaired { found, ..Repaired::default() };
        let damaged: BTreeSet<_> = repaired.found.damages.iter().map(|damage| damage.segment.clone()).collect();
        let _alone = self.lock_out_batches()?;
        let rows: Vec<SegmentRow> = self.catalog().segments()?;
        for row in rows.iter().filter(|row| damaged.contains(&self.segments().sealed(row.number))) {
            self.rewrite(row)?;
            repaired.rewritten_segments += 1;
        }
        damaged.iter().try_for_each(|path| self.index().give_up(path, self.catalog()))?;
        self.index().refresh(self.catalog())?;
        repaired.lost = self.lost(&[])?;
        Ok(repaired)
    }

    /// Writes what is whole in a segment, or has a whole copy elsewhere, into another, which takes its place.
    fn rewrite(&self, row: &SegmentRow) -> Result<()> {
        let path = self.segments().sealed(row.number);
        let bytes = std::fs::read(&path).unwrap_or_default();
        let end = (row.bytes as usize).min(bytes.len());
        let mut target = self.new_segment(Writing::Direct, Purpose::MakeRoom)?;
        for at in (HEADER_LEN..end).step_by(HEADER_LEN) {
            let Ok((header, packed)) = record::split(&bytes[at..end]) else { continue };
            if self.check(&header, &bytes[at..end.min(at + header.record_len())]).is_ok() {
                target.append(&header, packed)?;
            }
        }
        target.seal(|summary| self.catalog().add_segment(summary))?;
        let runs = self.catalog().remove_segments(&[row.number])?;
        self.index().remove_runs(&runs)?;
        self.forget_segments(&[row.number]);
        // Kept for whoever knows how to read more of it.
        let aside = path.with_extension("damaged");
        match std::fs::rename(&path, &aside) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(StoreError::file("rename", &path)(error)),
            _ => Ok(()),
        }
    }

    /// Comes by every chunk that something keeps.
    fn find_needed(&self, found: &mut dyn FnMut(&Name, &str, Option<u64>)) -> Result<()> {
        use crate::store::Local;
        use crate::tree::{NodeSource, Visit, walk};
        let roots = self.roots(&mut LogsSeen::default())?;
        for kept in &roots.chunks {
            let owner = kept.owner.name(self)?;
            kept.chunks().for_each(|(offset, name)| found(name, &owner, Some(offset)));
        }
        let mut kept = roots.trees;
        for (owner, name) in &roots.nodes {
            found(name, &owner.name(self)?, None);
            if let Ok(node) = self.load_node(name) {
                kept.extend(node.trees().map(|tree| crate::upkeep::mark::Kept {
                    owner: owner.clone(),
                    root: tree.root,
                    chunk_len: tree.chunk_len,
                }));
            }
        }
        for kept in kept {
            let owner = kept.owner.name(self)?;
            walk(&Local(self), kept.root, &mut |visit| match visit {
                Visit::Node(name) => {
                    found(&name, &owner, None);
                    Ok(Local(self).node(&name).is_ok())
                }
                Visit::Chunk(index, name) => {
                    found(&name, &owner, Some(index * u64::from(kept.chunk_len)));
                    Ok(true)
                }
            })?;
        }
        Ok(())
    }
}
