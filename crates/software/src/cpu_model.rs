//! CPU models: what processor the guest sees.
//!
//! A model is a name for a set of features that never changes; `polder-v2` is x86-64-v2, `polder-v3` adds what x86-64-v3 has and the
//! cryptographic extensions. The features of a machine are its model's, cut to what the host can execute; instructions outside them
//! raise #UD ([`CpuModel::supports`]). Everything CPUID says comes from here (SDM vol. 2A, CPUID; leaves 0x4000_0000 and up as KVM has them).
//!
//! The vendor is Intel's: stock kernels then trust ARCH_CAPABILITIES, which tells them that the speculation bugs of real
//! processors are absent. Family 6, model 0x1b belongs to no product, so no list of errata names it.

use iced_x86::{CpuidFeature, DecoderOptions};

use crate::cpu_feature::{FEATURES, Level, Word};
use crate::page_walk::PHYSICAL_BITS;

pub use crate::cpu_feature::Feature;

/// IA32_ARCH_CAPABILITIES: RDCL_NO, IBRS_ALL, SKIP_L1DFL_VMENTRY, SSB_NO, MDS_NO, IF_PSCHANGE_MC_NO, TAA_NO, SBDR_SSDP_NO, FBSDP_NO, PSDP_NO,
/// BHI_NO, PBRSB_NO, GDS_NO, RFDS_NO, ITS_NO: the guest need not spend time on bugs that this processor does not have.
pub const ARCH_CAPABILITIES: u64 = 1 << 0
    | 1 << 1
    | 1 << 3
    | 1 << 4
    | 1 << 5
    | 1 << 6
    | 1 << 8
    | 1 << 13
    | 1 << 14
    | 1 << 15
    | 1 << 20
    | 1 << 24
    | 1 << 26
    | 1 << 27
    | 1 << 62;

/// Family 6, model 0x1b, stepping 1.
const SIGNATURE: u32 = 0x0001_06b1;
const LEAF_MAX: u32 = 0x16;
const HYPERVISOR_LEAF_MAX: u32 = 0x4000_0010;
const EXTENDED_LEAF_MAX: u32 = 0x8000_0008;
const BRAND: &[u8; 48] = b"polder virtual CPU\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";

/// KVM's paravirtual features that the engine has (leaf 0x4000_0001, EAX).
pub mod kvm_feature {
    pub const CLOCKSOURCE: u32 = 1 << 0;
    pub const NOP_IO_DELAY: u32 = 1 << 1;
    pub const CLOCKSOURCE2: u32 = 1 << 3;
    pub const PV_EOI: u32 = 1 << 6;
    pub const PV_UNHALT: u32 = 1 << 7;
    pub const PV_SEND_IPI: u32 = 1 << 11;
    pub const CLOCKSOURCE_STABLE: u32 = 1 << 24;
    /// All that are offered.
    pub const ALL: u32 =
        CLOCKSOURCE | NOP_IO_DELAY | CLOCKSOURCE2 | PV_EOI | PV_UNHALT | PV_SEND_IPI | CLOCKSOURCE_STABLE;
}

/// Frequency of the local APIC's timer before its divider: the crystal of leaf 0x15.
pub const APIC_TIMER_HZ: u64 = 25_000_000;

/// The named model cannot be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CpuModelError {
    /// No model has this name.
    #[error("there is no CPU model `{name}`; the models are polder-v2 and polder-v3")]
    UnknownModel { name: String },
    /// A feature to add or remove is unknown.
    #[error("there is no CPU feature `{name}`")]
    UnknownFeature { name: String },
    /// The host is older than the oldest model.
    #[error("the host CPU lacks {feature}, which every CPU model has")]
    HostTooOld { feature: &'static str },
}

/// A set of features with a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuModel {
    name: &'static str,
    features: u128,
    /// Features of the model that the host cannot execute.
    missing: u128,
}

/// What CPUID's answer depends on beside the model.
#[derive(Debug, Clone, Copy, Default)]
pub struct CpuidContext {
    pub apic_id: u32,
    pub vcpu_count: u32,
    pub cr4_osxsave: bool,
    pub cr4_pke: bool,
    pub apic_enabled: bool,
    pub xcr0: u64,
    pub tsc_khz: u64,
}

fn bit(feature: Feature) -> u128 {
    1 << feature as u32
}

