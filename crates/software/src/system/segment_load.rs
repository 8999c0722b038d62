//! Loading and storing segment registers: MOV, POP, PUSH, LDS and its kin (SDM vol. 3, 5.6 and 5.8).

use polder_machine::state::SegmentState;

use super::descriptor::is_null;
use crate::cpu::{CS, CodeSize, Cpu, SS};
use crate::fault::{Fault, vector};
use crate::op::{Flow, Op};
use crate::page_walk::Access;

impl Cpu {
    /// Loads ES, SS, DS, FS or GS with all checks.
    pub(crate) fn load_segment(&mut self, segment: u8, selector: u16) -> Result<(), Fault> {
        if self.mode.protected {
            let state = self.checked_segment(segment, selector, vector::GENERAL_PROTECTION)?;
            self.segments[usize::from(segment)] = state;
        } else if self.mode.virtual_8086 {
            self.load_8086_segment(segment, selector);
        } else {
            // Limit and attributes stay: what protected mode left there is "big real mode".
            let state = &mut self.segments[usize::from(segment)];
            state.selector = selector;
            state.base = u64::from(selector) << 4;
        }
        if segment == SS {
            self.update_mode();
        }
        Ok(())
    }

    /// A segment register in virtual-8086 mode.
    pub(crate) fn load_8086_segment(&mut self, segment: u8, selector: u16) {
        self.segments[usize::from(segment)] =
            SegmentState { selector, base: u64::from(selector) << 4, limit: 0xffff, attributes: 0xf3 };
    }

    /// What a data or stack segment register becomes in protected mode. `wrong` is the exception for a bad selector: #GP, or #TS in
    /// a task switch.
    pub(crate) fn checked_segment(&mut self, segment: u8, selector: u16, wrong: u8) -> Result<SegmentState, Fault> {
        let cpl = self.cpl();
        let rpl = (selector & 3) as u8;
        if is_null(selector) {
            if segment != SS {
                return Ok(SegmentState { selector, base: 0, limit: 0, attributes: 0 });
            }
            if !self.is_64_bit() || cpl == 3 || rpl != cpl {
                return Err(self.raise_selector(wrong, 0, 0));
            }
            return Ok(SegmentState { selector, base: 0, limit: 0, attributes: u16::from(cpl) << 5 });
        }
        let mut descriptor = self.descriptor(selector, wrong, 0)?;
        let dpl = descriptor.dpl();
        let allowed = if segment == SS {
            rpl == cpl && dpl == cpl && descriptor.is_writable_data()
        } else {
            descriptor.is_readable() && (descriptor.is_conforming() || rpl <= dpl && cpl <= dpl)
        };
        if !allowed {
            return Err(self.raise_selector(wrong, selector, 0));
        }
        if !descriptor.is_present() {
            let absent = if segment == SS { vector::STACK } else { vector::SEGMENT_NOT_PRESENT };
            return Err(self.raise_selector(absent, selector, 0));
        }
        self.mark_accessed(&mut descriptor)?;
        Ok(descriptor.segment(selector))
    }

    /// After MOV SS and POP SS: interrupts and debug traps stay out for one instruction.
    fn shadow_stack_load(&mut self, op: &Op) -> Flow {
        self.interrupt_shadow = true;
        self.stack_shadow = true;
        self.leave(op)
    }

    /// Whether a segment load may go on inside the block: it changed nothing that the block depends on.
    fn after_segment_load(&mut self, op: &Op, segment: u8) -> Flow {
        if segment == SS { self.shadow_stack_load(op) } else { Flow::Next }
    }

    /// MOV Sreg, r/m16. `first`: segment register; `extra`: 1 for memory, else `second` is the register.
    pub(crate) fn op_mov_to_segment(&mut self, op: &Op) -> Result<Flow, Fault> {
        if op.first == CS || op.first > crate::cpu::GS {
            return Err(self.raise_ud());
        }
        let selector = self.operand_u16(op)?;
        self.load_segment(op.first, selector)?;
        Ok(self.after_segment_load(op, op.first))
    }

    /// MOV r/m16, Sreg. `first`: segment register.
    pub(crate) fn op_mov_from_segment(&mut self, op: &Op) -> Result<Flow, Fault> {
        let Some(segment) = self.segments.get(usize::from(op.first)) else { return Err(self.raise_ud()) };
        let selector = segment.selector;
        self.store_operand_or_register(op, u64::from(selector), 2)?;
        Ok(Flow::Next)
    }

    /// PUSH Sreg. `first`: segment register; `extra2`: operand size.
    pub(crate) fn op_push_segment(&mut self, op: &Op) -> Result<Flow, Fault> {
        let selector = self.segments[usize::from(op.first) % 6].selector;
        let mut stack = self.current_stack();
        if op.extra2 == 4 {
            // Only the low half of the slot is written (SDM vol. 2, PUSH).
            let slot = stack.reserve(4);
            self.store_on_stack(&stack, slot, u64::from(selector), 2)?;
        } else {
            self.push(&mut stack, u64::from(selector), u64::from(op.extra2))?;
        }
        self.set_stack_pointer(stack.pointer);
        Ok(Flow::Next)
    }

    /// POP Sreg. `first`: segment register; `extra2`: operand size.
    pub(crate) fn op_pop_segment(&mut self, op: &Op) -> Result<Flow, Fault> {
        let mut stack = self.current_stack();
        let slot = stack;
        let selector = self.load_from_stack(&slot, 2)? as u16;
        stack.skip(u64::from(op.extra2));
        let old_size = self.mode.stack;
        self.load_segment(op.first, selector)?;
        let new_size = std::mem::replace(&mut self.mode.stack, old_size);
        self.set_stack_pointer(stack.pointer);
        self.mode.stack = new_size;
        Ok(self.after_segment_load(op, op.first))
    }

    /// LDS, LES, LSS, LFS, LGS. `first`: destination register; `second`: segment register; `extra2`: operand size.
    pub(crate) fn op_load_far_pointer(&mut self, op: &Op) -> Result<Flow, Fault> {
        let bytes = u64::from(op.extra2);
        let linear = self.linear(op, bytes + 2, Access::Read)?;
        let offset = self.load_sized(linear, bytes, op.segment)?;
        let at = self.wrap_linear(linear.wrapping_add(bytes));
        let selector = self.load::<u16>(at, op.segment)?;
        self.load_segment(op.second, selector)?;
        self.set_register(op.first, offset, bytes);
        Ok(self.after_segment_load(op, op.second))
    }

    /// Adds in linear addresses wrap at 4 GiB outside 64-bit code.
    pub(crate) fn wrap_linear(&self, linear: u64) -> u64 {
        if self.mode.code == CodeSize::Bits64 { linear } else { linear & 0xffff_ffff }
    }
}
