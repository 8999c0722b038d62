//! Rows of the catalog: what each says, and how ids, names and roots lie in them.

use rusqlite::types::{FromSql, FromSqlError, FromSqlResult, ToSqlOutput, ValueRef};
use rusqlite::{Row, ToSql};

use crate::id::Id;
use crate::name::Name;
use crate::records::segment::SegmentNumber;
use crate::tree::Root;

/// A domain that is encrypted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DomainRow {
    /// Never used again for another.
    pub id: u32,
    pub name: String,
    pub created_ns: u64,
    /// Where its key is found, as whoever made it said.
    pub key_file: Option<String>,
    /// Its secret was destroyed.
    pub is_erased: bool,
}

/// A volume, as the catalog knows it. What was written since it was opened first is in its folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeRow {
    pub id: Id,
    pub name: String,
    pub created_ns: u64,
    pub domain: u32,
    pub chunk_len: u32,
    /// Of the volume when it was made.
    pub capacity_bytes: u64,
    pub(crate) root: Root,
    /// The snapshot that it began as, if that was not in the store yet when it was made.
    pub origin: Option<Id>,
}

/// A snapshot of a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotRow {
    pub id: Id,
    pub volume: Id,
    pub name: String,
    pub created_ns: u64,
    pub domain: u32,
    pub chunk_len: u32,
    pub capacity_bytes: u64,
    /// None while its content is only in the volume's log.
    pub(crate) root: Option<Root>,
    pub node: Option<Name>,
}

/// A name for a node that instances start from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageRow {
    pub name: String,
    pub created_ns: u64,
    pub node: Name,
}

/// A sealed segment, and the run that indexes it if its own table does not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SegmentRow {
    pub number: SegmentNumber,
    pub records: u32,
    pub bytes: u64,
    pub run: Option<u32>,
}

/// A number of 64 bits: the catalog has signed ones only.
fn unsigned(row: &Row<'_>, column: &str) -> rusqlite::Result<u64> {
    Ok(row.get::<_, i64>(column)? as u64)
}

pub(super) fn segment_row(row: &Row<'_>) -> rusqlite::Result<SegmentRow> {
    Ok(SegmentRow {
        number: SegmentNumber(row.get("number")?),
        records: row.get("records")?,
        bytes: row.get("bytes")?,
        run: row.get("run")?,
    })
}

pub(super) fn volume_row(row: &Row<'_>) -> rusqlite::Result<VolumeRow> {
    Ok(VolumeRow {
        id: row.get("id")?,
        name: row.get("name")?,
        created_ns: unsigned(row, "created_ns")?,
        domain: row.get("domain")?,
        chunk_len: row.get("chunk_len")?,
        capacity_bytes: unsigned(row, "capacity")?,
        root: row.get("root")?,
        origin: row.get("origin")?,
    })
}

pub(super) fn snapshot_row(row: &Row<'_>) -> rusqlite::Result<SnapshotRow> {
    Ok(SnapshotRow {
        id: row.get("id")?,
        volume: row.get("volume")?,
        name: row.get("name")?,
        created_ns: unsigned(row, "created_ns")?,
        domain: row.get("domain")?,
        chunk_len: row.get("chunk_len")?,
        capacity_bytes: unsigned(row, "capacity")?,
        root: row.get("root")?,
        node: row.get("node")?,
    })
}

pub(super) fn domain_row(row: &Row<'_>) -> rusqlite::Result<DomainRow> {
    Ok(DomainRow {
        id: row.get("id")?,
        name: row.get("name")?,
        created_ns: unsigned(row, "created_ns")?,
        key_file: row.get("key_file")?,
        is_erased: row.get("erased")?,
    })
}

pub(super) fn image_row(row: &Row<'_>) -> rusqlite::Result<ImageRow> {
    Ok(ImageRow { name: row.get("name")?, created_ns: unsigned(row, "created_ns")?, node: row.get("node")? })
}

impl ToSql for Id {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(ToSqlOutput::from(&self.0[..]))
    }
}

impl FromSql for Id {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
        value.as_blob()?.try_into().map(Id).map_err(|_| FromSqlError::InvalidType)
    }
}

impl ToSql for Name {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(ToSqlOutput::from(&self.0[..]))
    }
}

impl FromSql for Name {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
        value.as_blob()?.try_into().map(Name).map_err(|_| FromSqlError::InvalidType)
    }
}

impl ToSql for Root {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(ToSqlOutput::from(self.to_bytes().to_vec()))
    }
}

impl FromSql for Root {
    fn column_result(value: ValueRef<'_>) -> FromSqlResult<Self> {
        Root::from_bytes(value.as_blob()?).ok_or(FromSqlError::InvalidType)
    }
}
