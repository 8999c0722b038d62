//! Loops whose accesses keep their pages from round to round.
//!
//! A loop that goes through memory in small steps would look the same page up in every round. Accesses of the innermost loop at a unit's start
//! whose addresses move by the same small number in each round, or not at all, form *steady groups*. What a look-up of theirs has found stays in
//! the frame for all rounds; a register that moves gets a *limit*, up to which all its groups stay in their pages. A round then begins with one comparison for each such register and no look-up.
//!
//! This is a *shape* of the unit of its own ([`Shape::Steady`]): the other one runs the first round, and its jump back leads here. At the start all groups are looked up in the tables, and
//! nothing is done if one is missing, if its stretch lies in two pages, or if a register is about to overflow: then the shared shape runs another round and with that fills the tables, or faults. So look-ups
//! ahead of their time change nothing that the guest can see. What an access may do is what its round would do in any case: only accesses that each round makes decide what is looked up. Nothing in
//! such a loop changes translations, and whoever wants the vCPU to forget one asks for attention, after which a unit is entered at its start.
//!
//! Limits are compared as signed numbers: neither canonical addresses nor what counts towards one comes near the overflow, which is looked for all the same.

use iced_x86::{FlowControl, Register};
use polder_memory::PAGE_SIZE;

use super::assembler::{Binary, Label, Mem, condition};
use super::cold::Cold;
use super::frame::{limit_slot, note_slot, stretch_slot};
use super::generate::{Generator, LinkSite, Shape, Use};
use super::groups::{SLOTS, Share};
use super::guest_code::{Item, general_register, target_inside};
use super::registers::{ADDEND, ADDRESS, SPARE};
use super::values::{Access, Address, Key, Numbers, RBP, RSP, Reached, Value, Values};

/// Limits of a loop.
pub const LIMITS: usize = 4;
/// The longest stretch of a steady group, and the longest step.
const STRETCH_MAX: i64 = 512;
const STEP_MAX: u64 = 256;
/// More than a register moves in a page and a round.
const MARGIN: i32 = 8192;

/// A loop at the start of some items.
#[derive(Debug)]
pub struct Loop {
    /// The last of its items.
    pub last: usize,
    pub groups: Vec<Steady>,
    pub limits: Vec<Limit>,
    /// (item, access, share)
    pub shares: Vec<(usize, Access, Share)>,
    uses_vectors: bool,
}

/// A steady group; its slot is its number.
#[derive(Debug)]
pub struct Steady {
    key: Key,
    /// Of registers at a round's start.
    address: Address,
    usage: Use,
    /// What the stretch adds to the key's values.
    start: i64,
    end: i64,
    /// The limit of the register that moves it, and that register's left shift.
    limit: Option<(usize, u8)>,
}

/// How far a register may go.
#[derive(Debug, PartialEq, Eq)]
pub struct Limit {
    pub register: u8,
    /// It grows.
    pub is_up: bool,
}

/// An access of the loop.
struct Noted {
    item: usize,
    reached: Reached,
    address: Address,
    moving: Option<Moving>,
    /// Each round makes it.
    is_certain: bool,
}

/// What moves an access from round to round.
#[derive(Clone, Copy)]
struct Moving {
    /// The register that the access names, and what it is beyond the one that it comes from at the round's start.
    named: u8,
    beyond: i64,
    origin: u8,
    shift: u8,
    is_up: bool,
}

impl Loop {
    /// The loop at the start of some items, if it has steady groups.
    pub fn find(items: &[Item]) -> Option<Loop> {
        let last = (0..items.len()).rev().find(|&index| target_inside(items, index) == Some(0))?;
        // Nobody comes into the loop but at its head: neither an inner loop nor what is behind it.
        let leads_in =
            |index: usize| target_inside(items, index).is_some_and(|target| target != 0 && target <= index.min(last));
        if (0..items.len()).any(leads_in) {
            return None;
        }
        let items = &items[..=last];
        let is_plain = |item: &Item| {
            let goes_on = matches!(
                item.instruction.flow_control(),
                FlowControl::Next | FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch
            );
            goes_on && item.facts.keeps_translations
        };
        if items[0].live_before != 0 || !items.iter().all(is_plain) {
            return None;
        }
        let uses_vectors = items.iter().any(|item| item.facts.uses_vectors);
        let mut found = Loop { last, groups: Vec::new(), limits: Vec::new(), shares: Vec::new(), uses_vectors };
        let noted = note_accesses(items);
        for noted in noted.iter().filter(|noted| noted.is_certain) {
            found.open(noted);
        }
        for noted in &noted {
            found.share(noted);
        }
        (!found.groups.is_empty()).then_some(found)
    }

