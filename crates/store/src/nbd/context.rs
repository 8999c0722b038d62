//! Metadata contexts: what a client can ask about the parts of a disk.

use super::LISTED_SNAPSHOTS_MAX;
use super::protocol::{STATE_DIRTY, state};
use crate::disk::{Disk, DiskError, Question, SECTOR_LEN};

const ALLOCATION: &str = "base:allocation";
const CHANGED: &str = "polder:changed:";
/// QEMU and libnbd know changes under this name.
const DIRTY_BITMAP: &str = "qemu:dirty-bitmap:";
/// Queries that stand for every context whose name begins so.
const WILDCARDS: [&str; 5] = ["base:", "polder:", CHANGED, "qemu:", DIRTY_BITMAP];

/// A context by its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Context {
    name: String,
    question: Question,
}

impl Context {
    /// As the client knows it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What the disk is asked.
    pub fn question(&self) -> &Question {
        &self.question
    }

    /// The status of a part.
    pub fn status(&self, set: bool) -> u32 {
        match (&self.question, set) {
            (Question::Allocated, true) => 0,
            (Question::Allocated, false) => state::HOLE | state::ZERO,
            (Question::ChangedSince(_), true) => STATE_DIRTY,
            (Question::ChangedSince(_), false) => 0,
        }
    }

    /// The contexts that queries name exactly. What is unknown is left out, as the protocol wants it.
    pub fn select<D: Disk>(disk: &D, queries: &[&str]) -> Result<Vec<Self>, DiskError> {
        let mut found = Vec::new();
        for query in queries {
            if let Some(context) = Self::parse(query)
                && !found.contains(&context)
                && context.exists(disk)?
            {
                found.push(context);
            }
        }
        Ok(found)
    }

    /// The contexts that match any of the queries; all if there is none.
    pub fn list<D: Disk>(disk: &D, queries: &[&str]) -> Result<Vec<Self>, DiskError> {
        let (wildcards, exact): (Vec<&str>, Vec<&str>) = queries.iter().partition(|query| WILDCARDS.contains(query));
        let mut found = Self::select(disk, &exact)?;
        if queries.is_empty() || !wildcards.is_empty() {
            let snapshots = disk.snapshot_names(LISTED_SNAPSHOTS_MAX)?;
            let prefixes = [CHANGED, DIRTY_BITMAP];
            let names = prefixes.iter().flat_map(|prefix| snapshots.iter().map(move |name| format!("{prefix}{name}")));
            for name in std::iter::once(ALLOCATION.to_owned()).chain(names) {
                let matches = queries.is_empty() || wildcards.iter().any(|wildcard| name.starts_with(wildcard));
                if let Some(context) = Self::parse(&name)
                    && matches
                    && !found.contains(&context)
                {
                    found.push(context);
                }
            }
        }
        Ok(found)
    }

    fn parse(name: &str) -> Option<Self> {
        let snapshot = [CHANGED, DIRTY_BITMAP].iter().find_map(|prefix| name.strip_prefix(prefix));
        let question = match snapshot {
            Some("") => return None,
            Some(snapshot) => Question::ChangedSince(snapshot.to_owned()),
            None if name == ALLOCATION => Question::Allocated,
            None => return None,
        };
        Some(Self { name: name.to_owned(), question })
    }

    fn exists<D: Disk>(&self, disk: &D) -> Result<bool, DiskError> {
        match disk.extents(&self.question, 0, disk.capacity_bytes().min(SECTOR_LEN), 1) {
            Ok(_) => Ok(true),
            Err(DiskError::NoSuchSnapshot { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }
}