/// What the host can execute.
fn host_has(feature: Feature) -> bool {
    use std::arch::is_x86_feature_detected as has;
    match feature {
        Feature::Sse3 => has!("sse3"),
        Feature::Pclmulqdq => has!("pclmulqdq"),
        Feature::Ssse3 => has!("ssse3"),
        Feature::Fma => has!("fma"),
        Feature::Cx16 => has!("cmpxchg16b"),
        Feature::Sse41 => has!("sse4.1"),
        Feature::Sse42 => has!("sse4.2"),
        Feature::Movbe => has!("movbe"),
        Feature::Popcnt => has!("popcnt"),
        Feature::Aes => has!("aes"),
        Feature::Xsave | Feature::Avx => has!("avx"),
        Feature::F16c => has!("f16c"),
        Feature::Rdrand => has!("rdrand"),
        Feature::Bmi1 => has!("bmi1"),
        Feature::Avx2 => has!("avx2"),
        Feature::Bmi2 => has!("bmi2"),
        Feature::Rdseed => has!("rdseed"),
        Feature::Adx => has!("adx"),
        Feature::Sha => has!("sha"),
        Feature::Lzcnt => has!("lzcnt"),
        // The rest is the engine's own work.
        _ => true,
    }
}

impl CpuModel {
    /// The newest model.
    pub const NEWEST: &'static str = "polder-v3";

    /// The model with this name, cut to what the host has, with extra features (`+pku`, `+la57`, or `-avx2` to take one away).
    pub fn named(name: &str, changes: &[&str]) -> Result<Self, CpuModelError> {
        Self::on_host(name, changes, host_has)
    }

    /// A model from text as people write it: `polder-v3,+pku,-avx2`.
    pub fn parse(text: &str) -> Result<Self, CpuModelError> {
        let mut words = text.split(',').map(str::trim);
        let name = words.next().unwrap_or_default();
        Self::named(name, &words.collect::<Vec<_>>())
    }

    fn on_host(name: &str, changes: &[&str], host_has: impl Fn(Feature) -> bool) -> Result<Self, CpuModelError> {
        let (name, is_v3) = match name {
            "polder-v2" => ("polder-v2", false),
            "polder-v3" => ("polder-v3", true),
            _ => return Err(CpuModelError::UnknownModel { name: name.to_owned() }),
        };
        let mut model = CpuModel { name, features: 0, missing: 0 };
        for &(feature, feature_name, _, _, level) in FEATURES {
            let wanted = matches!(level, Level::Base | Level::BaseHost) || level == Level::V3 && is_v3;
            if wanted && host_has(feature) {
                model.features |= bit(feature);
            } else if wanted && level == Level::BaseHost {
                return Err(CpuModelError::HostTooOld { feature: feature_name });
            } else if wanted {
                model.missing |= bit(feature);
            }
        }
        for change in changes {
            let (add, wanted) = match change.split_at_checked(1) {
                Some(("-", rest)) => (false, rest),
                Some(("+", rest)) => (true, rest),
                _ => (true, *change),
            };
            let Some(&(feature, ..)) = FEATURES.iter().find(|entry| entry.1 == wanted) else {
                return Err(CpuModelError::UnknownFeature { name: wanted.to_owned() });
            };
            if !add {
                model.features &= !bit(feature);
            } else if host_has(feature) {
                model.features |= bit(feature);
            } else {
                model.missing |= bit(feature);
            }
        }
        // Without the state there is nothing that uses it.
        if !model.has(Feature::Xsave) {
            for feature in [Feature::Avx, Feature::Xsaveopt, Feature::Xsavec, Feature::Xgetbv1, Feature::Pku] {
                model.features &= !bit(feature);
            }
        }
        if !model.has(Feature::Avx) {
            for feature in [Feature::Avx2, Feature::Fma, Feature::F16c] {
                model.features &= !bit(feature);
            }
        }
        Ok(model)
    }

    /// The model's name.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Names of the model's features that the host cannot execute and the guest therefore does not see.
    pub fn missing(&self) -> impl Iterator<Item = &'static str> + '_ {
        FEATURES.iter().filter(|entry| self.missing & bit(entry.0) != 0).map(|entry| entry.1)
    }

    /// Whether the processor has a feature.
    #[inline]
    pub fn has(&self, feature: Feature) -> bool {
        self.features & bit(feature) != 0
    }

