//! Exceptions and interrupts on their way into the guest (SDM vol. 3, chapter 6).
//!
//! A delivery reads the gate, checks everything, pushes the frame and only then changes registers: one that fails leaves no
//! trace but bytes below the stack pointer, and raises the exception that the manual asks for. Two that meet make a double fault, a third one
//! shuts the processor down.

use polder_machine::state::SegmentState;

use super::descriptor::{Descriptor, is_null, kind};
use super::stack::Stack;
use super::task_switch::Reason;
use crate::cpu::{CS, CodeSize, Cpu, RSP, SS, is_canonical};
use crate::fault::{Exception, Fault, vector};
use crate::flags;

/// How a delivery ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Delivery {
    /// The guest's handler runs next.
    Done,
    /// A third fault: the processor has shut down.
    TripleFault,
}

/// Something to be delivered through the interrupt table.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Event {
    pub vector: u8,
    pub error_code: Option<u32>,
    /// INT n, INT3, INTO: the gate's DPL counts and EXT stays clear.
    pub software: bool,
    /// The instruction pointer to push.
    pub return_rip: u64,
    /// RFLAGS.RF in the pushed flags: the instruction restarts.
    pub resume: bool,
}

impl Event {
    /// The EXT bit of error codes that come up on the way.
    pub fn external(&self) -> u32 {
        u32::from(!self.software)
    }
}

#[derive(PartialEq, Eq)]
enum Class {
    Benign,
    Contributory,
    PageFault,
}

/// SDM vol. 3, table 6-4.
fn class(vector_number: u8) -> Class {
    match vector_number {
        vector::DIVIDE_ERROR
        | vector::INVALID_TSS
        | vector::SEGMENT_NOT_PRESENT
        | vector::STACK
        | vector::GENERAL_PROTECTION => Class::Contributory,
        vector::PAGE_FAULT => Class::PageFault,
        _ => Class::Benign,
    }
}

/// Exceptions on the way to a handler of exceptions before the vCPU looks around.
const ROUNDS_MAX: u32 = 16;

impl Cpu {
    /// Delivers `fault`; `rip` is the address to push.
    pub fn deliver_exception(&mut self) -> Delivery {
        let mut current = self.fault;
        // Benign exceptions can follow each other for ever: #AC on the way to the handler of #AC. A processor hangs there (CVE-2015-5307);
        // here the vCPU comes back to its loop, which sees requests to stop, and tries the instruction again.
        for _ in 0..ROUNDS_MAX {
            self.note_exception(current);
            let is_fault = !matches!(
                current.vector,
                vector::DEBUG | vector::NMI | vector::BREAKPOINT | vector::OVERFLOW | vector::DOUBLE_FAULT
            );
            let event = Event {
                vector: current.vector,
                error_code: current.error_code,
                software: false,
                return_rip: self.rip,
                resume: is_fault || self.system_flags & flags::RF != 0,
            };
            if self.enter(event).is_ok() {
                return Delivery::Done;
            }
            let second = self.fault;
            let second_class = class(second.vector);
            if current.vector == vector::DOUBLE_FAULT {
                return Delivery::TripleFault;
            }
            let serious = match class(current.vector) {
                Class::Benign => false,
                Class::Contributory => second_class == Class::Contributory,
                Class::PageFault => second_class != Class::Benign,
            };
            if serious {
                if second_class == Class::PageFault {
                    self.cr2 = second.detail;
                }
                current = Exception { vector: vector::DOUBLE_FAULT, error_code: Some(0), detail: 0 };
            } else {
                current = second;
            }
        }
        Delivery::Done
    }

    /// Delivers an external interrupt; `rip` is the next instruction's address.
    pub fn deliver_interrupt(&mut self, vector: u8) -> Delivery {
        self.deliver_external(vector)
    }

    /// Delivers a non-maskable interrupt and keeps others out until IRET.
    pub fn deliver_nmi(&mut self) -> Delivery {
        let delivery = self.deliver_external(vector::NMI);
        self.nmi_blocked = true;
        delivery
    }

    fn deliver_external(&mut self, vector: u8) -> Delivery {
        let resume = self.system_flags & flags::RF != 0;
        let event = Event { vector, error_code: None, software: false, return_rip: self.rip, resume };
        match self.enter(event) {
            Ok(()) => Delivery::Done,
            Err(_) => self.deliver_exception(),
        }
    }

    /// CR2 and DR6 (SDM vol. 3, 6.15).
    fn note_exception(&mut self, exception: Exception) {
        match exception.vector {
            vector::PAGE_FAULT => self.cr2 = exception.detail,
            vector::DEBUG => {
                self.debug[4] = self.debug[4] & !0xf | exception.detail & 0xffff;
                self.debug[5] &= !(1 << 13);
            }
            _ => {}
        }
    }

