//! IRET in all its forms (SDM vol. 2, IRET; vol. 3, 6.12 and 21.3).

use super::descriptor::{Descriptor, is_null, kind};
use super::task_switch::Reason;
use crate::cpu::{CS, CodeSize, Cpu, DS, ES, FS, GS, RSP, SS, is_canonical};
use crate::fault::{Fault, vector};
use crate::flags;
use crate::op::{Flow, Op};

/// Flags that every IRET may change.
const ALWAYS: u64 = flags::ARITHMETIC | flags::TF | flags::DF | flags::NT;

impl Cpu {
    /// IRET, IRETD, IRETQ. `extra2`: operand size.
    pub(crate) fn op_interrupt_return(&mut self, op: &Op) -> Result<Flow, Fault> {
        let bytes = u64::from(op.extra2);
        let return_ip = self.following_ip(op);
        if !self.mode.protected {
            if self.mode.virtual_8086 && self.iopl() < 3 {
                return Err(self.raise_gp(0));
            }
            self.return_real(bytes)?;
        } else if self.system_flags & flags::NT != 0 {
            if self.mode.long {
                return Err(self.raise_gp(0));
            }
            self.return_from_task(return_ip)?;
        } else {
            self.return_protected(bytes)?;
        }
        self.nmi_blocked = false;
        self.resume_set = self.system_flags & flags::RF != 0;
        // RF matters only while breakpoints are enabled; without it the next instruction need not run by itself.
        if self.debug[5] & 0xff == 0 {
            self.system_flags &= !flags::RF;
        }
        Ok(Flow::Leave)
    }

    fn return_real(&mut self, bytes: u64) -> Result<(), Fault> {
        let mut stack = self.current_stack();
        let ip = self.pop(&mut stack, bytes)?;
        let selector = self.pop(&mut stack, bytes)? as u16;
        let image = self.pop(&mut stack, bytes)?;
        if ip > u64::from(self.segments[usize::from(CS)].limit) {
            return Err(self.raise_gp(0));
        }
        let mut mask = ALWAYS | flags::IF;
        if !self.mode.virtual_8086 {
            mask |= flags::IOPL;
        }
        if bytes == 4 {
            mask |= flags::RF | flags::AC | flags::ID;
        }
        self.set_stack_pointer(stack.pointer);
        self.set_real_code_segment(selector);
        self.rip = ip;
        self.merge_flags(image, mask);
        Ok(())
    }

    /// Takes the flags in `mask` from `image`.
    pub(crate) fn merge_flags(&mut self, image: u64, mask: u64) {
        let merged = self.rflags() & !mask | image & mask;
        self.set_rflags(merged);
    }

    /// The flags that an IRET with this operand size may change at the current privilege.
    fn return_mask(&self, bytes: u64) -> u64 {
        let mut mask = ALWAYS;
        if self.cpl() <= self.iopl() {
            mask |= flags::IF;
        }
        if self.cpl() == 0 {
            mask |= flags::IOPL;
        }
        if bytes >= 4 {
            mask |= flags::RF | flags::AC | flags::ID;
            if self.cpl() == 0 {
                mask |= flags::VIF | flags::VIP;
            }
        }
        mask
    }

    fn return_from_task(&mut self, return_ip: u64) -> Result<(), Fault> {
        let selector = self.load_implicit::<u16>(self.tr.base)?;
        if selector & 4 != 0 {
            return Err(self.raise_selector(vector::INVALID_TSS, selector, 0));
        }
        let tss = self.descriptor(selector, vector::INVALID_TSS, 0)?;
        if !matches!(tss.kind(), kind::TSS_16_BUSY | kind::TSS_32_BUSY) {
            return Err(self.raise_selector(vector::INVALID_TSS, selector, 0));
        }
        if !tss.is_present() {
            return Err(self.raise_selector(vector::SEGMENT_NOT_PRESENT, selector, 0));
        }
        self.switch_task(tss, Reason::Return, return_ip, 0)
    }

    fn return_protected(&mut self, bytes: u64) -> Result<(), Fault> {
        let mut stack = self.current_stack();
        let ip = self.pop(&mut stack, bytes)?;
        let selector = self.pop(&mut stack, bytes)? as u16;
        let image = self.pop(&mut stack, bytes)?;
        if bytes == 4 && image & flags::VM != 0 && self.cpl() == 0 && !self.mode.long {
            return self.return_to_8086(stack, ip, selector, image);
        }
        let mut code = self.return_code_segment(selector)?;
        let outer = (selector & 3) as u8 > self.cpl();
        let mask = self.return_mask(bytes);
        if outer || self.is_64_bit() {
            let pointer = self.pop(&mut stack, bytes)?;
            let stack_selector = self.pop(&mut stack, bytes)? as u16;
            let stack_segment = self.return_stack_segment(stack_selector, &code, (selector & 3) as u8)?;
            self.check_code_target(&code, ip)?;
            self.mark_accessed(&mut code)?;
            self.commit_return(&code, selector, ip);
            self.segments[usize::from(SS)] = stack_segment;
            self.update_mode();
            // IRETQ restores all of RSP; narrower ones what the new stack's size takes.
            match self.mode.stack {
                CodeSize::Bits64 => self.gpr[RSP] = pointer,
                _ => self.set_stack_pointer(pointer),
            }
            if outer {
                self.drop_inner_segments();
            }
        } else {
            self.check_code_target(&code, ip)?;
            self.mark_accessed(&mut code)?;
            self.set_stack_pointer(stack.pointer);
            self.commit_return(&code, selector, ip);
        }
        self.merge_flags(image, mask);
        Ok(())
    }

