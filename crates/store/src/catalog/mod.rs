//! The catalog: which volumes, snapshots, images and segments there are. SQLite in WAL mode, so that any number of processes read
//! and write it at once and a killed one leaves it whole.
//!
//! Three connections: what must be stable when the call comes back goes through `durable`; what a volume's log already holds
//! goes through `quick`, which leaves syncing to whoever comes next; `checkpoints` writes SQLite's own log back.

mod row;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use rusqlite::{Connection, OptionalExtension, Params, Row, Transaction, TransactionBehavior, params};

use crate::error::{Result, StoreError};
use crate::id::Id;
use crate::name::Name;
use crate::records::segment::{SEGMENT_NUMBER_MAX, SegmentNumber, Summary};
use crate::tree::Root;

pub(crate) use row::SegmentRow;
pub use row::{DomainRow, ImageRow, SnapshotRow, VolumeRow};
use row::{domain_row, image_row, segment_row, snapshot_row, volume_row};

/// The version of the tables' layout.
const LAYOUT: u32 = 2;
const BUSY_TIMEOUT: Duration = Duration::from_secs(20);
/// Longest name of a volume, snapshot or image.
const NAME_LEN_MAX: usize = 128;

const TABLES: &str = "
    CREATE TABLE fact (key TEXT PRIMARY KEY, value ANY NOT NULL) STRICT, WITHOUT ROWID;
    CREATE TABLE segment (number INTEGER PRIMARY KEY, records INTEGER NOT NULL, bytes INTEGER NOT NULL, run INTEGER) STRICT;
    CREATE TABLE run (number INTEGER PRIMARY KEY, entries INTEGER NOT NULL) STRICT;
    CREATE TABLE volume (
        id BLOB PRIMARY KEY, name TEXT NOT NULL UNIQUE, created_ns INTEGER NOT NULL, domain INTEGER NOT NULL,
        chunk_len INTEGER NOT NULL, capacity INTEGER NOT NULL, root BLOB NOT NULL, origin BLOB
    ) STRICT;
    CREATE TABLE snapshot (
        id BLOB PRIMARY KEY, volume BLOB NOT NULL, name TEXT NOT NULL, created_ns INTEGER NOT NULL,
        chunk_len INTEGER NOT NULL, domain INTEGER NOT NULL, capacity INTEGER NOT NULL, root BLOB, node BLOB,
        UNIQUE (volume, name)
    ) STRICT;
    CREATE TABLE removed_snapshot (id BLOB PRIMARY KEY, volume BLOB NOT NULL) STRICT;
    CREATE INDEX snapshot_in_order ON snapshot (volume, created_ns);
    CREATE TABLE image (name TEXT PRIMARY KEY, created_ns INTEGER NOT NULL, node BLOB NOT NULL) STRICT, WITHOUT ROWID;
";

/// What layout 2 has and layout 1 had not.
const DOMAIN_TABLE: &str = "
    CREATE TABLE domain (
        id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, created_ns INTEGER NOT NULL, key_file TEXT,
        erased INTEGER NOT NULL DEFAULT 0
    ) STRICT;
";

pub(crate) struct Catalog {
    durable: Mutex<Connection>,
    quick: Mutex<Connection>,
    /// For checkpoints alone: nobody who reads or adds something waits for their syncs.
    checkpoints: Mutex<Connection>,
    /// Snapshots and clones that were added since the last checkpoint of this process.
    added: AtomicU64,
}

/// Snapshots or clones between two checkpoints. Each is up to seven pages of the log, so that this is some 30 MiB.
const ADDED_MAX: u64 = 1000;

impl Catalog {
    /// Opens the catalog, and makes it if it is not there.
    pub fn open(path: &Path) -> Result<Self> {
        let durable = connect(path, "FULL")?;
        make_tables(&durable, path)?;
        Ok(Catalog {
            durable: Mutex::new(durable),
            quick: Mutex::new(connect(path, "NORMAL")?),
            checkpoints: Mutex::new(connect(path, "NORMAL")?),
            added: AtomicU64::new(0),
        })
    }

