//! The segment that this process writes.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;

use crate::error::{Result, StoreError};
use crate::records::behind::{Behind, Writers, Writing};
use crate::records::record::{HEADER_LEN, Header};
use crate::records::segment::{
    Entry, Location, SEGMENT_LEN, SegmentFolder, SegmentNumber, Summary, file_header, lock, name_sealed, write_table,
};
use crate::room::Purpose;
use crate::volume::log_file::sync_folder;

/// The segment that this process writes.
pub(crate) struct SegmentWriter {
    folder: SegmentFolder,
    number: SegmentNumber,
    behind: Behind,
    entries: Vec<Entry>,
    synced: bool,
    /// The file's name is stable.
    named: bool,
    /// It has its table, and may be known: nothing is appended any more.
    ended: bool,
    /// A sync failed: what the file holds is not known.
    broken: bool,
}

impl SegmentWriter {
    /// A new segment. Its number must never have been used. None if somebody took it for one whose process died, before it was locked.
    pub fn create(
        folder: &SegmentFolder,
        number: SegmentNumber,
        writing: Writing,
        purpose: Purpose,
        writers: &Writers,
    ) -> Result<Option<Self>> {
        let path = folder.open(number);
        let file = File::options().read(true).write(true).create_new(true).open(&path);
        let file = file.map_err(StoreError::file("make", &path))?;
        match lock(&file) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            Err(error) => return Err(StoreError::file("lock", &path)(error)),
        }
        if file.metadata().map_err(StoreError::file("look at", &path))?.nlink() == 0 {
            return Ok(None);
        }
        let mut behind = Behind::new(Arc::new(file), &path, writing, purpose, writers);
        behind.push(&file_header(number));
        Ok(Some(SegmentWriter {
            folder: folder.clone(),
            number,
            behind,
            entries: Vec::new(),
            synced: false,
            named: false,
            ended: false,
            broken: false,
        }))
    }

    pub fn number(&self) -> SegmentNumber {
        self.number
    }

    /// For reading what was [flushed](Self::flush).
    pub fn file(&self) -> &Arc<File> {
        self.behind.file()
    }

    pub fn len(&self) -> u64 {
        self.behind.len()
    }

    pub fn is_full(&self) -> bool {
        self.ended || self.len() >= SEGMENT_LEN
    }

    /// Whether it may be known to the catalog.
    pub fn is_published(&self) -> bool {
        self.ended
    }

    /// Whether nothing more comes of it.
    pub fn is_broken(&self) -> bool {
        self.broken
    }

    /// Appends a record. One that fails, as where the disk is full, can be tried again.
    pub fn append(&mut self, header: &Header, packed: &[u8]) -> Result<Location> {
        self.check()?;
        self.behind.make_room().map_err(StoreError::file("write", &self.path()))?;
        let location = Location::new(self.number, self.len(), header.record_len());
        self.behind.push(&header.to_bytes());
        self.behind.push(packed);
        let padding = self.len().next_multiple_of(HEADER_LEN as u64) - self.len();
        self.behind.push(&[0; HEADER_LEN][..padding as usize]);
        self.entries.push(Entry { prefix: header.name.prefix(), location });
        self.synced = false;
        Ok(location)
    }

    /// Hands everything to the host, so that it can be read from the file.
    pub fn flush(&mut self) -> Result<()> {
        self.check()?;
        self.behind.flush().map_err(StoreError::file("write", &self.path()))
    }

    fn write_all(&mut self) -> Result<()> {
        self.check()?;
        self.behind.write_all().map_err(StoreError::file("write", &self.path()))
    }

    /// Makes the file's name stable.
    fn sync_name(&mut self) -> Result<()> {
        if !self.named {
            sync_folder(&self.folder.0)?;
            self.named = true;
        }
        Ok(())
    }

    /// Whether a record can be read from the file.
    pub fn is_readable(&self, location: Location) -> bool {
        self.behind.is_readable(location.offset() + location.read_len() as u64)
    }

    /// Reads a record, and perhaps some behind it, from wherever that is. Gives how many bytes there were.
    pub fn read_at(&self, location: Location, bytes: &mut [u8]) -> Result<usize> {
        self.behind.read_at(bytes, location.offset()).map_err(StoreError::file("read", &self.path()))
    }

    /// Makes everything stable.
    pub fn sync(&mut self) -> Result<()> {
        self.check()?;
        if self.synced {
            return Ok(());
        }
        self.write_all()?;
        self.sync_name()?;
        if let Err(error) = self.file().sync_data() {
            self.broken = true;
            return Err(StoreError::file("write", &self.path())(error));
        }
        self.synced = true;
        Ok(())
    }

    fn check(&self) -> Result<()> {
        if self.broken { Err(StoreError::Broken { path: self.path() }) } else { Ok(()) }
    }

    fn path(&self) -> PathBuf {
        self.folder.open(self.number)
    }

    /// Ends the segment: stable, with its table, made known by `publish`, then under its final name. One without records is removed;
    /// then there is no summary. Unless it broke, it can be tried again.
    pub fn seal(&mut self, publish: impl FnOnce(&Summary) -> Result<()>) -> Result<Option<Summary>> {
        if self.entries.is_empty() {
            self.remove()?;
            return Ok(None);
        }
        self.write_all()?;
        self.sync_name()?;
        let (path, end) = (self.path(), self.len());
        let summary = write_table(self.number, self.file(), end, self.entries.clone());
        let summary = summary.map_err(StoreError::file("finish", &path))?;
        if let Err(error) = self.file().sync_all() {
            self.broken = true;
            return Err(StoreError::file("finish", &path)(error));
        }
        self.ended = true;
        publish(&summary)?;
        name_sealed(&self.folder, self.number);
        Ok(Some(summary))
    }

    /// Removes the file of a segment of which nothing is needed.
    pub fn remove(&self) -> Result<()> {
        let path = self.path();
        std::fs::remove_file(&path).map_err(StoreError::file("remove", &path))
    }
}
