//! Domains: sets of volumes and images that share what is equal, under a secret that what they hold is encrypted with.
//!
//! Domain 0 is open: it has no secret. The catalog knows the others; the secret of each lies wrapped in a file of its own, `domains/N`,
//! and not in the catalog, because a file can be overwritten where it lies and a database writes copies of what it holds.
//!
//! Records of data are sealed. Trees and nodes are named under the domain's secret and are not sealed: collection, marking and
//! repair work without keys.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Write};
use std::num::NonZeroU8;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use polder_trust::keys::{
    Cost, EraseError, Erased, KeyFile, Opener, Passphrase, Protection, Purpose, Secret, Subject, WrappedKey, erase,
};
use polder_trust::seal::{ChunkCipher, Form, NONCE_BYTES, Seal, TAG_BYTES};

use crate::catalog::{DomainRow, check_name};
use crate::error::{Result, StoreError};
use crate::id::Id;
use crate::name::{Kind, Namer};
use crate::node::Node;
use crate::records::record::{HEADER_LEN, Header, Packing};
use crate::store::Store;
use crate::volume::log::sync_folder;
use crate::volume::log_seal::LogSealer;

/// The domain of what is not encrypted.
pub const OPEN_DOMAIN: u32 = 0;
/// Bytes of a record's header that its seal is bound to: all but the checksums.
const BOUND_LEN: usize = 52;
/// What a seal adds to the packed bytes.
const SEAL_LEN: usize = NONCE_BYTES + TAG_BYTES;

/// The longest passphrase.
const PASSPHRASE_LEN_MAX: u64 = 4096;

/// What opens a domain's secret.
#[derive(Debug)]
pub enum Key {
    File(KeyFile),
    Passphrase(Passphrase),
}

/// What kind of key a file has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyKind {
    File,
    Passphrase,
}

impl Key {
    /// Reads the key in a file that nobody but its owner may read. A passphrase is all of the file but an end of line.
    pub fn read(kind: KeyKind, path: &Path) -> Result<Key, String> {
        let told = |error: &dyn std::error::Error| {
            let source = error.source().map(|source| format!(": {source}")).unwrap_or_default();
            format!("{error}{source}")
        };
        match kind {
            KeyKind::File => KeyFile::read(path).map(Key::File).map_err(|error| told(&error)),
            KeyKind::Passphrase => {
                let text = read_passphrase(path).map_err(|error| format!("{}: {error}", path.display()))?;
                Passphrase::new(text).map(Key::Passphrase).map_err(|error| told(&error))
            }
        }
    }

    fn opener(&self) -> Opener<'_> {
        match self {
            Key::File(file) => Opener::KeyFile(file),
            Key::Passphrase(passphrase) => Opener::Passphrase(passphrase),
        }
    }

    fn protection(&self) -> Protection<'_> {
        match self {
            Key::File(file) => Protection::KeyFile(file),
            Key::Passphrase(passphrase) => Protection::Passphrase(passphrase, Cost::default()),
        }
    }
}

fn read_passphrase(path: &Path) -> io::Result<Vec<u8>> {
    // A FIFO would be waited for.
    let flags = rustix::fs::OFlags::NONBLOCK | rustix::fs::OFlags::NOCTTY;
    let file = File::options().read(true).custom_flags(flags.bits() as i32).open(path)?;
    let facts = file.metadata()?;
    if !facts.is_file() || facts.len() > PASSPHRASE_LEN_MAX {
        return Err(io::Error::other("it is no file of at most 4 KiB"));
    }
    if facts.mode() & 0o077 != 0 {
        return Err(io::Error::other("it is open to others; only its owner may have access: chmod 600"));
    }
    // As long as the longest, so that no copy is left where it grew.
    let mut text = Vec::with_capacity(PASSPHRASE_LEN_MAX as usize + 1);
    file.take(PASSPHRASE_LEN_MAX).read_to_end(&mut text)?;
    if text.ends_with(b"\n") {
        text.pop();
    }
    Ok(text)
}

/// Domains whose secret this process has asked for, by their numbers: the domain, or why it is locked.
#[derive(Default)]
pub(crate) struct Keyring {
    domains: HashMap<u32, Result<Arc<Domain>, (String, String)>>,
}

