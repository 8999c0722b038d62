//! Brings records of a remote store into ours, each once however many ask for it.
//!
//! A record is read together with those behind it in its segment: a push lays them down in the order of the disk, so they are what is wanted
//! next. Who asks for a record that is on its way already waits for that. What came is verified and appended to this process's segment.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock};

use super::bucket::Client;
use super::error::RemoteError;
use super::known::Known;
use super::layout::{self, PROFILE_LEN_MAX, RemotePlace};
use crate::domain::OPEN_DOMAIN;
use crate::error::{Result, StoreError};
use crate::id::Id;
use crate::name::Name;
use crate::node::Node;
use crate::pace::Pace;
use crate::records::record::{self, HEADER_LEN, Header};
use crate::store::{Local, Origin, Store};
use crate::tree::{self, NodeSource, TreeNode, Visit};
use crate::upkeep::collect::{Step, Watcher};

/// Bytes that are read together for a record that somebody waits for. Who reads on where the last read ended gets as many as came before,
/// up to what is read where everything will be needed.
const REACH: u64 = 128 << 10;
/// The same where everything will be needed.
const REACH_OF_ALL: u64 = 2 << 20;
/// Reads at a time where everything will be needed.
const THREADS: usize = 4;

/// Whether to wait for a record that is on its way.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Patience {
    Wait,
    Pass,
}

/// A range of a segment that is being read.
#[derive(Default)]
struct Flight {
    outcome: Mutex<Option<Result<(), RemoteError>>>,
    landed: Condvar,
}

impl Flight {
    fn wait(&self) -> Result<(), RemoteError> {
        let mut outcome = self.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(outcome) = &*outcome {
                return outcome.clone();
            }
            outcome = self.landed.wait(outcome).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Only the first word counts.
    fn land(&self, outcome: Result<(), RemoteError>) {
        self.outcome.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(outcome);
        self.landed.notify_all();
    }
}

/// Whoever waits for a flight is told something, even if its reader panics.
struct Landing<'a>(&'a Flight);

impl Drop for Landing<'_> {
    fn drop(&mut self) {
        self.0.land(Err(RemoteError::Refused("the thread that was reading has ended".to_owned())));
    }
}

/// A range of a segment: how far it goes, and who reads it; nobody if it was read.
struct Span {
    end: u64,
    flight: Option<Arc<Flight>>,
}

type Spans = HashMap<Id, BTreeMap<u64, Span>>;

/// Brings records from one remote store.
pub(super) struct Fetcher {
    client: Arc<Client>,
    /// Nothing before the first record is missing.
    known: RwLock<Option<Arc<Known>>>,
    /// Where a store keeps a copy of what is known.
    folder: Option<PathBuf>,
    spans: Mutex<Spans>,
    /// The names that somebody waited for, in their order.
    profile: Mutex<Vec<Name>>,
    fetched_bytes: AtomicU64,
}

/// What one look for a record came to.
enum Look {
    Here,
    /// The remote store does not know it.
    Unknown,
    /// Somebody else is bringing it.
    Coming,
}

/// What became of a claim to a range.
enum Claim {
    /// It is ours, and ends there.
    Ours(Arc<Flight>, u64),
    /// Somebody else is reading the record.
    Others(Arc<Flight>),
    /// The record was read. Perhaps just now; if it is not here all the same, a collection has freed it since.
    WasRead,
}

impl Fetcher {
    /// Brings what is known; `folder` is where a store keeps a copy of that.
    pub fn new(client: Arc<Client>, known: Known, folder: Option<PathBuf>) -> Self {
        Fetcher {
            client,
            known: RwLock::new(Some(Arc::new(known))),
            folder,
            spans: Mutex::default(),
            profile: Mutex::default(),
            fetched_bytes: AtomicU64::new(0),
        }
    }

    /// Brings what the copy in a folder of a store knows, which is read when the first record is missing.
    pub fn late(client: Arc<Client>, folder: PathBuf) -> Self {
        let fetcher = Fetcher::new(client, Known::default(), Some(folder));
        Fetcher { known: RwLock::default(), ..fetcher }
    }

    fn spans(&self) -> MutexGuard<'_, Spans> {
        self.spans.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn known(&self) -> Result<Arc<Known>, RemoteError> {
        if let Some(known) = &*self.known.read().unwrap_or_else(PoisonError::into_inner) {
            return Ok(known.clone());
        }
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        let found = match (&*known, &self.folder) {
            (Some(known), _) => known.clone(),
            (None, Some(folder)) => Arc::new(Known::kept(folder)?),
            (None, None) => Arc::new(Known::load(&self.client, None)?),
        };
        Ok(known.insert(found).clone())
    }

    /// Whether the remote store has a record.
    pub fn knows(&self, name: &Name) -> Result<bool, RemoteError> {
        Ok(self.known()?.find(name).next().is_some())
    }

    pub fn fetched_bytes(&self) -> u64 {
        self.fetched_bytes.load(Ordering::Relaxed)
    }