    /// Takes an event to its handler, or raises what stands in its way.
    pub(crate) fn enter(&mut self, event: Event) -> Result<(), Fault> {
        if self.mode.long {
            self.enter_long(event)?;
        } else if self.cr0 & crate::cpu::cr0::PE != 0 {
            self.enter_protected(event)?;
        } else {
            self.enter_real(event)?;
        }
        self.halted = false;
        self.interrupt_shadow = false;
        self.stack_shadow = false;
        self.step_consumed = true;
        Ok(())
    }

    /// RFLAGS as an event pushes it.
    fn pushed_flags(&self, event: &Event) -> u64 {
        self.rflags() & !flags::RF | if event.resume { flags::RF } else { 0 }
    }

    /// Real mode: the interrupt vector table (SDM vol. 3, 21.1.4).
    fn enter_real(&mut self, event: Event) -> Result<(), Fault> {
        self.check_ivt(event)?;
        let entry = self.load_implicit::<u32>(self.idtr.base.wrapping_add(u64::from(event.vector) * 4))?;
        self.enter_through_vector_table(event, entry, self.rflags())
    }

    fn check_ivt(&mut self, event: Event) -> Result<(), Fault> {
        if u32::from(event.vector) * 4 + 3 > u32::from(self.idtr.limit) {
            return Err(self.raise_gp(u32::from(event.vector) * 8 + 2 + event.external()));
        }
        Ok(())
    }

    fn enter_through_vector_table(&mut self, event: Event, entry: u32, pushed: u64) -> Result<(), Fault> {
        let mut stack = self.current_stack();
        stack.external = event.external();
        self.push(&mut stack, pushed, 2)?;
        self.push(&mut stack, u64::from(self.segments[usize::from(CS)].selector), 2)?;
        self.push(&mut stack, event.return_rip, 2)?;
        self.set_stack_pointer(stack.pointer);
        self.set_real_code_segment((entry >> 16) as u16);
        self.rip = u64::from(entry & 0xffff);
        self.system_flags &= !(flags::IF | flags::TF | flags::AC | flags::RF);
        self.update_mode();
        Ok(())
    }

    /// CS in real or virtual-8086 mode.
    pub(crate) fn set_real_code_segment(&mut self, selector: u16) {
        let code = &mut self.segments[usize::from(CS)];
        code.selector = selector;
        code.base = u64::from(selector) << 4;
    }

    fn gate_error(event: &Event) -> u16 {
        u16::from(event.vector) * 8 + 2
    }

    fn raise_gate(&mut self, vector: u8, event: &Event) -> Fault {
        let error_code = Some(u32::from(Self::gate_error(event)) | event.external());
        self.raise(Exception { vector, error_code, detail: 0 })
    }

    /// Reads the gate of a vector and checks its type, privilege and presence.
    fn gate(&mut self, event: &Event, bytes: u64) -> Result<Descriptor, Fault> {
        let offset = u64::from(event.vector) * bytes;
        if offset + bytes - 1 > u64::from(self.idtr.limit) {
            return Err(self.raise_gate(vector::GENERAL_PROTECTION, event));
        }
        let address = self.idtr.base.wrapping_add(offset);
        let raw = self.load_implicit::<u64>(address)?;
        let high = if bytes == 16 { self.load_implicit::<u64>(address.wrapping_add(8))? } else { 0 };
        let gate = Descriptor { raw, high, address, selector: 0 };
        let known = match gate.kind() {
            kind::INTERRUPT_GATE_32 | kind::TRAP_GATE_32 => true,
            kind::INTERRUPT_GATE_16 | kind::TRAP_GATE_16 | kind::TASK_GATE => bytes == 8,
            _ => false,
        };
        if !known || event.software && gate.dpl() < self.cpl() {
            return Err(self.raise_gate(vector::GENERAL_PROTECTION, event));
        }
        if !gate.is_present() {
            return Err(self.raise_gate(vector::SEGMENT_NOT_PRESENT, event));
        }
        Ok(gate)
    }

    /// Reads a handler's code segment and checks it.
    fn handler_segment(&mut self, gate: &Descriptor, external: u32) -> Result<Descriptor, Fault> {
        let selector = gate.gate_selector();
        if is_null(selector) {
            return Err(self.raise_gp(external));
        }
        let code = self.descriptor(selector, vector::GENERAL_PROTECTION, external)?;
        let wrong_size = self.mode.long && (!code.is_long() || code.is_big());
        if !code.is_code() || code.dpl() > self.cpl() || wrong_size {
            return Err(self.raise_selector(vector::GENERAL_PROTECTION, selector, external));
        }
        if !code.is_present() {
            return Err(self.raise_selector(vector::SEGMENT_NOT_PRESENT, selector, external));
        }
        Ok(code)
    }

