//! The table of instances.
//!
//! SQLite in WAL mode: any number of commands read and write it at once, and a killed one leaves it whole.

use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use polder_basics::ByteSize;
use rusqlite::{Connection, OptionalExtension, Row, params};

use super::process::ProcessId;
use crate::state_folder::StateFolder;

/// The version of the table's layout.
const LAYOUT: i64 = 1;
/// Longest name of an instance; it is a host name in the guest too.
const NAME_LEN_MAX: usize = 63;
const BUSY_TIMEOUT: Duration = Duration::from_secs(10);
/// How soon a table that is busy is tried again.
const BUSY_LOOK: Duration = Duration::from_millis(5);

/// How long an instance lasts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lifetime {
    /// Until `polder rm`.
    Kept,
    /// As long as the command that started it.
    Command,
}

/// What the table says of an instance's process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    Making,
    Active,
    Inactive,
}

impl Phase {
    fn word(self) -> &'static str {
        match self {
            Phase::Making => "making",
            Phase::Active => "active",
            Phase::Inactive => "inactive",
        }
    }

    fn from_word(word: &str) -> Option<Self> {
        [Phase::Making, Phase::Active, Phase::Inactive].into_iter().find(|phase| phase.word() == word)
    }
}

/// An instance.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InstanceRecord {
    pub name: String,
    pub image: String,
    pub created_s: u64,
    pub cpus: u32,
    pub ram_bytes: u64,
    pub engine: String,
    pub lifetime: Lifetime,
    /// As last written; [`InstanceRecord::is_active`] says what is true.
    pub phase: Phase,
    /// The process that makes or runs it.
    pub process: ProcessId,
    /// How its machine ended last.
    pub ending: Option<String>,
}

impl InstanceRecord {
    /// Whether its machine runs now.
    pub fn is_active(&self) -> bool {
        self.phase == Phase::Active && self.process.is_alive()
    }

    /// Whether a process works on it.
    pub fn is_in_use(&self) -> bool {
        self.phase != Phase::Inactive && self.process.is_alive()
    }

    /// Its state, for people.
    pub fn state(&self) -> String {
        match (self.phase, self.process.is_alive()) {
            (Phase::Active, true) => "active".to_owned(),
            (Phase::Making, true) => "being made".to_owned(),
            (Phase::Making, false) => "inactive (never started)".to_owned(),
            (Phase::Active, false) => "inactive (its process died)".to_owned(),
            (Phase::Inactive, _) => match &self.ending {
                Some(ending) => format!("inactive ({ending})"),
                None => "inactive".to_owned(),
            },
        }
    }

    fn from_row(row: &Row<'_>) -> rusqlite::Result<Self> {
        let phase: String = row.get("phase")?;
        let kept: bool = row.get("kept")?;
        Ok(InstanceRecord {
            name: row.get("name")?,
            image: row.get("image")?,
            created_s: row.get::<_, i64>("created_s")?.try_into().unwrap_or(0),
            cpus: row.get("cpus")?,
            ram_bytes: row.get::<_, i64>("ram_bytes")?.try_into().unwrap_or(0),
            engine: row.get("engine")?,
            lifetime: if kept { Lifetime::Kept } else { Lifetime::Command },
            phase: Phase::from_word(&phase).unwrap_or(Phase::Inactive),
            process: ProcessId { pid: row.get("pid")?, start: row.get::<_, i64>("pid_start")? as u64 },
            ending: row.get("ending")?,
        })
    }
}

/// What a new instance is to be.
#[derive(Debug, Clone)]
pub struct NewInstance {
    pub name: String,
    pub image: String,
    pub cpus: u32,
    pub ram: ByteSize,
    pub engine: String,
    pub lifetime: Lifetime,
}

/// The open table.
pub struct InstanceTable {
    connection: Connection,
}

/// Refuses names that could not be a folder, a host name and a word on the command line.
pub fn check_name(name: &str) -> Result<()> {
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-';
    if name.is_empty() || name.len() > NAME_LEN_MAX || name.starts_with('-') || !name.chars().all(plain) {
        bail!(
            "{name:?} is no name for an instance (use up to {NAME_LEN_MAX} letters, digits and '-', starting with a letter or digit)"
        );
    }
    Ok(())
}

