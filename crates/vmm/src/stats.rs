//! What a run measured, as `--stats` writes it.

use std::collections::BTreeMap;

use serde::Serialize;

/// Points in time, in nanoseconds of the host's `CLOCK_MONOTONIC`.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Times {
    /// The process began; the caller says when.
    pub process_start_ns: u64,
    /// The first machine was built and its vCPU threads were waiting.
    pub vmm_ready_ns: u64,
    /// The first vCPU entered guest code.
    pub first_vcpu_entry_ns: Option<u64>,
    /// A vCPU ran its first instruction at privilege level 3.
    pub first_user_instruction_ns: Option<u64>,
    /// The last vCPU had stopped.
    pub end_ns: u64,
}

/// Memory of the process, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct MemoryStats {
    /// What the guest was given.
    pub guest_ram_bytes: u64,
    /// How much of it the host holds.
    pub guest_ram_resident_bytes: u64,
    /// Resident memory that is not guest RAM, at the end.
    pub outside_guest_ram_bytes: u64,
    /// The most that was seen, looking once a second.
    pub outside_guest_ram_bytes_max: u64,
    /// Page tables of the process.
    pub page_tables_bytes: u64,
}

/// Everything.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Stats {
    /// Version of this format.
    pub version: u32,
    pub engine: String,
    /// How the run ended, in one word.
    pub outcome: String,
    /// Power-ons: one more than the resets that were followed by a reboot.
    pub boots: u32,
    pub times: Times,
    /// Sums over all vCPUs of the last boot: instructions, exits by kind, interrupts.
    pub counters: BTreeMap<&'static str, u64>,
    /// The same for each vCPU.
    pub vcpus: Vec<BTreeMap<&'static str, u64>>,
    pub memory: MemoryStats,
}

/// The version of the format that [`Stats`] is.
pub(crate) const STATS_VERSION: u32 = 1;
/// The counter that is a time and not a count: when a vCPU ran its first user-space instruction.
pub(crate) const FIRST_USER_NS: &str = "first_user_instruction_ns";
/// Counters of this end are no counts but the longest of something.
const LONGEST: &str = "_max";

impl Stats {
    /// Takes in what the vCPUs counted.
    pub(crate) fn take_counters(&mut self, vcpus: Vec<Vec<(&'static str, u64)>>) {
        self.counters.clear();
        self.vcpus.clear();
        for counters in vcpus {
            let mut one = BTreeMap::new();
            for (name, value) in counters {
                if name == FIRST_USER_NS {
                    let first = self.times.first_user_instruction_ns.unwrap_or(u64::MAX);
                    if value != 0 {
                        self.times.first_user_instruction_ns = Some(first.min(value));
                    }
                } else {
                    *one.entry(name).or_default() += value;
                    let total = self.counters.entry(name).or_default();
                    *total = if name.ends_with(LONGEST) { value.max(*total) } else { value + *total };
                }
            }
            self.vcpus.push(one);
        }
    }
}

impl MemoryStats {
    /// Looks at the process. Guest RAM is the only shared memory that it has.
    pub(crate) fn look(&mut self) {
        let Ok(status) = std::fs::read_to_string("/proc/self/status") else { return };
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            line.split_whitespace().next()?.parse::<u64>().ok().map(|kib| kib * 1024)
        };
        let field = |name: &str| field(name).unwrap_or(0);
        self.guest_ram_resident_bytes = field("RssShmem:");
        self.outside_guest_ram_bytes = field("RssAnon:") + field("RssFile:");
        self.outside_guest_ram_bytes_max = self.outside_guest_ram_bytes_max.max(self.outside_guest_ram_bytes);
        self.page_tables_bytes = field("VmPTE:");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_summed_and_the_first_user_instruction_is_the_earliest() {
        let mut stats = Stats::default();
        stats.take_counters(vec![
            vec![("instructions", 5), (FIRST_USER_NS, 0)],
            vec![("instructions", 7), (FIRST_USER_NS, 40), ("pause_ns_max", 9)],
            vec![(FIRST_USER_NS, 30), ("pause_ns_max", 8)],
        ]);
        assert_eq!(stats.counters, BTreeMap::from([("instructions", 12), ("pause_ns_max", 9)]));
        assert_eq!(stats.times.first_user_instruction_ns, Some(30));
        assert_eq!(stats.vcpus.len(), 3);
    }

    #[test]
    fn the_process_holds_memory_outside_guest_ram() {
        let mut memory = MemoryStats::default();
        memory.look();
        assert!(memory.outside_guest_ram_bytes > 0);
        assert_eq!(memory.outside_guest_ram_bytes_max, memory.outside_guest_ram_bytes);
    }
}