    /// How bytes are decoded: where a feature is missing, its prefix is ignored (`rep bsf` is TZCNT only with BMI1).
    pub fn decoder_options(&self) -> u32 {
        let mut options = DecoderOptions::NO_WBNOINVD;
        if !self.has(Feature::Bmi1) {
            options |= DecoderOptions::NO_MPFX_0FBC;
        }
        if !self.has(Feature::Lzcnt) {
            options |= DecoderOptions::NO_MPFX_0FBD;
        }
        options
    }

    /// Whether instructions of this kind exist; `false` means #UD.
    pub fn supports(&self, kind: CpuidFeature) -> bool {
        use CpuidFeature as Kind;
        let feature = match kind {
            Kind::INTEL8086
            | Kind::INTEL8086_ONLY
            | Kind::INTEL186
            | Kind::INTEL286
            | Kind::INTEL386
            | Kind::INTEL486
            | Kind::X64
            | Kind::CPUID
            | Kind::FPU
            | Kind::FPU287
            | Kind::FPU387
            | Kind::MULTIBYTENOP
            | Kind::PAUSE
            | Kind::RDPMC
            | Kind::UDBG
            | Kind::VMX
            | Kind::SVM => return true,
            // Executed as the hints and no-operations that they are on processors without them.
            Kind::CET_IBT | Kind::CET_SS | Kind::MPX | Kind::CLDEMOTE | Kind::PREFETCHWT1 | Kind::PREFETCHITI => {
                return true;
            }
            Kind::ADX => Feature::Adx,
            Kind::AES => Feature::Aes,
            Kind::AVX => Feature::Avx,
            Kind::AVX2 => Feature::Avx2,
            Kind::BMI1 => Feature::Bmi1,
            Kind::BMI2 => Feature::Bmi2,
            Kind::CLFLUSHOPT => Feature::Clflushopt,
            Kind::CLFSH => Feature::Clfsh,
            Kind::CLWB => Feature::Clwb,
            Kind::CMOV => Feature::Cmov,
            Kind::CMPXCHG16B => Feature::Cx16,
            Kind::CX8 => Feature::Cx8,
            Kind::F16C => Feature::F16c,
            Kind::FMA => Feature::Fma,
            Kind::FSGSBASE => Feature::Fsgsbase,
            Kind::FXSR => Feature::Fxsr,
            Kind::INVPCID => Feature::Invpcid,
            Kind::LZCNT => Feature::Lzcnt,
            Kind::MMX => Feature::Mmx,
            Kind::MOVBE => Feature::Movbe,
            Kind::MSR => Feature::Msr,
            Kind::PCLMULQDQ => Feature::Pclmulqdq,
            Kind::PKU => Feature::Pku,
            Kind::POPCNT => Feature::Popcnt,
            Kind::PREFETCHW | Kind::D3NOW => Feature::Prefetchw,
            Kind::RDPID => Feature::Rdpid,
            Kind::RDRAND => Feature::Rdrand,
            Kind::RDSEED => Feature::Rdseed,
            Kind::RDTSCP => Feature::Rdtscp,
            Kind::SEP => Feature::Sep,
            Kind::SHA => Feature::Sha,
            Kind::SMAP => Feature::Smap,
            Kind::SSE => Feature::Sse,
            Kind::SSE2 => Feature::Sse2,
            Kind::SSE3 => Feature::Sse3,
            Kind::SSE4_1 => Feature::Sse41,
            Kind::SSE4_2 => Feature::Sse42,
            Kind::SSSE3 => Feature::Ssse3,
            Kind::SYSCALL => Feature::Syscall,
            Kind::TSC => Feature::Tsc,
            Kind::XSAVE => Feature::Xsave,
            Kind::XSAVEC => Feature::Xsavec,
            Kind::XSAVEOPT => Feature::Xsaveopt,
            _ => return false,
        };
        self.has(feature)
    }

    /// State components that XCR0 may have: x87, SSE, AVX, PKRU.
    pub fn xcr0_mask(&self) -> u64 {
        let avx = if self.has(Feature::Avx) { 1 << 2 } else { 0 };
        let pkru = if self.has(Feature::Pku) { 1 << 9 } else { 0 };
        3 | avx | pkru
    }

    /// Bytes of the standard XSAVE area for these components.
    pub fn xsave_len(xcr0: u64) -> u32 {
        if xcr0 & 1 << 9 != 0 {
            2696
        } else if xcr0 & 1 << 2 != 0 {
            832
        } else {
            576
        }
    }

