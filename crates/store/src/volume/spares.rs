//! Files of logs whose content is of no use any more, kept to be written again by whichever volume of the store needs one next.
//!
//! Their blocks are allocated and were written, so that a flush of what is written into them again writes that and nothing else; and what
//! the host's page cache has of them is written over instead of being made anew. They lie in one folder of the store under names that
//! begin with their length. Processes take them by renaming them: one of two that want the same file gets it.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

use crate::error::{Result, StoreError};
use crate::id::Id;
use crate::room;
use crate::volume::log_file::{LogFile, write_zeros};

/// Bytes of files that are kept: as much as one log holds.
const SPARE_BYTES_MAX: u64 = 1 << 30;

/// The spare files of a store, as far as this process knows of them.
pub(crate) struct Spares {
    folder: PathBuf,
    /// None: nobody has looked.
    known: Mutex<Option<Vec<PathBuf>>>,
}

/// A file that is to be written again.
pub(crate) struct Spare {
    path: PathBuf,
    file: File,
}

impl Spare {
    /// Gives the file another name, and so takes it; none if somebody else has, or if that name is on another file system.
    pub fn rename(self, to: &Path) -> io::Result<Option<File>> {
        match std::fs::rename(&self.path, to) {
            Ok(()) => Ok(Some(self.file)),
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::CrossesDevices) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl Spares {
    /// Those in a folder, which is there.
    pub fn new(folder: PathBuf) -> Self {
        Spares { folder, known: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Vec<PathBuf>>> {
        self.known.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Does something with the list of known files; whoever wants it first looks at what others left.
    fn with_known<T>(&self, act: impl FnOnce(&mut Vec<PathBuf>) -> T) -> T {
        let mut known = self.lock();
        act(known.get_or_insert_with(|| {
            self.list().unwrap_or_else(|error| {
                tracing::warn!(%error, "files that are kept for logs are not known");
                Vec::new()
            })
        }))
    }

    fn list(&self) -> Result<Vec<PathBuf>> {
        let entries = std::fs::read_dir(&self.folder).and_then(|entries| {
            entries.map(|entry| entry.map(|entry| entry.path())).collect::<io::Result<Vec<PathBuf>>>()
        });
        entries.map_err(StoreError::file("list", &self.folder))
    }

    fn is_of(path: &Path, len: u64) -> bool {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        // What is still being made has another extension, and is nobody's to take.
        path.extension().is_none() && name.split_once('-').is_some_and(|(found, _)| found.parse() == Ok(len))
    }

    /// Whether a file of a length is known.
    pub fn has(&self, len: u64) -> bool {
        self.with_known(|known| known.iter().any(|path| Spares::is_of(path, len)))
    }

    /// Looks again at what others left here.
    pub fn look(&self) -> Result<()> {
        *self.lock() = Some(self.list()?);
        Ok(())
    }

    /// A file of a length, if one is known.
    pub fn take(&self, len: u64) -> Option<Spare> {
        loop {
            let path = self.with_known(|known| {
                let at = known.iter().rposition(|path| Spares::is_of(path, len))?;
                Some(known.swap_remove(at))
            })?;
            // What cannot be opened somebody else took.
            if let Ok(file) = File::options().read(true).write(true).open(&path) {
                return Some(Spare { path, file });
            }
        }
    }

    fn new_path(&self, len: u64) -> PathBuf {
        self.folder.join(format!("{len}-{}", Id::random()))
    }

    /// Makes a file, written with zeros so that flushes find its blocks written.
    pub fn make(&self, len: u64) -> Result<()> {
        let path = self.new_path(len);
        // Nobody takes it while it is made.
        let making = path.with_extension("making");
        let made = (|| {
            let file = File::options().write(true).create_new(true).open(&making)?;
            room::leave(&file, len)?;
            write_zeros(&file, 0, len, || room::leave(&file, 0).and_then(|()| file.sync_data()))?;
            file.sync_all()?;
            std::fs::rename(&making, &path)
        })();
        if let Err(error) = made {
            let _ = std::fs::remove_file(&making);
            return Err(StoreError::file("make", &path)(error));
        }
        self.add(path);
        Ok(())
    }

    /// Knows of a file that is there; where nobody has looked yet, who does will find it.
    fn add(&self, path: PathBuf) {
        if let Some(known) = &mut *self.lock()
            && !known.contains(&path)
        {
            known.push(path);
        }
    }

    /// Keeps what is left of files of a log that nobody reads any more, or removes them if there are enough.
    pub fn give(&self, files: &[LogFile], len: u64) -> Result<()> {
        if files.is_empty() {
            return Ok(());
        }
        // Others may have taken some, and left some.
        self.look()?;
        files.iter().try_for_each(|file| self.give_one(file, len))
    }

    fn give_one(&self, file: &LogFile, len: u64) -> Result<()> {
        if (self.with_known(|known| known.len()) as u64 + 1) * len <= SPARE_BYTES_MAX {
            let path = self.new_path(len);
            match std::fs::rename(file.path(), &path) {
                Ok(()) => {
                    self.add(path);
                    return Ok(());
                }
                // A volume's folder can be on another file system.
                Err(error) if error.kind() == io::ErrorKind::CrossesDevices => {}
                Err(error) => return Err(StoreError::file("rename", file.path())(error)),
            }
        }
        std::fs::remove_file(file.path()).map_err(StoreError::file("remove", file.path()))
    }

    /// Removes them all: somebody needs the room.
    pub fn clear(&self) -> Result<()> {
        self.look()?;
        for path in self.with_known(std::mem::take) {
            match std::fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(StoreError::file("remove", &path)(error));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_taken_once_and_by_its_length() {
        let folder = tempfile::tempdir().unwrap();
        let (one, two) = (Spares::new(folder.path().to_owned()), Spares::new(folder.path().to_owned()));
        one.make(1 << 20).unwrap();
        // Who wants one for the first time looks.
        assert!(two.take(1 << 19).is_none() && two.has(1 << 20));
        // Somebody is writing zeros into it.
        std::fs::write(two.new_path(1 << 19).with_extension("making"), [0]).unwrap();
        two.look().unwrap();
        assert!(two.take(1 << 19).is_none());
        let spares = [one.take(1 << 20).unwrap(), two.take(1 << 20).unwrap()];
        assert!(one.take(1 << 20).is_none());
        let [first, second] = spares.map(|spare| spare.rename(&folder.path().join("log")).unwrap());
        assert_eq!(first.unwrap().metadata().unwrap().len(), 1 << 20);
        assert!(second.is_none());
    }

    #[test]
    fn no_more_than_so_much_is_kept_and_all_of_it_goes_when_room_is_needed() {
        let folder = tempfile::tempdir().unwrap();
        let spares = Spares::new(folder.path().join("spares"));
        std::fs::create_dir(folder.path().join("spares")).unwrap();
        let kept = || std::fs::read_dir(folder.path().join("spares")).unwrap().count();
        for number in 0..4 {
            let file = LogFile::at(number, folder.path().join(format!("log-{number}")));
            spares.give(std::slice::from_ref(&file), SPARE_BYTES_MAX / 3).unwrap();
            assert!(!file.path().exists());
        }
        assert_eq!(kept(), 3);
        spares.clear().unwrap();
        assert_eq!(kept(), 0);
        assert!(spares.take(SPARE_BYTES_MAX / 3).is_none());
    }
}
