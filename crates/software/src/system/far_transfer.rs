//! Far jumps, calls and returns, through call gates and into tasks (SDM vol. 3, 5.8 and chapter 8).

use super::descriptor::{Descriptor, is_null, kind};
use super::operand::MEMORY;
use super::task_switch::Reason;
use crate::cpu::{CS, CodeSize, Cpu, RSP, SS, is_canonical};
use crate::fault::{Fault, vector};
use crate::op::{Flow, Op};
use crate::page_walk::Access;

/// A transfer's target as the instruction gives it.
struct Target {
    selector: u16,
    offset: u64,
    /// Operand size.
    bytes: u64,
    /// Where a call returns to.
    return_ip: u64,
}

impl Cpu {
    /// The target of a far JMP or CALL: in memory, or the offset in `immediate` with the selector above it at bit 32.
    fn far_target(&mut self, op: &Op) -> Result<Target, Fault> {
        let bytes = u64::from(op.extra2);
        let return_ip = self.following_ip(op);
        if op.extra != MEMORY {
            let offset = op.immediate & 0xffff_ffff;
            return Ok(Target { selector: (op.immediate >> 32) as u16, offset, bytes, return_ip });
        }
        let linear = self.linear(op, bytes + 2, Access::Read)?;
        let offset = self.load_sized(linear, bytes, op.segment)?;
        let at = self.wrap_linear(linear.wrapping_add(bytes));
        let selector = self.load::<u16>(at, op.segment)?;
        Ok(Target { selector, offset, bytes, return_ip })
    }

    /// JMP ptr16:n, JMP m16:n.
    pub(crate) fn op_far_jump(&mut self, op: &Op) -> Result<Flow, Fault> {
        let target = self.far_target(op)?;
        if !self.mode.protected {
            self.check_real_target(target.offset)?;
            self.set_real_code_segment(target.selector);
            self.rip = target.offset;
            return Ok(Flow::Leave);
        }
        let descriptor = self.far_descriptor(target.selector)?;
        if descriptor.kind() & 0x10 != 0 {
            let mut code = descriptor;
            self.check_direct_code(&code)?;
            self.check_code_target(&code, target.offset)?;
            self.mark_accessed(&mut code)?;
            self.enter_code_segment(&code, target.offset);
            return Ok(Flow::Leave);
        }
        match self.far_system_kind(&descriptor)? {
            SystemTarget::Gate(gate) => {
                let mut code = self.gate_code_segment(&gate)?;
                let level_fits = if code.is_conforming() { true } else { code.dpl() == self.cpl() };
                if !level_fits {
                    return Err(self.raise_selector(vector::GENERAL_PROTECTION, code.selector, 0));
                }
                let offset = gate.gate_offset(self.mode.long);
                self.check_code_target(&code, offset)?;
                self.mark_accessed(&mut code)?;
                self.enter_code_segment(&code, offset);
            }
            SystemTarget::Task(tss) => self.switch_task(tss, Reason::Jump, target.return_ip, 0)?,
        }
        Ok(Flow::Leave)
    }

    /// CALL ptr16:n, CALL m16:n.
    pub(crate) fn op_far_call(&mut self, op: &Op) -> Result<Flow, Fault> {
        let target = self.far_target(op)?;
        if !self.mode.protected {
            self.check_real_target(target.offset)?;
            self.push_return(&target, target.bytes)?;
            self.set_real_code_segment(target.selector);
            self.rip = target.offset;
            return Ok(Flow::Leave);
        }
        let descriptor = self.far_descriptor(target.selector)?;
        if descriptor.kind() & 0x10 != 0 {
            let mut code = descriptor;
            self.check_direct_code(&code)?;
            self.check_code_target(&code, target.offset)?;
            self.mark_accessed(&mut code)?;
            self.push_return(&target, target.bytes)?;
            self.enter_code_segment(&code, target.offset);
            return Ok(Flow::Leave);
        }
        match self.far_system_kind(&descriptor)? {
            SystemTarget::Gate(gate) => self.call_through_gate(&gate, &target)?,
            SystemTarget::Task(tss) => self.switch_task(tss, Reason::Call, target.return_ip, 0)?,
        }
        Ok(Flow::Leave)
    }

    fn check_real_target(&mut self, offset: u64) -> Result<(), Fault> {
        if offset > u64::from(self.segments[usize::from(CS)].limit) {
            return Err(self.raise_gp(0));
        }
        Ok(())
    }

    fn push_return(&mut self, target: &Target, bytes: u64) -> Result<(), Fault> {
        let mut stack = self.current_stack();
        self.push(&mut stack, u64::from(self.segments[usize::from(CS)].selector), bytes)?;
        self.push(&mut stack, target.return_ip, bytes)?;
        self.set_stack_pointer(stack.pointer);
        Ok(())
    }