    fn durable(&self) -> MutexGuard<'_, Connection> {
        self.durable.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn quick(&self) -> MutexGuard<'_, Connection> {
        self.quick.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Runs a change as one transaction that is stable when this comes back.
    fn change<T>(&self, change: impl FnOnce(&Transaction<'_>) -> Result<T>) -> Result<T> {
        let mut connection = self.durable();
        let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let value = change(&transaction)?;
        transaction.commit()?;
        Ok(value)
    }

    /// As [`change`](Self::change) for one statement. Gives the number of rows that it changed.
    fn execute(&self, statement: &str, values: impl Params) -> Result<usize> {
        self.change(|transaction| Ok(transaction.execute(statement, values)?))
    }

    /// All rows that a query finds.
    fn all<T>(
        &self,
        query: &str,
        values: impl Params,
        read: impl FnMut(&Row<'_>) -> rusqlite::Result<T>,
    ) -> Result<Vec<T>> {
        let connection = self.quick();
        let mut statement = connection.prepare_cached(query)?;
        let rows = statement.query_map(values, read)?;
        Ok(rows.collect::<rusqlite::Result<_>>()?)
    }

    /// The one row that a query finds, of something of that name.
    fn named<T>(
        &self,
        what: &'static str,
        name: &str,
        query: &str,
        values: impl Params,
        read: impl FnOnce(&Row<'_>) -> rusqlite::Result<T>,
    ) -> Result<T> {
        let connection = self.quick();
        let row = connection.prepare_cached(query)?.query_row(values, read).optional()?;
        row.ok_or_else(|| StoreError::NotFound { what, name: name.to_owned() })
    }

    /// Moves what was written into the tables proper, so that the log begins again from its front. For a thread that may wait.
    pub fn checkpoint(&self) -> Result<()> {
        self.added.store(0, Ordering::Relaxed);
        let connection = self.checkpoints.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let pass = || connection.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |_| Ok(()));
        pass()?;
        // What came meanwhile is little. A writer begins the log again only where a pass has left nothing of it.
        let (_durable, _quick) = (self.durable(), self.quick());
        pass()?;
        Ok(())
    }

    /// Whether so much was added that somebody who may wait should do a checkpoint. Says so once.
    pub fn wants_checkpoint(&self) -> bool {
        self.added.fetch_add(1, Ordering::Relaxed) + 1 == ADDED_MAX
    }

    // Facts

    /// The store's id, made when the store was.
    pub fn store_id(&self) -> Result<Id> {
        Ok(self.quick().query_row("SELECT value FROM fact WHERE key = 'store'", [], |row| row.get(0))?)
    }

    /// Grows with every change of segments and runs.
    pub fn generation(&self) -> Result<i64> {
        let connection = self.quick();
        let mut statement = connection.prepare_cached("SELECT value FROM fact WHERE key = 'generation'")?;
        Ok(statement.query_row([], |row| row.get(0))?)
    }

    // Segments and runs

    /// A number that no segment ever had.
    pub fn new_segment(&self) -> Result<SegmentNumber> {
        self.change(|transaction| {
            let number: u32 = transaction.query_row(
                "UPDATE fact SET value = value + 1 WHERE key = 'segments' RETURNING value",
                [],
                |row| row.get(0),
            )?;
            if number > SEGMENT_NUMBER_MAX {
                return Err(StoreError::Refused("the store has used up all numbers of segments".to_owned()));
            }
            Ok(SegmentNumber(number))
        })
    }

    /// Sees to it that numbers up to `number` are not given out again.
    pub fn skip_segments(&self, number: SegmentNumber) -> Result<()> {
        self.execute("UPDATE fact SET value = max(value, ?1) WHERE key = 'segments'", [number.0]).map(drop)
    }

    /// Adds a sealed segment.
    pub fn add_segment(&self, summary: &Summary) -> Result<()> {
        self.change(|transaction| {
            transaction.execute(
                "INSERT OR IGNORE INTO segment (number, records, bytes) VALUES (?1, ?2, ?3)",
                params![summary.number.0, summary.records, summary.bytes],
            )?;
            next_generation(transaction)
        })
    }

    /// Takes segments out: nothing that is read from now on finds them. Runs that index none any more are gone, and are given
    /// back.
    pub fn remove_segments(&self, segments: &[SegmentNumber]) -> Result<Vec<u32>> {
        self.change(|transaction| {
            for segment in segments {
                transaction.execute("DELETE FROM segment WHERE number = ?1", [segment.0])?;
            }
            next_generation(transaction)?;
            remove_unused_runs(transaction)
        })
    }

    pub fn segments(&self) -> Result<Vec<SegmentRow>> {
        self.all("SELECT number, records, bytes, run FROM segment ORDER BY number", [], segment_row)
    }

    /// A number that no run ever had.
    pub fn new_run(&self) -> Result<u32> {
        self.change(|transaction| {
            Ok(transaction.query_row(
                "UPDATE fact SET value = value + 1 WHERE key = 'runs' RETURNING value",
                [],
                |row| row.get(0),
            )?)
        })
    }

    /// From now on the run indexes those segments; runs that index none any more are gone, and are given back.
    pub fn set_run(&self, run: u32, entries: u64, segments: &[SegmentNumber]) -> Result<Vec<u32>> {
        self.change(|transaction| {
            transaction.execute("INSERT INTO run (number, entries) VALUES (?1, ?2)", params![run, entries])?;
            for segment in segments {
                transaction.execute("UPDATE segment SET run = ?1 WHERE number = ?2", params![run, segment.0])?;
            }
            next_generation(transaction)?;
            remove_unused_runs(transaction)
        })
    }

    /// A run cannot be read: its segments' own tables serve.
    pub fn forget_run(&self, run: u32) -> Result<()> {
        self.change(|transaction| {
            transaction.execute("UPDATE segment SET run = NULL WHERE run = ?1", [run])?;
            remove_unused_runs(transaction)?;
            next_generation(transaction)
        })
    }

    // Volumes

    pub fn add_volume(&self, volume: &VolumeRow) -> Result<()> {
        check_name("volume", &volume.name)?;
        let added = self.change(|transaction| insert_volume(transaction, volume));
        exists(added, "volume", &volume.name)
    }

    /// Adds a volume that begins as a snapshot; none if the snapshot is gone. Looking it up and adding the volume are one transaction: what
    /// the volume needs is kept by one or the other at any moment, so that a collection that looks at snapshots first finds it.
    pub fn add_clone(
        &self,
        name: &str,
        snapshot: Id,
        clone: impl FnOnce(SnapshotRow) -> Result<VolumeRow>,
    ) -> Result<Option<VolumeRow>> {
        check_name("volume", name)?;
        let added = self.change(|transaction| {
            let Some(snapshot) = snapshot_of_id(transaction, snapshot)? else { return Ok(None) };
            let volume = clone(snapshot)?;
            insert_volume(transaction, &volume)?;
            Ok(Some(volume))
        });
        exists(added, "volume", name)
    }

    pub fn volume(&self, name: &str) -> Result<VolumeRow> {
        self.named("volume", name, "SELECT * FROM volume WHERE name = ?1", [name], volume_row)
    }

    pub fn volumes(&self) -> Result<Vec<VolumeRow>> {
        self.all("SELECT * FROM volume ORDER BY name", [], volume_row)
    }

    /// Removes a volume and its snapshots.
    pub fn remove_volume(&self, id: Id) -> Result<()> {
        self.change(|transaction| {
            keep_for_clones(transaction, "volume", id)?;
            transaction.execute("DELETE FROM snapshot WHERE volume = ?1", [id])?;
            transaction.execute("DELETE FROM removed_snapshot WHERE volume = ?1", [id])?;
            transaction.execute("DELETE FROM volume WHERE id = ?1", [id])?;
            Ok(())
        })
    }

    pub fn rename_volume(&self, id: Id, name: &str) -> Result<()> {
        check_name("volume", name)?;
        let renamed = self.execute("UPDATE volume SET name = ?2 WHERE id = ?1", params![id, name]);
        exists(renamed, "volume", name).map(drop)
    }

    /// The volume began as this content: its origin is in the store now.
    pub fn set_volume_root(&self, id: Id, root: Root) -> Result<()> {
        self.execute("UPDATE volume SET root = ?2, origin = NULL WHERE id = ?1", params![id, root]).map(drop)
    }

    // Snapshots

    /// Adds a snapshot that the volume's log holds already.
    pub fn add_snapshot(&self, snapshot: &SnapshotRow) -> Result<()> {
        check_name("snapshot", &snapshot.name)?;
        let connection = self.quick();
        let added = insert_snapshot(&connection, snapshot);
        exists(added, "snapshot", &snapshot.name)
    }

    /// A snapshot that was found in its volume's log is there, unless it was removed since. Whether it is.
    pub fn restore_snapshot(&self, snapshot: &SnapshotRow) -> Result<bool> {
        let connection = self.quick();
        let restore = !was_removed(&connection, snapshot.id)?;
        if restore {
            exists(insert_snapshot(&connection, snapshot), "snapshot", &snapshot.name)?;
        }
        Ok(restore)
    }

    /// The volume's log holds no record any more of snapshots that were removed.
    pub fn forget_removed_snapshots(&self, volume: Id) -> Result<()> {
        let connection = self.quick();
        let mut some = connection.prepare_cached("SELECT 1 FROM removed_snapshot WHERE volume = ?1")?;
        if some.exists([volume])? {
            connection.execute("DELETE FROM removed_snapshot WHERE volume = ?1", [volume])?;
        }
        Ok(())
    }

    /// The content of snapshots is in the store now. Those that the catalog does not know yet are added, but for those that were removed.
    pub fn set_snapshot_roots(&self, roots: &[(SnapshotRow, Root, Name)]) -> Result<()> {
        self.change(|transaction| {
            for (snapshot, root, node) in roots {
                if was_removed(transaction, snapshot.id)? {
                    continue;
                }
                let snapshot = SnapshotRow { root: Some(*root), node: Some(*node), ..snapshot.clone() };
                insert_snapshot(transaction, &snapshot)?;
            }
            Ok(())
        })
    }

    pub fn snapshot(&self, volume: Id, name: &str) -> Result<SnapshotRow> {
        let query = "SELECT * FROM snapshot WHERE volume = ?1 AND name = ?2";
        self.named("snapshot", name, query, params![volume, name], snapshot_row)
    }

    pub fn snapshot_by_id(&self, id: Id) -> Result<Option<SnapshotRow>> {
        snapshot_of_id(&self.quick(), id)
    }

    /// The snapshots of a volume, oldest first; of all volumes without one.
    pub fn snapshots(&self, volume: Option<Id>) -> Result<Vec<SnapshotRow>> {
        let query = "SELECT * FROM snapshot WHERE ?1 IS NULL OR volume = ?1 ORDER BY volume, created_ns, rowid";
        self.all(query, [volume], snapshot_row)
    }

    /// Tells of every snapshot, in no order, what a collection has to know: its row, its root, the length of its chunks, and its node.
    pub fn for_each_snapshot(&self, mut each: impl FnMut(i64, Option<Root>, u32, Option<Name>)) -> Result<()> {
        let connection = self.quick();
        let mut statement = connection.prepare_cached("SELECT rowid, root, chunk_len, node FROM snapshot")?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            each(row.get(0)?, row.get(1)?, row.get(2)?, row.get(3)?);
        }
        Ok(())
    }

    /// The names of the snapshot in a row and of its volume.
    pub fn snapshot_and_volume(&self, row: i64) -> Result<Option<(String, String)>> {
        let connection = self.quick();
        let mut statement = connection.prepare_cached(
            "SELECT snapshot.name, volume.name FROM snapshot JOIN volume ON volume.id = snapshot.volume
             WHERE snapshot.rowid = ?1",
        )?;
        Ok(statement.query_row([row], |row| Ok((row.get(0)?, row.get(1)?))).optional()?)
    }

    /// The newest snapshot of a volume whose content is in the store, but for some.
    pub fn newest_node(&self, volume: Id, except: &BTreeSet<Id>) -> Result<Option<Name>> {
        let connection = self.quick();
        let mut statement = connection.prepare_cached(
            "SELECT id, node FROM snapshot WHERE volume = ?1 AND node IS NOT NULL ORDER BY created_ns DESC, rowid DESC",
        )?;
        let mut rows = statement.query([volume])?;
        while let Some(row) = rows.next()? {
            if !except.contains(&row.get(0)?) {
                return Ok(Some(row.get(1)?));
            }
        }
        Ok(None)
    }

    pub fn remove_snapshot(&self, id: Id) -> Result<()> {
        self.change(|transaction| {
            keep_for_clones(transaction, "id", id)?;
            // Its record may still be in the volume's log.
            transaction.execute(
                "INSERT OR IGNORE INTO removed_snapshot SELECT id, volume FROM snapshot WHERE id = ?1",
                [id],
            )?;
            transaction.execute("DELETE FROM snapshot WHERE id = ?1", [id])?;
            Ok(())
        })
    }

    // Domains

    pub fn add_domain(&self, name: &str, key_file: Option<&str>, created_ns: u64) -> Result<DomainRow> {
        let added = self.change(|transaction| {
            let added = transaction.query_row(
                "INSERT INTO domain (name, created_ns, key_file) VALUES (?1, ?2, ?3) RETURNING *",
                params![name, created_ns as i64, key_file],
                domain_row,
            )?;
            Ok(added)
        });
        exists(added, "domain", name)
    }

    pub fn domain(&self, name: &str) -> Result<DomainRow> {
        self.named("domain", name, "SELECT * FROM domain WHERE name = ?1", [name], domain_row)
    }

    pub fn domains(&self) -> Result<Vec<DomainRow>> {
        self.all("SELECT * FROM domain ORDER BY name", [], domain_row)
    }

    pub fn set_key_file(&self, id: u32, key_file: Option<&str>) -> Result<()> {
        self.execute("UPDATE domain SET key_file = ?2 WHERE id = ?1", params![id, key_file]).map(drop)
    }

    pub fn set_domain_erased(&self, id: u32) -> Result<()> {
        self.execute("UPDATE domain SET erased = 1 WHERE id = ?1", [id]).map(drop)
    }

    pub fn remove_domain(&self, id: u32) -> Result<()> {
        self.execute("DELETE FROM domain WHERE id = ?1", [id]).map(drop)
    }

    // Images

    /// Gives a node a name; an image of that name must not exist unless it may be replaced.
    pub fn add_image(&self, image: &ImageRow, replace: Replace) -> Result<()> {
        check_name("image", &image.name)?;
        let statement = match replace {
            Replace::No => "INSERT INTO image (name, created_ns, node) VALUES (?1, ?2, ?3)",
            Replace::Yes => "INSERT OR REPLACE INTO image (name, created_ns, node) VALUES (?1, ?2, ?3)",
        };
        let added = self.execute(statement, params![image.name, image.created_ns as i64, image.node]);
        exists(added, "image", &image.name).map(drop)
    }

    pub fn image(&self, name: &str) -> Result<ImageRow> {
        self.named("image", name, "SELECT * FROM image WHERE name = ?1", [name], image_row)
    }

    pub fn images(&self) -> Result<Vec<ImageRow>> {
        self.all("SELECT * FROM image ORDER BY name", [], image_row)
    }

    pub fn remove_image(&self, name: &str) -> Result<()> {
        let removed = self.execute("DELETE FROM image WHERE name = ?1", [name])?;
        if removed == 0 {
            return Err(StoreError::NotFound { what: "image", name: name.to_owned() });
        }
        Ok(())
    }
}

/// Whether something of the same name gives way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Replace {
    No,
    Yes,
}

