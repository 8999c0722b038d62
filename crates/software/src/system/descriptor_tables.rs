//! The descriptor-table registers and the questions about descriptors: LGDT, LIDT, LLDT, LTR, their stores, VERR, VERW, LAR, LSL, ARPL
//! (SDM vol. 3, 2.4 and 5.10).

use polder_machine::state::{SegmentState, TableState};

use super::descriptor::{Descriptor, is_null, kind};
use super::operand::MEMORY;
use crate::cpu::{Cpu, cr4, is_canonical};
use crate::fault::{Fault, vector};
use crate::flags;
use crate::op::{Flow, Op};
use crate::page_walk::Access;

/// `Op::immediate` of LGDT and SGDT; LIDT and SIDT have 1.
pub const GDT: u64 = 0;

impl Cpu {
    /// SGDT, SIDT, SLDT, STR and SMSW are for privilege level 0 with CR4.UMIP.
    pub(crate) fn check_umip(&mut self) -> Result<(), Fault> {
        if self.cr4 & cr4::UMIP != 0 && self.cpl() > 0 && (self.mode.protected || self.mode.virtual_8086) {
            return Err(self.raise_gp(0));
        }
        Ok(())
    }

    /// LGDT, LIDT. `immediate`: [`GDT`] or 1; `extra2`: operand size.
    pub(crate) fn op_load_table(&mut self, op: &Op) -> Result<Flow, Fault> {
        self.require_cpl_0()?;
        let wide = self.is_64_bit();
        let linear = self.linear(op, if wide { 10 } else { 6 }, Access::Read)?;
        let limit = self.load::<u16>(linear, op.segment)?;
        let at = self.wrap_linear(linear.wrapping_add(2));
        let base = if wide {
            self.load::<u64>(at, op.segment)?
        } else {
            let base = u64::from(self.load::<u32>(at, op.segment)?);
            if op.extra2 == 2 { base & 0xff_ffff } else { base }
        };
        if wide && !is_canonical(base, self.base_bits()) {
            return Err(self.raise_gp(0));
        }
        let table = TableState { base, limit };
        if op.immediate == GDT {
            self.gdtr = table;
        } else {
            self.idtr = table;
        }
        Ok(Flow::Next)
    }

    /// SGDT, SIDT. `immediate`: [`GDT`] or 1.
    pub(crate) fn op_store_table(&mut self, op: &Op) -> Result<Flow, Fault> {
        self.check_umip()?;
        let table = if op.immediate == GDT { self.gdtr } else { self.idtr };
        let len = if self.is_64_bit() { 10 } else { 6 };
        let linear = self.linear(op, len, Access::Write)?;
        let mut image = [0; 10];
        image[..2].copy_from_slice(&table.limit.to_le_bytes());
        image[2..].copy_from_slice(&table.base.to_le_bytes());
        self.store_bytes(linear, &image[..len as usize], op.segment)?;
        Ok(Flow::Next)
    }

    /// LLDT
    pub(crate) fn op_load_ldt(&mut self, op: &Op) -> Result<Flow, Fault> {
        if !self.mode.protected {
            return Err(self.raise_ud());
        }
        self.require_cpl_0()?;
        let selector = self.operand_u16(op)?;
        if is_null(selector) {
            self.ldtr = SegmentState { selector, base: 0, limit: 0, attributes: 0 };
            return Ok(Flow::Next);
        }
        let descriptor = self.system_segment(selector, |kind| kind == kind::LDT)?;
        self.ldtr = SegmentState { base: descriptor.wide_base(), ..descriptor.segment(selector) };
        Ok(Flow::Next)
    }

    /// LTR
    pub(crate) fn op_load_task_register(&mut self, op: &Op) -> Result<Flow, Fault> {
        if !self.mode.protected {
            return Err(self.raise_ud());
        }
        self.require_cpl_0()?;
        let selector = self.operand_u16(op)?;
        if is_null(selector) {
            return Err(self.raise_gp(0));
        }
        let long = self.mode.long;
        let descriptor = self.system_segment(selector, |kind| kind == kind::TSS_32 || kind == kind::TSS_16 && !long)?;
        self.set_busy(selector, true)?;
        self.tr = SegmentState { base: descriptor.wide_base(), ..descriptor.segment(selector) };
        self.tr.attributes |= 2;
        Ok(Flow::Next)
    }

    /// Reads and checks the descriptor of an LDT or TSS.
    fn system_segment(&mut self, selector: u16, fits: impl Fn(u8) -> bool) -> Result<Descriptor, Fault> {
        if selector & 4 != 0 {
            return Err(self.raise_selector(vector::GENERAL_PROTECTION, selector, 0));
        }
        let descriptor = self.descriptor(selector, vector::GENERAL_PROTECTION, 0)?;
        if !fits(descriptor.kind()) {
            return Err(self.raise_selector(vector::GENERAL_PROTECTION, selector, 0));
        }
        if !descriptor.is_present() {
            return Err(self.raise_selector(vector::SEGMENT_NOT_PRESENT, selector, 0));
        }
        let descriptor = self.widen_descriptor(descriptor, vector::GENERAL_PROTECTION)?;
        if self.mode.long && !is_canonical(descriptor.wide_base(), self.base_bits()) {
            return Err(self.raise_selector(vector::GENERAL_PROTECTION, selector, 0));
        }
        Ok(descriptor)
    }