/// What is left of a domain that was erased.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DomainErased {
    /// What became of the file with the wrapped secret; none if it was gone already.
    pub wrapped: Option<Erased>,
}

/// A domain whose secret is known.
pub(crate) struct Domain {
    pub id: u32,
    secret: Secret,
    pub namer: Namer,
    cipher: ChunkCipher,
}

impl Domain {
    pub fn new(id: u32, secret: Secret) -> Self {
        Domain { id, namer: Namer::new(secret.bytes()), cipher: ChunkCipher::of(&secret), secret }
    }

    /// Seals the log of a volume that is opened now.
    pub fn log_sealer(&self, volume: Id, epoch: u32) -> Result<LogSealer> {
        LogSealer::new(&self.secret, volume, epoch)
    }

    /// Seals packed bytes of a record of data; what the record holds then is left in `sealed`.
    pub fn seal(&self, header: &Header, packed: &[u8], sealed: &mut Vec<u8>) -> Header {
        let mut header = Header { packed_len: (packed.len() + SEAL_LEN) as u32, domain: self.id, ..*header };
        sealed.clear();
        sealed.resize(SEAL_LEN, 0);
        sealed.extend_from_slice(packed);
        let (front, payload) = sealed.split_at_mut(SEAL_LEN);
        let seal = self.cipher.seal(&header.name.0, form(header.packing), &header.to_bytes()[..BOUND_LEN], payload);
        front[..NONCE_BYTES].copy_from_slice(&seal.nonce);
        front[NONCE_BYTES..].copy_from_slice(&seal.tag);
        header.checksum = crc32c::crc32c(sealed);
        header
    }

    /// The packed bytes that [`seal`](Self::seal) has sealed.
    pub fn open(&self, header: &Header, sealed: &[u8]) -> Result<Vec<u8>, String> {
        let parts = sealed.split_first_chunk().and_then(|(nonce, rest)| Some((nonce, rest.split_first_chunk()?)));
        let (nonce, (tag, payload)) = parts.ok_or_else(|| format!("chunk {} is shorter than a seal", header.name))?;
        let mut payload = payload.to_vec();
        let seal = Seal { nonce: *nonce, tag: *tag };
        let bound = &header.to_bytes()[..BOUND_LEN];
        let opened = self.cipher.open(&header.name.0, form(header.packing), bound, &seal, &mut payload);
        opened.map_err(|broken| format!("chunk {}: {broken}", header.name))?;
        Ok(payload)
    }
}

fn form(packing: Packing) -> Form {
    NonZeroU8::new(packing as u8).map_or(Form::Whole, Form::Encoded)
}

/// Whether a record's packed bytes are sealed.
pub(crate) fn is_sealed(header: &Header) -> bool {
    header.domain != OPEN_DOMAIN && header.kind == Kind::Data
}

impl Store {
    /// Makes a domain with a new secret. `key_file` is where the key is found when it is needed.
    pub fn create_domain(&self, name: &str, key: &Key, key_file: Option<&Path>) -> Result<DomainRow> {
        check_name("domain", name)?;
        let key_file = key_file.map(|path| path.to_string_lossy().into_owned());
        let row = self.catalog().add_domain(name, key_file.as_deref(), crate::volume::now_ns())?;
        let made = (|| {
            let secret = Secret::random().map_err(refused)?;
            let wrapped = WrappedKey::wrap(&secret, self.subject(row.id), key.protection()).map_err(refused)?;
            std::fs::create_dir_all(self.domains_folder()).map_err(StoreError::file("make", &self.domains_folder()))?;
            sync_folder(self.folder())?;
            self.write_wrapped(row.id, &wrapped)?;
            Ok(secret)
        })();
        match made {
            Ok(secret) => {
                self.add_to_keyring(row.id, secret);
                Ok(row)
            }
            Err(error) => {
                // Nothing was encrypted under it.
                self.catalog().remove_domain(row.id)?;
                Err(error)
            }
        }
    }

    /// All domains, by name.
    pub fn domains(&self) -> Result<Vec<DomainRow>> {
        self.catalog().domains()
    }

    pub fn domain(&self, name: &str) -> Result<DomainRow> {
        self.catalog().domain(name)
    }

