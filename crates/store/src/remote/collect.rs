//! Removes from a remote store what no image of it needs, in two runs.
//!
//! A segment that nothing needs is listed as dead by one run, and removed by a later one, when it has been listed for the time of grace and
//! nothing needs it still. A push builds on no segment that is listed, and looks for that again just before it gives the image its
//! name: so it either sees the list, or its name is there when the later run looks.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;
use std::time::Duration;

use super::bucket::Client;
use super::error::RemoteError;
use super::fetch::{Fetcher, Through};
use super::known::Known;
use super::layout::{self, RemoteImage};
use super::push::put_index;
use crate::error::StoreError;
use crate::id::Id;
use crate::name::Name;
use crate::records::segment::Entry;
use crate::store::Store;
use crate::tree::{self, Visit};
use crate::upkeep::collect::{Step, Watcher};

/// How long a segment is listed as dead before it is removed, unless another time is asked for. No push may take longer between its
/// first look at what is there and its end than this.
pub const GRACE_DEFAULT: Duration = Duration::from_secs(24 * 3600);

/// What a collection of a remote store did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RemoteCollected {
    pub segments: u64,
    pub needed_segments: u64,
    /// Segments that are listed as dead now and were not before.
    pub listed: u64,
    /// Segments that were listed and are needed again.
    pub revived: u64,
    pub removed: u64,
    pub removed_bytes: u64,
}

pub(super) fn collect(
    client: &Arc<Client>,
    store: &Arc<Store>,
    images: &[RemoteImage],
    grace: Duration,
    watcher: Watcher<'_>,
) -> Result<RemoteCollected, RemoteError> {
    // The list of segments first: what comes later is not looked at.
    let segments = client.list(layout::SEGMENTS)?;
    // The server's own clock.
    client.put(&layout::path(layout::DEAD, layout::CLOCK), &[])?;
    let objects = client.list(layout::DEAD)?;
    let listed: BTreeMap<Id, i64> =
        objects.iter().filter_map(|object| Some((Id::from_hex(&object.name)?, object.modified_ms))).collect();
    let now_ms = objects.iter().find(|object| object.name == layout::CLOCK).map_or(i64::MIN, |clock| clock.modified_ms);
    let dead: HashSet<Id> = listed.keys().copied().collect();
    let needed = needed_segments(client, store, images, &dead, watcher)?;
    let mut collected = RemoteCollected::default();
    let mut gone = BTreeMap::new();
    for object in &segments {
        let Some(id) = Id::from_hex(&object.name) else { continue };
        collected.segments += 1;
        let marker = layout::path(layout::DEAD, id);
        match (needed.contains(&id), listed.get(&id)) {
            (true, None) => collected.needed_segments += 1,
            (true, Some(_)) => {
                collected.needed_segments += 1;
                client.remove(&marker)?;
                collected.revived += 1;
            }
            (false, None) => {
                client.put(&marker, &[])?;
                collected.listed += 1;
            }
            (false, Some(since_ms)) if now_ms.saturating_sub(*since_ms) >= grace.as_millis() as i64 => {
                gone.insert(id, object.bytes);
            }
            (false, Some(_)) => {}
        }
    }
    forget(client, &gone.keys().copied().collect())?;
    for (done, (id, bytes)) in gone.iter().enumerate() {
        client.remove(&layout::path(layout::SEGMENTS, id))?;
        client.remove(&layout::path(layout::DEAD, id))?;
        collected.removed += 1;
        collected.removed_bytes += bytes;
        watcher(Step { what: "removing", done: done as u64 + 1, total: gone.len() as u64 })?;
    }
    // Marks of segments that a run before has removed, and then was cut.
    let present: BTreeSet<Id> = segments.iter().filter_map(|object| Id::from_hex(&object.name)).collect();
    for id in dead.iter().filter(|id| !present.contains(id)) {
        client.remove(&layout::path(layout::DEAD, id))?;
    }
    Ok(collected)
}

/// The segments that hold what images need: of several copies one in a segment that is not listed as dead, if there is one.
fn needed_segments(
    client: &Arc<Client>,
    store: &Arc<Store>,
    images: &[RemoteImage],
    dead: &HashSet<Id>,
    watcher: Watcher<'_>,
) -> Result<BTreeSet<Id>, RemoteError> {
    let known = Known::load(client, None)?;
    let fetcher = Fetcher::new(client.clone(), Known::load(client, None)?, None);
    let mut needed = BTreeSet::new();
    let mut seen = BTreeSet::new();
    let mut done = 0;
    for image in images {
        let mut need = |name: &Name| -> Result<bool, StoreError> {
            if !seen.insert(*name) {
                return Ok(false);
            }
            let mut copies = known.find(name).map(|place| place.segment).collect::<Vec<_>>();
            copies.sort_by_key(|segment| (dead.contains(segment), *segment));
            match copies.first() {
                Some(&segment) => needed.insert(segment),
                None => {
                    let (image, name) = (image.name.clone(), name.to_string());
                    return Err(RemoteError::Lost { image, name }.into());
                }
            };
            Ok(true)
        };
        need(&image.node)?;
        fetcher.must_bring(store, &image.node, 0)?;
        let node = store.load_node(&image.node)?;
        let through = Through { store, fetcher: &fetcher };
        for tree in node.trees() {
            tree::walk(&through, tree.root, &mut |visit| match visit {
                Visit::Node(name) => {
                    done += 1;
                    watcher(Step { what: "marking", done, total: 0 })?;
                    need(&name)
                }
                Visit::Chunk(_, name) => need(&name),
            })?;
        }
    }
    Ok(needed)
}

/// Puts other index objects in the place of those that name segments that are to go.
fn forget(client: &Client, gone: &BTreeSet<Id>) -> Result<(), RemoteError> {
    if gone.is_empty() {
        return Ok(());
    }
    for (name, index) in Known::load(client, None)?.indexes {
        if !index.segments.iter().any(|segment| gone.contains(segment)) {
            continue;
        }
        let mut kept: BTreeMap<Id, Vec<Entry>> = BTreeMap::new();
        for (segment, entry) in index.entries() {
            if !gone.contains(&segment) {
                kept.entry(segment).or_default().push(entry);
            }
        }
        if !kept.is_empty() {
            put_index(client, kept.into_iter().collect())?;
        }
        client.remove(&layout::path(layout::INDEX, name))?;
    }
    Ok(())
}
