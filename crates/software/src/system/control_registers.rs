//! MOV to and from CRn, LMSW, SMSW, CLTS, EFER and what changes of them bring about (SDM vol. 3, 2.5, 4.10.4 and 10.8.5).

use crate::cpu::{CS, Cpu, cr0, cr4, efer};
use crate::cpu_model::Feature;
use crate::fault::Fault;
use crate::op::{Flow, Op};
use crate::page_walk::PHYSICAL_BITS;

const CR0_EXISTING: u64 =
    cr0::PE | cr0::MP | cr0::EM | cr0::TS | cr0::ET | cr0::NE | cr0::WP | cr0::AM | cr0::NW | cr0::CD | cr0::PG;
/// CR3 bit 63 in a write: the process-context's translations stay valid.
const KEEP: u64 = 1 << 63;
const PCID: u64 = 0xfff;

impl Cpu {
    /// Whether IA-32e paging could not be left without first leaving 64-bit code.
    fn in_64_bit_code(&self) -> bool {
        self.mode.long && self.segments[usize::from(CS)].attributes & 1 << 13 != 0
    }

    /// The bits of CR4 that the CPU model has.
    fn cr4_existing(&self) -> u64 {
        let by_feature = [
            (Feature::De, cr4::DE),
            (Feature::Pse, cr4::PSE),
            (Feature::Pae, cr4::PAE),
            (Feature::Mce, cr4::MCE),
            (Feature::Pge, cr4::PGE),
            (Feature::Umip, cr4::UMIP),
            (Feature::La57, cr4::LA57),
            (Feature::Fsgsbase, cr4::FSGSBASE),
            (Feature::Pcid, cr4::PCIDE),
            (Feature::Xsave, cr4::OSXSAVE),
            (Feature::Smep, cr4::SMEP),
            (Feature::Smap, cr4::SMAP),
            (Feature::Pku, cr4::PKE),
        ];
        let always = cr4::TSD | cr4::PCE | cr4::OSFXSR | cr4::OSXMMEXCPT;
        by_feature.iter().filter(|(feature, _)| self.model.has(*feature)).fold(always, |bits, (_, bit)| bits | bit)
    }

    /// Key of the current address space in the look-up tables: the PCID.
    pub(crate) fn context_key(&self) -> u64 {
        if self.cr4 & cr4::PCIDE != 0 { self.cr3 & PCID } else { 0 }
    }

    /// MOV r, CRn. `first`: control register; `second`: register; `extra2`: operand size.
    pub(crate) fn op_mov_from_control(&mut self, op: &Op) -> Result<Flow, Fault> {
        if !matches!(op.first, 0 | 2 | 3 | 4 | 8) {
            return Err(self.raise_ud());
        }
        self.require_cpl_0()?;
        let value = match op.first {
            0 => self.cr0,
            2 => self.cr2,
            3 => self.cr3,
            4 => self.cr4,
            _ => self.cr8(),
        };
        self.set_register(op.second, value, u64::from(op.extra2));
        Ok(Flow::Next)
    }

    /// MOV CRn, r; operands as above.
    pub(crate) fn op_mov_to_control(&mut self, op: &Op) -> Result<Flow, Fault> {
        if !matches!(op.first, 0 | 2 | 3 | 4 | 8) {
            return Err(self.raise_ud());
        }
        self.require_cpl_0()?;
        let mut value = self.gpr[usize::from(op.second) % 16];
        if op.extra2 == 4 {
            value &= 0xffff_ffff;
        }
        let following = self.following_ip(op);
        match op.first {
            0 => self.write_cr0(value)?,
            2 => self.cr2 = value,
            3 => self.write_cr3(value)?,
            4 => self.write_cr4(value)?,
            _ => self.set_cr8(value)?,
        }
        self.rip = following;
        Ok(Flow::Leave)
    }

    /// Writes CR0 with all checks and side effects.
    pub(crate) fn write_cr0(&mut self, value: u64) -> Result<(), Fault> {
        let new = value & CR0_EXISTING | cr0::ET;
        let paging_without_protection = new & cr0::PG != 0 && new & cr0::PE == 0;
        let write_through_only = new & cr0::NW != 0 && new & cr0::CD == 0;
        if value >> 32 != 0 || paging_without_protection || write_through_only {
            return Err(self.raise_gp(0));
        }
        let changed = new ^ self.cr0;
        let mut new_efer = self.efer;
        if changed & cr0::PG != 0 {
            if new & cr0::PG != 0 {
                if self.efer & efer::LME != 0 {
                    let is_long_code = self.segments[usize::from(CS)].attributes & 1 << 13 != 0;
                    let has_small_task = self.tr.attributes & 0xf < 4;
                    if self.cr4 & cr4::PAE == 0 || is_long_code || has_small_task {
                        return Err(self.raise_gp(0));
                    }
                    new_efer |= efer::LMA;
                }
            } else {
                if self.in_64_bit_code() || self.cr4 & cr4::PCIDE != 0 {
                    return Err(self.raise_gp(0));
                }
                new_efer &= !efer::LMA;
            }
        }
        let uses_pointers = new & cr0::PG != 0 && self.cr4 & cr4::PAE != 0 && new_efer & efer::LMA == 0;
        if uses_pointers && changed & (cr0::PG | cr0::CD | cr0::NW) != 0 && !self.load_pae_pointers() {
            return Err(self.raise_gp(0));
        }
        self.cr0 = new;
        self.efer = new_efer;
        if changed & (cr0::PG | cr0::WP | cr0::PE) != 0 {
            self.tlb.flush_all();
        }
        self.update_mode();
        Ok(())
    }

