//! A bounded cache by name, for chunks and for nodes of trees: sixteen shards, each a clock.
//!
//! A value that was asked for again since the hand passed it stays; what came once and was never asked for again goes at the next
//! round, so that a long sequential read does not push out what is used.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::RwLock;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use crate::name::Name;

const SHARDS: usize = 16;

/// Names are hashes already: their first bytes serve.
#[derive(Default)]
pub(crate) struct NameHasher(u64);

impl Hasher for NameHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for (index, &byte) in bytes.iter().take(8).enumerate() {
            self.0 ^= u64::from(byte) << (8 * index);
        }
    }

    fn write_usize(&mut self, _: usize) {}
}

pub(crate) type NameMap<K, V> = HashMap<K, V, BuildHasherDefault<NameHasher>>;

struct Slot<V> {
    name: Name,
    value: V,
    weight: usize,
    used: AtomicBool,
}

struct Shard<V> {
    places: NameMap<Name, usize>,
    slots: Vec<Slot<V>>,
    hand: usize,
    weight: usize,
}

/// A cache of values that are cheap to clone.
pub(crate) struct Cache<V> {
    shards: [RwLock<Shard<V>>; SHARDS],
    shard_weight_max: usize,
}

impl<V: Clone> Cache<V> {
    /// A cache of values that weigh `weight_max` together at most.
    pub fn new(weight_max: usize) -> Self {
        let shard = || RwLock::new(Shard { places: NameMap::default(), slots: Vec::new(), hand: 0, weight: 0 });
        Cache { shards: std::array::from_fn(|_| shard()), shard_weight_max: weight_max / SHARDS }
    }

    fn shard(&self, name: &Name) -> &RwLock<Shard<V>> {
        &self.shards[usize::from(name.0[31]) % SHARDS]
    }

    pub fn get(&self, name: &Name) -> Option<V> {
        let shard = self.shard(name).read().unwrap_or_else(|poisoned| poisoned.into_inner());
        let slot = &shard.slots[*shard.places.get(name)?];
        if !slot.used.load(Ordering::Relaxed) {
            slot.used.store(true, Ordering::Relaxed);
        }
        Some(slot.value.clone())
    }

    pub fn insert(&self, name: Name, value: V, weight: usize) {
        let mut shard = self.shard(&name).write().unwrap_or_else(|poisoned| poisoned.into_inner());
        if weight > self.shard_weight_max || shard.places.contains_key(&name) {
            return;
        }
        while shard.weight + weight > self.shard_weight_max {
            shard.evict();
        }
        let place = shard.slots.len();
        shard.weight += weight;
        shard.places.insert(name, place);
        shard.slots.push(Slot { name, value, weight, used: AtomicBool::new(false) });
    }
}

impl<V> Shard<V> {
    fn evict(&mut self) {
        loop {
            if self.hand >= self.slots.len() {
                self.hand = 0;
            }
            if !self.slots[self.hand].used.swap(false, Ordering::Relaxed) {
                return self.remove_at(self.hand);
            }
            self.hand += 1;
        }
    }

    fn remove_at(&mut self, place: usize) {
        let slot = self.slots.swap_remove(place);
        self.weight -= slot.weight;
        self.places.remove(&slot.name);
        if let Some(moved) = self.slots.get(place) {
            self.places.insert(moved.name, place);
        }
    }
}

/// Names that were asked for lately, as far as 32 bits tell them apart: what is asked for once is hardly worth a place in a cache.
pub(crate) struct ReadOnce(Box<[AtomicU32]>);

/// Names that are remembered: about as many as a cache of usual size has chunks, twice.
const REMEMBERED: usize = 8192;

impl Default for ReadOnce {
    fn default() -> Self {
        ReadOnce((0..REMEMBERED).map(|_| AtomicU32::new(0)).collect())
    }
}

impl ReadOnce {
    /// Remembers a name; whether it was remembered.
    pub fn note(&self, name: &Name) -> bool {
        let word = |at: usize| u32::from_le_bytes([name.0[at], name.0[at + 1], name.0[at + 2], name.0[at + 3]]);
        self.0[word(8) as usize % REMEMBERED].swap(word(12), Ordering::Relaxed) == word(12)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(index: u32) -> Name {
        Name(*blake3::hash(&index.to_le_bytes()).as_bytes())
    }

    #[test]
    fn a_cache_stays_within_its_bound_and_keeps_what_is_used() {
        let cache = Cache::new(SHARDS * 10 * 100);
        for index in 0..10_000 {
            cache.insert(name(index), index, 100);
            assert_eq!(cache.get(&name(0)), Some(0), "at {index}");
        }
        let held: usize = cache.shards.iter().map(|shard| shard.read().unwrap().slots.len()).sum();
        assert!((SHARDS * 8..=SHARDS * 10).contains(&held), "{held}");
        cache.insert(name(20_000), 7, SHARDS * 1000);
        assert_eq!(cache.get(&name(20_000)), None);
    }

    #[test]
    fn a_name_is_remembered_until_another_takes_its_place() {
        let read = ReadOnce::default();
        assert!(!read.note(&name(1)));
        assert!(read.note(&name(1)));
        // So many others leave none of the first ones.
        for index in 2..200_000 {
            read.note(&name(index));
        }
        assert!(!read.note(&name(1)));
        assert!(read.note(&name(1)));
    }
}
