//! Address spaces, as translated code knows them, and where jumps lead in each.

use super::Translator;
use super::arena::{BINDINGS, FarJump, JUMP_TABLES, JUMPS, Jumps, NoReturn};
use super::generate::Shape;
use crate::cpu::Cpu;

/// What an address space is to translated code: instruction fetch leads to the same bytes, data through the same table, and the same instructions
/// are enabled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpaceKey {
    pub fetch_tag: u64,
    pub table: usize,
    /// As in [`super::units::Form`].
    pub enabled: u8,
}

#[derive(Debug, Clone, Copy)]
pub struct Space {
    pub key: SpaceKey,
    pub used: u64,
}

impl Translator {
    /// Chooses the jump table for the processor's address space; gives its first index.
    pub(super) fn select_space(&mut self, cpu: &mut Cpu, jumps: &mut Jumps) -> u32 {
        let key = SpaceKey { fetch_tag: cpu.tlb.fetch_tag, table: cpu.tlb.data_table(), enabled: cpu.vector.enabled };
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
        }
        cpu.frame.space = (self.current * BINDINGS) as u32;
        cpu.frame.returns = (self.current * JUMPS) as u32;
        cpu.frame.returns
    }

    fn new_space(&mut self, key: SpaceKey, jumps: &mut Jumps) -> usize {
        let used = |slot: &usize| self.spaces[*slot].map_or(0, |space| space.used);
        let slot = (1..JUMP_TABLES).min_by_key(used).unwrap_or(1);
        if self.spaces[slot].is_some() {
            jumps.clear(slot, self.bindings.last());
        }
        if self.spaces_met == 0 {
            jumps.set_no_return(self.no_return());
        }
        self.spaces_met += 1;
        self.spaces[slot] = Some(Space { key, used: self.clock });
        slot
    }

    /// What an empty entry of returns has: an address that is not canonical, and that a guest does not come upon.
    fn no_return(&self) -> NoReturn {
        let linear = crate::time::host_tsc().wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 2 | 1 << 63;
        NoReturn { linear, host: self.cache.address(self.thunks.no_return) }
    }

    /// Finds the unit at RIP in the address space in use; remembers it in the jump table. The answer is the place of its code.
    pub(super) fn find(&mut self, cpu: &mut Cpu, jumps: &mut Jumps) -> Option<u32> {
        let linear = cpu.rip;
        let id = self.unit_at(cpu, jumps, Shape::Shared)?;
        let host = self.host_of(id)?;
        let binding = self.unit(id)?.binding;
        // That may have changed what the address space is to instruction fetch.
        self.select_space(cpu, jumps);
        if self.current != 0 {
            *jumps.far(linear) = FarJump { linear, host, binding };
            jumps.verify(self.current, binding);
            self.bindings.note_use(binding, self.spaces_met);
            jumps.put(self.current * JUMPS + jump_index(linear), linear, host);
        }
        Some(id)
    }

    /// The address of code for a linear address in the address space in use, if a jump table knows it.
    #[inline]
    pub(super) fn known(&self, linear: u64, jumps: &mut Jumps) -> Option<u64> {
        if self.current == 0 {
            return None;
        }
        let at = self.current * JUMPS + jump_index(linear);
        if jumps.keys[at] == linear {
            return Some(jumps.hosts[at]);
        }
        let far = *jumps.far(linear);
        if far.linear != linear || !jumps.is_verified(self.current, far.binding) {
            return None;
        }
        jumps.put(at, linear, far.host);
        Some(far.host)
    }
}

pub fn jump_index(linear: u64) -> usize {
    linear as usize & (JUMPS - 1)
}