    fn commit_return(&mut self, code: &Descriptor, selector: u16, ip: u64) {
        self.segments[usize::from(CS)] = code.segment(selector);
        self.rip = ip;
    }

    fn return_to_8086(
        &mut self,
        mut stack: super::stack::Stack,
        ip: u64,
        selector: u16,
        image: u64,
    ) -> Result<(), Fault> {
        let pointer = self.pop(&mut stack, 4)?;
        let mut selectors = [0; 5];
        for value in &mut selectors {
            *value = self.pop(&mut stack, 4)? as u16;
        }
        if ip > 0xffff {
            return Err(self.raise_gp(0));
        }
        self.rip = ip;
        self.load_8086_segment(CS, selector);
        for (segment, value) in [SS, ES, DS, FS, GS].into_iter().zip(selectors) {
            self.load_8086_segment(segment, value);
        }
        self.gpr[RSP] = pointer;
        self.set_rflags(image);
        Ok(())
    }

    /// Reads and checks the code segment that a far RET or IRET returns to.
    pub(crate) fn return_code_segment(&mut self, selector: u16) -> Result<Descriptor, Fault> {
        if is_null(selector) {
            return Err(self.raise_gp(0));
        }
        let code = self.descriptor(selector, vector::GENERAL_PROTECTION, 0)?;
        let rpl = (selector & 3) as u8;
        let level_fits = if code.is_conforming() { code.dpl() <= rpl } else { code.dpl() == rpl };
        let size_fits = !(self.mode.long && code.is_long() && code.is_big());
        if !code.is_code() || rpl < self.cpl() || !level_fits || !size_fits {
            return Err(self.raise_selector(vector::GENERAL_PROTECTION, selector, 0));
        }
        if !code.is_present() {
            return Err(self.raise_selector(vector::SEGMENT_NOT_PRESENT, selector, 0));
        }
        Ok(code)
    }

    /// Checks the stack segment that goes with `code` at privilege `rpl`.
    pub(crate) fn return_stack_segment(
        &mut self,
        selector: u16,
        code: &Descriptor,
        rpl: u8,
    ) -> Result<polder_machine::state::SegmentState, Fault> {
        if is_null(selector) {
            let allowed = self.mode.long && code.is_long() && rpl != 3 && (selector & 3) as u8 == rpl;
            if !allowed {
                return Err(self.raise_gp(0));
            }
            return Ok(polder_machine::state::SegmentState {
                selector,
                base: 0,
                limit: 0,
                attributes: u16::from(rpl) << 5,
            });
        }
        let mut descriptor = self.descriptor(selector, vector::GENERAL_PROTECTION, 0)?;
        if (selector & 3) as u8 != rpl || !descriptor.is_writable_data() || descriptor.dpl() != rpl {
            return Err(self.raise_selector(vector::GENERAL_PROTECTION, selector, 0));
        }
        if !descriptor.is_present() {
            return Err(self.raise_selector(vector::STACK, selector, 0));
        }
        self.mark_accessed(&mut descriptor)?;
        Ok(descriptor.segment(selector))
    }

    /// Whether an instruction pointer lies in a code segment.
    pub(crate) fn check_code_target(&mut self, code: &Descriptor, ip: u64) -> Result<(), Fault> {
        let inside = if self.mode.long && code.is_long() {
            is_canonical(ip, self.linear_bits())
        } else {
            ip <= u64::from(code.limit())
        };
        if inside { Ok(()) } else { Err(self.raise_gp(0)) }
    }

    /// After a return to an outer level: data segments that the level may not use become null.
    pub(crate) fn drop_inner_segments(&mut self) {
        let cpl = u16::from(self.cpl());
        for segment in [ES, DS, FS, GS] {
            let state = &mut self.segments[usize::from(segment)];
            let dpl = state.attributes >> 5 & 3;
            let is_conforming = state.attributes & 0x1c == 0x1c;
            if !is_conforming && dpl < cpl {
                // The base stays as it is where 64-bit code uses it without a selector.
                let base = if segment >= FS { state.base } else { 0 };
                *state = polder_machine::state::SegmentState { selector: 0, base, limit: 0, attributes: 0 };
            }
        }
    }
}
