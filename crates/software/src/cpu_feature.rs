//! Processor features: their names, where CPUID reports them, and which models have them.
//!
//! Invariant: a line of this table never changes its models once a release had it; a new set of features is a new model.

/// Where CPUID reports a feature.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Word {
    Leaf1Ecx,
    Leaf1Edx,
    Leaf7Ebx,
    Leaf7Ecx,
    Leaf7Edx,
    Leaf7Sub2Edx,
    LeafDEax,
    Extended1Ecx,
    Extended1Edx,
    Extended7Edx,
    /// Nowhere.
    Hidden,
}

/// In which models a feature is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Level {
    /// In all, and executed without help from the host beyond x86-64 with SSE2.
    Base,
    /// In all; the host must have it.
    BaseHost,
    /// From `polder-v3` on; the host must have it.
    V3,
    /// Only when asked for by name.
    Extra,
}

macro_rules! features {
    ($($feature:ident $name:literal $word:ident $bit:literal $level:ident)*) => {
        /// A processor feature.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum Feature { $($feature),* }

        /// Feature, name, place in CPUID, and in which models it is.
        pub(crate) const FEATURES: &[(Feature, &str, Word, u32, Level)] =
            &[$((Feature::$feature, $name, Word::$word, $bit, Level::$level)),*];
    };
}

features! {
    Fpu "fpu" Leaf1Edx 0 Base
    De "de" Leaf1Edx 2 Base
    Pse "pse" Leaf1Edx 3 Base
    Tsc "tsc" Leaf1Edx 4 Base
    Msr "msr" Leaf1Edx 5 Base
    Pae "pae" Leaf1Edx 6 Base
    Mce "mce" Leaf1Edx 7 Base
    Cx8 "cx8" Leaf1Edx 8 Base
    Apic "apic" Leaf1Edx 9 Base
    Sep "sep" Leaf1Edx 11 Base
    Mtrr "mtrr" Leaf1Edx 12 Base
    Pge "pge" Leaf1Edx 13 Base
    Mca "mca" Leaf1Edx 14 Base
    Cmov "cmov" Leaf1Edx 15 Base
    Pat "pat" Leaf1Edx 16 Base
    Pse36 "pse36" Leaf1Edx 17 Base
    Clfsh "clflush" Leaf1Edx 19 Base
    Mmx "mmx" Leaf1Edx 23 Base
    Fxsr "fxsr" Leaf1Edx 24 Base
    Sse "sse" Leaf1Edx 25 Base
    Sse2 "sse2" Leaf1Edx 26 Base
    Ss "ss" Leaf1Edx 27 Base
    Sse3 "sse3" Leaf1Ecx 0 BaseHost
    Pclmulqdq "pclmulqdq" Leaf1Ecx 1 V3
    Ssse3 "ssse3" Leaf1Ecx 9 BaseHost
    Fma "fma" Leaf1Ecx 12 V3
    Cx16 "cx16" Leaf1Ecx 13 BaseHost
    Pcid "pcid" Leaf1Ecx 17 Base
    Sse41 "sse4.1" Leaf1Ecx 19 BaseHost
    Sse42 "sse4.2" Leaf1Ecx 20 BaseHost
    X2apic "x2apic" Leaf1Ecx 21 Base
    Movbe "movbe" Leaf1Ecx 22 V3
    Popcnt "popcnt" Leaf1Ecx 23 BaseHost
    TscDeadline "tsc-deadline" Leaf1Ecx 24 Base
    Aes "aes" Leaf1Ecx 25 V3
    Xsave "xsave" Leaf1Ecx 26 V3
    Avx "avx" Leaf1Ecx 28 V3
    F16c "f16c" Leaf1Ecx 29 V3
    Rdrand "rdrand" Leaf1Ecx 30 V3
    Hypervisor "hypervisor" Leaf1Ecx 31 Base
    Fsgsbase "fsgsbase" Leaf7Ebx 0 Base
    TscAdjust "tsc-adjust" Leaf7Ebx 1 Base
    Bmi1 "bmi1" Leaf7Ebx 3 V3
    Avx2 "avx2" Leaf7Ebx 5 V3
    Smep "smep" Leaf7Ebx 7 Base
    Bmi2 "bmi2" Leaf7Ebx 8 V3
    Erms "erms" Leaf7Ebx 9 Base
    Invpcid "invpcid" Leaf7Ebx 10 Base
    Rdseed "rdseed" Leaf7Ebx 18 V3
    Adx "adx" Leaf7Ebx 19 V3
    Smap "smap" Leaf7Ebx 20 Base
    Clflushopt "clflushopt" Leaf7Ebx 23 V3
    Clwb "clwb" Leaf7Ebx 24 Extra
    Sha "sha" Leaf7Ebx 29 V3
    Umip "umip" Leaf7Ecx 2 Base
    Pku "pku" Leaf7Ecx 3 Extra
    La57 "la57" Leaf7Ecx 16 Extra
    Rdpid "rdpid" Leaf7Ecx 22 Base
    Fsrm "fsrm" Leaf7Edx 4 Base
    SpecCtrl "spec-ctrl" Leaf7Edx 26 Base
    Stibp "stibp" Leaf7Edx 27 Base
    ArchCapabilities "arch-capabilities" Leaf7Edx 29 Base
    Ssbd "ssbd" Leaf7Edx 31 Base
    BhiCtrl "bhi-ctrl" Leaf7Sub2Edx 4 Base
    Xsaveopt "xsaveopt" LeafDEax 0 V3
    Xsavec "xsavec" LeafDEax 1 V3
    Xgetbv1 "xgetbv1" LeafDEax 2 V3
    Lahf "lahf" Extended1Ecx 0 Base
    Lzcnt "lzcnt" Extended1Ecx 5 V3
    Prefetchw "prefetchw" Extended1Ecx 8 Base
    Syscall "syscall" Extended1Edx 11 Base
    Nx "nx" Extended1Edx 20 Base
    Pdpe1gb "pdpe1gb" Extended1Edx 26 Base
    Rdtscp "rdtscp" Extended1Edx 27 Base
    Lm "lm" Extended1Edx 29 Base
    InvariantTsc "invtsc" Extended7Edx 8 Base
    SyscallCompat "syscall-compat" Hidden 0 Extra
}

const _: () = assert!(FEATURES.len() <= 128);
