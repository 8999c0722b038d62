//! What a remote store lacks of a node goes there: segments of exactly the missing records, an index of them, then the name.
//!
//! A push that was cut leaves segments that an index names already; the next one builds on those. It looks at last whether a collection has
//! listed as dead what it builds on.

use std::collections::{BTreeSet, HashSet};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use super::bucket::Client;
use super::error::RemoteError;
use super::known::Known;
use super::layout::{self, RemoteIndex, entry_in};
use crate::catalog::{Replace, check_name};
use crate::error::StoreError;
use crate::id::Id;
use crate::name::Name;
use crate::pace::Pace;
use crate::records::segment::{Entry, SegmentBytes, SegmentNumber};
use crate::store::Store;
use crate::transfer::{NodeRef, Offered, TransferOptions};
use crate::tree::{self, Visit};
use crate::upkeep::collect::{Step, Watcher};
use crate::volume::now_ns;

/// Segments that one index object names: what a push that is cut can lose is their content.
const INDEX_SEGMENTS_MAX: usize = 16;
/// Segments that are on their way at a time; each takes 16 MiB of memory.
const UPLOADS: usize = 2;
/// How often a push begins again because a collection was at work.
const ROUNDS_MAX: usize = 3;
/// How long the last look at what is dead counts.
const LAST_LOOK: Duration = Duration::from_secs(600);

/// What a push to a remote store moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Pushed {
    pub records: u64,
    pub record_bytes: u64,
    pub segments: u64,
}

pub(super) fn push(
    client: &Client,
    store: &Arc<Store>,
    what: &NodeRef,
    options: &TransferOptions,
    watcher: Watcher<'_>,
) -> Result<Pushed, RemoteError> {
    check_name("image", &options.image)?;
    make_store(client, store)?;
    let image = layout::path(layout::IMAGES, &options.image);
    if options.replace == Replace::No && client.find(&image)?.is_some() {
        return Err(RemoteError::Exists { image: options.image.clone() });
    }
    let offered = Offered::new(store, what)?;
    let mut pushed = Pushed::default();
    for _ in 0..ROUNDS_MAX {
        let used = push_records(client, store, &offered, options.bytes_per_second, &mut pushed, watcher)?;
        let begin = Instant::now();
        let dead = dead_segments(client)?;
        if used.is_disjoint(&dead) {
            client.put(&image, &layout::image_object(now_ns(), &offered.name))?;
            if begin.elapsed() > LAST_LOOK {
                client.remove(&image)?;
                continue;
            }
            return Ok(pushed);
        }
    }
    Err(RemoteError::Refused("a collection of the remote store was at work again and again".to_owned()))
}

/// Sees to it that there is a remote store, of our format and domain.
fn make_store(client: &Client, store: &Store) -> Result<(), RemoteError> {
    match client.find(layout::FORMAT_OBJECT)? {
        Some(bytes) => layout::check_format(store.namer(), &bytes),
        None => client.put(layout::FORMAT_OBJECT, &layout::format_object(store.namer())),
    }
}

pub(super) fn dead_segments(client: &Client) -> Result<HashSet<Id>, RemoteError> {
    Ok(client.list(layout::DEAD)?.iter().filter_map(|object| Id::from_hex(&object.name)).collect())
}

