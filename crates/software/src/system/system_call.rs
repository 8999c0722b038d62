//! SYSCALL, SYSRET, SYSENTER, SYSEXIT, SWAPGS and the FS and GS bases (SDM vol. 3, 5.8.7 and 5.8.8).

use polder_machine::state::SegmentState;

use crate::cpu::{CS, Cpu, FS, GS, RCX, RDX, RSP, SS, cr4, efer, is_canonical};
use crate::cpu_model::Feature;
use crate::fault::Fault;
use crate::flags;
use crate::op::{Flow, Op};

const R11: usize = 11;
/// Present, code, readable, accessed, DPL 0, 4 KiB granularity; L or D comes on top.
const CODE: u16 = 0x809b;
const DATA: u16 = 0xc093;
const LONG: u16 = 1 << 13;
const BIG: u16 = 1 << 14;
const USER: u16 = 3 << 5;

fn flat(selector: u16, attributes: u16) -> SegmentState {
    SegmentState { selector, base: 0, limit: 0xffff_ffff, attributes }
}

impl Cpu {
    fn set_code_and_stack(&mut self, code: SegmentState, stack: SegmentState) {
        self.segments[usize::from(CS)] = code;
        self.segments[usize::from(SS)] = stack;
    }

    /// SYSCALL; only in 64-bit code, as Intel's processors have it, unless the CPU model has AMD's compatibility mode form.
    pub(crate) fn op_system_call(&mut self, op: &Op) -> Result<Flow, Fault> {
        let from_compatibility = self.mode.long && self.model.has(Feature::SyscallCompat);
        if self.efer & efer::SCE == 0 || !self.is_64_bit() && !from_compatibility {
            return Err(self.raise_ud());
        }
        let target = if self.is_64_bit() { self.system_call.lstar } else { self.system_call.cstar };
        self.gpr[RCX] = self.following_ip(op);
        self.gpr[R11] = self.rflags() & !flags::RF;
        self.rip = target;
        let selector = (self.system_call.star >> 32) as u16 & 0xfffc;
        self.set_code_and_stack(flat(selector, CODE | LONG), flat(selector.wrapping_add(8), DATA));
        if self.system_call.mask & flags::TF != 0 {
            self.step_consumed = true;
        }
        let rflags = self.rflags() & !self.system_call.mask & !(flags::RF | flags::VM);
        self.set_rflags(rflags);
        Ok(Flow::Jump)
    }

    /// SYSRET. `extra2`: operand size.
    pub(crate) fn op_system_return(&mut self, op: &Op) -> Result<Flow, Fault> {
        if self.efer & efer::SCE == 0 || !self.is_64_bit() {
            return Err(self.raise_ud());
        }
        self.require_cpl_0()?;
        let selector = (self.system_call.star >> 48) as u16;
        let stack = flat(selector.wrapping_add(8) | 3, DATA | USER);
        let code = if op.extra2 == 8 {
            if !is_canonical(self.gpr[RCX], self.linear_bits()) {
                return Err(self.raise_gp(0));
            }
            self.rip = self.gpr[RCX];
            flat(selector.wrapping_add(16) | 3, CODE | LONG | USER)
        } else {
            self.rip = self.gpr[RCX] & 0xffff_ffff;
            flat(selector | 3, CODE | BIG | USER)
        };
        self.set_code_and_stack(code, stack);
        self.set_rflags(self.gpr[R11] & 0x3c_7fd7);
        // A TF that SYSRET sets traps right after it, unlike one that POPF or IRET set.
        if self.system_flags & flags::TF != 0 {
            self.pending_debug |= super::debug::DR6_BS;
        }
        self.leave_with_resume_flag();
        Ok(Flow::Leave)
    }

    /// SYSRET may set RF; without breakpoints it means nothing.
    fn leave_with_resume_flag(&mut self) {
        self.resume_set = true;
        if self.debug[5] & 0xff == 0 {
            self.system_flags &= !flags::RF;
        }
    }