    /// Bytes of the compacted XSAVE area for these components.
    pub fn xsave_compacted_len(xcr0: u64) -> u32 {
        576 + if xcr0 & 1 << 2 != 0 { 256 } else { 0 } + if xcr0 & 1 << 9 != 0 { 8 } else { 0 }
    }

    fn word(&self, word: Word) -> u32 {
        FEATURES.iter().filter(|entry| entry.2 == word && self.has(entry.0)).fold(0, |bits, entry| bits | 1 << entry.3)
    }

    /// CPUID: EAX, EBX, ECX, EDX.
    pub fn cpuid(&self, leaf: u32, subleaf: u32, context: &CpuidContext) -> [u32; 4] {
        match leaf {
            0..=LEAF_MAX => self.basic_leaf(leaf, subleaf, context),
            0x4000_0000 => [HYPERVISOR_LEAF_MAX, 0x4b4d_564b, 0x564b_4d56, 0x4d],
            0x4000_0001 => [kvm_feature::ALL, 0, 0, 0],
            HYPERVISOR_LEAF_MAX => [context.tsc_khz as u32, (APIC_TIMER_HZ / 1000) as u32, 0, 0],
            0x4000_0002..HYPERVISOR_LEAF_MAX => [0; 4],
            0x8000_0000..=EXTENDED_LEAF_MAX => self.extended_leaf(leaf),
            // Above the highest leaf Intel answers as for the highest basic leaf.
            _ => self.basic_leaf(LEAF_MAX, subleaf, context),
        }
    }

    fn basic_leaf(&self, leaf: u32, subleaf: u32, context: &CpuidContext) -> [u32; 4] {
        let count = context.vcpu_count.max(1);
        let core_bits = u32::BITS - (count - 1).leading_zeros();
        match leaf {
            0 => [LEAF_MAX, u32::from_le_bytes(*b"Genu"), u32::from_le_bytes(*b"ntel"), u32::from_le_bytes(*b"ineI")],
            1 => {
                let logical = if count > 1 { 1 << core_bits } else { 1 };
                let mut ecx = self.word(Word::Leaf1Ecx);
                let mut edx = self.word(Word::Leaf1Edx);
                if context.cr4_osxsave && self.has(Feature::Xsave) {
                    ecx |= 1 << 27;
                }
                if !context.apic_enabled {
                    edx &= !(1 << 9);
                }
                if count > 1 {
                    edx |= 1 << 28;
                }
                [SIGNATURE, context.apic_id << 24 | logical << 16 | 8 << 8, ecx, edx]
            }
            // All about caches is in leaf 4.
            2 => [0x00fe_ff01, 0, 0, 0x00ff_0000],
            4 => cache_leaf(subleaf, core_bits),
            // The local APIC's timer runs whatever the processor does.
            6 => [1 << 2, 0, 0, 0],
            7 if subleaf == 0 => {
                let mut ecx = self.word(Word::Leaf7Ecx);
                if context.cr4_pke && self.has(Feature::Pku) {
                    ecx |= 1 << 4;
                }
                [2, self.word(Word::Leaf7Ebx), ecx, self.word(Word::Leaf7Edx)]
            }
            7 if subleaf == 2 => [0, 0, 0, self.word(Word::Leaf7Sub2Edx)],
            0xb => match subleaf {
                0 => [0, 1, 1 << 8, context.apic_id],
                1 => [core_bits, count, 2 << 8 | 1, context.apic_id],
                _ => [0, 0, subleaf & 0xff, context.apic_id],
            },
            0xd if self.has(Feature::Xsave) => match subleaf {
                0 => [self.xcr0_mask() as u32, Self::xsave_len(context.xcr0), Self::xsave_len(self.xcr0_mask()), 0],
                1 => [self.word(Word::LeafDEax), Self::xsave_compacted_len(context.xcr0), 0, 0],
                2 if self.has(Feature::Avx) => [256, 576, 0, 0],
                9 if self.has(Feature::Pku) => [8, 2688, 0, 0],
                _ => [0; 4],
            },
            0x15 => {
                // The largest fraction whose product with the crystal's kHz fits 32 bits, as kernels multiply first.
                let crystal_khz = APIC_TIMER_HZ / 1000;
                let tsc_khz = context.tsc_khz.max(1);
                let denominator = (u64::from(u32::MAX) / tsc_khz).clamp(1, 1000);
                let numerator = (tsc_khz * denominator + crystal_khz / 2) / crystal_khz;
                [denominator as u32, numerator as u32, APIC_TIMER_HZ as u32, 0]
            }
            0x16 => {
                let mhz = (context.tsc_khz / 1000) as u32 & 0xffff;
                [mhz, mhz, 25, 0]
            }
            _ => [0; 4],
        }
    }