    /// The names that somebody waited for, in the order in which they were asked for first.
    pub fn profile(&self) -> Vec<Name> {
        self.profile.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn look(&self, store: &Store, name: &Name, reach: u64, patience: Patience) -> Result<Look, RemoteError> {
        let mut reloaded = false;
        let mut was_read = false;
        loop {
            if store.read_local(name).is_ok() {
                return Ok(Look::Here);
            }
            let Some(place) = self.known()?.find(name).next() else { return Ok(Look::Unknown) };
            let flight = match self.claim(&place, reach, was_read) {
                Claim::Ours(flight, end) => self.fly(store, name, &place, end, &flight),
                Claim::Others(_) if patience == Patience::Pass => return Ok(Look::Coming),
                Claim::Others(flight) => flight.wait(),
                Claim::WasRead => {
                    was_read = true;
                    continue;
                }
            };
            match flight {
                Ok(()) => {}
                // A collection has removed the segment; what is needed is in another.
                Err(RemoteError::Missing { .. }) if !reloaded => {
                    reloaded = true;
                    let known = Known::load(&self.client, self.folder.as_deref())?;
                    *self.known.write().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(known));
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Takes a range for us that begins with the record, and ends where somebody else's begins, unless somebody reads the record already.
    /// One that was read is read once more only with `again`.
    fn claim(&self, place: &RemotePlace, reach: u64, again: bool) -> Claim {
        let mut spans = self.spans();
        let segment = spans.entry(place.segment).or_default();
        if let Some((&start, span)) = segment.range(..=place.offset).next_back()
            && span.end > place.offset
        {
            if let Some(flight) = &span.flight {
                return Claim::Others(flight.clone());
            }
            if !again {
                return Claim::WasRead;
            }
            segment.remove(&start);
        }
        let before = segment.range(..place.offset).next_back();
        let run = before.filter(|(_, span)| span.flight.is_none() && span.end == place.offset);
        let reach = run.map_or(reach, |(start, _)| reach.max((place.offset - start).min(REACH_OF_ALL)));
        let next = segment.range(place.offset + 1..).next().map_or(u64::MAX, |(&start, _)| start);
        let end = (place.offset + reach).min(next).max(place.offset + place.len);
        let flight = Arc::new(Flight::default());
        segment.insert(place.offset, Span { end, flight: Some(flight.clone()) });
        Claim::Ours(flight, end)
    }

    /// Reads a range that we claimed.
    fn fly(
        &self,
        store: &Store,
        name: &Name,
        place: &RemotePlace,
        end: u64,
        flight: &Flight,
    ) -> Result<(), RemoteError> {
        let _landing = Landing(flight);
        let object = layout::path(layout::SEGMENTS, place.segment);
        let outcome = self.client.get_range(&object, place.offset..end).and_then(|bytes| {
            self.fetched_bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            keep_records(store, name, &bytes).map_err(|failure| match failure {
                KeepFailure::Damaged(what) => {
                    RemoteError::Damaged { object, what: format!("at byte {}: {what}", place.offset) }
                }
                KeepFailure::Store(error) => error.into(),
            })
        });
        {
            let mut spans = self.spans();
            let segment = spans.entry(place.segment).or_default();
            segment.remove(&place.offset);
            if let Ok(len) = outcome {
                let end = place.offset + len;
                match segment.range_mut(..place.offset).next_back() {
                    Some((_, before)) if before.flight.is_none() && before.end == place.offset => before.end = end,
                    _ => drop(segment.insert(place.offset, Span { end, flight: None })),
                }
            }
        }
        flight.land(outcome.as_ref().map(drop).map_err(Clone::clone));
        outcome.map(drop)
    }

    /// Brings everything that a node needs and that is not here: first what a profile names, in its order, then the rest in the order of the
    /// trees.
    pub fn fill(
        &self,
        store: &Arc<Store>,
        node: &Node,
        profile: &[Name],
        bytes_per_second: Option<u64>,
        watcher: Watcher<'_>,
    ) -> Result<(), RemoteError> {
        let pace = Mutex::new((Pace::limited(bytes_per_second), self.fetched_bytes()));
        // The walk below asks for nodes as well, so that it is not to begin before these are here.
        self.by_threads(store, &pace, |hand_out| profile.iter().try_for_each(|name| hand_out(*name, REACH)))?;
        let total: u64 = node.trees().map(|tree| tree.len_bytes).sum();
        let through = Through { store, fetcher: self };
        self.by_threads(store, &pace, |hand_out| {
            let mut before = 0;
            for tree in node.trees() {
                tree::walk(&through, tree.root, &mut |visit| match visit {
                    Visit::Node(_) => Ok(true),
                    Visit::Chunk(index, name) => {
                        let done = before + (index * u64::from(tree.chunk_len)).min(tree.len_bytes);
                        watcher(Step { what: "receiving", done, total })?;
                        hand_out(name, REACH_OF_ALL).map(|()| true)
                    }
                })?;
                before += tree.len_bytes;
            }
            Ok(())
        })?;
        // What others were bringing has come now, or has failed.
        for tree in node.trees() {
            tree::walk(&through, tree.root, &mut |visit| {
                if let Visit::Chunk(_, name) = visit {
                    self.must_bring(store, &name, REACH_OF_ALL)?;
                }
                Ok(true)
            })?;
        }
        Ok(())
    }

    /// Has a few threads bring what `hand_out` is called with, and waits for them.
    fn by_threads(
        &self,
        store: &Store,
        pace: &Mutex<(Pace, u64)>,
        act: impl FnOnce(&mut dyn FnMut(Name, u64) -> Result<()>) -> Result<()>,
    ) -> Result<(), RemoteError> {
        let failure = Mutex::new(None);
        let (send, receive) = std::sync::mpsc::sync_channel::<(Name, u64)>(1024);
        let receive = Mutex::new(receive);
        std::thread::scope(|scope| {
            for _ in 0..THREADS {
                scope.spawn(|| {
                    loop {
                        let next = receive.lock().unwrap_or_else(PoisonError::into_inner).recv();
                        let Ok((name, reach)) = next else { return };
                        if failure.lock().unwrap_or_else(PoisonError::into_inner).is_some() {
                            continue;
                        }
                        let outcome = self.look(store, &name, reach, Patience::Pass);
                        if let Err(error) = outcome {
                            *failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                        }
                        let (pace, counted) = &mut *pace.lock().unwrap_or_else(PoisonError::into_inner);
                        let fetched = self.fetched_bytes();
                        pace.spend(fetched.saturating_sub(*counted));
                        *counted = fetched.max(*counted);
                    }
                });
            }
            let acted = act(&mut |name, reach| {
                // The threads take until the sender is gone.
                let _ = send.send((name, reach));
                match &*failure.lock().unwrap_or_else(PoisonError::into_inner) {
                    Some(error) => Err(StoreError::Remote(RemoteError::clone(error))),
                    None => Ok(()),
                }
            });
            drop(send);
            acted
        })?;
        failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }

    pub fn must_bring(&self, store: &Store, name: &Name, reach: u64) -> Result<()> {
        if !store.index().find(name)?.is_empty() {
            return Ok(());
        }
        match self.look(store, name, reach, Patience::Wait)? {
            Look::Here => Ok(()),
            Look::Unknown | Look::Coming => Err(StoreError::Missing { name: *name }),
        }
    }
}

impl Origin for Fetcher {
    fn bring(&self, store: &Store, name: &Name) -> Result<bool> {
        {
            let mut profile = self.profile.lock().unwrap_or_else(PoisonError::into_inner);
            if profile.len() < PROFILE_LEN_MAX {
                profile.push(*name);
            }
        }
        Ok(matches!(self.look(store, name, REACH, Patience::Wait)?, Look::Here))
    }
}

/// A store's nodes, those that are not here brought.
pub(super) struct Through<'a> {
    pub store: &'a Store,
    pub fetcher: &'a Fetcher,
}

impl NodeSource for Through<'_> {
    fn node(&self, name: &Name) -> Result<Arc<TreeNode>> {
        match Local(self.store).node(name) {
            Err(StoreError::Missing { .. } | StoreError::Damaged { .. }) => {
                self.fetcher.must_bring(self.store, name, REACH)?;
                Local(self.store).node(name)
            }
            found => found,
        }
    }
}

enum KeepFailure {
    Damaged(String),
    Store(StoreError),
}

/// Keeps the whole records that bytes of a segment begin with, the first of which must be the named one. Gives the bytes that they
/// take.
fn keep_records(store: &Store, name: &Name, bytes: &[u8]) -> Result<u64, KeepFailure> {
    let mut at = 0;
    while bytes.len().saturating_sub(at) >= HEADER_LEN {
        let checked = check(store, &bytes[at..]);
        let (header, packed) = match checked {
            Ok((header, _)) if at == 0 && header.name != *name => {
                return Err(KeepFailure::Damaged(format!("chunk {} lies there instead of {name}", header.name)));
            }
            Ok(record) => record,
            Err(what) if at == 0 => return Err(KeepFailure::Damaged(what)),
            // The table behind the records, a record that is cut off, or one that nobody has asked for.
            Err(_) => break,
        };
        // The one that is asked for may have a damaged copy here.
        if at == 0 || store.index().find(&header.name).map_err(KeepFailure::Store)?.is_empty() {
            store.append(&header, packed).map_err(KeepFailure::Store)?;
        }
        at += header.record_len();
    }
    if at == 0 {
        return Err(KeepFailure::Damaged("the segment ends there".to_owned()));
    }
    Ok(at as u64)
}

/// The record that bytes begin with, if it holds what its name says.
fn check<'b>(store: &Store, bytes: &'b [u8]) -> Result<(Header, &'b [u8]), String> {
    let (header, packed) = record::split(bytes)?;
    if header.domain != OPEN_DOMAIN {
        return Err("a record of an encrypted domain".to_owned());
    }
    let content = record::unpack(&header, packed)?;
    if store.namer().name(header.kind, &content) != header.name {
        return Err(format!("chunk {} holds something else", header.name));
    }
    Ok((header, packed))
}