    /// SLDT
    pub(crate) fn op_store_ldt(&mut self, op: &Op) -> Result<Flow, Fault> {
        if !self.mode.protected {
            return Err(self.raise_ud());
        }
        self.check_umip()?;
        self.store_operand_or_register(op, u64::from(self.ldtr.selector), 2)?;
        Ok(Flow::Next)
    }

    /// STR
    pub(crate) fn op_store_task_register(&mut self, op: &Op) -> Result<Flow, Fault> {
        if !self.mode.protected {
            return Err(self.raise_ud());
        }
        self.check_umip()?;
        self.store_operand_or_register(op, u64::from(self.tr.selector), 2)?;
        Ok(Flow::Next)
    }

    fn set_zero_flag(&mut self, value: bool) {
        let rflags = self.rflags() & flags::ARITHMETIC & !flags::ZF | if value { flags::ZF } else { 0 };
        self.arithmetic = flags::ArithmeticFlags::from_rflags(rflags);
    }

    /// The descriptor of a selector that is asked about: `None` where the instruction just clears ZF.
    fn asked_descriptor(&mut self, selector: u16) -> Result<Option<Descriptor>, Fault> {
        if is_null(selector) || self.descriptor_address(selector, 8).is_none() {
            return Ok(None);
        }
        self.descriptor(selector, vector::GENERAL_PROTECTION, 0).map(Some)
    }

    /// Whether a descriptor's privilege lets the running code and the selector's RPL use it.
    fn may_ask(&self, descriptor: &Descriptor, selector: u16) -> bool {
        descriptor.is_conforming() || self.cpl() <= descriptor.dpl() && (selector & 3) as u8 <= descriptor.dpl()
    }

    /// VERR (`immediate` 0) and VERW (1).
    pub(crate) fn op_verify(&mut self, op: &Op) -> Result<Flow, Fault> {
        if !self.mode.protected {
            return Err(self.raise_ud());
        }
        let selector = self.operand_u16(op)?;
        let answer = match self.asked_descriptor(selector)? {
            Some(descriptor) => {
                let usable = if op.immediate == 0 { descriptor.is_readable() } else { descriptor.is_writable_data() };
                usable && self.may_ask(&descriptor, selector)
            }
            None => false,
        };
        self.set_zero_flag(answer);
        Ok(Flow::Next)
    }

    /// LAR (`immediate` 0) and LSL (1). `first`: destination register.
    pub(crate) fn op_load_rights_or_limit(&mut self, op: &Op) -> Result<Flow, Fault> {
        if !self.mode.protected {
            return Err(self.raise_ud());
        }
        let selector = self.operand_u16(op)?;
        let is_limit = op.immediate != 0;
        let answer = self.asked_descriptor(selector)?.filter(|descriptor| {
            let known = match descriptor.kind() {
                16..=31 | kind::LDT | kind::TSS_32 | kind::TSS_32_BUSY => true,
                kind::TSS_16 | kind::TSS_16_BUSY => !self.mode.long,
                kind::CALL_GATE_32 => !is_limit,
                kind::CALL_GATE_16 | kind::TASK_GATE => !is_limit && !self.mode.long,
                _ => false,
            };
            known && self.may_ask(descriptor, selector)
        });
        if let Some(descriptor) = answer {
            let value = if is_limit { u64::from(descriptor.limit()) } else { descriptor.raw >> 32 & 0x00ff_ff00 };
            self.set_register(op.first, value, u64::from(op.extra2));
        }
        self.set_zero_flag(answer.is_some());
        Ok(Flow::Next)
    }

    /// ARPL. `first`: the register with the other selector.
    pub(crate) fn op_adjust_rpl(&mut self, op: &Op) -> Result<Flow, Fault> {
        if !self.mode.protected {
            return Err(self.raise_ud());
        }
        let floor = self.gpr[usize::from(op.first) % 16] as u16 & 3;
        let (linear, selector) = if op.extra == MEMORY {
            // A selector that stays is only read.
            let linear = self.linear(op, 2, Access::Read)?;
            (linear, self.load::<u16>(linear, op.segment)?)
        } else {
            (0, self.gpr[usize::from(op.second) % 16] as u16)
        };
        let raise = selector & 3 < floor;
        if raise {
            let adjusted = selector & !3 | floor;
            if op.extra == MEMORY {
                self.linear(op, 2, Access::Write)?;
                self.store::<u16>(linear, adjusted, op.segment)?;
            } else {
                self.set_word(op.second % 16, adjusted);
            }
        }
        self.set_zero_flag(raise);
        Ok(Flow::Next)
    }
}
