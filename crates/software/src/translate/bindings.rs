//! What a jump out of its page relies on.
//!
//! A link to another page may be followed wherever instruction fetch leads from the linear page of its target to the physical page that the target was
//! made from. Such a pair of pages is a *binding*, and has a number. For each address space there is a byte for each binding: not zero, if
//! instruction fetch has led there in that space, and it is known that fetch does so as long as the space is the same one
//! ([`crate::tlb::Tlb::note_way`]). A link looks at the byte of its target's binding in the space in use. So a link is aimed once, however many
//! spaces share the code, and a new space has to find a page once, not each way to it.
//!
//! A binding lives as long as units have it: no link leads to a unit that was dropped, so that no link that is aimed has a number that was given anew.

use std::collections::HashMap;
use std::hash::BuildHasherDefault;

use super::arena::{BINDINGS, Jumps};
use super::units::{Form, Multiply};

/// Number of no binding; verified nowhere.
pub const NO_BINDING: u32 = 0;
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
}

struct Use {
    binding: Binding,
    units: u32,
}

/// The bindings of a vCPU's units.
#[derive(Default)]
pub struct Bindings {
    numbers: HashMap<Binding, u32, BuildHasherDefault<Multiply>>,
    /// That of number 1 comes first.
    uses: Vec<Use>,
    free: Vec<u32>,
}

impl Bindings {
    /// The number of a binding, for one more unit. [`NO_BINDING`] if all numbers are in use: links do not lead to such a unit, jump tables do.
    pub fn take(&mut self, binding: Binding) -> u32 {
        if let Some(&number) = self.numbers.get(&binding) {
            self.uses[number as usize - 1].units += 1;
            return number;
        }
        let of_one = Use { binding, units: 1 };
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
        number
    }

    /// A unit with this binding is gone.
    pub fn give_back(&mut self, number: u32, jumps: &mut Jumps) {
        let Some(entry) = (number as usize).checked_sub(1).and_then(|at| self.uses.get_mut(at)) else { return };
        entry.units -= 1;
        if entry.units == 0 {
            self.numbers.remove(&entry.binding);
            self.free.push(number);
            jumps.forget(number);
        }
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
    }
}