    /// Writes CR3 with all checks and side effects.
    pub(crate) fn write_cr3(&mut self, value: u64) -> Result<(), Fault> {
        let has_pcids = self.cr4 & cr4::PCIDE != 0;
        let keep = has_pcids && value & KEEP != 0;
        let new = if has_pcids { value & !KEEP } else { value };
        if self.mode.long && new >> PHYSICAL_BITS != 0 {
            return Err(self.raise_gp(0));
        }
        let old = std::mem::replace(&mut self.cr3, new);
        let uses_pointers = self.cr0 & cr0::PG != 0 && self.cr4 & cr4::PAE != 0 && !self.mode.long;
        if uses_pointers && !self.load_pae_pointers() {
            self.cr3 = old;
            return Err(self.raise_gp(0));
        }
        self.tlb.switch_context(self.context_key(), keep);
        self.update_mode();
        Ok(())
    }

    /// Loads CR3 from a task-state segment, where nothing is checked that could still fault.
    pub(crate) fn enter_address_space(&mut self, value: u64) {
        self.cr3 = value;
        if self.cr4 & cr4::PAE != 0 && !self.mode.long {
            // A bad pointer table leaves the old pointers: the switch has happened.
            let _ = self.load_pae_pointers();
        }
        self.tlb.switch_context(self.context_key(), false);
    }

    /// Writes CR4 with all checks and side effects.
    pub(crate) fn write_cr4(&mut self, value: u64) -> Result<(), Fault> {
        let changed = value ^ self.cr4;
        let long = self.mode.long;
        let turned_on = changed & value;
        let refused = value & !self.cr4_existing() != 0
            || long && value & cr4::PAE == 0
            || long && changed & cr4::LA57 != 0
            || turned_on & cr4::PCIDE != 0 && (!long || self.cr3 & PCID != 0);
        if refused {
            return Err(self.raise_gp(0));
        }
        let old = std::mem::replace(&mut self.cr4, value);
        let paging_bits = cr4::PAE | cr4::PSE | cr4::PGE | cr4::SMEP | cr4::SMAP | cr4::PKE | cr4::LA57 | cr4::PCIDE;
        let uses_pointers = self.cr0 & cr0::PG != 0 && value & cr4::PAE != 0 && !long;
        if uses_pointers && changed & (cr4::PAE | cr4::PSE | cr4::PGE | cr4::SMEP) != 0 && !self.load_pae_pointers() {
            self.cr4 = old;
            return Err(self.raise_gp(0));
        }
        if changed & paging_bits != 0 {
            self.tlb.flush_all();
            self.tlb.switch_context(self.context_key(), false);
        }
        self.update_mode();
        Ok(())
    }

    /// Writes EFER as WRMSR does, with all checks and side effects.
    pub fn set_efer(&mut self, value: u64) -> Result<(), Fault> {
        const WRITABLE: u64 = efer::SCE | efer::LME | efer::NXE;
        if value & !(WRITABLE | efer::LMA) != 0 {
            return Err(self.raise_gp(0));
        }
        let new = value & WRITABLE | self.efer & efer::LMA;
        if (new ^ self.efer) & efer::LME != 0 && self.cr0 & cr0::PG != 0 {
            return Err(self.raise_gp(0));
        }
        let no_execute_changed = (new ^ self.efer) & efer::NXE != 0;
        self.efer = new;
        if no_execute_changed {
            self.tlb.flush_all();
        }
        self.update_mode();
        Ok(())
    }

    /// LMSW: the low four bits of CR0, of which PE can only be set.
    pub(crate) fn op_load_machine_status(&mut self, op: &Op) -> Result<Flow, Fault> {
        self.require_cpl_0()?;
        let value = u64::from(self.operand_u16(op)?);
        let following = self.following_ip(op);
        let new = self.cr0 & !(cr0::MP | cr0::EM | cr0::TS) | value & 15;
        self.write_cr0(new)?;
        self.rip = following;
        Ok(Flow::Leave)
    }

    /// SMSW
    pub(crate) fn op_store_machine_status(&mut self, op: &Op) -> Result<Flow, Fault> {
        self.check_umip()?;
        self.store_operand_or_register(op, self.cr0, 2)?;
        Ok(Flow::Next)
    }

    /// CLTS
    pub(crate) fn op_clear_task_switched(&mut self, op: &Op) -> Result<Flow, Fault> {
        self.require_cpl_0()?;
        self.cr0 &= !cr0::TS;
        self.update_mode();
        Ok(self.leave(op))
    }
}
