//! Units that go: because their code changed, or to make room for others.

use super::Translator;
use super::arena::{FarJump, JUMP_TABLES, JUMPS, Jumps, no_jump};
use super::bindings::NO_BINDING;
use super::links::{LINK_NUMBERS, LINKS_MAX, Link};
use super::spaces::jump_index;
use super::units::{NO_UNIT, UNIT_BYTES_MAX, Unit};

/// Units of a flush that are freed with each translation after it.
const FREED_AT_A_TIME: usize = 64;
/// Entries of [`Translator::evicted`], and what an eviction puts there.
pub const EVICTED: usize = 1 << 16;
const ROUNDS_AFTER_EVICTION: u8 = 4;

impl Translator {
    /// Drops everything.
    pub fn flush(&mut self, jumps: &mut Jumps) {
        let start = thread_time();
        self.statistics.flushes += 1;
        // Freeing all of them now would take long.
        self.first_unit = self.first_unit.wrapping_add(self.units.len() as u32);
        self.flushed.append(&mut self.units);
        self.by_address.clear();
        self.templates.clear();
        self.pages.clear();
        self.links.clear();
        self.cache.start_over(self.first_position);
        for (slot, space) in self.spaces.iter_mut().enumerate() {
            if space.take().is_some() {
                jumps.clear(slot, self.bindings.last());
            }
        }
        self.bindings.clear();
        self.current = 0;
        jumps.clear_far();
        self.statistics.paused_since(start);
    }

    /// Drops the units with bytes in the 64-byte granules (a bit mask) of a guest-physical page.
    pub fn invalidate(&mut self, page_number: u64, granules: u64, jumps: &mut Jumps) {
        let Some(on_page) = self.pages.get_mut(&page_number) else { return };
        let mut dropped = Vec::new();
        on_page.retain(|&id| {
            let stale = match self.units.get(id.wrapping_sub(self.first_unit) as usize) {
                Some(unit) => unit.granules_on(page_number) & granules != 0,
                None => true,
            };
            if stale {
                dropped.push(id);
            }
            !stale
        });
        for id in dropped {
            self.drop_unit(id, jumps);
        }
    }

    /// Makes sure that nobody comes to a unit any more.
    fn drop_unit(&mut self, id: u32, jumps: &mut Jumps) {
        let Some(unit) = self.unit_mut(id) else { return };
        unit.valid = false;
        let incoming = std::mem::take(&mut unit.incoming);
        let key = (unit.linear, unit.physical, unit.form);
        let (linear, first, count) = (unit.linear, unit.first_link, unit.links);
        // A unit may be dropped twice, once for each of its pages.
        let binding = std::mem::replace(&mut unit.binding, NO_BINDING);
        if self.by_address.get(&key) == Some(&id) {
            self.by_address.remove(&key);
        }
        if self.templates.get(&(key.1, key.2)) == Some(&id) {
            self.templates.remove(&(key.1, key.2));
        }
        for number in incoming {
            // The number may be another link's by now: then it leads elsewhere, or has its own entry among the incoming ones.
            if let Some(link) = self.link_mut(number)
                && link.to == id
            {
                link.to = NO_UNIT;
                let Link { site, base, .. } = *link;
                self.cache.aim(base as usize + site.jump_at, base as usize + site.stub);
            }
        }
        self.bindings.give_back(binding, id, jumps);
        // Its own ways out need no care: nobody comes here any more.
        for number in 0..count {
            if let Some(link) = self.link_mut(first.wrapping_add(number)) {
                link.from = NO_UNIT;
            }
        }
        let far = jumps.far(linear);
        if far.linear == linear {
            *far = FarJump::NONE;
        }
        for slot in 1..JUMP_TABLES {
            let at = slot * JUMPS + jump_index(linear);
            if jumps.keys[at] == linear {
                jumps.keys[at] = no_jump(at);
            }
        }
    }

    /// Drops the oldest unit and forgets it.
    fn evict_oldest(&mut self, jumps: &mut Jumps) {
        let id = self.first_unit;
        let Some(unit) = self.units.front() else { return };
        let (linear, is_valid, code) = (unit.linear, unit.valid, (unit.physical, unit.form));
        let pages = unit.pages();
        if is_valid {
            self.drop_unit(id, jumps);
            if !self.templates.contains_key(&code) {
                self.evicted[evicted_index(linear)] = ROUNDS_AFTER_EVICTION;
            }
            for page_number in pages.into_iter().flatten() {
                if let Some(on_page) = self.pages.get_mut(&page_number) {
                    // The oldest of all is the oldest here, but for units that were dropped with their other page.
                    while on_page.front().is_some_and(|&front| front != id) {
                        on_page.pop_front();
                    }
                    on_page.pop_front();
                    if on_page.is_empty() {
                        self.pages.remove(&page_number);
                    }
                }
            }
        }
        if let Some(unit) = self.units.pop_front() {
            self.first_unit = self.first_unit.wrapping_add(1);
            self.links.drain(..(unit.links as usize).min(self.links.len()));
            self.first_link = self.first_link.wrapping_add(unit.links) % LINK_NUMBERS;
            self.statistics.evicted += 1;
        }
    }

    /// Whether hot code that is not translated should be interpreted for some time yet: it was evicted not long ago.
    pub(super) fn was_evicted_lately(&mut self, linear: u64) -> bool {
        let left = &mut self.evicted[evicted_index(linear)];
        let is_left = *left != 0;
        *left -= u8::from(is_left);
        is_left
    }

    /// Makes room for a unit with up to `links` links at the cache's position. The cache is a ring: the oldest units go, no more of them than must.
    pub(super) fn make_room(&mut self, links: usize, jumps: &mut Jumps) {
        self.flushed.truncate(self.flushed.len().saturating_sub(FREED_AT_A_TIME));
        let mut start = None;
        if self.cache.free() < UNIT_BYTES_MAX {
            let position = self.cache.position() as u32;
            while self.units.front().is_some_and(|unit| unit.code.start >= position) {
                start.get_or_insert_with(thread_time);
                self.evict_oldest(jumps);
            }
            self.cache.start_over(self.first_position);
        }
        let position = self.cache.position() as u32;
        let is_in_the_way =
            |unit: &Unit, bytes: usize| unit.code.start < position + bytes as u32 && unit.code.end > position;
        // Room for more than one, for each time costs the returns.
        let bytes = match self.units.front() {
            Some(unit) if is_in_the_way(unit, UNIT_BYTES_MAX) => 2 * UNIT_BYTES_MAX,
            _ => 0,
        };
        while self.units.front().is_some_and(|unit| is_in_the_way(unit, bytes)) || self.links.len() + links > LINKS_MAX
        {
            start.get_or_insert_with(thread_time);
            self.evict_oldest(jumps);
        }
        if let Some(start) = start {
            jumps.clear_returns();
            self.statistics.paused_since(start);
        }
    }
}

/// Processor time of this thread in nanoseconds: what others on the host do is no pause of ours.
pub fn thread_time() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

fn evicted_index(linear: u64) -> usize {
    (linear.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 48) as usize & (EVICTED - 1)
}