fn connect(path: &Path, synchronous: &str) -> Result<Connection> {
    let connection = Connection::open(path)?;
    connection.busy_timeout(BUSY_TIMEOUT)?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", synchronous)?;
    // Checkpoints are for a thread that may wait, and for the last process that closes the catalog.
    connection.pragma_update(None, "wal_autocheckpoint", 0)?;
    connection.set_prepared_statement_cache_capacity(64);
    Ok(connection)
}

fn make_tables(connection: &Connection, path: &Path) -> Result<()> {
    let layout = |connection: &Connection| connection.pragma_query_value(None, "user_version", |row| row.get(0));
    let mut found: u32 = layout(connection)?;
    if found < LAYOUT {
        connection.execute_batch("BEGIN IMMEDIATE")?;
        found = layout(connection)?;
        if found == 0 {
            connection.execute_batch(TABLES)?;
            connection.execute_batch(DOMAIN_TABLE)?;
            let mut insert = connection.prepare("INSERT INTO fact (key, value) VALUES (?1, ?2)")?;
            insert.execute(params!["store", Id::random()])?;
            for counter in ["generation", "segments", "runs"] {
                insert.execute(params![counter, 0])?;
            }
        } else if found == 1 {
            connection.execute_batch(DOMAIN_TABLE)?;
        }
        if found < LAYOUT {
            connection.pragma_update(None, "user_version", LAYOUT)?;
            found = LAYOUT;
        }
        connection.execute_batch("COMMIT")?;
    }
    if found != LAYOUT {
        return Err(StoreError::UnknownFormat { path: path.to_path_buf(), found, known: LAYOUT });
    }
    Ok(())
}