    /// Whether the vector registers are surely loaded at an item.
    pub fn has_vectors(&self, item: usize) -> bool {
        self.uses_vectors && item <= self.last
    }

    /// Makes room for an access that each round makes, in a group or a new one.
    fn open(&mut self, noted: &Noted) {
        let Reached { key, offset, bytes, usage, .. } = noted.reached;
        let end = offset.saturating_add(i64::from(bytes));
        let longest = if key.page.is_some() { PAGE_SIZE as i64 } else { STRETCH_MAX };
        let fits = |group: &&mut Steady| {
            group.key == key && group.end.max(end).saturating_sub(group.start.min(offset)) <= longest
        };
        if let Some(group) = self.groups.iter_mut().find(fits) {
            (group.start, group.end) = (group.start.min(offset), group.end.max(end));
            if usage == Use::Write {
                group.usage = Use::Write;
            }
            return;
        }
        if self.groups.len() == SLOTS {
            return;
        }
        let mut limit = None;
        if let Some(Moving { origin, shift, is_up, .. }) = noted.moving {
            let wanted = Limit { register: origin, is_up };
            let number = self.limits.iter().position(|known| *known == wanted).unwrap_or(self.limits.len());
            if number == LIMITS {
                return;
            }
            if number == self.limits.len() {
                self.limits.push(wanted);
            }
            limit = Some((number, shift));
        }
        self.groups.push(Steady { key, address: noted.address, usage, start: offset, end, limit });
    }

    /// Lets an access share a group's look-up that reaches it.
    fn share(&mut self, noted: &Noted) {
        let Reached { access, key, offset, bytes, usage } = noted.reached;
        let reaches = |group: &Steady| {
            let allows = usage == Use::Read || group.usage == Use::Write;
            group.key == key && allows && offset >= group.start && offset + i64::from(bytes) <= group.end
        };
        let Some(group) = self.groups.iter().position(reaches) else { return };
        let mut from_slot = offset - self.groups[group].start;
        if let Some(moving) = noted.moving {
            from_slot = from_slot.wrapping_sub(moving.beyond.wrapping_shl(moving.shift.into()));
        }
        let Ok(offset) = i32::try_from(from_slot) else { return };
        let varying = noted.moving.map(|moving| (moving.named, moving.shift));
        self.shares.push((noted.item, access, Share { group, is_head: false, offset, varying }));
    }
}

/// An access before it is known how registers move.
struct Seen {
    item: usize,
    reached: Reached,
    /// The registers that it names, base and index, and their values there.
    names: [Option<(u8, Value)>; 2],
    is_certain: bool,
}

/// What each register is beyond its value at the round's start, where the next one begins.
type Steps = [Option<i64>; 16];

/// The accesses of a loop that stay near from round to round.
fn note_accesses(items: &[Item]) -> Vec<Noted> {
    let mut numbers = Numbers::default();
    let first = Values::unknown(&mut numbers);
    let mut values = first;
    let mut steps: Option<Steps> = None;
    let mut from_above: Vec<(usize, Values)> = Vec::new();
    let mut seen: Vec<Seen> = Vec::new();
    for (index, item) in items.iter().enumerate() {
        while let Some(place) = from_above.iter().position(|(target, _)| *target == index) {
            values.meet(&from_above.swap_remove(place).1, &mut numbers);
        }
        let is_certain = from_above.is_empty() && steps.is_none();
        let instruction = &item.instruction;
        for reached in values.accesses(instruction, &item.facts).into_iter().flatten() {
            let named = |register: Register| general_register(register).map(|(number, _)| number);
            let names = match reached.access {
                Access::Operand => [named(instruction.memory_base()), named(instruction.memory_index())],
                Access::Push | Access::Pop => [Some(RSP as u8), None],
                Access::Frame => [Some(RBP as u8), None],
            };
            let names = names.map(|name| name.map(|name| (name, values.at(name.into()))));
            seen.push(Seen { item: index, reached, names, is_certain });
        }
        values.follow(instruction, &item.facts, &mut numbers);
        match target_inside(items, index) {
            Some(0) => {
                let here: Steps = std::array::from_fn(|register| {
                    let (before, now) = (first.at(register), values.at(register));
                    (before.number == now.number).then_some(now.offset)
                });
                let both = |known: Steps| {
                    std::array::from_fn(|register| known[register].filter(|_| known[register] == here[register]))
                };
                steps = Some(steps.map_or(here, both));
            }
            Some(target) => from_above.push((target, values)),
            None => {}
        }
    }
    let steps = steps.unwrap_or([None; 16]);
    seen.iter().filter_map(|seen| seen.noted(items, &first, &steps)).collect()
}

