//! Small instructions about the processor itself: HLT, CLI, STI, CLAC, STAC, time stamps, CPUID, model-specific registers, XCR0,
//! PKRU, hypercalls.

use crate::cpu::{Cpu, RAX, RBX, RCX, RDX, cr4};
use crate::cpu_model::Feature;
use crate::fault::Fault;
use crate::flags;
use crate::op::{Flow, Op};

impl Cpu {
    /// HLT
    pub(crate) fn op_halt(&mut self, op: &Op) -> Result<Flow, Fault> {
        self.require_cpl_0()?;
        self.counters.hlt += 1;
        self.halted = true;
        Ok(self.leave(op))
    }

    /// Whether CLI and STI may change IF.
    fn check_interrupt_flag(&mut self) -> Result<(), Fault> {
        if self.cpl() > self.iopl() { Err(self.raise_gp(0)) } else { Ok(()) }
    }

    /// CLI
    pub(crate) fn op_clear_interrupts(&mut self, _op: &Op) -> Result<Flow, Fault> {
        self.check_interrupt_flag()?;
        self.system_flags &= !flags::IF;
        Ok(Flow::Next)
    }

    /// STI: interrupts stay out for one more instruction if they were off.
    pub(crate) fn op_set_interrupts(&mut self, op: &Op) -> Result<Flow, Fault> {
        self.check_interrupt_flag()?;
        if self.system_flags & flags::IF == 0 {
            self.system_flags |= flags::IF;
            self.interrupt_shadow = true;
        }
        Ok(self.leave(op))
    }

    /// CLAC (`immediate` 0) and STAC (1).
    pub(crate) fn op_access_check(&mut self, op: &Op) -> Result<Flow, Fault> {
        if self.cpl() != 0 {
            return Err(self.raise_ud());
        }
        if op.immediate != 0 {
            self.system_flags |= flags::AC;
        } else {
            self.system_flags &= !flags::AC;
        }
        self.select_tables();
        Ok(Flow::Next)
    }

    fn set_pair(&mut self, value: u64) {
        self.gpr[RAX] = value & 0xffff_ffff;
        self.gpr[RDX] = value >> 32;
    }

    fn pair(&self) -> u64 {
        self.gpr[RAX] & 0xffff_ffff | self.gpr[RDX] << 32
    }

    fn check_time_stamp(&mut self) -> Result<(), Fault> {
        let kept_back = self.cr4 & cr4::TSD != 0 && self.cpl() > 0;
        if kept_back { Err(self.raise_gp(0)) } else { Ok(()) }
    }

    /// RDTSC
    pub(crate) fn op_time_stamp(&mut self, _op: &Op) -> Result<Flow, Fault> {
        self.check_time_stamp()?;
        let tsc = self.tsc();
        self.set_pair(tsc);
        Ok(Flow::Next)
    }

    /// RDTSCP
    pub(crate) fn op_time_stamp_and_id(&mut self, _op: &Op) -> Result<Flow, Fault> {
        self.check_time_stamp()?;
        let tsc = self.tsc();
        self.set_pair(tsc);
        self.gpr[RCX] = u64::from(self.tsc_aux);
        Ok(Flow::Next)
    }

    /// RDPID. `second`: destination.
    pub(crate) fn op_processor_id(&mut self, op: &Op) -> Result<Flow, Fault> {
        self.gpr[usize::from(op.second) % 16] = u64::from(self.tsc_aux);
        Ok(Flow::Next)
    }

    /// RDPMC: there are no performance counters.
    pub(crate) fn op_performance_counter(&mut self, _op: &Op) -> Result<Flow, Fault> {
        Err(self.raise_gp(0))
    }

    /// CPUID
    pub(crate) fn op_cpuid(&mut self, _op: &Op) -> Result<Flow, Fault> {
        let [eax, ebx, ecx, edx] = self.cpuid(self.gpr[RAX] as u32, self.gpr[RCX] as u32);
        self.gpr[RAX] = u64::from(eax);
        self.gpr[RBX] = u64::from(ebx);
        self.gpr[RCX] = u64::from(ecx);
        self.gpr[RDX] = u64::from(edx);
        Ok(Flow::Next)
    }

    /// RDMSR
    pub(crate) fn op_read_msr(&mut self, _op: &Op) -> Result<Flow, Fault> {
        self.require_cpl_0()?;
        let value = self.read_msr(self.gpr[RCX] as u32)?;
        self.set_pair(value);
        Ok(Flow::Next)
    }

    /// WRMSR
    pub(crate) fn op_write_msr(&mut self, op: &Op) -> Result<Flow, Fault> {
        self.require_cpl_0()?;
        let following = self.following_ip(op);
        self.write_msr(self.gpr[RCX] as u32, self.pair())?;
        self.rip = following;
        Ok(Flow::Leave)
    }

    /// XGETBV
    pub(crate) fn op_get_extended_control(&mut self, _op: &Op) -> Result<Flow, Fault> {
        if self.cr4 & cr4::OSXSAVE == 0 {
            return Err(self.raise_ud());
        }
        let value = match self.gpr[RCX] as u32 {
            0 => self.xcr0,
            1 if self.model.has(Feature::Xgetbv1) => self.xcr0 & self.components_in_use(),
            _ => return Err(self.raise_gp(0)),
        };
        self.set_pair(value);
        Ok(Flow::Next)
    }

    /// XSETBV
    pub(crate) fn op_set_extended_control(&mut self, op: &Op) -> Result<Flow, Fault> {
        if self.cr4 & cr4::OSXSAVE == 0 {
            return Err(self.raise_ud());
        }
        self.require_cpl_0()?;
        let value = self.pair();
        let avx_without_sse = value & 6 == 4;
        if self.gpr[RCX] as u32 != 0 || value & 1 == 0 || value & !self.model.xcr0_mask() != 0 || avx_without_sse {
            return Err(self.raise_gp(0));
        }
        self.xcr0 = value;
        self.update_mode();
        Ok(self.leave(op))
    }

    /// RDPKRU
    pub(crate) fn op_read_keys(&mut self, _op: &Op) -> Result<Flow, Fault> {
        if self.cr4 & cr4::PKE == 0 {
            return Err(self.raise_ud());
        }
        if self.gpr[RCX] as u32 != 0 {
            return Err(self.raise_gp(0));
        }
        self.set_pair(u64::from(self.pkru));
        Ok(Flow::Next)
    }

    /// WRPKRU
    pub(crate) fn op_write_keys(&mut self, op: &Op) -> Result<Flow, Fault> {
        if self.cr4 & cr4::PKE == 0 {
            return Err(self.raise_ud());
        }
        if self.gpr[RCX] as u32 != 0 || self.gpr[RDX] as u32 != 0 {
            return Err(self.raise_gp(0));
        }
        let value = self.gpr[RAX] as u32;
        if value != self.pkru {
            self.pkru = value;
            // The tables hold rights as the keys gave them.
            self.tlb.flush_all();
        }
        Ok(self.leave(op))
    }

    /// VMCALL and VMMCALL: KVM's hypercalls.
    pub(crate) fn op_hypercall(&mut self, op: &Op) -> Result<Flow, Fault> {
        let following = self.following_ip(op);
        self.hypercall()?;
        self.rip = following;
        Ok(Flow::Leave)
    }
}