    fn far_descriptor(&mut self, selector: u16) -> Result<Descriptor, Fault> {
        if is_null(selector) {
            return Err(self.raise_gp(0));
        }
        self.descriptor(selector, vector::GENERAL_PROTECTION, 0)
    }

    /// Checks a code segment that is named directly.
    fn check_direct_code(&mut self, code: &Descriptor) -> Result<(), Fault> {
        let rpl = (code.selector & 3) as u8;
        let level_fits =
            if code.is_conforming() { code.dpl() <= self.cpl() } else { rpl <= self.cpl() && code.dpl() == self.cpl() };
        let size_fits = !(self.mode.long && code.is_long() && code.is_big());
        if !code.is_code() || !level_fits || !size_fits {
            return Err(self.raise_selector(vector::GENERAL_PROTECTION, code.selector, 0));
        }
        if !code.is_present() {
            return Err(self.raise_selector(vector::SEGMENT_NOT_PRESENT, code.selector, 0));
        }
        Ok(())
    }

    /// Sets CS with the current privilege, and the instruction pointer.
    fn enter_code_segment(&mut self, code: &Descriptor, offset: u64) {
        let cpl = u16::from(self.cpl());
        self.segments[usize::from(CS)] = code.segment(code.selector & !3 | cpl);
        self.rip = offset;
        self.update_mode();
    }

    /// Sorts a system descriptor that a far JMP or CALL names, and checks its privilege and presence.
    fn far_system_kind(&mut self, descriptor: &Descriptor) -> Result<SystemTarget, Fault> {
        let selector = descriptor.selector;
        let is_gate = match descriptor.kind() {
            kind::CALL_GATE_32 => true,
            kind::CALL_GATE_16 => !self.mode.long,
            _ => false,
        };
        let is_task = !self.mode.long && matches!(descriptor.kind(), kind::TASK_GATE | kind::TSS_16 | kind::TSS_32);
        let rpl = (selector & 3) as u8;
        if !is_gate && !is_task || descriptor.dpl() < self.cpl() || descriptor.dpl() < rpl {
            return Err(self.raise_selector(vector::GENERAL_PROTECTION, selector, 0));
        }
        if is_gate {
            let gate = self.widen_descriptor(*descriptor, vector::GENERAL_PROTECTION)?;
            if !gate.is_present() {
                return Err(self.raise_selector(vector::SEGMENT_NOT_PRESENT, selector, 0));
            }
            return Ok(SystemTarget::Gate(gate));
        }
        if !descriptor.is_present() {
            return Err(self.raise_selector(vector::SEGMENT_NOT_PRESENT, selector, 0));
        }
        if descriptor.kind() != kind::TASK_GATE {
            if selector & 4 != 0 {
                return Err(self.raise_selector(vector::GENERAL_PROTECTION, selector, 0));
            }
            return Ok(SystemTarget::Task(*descriptor));
        }
        let tss_selector = descriptor.gate_selector();
        if tss_selector & 4 != 0 {
            return Err(self.raise_selector(vector::GENERAL_PROTECTION, tss_selector, 0));
        }
        let tss = self.descriptor(tss_selector, vector::GENERAL_PROTECTION, 0)?;
        if !matches!(tss.kind(), kind::TSS_16 | kind::TSS_32) {
            return Err(self.raise_selector(vector::GENERAL_PROTECTION, tss_selector, 0));
        }
        if !tss.is_present() {
            return Err(self.raise_selector(vector::SEGMENT_NOT_PRESENT, tss_selector, 0));
        }
        Ok(SystemTarget::Task(tss))
    }

    /// Reads and checks a call gate's code segment but for what JMP and CALL check differently.
    fn gate_code_segment(&mut self, gate: &Descriptor) -> Result<Descriptor, Fault> {
        let selector = gate.gate_selector();
        if is_null(selector) {
            return Err(self.raise_gp(0));
        }
        let code = self.descriptor(selector, vector::GENERAL_PROTECTION, 0)?;
        let wrong_size = self.mode.long && (!code.is_long() || code.is_big());
        if !code.is_code() || code.dpl() > self.cpl() || wrong_size {
            return Err(self.raise_selector(vector::GENERAL_PROTECTION, selector, 0));
        }
        if !code.is_present() {
            return Err(self.raise_selector(vector::SEGMENT_NOT_PRESENT, selector, 0));
        }
        Ok(code)
    }

