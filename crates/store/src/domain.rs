//! Domains: sets of volumes and images that share what is equal, under a secret that what they hold is encrypted with.
//!
//! Domain 0 is open: it has no secret. The catalog knows the others; the secret of each lies wrapped in a file of its own, `domains/N`,
//! and not in the catalog, because a file can be overwritten where it lies and a database writes copies of what it holds.
//!
//! Records of data are sealed. Trees and nodes are named under the domain's secret and are not sealed: collection, marking and
//! repair work without keys. Who has the key compares them with their names, so that nobody without it can make one.

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
use polder_trust::seal::{ChunkCipher, Form, NONCE_BYTES, Seal, Suite, TAG_BYTES};

use crate::catalog::{DomainRow, check_name};
use crate::error::{Result, StoreError};
use crate::id::Id;
use crate::name::{Kind, Namer};
use crate::node::Node;
use crate::records::record::{HEADER_LEN, Header, Packing};
use crate::store::Store;
use crate::volume::log_file::sync_folder;
use crate::volume::log_seal::LogSealer;

/// The domain of what is not encrypted.
pub const OPEN_DOMAIN: u32 = 0;
/// Bytes of a record's header that its seal is bound to: all but the checksums.
const BOUND_LEN: usize = 52;
/// What a seal adds to the packed bytes.
pub(crate) const SEAL_LEN: usize = NONCE_BYTES + TAG_BYTES;

/// How the name of a file with a wrapped secret ends that is being made.
const MAKING: &str = ".making";

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
    if facts.uid() != 0 && facts.uid() != rustix::process::geteuid().as_raw() {
        return Err(io::Error::other("it belongs to another user"));
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
    /// Nothing was in the domain, so the store does not know it any more.
    pub is_forgotten: bool,
}

/// A domain whose secret is known.
pub(crate) struct Domain {
    pub id: u32,
    secret: Secret,
    pub namer: Namer,
    cipher: ChunkCipher,
}

impl Domain {
    pub fn new(id: u32, secret: Secret) -> Result<Self> {
        let cipher = ChunkCipher::of(&secret).map_err(refused)?;
        Ok(Domain { id, namer: Namer::new(secret.bytes()), cipher, secret })
    }

    /// Seals the log of a volume that is opened now.
    pub fn log_sealer(&self, volume: Id, epoch: u32) -> Result<LogSealer> {
        LogSealer::new(&self.secret, volume, epoch)
    }

    /// Seals packed bytes of a record of data; what the record holds then is added to `records`.
    pub fn seal_onto(&self, header: &Header, packed: &[u8], records: &mut Vec<u8>) -> Header {
        let packed_len = (packed.len() + SEAL_LEN) as u32;
        let mut header = Header { packed_len, domain: self.id, suite: Suite::NEWEST, ..*header };
        let begin = records.len();
        records.extend_from_slice(&[0; SEAL_LEN]);
        records.extend_from_slice(packed);
        let sealed = &mut records[begin..];
        let (front, payload) = sealed.split_at_mut(SEAL_LEN);
        let bound = &header.to_bytes()[..BOUND_LEN];
        let seal = self.cipher.seal(header.suite, &header.name.0, form(header.packing), bound, payload);
        front[..NONCE_BYTES].copy_from_slice(&seal.nonce);
        front[NONCE_BYTES..].copy_from_slice(&seal.tag);
        header.checksum = crc32c::crc32c(sealed);
        header
    }