impl InstanceTable {
    /// Opens the table in the state folder; makes it if it is not there.
    pub fn open(state: &StateFolder) -> Result<Self> {
        let path = state.path().join("instances.db");
        let start = Instant::now();
        loop {
            match Self::open_file(&path) {
                // SQLite does not wait by itself where the file becomes one with a log, or where a log is gone over again.
                Err(error) if is_busy(&error) && start.elapsed() < BUSY_TIMEOUT => std::thread::sleep(BUSY_LOOK),
                other => {
                    return other.with_context(|| format!("cannot use the table of instances {}", path.display()));
                }
            }
        }
    }

    fn open_file(path: &Path) -> Result<Self> {
        let mut connection = Connection::open(path)?;
        connection.busy_timeout(BUSY_TIMEOUT)?;
        connection.pragma_update(None, "journal_mode", "WAL")?;
        let transaction = connection.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
        let layout: i64 = transaction.pragma_query_value(None, "user_version", |row| row.get(0))?;
        match layout {
            LAYOUT => {}
            0 => {
                transaction.execute_batch(
                    "CREATE TABLE instances (
                        name TEXT PRIMARY KEY NOT NULL,
                        image TEXT NOT NULL,
                        created_s INTEGER NOT NULL,
                        cpus INTEGER NOT NULL,
                        ram_bytes INTEGER NOT NULL,
                        engine TEXT NOT NULL,
                        kept INTEGER NOT NULL,
                        phase TEXT NOT NULL,
                        pid INTEGER NOT NULL,
                        pid_start INTEGER NOT NULL,
                        ending TEXT
                    ) STRICT;",
                )?;
                transaction.pragma_update(None, "user_version", LAYOUT)?;
            }
            other => bail!("it has layout {other}, which this release does not know: a later release made it"),
        }
        transaction.commit()?;
        Ok(InstanceTable { connection })
    }

    /// Claims a name for an instance that this process makes.
    pub fn claim(&self, new: &NewInstance) -> Result<()> {
        check_name(&new.name)?;
        let process = ProcessId::own();
        let created_s = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let inserted = self.connection.execute(
            "INSERT INTO instances (name, image, created_s, cpus, ram_bytes, engine, kept, phase, pid, pid_start)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10) ON CONFLICT (name) DO NOTHING",
            params![
                new.name,
                new.image,
                created_s as i64,
                new.cpus,
                new.ram.0 as i64,
                new.engine,
                new.lifetime == Lifetime::Kept,
                Phase::Making.word(),
                process.pid,
                process.start as i64,
            ],
        )?;
        if inserted == 0 {
            let state = self.find(&new.name)?.map_or_else(|| "gone again".to_owned(), |record| record.state());
            bail!(
                "the name {} is in use: that instance is {state} (choose another --name, or remove it with `polder rm {}`)",
                new.name,
                new.name
            );
        }
        Ok(())
    }

    /// Says that this process runs the instance's machine.
    pub fn set_active(&self, name: &str) -> Result<()> {
        let process = ProcessId::own();
        self.connection.execute(
            "UPDATE instances SET phase = ?2, pid = ?3, pid_start = ?4, ending = NULL WHERE name = ?1",
            params![name, Phase::Active.word(), process.pid, process.start as i64],
        )?;
        Ok(())
    }

    /// Says that the instance's machine has ended, and how.
    pub fn set_inactive(&self, name: &str, ending: &str) -> Result<()> {
        self.connection.execute(
            "UPDATE instances SET phase = ?2, ending = ?3 WHERE name = ?1",
            params![name, Phase::Inactive.word(), ending],
        )?;
        Ok(())
    }

    /// Forgets an instance.
    pub fn remove(&self, name: &str) -> Result<()> {
        self.connection.execute("DELETE FROM instances WHERE name = ?1", params![name])?;
        Ok(())
    }

    /// The instance of that name, if there is one.
    pub fn find(&self, name: &str) -> Result<Option<InstanceRecord>> {
        let query = "SELECT * FROM instances WHERE name = ?1";
        Ok(self.connection.query_row(query, params![name], InstanceRecord::from_row).optional()?)
    }

    /// The instance of that name, or a sentence.
    pub fn get(&self, name: &str) -> Result<InstanceRecord> {
        match self.find(name)? {
            Some(record) => Ok(record),
            None => bail!("there is no instance {name} (`polder ps` lists what there is)"),
        }
    }

    /// The instance of that name if its machine runs, or a sentence.
    pub fn get_active(&self, name: &str) -> Result<InstanceRecord> {
        let record = self.get(name)?;
        if !record.is_active() {
            bail!("the instance {name} is not active: it is {}", record.state());
        }
        Ok(record)
    }

    /// Every instance, the oldest first.
    pub fn all(&self) -> Result<Vec<InstanceRecord>> {
        let mut query = self.connection.prepare("SELECT * FROM instances ORDER BY created_s, name")?;
        let records = query.query_map([], InstanceRecord::from_row)?.collect::<rusqlite::Result<_>>()?;
        Ok(records)
    }
}

