//! Model-specific registers: RDMSR, WRMSR and what stands behind them.
//!
//! A register that this processor does not have raises #GP, as on real ones and under KVM; so does a reserved bit. Registers
//! that only control hardware which an interpreter lacks (microcode, machine checks, memory types, speculation) keep what is written.

use crate::apic::register_range as x2apic;
use crate::cpu::{Cpu, FS, GS, is_canonical};
use crate::cpu_model::{ARCH_CAPABILITIES, Feature};
use crate::fault::Fault;
use crate::page_walk::PHYSICAL_BITS;
use crate::time::host_tsc;

/// Numbers of the registers.
pub mod number {
    pub const PLATFORM_ID: u32 = 0x17;
    pub const TSC: u32 = 0x10;
    pub const KVM_WALL_CLOCK_OLD: u32 = 0x11;
    pub const KVM_SYSTEM_TIME_OLD: u32 = 0x12;
    pub const APIC_BASE: u32 = 0x1b;
    pub const EBL_CR_POWERON: u32 = 0x2a;
    pub const SMI_COUNT: u32 = 0x34;
    pub const FEATURE_CONTROL: u32 = 0x3a;
    pub const TSC_ADJUST: u32 = 0x3b;
    pub const SPEC_CTRL: u32 = 0x48;
    pub const PRED_CMD: u32 = 0x49;
    pub const MICROCODE_UPDATE: u32 = 0x79;
    pub const MICROCODE_REVISION: u32 = 0x8b;
    pub const PLATFORM_INFO: u32 = 0xce;
    pub const MTRR_CAP: u32 = 0xfe;
    pub const ARCH_CAPABILITIES: u32 = 0x10a;
    pub const SYSENTER_CS: u32 = 0x174;
    pub const SYSENTER_ESP: u32 = 0x175;
    pub const SYSENTER_EIP: u32 = 0x176;
    pub const MCG_CAP: u32 = 0x179;
    pub const MCG_STATUS: u32 = 0x17a;
    pub const MCG_CTL: u32 = 0x17b;
    pub const PERF_STATUS: u32 = 0x198;
    pub const PERF_CTL: u32 = 0x199;
    pub const MISC_ENABLE: u32 = 0x1a0;
    pub const DEBUG_CTL: u32 = 0x1d9;
    pub const LAST_BRANCH_FROM: u32 = 0x1db;
    pub const LAST_INTERRUPT_TO: u32 = 0x1de;
    pub const MTRR_VARIABLE: u32 = 0x200;
    pub const MTRR_FIXED_64K: u32 = 0x250;
    pub const MTRR_FIXED_16K: u32 = 0x258;
    pub const MTRR_FIXED_4K: u32 = 0x268;
    pub const PAT: u32 = 0x277;
    pub const MTRR_DEF_TYPE: u32 = 0x2ff;
    pub const MC_BANKS: u32 = 0x400;
    pub const TSC_DEADLINE: u32 = 0x6e0;
    pub const KVM_WALL_CLOCK: u32 = 0x4b56_4d00;
    pub const KVM_SYSTEM_TIME: u32 = 0x4b56_4d01;
    pub const KVM_PV_EOI: u32 = 0x4b56_4d04;
    pub const EFER: u32 = 0xc000_0080;
    pub const STAR: u32 = 0xc000_0081;
    pub const LSTAR: u32 = 0xc000_0082;
    pub const CSTAR: u32 = 0xc000_0083;
    pub const FMASK: u32 = 0xc000_0084;
    pub const FS_BASE: u32 = 0xc000_0100;
    pub const GS_BASE: u32 = 0xc000_0101;
    pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
    pub const TSC_AUX: u32 = 0xc000_0103;
}

/// Variable MTRR pairs.
const MTRR_VARIABLES: u32 = 8;
/// Machine-check banks.
const MC_BANK_COUNT: u32 = 10;
/// Fixed MTRRs 0x250, 0x258, 0x259, 0x268 to 0x26f.
const MTRR_FIXED_COUNT: usize = 11;

/// PAT after power-on: WB WT UC- UC, twice.
const PAT_RESET: u64 = 0x0007_0406_0007_0406;
const WRITE_BACK: u64 = 6;