impl Seen {
    /// The access, if it stays near.
    fn noted(&self, items: &[Item], first: &Values, steps: &Steps) -> Option<Noted> {
        let Seen { item, reached, names, is_certain } = *self;
        let is_overwritten = |name: u8| items[item].facts.written >> name & 1 != 0;
        let address = reached.key.address(first)?;
        let mut moving = None;
        let origins = [address.base.map(|base| (base, 0)), address.index];
        for (name, origin) in names.into_iter().zip(origins) {
            let (Some((named, value)), Some((origin, shift))) = (name, origin) else { continue };
            let step = steps[usize::from(origin)]?;
            if step == 0 {
                continue;
            }
            let is_small = step.unsigned_abs() << shift <= STEP_MAX;
            // A store's address is asked for again behind it.
            let is_lost = reached.usage == Use::Write && (is_overwritten(named) || reached.access == Access::Push);
            if moving.is_some() || !is_small || is_lost {
                return None;
            }
            moving = Some(Moving { named, beyond: value.offset, origin, shift, is_up: step > 0 });
        }
        i32::try_from(reached.offset).ok()?;
        Some(Noted { item, reached, address, moving, is_certain })
    }
}

impl Generator<'_> {
    /// Looks up all steady groups of the loop at the unit's start, or goes to the shared shape.
    pub fn fill_steady(&mut self, steady: &Loop, entry: Label) {
        let fail = self.asm.label();
        if steady.uses_vectors {
            self.need_vectors(false);
        }
        self.asm.bind(entry);
        for limit in &steady.limits {
            let register = self.register(limit.register, ADDRESS);
            self.asm.mov(ADDRESS, register);
            self.asm.binary_imm(Binary::Add, ADDRESS, if limit.is_up { MARGIN } else { -MARGIN });
            self.asm.jump_if(condition::OVERFLOW, fail);
        }
        let mut has_limit = [false; LIMITS];
        for (slot, group) in steady.groups.iter().enumerate() {
            let bytes = (group.end - group.start) as u32;
            self.key_address(&group.address, group.start as i32);
            self.probe(bytes, group.usage, fail);
            if group.usage == Use::Write {
                self.asm.load(SPARE, self.entry_note());
                self.asm.store(note_slot(slot), SPARE);
            }
            self.asm.load(ADDEND, self.entry_addend());
            self.asm.lea(ADDEND, Mem::indexed(ADDRESS, ADDEND, 0, 0));
            let Some((limit, shift)) = group.limit else {
                self.asm.store(stretch_slot(slot), ADDEND);
                continue;
            };
            let Limit { register, is_up } = steady.limits[limit];
            let register = self.register(register, SPARE);
            self.asm.mov(SPARE, register);
            self.asm.shift_left(SPARE, shift);
            self.asm.binary(Binary::Sub, ADDEND, SPARE);
            self.asm.store(stretch_slot(slot), ADDEND);
            // What is left of the page, in steps of the register.
            if is_up {
                self.asm.lea(ADDRESS, Mem::base(ADDRESS, bytes as i32 - 1));
                self.asm.not(ADDRESS);
            }
            self.asm.binary32_imm(Binary::And, ADDRESS, PAGE_SIZE as i32 - 1);
            self.asm.shift_right(ADDRESS, shift);
            if !is_up {
                self.asm.negate(ADDRESS);
            }
            let register = self.register(steady.limits[limit].register, SPARE);
            self.asm.lea(ADDRESS, Mem::indexed(ADDRESS, register, 0, 0));
            if std::mem::replace(&mut has_limit[limit], true) {
                self.asm.load(SPARE, limit_slot(limit));
                self.asm.binary(Binary::Cmp, SPARE, ADDRESS);
                self.asm.move_if(if is_up { condition::LESS } else { condition::GREATER }, ADDRESS, SPARE);
            }
            self.asm.store(limit_slot(limit), ADDRESS);
        }
        let first = self.first_ip();
        let way = self.asm.label();
        let link = self.new_link(way, LinkSite::new(first, Shape::Shared));
        self.cold.push(Cold::Jump { entry: fail, to: way, link });
    }

    /// From the end of a round to the next one's start.
    pub fn next_steady_round(&mut self, steady: &Loop, entry: Label, body: Label) {
        for (slot, limit) in steady.limits.iter().enumerate() {
            let register = self.register(limit.register, SPARE);
            self.asm.binary_mem(Binary::Cmp, register, limit_slot(slot));
            let (beyond, within) = if limit.is_up {
                (condition::GREATER, condition::LESS_OR_EQUAL)
            } else {
                (condition::LESS, condition::GREATER_OR_EQUAL)
            };
            if slot + 1 == steady.limits.len() {
                self.asm.jump_if(within, body);
                self.asm.jump(entry);
                return;
            }
            self.asm.jump_if(beyond, entry);
        }
        self.asm.jump(body);
    }
}

#[cfg(test)]
mod tests;
