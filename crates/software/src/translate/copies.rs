//! Units at other linear addresses.

use polder_memory::PAGE_SIZE;

use super::Translator;
use super::arena::{Jumps, verified_at};
use super::assembler::Relocation;
use super::bindings::NO_BINDING;
use super::links::LINK_NUMBERS;
use super::units::{Form, Unit};
use crate::cpu::Cpu;
use crate::stopwatch::Activity;

impl Translator {
    /// A unit for RIP and its physical address from one of the same code at another linear address; `None` if there is no such.
    pub(super) fn adapt(&mut self, cpu: &mut Cpu, jumps: &mut Jumps, physical: u64, form: Form) -> Option<u32> {
        let linear = cpu.rip;
        let template = *self.templates.get(&(physical, form))?;
        let rest = (PAGE_SIZE - linear % PAGE_SIZE) as usize;
        // Only whole units that nobody wants to see made.
        let is_whole = cpu.debugger.uncut(linear, rest) == rest && !self.listings.address_is_near(linear);
        if !is_whole || physical / PAGE_SIZE == cpu.apic_page {
            return None;
        }
        let binding = self.unit(template)?.binding_at(linear);
        let before = cpu.stopwatch.turn_to(Activity::Translator);
        // What moves has code anywhere in the page.
        let page = linear & !(PAGE_SIZE - 1);
        let is_uncut =
            !cpu.debugger.cuts_at(page) && cpu.debugger.uncut(page, PAGE_SIZE as usize) == PAGE_SIZE as usize;
        let has_moved = is_uncut && self.move_units(binding, jumps);
        let moved = has_moved.then(|| self.by_address.get(&(linear, physical, form)).copied()).flatten();
        let unit = moved.or_else(|| self.copy_unit(template, linear, jumps));
        cpu.stopwatch.turn_to(before);
        unit
    }

    /// The same code at another linear address: that of another program, most often. `None` if its numbers do not fit.
    fn copy_unit(&mut self, template: u32, linear: u64, jumps: &mut Jumps) -> Option<u32> {
        let links = self.unit(template)?.links;
        self.make_room(links as usize, jumps);
        let unit = self.unit(template).filter(|unit| unit.valid)?;
        let delta = linear.wrapping_sub(unit.linear);
        let position = self.cache.position();
        let first_link = self.next_link();
        let mut code = self.cache.bytes(unit.code.start as usize..unit.code.end as usize).to_vec();
        let mut sites = Vec::with_capacity(links as usize);
        for number in 0..links {
            let mut site = self.link((unit.first_link + number) % LINK_NUMBERS)?.site;
            put(&mut code, site.jump_at, (site.stub as i64 - (site.jump_at as i64 + 4)) as i32)?;
            if let Some(at) = site.binding_at {
                put(&mut code, at, verified_at(NO_BINDING))?;
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
        let mut x87 = unit.x87.clone();
        for site in &mut x87 {
            site.rip = site.rip.wrapping_add(delta);
        }
        let copy = Unit {
            linear,
            physical: unit.physical,
            form: unit.form,
            granules: unit.granules,
            second_page: None,
            binding: NO_BINDING,
            code: position as u32..(position + code.len()) as u32,
            first_link,
            links,
            incoming: Vec::new(),
            ops: unit.ops.clone(),
            relocations: unit.relocations.clone(),
            sites: unit.sites.clone(),
            x87,
            valid: true,
        };
        let code_of = (copy.physical, copy.form);
        let id = self.add(copy, &code, &sites);
        // The oldest units are evicted first.
        self.templates.insert(code_of, id);
        self.statistics.copied += 1;
        Some(id)
    }
}

/// Puts a 32-bit number into code.
fn put(code: &mut [u8], at: usize, value: i32) -> Option<()> {
    code.get_mut(at..at + 4)?.copy_from_slice(&value.to_le_bytes());
    Some(())
}
