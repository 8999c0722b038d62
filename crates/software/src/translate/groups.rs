//! Accesses of a unit that share a look-up.
//!
//! Code touches several fields of an object, or of its stack frame, between two changes of the register that leads there. Accesses whose addresses
//! differ by a known number form a *group*. The first, its head, looks up the whole stretch that they lie in and keeps the stretch's host address
//! in a slot of the frame, and for stores the address of the page's note; the others go to the host address without a look-up. A page
//! that a head may read or write may be read or written by all of its group, so that they fault where they would alone. What the guest could do to
//! end a translation between two accesses (the interpreter's handlers do it) ends all groups.
//!
//! A stretch that lies in two pages has no one host address. The head then goes on in the *plain* form of the unit from its instruction on, where nothing is shared.
//!
//! Known numbers come from numbering values: a register holds a numbered value plus a constant, and keeps the value's number through moves and
//! additions of constants. Where ways through the unit meet, only what is the same on all of them counts; jumps backwards begin everything anew.

use iced_x86::{FlowControl, Instruction, Mnemonic, OpKind, Register};

use super::facts::Facts;
use super::forms::has_wide_address;
use super::generate::Use;
use super::guest_code::{Item, branch_target, general_register, item_at};

/// Slots of the frame for groups.
pub const SLOTS: usize = 16;
/// The longest stretch of a group: one is often enough not in two pages.
const STRETCH_MAX: i64 = 256;
const PAGE: i64 = 4096;
const RSP: usize = 4;
const RBP: usize = 5;

/// Which access of an instruction is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Its memory operand.
    Operand,
    /// What it pushes, below RSP.
    Push,
    /// What it pops, at RSP.
    Pop,
    /// What LEAVE pops, at RBP.
    Frame,
}

/// An access in its group.
#[derive(Debug, Clone, Copy)]
pub struct Share {
    pub group: usize,
    pub is_head: bool,
    /// Bytes from the start of the group's stretch.
    pub offset: u32,
}

#[derive(Debug, Clone, Copy)]
pub struct Group {
    pub slot: usize,
    /// Bytes from the head's address to the start of the stretch; not positive.
    pub lead: i32,
    pub len: u32,
    /// The head is emitted; before that, or if it is not, the others look up for themselves.
    pub is_ready: bool,
}

/// The groups of a unit.
#[derive(Debug, Default)]
pub struct Plan {
    /// For each item, its operand's access and that of the stack.
    shares: Vec<[Option<Share>; 2]>,
    pub groups: Vec<Group>,
    work: Work,
}

/// What planning needs memory for; kept from unit to unit.
#[derive(Debug, Default)]
struct Work {
    drafts: Vec<Draft>,
    members: Vec<Member>,
    /// The item that each item's jump leads to.
    targets: Vec<Option<usize>>,
    open: Vec<(Key, usize)>,
    /// The group that each draft became.
    numbers: Vec<Option<usize>>,
}

impl Plan {
    /// Finds the groups of a unit.
    pub fn make(&mut self, items: &[Item]) {
        self.clear();
        let Work { drafts, members, targets, open, numbers } = std::mem::take(&mut self.work);
        let blank = Value { number: 0, offset: 0 };
        let mut planner =
            Planner { items, state: State { values: [blank; 16], open }, values: 0, drafts, members, targets };
        planner.run();
        let Planner { state, drafts, members, targets, .. } = planner;
        self.work = Work { drafts, members, targets, open: state.open, numbers };
        self.finish(items.len());
    }

    /// Nothing is shared.
    pub fn clear(&mut self) {
        self.shares.clear();
        self.groups.clear();
    }

    /// Gives slots to the groups with more than one access.
    fn finish(&mut self, items: usize) {
        let Work { drafts, members, targets, open, numbers } = &mut self.work;
        self.shares.resize(items, [None; 2]);
        for draft in drafts.iter() {
            let is_shared = draft.members > 1 && self.groups.len() < SLOTS;
            numbers.push(is_shared.then_some(self.groups.len()));
            if is_shared {
                self.groups.push(Group {
                    slot: self.groups.len(),
                    lead: (draft.start - draft.head) as i32,
                    len: (draft.end - draft.start) as u32,
                    is_ready: false,
                });
            }
        }
        for member in members.iter() {
            let Some(group) = numbers[member.group] else { continue };
            let offset = (member.offset - drafts[member.group].start) as u32;
            let place = usize::from(member.access != Access::Operand);
            self.shares[member.item][place] = Some(Share { group, is_head: member.is_head, offset });
        }
        drafts.clear();
        members.clear();
        targets.clear();
        open.clear();
        numbers.clear();
    }

    /// How an access of an item is shared, if it is.
    pub fn share(&self, item: usize, access: Access) -> Option<Share> {
        self.shares.get(item)?[usize::from(access != Access::Operand)]
    }
}

/// A value that is not known, plus a constant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Value {
    number: u32,
    offset: i64,
}