/// Sends the records that no living segment holds. Gives the segments that the node builds on.
fn push_records(
    client: &Client,
    store: &Arc<Store>,
    offered: &Offered,
    bytes_per_second: Option<u64>,
    pushed: &mut Pushed,
    watcher: Watcher<'_>,
) -> Result<HashSet<Id>, RemoteError> {
    let dead = dead_segments(client)?;
    let known = Known::load(client, None)?;
    let mut used = HashSet::new();
    let (send, receive) = mpsc::sync_channel::<Full>(1);
    let receive = Mutex::new(receive);
    let uploads = Uploads { client, pace: Mutex::new(Pace::limited(bytes_per_second)), state: Mutex::default() };
    let mut sent = Vec::new();
    std::thread::scope(|scope| {
        for _ in 0..UPLOADS {
            scope.spawn(|| {
                loop {
                    let next = receive.lock().unwrap_or_else(PoisonError::into_inner).recv();
                    let Ok(full) = next else { return };
                    uploads.upload(full);
                }
            });
        }
        let mut filling = SegmentBytes::new(SegmentNumber(0));
        let mut hand_over = |filling: &mut SegmentBytes| -> Result<(), RemoteError> {
            let (bytes, entries) = std::mem::replace(filling, SegmentBytes::new(SegmentNumber(0))).finish();
            let id = Id::random();
            sent.push(id);
            // The threads take until the sender is gone.
            let _ = send.send(Full { id, bytes, entries });
            uploads.check()
        };
        let mut seen = BTreeSet::new();
        let total: u64 = offered.node.trees().map(|tree| tree.len_bytes).sum();
        let mut add = |name: Name, done: u64| -> Result<bool, RemoteError> {
            if !seen.insert(name) {
                return Ok(false);
            }
            if let Some(place) = known.find(&name).find(|place| !dead.contains(&place.segment)) {
                used.insert(place.segment);
                return Ok(true);
            }
            let (header, packed) = store.read_packed(&name)?;
            filling.append(&header, &packed);
            pushed.records += 1;
            pushed.record_bytes += header.record_len() as u64;
            if filling.is_full() {
                hand_over(&mut filling)?;
            }
            watcher(Step { what: "sending", done, total })?;
            Ok(true)
        };
        let walked = (|| {
            add(offered.name, 0)?;
            let mut before = 0;
            for tree in offered.node.trees() {
                tree::walk(&**store, tree.root, &mut |visit| {
                    let (name, at) = match visit {
                        Visit::Node(name) => (name, 0),
                        Visit::Chunk(index, name) => (name, index * u64::from(tree.chunk_len)),
                    };
                    Ok(add(name, before + at.min(tree.len_bytes))?)
                })?;
                before += tree.len_bytes;
            }
            Ok::<(), StoreError>(())
        })();
        walked?;
        if !filling.is_empty() {
            hand_over(&mut filling)?;
        }
        drop(send);
        Ok::<(), RemoteError>(())
    })?;
    pushed.segments += sent.len() as u64;
    uploads.finish()?;
    used.extend(sent);
    Ok(used)
}

/// A segment that is to go.
struct Full {
    id: Id,
    bytes: Vec<u8>,
    entries: Vec<Entry>,
}

#[derive(Default)]
struct UploadState {
    /// Segments that are there, and that no index names yet.
    unindexed: Vec<(Id, Vec<Entry>)>,
    failure: Option<RemoteError>,
}

struct Uploads<'a> {
    client: &'a Client,
    pace: Mutex<Pace>,
    state: Mutex<UploadState>,
}

impl Uploads<'_> {
    fn upload(&self, full: Full) {
        let outcome = self.check().and_then(|()| {
            self.client.put(&layout::path(layout::SEGMENTS, full.id), &full.bytes)?;
            self.pace.lock().unwrap_or_else(PoisonError::into_inner).spend(full.bytes.len() as u64);
            let due = {
                let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
                state.unindexed.push((full.id, full.entries));
                let full = state.unindexed.len() >= INDEX_SEGMENTS_MAX;
                full.then(|| std::mem::take(&mut state.unindexed))
            };
            due.map_or(Ok(()), |segments| put_index(self.client, segments))
        });
        if let Err(error) = outcome {
            self.state.lock().unwrap_or_else(PoisonError::into_inner).failure.get_or_insert(error);
        }
    }

    fn check(&self) -> Result<(), RemoteError> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).failure.clone().map_or(Ok(()), Err)
    }

    fn finish(self) -> Result<(), RemoteError> {
        self.check()?;
        let state = self.state.into_inner().unwrap_or_else(PoisonError::into_inner);
        if state.unindexed.is_empty() { Ok(()) } else { put_index(self.client, state.unindexed) }
    }
}

/// Makes segments known.
pub(super) fn put_index(client: &Client, segments: Vec<(Id, Vec<Entry>)>) -> Result<(), RemoteError> {
    let ids: Vec<Id> = segments.iter().map(|(id, _)| *id).collect();
    let mut entries: Vec<Entry> = segments
        .into_iter()
        .enumerate()
        .flat_map(|(ordinal, (_, entries))| entries.into_iter().map(move |entry| entry_in(ordinal, entry)))
        .collect();
    client.put(&layout::path(layout::INDEX, Id::random()), &RemoteIndex::to_object(&ids, &mut entries))
}