    /// SYSENTER
    pub(crate) fn op_system_enter(&mut self, _op: &Op) -> Result<Flow, Fault> {
        let selector = self.system_call.sysenter_cs as u16 & 0xfffc;
        if !(self.mode.protected || self.mode.virtual_8086) || selector == 0 {
            return Err(self.raise_gp(0));
        }
        let long = self.mode.long;
        let mask = if long { u64::MAX } else { 0xffff_ffff };
        self.gpr[RSP] = self.system_call.sysenter_esp & mask;
        self.rip = self.system_call.sysenter_eip & mask;
        let size = if long { LONG } else { BIG };
        self.set_code_and_stack(flat(selector, CODE | size), flat(selector.wrapping_add(8), DATA));
        let rflags = self.rflags() & !(flags::VM | flags::IF | flags::RF);
        self.set_rflags(rflags);
        Ok(Flow::Leave)
    }

    /// SYSEXIT. `extra2`: operand size.
    pub(crate) fn op_system_exit(&mut self, op: &Op) -> Result<Flow, Fault> {
        let selector = self.system_call.sysenter_cs as u16 & 0xfffc;
        if !self.mode.protected || selector == 0 || self.cpl() != 0 {
            return Err(self.raise_gp(0));
        }
        if op.extra2 == 8 {
            let bits = self.linear_bits();
            if !is_canonical(self.gpr[RCX], bits) || !is_canonical(self.gpr[RDX], bits) {
                return Err(self.raise_gp(0));
            }
            self.gpr[RSP] = self.gpr[RCX];
            self.rip = self.gpr[RDX];
            let code = flat(selector.wrapping_add(32) | 3, CODE | LONG | USER);
            self.set_code_and_stack(code, flat(selector.wrapping_add(40) | 3, DATA | USER));
        } else {
            self.gpr[RSP] = self.gpr[RCX] & 0xffff_ffff;
            self.rip = self.gpr[RDX] & 0xffff_ffff;
            let code = flat(selector.wrapping_add(16) | 3, CODE | BIG | USER);
            self.set_code_and_stack(code, flat(selector.wrapping_add(24) | 3, DATA | USER));
        }
        self.update_mode();
        Ok(Flow::Leave)
    }

    /// SWAPGS
    pub(crate) fn op_swap_gs(&mut self, _op: &Op) -> Result<Flow, Fault> {
        if !self.is_64_bit() {
            return Err(self.raise_ud());
        }
        self.require_cpl_0()?;
        std::mem::swap(&mut self.segments[usize::from(GS)].base, &mut self.system_call.kernel_gs_base);
        Ok(Flow::Next)
    }

    fn require_fsgsbase(&mut self) -> Result<(), Fault> {
        if self.cr4 & cr4::FSGSBASE == 0 || !self.is_64_bit() {
            return Err(self.raise_ud());
        }
        Ok(())
    }

    /// RDFSBASE, RDGSBASE. `immediate`: segment; `second`: register; `extra2`: operand size.
    pub(crate) fn op_read_base(&mut self, op: &Op) -> Result<Flow, Fault> {
        self.require_fsgsbase()?;
        let segment = if op.immediate == u64::from(FS) { FS } else { GS };
        let base = self.segments[usize::from(segment)].base;
        self.set_register(op.second, base, u64::from(op.extra2));
        Ok(Flow::Next)
    }

    /// WRFSBASE, WRGSBASE; operands as for the reads.
    pub(crate) fn op_write_base(&mut self, op: &Op) -> Result<Flow, Fault> {
        self.require_fsgsbase()?;
        let mut base = self.gpr[usize::from(op.second) % 16];
        if op.extra2 == 4 {
            base &= 0xffff_ffff;
        }
        if !is_canonical(base, self.base_bits()) {
            return Err(self.raise_gp(0));
        }
        let segment = if op.immediate == u64::from(FS) { FS } else { GS };
        self.segments[usize::from(segment)].base = base;
        Ok(Flow::Next)
    }
}
