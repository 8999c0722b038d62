//! What a jump out of its page relies on.
//!
//! A link to another page may be followed wherever instruction fetch leads from the linear page of its target to the physical page that the target was
//! made from. Such a pair of pages is a *binding*, and has a number. For each address space there is a byte for each binding: not zero, if
//! instruction fetch has led there in that space, and it is known that fetch does so as long as the space is the same one
//! ([`crate::tlb::Tlb::note_way`]). A link looks at the byte of its target's binding in the space in use. So a link is aimed once, however many
//! spaces share the code, and a new space has to find a page once, not each way to it.
//!
//! A binding lives as long as units have it: no link leads to a unit that was dropped, so that no link that is aimed has a number that was given anew.
//! One that no space has used for some time can be given another linear page, with its units ([`super::moves`]).

use std::collections::HashMap;
use std::hash::BuildHasherDefault;

use super::arena::{BINDINGS, JUMP_TABLES, Jumps};
use super::units::{Form, Multiply};

/// Number of no binding; verified nowhere.
pub const NO_BINDING: u32 = 0;
/// Address spaces that are met before a binding counts as unused: more than there are jump tables, so that programs that take turns keep their units.
const UNUSED_FOR: u64 = 2 * JUMP_TABLES as u64;
/// In place of a second page's number, if there is none.
const NO_PAGE: u64 = u64::MAX;

/// Pages of a unit. Its form makes it a binding of those address spaces only in which such units run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Binding {
    linear_page: u64,
    physical_page: u64,
    /// Of an instruction that lies in two.
    second_page: u64,
    form: Form,
}

impl Binding {
    pub fn new(linear_page: u64, physical_page: u64, second_page: Option<u64>, form: Form) -> Binding {
        Binding { linear_page, physical_page, second_page: second_page.unwrap_or(NO_PAGE), form }
    }

    /// The linear page's number.
    pub fn linear_page(&self) -> u64 {
        self.linear_page
    }

    /// Whether another one differs in its linear page only.
    fn is_of_same_code(&self, other: &Binding) -> bool {
        Binding { linear_page: self.linear_page, ..*other } == *self
    }
}

struct Use {
    binding: Binding,
    units: Vec<u32>,
    /// How many address spaces had been met when one last used it.
    used: u64,
}

/// The bindings of a vCPU's units.
#[derive(Default)]
pub struct Bindings {
    numbers: HashMap<Binding, u32, BuildHasherDefault<Multiply>>,
    /// That of number 1 comes first.
    uses: Vec<Use>,
    free: Vec<u32>,
    /// Those of each physical page.
    pages: HashMap<u64, Vec<u32>, BuildHasherDefault<Multiply>>,
}

impl Bindings {
    /// The number of a binding, for one more unit. [`NO_BINDING`] if all numbers are in use: links do not lead to such a unit, jump tables do.
    pub fn take(&mut self, binding: Binding, unit: u32, spaces_met: u64) -> u32 {
        if let Some(&number) = self.numbers.get(&binding) {
            self.uses[number as usize - 1].units.push(unit);
            return number;
        }
        let of_one = Use { binding, units: vec![unit], used: spaces_met };
        let number = if let Some(number) = self.free.pop() {
            self.uses[number as usize - 1] = of_one;
            number
        } else if self.uses.len() + 1 < BINDINGS {
            self.uses.push(of_one);
            self.uses.len() as u32
        } else {
            return NO_BINDING;
        };
        self.numbers.insert(binding, number);
        self.pages.entry(binding.physical_page).or_default().push(number);
        number
    }

    fn get(&mut self, number: u32) -> Option<&mut Use> {
        (number as usize).checked_sub(1).and_then(|at| self.uses.get_mut(at))
    }

    /// A unit with this binding is gone.
    pub fn give_back(&mut self, number: u32, unit: u32, jumps: &mut Jumps) {
        let Some(entry) = self.get(number) else { return };
        entry.units.retain(|&other| other != unit);
        if entry.units.is_empty() {
            let binding = entry.binding;
            self.numbers.remove(&binding);
            if let Some(on_page) = self.pages.get_mut(&binding.physical_page) {
                on_page.retain(|&other| other != number);
                if on_page.is_empty() {
                    self.pages.remove(&binding.physical_page);
                }
            }
            self.free.push(number);
            jumps.forget(number);
        }
    }

    /// Notes that an address space uses a binding.
    pub fn note_use(&mut self, number: u32, spaces_met: u64) {
        if let Some(entry) = self.get(number) {
            entry.used = spaces_met;
        }
    }

    /// Whether units have this binding.
    pub fn has(&self, binding: &Binding) -> bool {
        self.numbers.contains_key(binding)
    }

    /// The number of a binding for the same code at another linear page that no address space uses: of those, the one with the most units.
    pub fn unused(&self, binding: &Binding, spaces_met: u64, jumps: &Jumps) -> Option<u32> {
        let entry = |number: &u32| &self.uses[*number as usize - 1];
        let is_unused = |number: &&u32| {
            let Use { binding: other, used, .. } = entry(number);
            other.is_of_same_code(binding)
                && spaces_met.wrapping_sub(*used) > UNUSED_FOR
                && (0..JUMP_TABLES).all(|space| !jumps.is_verified(space, **number))
        };
        let on_page = self.pages.get(&binding.physical_page)?;
        on_page.iter().filter(is_unused).max_by_key(|number| entry(number).units.len()).copied()
    }

    /// A binding and its units.
    pub fn units(&self, number: u32) -> Option<(Binding, &[u32])> {
        let entry = self.uses.get((number as usize).checked_sub(1)?)?;
        Some((entry.binding, &entry.units))
    }

    /// Gives a binding that is not used another linear page.
    pub fn move_to(&mut self, number: u32, linear_page: u64, spaces_met: u64) {
        let Some(entry) = self.get(number) else { return };
        let old = entry.binding;
        entry.binding.linear_page = linear_page;
        entry.used = spaces_met;
        let new = entry.binding;
        self.numbers.remove(&old);
        self.numbers.insert(new, number);
    }

    /// Numbers beyond this were never given.
    pub fn last(&self) -> u32 {
        self.uses.len() as u32
    }

    /// Forgets all; so have the address spaces.
    pub fn clear(&mut self) {
        self.numbers.clear();
        self.uses.clear();
        self.free.clear();
        self.pages.clear();
    }
}
