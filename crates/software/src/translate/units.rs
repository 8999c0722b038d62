//! What is translated, and how it is found.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};
use std::io;
use std::rc::Rc;
use std::sync::Arc;

use polder_memory::{GuestMemory, PAGE_SIZE, PageNotes, raw};

use super::arena::{HOSTS, JUMP_TABLES, JUMPS, Jumps, KEYS, no_jump};
use super::assembler::Relocation;
use super::cache::CodeCache;
use super::generate::{Context, FaultSite, Generator, LinkSite, Ops};
use super::guest_code::{self};
use super::listing::Listings;
use super::lockstep::Lockstep;
use super::thunks::{self, Functions, Thunks};
use crate::block_cache;
use crate::counters::Counters;
use crate::cpu::{Cpu, cr4, is_canonical};
use crate::stopwatch::Activity;

/// No unit's code is longer.
const UNIT_BYTES_MAX: usize = 64 << 10;
/// Links of a vCPU.
const LINKS_MAX: usize = 4 << 20;
/// Links are numbered round these; the exits that are no links' are beyond.
const LINK_NUMBERS: u32 = 1 << 31;
/// Units of a flush that are freed with each translation after it.
const FREED_AT_A_TIME: usize = 64;
/// Entries of [`Translator::evicted`], and what an eviction puts there.
const EVICTED: usize = 1 << 16;
const ROUNDS_AFTER_EVICTION: u8 = 4;
/// Attempts to read bytes that another processor keeps changing.
const READS_MAX: u32 = 4;
const NO_UNIT: u32 = u32::MAX;

/// What code is translated for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Form {
    /// The data table.
    table: u8,
    /// Accesses share no look-ups.
    plain: bool,
}

/// A translated piece of guest code.
struct Unit {
    linear: u64,
    physical: u64,
    form: Form,
    /// 64-byte granules of the page that its bytes lie in.
    granules: u64,
    /// Places in the code cache.
    code: std::ops::Range<u32>,
    first_link: u32,
    links: u32,
    /// Links of other units that lead here.
    incoming: Vec<u32>,
    /// Handlers that its code calls with these ops.
    ops: SharedOps,
    relocations: Arc<[(u32, Relocation)]>,
    faults: Vec<FaultSite>,
    valid: bool,
}

/// Ops of a unit and of its copies. They hold cells.
#[derive(Clone)]
struct SharedOps(#[expect(dead_code, reason = "kept for the code that calls handlers with them")] Rc<Ops>);

// SAFETY: all copies belong to one translator, which one thread uses at a time.
unsafe impl Send for SharedOps {}

/// A way out of a unit.
#[derive(Clone, Copy)]
struct Link {
    site: LinkSite,
    /// Place of the unit's code.
    base: u32,
    from: u32,
    to: u32,
}

/// Hashes integers by multiplication.
#[derive(Default)]
pub struct Multiply(u64);

impl Hasher for Multiply {
    fn finish(&self) -> u64 {
        self.0 ^ self.0 >> 32
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(u64::from(byte));
        }
    }

    fn write_u8(&mut self, value: u8) {
        self.write_u64(u64::from(value));
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0.rotate_left(5) ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }
}

type Map<K, V> = HashMap<K, V, BuildHasherDefault<Multiply>>;

/// What an address space is to translated code: instruction fetch leads to the same bytes, data through the same table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct SpaceKey {
    fetch_tag: u64,
    table: usize,
}

#[derive(Debug, Clone, Copy)]
struct Space {
    key: SpaceKey,
    /// Number for links; never used twice.
    number: u32,
    used: u64,
}

