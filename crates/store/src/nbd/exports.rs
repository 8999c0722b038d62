//! The disks that a server offers, by name.

use super::EXPORTS_MAX;
use super::protocol::{Form, STRING_LEN_MAX, transmission};
use crate::disk::{Access, Disk};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// A disk under a name.
pub struct Export<D> {
    name: String,
    description: String,
    disk: Arc<D>,
    access: Access,
    /// Held while a request that is no whole sectors reads the sectors at its ends, changes them and writes them back.
    pub(super) edges: Mutex<()>,
}

impl<D: Disk> Export<D> {
    /// `disk` under `name`, as writable as the disk is.
    pub fn new(name: impl Into<String>, disk: Arc<D>) -> Self {
        let access = disk.access();
        Self { name: name.into(), description: String::new(), disk, access, edges: Mutex::new(()) }
    }

    /// With a sentence for people who list the exports.
    pub fn with_description(mut self, description: impl Into<String>) -> Self {
        self.description = description.into();
        self
    }

    /// Read-only, though the disk may be writable.
    pub fn read_only(mut self) -> Self {
        self.access = Access::ReadOnly;
        self
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn description(&self) -> &str {
        &self.description
    }

    pub fn disk(&self) -> &Arc<D> {
        &self.disk
    }

    pub fn access(&self) -> Access {
        self.access
    }

    /// The transmission flags.
    pub(super) fn flags(&self, form: Form) -> u16 {
        let mut flags = transmission::HAS_FLAGS
            | transmission::SEND_FLUSH
            | transmission::SEND_FUA
            | transmission::CAN_MULTI_CONN
            | transmission::SEND_CACHE;
        flags |= match self.access {
            Access::ReadOnly => transmission::READ_ONLY,
            Access::ReadWrite => {
                transmission::SEND_TRIM | transmission::SEND_WRITE_ZEROES | transmission::SEND_FAST_ZERO
            }
        };
        if form != Form::Simple {
            flags |= transmission::SEND_DF;
        }
        flags
    }
}

/// Why a disk cannot be offered under its name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ExportError {
    #[error("there is an export {name} already")]
    NameTaken { name: String },
    #[error("the name or description of an export has more than {STRING_LEN_MAX} bytes, or a zero byte")]
    BadName,
    #[error("a server has at most {EXPORTS_MAX} exports")]
    TooMany,
}

/// The exports of a server. They may come and go while it runs; a connection keeps the export that it has chosen.
pub struct Exports<D> {
    list: RwLock<Vec<Arc<Export<D>>>>,
}

impl<D> Default for Exports<D> {
    fn default() -> Self {
        Self { list: RwLock::new(Vec::new()) }
    }
}

impl<D: Disk> Exports<D> {
    /// No exports.
    pub fn new() -> Self {
        Self::default()
    }

    /// Offers a disk. The first one in the list is what a client gets that names none.
    pub fn add(&self, export: Export<D>) -> Result<(), ExportError> {
        for text in [&export.name, &export.description] {
            if text.len() > STRING_LEN_MAX || text.contains('\0') {
                return Err(ExportError::BadName);
            }
        }
        let mut list = self.list_mut();
        if list.iter().any(|other| other.name == export.name) {
            return Err(ExportError::NameTaken { name: export.name });
        }
        if list.len() == EXPORTS_MAX {
            return Err(ExportError::TooMany);
        }
        list.push(Arc::new(export));
        Ok(())
    }

    /// Offers a disk no longer; says whether it was there. Connections to it go on.
    pub fn remove(&self, name: &str) -> bool {
        let mut list = self.list_mut();
        let len = list.len();
        list.retain(|export| export.name != name);
        list.len() < len
    }

    /// The exports in the order in which they were added.
    pub fn all(&self) -> Vec<Arc<Export<D>>> {
        self.list().clone()
    }

    /// The export of that name; the first one for the empty name.
    pub fn find(&self, name: &str) -> Option<Arc<Export<D>>> {
        let list = self.list();
        let named = list.iter().find(|export| export.name == name);
        named.or_else(|| list.first().filter(|_| name.is_empty())).cloned()
    }

    fn list(&self) -> RwLockReadGuard<'_, Vec<Arc<Export<D>>>> {
        self.list.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn list_mut(&self) -> RwLockWriteGuard<'_, Vec<Arc<Export<D>>>> {
        self.list.write().unwrap_or_else(PoisonError::into_inner)
    }
}
