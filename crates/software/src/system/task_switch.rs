//! Hardware task switches (SDM vol. 3, chapter 8), between 16- and 32-bit task-state segments.
//!
//! Up to the point where the new task's registers are in, nothing has changed but memory; from there on faults belong to the new
//! task and are delivered before its first instruction (`Cpu::late_fault`).

use polder_machine::state::SegmentState;

use super::descriptor::{Descriptor, is_32_bit_tss, is_null, kind};
use crate::cpu::{CS, Cpu, DS, ES, FS, GS, SS, cr0};
use crate::fault::{Fault, vector};
use crate::flags;
use crate::page_walk::{Access, Privilege};

/// What caused a task switch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reason {
    Jump,
    /// CALL, an interrupt or an exception: the tasks nest.
    Call,
    /// IRET from a nested task.
    Return,
}

/// What a task-state segment holds of a task.
#[derive(Default)]
struct Image {
    cr3: u32,
    ip: u32,
    flags: u32,
    gpr: [u32; 8],
    /// ES CS SS DS FS GS.
    segments: [u16; 6],
    ldt: u16,
    trap: bool,
}

impl Cpu {
    /// Switches to the task of an available (for [`Reason::Return`]: busy) TSS. `return_ip` is where the old task goes on.
    pub(crate) fn switch_task(
        &mut self,
        tss: Descriptor,
        reason: Reason,
        return_ip: u64,
        external: u32,
    ) -> Result<(), Fault> {
        let wide = tss.kind() & 8 != 0;
        let limit_min = if wide { 0x67 } else { 0x2b };
        if tss.limit() < limit_min {
            return Err(self.raise_selector(vector::INVALID_TSS, tss.selector, external));
        }
        let old_wide = is_32_bit_tss(self.tr.attributes);
        let old_base = self.tr.base;
        // Everything that can fault is read or probed before anything is written.
        for offset in [0, if old_wide { 0x5f } else { 0x29 }] {
            self.check_access(old_base.wrapping_add(offset), 1, Access::Write, DS, Privilege::Implicit)?;
        }
        let image = self.load_task(tss.base(), wide)?;
        if reason == Reason::Call {
            self.check_access(tss.base(), 2, Access::Write, DS, Privilege::Implicit)?;
        }
        let mut old_flags = self.rflags();
        if reason == Reason::Return {
            old_flags &= !flags::NT;
        }
        self.save_task(old_base, old_wide, return_ip, old_flags)?;
        if reason != Reason::Call {
            self.set_busy(self.tr.selector, false)?;
        }
        if reason == Reason::Call {
            self.store_implicit::<u16>(tss.base(), self.tr.selector)?;
        }
        if reason != Reason::Return {
            self.set_busy(tss.selector, true)?;
        }
        let mut new_flags = u64::from(image.flags);
        if reason == Reason::Call {
            new_flags |= flags::NT;
        }
        self.tr = tss.segment(tss.selector);
        self.tr.attributes |= 2;
        self.cr0 |= cr0::TS;
        if wide && self.cr0 & cr0::PG != 0 {
            self.enter_address_space(u64::from(image.cr3));
        }
        self.commit_task(&image, new_flags);
        if image.trap {
            self.pending_debug |= super::debug::DR6_BT;
        }
        if self.load_task_segments(&image).is_err() {
            self.late_fault = true;
        }
        self.update_mode();
        Ok(())
    }

    fn load_task(&mut self, base: u64, wide: bool) -> Result<Image, Fault> {
        let mut image = Image::default();
        let at = |offset: u64| base.wrapping_add(offset);
        if wide {
            image.cr3 = self.load_implicit(at(0x1c))?;
            image.ip = self.load_implicit(at(0x20))?;
            image.flags = self.load_implicit(at(0x24))?;
            for (index, register) in (0..).zip(&mut image.gpr) {
                *register = self.load_implicit(at(0x28 + 4 * index))?;
            }
            for (index, selector) in (0..).zip(&mut image.segments) {
                *selector = self.load_implicit(at(0x48 + 4 * index))?;
            }
            image.ldt = self.load_implicit(at(0x60))?;
            image.trap = self.load_implicit::<u16>(at(0x64))? & 1 != 0;
        } else {
            image.ip = u32::from(self.load_implicit::<u16>(at(0x0e))?);
            image.flags = u32::from(self.load_implicit::<u16>(at(0x10))?);
            for (index, register) in (0..).zip(&mut image.gpr) {
                *register = 0xffff_0000 | u32::from(self.load_implicit::<u16>(at(0x12 + 2 * index))?);
            }
            for (index, selector) in (0..4).zip(&mut image.segments) {
                *selector = self.load_implicit(at(0x22 + 2 * index))?;
            }
            image.ldt = self.load_implicit(at(0x2a))?;
        }
        Ok(image)
    }