/// Volumes that began as snapshots that go now get the snapshots' roots.
fn keep_for_clones(transaction: &Transaction<'_>, column: &str, id: Id) -> Result<()> {
    let statement = format!(
        "UPDATE volume SET root = snapshot.root, origin = NULL FROM snapshot
         WHERE volume.origin = snapshot.id AND snapshot.root IS NOT NULL AND snapshot.{column} = ?1"
    );
    transaction.execute(&statement, [id])?;
    Ok(())
}

fn insert_volume(connection: &Connection, volume: &VolumeRow) -> Result<()> {
    let mut statement = connection.prepare_cached(
        "INSERT INTO volume (id, name, created_ns, domain, chunk_len, capacity, root, origin)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
    )?;
    statement.execute(params![
        volume.id,
        volume.name,
        volume.created_ns as i64,
        volume.domain,
        volume.chunk_len,
        volume.capacity_bytes as i64,
        volume.root,
        volume.origin
    ])?;
    Ok(())
}

fn snapshot_of_id(connection: &Connection, id: Id) -> Result<Option<SnapshotRow>> {
    let mut statement = connection.prepare_cached("SELECT * FROM snapshot WHERE id = ?1")?;
    Ok(statement.query_row([id], snapshot_row).optional()?)
}

/// Adds a snapshot, or what is known of it now.
fn insert_snapshot(connection: &Connection, snapshot: &SnapshotRow) -> Result<()> {
    let mut statement = connection.prepare_cached(
        "INSERT INTO snapshot (id, volume, name, created_ns, chunk_len, domain, capacity, root, node)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)
         ON CONFLICT (id) DO UPDATE SET root = coalesce(excluded.root, root), node = coalesce(excluded.node, node)",
    )?;
    statement.execute(params![
        snapshot.id,
        snapshot.volume,
        snapshot.name,
        snapshot.created_ns as i64,
        snapshot.chunk_len,
        snapshot.domain,
        snapshot.capacity_bytes as i64,
        snapshot.root,
        snapshot.node
    ])?;
    Ok(())
}