/// Accesses with equal keys are at addresses that differ by a known number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Key {
    segment: Register,
    base: Option<u32>,
    /// Value and scale.
    index: Option<(u32, u32)>,
    /// Of an address that is known, the page.
    page: Option<u64>,
}

#[derive(Clone)]
struct State {
    values: [Value; 16],
    /// Groups that an access may join here.
    open: Vec<(Key, usize)>,
}

/// A group in the making; offsets are the key's.
#[derive(Debug)]
struct Draft {
    usage: Use,
    head: i64,
    start: i64,
    end: i64,
    members: u32,
}

#[derive(Debug)]
struct Member {
    item: usize,
    access: Access,
    group: usize,
    offset: i64,
    is_head: bool,
}

struct Planner<'a> {
    items: &'a [Item],
    state: State,
    values: u32,
    drafts: Vec<Draft>,
    members: Vec<Member>,
    targets: Vec<Option<usize>>,
}

impl Planner<'_> {
    fn run(&mut self) {
        let target_of = |index: usize| {
            let target = branch_target(&self.items[index].instruction);
            target.and_then(|target| item_at(self.items, target))
        };
        let mut targets = std::mem::take(&mut self.targets);
        targets.extend((0..self.items.len()).map(target_of));
        // What is known on jumps to items that are still to come.
        let mut from_above: Vec<(usize, State)> = Vec::new();
        self.begin_anew();
        for index in 0..self.items.len() {
            if targets[index..].contains(&Some(index)) {
                // A loop's head.
                self.begin_anew();
            } else if let Some(other) = take(&mut from_above, index) {
                self.meet(&other);
            }
            let Item { instruction, facts, .. } = &self.items[index];
            if !facts.keeps_translations {
                self.state.open.clear();
            }
            self.note_accesses(index, instruction, facts);
            self.follow(instruction, facts);
            if let Some(target) = targets[index].filter(|&target| target > index) {
                let state = match take(&mut from_above, target) {
                    None => self.state.clone(),
                    Some(other) => {
                        let here = self.state.clone();
                        self.meet(&other);
                        std::mem::replace(&mut self.state, here)
                    }
                };
                from_above.push((target, state));
            }
        }
        self.targets = targets;
    }

    fn new_value(&mut self) -> Value {
        self.values += 1;
        Value { number: self.values, offset: 0 }
    }

    /// Nothing is known about any register.
    fn begin_anew(&mut self) {
        for register in 0..16 {
            self.state.values[register] = self.new_value();
        }
        self.state.open.clear();
    }

    /// Keeps what another way to the same place knows as well.
    fn meet(&mut self, other: &State) {
        for register in 0..16 {
            if self.state.values[register] != other.values[register] {
                self.state.values[register] = self.new_value();
            }
        }
        self.state.open.retain(|entry| other.open.contains(entry));
    }

    fn value(&self, register: Register) -> Option<Value> {
        let (number, _) = general_register(register)?;
        Some(self.state.values[usize::from(number)])
    }

    fn note_accesses(&mut self, index: usize, instruction: &Instruction, facts: &Facts) {
        if !facts.is_x87
            && let Some((usage, bytes)) = facts.memory
            && let Some((key, offset)) = self.address(instruction, bytes)
        {
            self.note(index, Access::Operand, key, offset, bytes, usage);
        }
        let at = |register: usize, offset: i64, state: &State| {
            let value = state.values[register];
            let key = Key { segment: Register::None, base: Some(value.number), index: None, page: None };
            (key, value.offset.wrapping_add(offset))
        };
        let (access, usage, (key, offset)) = match stack_access(instruction) {
            Some(Access::Push) => (Access::Push, Use::Write, at(RSP, -8, &self.state)),
            Some(Access::Pop) => (Access::Pop, Use::Read, at(RSP, 0, &self.state)),
            Some(Access::Frame) => (Access::Frame, Use::Read, at(RBP, 0, &self.state)),
            _ => return,
        };
        self.note(index, access, key, offset, 8, usage);
    }

    /// The key of a memory operand and what it adds to the key's values.
    fn address(&self, instruction: &Instruction, bytes: u32) -> Option<(Key, i64)> {
        if !has_wide_address(instruction) {
            return None;
        }
        let segment = match instruction.memory_segment() {
            segment @ (Register::FS | Register::GS) => segment,
            _ => Register::None,
        };
        let displacement = instruction.memory_displacement64();
        let known = instruction.memory_base() == Register::RIP || instruction.memory_base() == Register::None;
        if known && instruction.memory_index() == Register::None {
            let offset = displacement as i64;
            if segment != Register::None {
                return Some((Key { segment, base: None, index: None, page: None }, offset));
            }
            let in_page = offset & (PAGE - 1);
            let key = Key { segment, base: None, index: None, page: Some(displacement >> 12) };
            return (in_page + i64::from(bytes) <= PAGE).then_some((key, in_page));
        }
        let mut offset = displacement as i64;
        let mut base = None;
        if instruction.memory_base() != Register::None {
            let value = self.value(instruction.memory_base())?;
            offset = offset.wrapping_add(value.offset);
            base = Some(value.number);
        }
        let mut index = None;
        if instruction.memory_index() != Register::None {
            let value = self.value(instruction.memory_index())?;
            let scale = instruction.memory_index_scale();
            offset = offset.wrapping_add(value.offset.wrapping_mul(i64::from(scale)));
            index = Some((value.number, scale));
        }
        Some((Key { segment, base, index, page: None }, offset))
    }

    /// Puts an access into a group that is open, or opens one.
    fn note(&mut self, item: usize, access: Access, key: Key, offset: i64, bytes: u32, usage: Use) {
        let end = offset.saturating_add(i64::from(bytes));
        let open = self.state.open.iter().find(|(open, _)| *open == key).map(|&(_, group)| group);
        if let Some(group) = open {
            let draft = &mut self.drafts[group];
            let (start, end) = (draft.start.min(offset), draft.end.max(end));
            let allows = usage == Use::Read || draft.usage == Use::Write;
            let longest = if key.page.is_some() { PAGE } else { STRETCH_MAX };
            if allows && end.saturating_sub(start) <= longest {
                (draft.start, draft.end) = (start, end);
                draft.members += 1;
                self.members.push(Member { item, access, group, offset, is_head: false });
                return;
            }
            self.state.open.retain(|(open, _)| *open != key);
        }
        let group = self.drafts.len();
        self.drafts.push(Draft { usage, head: offset, start: offset, end, members: 1 });
        self.members.push(Member { item, access, group, offset, is_head: true });
        self.state.open.push((key, group));
    }

    /// What an instruction does to registers.
    fn follow(&mut self, instruction: &Instruction, facts: &Facts) {
        let moved = |value: Value, by: i64| Value { offset: value.offset.wrapping_add(by), ..value };
        match stack_access(instruction) {
            Some(Access::Push) => {
                self.state.values[RSP] = moved(self.state.values[RSP], -8);
                return;
            }
            Some(Access::Pop) if instruction.flow_control() == FlowControl::Next => {
                self.state.values[RSP] = moved(self.state.values[RSP], 8);
                let fresh = self.new_value();
                if let Some((number, _)) = general_register(instruction.op0_register()) {
                    self.state.values[usize::from(number)] = fresh;
                }
                return;
            }
            Some(Access::Frame) => {
                self.state.values[RSP] = moved(self.state.values[RBP], 8);
                self.state.values[RBP] = self.new_value();
                return;
            }
            _ => {}
        }
        if let Some((to, value)) = self.sum(instruction) {
            self.state.values[to] = value;
            return;
        }
        for register in (0..16).filter(|register| facts.written >> register & 1 != 0) {
            self.state.values[register] = self.new_value();
        }
    }

    /// The register that an instruction sets to another one, or itself, plus a constant.
    fn sum(&self, instruction: &Instruction) -> Option<(usize, Value)> {
        let is_wide = |operand: u32| {
            instruction.op_kind(operand) == OpKind::Register && instruction.op_register(operand).is_gpr64()
        };
        if instruction.op_count() == 0 || !is_wide(0) {
            return None;
        }
        let (to, _) = general_register(instruction.op0_register())?;
        let old = self.state.values[usize::from(to)];
        let constant = || (instruction.op1_kind() != OpKind::Register).then(|| instruction.try_immediate(1).ok());
        let (value, by) = match instruction.mnemonic() {
            Mnemonic::Mov if is_wide(1) => (self.value(instruction.op1_register())?, 0),
            Mnemonic::Add => (old, constant()?? as i64),
            Mnemonic::Sub => (old, (constant()?? as i64).wrapping_neg()),
            Mnemonic::Inc => (old, 1),
            Mnemonic::Dec => (old, -1),
            Mnemonic::Lea if instruction.memory_base().is_gpr64() && instruction.memory_index() == Register::None => {
                (self.value(instruction.memory_base())?, instruction.memory_displacement64() as i64)
            }
            _ => return None,
        };
        Some((usize::from(to), Value { offset: value.offset.wrapping_add(by), ..value }))
    }
}

/// Takes what belongs to an item out of a list.
fn take(list: &mut Vec<(usize, State)>, item: usize) -> Option<State> {
    let place = list.iter().position(|(other, _)| *other == item)?;
    Some(list.swap_remove(place).1)
}

/// The access to the stack of an instruction that the generator has a form for.
fn stack_access(instruction: &Instruction) -> Option<Access> {
    use iced_x86::Code;
    match instruction.code() {
        Code::Push_r64 | Code::Push_rm64 | Code::Pushq_imm8 | Code::Pushq_imm32 => Some(Access::Push),
        Code::Call_rel32_64 | Code::Call_rm64 => Some(Access::Push),
        Code::Pop_r64 => Some(Access::Pop),
        Code::Pop_rm64 if instruction.op0_kind() == OpKind::Register => Some(Access::Pop),
        Code::Retnq | Code::Retnq_imm16 => Some(Access::Pop),
        Code::Leaveq => Some(Access::Frame),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
