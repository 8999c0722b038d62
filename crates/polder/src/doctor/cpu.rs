//! The host's CPU: its level, and so the CPU models that guests can have.

use std::arch::is_x86_feature_detected as has;

use super::Finding;

/// The levels of the x86-64 psABI, chapter 3.1.1, as far as they matter to guests.
fn psabi_level() -> u32 {
    let v2 = has!("sse3") && has!("ssse3") && has!("sse4.1") && has!("sse4.2") && has!("popcnt") && has!("cmpxchg16b");
    let v3 =
        has!("avx") && has!("avx2") && has!("bmi1") && has!("bmi2") && has!("fma") && has!("lzcnt") && has!("movbe");
    let v4 = has!("avx512f") && has!("avx512bw") && has!("avx512cd") && has!("avx512dq") && has!("avx512vl");
    match (v2, v3, v4) {
        (false, ..) => 1,
        (true, false, _) => 2,
        (true, true, false) => 3,
        (true, true, true) => 4,
    }
}

/// What level the CPU has.
pub(super) fn level() -> Finding {
    let level = psabi_level();
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": ").map(|(_, name)| name));
    let name = name.unwrap_or("an x86-64 CPU");
    match level {
        1 => Finding::missing("cpu", format!("{name}, x86-64-v1"), "polder's CPU models need x86-64-v2 (SSE4.2)"),
        2 => Finding::good("cpu", format!("{name}, x86-64-v2: guests can have the model polder-v2")),
        _ => {
            Finding::good("cpu", format!("{name}, x86-64-v{level}: guests can have the models polder-v2 and polder-v3"))
        }
    }
}

/// How many CPUs there are for vCPUs.
pub(super) fn count() -> Finding {
    match std::thread::available_parallelism() {
        Ok(count) => Finding::good("cpus", format!("{count} usable")),
        Err(error) => Finding::missing("cpus", format!("cannot be counted: {error}"), "check /proc and the cgroup"),
    }
}