/// Whether another process uses the table just now.
fn is_busy(error: &anyhow::Error) -> bool {
    let code = error.downcast_ref::<rusqlite::Error>().and_then(rusqlite::Error::sqlite_error_code);
    code == Some(rusqlite::ErrorCode::DatabaseBusy)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A table, and the folder that it is gone with.
    fn table() -> (InstanceTable, StateFolder, tempfile::TempDir) {
        let folder = tempfile::tempdir().unwrap();
        let state = StateFolder::at(folder.path().to_path_buf());
        (InstanceTable::open(&state).unwrap(), state, folder)
    }

    fn new(name: &str) -> NewInstance {
        NewInstance {
            name: name.to_owned(),
            image: "debian".to_owned(),
            cpus: 2,
            ram: ByteSize(1 << 30),
            engine: "auto".to_owned(),
            lifetime: Lifetime::Kept,
        }
    }

    #[test]
    fn a_name_is_claimed_once_and_free_again_when_removed() {
        let (table, state, _folder) = table();
        table.claim(&new("web")).unwrap();
        let second = InstanceTable::open(&state).unwrap();
        let error = second.claim(&new("web")).unwrap_err().to_string();
        assert!(error.contains("in use") && error.contains("polder rm web"), "{error}");
        second.remove("web").unwrap();
        table.claim(&new("web")).unwrap();
    }

    #[test]
    fn a_life_passes_through_its_states() {
        let (table, _, _folder) = table();
        table.claim(&new("web")).unwrap();
        assert_eq!(table.get("web").unwrap().state(), "being made");
        table.set_active("web").unwrap();
        assert!(table.get_active("web").is_ok());
        table.set_inactive("web", "powered off").unwrap();
        assert_eq!(table.get("web").unwrap().state(), "inactive (powered off)");
        let error = table.get_active("web").unwrap_err().to_string();
        assert!(error.contains("inactive (powered off)"), "{error}");
    }

    #[test]
    fn an_instance_whose_process_died_is_inactive_whatever_the_row_says() {
        let (table, _, _folder) = table();
        table.claim(&new("web")).unwrap();
        table.set_active("web").unwrap();
        // Our own pid with another start time: the number was used again by another process.
        table.connection.execute("UPDATE instances SET pid_start = pid_start + 1", []).unwrap();
        let record = table.get("web").unwrap();
        assert!(!record.is_active());
        assert_eq!(record.state(), "inactive (its process died)");
    }

    #[test]
    fn a_table_is_made_by_many_at_once() {
        for _ in 0..20 {
            let folder = tempfile::tempdir().unwrap();
            let state = StateFolder::at(folder.path().to_path_buf());
            std::thread::scope(|scope| {
                let openers: Vec<_> = (0..8).map(|_| scope.spawn(|| InstanceTable::open(&state).map(drop))).collect();
                for opener in openers {
                    opener.join().unwrap().unwrap();
                }
            });
        }
    }

    #[test]
    fn a_table_of_a_later_release_is_refused_by_name() {
        let (table, state, _folder) = table();
        table.connection.pragma_update(None, "user_version", 99).unwrap();
        let error = format!("{:#}", InstanceTable::open(&state).err().unwrap());
        assert!(error.contains("layout 99"), "{error}");
    }

    #[test]
    fn names_that_lead_elsewhere_are_refused() {
        for name in ["", "..", "a/b", "-x", "a b", "a.b", "ä", &"x".repeat(64)] {
            assert!(check_name(name).is_err(), "{name:?}");
        }
        assert!(check_name("web-1").is_ok());
    }
}