    /// Unlocks a domain for this process.
    pub fn unlock_domain(&self, name: &str, key: &Key) -> Result<()> {
        let row = self.catalog().domain(name)?;
        let secret = self.unwrap(&row, key.opener())?;
        self.add_to_keyring(row.id, secret);
        Ok(())
    }

    /// Puts a domain's secret under another key; what is encrypted with it stays as it is. The record under the old key is
    /// overwritten.
    pub fn rewrap_domain(
        &self,
        name: &str,
        key: &Key,
        new_key: &Key,
        key_file: Option<&Path>,
    ) -> Result<Option<Erased>> {
        let row = self.catalog().domain(name)?;
        let secret = self.unwrap(&row, key.opener())?;
        let wrapped = WrappedKey::wrap(&secret, self.subject(row.id), new_key.protection()).map_err(refused)?;
        let (path, old) = (self.wrapped_path(row.id), self.old_wrapped_path(row.id));
        // What a crash left of an earlier one.
        erase_if_there(&old)?;
        std::fs::hard_link(&path, &old).map_err(StoreError::file("link", &path))?;
        self.write_wrapped(row.id, &wrapped)?;
        let key_file = key_file.map(|path| path.to_string_lossy().into_owned());
        self.catalog().set_key_file(row.id, key_file.as_deref())?;
        erase_if_there(&old)
    }

    /// Destroys the wrapped secret of a domain: nobody reads again what was encrypted with it, wherever copies of it are, unless a copy of
    /// this file and of the key is left as well. Nothing of the domain may be in use.
    pub fn erase_domain(&self, name: &str) -> Result<DomainErased> {
        let row = self.catalog().domain(name)?;
        for volume in self.volumes()?.into_iter().filter(|volume| volume.row.domain == row.id) {
            if let Some(process) = volume.user {
                return Err(StoreError::InUse { what: "volume", name: volume.row.name, process });
            }
        }
        // First of all nobody makes anything new in it.
        self.catalog().set_domain_erased(row.id)?;
        erase_if_there(&self.old_wrapped_path(row.id))?;
        let wrapped = erase_if_there(&self.wrapped_path(row.id))?;
        self.keyring().write().unwrap_or_else(|poisoned| poisoned.into_inner()).domains.remove(&row.id);
        Ok(DomainErased { wrapped })
    }

    /// A domain that something new can be in.
    pub(crate) fn usable_domain(&self, name: &str) -> Result<DomainRow> {
        let row = self.catalog().domain(name)?;
        self.unlocked(row.id)?;
        Ok(row)
    }

    /// A domain by its number; none is the open one. The key is looked for if this process has not needed it before.
    pub(crate) fn unlocked(&self, id: u32) -> Result<Option<Arc<Domain>>> {
        if id == OPEN_DOMAIN {
            return Ok(None);
        }
        let known = |keyring: &Keyring| keyring.domains.get(&id).cloned();
        let found = known(&self.keyring().read().unwrap_or_else(|poisoned| poisoned.into_inner()));
        let found = match found {
            Some(found) => found,
            None => {
                let mut keyring = self.keyring().write().unwrap_or_else(|poisoned| poisoned.into_inner());
                match known(&keyring) {
                    Some(found) => found,
                    None => {
                        let found = self.find_key(id);
                        keyring.domains.insert(id, found.clone());
                        found
                    }
                }
            }
        };
        found.map(Some).map_err(|(domain, why)| StoreError::Locked { domain, why })
    }

    /// Whether a node and what it keeps may go to another store: records of a domain could not be read there.
    pub(crate) fn check_may_leave(&self, what: &str, node: &Node) -> Result<()> {
        let Some(tree) = node.trees().find(|tree| tree.domain != OPEN_DOMAIN) else { return Ok(()) };
        let domain = self.catalog().domains()?.into_iter().find(|row| row.id == tree.domain);
        let domain = domain.map_or_else(|| format!("number {}", tree.domain), |row| row.name);
        Err(StoreError::Encrypted { what: what.to_owned(), domain })
    }