/// Registers that merely keep their values.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Msrs {
    pub pat: u64,
    mtrr_def_type: u64,
    mtrr_fixed: [u64; MTRR_FIXED_COUNT],
    mtrr_variable: [u64; 2 * MTRR_VARIABLES as usize],
    misc_enable: u64,
    spec_ctrl: u64,
    tsc_adjust: u64,
    mcg_status: u64,
    mcg_ctl: u64,
    mc_banks: [u64; 4 * MC_BANK_COUNT as usize],
    debug_ctl: u64,
    microcode_revision: u64,
}

impl Default for Msrs {
    /// Memory types are as firmware leaves them (there is no firmware): RAM write-back, the hole below 4 GiB uncached.
    fn default() -> Self {
        let mut mtrr_fixed = [0x0606_0606_0606_0606; MTRR_FIXED_COUNT];
        // 0xa0000 to 0xbffff: the hole of the old display adapters.
        mtrr_fixed[2] = 0;
        let mut mtrr_variable = [0; 2 * MTRR_VARIABLES as usize];
        let physical = (1 << PHYSICAL_BITS) - 1;
        mtrr_variable[0] = 0xc000_0000;
        mtrr_variable[1] = physical & !0x3fff_ffff | 1 << 11;
        mtrr_variable[2] = 0xb000_0000;
        mtrr_variable[3] = physical & !0x0fff_ffff | 1 << 11;
        Msrs {
            pat: PAT_RESET,
            mtrr_def_type: 1 << 11 | 1 << 10 | WRITE_BACK,
            mtrr_fixed,
            mtrr_variable,
            // Fast strings; no branch trace store, no precise events.
            misc_enable: 1 | 1 << 11 | 1 << 12,
            spec_ctrl: 0,
            tsc_adjust: 0,
            mcg_status: 0,
            mcg_ctl: u64::MAX,
            mc_banks: [0; 4 * MC_BANK_COUNT as usize],
            debug_ctl: 0,
            microcode_revision: 1 << 32,
        }
    }
}

/// Memory types that MTRRs may hold: UC WC WT WP WB.
fn is_memory_type(value: u64) -> bool {
    matches!(value, 0 | 1 | 4 | 5 | 6)
}

fn all_bytes(value: u64, allowed: impl Fn(u64) -> bool) -> bool {
    value.to_le_bytes().into_iter().all(|byte| allowed(u64::from(byte)))
}

fn fixed_index(msr: u32) -> Option<usize> {
    match msr {
        number::MTRR_FIXED_64K => Some(0),
        number::MTRR_FIXED_16K | 0x259 => Some((msr - number::MTRR_FIXED_16K) as usize + 1),
        number::MTRR_FIXED_4K..=0x26f => Some((msr - number::MTRR_FIXED_4K) as usize + 3),
        _ => None,
    }
}

impl Cpu {
    /// The guest's time-stamp counter.
    #[inline]
    pub fn tsc(&self) -> u64 {
        host_tsc().wrapping_add(self.tsc_offset)
    }

    /// Makes the guest's time-stamp counter run from `value` on.
    pub(crate) fn set_tsc_offset(&mut self, offset: u64) {
        self.tsc_offset = offset;
        self.apic.timer.tsc_changed(offset, host_tsc());
        self.update_system_time();
    }

    /// RDMSR. The caller has checked the privilege.
    pub fn read_msr(&mut self, msr: u32) -> Result<u64, Fault> {
        self.counters.msr += 1;
        match self.read_known_msr(msr) {
            Some(value) => Ok(value),
            None => {
                tracing::debug!(
                    msr = format_args!("{msr:#x}"),
                    rip = format_args!("{:#x}", self.rip),
                    "the guest reads an unknown MSR"
                );
                Err(self.raise_gp(0))
            }
        }
    }

