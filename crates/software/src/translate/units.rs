//! What is translated, and how it is found.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};
use std::io;
use std::rc::Rc;
use std::sync::Arc;

use iced_x86::FlowControl;
use polder_memory::PAGE_SIZE;

use super::arena::{HOSTS, JUMP_TABLES, Jumps, KEYS};
use super::assembler::Relocation;
use super::bindings::{Binding, Bindings, NO_BINDING};
use super::cache::CodeCache;
use super::eviction::{EVICTED, thread_time};
use super::fetch::{Extent, Reader, next_page};
use super::generate::{Context, Generated, Generator, LinkSite, Memory, Ops, Shape, Site};
use super::guest_code::Item;
use super::links::{LINKS_OF_ITEM, Link};
use super::listing::Listings;
use super::lockstep::Lockstep;
use super::spaces::Space;
use super::thunks::{self, Functions, Thunks};
use super::x87::X87Site;
use crate::block_cache;
use crate::counters::Counters;
use crate::cpu::{Cpu, cr4, is_canonical};
use crate::stopwatch::Activity;

/// No unit's code is longer.
pub const UNIT_BYTES_MAX: usize = 64 << 10;
pub const NO_UNIT: u32 = u32::MAX;

/// What code is translated for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Form {
    /// The data table.
    table: u8,
    /// The enabled classes of vector and x87 instructions.
    enabled: u8,
    shape: Shape,
}

impl Form {
    /// The form of a unit for the processor's present state.
    pub(super) fn now(cpu: &Cpu, shape: Shape) -> Form {
        Form { table: cpu.tlb.data_table() as u8, enabled: cpu.vector.enabled, shape }
    }

    /// Whether units of both forms run in the same address spaces.
    pub(super) fn is_of_space(self, other: Form) -> bool {
        (self.table, self.enabled) == (other.table, other.enabled)
    }
}

/// A translated piece of guest code.
pub struct Unit {
    pub(super) linear: u64,
    pub(super) physical: u64,
    pub(super) form: Form,
    /// 64-byte granules of the page that its bytes lie in.
    pub(super) granules: u64,
    /// Number of the second page, of a unit of one instruction that lies in two.
    pub(super) second_page: Option<u64>,
    /// That its pages are mapped as they are here.
    pub(super) binding: u32,
    /// Places in the code cache.
    pub(super) code: std::ops::Range<u32>,
    pub(super) first_link: u32,
    pub(super) links: u32,
    /// Links of other units that lead here.
    pub(super) incoming: Vec<u32>,
    /// Handlers that its code calls with these ops.
    pub(super) ops: SharedOps,
    pub(super) relocations: Arc<[(u32, Relocation)]>,
    pub(super) sites: Arc<[Site]>,
    pub(super) x87: Vec<X87Site>,
    pub(super) valid: bool,
}

impl Unit {
    /// Guest-physical numbers of its pages.
    pub(super) fn pages(&self) -> [Option<u64>; 2] {
        [Some(self.physical / PAGE_SIZE), self.second_page]
    }

    /// What its binding is at a linear address.
    pub(super) fn binding_at(&self, linear: u64) -> Binding {
        let form = Form { shape: Shape::Shared, ..self.form };
        Binding::new(linear / PAGE_SIZE, self.physical / PAGE_SIZE, self.second_page, form)
    }

    /// The granules of one of its pages that its bytes lie in.
    pub(super) fn granules_on(&self, page_number: u64) -> u64 {
        let first = if page_number == self.physical / PAGE_SIZE { self.granules } else { 0 };
        // Less than an instruction of the second page: it lies in the first granule.
        first | u64::from(self.second_page == Some(page_number))
    }
}

/// What a place in a unit's code stands for.
#[derive(Debug, Clone, Copy)]
pub struct Place {
    /// The guest's instruction.
    pub rip: u64,
    /// The x87 instruction before it whose pointers are still to be stored.
    pub x87: Option<X87Site>,
    /// What the instruction, an indirect jump, has moved RSP by.
    pub moved: i32,
}