    /// Opens in place what [`seal_onto`](Self::seal_onto) has sealed: the packed bytes.
    pub fn open<'a>(&self, header: &Header, sealed: &'a mut [u8]) -> Result<&'a [u8], String> {
        let parts = sealed.split_at_mut_checked(SEAL_LEN);
        let (seal, payload) = parts.ok_or_else(|| format!("chunk {} is shorter than a seal", header.name))?;
        self.open_apart(header, seal, payload)?;
        Ok(payload)
    }

    /// The same where the seal lies elsewhere than the payload.
    pub fn open_apart(&self, header: &Header, seal: &[u8], payload: &mut [u8]) -> Result<(), String> {
        let parts = seal.split_first_chunk().and_then(|(nonce, tag)| Some((*nonce, tag.try_into().ok()?)));
        let (nonce, tag) = parts.ok_or_else(|| format!("chunk {} has another length than it says", header.name))?;
        let seal = Seal { suite: header.suite, nonce, tag };
        let bound = &header.to_bytes()[..BOUND_LEN];
        let opened = self.cipher.open(&header.name.0, form(header.packing), bound, &seal, payload);
        opened.map_err(|broken| format!("chunk {}: {broken}", header.name))
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
            self.make_wrapped(row.id, &wrapped)?;
            self.take_making(row.id)?;
            self.add_to_keyring(row.id, secret)
        })();
        match made {
            Ok(()) => Ok(row),
            Err(error) => {
                // Nothing was encrypted under it. What cannot be erased is a secret of nothing; the first error is the one that matters.
                let _ = self.erase_others(row.id).and_then(|_| erase_if_there(&self.wrapped_path(row.id)));
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
        let secret = self.unwrap(&row, key)?;
        self.add_to_keyring(row.id, secret)
    }

    /// Puts a domain's secret under another key; what is encrypted with it stays as it is. Records under other keys are overwritten once the
    /// catalog knows the new one; until then both open it, so that a crash or a full disk leaves it under one of them. If it is under the new key
    /// already, as where a key file was moved, that is only written down.
    pub fn rewrap_domain(&self, name: &str, new_key: &Key, key_file: Option<&Path>) -> Result<Option<Erased>> {
        let row = self.catalog().domain(name)?;
        let path = self.wrapped_path(row.id);
        let is_under =
            self.read_wrapped(&row, &path).and_then(|wrapped| self.unwrap_one(&row, &wrapped, new_key)).is_ok();
        if !is_under {
            let domain = match self.unlocked(row.id) {
                Err(error) => match self.unwrap(&row, new_key) {
                    Ok(secret) => Some(Arc::new(Domain::new(row.id, secret)?)),
                    Err(_) => return Err(error),
                },
                found => found?,
            };
            let Some(domain) = domain else { return Err(locked(&row, "it is not encrypted".to_owned())) };
            let wrapped = WrappedKey::wrap(&domain.secret, self.subject(row.id), new_key.protection());
            self.make_wrapped(row.id, &wrapped.map_err(refused)?)?;
            self.keep_old(row.id)?;
            self.take_making(row.id)?;
        }
        let key_file = key_file.map(|path| path.to_string_lossy().into_owned());
        self.catalog().set_key_file(row.id, key_file.as_deref())?;
        self.erase_others(row.id)
    }

    /// Destroys the wrapped secret of a domain: nobody reads again what was encrypted with it, wherever copies of it are, unless a copy of
    /// this file and of the key is left as well. No volume of the domain may be in use; who reads a snapshot or an image of it does so until that
    /// process ends.
    pub fn erase_domain(&self, name: &str) -> Result<DomainErased> {
        let row = self.catalog().domain(name)?;
        for volume in self.volumes()?.into_iter().filter(|volume| volume.row.domain == row.id) {
            if let Some(process) = volume.user {
                return Err(StoreError::InUse { what: "volume", name: volume.row.name, process });
            }
        }
        // First of all nobody makes anything new in it.
        self.catalog().set_domain_erased(row.id)?;
        let others = self.erase_others(row.id)?;
        let wrapped = erase_if_there(&self.wrapped_path(row.id))?.or(others);
        self.keyring().write().unwrap_or_else(|poisoned| poisoned.into_inner()).domains.remove(&row.id);
        let is_forgotten = self.is_domain_in_use(row.id).is_ok_and(|used| !used);
        if is_forgotten {
            self.catalog().remove_domain(row.id)?;
        }
        Ok(DomainErased { wrapped, is_forgotten })
    }

    /// Whether a volume, a snapshot or an image is in a domain.
    pub fn is_domain_in_use(&self, id: u32) -> Result<bool> {
        Ok(self.catalog().volumes()?.iter().any(|row| row.domain == id)
            || self.catalog().snapshots(None)?.iter().any(|row| row.domain == id)
            || self.images()?.iter().any(|(_, node)| node.trees().any(|tree| tree.domain == id)))
    }

    /// A domain that something new can be in: it is there, and its key is to be had.
    pub fn usable_domain(&self, name: &str) -> Result<DomainRow> {
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
            self.find_secret(&row)
                .and_then(|secret| Domain::new(id, secret).map(Arc::new).map_err(|error| error.to_string()))
        };
        found.map_err(|why| (row.name, why))
    }

    /// The secret of a domain, by the key that is where it was said to be; or why not.
    fn find_secret(&self, row: &DomainRow) -> Result<Secret, String> {
        let path = row.key_file.as_deref().ok_or_else(|| "no key was given".to_owned())?;
        let why = |error: StoreError| match error {
            StoreError::Locked { why, .. } => why,
            error => error.to_string(),
        };
        let mut first = None;
        for file in self.wrapped_paths(row.id).map_err(why)? {
            let opened = self.read_wrapped(row, &file).map_err(why).and_then(|wrapped| {
                let key = Key::read(kind_of(&wrapped), Path::new(path))?;
                self.unwrap_one(row, &wrapped, &key).map_err(why)
            });
            match opened {
                Ok(secret) => return Ok(secret),
                Err(error) => first = first.or(Some(error)),
            }
        }
        Err(first.unwrap_or_else(|| "its wrapped secret is missing".to_owned()))
    }

    /// Why a domain cannot be read by this process; none if it can.
    pub fn why_locked(&self, row: &DomainRow) -> Option<String> {
        match self.unlocked(row.id) {
            Ok(_) => None,
            Err(StoreError::Locked { why, .. }) => Some(why),
            Err(error) => Some(error.to_string()),
        }
    }

    /// What kind of key a domain is under; of one that is being erased as well.
    pub fn key_kind(&self, row: &DomainRow) -> Result<KeyKind> {
        self.read_wrapped(row, &self.wrapped_path(row.id)).map(|wrapped| kind_of(&wrapped))
    }

    fn add_to_keyring(&self, id: u32, secret: Secret) -> Result<()> {
        let domain = Arc::new(Domain::new(id, secret)?);
        self.keyring().write().unwrap_or_else(|poisoned| poisoned.into_inner()).domains.insert(id, Ok(domain));
        Ok(())
    }

    /// The secret from whichever of its records the key opens; what is wrong with the first if it opens none.
    fn unwrap(&self, row: &DomainRow, key: &Key) -> Result<Secret> {
        if row.is_erased {
            return Err(locked(row, "it was erased".to_owned()));
        }
        let mut first = None;
        for path in self.wrapped_paths(row.id)? {
            match self.read_wrapped(row, &path).and_then(|wrapped| self.unwrap_one(row, &wrapped, key)) {
                Ok(secret) => return Ok(secret),
                Err(error) => first = first.or(Some(error)),
            }
        }
        Err(first.unwrap_or_else(|| locked(row, "its wrapped secret is missing".to_owned())))
    }

    fn unwrap_one(&self, row: &DomainRow, wrapped: &WrappedKey, key: &Key) -> Result<Secret> {
        wrapped.unwrap(self.subject(row.id), key.opener()).map_err(|error| locked(row, error.to_string()))
    }

    fn read_wrapped(&self, row: &DomainRow, path: &Path) -> Result<WrappedKey> {
        let failed = |error: &dyn std::fmt::Display| locked(row, format!("{}: {error}", path.display()));
        let bytes = std::fs::read(path).map_err(|error| failed(&error))?;
        WrappedKey::from_bytes(&bytes).map_err(|error| failed(&error))
    }

    /// Brings a wrapped secret to the disk, for [`take_making`](Self::take_making). What lacks room or fails does so here, before anything is changed.
    fn make_wrapped(&self, id: u32, wrapped: &WrappedKey) -> Result<()> {
        let making = self.domains_folder().join(format!("{id}{MAKING}"));
        // What a crash left of an earlier one, which nothing counts on.
        erase_if_there(&making)?;
        let written = (|| {
            let mut file = File::options().write(true).create_new(true).mode(0o600).open(&making)?;
            file.write_all(&wrapped.to_bytes())?;
            file.sync_all()
        })();
        written.map_err(StoreError::file("write", &making))
    }

    /// The wrapped secret that was made takes its place.
    fn take_making(&self, id: u32) -> Result<()> {
        let making = self.domains_folder().join(format!("{id}{MAKING}"));
        std::fs::rename(&making, self.wrapped_path(id)).map_err(StoreError::file("rename", &making))?;
        sync_folder(&self.domains_folder())
    }

    /// Gives the wrapped secret another name beside its own, under which it stays until it is erased. There may be several: an attempt to put it under
    /// another key can end anywhere.
    fn keep_old(&self, id: u32) -> Result<()> {
        let path = self.wrapped_path(id);
        for number in 1u32.. {
            let old = self.domains_folder().join(format!("{id}.old-{number}"));
            match std::fs::hard_link(&path, &old) {
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                // What lies under the old names has to do.
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                linked => return linked.map_err(StoreError::file("link", &path)),
            }
        }
        Ok(())
    }

    /// Files with a domain's wrapped secret: the one that counts, and what attempts to put it under another key have left.
    fn wrapped_paths(&self, id: u32) -> Result<Vec<PathBuf>> {
        let mut paths = self.other_paths(id)?;
        paths.retain(|path| !path.to_string_lossy().ends_with(MAKING));
        paths.insert(0, self.wrapped_path(id));
        Ok(paths)
    }

    fn other_paths(&self, id: u32) -> Result<Vec<PathBuf>> {
        let (folder, prefix) = (self.domains_folder(), format!("{id}."));
        let entries = match std::fs::read_dir(&folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(StoreError::file("list", &folder))?,
        };
        let mut paths = Vec::new();
        for entry in entries {
            let entry = entry.map_err(StoreError::file("list", &folder))?;
            if entry.file_name().to_string_lossy().starts_with(&prefix) {
                paths.push(entry.path());
            }
        }
        paths.sort_unstable();
        Ok(paths)
    }

    /// Overwrites and removes all files with a domain's wrapped secret but the one that counts.
    fn erase_others(&self, id: u32) -> Result<Option<Erased>> {
        let file_of = |path: &Path| std::fs::metadata(path).ok().map(|facts| (facts.dev(), facts.ino()));
        let counts = file_of(&self.wrapped_path(id));
        let mut worst = None;
        for path in self.other_paths(id)? {
            if counts.is_some() && file_of(&path) == counts {
                // Another name of the one that counts.
                std::fs::remove_file(&path).map_err(StoreError::file("remove", &path))?;
            } else if let Some(erased) = erase_if_there(&path)? {
                worst = if worst == Some(Erased::OldBytesMayRemain) { worst } else { Some(erased) };
            }
        }
        Ok(worst)
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
}

fn kind_of(wrapped: &WrappedKey) -> KeyKind {
    if wrapped.passphrase_cost().is_some() { KeyKind::Passphrase } else { KeyKind::File }
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
mod tests;