    fn save_task(&mut self, base: u64, wide: bool, ip: u64, rflags: u64) -> Result<(), Fault> {
        let at = |offset: u64| base.wrapping_add(offset);
        if wide {
            self.store_implicit(at(0x20), ip as u32)?;
            self.store_implicit(at(0x24), rflags as u32)?;
            for index in 0..8 {
                self.store_implicit(at(0x28 + 4 * index), self.gpr[index as usize] as u32)?;
            }
            for index in 0..6 {
                self.store_implicit(at(0x48 + 4 * index), self.segments[index as usize].selector)?;
            }
        } else {
            self.store_implicit(at(0x0e), ip as u16)?;
            self.store_implicit(at(0x10), rflags as u16)?;
            for index in 0..8 {
                self.store_implicit(at(0x12 + 2 * index), self.gpr[index as usize] as u16)?;
            }
            for index in 0..4 {
                self.store_implicit(at(0x22 + 2 * index), self.segments[index as usize].selector)?;
            }
        }
        Ok(())
    }

    /// Sets or clears the busy flag of a TSS descriptor.
    pub(crate) fn set_busy(&mut self, selector: u16, busy: bool) -> Result<(), Fault> {
        let Some(address) = self.descriptor_address(selector, 8) else { return Ok(()) };
        let at = address.wrapping_add(5);
        let access = self.load_implicit::<u8>(at)?;
        self.store_implicit(at, if busy { access | 2 } else { access & !2 })
    }

    /// Puts the new task's registers in place; segment registers get their selectors only.
    fn commit_task(&mut self, image: &Image, new_flags: u64) {
        for (register, value) in self.gpr.iter_mut().zip(image.gpr) {
            *register = u64::from(value);
        }
        self.rip = u64::from(image.ip);
        self.set_rflags(new_flags);
        let in_8086 = new_flags & flags::VM != 0;
        let cpl = if in_8086 { 3 } else { image.segments[usize::from(CS)] & 3 };
        for (segment, selector) in self.segments.iter_mut().zip(image.segments) {
            *segment = SegmentState { selector, base: 0, limit: 0, attributes: 0 };
        }
        self.segments[usize::from(SS)].attributes = cpl << 5;
        self.ldtr = SegmentState { selector: image.ldt, base: 0, limit: 0, attributes: 0 };
        self.update_mode();
    }

    /// Loads the new task's LDTR and segment registers; what is wrong with them raises #TS, #NP or #SS in the new task.
    fn load_task_segments(&mut self, image: &Image) -> Result<(), Fault> {
        self.load_task_ldt(image.ldt)?;
        if self.mode.virtual_8086 {
            for segment in [ES, CS, SS, DS, FS, GS] {
                self.load_8086_segment(segment, image.segments[usize::from(segment)]);
            }
            return self.check_task_ip();
        }
        let code_selector = image.segments[usize::from(CS)];
        if is_null(code_selector) {
            return Err(self.raise_selector(vector::INVALID_TSS, code_selector, 0));
        }
        let mut code = self.descriptor(code_selector, vector::INVALID_TSS, 0)?;
        let rpl = (code_selector & 3) as u8;
        let wrong_level = if code.is_conforming() { code.dpl() > rpl } else { code.dpl() != rpl };
        if !code.is_code() || wrong_level {
            return Err(self.raise_selector(vector::INVALID_TSS, code_selector, 0));
        }
        if !code.is_present() {
            return Err(self.raise_selector(vector::SEGMENT_NOT_PRESENT, code_selector, 0));
        }
        self.mark_accessed(&mut code)?;
        self.segments[usize::from(CS)] = code.segment(code_selector);
        self.update_mode();
        for segment in [SS, DS, ES, FS, GS] {
            let loaded = self.checked_segment(segment, image.segments[usize::from(segment)], vector::INVALID_TSS)?;
            self.segments[usize::from(segment)] = loaded;
        }
        self.update_mode();
        self.check_task_ip()
    }

    fn check_task_ip(&mut self) -> Result<(), Fault> {
        if self.rip > u64::from(self.segments[usize::from(CS)].limit) {
            return Err(self.raise_gp(0));
        }
        Ok(())
    }

    fn load_task_ldt(&mut self, selector: u16) -> Result<(), Fault> {
        if is_null(selector) {
            return Ok(());
        }
        if selector & 4 != 0 {
            return Err(self.raise_selector(vector::INVALID_TSS, selector, 0));
        }
        let descriptor = self.descriptor(selector, vector::INVALID_TSS, 0)?;
        if descriptor.kind() != kind::LDT || !descriptor.is_present() {
            return Err(self.raise_selector(vector::INVALID_TSS, selector, 0));
        }
        self.ldtr = descriptor.segment(selector);
        Ok(())
    }
}