fn was_removed(connection: &Connection, snapshot: Id) -> Result<bool> {
    Ok(connection.prepare_cached("SELECT 1 FROM removed_snapshot WHERE id = ?1")?.exists([snapshot])?)
}

fn next_generation(transaction: &Transaction<'_>) -> Result<()> {
    transaction.execute("UPDATE fact SET value = value + 1 WHERE key = 'generation'", [])?;
    Ok(())
}

fn remove_unused_runs(transaction: &Transaction<'_>) -> Result<Vec<u32>> {
    let mut unused = transaction.prepare(
        "DELETE FROM run WHERE number NOT IN (SELECT run FROM segment WHERE run IS NOT NULL) RETURNING number",
    )?;
    Ok(unused.query_map([], |row| row.get(0))?.collect::<rusqlite::Result<_>>()?)
}

/// Names can be parts of paths and of URLs, and are not options.
pub fn check_name(what: &'static str, name: &str) -> Result<()> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.len() > NAME_LEN_MAX || !name.starts_with(|c: char| c.is_ascii_alphanumeric()) || !name.chars().all(plain) {
        return Err(StoreError::BadName { what, name: name.to_owned() });
    }
    Ok(())
}

fn exists<T>(result: Result<T>, what: &'static str, name: &str) -> Result<T> {
    match result {
        Err(StoreError::Catalog(error))
            if error.sqlite_error_code() == Some(rusqlite::ErrorCode::ConstraintViolation) =>
        {
            Err(StoreError::Exists { what, name: name.to_owned() })
        }
        other => other,
    }
}
