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
//! Known numbers come from numbering values ([`super::values`]); jumps backwards begin everything anew. Accesses in a loop whose pages outlast the rounds have groups of another kind ([`super::steady`]),
//! which have no head.

use polder_memory::PAGE_SIZE;

use super::generate::Use;
use super::guest_code::{Item, target_inside};
use super::steady::Loop;
use super::values::{Access, Key, Numbers, Reached, Values};

/// Slots of the frame for groups.
pub const SLOTS: usize = 16;
/// The longest stretch of a group: one is often enough not in two pages.
const STRETCH_MAX: i64 = 256;

/// An access in its group.
#[derive(Debug, Clone, Copy)]
pub struct Share {
    pub group: usize,
    pub is_head: bool,
    /// Bytes from what the group's slot has.
    pub offset: i32,
    /// A general-purpose register to add, and its left shift.
    pub varying: Option<(u8, u8)>,
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
    /// Finds the groups of a unit. `steady`: the loop at its start, if that has steady groups.
    pub fn make(&mut self, items: &[Item], steady: Option<&Loop>) {
        self.clear();
        self.shares.resize(items.len(), [None; 2]);
        if let Some(steady) = steady {
            self.groups.extend((0..steady.groups.len()).map(|slot| Group { slot, lead: 0, len: 0, is_ready: true }));
            for &(item, access, share) in &steady.shares {
                self.shares[item][place(access)] = Some(share);
            }
        }
        let Work { drafts, members, targets, open, numbers } = std::mem::take(&mut self.work);
        let mut numbers_given = Numbers::default();
        let values = Values::unknown(&mut numbers_given);
        let mut planner = Planner {
            items,
            shares: &self.shares,
            state: State { values, open },
            numbers: numbers_given,
            drafts,
            members,
            targets,
        };
        planner.run();
        let Planner { state, drafts, members, targets, .. } = planner;
        self.work = Work { drafts, members, targets, open: state.open, numbers };
        self.finish();
    }

    /// Nothing is shared.
    pub fn clear(&mut self) {
        self.shares.clear();
        self.groups.clear();
    }

    /// Gives slots to the groups with more than one access.
    fn finish(&mut self) {
        let Work { drafts, members, targets, open, numbers } = &mut self.work;
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
            let offset = (member.offset - drafts[member.group].start) as i32;
            let share = Share { group, is_head: member.is_head, offset, varying: None };
            self.shares[member.item][place(member.access)] = Some(share);
        }
        drafts.clear();
        members.clear();
        targets.clear();
        open.clear();
        numbers.clear();
    }

    /// How an access of an item is shared, if it is.
    pub fn share(&self, item: usize, access: Access) -> Option<Share> {
        self.shares.get(item)?[place(access)]
    }
}

/// Which of an item's shares is an access's.
fn place(access: Access) -> usize {
    usize::from(access != Access::Operand)
}

#[derive(Clone)]
struct State {
    values: Values,
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
    /// Those that are not for the plan to find.
    shares: &'a [[Option<Share>; 2]],
    state: State,
    numbers: Numbers,
    drafts: Vec<Draft>,
    members: Vec<Member>,
    targets: Vec<Option<usize>>,
}

impl Planner<'_> {
    fn run(&mut self) {
        let mut targets = std::mem::take(&mut self.targets);
        targets.extend((0..self.items.len()).map(|index| target_inside(self.items, index)));
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
            for reached in self.state.values.accesses(instruction, facts).into_iter().flatten() {
                if self.shares[index][place(reached.access)].is_none() {
                    self.note(index, reached);
                }
            }
            self.state.values.follow(instruction, facts, &mut self.numbers);
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

    /// Nothing is known about any register.
    fn begin_anew(&mut self) {
        self.state.values = Values::unknown(&mut self.numbers);
        self.state.open.clear();
    }

    /// Keeps what another way to the same place knows as well.
    fn meet(&mut self, other: &State) {
        self.state.values.meet(&other.values, &mut self.numbers);
        self.state.open.retain(|entry| other.open.contains(entry));
    }

    /// Puts an access into a group that is open, or opens one.
    fn note(&mut self, item: usize, reached: Reached) {
        let Reached { access, key, offset, bytes, usage } = reached;
        let end = offset.saturating_add(i64::from(bytes));
        let open = self.state.open.iter().find(|(open, _)| *open == key).map(|&(_, group)| group);
        if let Some(group) = open {
            let draft = &mut self.drafts[group];
            let (start, end) = (draft.start.min(offset), draft.end.max(end));
            let allows = usage == Use::Read || draft.usage == Use::Write;
            let longest = if key.page.is_some() { PAGE_SIZE as i64 } else { STRETCH_MAX };
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
}

/// Takes what belongs to an item out of a list.
fn take(list: &mut Vec<(usize, State)>, item: usize) -> Option<State> {
    let place = list.iter().position(|(other, _)| *other == item)?;
    Some(list.swap_remove(place).1)
}

#[cfg(test)]
mod tests;