    fn call_through_gate(&mut self, gate: &Descriptor, target: &Target) -> Result<(), Fault> {
        let mut code = self.gate_code_segment(gate)?;
        let offset = gate.gate_offset(self.mode.long);
        let bytes = match (self.mode.long, gate.kind()) {
            (true, _) => 8,
            (false, kind::CALL_GATE_32) => 4,
            (false, _) => 2,
        };
        if code.is_conforming() || code.dpl() == self.cpl() {
            self.check_code_target(&code, offset)?;
            self.mark_accessed(&mut code)?;
            self.push_return(target, bytes)?;
            self.enter_code_segment(&code, offset);
            return Ok(());
        }
        let new_cpl = code.dpl();
        let mut old_stack = self.current_stack();
        let old_selector = self.segments[usize::from(SS)].selector;
        let (stack_segment, mut stack) = if self.mode.long {
            let (segment, stack) = self.long_inner_stack(new_cpl)?;
            (segment, stack)
        } else {
            let (descriptor, stack) = self.inner_stack(new_cpl, 0)?;
            (descriptor.segment(descriptor.selector), stack)
        };
        self.check_code_target(&code, offset)?;
        self.push(&mut stack, u64::from(old_selector), bytes)?;
        self.push(&mut stack, self.gpr[RSP], bytes)?;
        if !self.mode.long {
            // Parameters keep their order: the last one is copied first.
            let count = gate.raw >> 32 & 31;
            for index in (0..count).rev() {
                let mut source = old_stack;
                source.skip(index * bytes);
                let value = self.load_from_stack(&source, bytes)?;
                self.push(&mut stack, value, bytes)?;
            }
            old_stack.skip(count * bytes);
        }
        self.push(&mut stack, u64::from(self.segments[usize::from(CS)].selector), bytes)?;
        self.push(&mut stack, target.return_ip, bytes)?;
        self.mark_accessed(&mut code)?;
        self.segments[usize::from(SS)] = stack_segment;
        self.segments[usize::from(CS)] = code.segment(code.selector & !3 | u16::from(new_cpl));
        self.rip = offset;
        self.update_mode();
        self.set_stack_pointer(stack.pointer);
        Ok(())
    }

    /// RET far. `extra2`: operand size; `immediate`: bytes of parameters to drop.
    pub(crate) fn op_far_return(&mut self, op: &Op) -> Result<Flow, Fault> {
        let bytes = u64::from(op.extra2);
        let parameters = op.immediate & 0xffff;
        let mut stack = self.current_stack();
        let ip = self.pop(&mut stack, bytes)?;
        let selector = self.pop(&mut stack, bytes)? as u16;
        stack.skip(parameters);
        if !self.mode.protected {
            self.check_real_target(ip)?;
            self.set_stack_pointer(stack.pointer);
            self.set_real_code_segment(selector);
            self.rip = ip;
            return Ok(Flow::Leave);
        }
        let mut code = self.return_code_segment(selector)?;
        let rpl = (selector & 3) as u8;
        if rpl == self.cpl() {
            self.check_code_target(&code, ip)?;
            self.mark_accessed(&mut code)?;
            self.set_stack_pointer(stack.pointer);
            self.segments[usize::from(CS)] = code.segment(selector);
            self.rip = ip;
            self.update_mode();
            return Ok(Flow::Leave);
        }
        let pointer = self.pop(&mut stack, bytes)?;
        let stack_selector = self.pop(&mut stack, bytes)? as u16;
        let stack_segment = self.return_stack_segment(stack_selector, &code, rpl)?;
        self.check_code_target(&code, ip)?;
        self.mark_accessed(&mut code)?;
        self.segments[usize::from(CS)] = code.segment(selector);
        self.segments[usize::from(SS)] = stack_segment;
        self.rip = ip;
        self.update_mode();
        match self.mode.stack {
            CodeSize::Bits64 => self.gpr[RSP] = pointer.wrapping_add(parameters),
            _ => self.set_stack_pointer(pointer.wrapping_add(parameters)),
        }
        self.drop_inner_segments();
        Ok(Flow::Leave)
    }
}

/// What a system descriptor leads to.
enum SystemTarget {
    Gate(Descriptor),
    Task(Descriptor),
}

impl Cpu {
    /// The stack of an inner privilege level in IA-32e mode: from the TSS, with a null SS.
    fn long_inner_stack(
        &mut self,
        new_cpl: u8,
    ) -> Result<(polder_machine::state::SegmentState, super::stack::Stack), Fault> {
        let pointer = self.long_stack_pointer(4 + 8 * u32::from(new_cpl), 0)?;
        if !is_canonical(pointer, self.linear_bits()) {
            return Err(self.raise_ss(0));
        }
        let attributes = u16::from(new_cpl) << 5;
        let segment =
            polder_machine::state::SegmentState { selector: u16::from(new_cpl), base: 0, limit: 0, attributes };
        let stack = super::stack::Stack {
            segment,
            pointer,
            size: CodeSize::Bits64,
            cpl: new_cpl,
            error_selector: 0,
            external: 0,
        };
        Ok((segment, stack))
    }
}
