//! The time-stamp counter and its frequency.
//!
//! The guest's TSC is the host's plus an offset, so RDTSC costs the guest one host instruction. All timers of the engine are kept in
//! host TSC ticks. The frequency is what the host's CPUID says, else it is measured once against the monotonic clock.

use std::arch::x86_64::{__cpuid, __cpuid_count, _rdtsc};
use std::sync::OnceLock;

use polder_basics::{Clock, SystemClock};

/// No deadline.
pub const NEVER: u64 = u64::MAX;

/// The host's time-stamp counter.
#[inline(always)]
pub fn host_tsc() -> u64 {
    // SAFETY: every x86-64 CPU has RDTSC; the kernel leaves it open to programs.
    unsafe { _rdtsc() }
}

/// Frequency of the host's TSC in kHz; measured at most once in the life of the process.
pub fn tsc_khz() -> u64 {
    static KHZ: OnceLock<u64> = OnceLock::new();
    *KHZ.get_or_init(|| from_cpuid().unwrap_or_else(measure))
}

/// Leaf 0x15, or the hypervisor's leaf 0x4000_0010.
fn from_cpuid() -> Option<u64> {
    let highest = __cpuid(0).eax;
    if highest >= 0x15 {
        let leaf = __cpuid_count(0x15, 0);
        if leaf.eax != 0 && leaf.ebx != 0 && leaf.ecx != 0 {
            return Some(u64::from(leaf.ecx) * u64::from(leaf.ebx) / u64::from(leaf.eax) / 1000);
        }
    }
    let under_hypervisor = __cpuid(1).ecx & 1 << 31 != 0;
    if under_hypervisor && (0x4000_0010..0x4000_1000).contains(&__cpuid(0x4000_0000).eax) {
        let khz = __cpuid(0x4000_0010).eax;
        return (khz != 0).then_some(u64::from(khz));
    }
    None
}

/// Both clocks as close together as three tries get them.
fn both_clocks() -> (u64, u64) {
    let mut best = (u64::MAX, 0, 0);
    for _ in 0..8 {
        let before = host_tsc();
        let ns = SystemClock.monotonic_ns();
        let after = host_tsc();
        if after - before < best.0 {
            best = (after - before, before + (after - before) / 2, ns);
        }
    }
    (best.1, best.2)
}

/// Twenty milliseconds give about ten parts per million.
fn measure() -> u64 {
    let (start_tsc, start_ns) = both_clocks();
    while SystemClock.monotonic_ns().wrapping_sub(start_ns) < 20_000_000 {
        std::hint::spin_loop();
    }
    let (end_tsc, end_ns) = both_clocks();
    let khz = u128::from(end_tsc - start_tsc) * 1_000_000 / u128::from((end_ns - start_ns).max(1));
    (khz as u64).max(1)
}

/// Nanoseconds in that many ticks.
pub fn ticks_to_ns(ticks: u64, khz: u64) -> u64 {
    u64::try_from(u128::from(ticks) * 1_000_000 / u128::from(khz.max(1))).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_frequency_is_that_of_a_real_processor() {
        assert!((100_000..20_000_000).contains(&tsc_khz()), "{}", tsc_khz());
        assert_eq!(tsc_khz(), tsc_khz());
    }

    #[test]
    fn ticks_convert_without_overflow() {
        assert_eq!(ticks_to_ns(2_500_000, 2_500_000), 1_000_000);
        assert_eq!(ticks_to_ns(u64::MAX, 1), u64::MAX);
    }
}