    /// IA-32e mode (SDM vol. 3, 6.14).
    fn enter_long(&mut self, event: Event) -> Result<(), Fault> {
        let external = event.external();
        let gate = self.gate(&event, 16)?;
        let mut code = self.handler_segment(&gate, external)?;
        let inner = !code.is_conforming() && code.dpl() < self.cpl();
        let new_cpl = if inner { code.dpl() } else { self.cpl() };
        let ist = (gate.raw >> 32 & 7) as u32;
        let pointer = if ist != 0 {
            self.long_stack_pointer(28 + 8 * ist, external)?
        } else if inner {
            self.long_stack_pointer(4 + 8 * u32::from(new_cpl), external)?
        } else {
            self.gpr[RSP]
        };
        let bits = self.linear_bits();
        if !is_canonical(pointer, bits) {
            return Err(self.raise_ss(external));
        }
        let target = gate.gate_offset(true);
        if !is_canonical(target, bits) {
            return Err(self.raise_gp(external));
        }
        let stack_segment = self.segments[usize::from(SS)];
        let mut stack = Stack {
            segment: stack_segment,
            pointer: pointer & !15,
            size: CodeSize::Bits64,
            cpl: new_cpl,
            error_selector: 0,
            external,
        };
        self.push(&mut stack, u64::from(stack_segment.selector), 8)?;
        self.push(&mut stack, self.gpr[RSP], 8)?;
        self.push(&mut stack, self.pushed_flags(&event), 8)?;
        self.push(&mut stack, u64::from(self.segments[usize::from(CS)].selector), 8)?;
        self.push(&mut stack, event.return_rip, 8)?;
        if let Some(error_code) = event.error_code {
            self.push(&mut stack, u64::from(error_code), 8)?;
        }
        self.mark_accessed(&mut code)?;
        self.gpr[RSP] = stack.pointer;
        if inner {
            self.segments[usize::from(SS)] =
                SegmentState { selector: u16::from(new_cpl), base: 0, limit: 0, attributes: u16::from(new_cpl) << 5 };
        }
        self.finish_entry(&gate, &code, new_cpl, target);
        Ok(())
    }

    /// A stack pointer at an offset in the 64-bit TSS.
    pub(crate) fn long_stack_pointer(&mut self, offset: u32, external: u32) -> Result<u64, Fault> {
        if offset + 7 > self.tr.limit {
            return Err(self.raise_selector(vector::INVALID_TSS, self.tr.selector, external));
        }
        self.load_implicit::<u64>(self.tr.base.wrapping_add(u64::from(offset)))
    }

    /// Sets CS, RIP and the flags for a handler.
    fn finish_entry(&mut self, gate: &Descriptor, code: &Descriptor, new_cpl: u8, target: u64) {
        self.segments[usize::from(CS)] = code.segment(code.selector & !3 | u16::from(new_cpl));
        self.rip = target;
        let is_interrupt_gate = gate.kind() & 1 == 0;
        let cleared = flags::TF | flags::NT | flags::VM | flags::RF | if is_interrupt_gate { flags::IF } else { 0 };
        self.system_flags &= !cleared;
        self.update_mode();
    }

    /// Protected mode and virtual-8086 mode (SDM vol. 3, 6.12 and 21.3).
    fn enter_protected(&mut self, event: Event) -> Result<(), Fault> {
        let external = event.external();
        let gate = self.gate(&event, 8)?;
        if gate.kind() == kind::TASK_GATE {
            return self.enter_task(event, &gate);
        }
        let mut code = self.handler_segment(&gate, external)?;
        let from_8086 = self.mode.virtual_8086;
        let inner = !code.is_conforming() && code.dpl() < self.cpl();
        if from_8086 && (!inner || code.dpl() != 0) {
            return Err(self.raise_selector(vector::GENERAL_PROTECTION, code.selector, external));
        }
        let new_cpl = if inner { code.dpl() } else { self.cpl() };
        let bytes = if gate.kind() & 8 != 0 { 4 } else { 2 };
        let target = gate.gate_offset(false);
        let old = self.segments;
        let mut new_stack_segment = old[usize::from(SS)];
        let mut stack = if inner {
            let (descriptor, stack) = self.inner_stack(new_cpl, external)?;
            new_stack_segment = descriptor.segment(descriptor.selector);
            stack
        } else {
            let mut stack = self.current_stack();
            stack.external = external;
            stack
        };
        if target > u64::from(code.limit()) {
            return Err(self.raise_gp(external));
        }
        if from_8086 {
            for segment in [crate::cpu::GS, crate::cpu::FS, crate::cpu::DS, crate::cpu::ES] {
                self.push(&mut stack, u64::from(old[usize::from(segment)].selector), bytes)?;
            }
        }
        if inner {
            self.push(&mut stack, u64::from(old[usize::from(SS)].selector), bytes)?;
            self.push(&mut stack, self.gpr[RSP], bytes)?;
        }
        self.push(&mut stack, self.pushed_flags(&event), bytes)?;
        self.push(&mut stack, u64::from(old[usize::from(CS)].selector), bytes)?;
        self.push(&mut stack, event.return_rip, bytes)?;
        if let Some(error_code) = event.error_code {
            self.push(&mut stack, u64::from(error_code), bytes)?;
        }
        self.mark_accessed(&mut code)?;
        if from_8086 {
            for segment in [crate::cpu::ES, crate::cpu::DS, crate::cpu::FS, crate::cpu::GS] {
                self.segments[usize::from(segment)] = SegmentState::default();
            }
        }
        self.segments[usize::from(SS)] = new_stack_segment;
        self.mode.stack = stack.size;
        self.set_stack_pointer(stack.pointer);
        self.finish_entry(&gate, &code, new_cpl, target);
        Ok(())
    }