    /// WRMSR. The caller has checked the privilege.
    pub fn write_msr(&mut self, msr: u32, value: u64) -> Result<(), Fault> {
        self.counters.msr += 1;
        match self.write_known_msr(msr, value) {
            Some(()) => Ok(()),
            None => {
                tracing::debug!(
                    msr = format_args!("{msr:#x}"),
                    value = format_args!("{value:#x}"),
                    rip = format_args!("{:#x}", self.rip),
                    "the guest writes an unknown MSR or a value that it cannot hold"
                );
                Err(self.raise_gp(0))
            }
        }
    }

    fn read_known_msr(&mut self, msr: u32) -> Option<u64> {
        Some(match msr {
            number::TSC => self.tsc(),
            number::TSC_ADJUST => self.msr.tsc_adjust,
            number::TSC_AUX => u64::from(self.tsc_aux),
            number::TSC_DEADLINE => {
                self.apic.poll_timer(host_tsc());
                self.apic.timer.tsc_deadline()
            }
            number::APIC_BASE => self.apic.base(),
            number::EFER => self.efer,
            number::STAR => self.system_call.star,
            number::LSTAR => self.system_call.lstar,
            number::CSTAR => self.system_call.cstar,
            number::FMASK => self.system_call.mask,
            number::FS_BASE => self.segments[usize::from(FS)].base,
            number::GS_BASE => self.segments[usize::from(GS)].base,
            number::KERNEL_GS_BASE => self.system_call.kernel_gs_base,
            number::SYSENTER_CS => self.system_call.sysenter_cs,
            number::SYSENTER_ESP => self.system_call.sysenter_esp,
            number::SYSENTER_EIP => self.system_call.sysenter_eip,
            number::PAT => self.msr.pat,
            // Variable pairs, fixed ranges, write-combining.
            number::MTRR_CAP => u64::from(MTRR_VARIABLES) | 1 << 8 | 1 << 10,
            number::MTRR_DEF_TYPE => self.msr.mtrr_def_type,
            number::MTRR_VARIABLE..0x210 => self.msr.mtrr_variable[(msr - number::MTRR_VARIABLE) as usize],
            number::MISC_ENABLE => self.msr.misc_enable,
            // Locked, nothing enabled.
            number::FEATURE_CONTROL => 1,
            number::PLATFORM_ID | number::SMI_COUNT | number::EBL_CR_POWERON => 0,
            number::PLATFORM_INFO => ((self.apic.timer.tsc_khz() / 100_000) & 0xff) << 8,
            number::MICROCODE_REVISION => self.msr.microcode_revision,
            number::PERF_STATUS => 1000 | 4 << 40,
            number::PERF_CTL => 0,
            number::DEBUG_CTL => self.msr.debug_ctl,
            number::LAST_BRANCH_FROM..=number::LAST_INTERRUPT_TO => 0,
            number::ARCH_CAPABILITIES if self.model.has(Feature::ArchCapabilities) => ARCH_CAPABILITIES,
            number::SPEC_CTRL if self.model.has(Feature::SpecCtrl) => self.msr.spec_ctrl,
            number::MCG_CAP => u64::from(MC_BANK_COUNT) | 1 << 8,
            number::MCG_STATUS => self.msr.mcg_status,
            number::MCG_CTL => self.msr.mcg_ctl,
            number::MC_BANKS..=0x427 => self.msr.mc_banks[(msr - number::MC_BANKS) as usize],
            x2apic::FIRST..=x2apic::LAST => self.read_x2apic(msr - x2apic::FIRST)?,
            _ => match fixed_index(msr) {
                Some(index) => self.msr.mtrr_fixed[index],
                None => self.read_paravirtual_msr(msr)?,
            },
        })
    }

