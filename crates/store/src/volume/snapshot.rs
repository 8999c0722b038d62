//! Snapshots and sizes of an open volume: records of its log.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::sync::{Arc, MutexGuard, Weak};

use prost::Message;

use crate::catalog::{SnapshotRow, VolumeRow, check_name};
use crate::error::{Result, StoreError};
use crate::id::Id;
use crate::volume::core::Core;
use crate::volume::extent_map::BLOCK_LEN;
use crate::volume::log_record::Change;
use crate::volume::{check_capacity, now_ns};

/// Names of an open volume's snapshots.
#[derive(Default)]
pub(super) struct SnapshotNames {
    /// Those in the log. A name that is there and did not get into the catalog gets there later.
    pending: BTreeSet<String>,
    /// Those that the catalog had when the first one was made, and all since. Who has the volume open makes all of them, so others are
    /// free; those that are here may have been removed. None: nobody asked for one yet.
    known: Option<BTreeSet<String>>,
}

impl SnapshotNames {
    /// Names that were found in the log.
    pub fn in_log(pending: BTreeSet<String>) -> Self {
        SnapshotNames { pending, known: None }
    }

    /// What had these names is in the tree.
    pub fn settled(&mut self, names: &[&str]) {
        self.pending.retain(|name| !names.contains(&name.as_str()));
    }

    /// Whether a name is taken. The catalog is only asked where it may be: that takes as long as a tenth of a sync.
    fn is_taken(&mut self, name: &str, core: &Core) -> Result<bool> {
        let catalog = core.store.catalog();
        let known = match &mut self.known {
            Some(known) => known,
            None => {
                let names = catalog.snapshots(Some(core.row.id))?.into_iter().map(|snapshot| snapshot.name);
                self.known.insert(names.collect())
            }
        };
        Ok(self.pending.contains(name) || known.contains(name) && catalog.snapshot(core.row.id, name).is_ok())
    }

    fn add(&mut self, name: &str) {
        self.pending.insert(name.to_owned());
        if let Some(known) = &mut self.known {
            known.insert(name.to_owned());
        }
    }
}

impl Core {
    pub fn snapshot(self: &Arc<Self>, name: &str) -> Result<SnapshotRow> {
        check_name("snapshot", name)?;
        // Nobody else makes snapshots of this volume: who has the turn knows which names are taken.
        let mut names = self.snapshot_names();
        if names.is_taken(name, self)? {
            return Err(StoreError::Exists { what: "snapshot", name: name.to_owned() });
        }
        let mut snapshot = SnapshotRow {
            id: Id::random(),
            volume: self.row.id,
            name: name.to_owned(),
            created_ns: now_ns(),
            domain: self.row.domain,
            chunk_len: self.row.chunk_len,
            capacity_bytes: 0,
            root: None,
            node: None,
        };
        let payload = encode_snapshot(&snapshot);
        {
            let mut log = self.log();
            snapshot.capacity_bytes = self.capacity_bytes();
            let checksum = crc32c::crc32c(&payload);
            self.append_locked(&mut log, Change::Snapshot, &payload, checksum, Some(Box::new(snapshot.clone())))?;
            names.add(name);
        }
        self.flush()?;
        self.store.catalog().add_snapshot(&snapshot)?;
        self.store.added_to_catalog();
        Ok(snapshot)
    }

    pub(super) fn snapshot_names(&self) -> MutexGuard<'_, SnapshotNames> {
        self.snapshot_names.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    pub fn resize(self: &Arc<Self>, capacity_bytes: u64) -> Result<()> {
        check_capacity(capacity_bytes)?;
        let old = self.capacity_bytes();
        if capacity_bytes > old && !old.is_multiple_of(BLOCK_LEN) {
            self.clear_tail(old)?;
        }
        {
            let mut log = self.log();
            if self.capacity_bytes() == capacity_bytes {
                return Ok(());
            }
            self.append_locked(&mut log, Change::Resize { capacity_bytes }, &[], crc32c::crc32c(&[]), None)?;
        }
        self.flush()?;
        self.tell_queues();
        Ok(())
    }

    /// A queue's signal is raised from now on when the volume gets another size.
    pub fn tell_of_sizes(&self, signal: &Arc<OwnedFd>) {
        let mut queues = self.queues.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        queues.retain(|queue| queue.strong_count() > 0);
        queues.push(Arc::downgrade(signal));
    }

    fn tell_queues(&self) {
        let queues = self.queues.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        for signal in queues.iter().filter_map(Weak::upgrade) {
            // A counter at its maximum wakes as well.
            let _ = rustix::io::write(&*signal, &1u64.to_ne_bytes());
        }
    }

    /// Zeros behind the end of a volume whose last block is not whole, before it grows.
    fn clear_tail(&self, capacity_bytes: u64) -> Result<()> {
        let block = capacity_bytes / BLOCK_LEN * BLOCK_LEN;
        let mut tail = vec![0; (capacity_bytes - block) as usize];
        self.read_at(block, &mut tail)?;
        self.write_at(block, &tail)
    }
}

/// A snapshot as a volume's log holds it.
#[derive(Clone, PartialEq, prost::Message)]
struct SnapshotRecord {
    #[prost(bytes = "vec", tag = "1")]
    id: Vec<u8>,
    #[prost(string, tag = "2")]
    name: String,
    #[prost(uint64, tag = "3")]
    created_ns: u64,
}

fn encode_snapshot(snapshot: &SnapshotRow) -> Vec<u8> {
    let record =
        SnapshotRecord { id: snapshot.id.0.to_vec(), name: snapshot.name.clone(), created_ns: snapshot.created_ns };
    record.encode_to_vec()
}

pub(super) fn decode_snapshot(payload: &[u8], volume: &VolumeRow, capacity_bytes: u64) -> Option<SnapshotRow> {
    let record = SnapshotRecord::decode(payload).ok()?;
    Some(SnapshotRow {
        id: Id(record.id.try_into().ok()?),
        volume: volume.id,
        name: record.name,
        created_ns: record.created_ns,
        domain: volume.domain,
        chunk_len: volume.chunk_len,
        capacity_bytes,
        root: None,
        node: None,
    })
}