    fn enter_task(&mut self, event: Event, gate: &Descriptor) -> Result<(), Fault> {
        let external = event.external();
        let selector = gate.gate_selector();
        let is_local = selector & 4 != 0;
        if is_local {
            return Err(self.raise_selector(vector::GENERAL_PROTECTION, selector, external));
        }
        let tss = self.descriptor(selector, vector::GENERAL_PROTECTION, external)?;
        if !matches!(tss.kind(), kind::TSS_16 | kind::TSS_32) {
            return Err(self.raise_selector(vector::GENERAL_PROTECTION, selector, external));
        }
        if !tss.is_present() {
            return Err(self.raise_selector(vector::SEGMENT_NOT_PRESENT, selector, external));
        }
        let resume = if event.resume { flags::RF } else { 0 };
        self.system_flags = self.system_flags & !flags::RF | resume;
        self.switch_task(tss, Reason::Call, event.return_rip, external)?;
        if let Some(error_code) = event.error_code
            && !self.late_fault
        {
            let bytes = if super::descriptor::is_32_bit_tss(self.tr.attributes) { 4 } else { 2 };
            let mut stack = self.current_stack();
            stack.external = external;
            match self.push(&mut stack, u64::from(error_code), bytes) {
                Ok(()) => self.set_stack_pointer(stack.pointer),
                Err(_) => self.late_fault = true,
            }
        }
        Ok(())
    }

    /// The stack of an inner privilege level from the 16- or 32-bit TSS, checked (SDM vol. 3, 6.12.1).
    pub(crate) fn inner_stack(&mut self, new_cpl: u8, external: u32) -> Result<(Descriptor, Stack), Fault> {
        let wide = super::descriptor::is_32_bit_tss(self.tr.attributes);
        let level = u32::from(new_cpl);
        let (offset, bytes) = if wide { (4 + 8 * level, 6) } else { (2 + 4 * level, 4) };
        if offset + bytes - 1 > self.tr.limit {
            return Err(self.raise_selector(vector::INVALID_TSS, self.tr.selector, external));
        }
        let at = self.tr.base.wrapping_add(u64::from(offset));
        let (pointer, selector) = if wide {
            (u64::from(self.load_implicit::<u32>(at)?), self.load_implicit::<u16>(at.wrapping_add(4))?)
        } else {
            (u64::from(self.load_implicit::<u16>(at)?), self.load_implicit::<u16>(at.wrapping_add(2))?)
        };
        let descriptor = self.inner_stack_segment(selector, new_cpl, external)?;
        let stack = Stack {
            segment: descriptor.segment(selector),
            pointer,
            size: if descriptor.is_big() { CodeSize::Bits32 } else { CodeSize::Bits16 },
            cpl: new_cpl,
            error_selector: selector & 0xfffc,
            external,
        };
        Ok((descriptor, stack))
    }

    /// Checks a stack segment for an inner privilege level.
    fn inner_stack_segment(&mut self, selector: u16, new_cpl: u8, external: u32) -> Result<Descriptor, Fault> {
        if is_null(selector) {
            return Err(self.raise_selector(vector::INVALID_TSS, 0, external));
        }
        let mut descriptor = self.descriptor(selector, vector::INVALID_TSS, external)?;
        if selector & 3 != u16::from(new_cpl) || descriptor.dpl() != new_cpl || !descriptor.is_writable_data() {
            return Err(self.raise_selector(vector::INVALID_TSS, selector, external));
        }
        if !descriptor.is_present() {
            return Err(self.raise_selector(vector::STACK, selector, external));
        }
        self.mark_accessed(&mut descriptor)?;
        Ok(descriptor)
    }
}