/// The translated code of one vCPU.
pub struct Translator {
    pub(super) cache: CodeCache,
    pub(super) thunks: Thunks,
    first_position: usize,
    /// From the oldest to the newest, as their code lies in the cache; the first one's number is `first_unit`.
    units: VecDeque<Unit>,
    first_unit: u32,
    by_address: Map<(u64, u64, Form), u32>,
    /// A unit for a physical address and form, whatever its linear address.
    templates: Map<(u64, Form), u32>,
    pages: Map<u64, Vec<u32>>,
    /// From the oldest unit's to the newest's; the first one's number is `first_link`.
    links: VecDeque<Link>,
    first_link: u32,
    /// Units of the last flush, freed little by little.
    flushed: VecDeque<Unit>,
    /// Times that evicted code must grow hot again before it is translated anew, by a hash of its address. A cache that is too small for
    /// what runs would else be filled without end.
    evicted: Box<[u8; EVICTED]>,
    spaces: [Option<Space>; JUMP_TABLES],
    current: usize,
    /// The one before.
    previous: usize,
    last_space: u32,
    clock: u64,
    /// An address whose plain form is wanted.
    pub(super) wants_plain: Option<u64>,
    /// CR4.SMAP, as the units that there are assume it.
    pub(super) guards_user_pages: bool,
    /// Times that a block is interpreted before it is translated.
    pub threshold: u32,
    pub statistics: Statistics,
    pub listings: Listings,
    /// Units are compared with the interpreter; set before anything is translated.
    pub lockstep: Option<Box<Lockstep>>,
}

/// Counts of a translator.
#[derive(Debug, Clone, Copy, Default)]
pub struct Statistics {
    pub units: u64,
    pub code_bytes: u64,
    pub flushes: u64,
    /// Units dropped to make room for others.
    pub evicted: u64,
    /// The longest that making room or a flush took, in time of the thread.
    pub pause_ns_max: u64,
}

impl Statistics {
    fn paused_since(&mut self, start: u64) {
        self.pause_ns_max = self.pause_ns_max.max(thread_time().saturating_sub(start));
    }
}

impl std::fmt::Debug for Translator {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Translator").field("units", &self.units.len()).finish_non_exhaustive()
    }
}