    fn find_key(&self, id: u32) -> Result<Arc<Domain>, (String, String)> {
        let row = match self.catalog().domains().map(|rows| rows.into_iter().find(|row| row.id == id)) {
            Ok(Some(row)) => row,
            Ok(None) => return Err((format!("number {id}"), "this store knows no such domain".to_owned())),
            Err(error) => return Err((format!("number {id}"), error.to_string())),
        };
        let found = if row.is_erased {
            Err("it was erased".to_owned())
        } else {
            self.find_key_of(&row).and_then(|key| match self.unwrap(&row, key.opener()) {
                Ok(secret) => Ok(Arc::new(Domain::new(id, secret))),
                Err(StoreError::Locked { why, .. }) => Err(why),
                Err(error) => Err(error.to_string()),
            })
        };
        found.map_err(|why| (row.name, why))
    }

    /// The key of a domain, from where it was said to be.
    pub fn find_key_of(&self, row: &DomainRow) -> Result<Key, String> {
        let path = row.key_file.as_deref().ok_or_else(|| "no key was given".to_owned())?;
        Key::read(self.key_kind(row).map_err(|error| error.to_string())?, Path::new(path))
    }

    /// What kind of key a domain is under.
    pub fn key_kind(&self, row: &DomainRow) -> Result<KeyKind> {
        let is_passphrase = self.wrapped(row)?.passphrase_cost().is_some();
        Ok(if is_passphrase { KeyKind::Passphrase } else { KeyKind::File })
    }

    fn add_to_keyring(&self, id: u32, secret: Secret) {
        let mut keyring = self.keyring().write().unwrap_or_else(|poisoned| poisoned.into_inner());
        keyring.domains.insert(id, Ok(Arc::new(Domain::new(id, secret))));
    }

    fn unwrap(&self, row: &DomainRow, opener: Opener<'_>) -> Result<Secret> {
        let wrapped = self.wrapped(row)?;
        wrapped.unwrap(self.subject(row.id), opener).map_err(|error| locked(row, error.to_string()))
    }

    fn wrapped(&self, row: &DomainRow) -> Result<WrappedKey> {
        if row.is_erased {
            return Err(locked(row, "it was erased".to_owned()));
        }
        let path = self.wrapped_path(row.id);
        let failed = |error: &dyn std::fmt::Display| locked(row, format!("{}: {error}", path.display()));
        let bytes = std::fs::read(&path).map_err(|error| failed(&error))?;
        WrappedKey::from_bytes(&bytes).map_err(|error| failed(&error))
    }

    /// Brings a wrapped secret to the disk under its name.
    fn write_wrapped(&self, id: u32, wrapped: &WrappedKey) -> Result<()> {
        let path = self.wrapped_path(id);
        let making = path.with_extension("making");
        let written = (|| {
            let mut file = File::options().write(true).create(true).truncate(true).open(&making)?;
            file.write_all(&wrapped.to_bytes())?;
            file.sync_all()?;
            std::fs::rename(&making, &path)
        })();
        written.map_err(StoreError::file("write", &path))?;
        sync_folder(&self.domains_folder())
    }

    fn subject(&self, id: u32) -> Subject {
        let mut subject = self.id().0;
        for (byte, of_id) in subject.iter_mut().zip(id.to_le_bytes()) {
            *byte ^= of_id;
        }
        Subject { purpose: Purpose::Domain, id: subject }
    }

    fn domains_folder(&self) -> PathBuf {
        self.folder().join("domains")
    }

    fn wrapped_path(&self, id: u32) -> PathBuf {
        self.domains_folder().join(id.to_string())
    }

    fn old_wrapped_path(&self, id: u32) -> PathBuf {
        self.domains_folder().join(format!("{id}.old"))
    }
}

fn locked(row: &DomainRow, why: String) -> StoreError {
    StoreError::Locked { domain: row.name.clone(), why }
}

fn refused(error: impl std::fmt::Display) -> StoreError {
    StoreError::Refused(error.to_string())
}

/// Overwrites and removes a file with a wrapped secret, if there is one.
fn erase_if_there(path: &Path) -> Result<Option<Erased>> {
    match erase(path) {
        Ok(erased) => Ok(Some(erased)),
        Err(EraseError::Overwrite { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(EraseError::Overwrite { source, .. }) => Err(StoreError::file("overwrite", path)(source)),
        Err(error) => Err(refused(error)),
    }
}

/// The packed bytes of a record have room for a seal.
const _: () = assert!(SEAL_LEN < HEADER_LEN);

#[cfg(test)]
#[path = "domain_tests.rs"]
mod tests;
