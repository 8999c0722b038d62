//! Units that get another linear address.
//!
//! A program that is started again lies elsewhere, and the code of its last run is of no use to anybody. So the units of a page are moved to where the page is wanted: their numbers
//! are changed in place, and links among them stay as they are. That costs less than copies do, which would fill the code cache besides.
//!
//! Only the units of a binding that holds in no address space are moved, all of them. So no jump table, no return and no link that anybody can follow leads to one:
//! wherever any of these is followed in an address space, the binding of the unit it leads to holds there.

use polder_memory::PAGE_SIZE;

use super::Translator;
use super::arena::{FarJump, Jumps, verified_at};
use super::assembler::Relocation;
use super::bindings::{Binding, NO_BINDING};
use super::links::{LINK_NUMBERS, Link};
use super::units::NO_UNIT;

impl Translator {
    /// Moves the units of the same code that no address space uses to `binding`, which has none. `false`: there are none to move.
    pub(super) fn move_units(&mut self, binding: Binding, jumps: &mut Jumps) -> bool {
        if self.bindings.has(&binding) {
            return false;
        }
        let Some(number) = self.bindings.unused(&binding, self.spaces_met, jumps) else { return false };
        let Some((old, units)) = self.bindings.units(number) else { return false };
        let units = units.to_vec();
        if !units.iter().all(|&id| self.has_wide_numbers(id)) {
            return false;
        }
        let delta = binding.linear_page().wrapping_sub(old.linear_page()).wrapping_mul(PAGE_SIZE);
        for &id in &units {
            self.move_unit(id, number, delta, jumps);
        }
        self.bindings.move_to(number, binding.linear_page(), self.spaces_met);
        self.statistics.moved += units.len() as u64;
        true
    }

    /// Whether all guest addresses in a unit's code have 64 bits: any other fits there too.
    fn has_wide_numbers(&self, id: u32) -> bool {
        let is_short = |relocation| matches!(relocation, Relocation::LinearLow | Relocation::LinearSigned);
        self.unit(id).is_some_and(|unit| !unit.relocations.iter().any(|&(_, relocation)| is_short(relocation)))
    }

    /// Moves a unit of the binding with that number, all of whose units are moved.
    fn move_unit(&mut self, id: u32, number: u32, delta: u64, jumps: &mut Jumps) {
        let Some(unit) = self.unit_mut(id) else { return };
        let linear = unit.linear;
        unit.linear = linear.wrapping_add(delta);
        for site in &mut unit.x87 {
            site.rip = site.rip.wrapping_add(delta);
        }
        let (new, physical, form) = (unit.linear, unit.physical, unit.form);
        let (code, first_link, links) = (unit.code.clone(), unit.first_link, unit.links);
        let relocations = unit.relocations.clone();
        let mut incoming = std::mem::take(&mut unit.incoming);
        let known = self.by_address.remove(&(linear, physical, form));
        debug_assert_eq!(known, Some(id));
        self.by_address.insert((new, physical, form), id);
        for &(at, _) in relocations.iter().filter(|(_, relocation)| *relocation == Relocation::Linear) {
            self.cache.add_to(code.start as usize + at as usize, delta);
        }
        for link in (0..links).map(|link| (first_link + link) % LINK_NUMBERS) {
            let Some(entry) = self.link_mut(link) else { continue };
            entry.site.target = entry.site.target.wrapping_add(delta);
            let Link { site, to, .. } = *entry;
            if to != NO_UNIT && !(site.binding_at.is_none() && self.has_binding(to, number)) {
                if let Some(unit) = self.unit_mut(to) {
                    unit.incoming.retain(|&other| other != link);
                }
                self.unaim(link);
            }
        }
        incoming.retain(|&link| {
            let Some(&Link { site, from, to, .. }) = self.link(link) else { return false };
            if to != id {
                return false;
            }
            let stays = site.binding_at.is_none() && self.has_binding(from, number);
            if !stays {
                self.unaim(link);
            }
            stays
        });
        if let Some(unit) = self.unit_mut(id) {
            unit.incoming = incoming;
        }
        let far = jumps.far(linear);
        if far.linear == linear {
            *far = FarJump::NONE;
        }
        self.listings.name(new, self.cache.address(code.start as usize), code.len());
    }

    fn has_binding(&self, id: u32, number: u32) -> bool {
        self.unit(id).is_some_and(|unit| unit.binding == number)
    }

    /// Makes a link lead nowhere.
    fn unaim(&mut self, link: u32) {
        let Some(entry) = self.link_mut(link) else { return };
        entry.to = NO_UNIT;
        let Link { site, base, .. } = *entry;
        if let Some(at) = site.binding_at {
            self.cache.patch(base as usize + at, verified_at(NO_BINDING));
        }
        self.cache.aim(base as usize + site.jump_at, base as usize + site.stub);
    }
}