    fn write_known_msr(&mut self, msr: u32, value: u64) -> Option<()> {
        let canonical = is_canonical(value, if self.model.has(Feature::La57) { 57 } else { 48 });
        match msr {
            number::TSC => {
                let offset = value.wrapping_sub(host_tsc());
                let change = offset.wrapping_sub(self.tsc_offset);
                self.msr.tsc_adjust = self.msr.tsc_adjust.wrapping_add(change);
                self.set_tsc_offset(offset);
            }
            number::TSC_ADJUST => {
                let change = value.wrapping_sub(self.msr.tsc_adjust);
                self.msr.tsc_adjust = value;
                self.set_tsc_offset(self.tsc_offset.wrapping_add(change));
            }
            number::TSC_AUX if value >> 32 == 0 => self.tsc_aux = value as u32,
            number::TSC_DEADLINE => {
                let now = host_tsc();
                self.apic.timer.set_tsc_deadline(value, self.tsc_offset, now);
                self.apic.poll_timer(now);
            }
            // Without x2APIC its bit is reserved.
            number::APIC_BASE if value & 1 << 10 == 0 || self.model.has(Feature::X2apic) => {
                self.apic.set_base(value).ok()?;
                self.set_apic_page();
            }
            number::EFER => self.set_efer(value).ok()?,
            number::STAR => self.system_call.star = value,
            number::LSTAR if canonical => self.system_call.lstar = value,
            number::CSTAR if canonical => self.system_call.cstar = value,
            number::FMASK if value >> 32 == 0 => self.system_call.mask = value,
            number::FS_BASE if canonical => self.segments[usize::from(FS)].base = value,
            number::GS_BASE if canonical => self.segments[usize::from(GS)].base = value,
            number::KERNEL_GS_BASE if canonical => self.system_call.kernel_gs_base = value,
            number::SYSENTER_CS => self.system_call.sysenter_cs = value & 0xffff_ffff,
            number::SYSENTER_ESP if canonical => self.system_call.sysenter_esp = value,
            number::SYSENTER_EIP if canonical => self.system_call.sysenter_eip = value,
            number::PAT if all_bytes(value, |kind| is_memory_type(kind) || kind == 7) => self.msr.pat = value,
            number::MTRR_DEF_TYPE if value & !0xcff == 0 && is_memory_type(value & 0xff) => {
                self.msr.mtrr_def_type = value;
            }
            number::MTRR_VARIABLE..0x210 => {
                let is_mask = msr & 1 != 0;
                let reserved = !((1u64 << PHYSICAL_BITS) - 1) | if is_mask { 0x7ff } else { 0xf00 };
                if value & reserved != 0 || !is_mask && !is_memory_type(value & 0xff) {
                    return None;
                }
                self.msr.mtrr_variable[(msr - number::MTRR_VARIABLE) as usize] = value;
            }
            number::MISC_ENABLE => {
                // XD disable and the limit of CPUID are kept without effect, as KVM keeps them.
                let fixed = 1 << 11 | 1 << 12;
                self.msr.misc_enable = value & !fixed | fixed;
            }
            number::MICROCODE_REVISION if value == 0 => {}
            number::MICROCODE_UPDATE | number::PERF_CTL => {}
            number::DEBUG_CTL if value & !0b11 == 0 => self.msr.debug_ctl = value,
            // IBRS, STIBP, SSBD and BHI_DIS_S.
            number::SPEC_CTRL if self.model.has(Feature::SpecCtrl) && value & !0x407 == 0 => {
                self.msr.spec_ctrl = value;
            }
            number::PRED_CMD if self.model.has(Feature::SpecCtrl) && value & !1 == 0 => {}
            number::MCG_STATUS if value == 0 => self.msr.mcg_status = 0,
            number::MCG_CTL if value == 0 || value == u64::MAX => self.msr.mcg_ctl = value,
            number::MC_BANKS..=0x427 => {
                // Control takes all or nothing; status is only cleared.
                let allowed = match msr & 3 {
                    0 => value == 0 || value == u64::MAX,
                    1 => value == 0,
                    _ => true,
                };
                if !allowed {
                    return None;
                }
                self.msr.mc_banks[(msr - number::MC_BANKS) as usize] = value;
            }
            x2apic::FIRST..=x2apic::LAST => self.write_x2apic(msr - x2apic::FIRST, value)?,
            _ => match fixed_index(msr) {
                Some(index) if all_bytes(value, is_memory_type) => self.msr.mtrr_fixed[index] = value,
                Some(_) => return None,
                None => self.write_paravirtual_msr(msr, value)?,
            },
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fault::vector;
    use crate::testbench::TestBench;

    fn read(bench: &mut TestBench, msr: u32) -> Option<u64> {
        let result = bench.cpu.read_msr(msr).ok();
        assert!(result.is_some() || bench.cpu.fault.vector == vector::GENERAL_PROTECTION);
        result
    }

    fn write(bench: &mut TestBench, msr: u32, value: u64) -> bool {
        bench.cpu.write_msr(msr, value).is_ok()
    }

    /// (register, values that it keeps, values that raise #GP)
    const TABLE: &[(u32, &[u64], &[u64])] = &[
        (number::STAR, &[u64::MAX], &[]),
        (number::LSTAR, &[0xffff_8000_0000_0000, 1], &[0x8000_0000_0000, 1 << 63]),
        (number::CSTAR, &[0xffff_8000_0000_0000], &[0x8000_0000_0000]),
        (number::FMASK, &[0xffff_ffff], &[1 << 32]),
        (number::FS_BASE, &[0x7fff_ffff_f000], &[1 << 47]),
        (number::GS_BASE, &[u64::MAX], &[1 << 47]),
        (number::KERNEL_GS_BASE, &[u64::MAX], &[1 << 47]),
        (number::SYSENTER_CS, &[0x10], &[]),
        (number::SYSENTER_ESP, &[0x1000], &[1 << 47]),
        (number::SYSENTER_EIP, &[0x1000], &[1 << 47]),
        (number::TSC_AUX, &[0xffff_ffff], &[1 << 32]),
        (number::PAT, &[0x0007_0406_0007_0406, 0x0505_0505_0505_0505], &[2, 3, 8]),
        (number::MTRR_DEF_TYPE, &[0, 0xc06], &[2, 0x1000, 0x106 | 1 << 8]),
        (0x200, &[0x8000_0006], &[2, 0x106, 1 << 40]),
        (0x201, &[0xff_f000_0800], &[1, 1 << 40]),
        (0x250, &[0x0606_0606_0606_0606], &[2]),
        (0x26f, &[0x0505_0505_0505_0505], &[7]),
        (number::SPEC_CTRL, &[0, 1, 0x407], &[8]),
        (number::MCG_STATUS, &[0], &[1]),
        (number::MCG_CTL, &[0, u64::MAX], &[1]),
        (0x400, &[u64::MAX, 0], &[]),
        (0x401, &[0], &[1]),
        (number::DEBUG_CTL, &[0, 3], &[1 << 6]),
        (number::MISC_ENABLE, &[0x1801, 0x1800, 1 << 34 | 0x1800], &[]),
        (number::EFER, &[0x501, 0xd01], &[1 << 1, 0]),
    ];

    #[test]
    fn registers_keep_what_they_may_hold_and_refuse_the_rest() {
        let mut bench = TestBench::new();
        for &(msr, good, bad) in TABLE {
            for &value in good {
                assert!(write(&mut bench, msr, value), "{msr:#x} refuses {value:#x}");
                assert_eq!(read(&mut bench, msr), Some(value), "{msr:#x}");
            }
            for &value in bad {
                assert!(!write(&mut bench, msr, value), "{msr:#x} takes {value:#x}");
            }
        }
    }

    #[test]
    fn read_only_registers_have_their_values_and_refuse_writes() {
        let mut bench = TestBench::new();
        for (msr, value) in [
            (number::MTRR_CAP, 0x508),
            (number::MCG_CAP, 0x10a),
            (number::ARCH_CAPABILITIES, ARCH_CAPABILITIES),
            (number::FEATURE_CONTROL, 1),
            (number::MICROCODE_REVISION, 1 << 32),
        ] {
            assert_eq!(read(&mut bench, msr), Some(value), "{msr:#x}");
            assert!(!write(&mut bench, msr, value), "{msr:#x}");
        }
        assert_eq!(read(&mut bench, number::PRED_CMD), None);
        assert!(write(&mut bench, number::PRED_CMD, 1) && !write(&mut bench, number::PRED_CMD, 2));
    }

    #[test]
    fn unknown_registers_fault() {
        let mut bench = TestBench::new();
        for msr in [0x13, 0xc1, 0x210, 0x428, 0x606, 0xc001_0015, 0x4b56_4d02, 0x4b56_4d06, u32::MAX] {
            assert_eq!(read(&mut bench, msr), None, "{msr:#x}");
            assert!(!write(&mut bench, msr, 0), "{msr:#x}");
        }
    }

    #[test]
    fn x2apic_registers_exist_only_in_x2apic_mode() {
        let mut bench = TestBench::new();
        assert_eq!(read(&mut bench, 0x802), None);
        let base = read(&mut bench, number::APIC_BASE).unwrap();
        assert_eq!((base, bench.cpu.apic_page), (0xfee0_0900, 0xfee00));
        assert!(write(&mut bench, number::APIC_BASE, base | 1 << 10));
        assert_eq!((read(&mut bench, 0x803), bench.cpu.apic_page), (Some(0x5_0014), u64::MAX));
        assert!(!write(&mut bench, 0x803, 0) && !write(&mut bench, 0x80e, 0) && write(&mut bench, 0x80b, 0));
    }

    #[test]
    fn writing_the_tsc_moves_the_adjustment_and_the_other_way_round() {
        let mut bench = TestBench::new();
        assert!(write(&mut bench, number::TSC_ADJUST, 1 << 50));
        let tsc = read(&mut bench, number::TSC).unwrap();
        assert!((1 << 50..1 << 51).contains(&tsc));
        assert!(write(&mut bench, number::TSC, 0));
        assert!(read(&mut bench, number::TSC).unwrap() < 1 << 40);
        let adjust = read(&mut bench, number::TSC_ADJUST).unwrap();
        assert!((adjust as i64) < 0, "{adjust:#x}");
        assert!(write(&mut bench, number::TSC_ADJUST, 0));
        assert!(read(&mut bench, number::TSC).unwrap() < 1 << 40);
    }

    #[test]
    fn a_tsc_deadline_in_the_past_interrupts_at_once() {
        let mut bench = TestBench::new();
        bench.cpu.store_local_apic(0xf0, 0x1ff, 4);
        bench.cpu.store_local_apic(0x320, 2 << 17 | 0xec, 4);
        assert!(write(&mut bench, number::TSC_DEADLINE, 1));
        assert_eq!(bench.cpu.apic.deliverable(), Some(0xec));
        assert_eq!(read(&mut bench, number::TSC_DEADLINE), Some(0));
        assert!(write(&mut bench, number::TSC_DEADLINE, u64::MAX));
        assert_eq!(read(&mut bench, number::TSC_DEADLINE), Some(u64::MAX));
    }

    #[test]
    fn the_local_apics_page_takes_aligned_double_words_only() {
        let mut bench = TestBench::new();
        bench.cpu.store_local_apic(0x80, 0x35, 4);
        assert_eq!((bench.cpu.load_local_apic(0x80, 4), bench.cpu.cr8()), (0x35, 3));
        bench.cpu.store_local_apic(0x80, 0x55, 1);
        bench.cpu.store_local_apic(0x84, 0x55, 4);
        assert_eq!(bench.cpu.load_local_apic(0x80, 8), 0x35);
        assert_eq!(bench.cpu.load_local_apic(0x32, 1), 0x05);
        assert_eq!(bench.cpu.load_local_apic(0x84, 4), 0);
        for offset in 0..4096 {
            for bytes in [1, 2, 4, 8] {
                bench.cpu.load_local_apic(offset, bytes);
                bench.cpu.store_local_apic(offset, u64::MAX, bytes);
            }
        }
    }

    #[test]
    fn no_value_in_any_register_is_a_panic() {
        let mut bench = TestBench::new();
        let ranges = [0..0x500u32, 0x6e0..0x6e1, 0x800..0x900, 0x4b56_4d00..0x4b56_4d10, 0xc000_0080..0xc000_0110];
        for msr in ranges.into_iter().flatten() {
            for value in
                [0, 1, 0xff, 0xfff, 0xffff_ffff, 1 << 47, 1 << 63, u64::MAX, u64::MAX - 1, 0x0606_0606_0606_0606]
            {
                let _ = bench.cpu.write_msr(msr, value);
                let _ = bench.cpu.read_msr(msr);
            }
        }
    }
}