    fn extended_leaf(&self, leaf: u32) -> [u32; 4] {
        match leaf {
            0x8000_0000 => [EXTENDED_LEAF_MAX, 0, 0, 0],
            0x8000_0001 => [0, 0, self.word(Word::Extended1Ecx), self.word(Word::Extended1Edx)],
            0x8000_0002..=0x8000_0004 => {
                let start = (leaf - 0x8000_0002) as usize * 16;
                std::array::from_fn(|index| {
                    let at = start + 4 * index;
                    u32::from_le_bytes([BRAND[at], BRAND[at + 1], BRAND[at + 2], BRAND[at + 3]])
                })
            }
            // 1 MiB of second-level cache, 16 ways, 64-byte lines.
            0x8000_0006 => [0, 0, 1024 << 16 | 8 << 12 | 64, 0],
            0x8000_0007 => [0, 0, 0, self.word(Word::Extended7Edx)],
            0x8000_0008 => {
                let linear_bits = if self.has(Feature::La57) { 57 } else { 48 };
                [PHYSICAL_BITS | linear_bits << 8, 0, 0, 0]
            }
            _ => [0; 4],
        }
    }
}

/// Leaf 4: 32 KiB of first-level cache each, 1 MiB second, 16 MiB third shared by all.
fn cache_leaf(subleaf: u32, core_bits: u32) -> [u32; 4] {
    let cores = ((1u32 << core_bits) - 1).min(63);
    let cache = |kind: u32, level: u32, sharing: u32, ways: u32, sets: u32| {
        [kind | level << 5 | 1 << 8 | sharing << 14 | cores << 26, (ways - 1) << 22 | 63, sets - 1, 0]
    };
    match subleaf {
        0 => cache(1, 1, 0, 8, 64),
        1 => cache(2, 1, 0, 8, 64),
        2 => cache(3, 2, 0, 16, 1024),
        3 => cache(3, 3, (1 << core_bits) - 1, 16, 16384),
        _ => [0; 4],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(name: &str, changes: &[&str]) -> CpuModel {
        CpuModel::on_host(name, changes, |_| true).unwrap()
    }

    const CONTEXT: CpuidContext = CpuidContext {
        apic_id: 2,
        vcpu_count: 4,
        cr4_osxsave: true,
        cr4_pke: false,
        apic_enabled: true,
        xcr0: 7,
        tsc_khz: 2_500_000,
    };

    /// What a guest of each release sees may not change: a new set of features is a new model.
    #[test]
    fn the_models_cpuid_is_what_it_was() {
        let table = [
            (0, 0, [0x16, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
            (1, 0, [0x106b1, 0x0204_0800, 0xfffa_3203, 0x1f8b_fbfd]),
            (2, 0, [0x00fe_ff01, 0, 0, 0x00ff_0000]),
            (4, 0, [0x0c00_0121, 0x01c0_003f, 63, 0]),
            (4, 3, [0x0c00_c163, 0x03c0_003f, 16383, 0]),
            (4, 4, [0; 4]),
            (6, 0, [4, 0, 0, 0]),
            (7, 0, [2, 0x209c_07ab, 0x0040_0004, 0xac00_0010]),
            (7, 1, [0; 4]),
            (7, 2, [0, 0, 0, 0x10]),
            (0xb, 0, [0, 1, 0x100, 2]),
            (0xb, 1, [2, 4, 0x201, 2]),
            (0xb, 2, [0, 0, 2, 2]),
            (0xd, 0, [7, 832, 832, 0]),
            (0xd, 1, [7, 832, 0, 0]),
            (0xd, 2, [256, 576, 0, 0]),
            (0x15, 0, [1000, 100_000, 25_000_000, 0]),
            (0x16, 0, [2500, 2500, 25, 0]),
            (0x4000_0000, 0, [0x4000_0010, 0x4b4d_564b, 0x564b_4d56, 0x4d]),
            (0x4000_0001, 0, [0x0100_08cb, 0, 0, 0]),
            (0x4000_0010, 0, [2_500_000, 25_000, 0, 0]),
            (0x8000_0000, 0, [0x8000_0008, 0, 0, 0]),
            (0x8000_0001, 0, [0, 0, 0x121, 0x2c10_0800]),
            (0x8000_0007, 0, [0, 0, 0, 0x100]),
            (0x8000_0008, 0, [0x3028, 0, 0, 0]),
        ];
        let v3 = model("polder-v3", &[]);
        for (leaf, subleaf, expected) in table {
            let got = v3.cpuid(leaf, subleaf, &CONTEXT);
            assert_eq!(got, expected, "{leaf:#x}.{subleaf}: {got:#x?}");
        }
        let v2 = model("polder-v2", &[]);
        let old = [
            (1, 0, [0x106b1, 0x0204_0800, 0x81ba_2201, 0x1f8b_fbfd]),
            (7, 0, [2, 0x0010_0683, 0x0040_0004, 0xac00_0010]),
            (0xd, 0, [0; 4]),
            (0x8000_0001, 0, [0, 0, 0x101, 0x2c10_0800]),
        ];
        for (leaf, subleaf, expected) in old {
            let got = v2.cpuid(leaf, subleaf, &CONTEXT);
            assert_eq!(got, expected, "{leaf:#x}.{subleaf}: {got:#x?}");
        }
    }

    #[test]
    fn the_brand_is_polders() {
        let model = model("polder-v3", &[]);
        let bytes: Vec<u8> =
            (2..5).flat_map(|leaf| model.cpuid(0x8000_0000 + leaf, 0, &CONTEXT)).flat_map(u32::to_le_bytes).collect();
        assert!(bytes.starts_with(b"polder virtual CPU\0"));
    }

    #[test]
    fn a_feature_that_the_host_lacks_is_not_shown_and_not_executed() {
        let model = CpuModel::on_host("polder-v3", &[], |feature| feature != Feature::Avx).unwrap();
        assert!(!model.supports(CpuidFeature::AVX) && !model.supports(CpuidFeature::AVX2));
        assert!(model.supports(CpuidFeature::SSE4_2) && model.supports(CpuidFeature::XSAVE));
        assert_eq!(model.cpuid(0xd, 0, &CONTEXT)[0], 3);
        assert_eq!(model.missing().collect::<Vec<_>>(), ["avx"]);
        assert!(CpuModel::on_host("polder-v2", &[], |feature| feature != Feature::Sse42).is_err());
    }

    #[test]
    fn features_come_and_go_by_name() {
        let model = model("polder-v3", &["+pku", "la57", "-avx2"]);
        assert!(model.has(Feature::Pku) && model.has(Feature::La57) && !model.has(Feature::Avx2));
        assert_eq!(model.xcr0_mask(), 0x207);
        assert_eq!(model.cpuid(0xd, 9, &CONTEXT), [8, 2688, 0, 0]);
        assert_eq!(model.cpuid(0x8000_0008, 0, &CONTEXT)[0], 0x3928);
        assert!(matches!(CpuModel::named("polder-v3", &["+warp"]), Err(CpuModelError::UnknownFeature { .. })));
        assert!(matches!(CpuModel::named("pentium", &[]), Err(CpuModelError::UnknownModel { .. })));
    }

    #[test]
    fn every_feature_has_a_bit_of_its_own() {
        for (index, first) in FEATURES.iter().enumerate() {
            for second in &FEATURES[index + 1..] {
                assert!((first.2, first.3) != (second.2, second.3) && first.1 != second.1, "{} {}", first.1, second.1);
            }
        }
    }

    #[test]
    fn the_tsc_frequency_of_leaf_15_is_right_and_its_product_fits() {
        for tsc_khz in [999_999, 1_000_000, 2_596_120, 3_333_333, 4_294_000, 6_000_000] {
            let [denominator, numerator, crystal, _] =
                model("polder-v3", &[]).cpuid(0x15, 0, &CpuidContext { tsc_khz, ..CONTEXT });
            let khz = u64::from(crystal) / 1000 * u64::from(numerator) / u64::from(denominator);
            assert!(khz.abs_diff(tsc_khz) <= 25, "{tsc_khz}: {khz}");
            assert!(u64::from(crystal) / 1000 * u64::from(numerator) < 1 << 33);
        }
    }
}