/// Ops of a unit and of its copies. They hold cells.
#[derive(Clone)]
pub struct SharedOps(#[expect(dead_code, reason = "kept for the code that calls handlers with them")] Option<Rc<Ops>>);

// SAFETY: all copies belong to one translator, which one thread uses at a time.
unsafe impl Send for SharedOps {}

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

/// The translated code of one vCPU.
pub struct Translator {
    pub(super) cache: CodeCache,
    pub(super) thunks: Thunks,
    pub(super) first_position: usize,
    /// From the oldest to the newest, as their code lies in the cache; the first one's number is `first_unit`.
    pub(super) units: VecDeque<Unit>,
    pub(super) first_unit: u32,
    pub(super) by_address: Map<(u64, u64, Form), u32>,
    /// The newest unit for a physical address and form, whatever its linear address.
    pub(super) templates: Map<(u64, Form), u32>,
    pub(super) pages: Map<u64, VecDeque<u32>>,
    /// From the oldest unit's to the newest's; the first one's number is `first_link`.
    pub(super) links: VecDeque<Link>,
    pub(super) first_link: u32,
    /// Units of the last flush, freed little by little.
    pub(super) flushed: VecDeque<Unit>,
    /// Times that evicted code must grow hot again before it is translated anew, by a hash of its address. A cache that is too small for
    /// what runs would else be filled without end.
    pub(super) evicted: Box<[u8; EVICTED]>,
    pub(super) spaces: [Option<Space>; JUMP_TABLES],
    pub(super) current: usize,
    /// The one before.
    pub(super) previous: usize,
    pub(super) bindings: Bindings,
    /// Address spaces met that were not known, or no longer.
    pub(super) spaces_met: u64,
    pub(super) clock: u64,
    /// An address that translated code has just gone to, and that no code is known for.
    pub(super) cold: Option<u64>,
    /// An address whose code is wanted in a shape that nobody comes to but by a link.
    pub(super) wanted: Option<(u64, Shape)>,
    /// CR4.SMAP, as the units that there are assume it.
    pub(super) guards_user_pages: bool,
    reader: Reader,
    memory: Memory,
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
    /// Units that go on behind a jump.
    pub superblocks: u64,
    pub loops: u64,
    pub code_bytes: u64,
    pub flushes: u64,
    /// Units dropped to make room for others.
    pub evicted: u64,
    /// Units copied to another linear address, and units moved to one.
    pub copied: u64,
    pub moved: u64,
    /// The longest that making room or a flush took, in time of the thread.
    pub pause_ns_max: u64,
}

impl Statistics {
    pub(super) fn paused_since(&mut self, start: u64) {
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
            bindings: Bindings::default(),
            spaces_met: 0,
            clock: 0,
            cold: None,
            wanted: None,
            guards_user_pages: false,
            reader: Reader::default(),
            memory: Memory::default(),
            threshold,
            statistics: Statistics::default(),
            listings: Listings::default(),
            lockstep: None,
        }))
    }

    /// Puts what there is to tell into the vCPU's counters.
    pub fn report(&self, counters: &mut Counters) {
        counters.translated_units = self.statistics.units;
        counters.translated_superblocks = self.statistics.superblocks;
        counters.translated_loops = self.statistics.loops;
        counters.translated_copies = self.statistics.copied;
        counters.translated_moves = self.statistics.moved;
        counters.translated_code_bytes = self.statistics.code_bytes;
        counters.code_cache_bytes = self.cache.len() as u64;
        counters.translated_spaces = self.spaces_met;
        counters.code_cache_evicted = self.statistics.evicted;
        if let Some(lockstep) = &self.lockstep {
            counters.lockstep_units = lockstep.units;
            counters.lockstep_instructions = lockstep.instructions;
            counters.lockstep_differences = lockstep.differences;
        }
        counters.code_cache_flushes = self.statistics.flushes;
        counters.code_cache_pause_ns_max = self.statistics.pause_ns_max;
    }

    pub(super) fn unit(&self, id: u32) -> Option<&Unit> {
        self.units.get(id.wrapping_sub(self.first_unit) as usize)
    }

    pub(super) fn unit_mut(&mut self, id: u32) -> Option<&mut Unit> {
        self.units.get_mut(id.wrapping_sub(self.first_unit) as usize)
    }

    /// The unit at RIP; if need be, it is made from one of the same code at another linear address.
    pub(super) fn unit_at(&mut self, cpu: &mut Cpu, jumps: &mut Jumps, shape: Shape) -> Option<u32> {
        if !is_canonical(cpu.rip, 48) || cpu.debugger.cuts_at(cpu.rip) {
            return None;
        }
        let page_number = block_cache::code_page(cpu, cpu.rip).ok()?;
        let physical = page_number * PAGE_SIZE + cpu.rip % PAGE_SIZE;
        // The jump table depends on this page's translation from here on.
        cpu.tlb.note_way(cpu.rip);
        let form = Form::now(cpu, shape);
        let Some(&id) = self.by_address.get(&(cpu.rip, physical, form)) else {
            // In lockstep the unit that has just run is still looked at.
            return if self.lockstep.is_none() { self.adapt(cpu, jumps, physical, form) } else { None };
        };
        if let Some(second_page) = self.unit(id)?.second_page {
            let second = next_page(cpu.rip);
            if block_cache::code_page(cpu, second).ok()? != second_page {
                return None;
            }
            cpu.tlb.note_way(second);
        }
        Some(id)
    }

    pub(super) fn host_of(&self, id: u32) -> Option<u64> {
        Some(self.cache.address(self.unit(id)?.code.start as usize))
    }

    /// The guest's instruction that a host address stands for, by the last site at or before it.
    pub(super) fn guest_of(&self, host: u64) -> Option<Place> {
        let position = self.cache.position_of(host)? as u32;
        // The oldest units lie from the cache's position to its end, the newest from its start on.
        let head = self.cache.position() as u32;
        let order = |position: u32| (position < head, position);
        let index = self.units.partition_point(|unit| order(unit.code.end - 1) < order(position));
        let unit = self.units.get(index)?;
        let inside = position.checked_sub(unit.code.start)?;
        let found = unit.sites.partition_point(|site| site.at <= inside);
        let site = unit.sites.get(found.checked_sub(1)?)?;
        Some(Place {
            rip: unit.linear.wrapping_add(u64::from(site.offset)),
            x87: site.x87.checked_sub(1).and_then(|number| unit.x87.get(usize::from(number)).copied()),
            moved: site.moved,
        })
    }

    /// Translates the code at RIP, for which there is no such unit. `None`: it stays with the interpreter.
    pub(super) fn translate(&mut self, cpu: &mut Cpu, jumps: &mut Jumps, shape: Shape) -> Option<u32> {
        let before = cpu.stopwatch.turn_to(Activity::Translator);
        let unit = self.make_unit(cpu, jumps, shape);
        cpu.stopwatch.turn_to(before);
        unit
    }

    fn make_unit(&mut self, cpu: &mut Cpu, jumps: &mut Jumps, shape: Shape) -> Option<u32> {
        let linear = cpu.rip;
        let page_number = block_cache::code_page(cpu, linear).ok()?;
        if page_number == cpu.apic_page || cpu.debugger.cuts_at(linear) {
            return None;
        }
        let offset = (linear % PAGE_SIZE) as usize;
        let physical = page_number * PAGE_SIZE + offset as u64;
        let form = Form::now(cpu, shape);
        let readable = cpu.debugger.uncut(linear, PAGE_SIZE as usize - offset);
        if let Some(unit) = self.adapt(cpu, jumps, physical, form) {
            return Some(unit);
        }
        let Extent { granules, second_page } = self.reader.read(cpu, linear, page_number, readable)?;
        self.make_room(LINKS_OF_ITEM * self.reader.items.len(), jumps);
        let items = &self.reader.items;
        let position = self.cache.position();
        let first_link = self.next_link();
        let context = Context {
            model: &cpu.model,
            thunks: self.thunks,
            position,
            table: cpu.tlb.data_table(),
            enabled: cpu.vector.enabled,
            guards_user_pages: cpu.cr4 & cr4::SMAP != 0,
            listed: self.listings.wants(items),
            counts: cpu.stopwatch.is_on(),
            keeps_journal: self.lockstep.is_some(),
            shape,
            first_link: first_link as usize,
        };
        let Generated { starts, ops, x87, memory } =
            Generator::new(context, items, std::mem::take(&mut self.memory)).run().ok()?;
        if memory.asm.bytes.len() > UNIT_BYTES_MAX {
            return None;
        }
        let host = self.cache.address(position);
        self.listings.list(items, &starts, &memory.asm.bytes, host);
        let leaps = |item: &Item| item.instruction.flow_control() == FlowControl::UnconditionalBranch;
        self.statistics.loops += u64::from(shape == Shape::Steady);
        self.statistics.superblocks += u64::from(items[..items.len() - 1].iter().any(leaps));
        let unit = Unit {
            linear,
            physical,
            form,
            granules,
            second_page,
            binding: NO_BINDING,
            code: position as u32..(position + memory.asm.bytes.len()) as u32,
            first_link,
            links: memory.links.len() as u32,
            incoming: Vec::new(),
            ops: SharedOps((!ops.is_empty()).then(|| Rc::new(ops))),
            relocations: memory.asm.relocations.as_slice().into(),
            sites: memory.sites.as_slice().into(),
            x87,
            valid: true,
        };
        let id = self.add(unit, &memory.asm.bytes, &memory.links);
        self.memory = memory;
        if second_page.is_none() {
            self.templates.insert((physical, form), id);
        }
        self.statistics.units += 1;
        Some(id)
    }

    /// Adds a unit whose place was found at the cache's position.
    pub(super) fn add(&mut self, mut unit: Unit, code: &[u8], sites: &[LinkSite]) -> u32 {
        let id = self.first_unit.wrapping_add(self.units.len() as u32);
        unit.binding = self.bindings.take(unit.binding_at(unit.linear), id, self.spaces_met);
        self.listings.name(unit.linear, self.cache.address(unit.code.start as usize), code.len());
        self.cache.add(code);
        self.links.extend(sites.iter().map(|&site| Link { site, base: unit.code.start, from: id, to: NO_UNIT }));
        self.by_address.insert((unit.linear, unit.physical, unit.form), id);
        for page_number in unit.pages().into_iter().flatten() {
            self.pages.entry(page_number).or_default().push_back(id);
        }
        self.statistics.code_bytes += code.len() as u64;
        self.units.push_back(unit);
        id
    }
}

const _: () = assert!(KEYS > 0 && HOSTS > KEYS);