impl Translator {
    /// A translator without translations, or `None` on hosts whose CPU lacks what the generated code uses (BMI2, AVX).
    /// `code_bytes` is the code cache's size.
    pub fn new(functions: Functions, threshold: u32, code_bytes: usize) -> io::Result<Option<Translator>> {
        if !(is_x86_feature_detected!("bmi2") && is_x86_feature_detected!("avx")) {
            return Ok(None);
        }
        super::signal::install()?;
        let mut cache = CodeCache::new(code_bytes)?;
        let mut asm = super::assembler::Assembler::default();
        let thunks = thunks::generate(&mut asm, functions);
        if !asm.resolve() {
            return Ok(None);
        }
        cache.add(&asm.bytes);
        Ok(Some(Translator {
            first_position: cache.position(),
            cache,
            thunks,
            units: VecDeque::new(),
            first_unit: 0,
            by_address: Map::default(),
            templates: Map::default(),
            pages: Map::default(),
            links: VecDeque::new(),
            first_link: 0,
            flushed: VecDeque::new(),
            evicted: Box::new([0; EVICTED]),
            spaces: [None; JUMP_TABLES],
            current: 0,
            previous: 0,
            last_space: 0,
            clock: 0,
            wants_plain: None,
            guards_user_pages: false,
            threshold,
            statistics: Statistics::default(),
            listings: Listings::default(),
            lockstep: None,
        }))
    }

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
                jumps.clear(slot);
            }
        }
        self.current = 0;
        self.statistics.paused_since(start);
    }

    /// Puts what there is to tell into the vCPU's counters.
    pub fn report(&self, counters: &mut Counters) {
        counters.translated_units = self.statistics.units;
        counters.translated_code_bytes = self.statistics.code_bytes;
        counters.code_cache_bytes = self.cache.len() as u64;
        counters.code_cache_evicted = self.statistics.evicted;
        if let Some(lockstep) = &self.lockstep {
            counters.lockstep_units = lockstep.units;
            counters.lockstep_instructions = lockstep.instructions;
            counters.lockstep_differences = lockstep.differences;
        }
        counters.code_cache_flushes = self.statistics.flushes;
        counters.code_cache_pause_ns_max = self.statistics.pause_ns_max;
    }

    /// Drops the units with bytes in the 64-byte granules (a bit mask) of a guest-physical page.
    pub fn invalidate(&mut self, page_number: u64, granules: u64, jumps: &mut Jumps) {
        let Some(on_page) = self.pages.get_mut(&page_number) else { return };
        let mut dropped = Vec::new();
        on_page.retain(|&id| {
            let stale = match self.units.get(id.wrapping_sub(self.first_unit) as usize) {
                Some(unit) => unit.granules & granules != 0,
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

    fn unit(&self, id: u32) -> Option<&Unit> {
        self.units.get(id.wrapping_sub(self.first_unit) as usize)
    }

    fn unit_mut(&mut self, id: u32) -> Option<&mut Unit> {
        self.units.get_mut(id.wrapping_sub(self.first_unit) as usize)
    }

    fn link(&self, number: u32) -> Option<&Link> {
        self.links.get((number.wrapping_sub(self.first_link) % LINK_NUMBERS) as usize)
    }

    fn link_mut(&mut self, number: u32) -> Option<&mut Link> {
        self.links.get_mut((number.wrapping_sub(self.first_link) % LINK_NUMBERS) as usize)
    }

    /// Makes sure that nobody comes to a unit any more.
    fn drop_unit(&mut self, id: u32, jumps: &mut Jumps) {
        let Some(unit) = self.unit_mut(id) else { return };
        unit.valid = false;
        let incoming = std::mem::take(&mut unit.incoming);
        let key = (unit.linear, unit.physical, unit.form);
        let (linear, first, count) = (unit.linear, unit.first_link, unit.links);
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
        // Its own ways out need no care: nobody comes here any more.
        for number in 0..count {
            if let Some(link) = self.link_mut(first.wrapping_add(number)) {
                link.from = NO_UNIT;
            }
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
        let (linear, physical, is_valid) = (unit.linear, unit.physical, unit.valid);
        if is_valid {
            self.evicted[evicted_index(linear)] = ROUNDS_AFTER_EVICTION;
            self.drop_unit(id, jumps);
            if let Some(on_page) = self.pages.get_mut(&(physical / PAGE_SIZE)) {
                on_page.retain(|&other| other != id);
                if on_page.is_empty() {
                    self.pages.remove(&(physical / PAGE_SIZE));
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

    /// Whether the code at RIP, which is hot, should be interpreted for some time yet: it was evicted not long ago.
    pub(super) fn was_evicted_lately(&mut self, cpu: &mut Cpu) -> bool {
        let left = self.evicted[evicted_index(cpu.rip)];
        if left == 0 || self.unit_at(cpu, false).is_some() {
            return false;
        }
        self.evicted[evicted_index(cpu.rip)] -= 1;
        true
    }

    /// Makes room for a unit with up to `links` links at the cache's position. The cache is a ring: the oldest units go, no more of them than must.
    fn make_room(&mut self, links: usize, jumps: &mut Jumps) {
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
        let room = position..position + UNIT_BYTES_MAX as u32;
        let is_in_the_way = |unit: &Unit| unit.code.start < room.end && unit.code.end > room.start;
        while self.units.front().is_some_and(is_in_the_way) || self.links.len() + links > LINKS_MAX {
            start.get_or_insert_with(thread_time);
            self.evict_oldest(jumps);
        }
        if let Some(start) = start {
            self.statistics.paused_since(start);
        }
    }

    /// Chooses the jump table for the processor's address space; gives its first index.
    pub(super) fn select_space(&mut self, cpu: &mut Cpu, jumps: &mut Jumps) -> u32 {
        let key = SpaceKey { fetch_tag: cpu.tlb.fetch_tag, table: cpu.tlb.data_table() };
        self.clock += 1;
        let is_it = |space: &Option<Space>| space.is_some_and(|space| space.key == key);
        if !is_it(&self.spaces[self.current]) {
            let before = self.current;
            // Most often back to where it came from: from the kernel to the program.
            self.current = if is_it(&self.spaces[self.previous]) {
                self.previous
            } else {
                match self.spaces.iter().position(is_it) {
                    Some(slot) => slot,
                    None => self.new_space(key, jumps),
                }
            };
            self.previous = before;
        }
        if let Some(space) = &mut self.spaces[self.current] {
            space.used = self.clock;
            cpu.frame.space = space.number;
        }
        (self.current * JUMPS) as u32
    }

    fn new_space(&mut self, key: SpaceKey, jumps: &mut Jumps) -> usize {
        if self.last_space == i32::MAX as u32 {
            self.flush(jumps);
            self.last_space = 0;
        }
        let used = |slot: &usize| self.spaces[*slot].map_or(0, |space| space.used);
        let slot = (1..JUMP_TABLES).min_by_key(used).unwrap_or(1);
        if self.spaces[slot].is_some() {
            jumps.clear(slot);
        }
        self.last_space += 1;
        self.spaces[slot] = Some(Space { key, number: self.last_space, used: self.clock });
        slot
    }

    /// Finds the unit at RIP in the address space in use; remembers it in the jump table. The answer is the place of its code.
    pub(super) fn find(&mut self, cpu: &mut Cpu, jumps: &mut Jumps) -> Option<u32> {
        let linear = cpu.rip;
        let id = self.unit_at(cpu, false)?;
        let host = self.host_of(id)?;
        // That may have changed what the address space is to instruction fetch.
        self.select_space(cpu, jumps);
        let at = self.current * JUMPS + jump_index(linear);
        if self.current != 0 {
            jumps.keys[at] = linear;
            jumps.hosts[at] = host;
        }
        Some(id)
    }

    /// The address of code for RIP, if the jump table knows it.
    #[inline]
    pub(super) fn known(&self, linear: u64, jumps: &Jumps) -> Option<u64> {
        let at = self.current * JUMPS + jump_index(linear);
        (self.current != 0 && jumps.keys[at] == linear).then(|| jumps.hosts[at])
    }

    /// The unit in plain form at RIP, where the stretch of a group lies in two pages; made if need be.
    pub(super) fn plain(&mut self, cpu: &mut Cpu, jumps: &mut Jumps) -> Option<u32> {
        let before = cpu.stopwatch.turn_to(Activity::Translator);
        let unit = self.make_unit(cpu, jumps, true);
        cpu.stopwatch.turn_to(before);
        unit
    }

    pub(super) fn unit_at(&mut self, cpu: &mut Cpu, plain: bool) -> Option<u32> {
        if !is_canonical(cpu.rip, 48) || cpu.debugger.cuts_at(cpu.rip) {
            return None;
        }
        let page_number = block_cache::code_page(cpu, cpu.rip).ok()?;
        let physical = page_number * PAGE_SIZE + cpu.rip % PAGE_SIZE;
        // The jump table depends on this page's translation from here on.
        cpu.tlb.note_way(cpu.rip);
        self.by_address.get(&(cpu.rip, physical, Form { table: cpu.tlb.data_table() as u8, plain })).copied()
    }

    pub(super) fn host_of(&self, id: u32) -> Option<u64> {
        Some(self.cache.address(self.unit(id)?.code.start as usize))
    }

    /// Where a link leads, and whether to the plain form there.
    pub(super) fn link_target(&self, link: u32) -> Option<(u64, bool)> {
        self.link(link).map(|link| (link.site.target, link.site.plain))
    }

    /// Aims a link at a unit in the address space in use.
    pub(super) fn aim(&mut self, link: u32, to: u32, space: u32) {
        let Some(unit) = self.unit(to) else { return };
        let (target, table, page) = (unit.code.start as usize, unit.form.table, unit.physical / PAGE_SIZE);
        let Some(&Link { site, base, from, .. }) = self.link(link) else { return };
        let Some(source) = self.unit(from) else { return };
        if source.form.table != table || site.space_at.is_none() && source.physical / PAGE_SIZE != page {
            // The page was mapped anew while its old code ran on; another space may have it as it was.
            return;
        }
        let Some(entry) = self.link_mut(link) else { return };
        if std::mem::replace(&mut entry.to, to) != to
            && let Some(unit) = self.unit_mut(to)
        {
            unit.incoming.push(link);
        }
        if let Some(at) = site.space_at {
            self.cache.patch(base as usize + at, (space as i32).wrapping_neg());
        }
        self.cache.aim(base as usize + site.jump_at, target);
    }

    /// The guest's instruction that raised an exception at a host address.
    pub(super) fn guest_of_fault(&self, host: u64) -> Option<FaultSite> {
        let position = self.cache.position_of(host)? as u32;
        // The oldest units lie from the cache's position to its end, the newest from its start on.
        let head = self.cache.position() as u32;
        let order = |position: u32| (position < head, position);
        let index = self.units.partition_point(|unit| order(unit.code.end - 1) < order(position));
        let unit = self.units.get(index)?;
        let inside = position.checked_sub(unit.code.start)?;
        let found = unit.faults.partition_point(|site| site.at <= inside);
        unit.faults.get(found.checked_sub(1)?).copied()
    }

    /// Translates the code at RIP. `None`: it stays with the interpreter.
    pub(super) fn translate(&mut self, cpu: &mut Cpu, jumps: &mut Jumps) -> Option<u32> {
        let before = cpu.stopwatch.turn_to(Activity::Translator);
        let unit = self.make_unit(cpu, jumps, false);
        cpu.stopwatch.turn_to(before);
        unit
    }

    fn make_unit(&mut self, cpu: &mut Cpu, jumps: &mut Jumps, plain: bool) -> Option<u32> {
        if let Some(id) = self.unit_at(cpu, plain) {
            return Some(id);
        }
        let linear = cpu.rip;
        let page_number = block_cache::code_page(cpu, linear).ok()?;
        let page = cpu.services.memory.page(page_number)?;
        if page_number == cpu.apic_page || cpu.debugger.cuts_at(linear) {
            return None;
        }
        let offset = (linear % PAGE_SIZE) as usize;
        let physical = page_number * PAGE_SIZE + offset as u64;
        let form = Form { table: cpu.tlb.data_table() as u8, plain };
        let readable = cpu.debugger.uncut(linear, PAGE_SIZE as usize - offset);
        // Only whole units that nobody wants to see made.
        let is_whole = readable == PAGE_SIZE as usize - offset && !self.listings.address_is_near(linear);
        let template = self.templates.get(&(physical, form)).copied().filter(|_| is_whole);
        if let Some(copy) = template.and_then(|template| self.copy_unit(template, linear, jumps)) {
            return Some(copy);
        }
        let mut bytes = [0; PAGE_SIZE as usize];
        // SAFETY: `readable` bytes from `offset` lie in the page.
        let source = unsafe { page.pointer.add(offset) };
        let mut items = Vec::new();
        let mut len = 0;
        for round in 0.. {
            if round == READS_MAX {
                return None;
            }
            // SAFETY: as above; the buffer is long enough.
            unsafe { raw::copy(source, bytes.as_mut_ptr(), readable) };
            items = guest_code::decode(&bytes[..readable], linear, cpu.model.decoder_options());
            let end = items.last()?.instruction.next_ip();
            len = end.wrapping_sub(linear) as usize;
            let granules = GuestMemory::granules(offset as u64, len as u64);
            if cpu.services.memory.notes().watch_code(page.page_index, granules) {
                PageNotes::publish();
            }
            let mut again = [0; PAGE_SIZE as usize];
            // SAFETY: as above.
            unsafe { raw::copy(source, again.as_mut_ptr(), len) };
            if again[..len] == bytes[..len] {
                break;
            }
        }
        self.make_room(2 * items.len(), jumps);
        let position = self.cache.position();
        let first_link = (self.first_link + self.links.len() as u32) % LINK_NUMBERS;
        let context = Context {
            model: &cpu.model,
            thunks: self.thunks,
            position,
            table: cpu.tlb.data_table(),
            guards_user_pages: cpu.cr4 & cr4::SMAP != 0,
            listed: self.listings.wants(&items),
            counts: cpu.stopwatch.is_on(),
            keeps_journal: self.lockstep.is_some(),
            plain,
            first_link: first_link as usize,
        };
        let generated = Generator::new(context, &items).run().ok()?;
        if generated.code.len() > UNIT_BYTES_MAX {
            return None;
        }
        self.cache.add(&generated.code);
        let host = self.cache.address(position);
        self.listings.list(&items, &generated.starts, &generated.code, host);
        self.listings.name(linear, host, generated.code.len());
        let id = self.first_unit.wrapping_add(self.units.len() as u32);
        self.links.extend(generated.links.iter().map(|&site| Link {
            site,
            base: position as u32,
            from: id,
            to: NO_UNIT,
        }));
        self.units.push_back(Unit {
            linear,
            physical,
            form,
            granules: GuestMemory::granules(offset as u64, len as u64),
            code: position as u32..(position + generated.code.len()) as u32,
            first_link,
            links: generated.links.len() as u32,
            incoming: Vec::new(),
            ops: SharedOps(Rc::new(generated.ops)),
            relocations: generated.relocations.into(),
            faults: generated.faults,
            valid: true,
        });
        self.by_address.insert((linear, physical, form), id);
        self.templates.insert((physical, form), id);
        self.pages.entry(page_number).or_default().push(id);
        self.statistics.units += 1;
        self.statistics.code_bytes += generated.code.len() as u64;
        Some(id)
    }

    /// The same code at another linear address: that of another program, most often. `None` if its numbers do not fit.
    fn copy_unit(&mut self, template: u32, linear: u64, jumps: &mut Jumps) -> Option<u32> {
        let links = self.unit(template)?.links;
        self.make_room(links as usize, jumps);
        let unit = self.unit(template).filter(|unit| unit.valid)?;
        let delta = linear.wrapping_sub(unit.linear);
        let position = self.cache.position();
        let first_link = (self.first_link + self.links.len() as u32) % LINK_NUMBERS;
        let mut code = self.cache.bytes(unit.code.start as usize..unit.code.end as usize).to_vec();
        let mut sites = Vec::with_capacity(links as usize);
        for number in 0..links {
            let mut site = self.link((unit.first_link + number) % LINK_NUMBERS)?.site;
            put(&mut code, site.jump_at, (site.stub as i64 - (site.jump_at as i64 + 4)) as i32)?;
            if let Some(at) = site.space_at {
                put(&mut code, at, 0)?;
            }
            site.target = site.target.wrapping_add(delta);
            sites.push(site);
        }
        for &(at, relocation) in unit.relocations.iter() {
            let at = at as usize;
            let old = i32::from_le_bytes(code.get(at..at + 4)?.try_into().ok()?);
            let new = match relocation {
                Relocation::Linear => {
                    let field = code.get_mut(at..at + 8)?;
                    let value = u64::from_le_bytes(field.try_into().ok()?).wrapping_add(delta);
                    field.copy_from_slice(&value.to_le_bytes());
                    continue;
                }
                Relocation::LinearLow => u32::try_from(u64::from(old as u32).wrapping_add(delta)).ok()? as i32,
                Relocation::LinearSigned => i32::try_from(i64::from(old).wrapping_add(delta as i64)).ok()?,
                Relocation::Distance => (i64::from(old) + i64::from(unit.code.start) - position as i64) as i32,
                Relocation::Link => {
                    ((old as u32).wrapping_sub(unit.first_link) % LINK_NUMBERS).wrapping_add(first_link) as i32
                }
            };
            put(&mut code, at, new)?;
        }
        let mut faults = unit.faults.clone();
        for site in &mut faults {
            site.rip = site.rip.wrapping_add(delta);
            if let Some(x87) = &mut site.x87 {
                x87.rip = x87.rip.wrapping_add(delta);
            }
        }
        let copy = Unit {
            linear,
            physical: unit.physical,
            form: unit.form,
            granules: unit.granules,
            code: position as u32..(position + code.len()) as u32,
            first_link,
            links,
            incoming: Vec::new(),
            ops: unit.ops.clone(),
            relocations: unit.relocations.clone(),
            faults,
            valid: true,
        };
        self.listings.name(linear, self.cache.address(position), code.len());
        self.cache.add(&code);
        let id = self.first_unit.wrapping_add(self.units.len() as u32);
        self.links.extend(sites.into_iter().map(|site| Link { site, base: position as u32, from: id, to: NO_UNIT }));
        self.by_address.insert((linear, copy.physical, copy.form), id);
        self.pages.entry(copy.physical / PAGE_SIZE).or_default().push(id);
        self.units.push_back(copy);
        self.statistics.code_bytes += code.len() as u64;
        Some(id)
    }
}

/// Puts a 32-bit number into code.
fn put(code: &mut [u8], at: usize, value: i32) -> Option<()> {
    code.get_mut(at..at + 4)?.copy_from_slice(&value.to_le_bytes());
    Some(())
}

/// Processor time of this thread in nanoseconds: what others on the host do is no pause of ours.
fn thread_time() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

fn evicted_index(linear: u64) -> usize {
    (linear.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 48) as usize & (EVICTED - 1)
}

fn jump_index(linear: u64) -> usize {
    linear as usize & (JUMPS - 1)
}

const _: () = assert!(KEYS > 0 && HOSTS > KEYS);
