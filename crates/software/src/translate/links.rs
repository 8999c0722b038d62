//! Links: ways out of units to known addresses.
//!
//! A link is a jump that leads into cold code until it is taken for the first time, and is aimed at the other unit then. Links are numbered in the order in
//! which their units were made, so that those of the oldest unit are the first to go.

use polder_memory::PAGE_SIZE;

use super::Translator;
use super::arena::verified_at;
use super::bindings::NO_BINDING;
use super::generate::{LinkSite, Shape};
use super::units::NO_UNIT;

/// Links of a vCPU.
pub const LINKS_MAX: usize = 4 << 20;
/// Of one instruction: two look-ups that lie in two pages, where it goes, and where a call comes back to.
pub const LINKS_OF_ITEM: usize = 4;
/// Links are numbered round these; the exits that are no links' are beyond.
pub const LINK_NUMBERS: u32 = 1 << 31;

/// A way out of a unit.
#[derive(Clone, Copy)]
pub struct Link {
    pub(super) site: LinkSite,
    /// Place of the unit's code.
    pub(super) base: u32,
    pub(super) from: u32,
    pub(super) to: u32,
}

impl Translator {
    pub(super) fn link(&self, number: u32) -> Option<&Link> {
        self.links.get((number.wrapping_sub(self.first_link) % LINK_NUMBERS) as usize)
    }

    pub(super) fn link_mut(&mut self, number: u32) -> Option<&mut Link> {
        self.links.get_mut((number.wrapping_sub(self.first_link) % LINK_NUMBERS) as usize)
    }

    /// Where a link leads, and to what shape of the code there.
    pub(super) fn link_target(&self, link: u32) -> Option<(u64, Shape)> {
        self.link(link).map(|link| (link.site.target, link.site.shape))
    }

    /// Aims a link at a unit; one that leads to another unit already, only if `anew`.
    pub(super) fn aim(&mut self, link: u32, to: u32, anew: bool) {
        let Some(unit) = self.unit(to) else { return };
        let (target, form, page, binding) =
            (unit.code.start as usize, unit.form, unit.physical / PAGE_SIZE, unit.binding);
        let has_one_page = unit.second_page.is_none();
        let Some(&Link { site, base, from, to: before }) = self.link(link) else { return };
        if before == to || before != NO_UNIT && !anew {
            return;
        }
        let Some(source) = self.unit(from) else { return };
        let may_lead_there = match site.binding_at {
            Some(_) => binding != NO_BINDING,
            // The page was mapped anew while its old code ran on; another space may have it as it was.
            None => has_one_page && source.physical / PAGE_SIZE == page,
        };
        if !may_lead_there || !source.form.is_of_space(form) {
            return;
        }
        if let Some(unit) = self.unit_mut(before) {
            unit.incoming.retain(|&number| number != link);
        }
        if let Some(entry) = self.link_mut(link) {
            entry.to = to;
        }
        if let Some(unit) = self.unit_mut(to) {
            unit.incoming.push(link);
        }
        if let Some(at) = site.binding_at {
            self.cache.patch(base as usize + at, verified_at(binding));
        }
        self.cache.aim(base as usize + site.jump_at, target);
    }

    /// The number of the next link.
    pub(super) fn next_link(&self) -> u32 {
        (self.first_link + self.links.len() as u32) % LINK_NUMBERS
    }
}
