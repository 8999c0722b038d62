//! What a vCPU counts.
//!
//! The vCPU's thread counts in plain integers ([`Counters`]) and publishes them now and then ([`Published`]), so that counting costs
//! nothing and others can read at any time.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident)*) => {
        /// Counts of one vCPU's thread.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
        pub struct Counters { $($(#[$doc])* pub $name: u64),* }

        /// The latest published counts.
        #[derive(Debug, Default)]
        pub struct Published { instructions: AtomicU64, $($name: AtomicU64),* }

        impl Published {
            /// Publishes; by the vCPU's thread only.
            pub fn publish(&self, instructions: u64, counters: &Counters) {
                self.instructions.store(instructions, Ordering::Relaxed);
                $(self.$name.store(counters.$name, Ordering::Relaxed);)*
            }

            /// All counts by name.
            pub fn read(&self) -> Vec<(&'static str, u64)> {
                vec![
                    ("instructions", self.instructions.load(Ordering::Relaxed)),
                    $((stringify!($name), self.$name.load(Ordering::Relaxed))),*
                ]
            }
        }
    };
}

counters! {
    /// Accesses to I/O ports.
    port
    /// Accesses to memory-mapped registers of devices.
    mmio
    /// Accesses to the local APIC's page.
    apic
    /// HLT instructions.
    hlt
    /// CPUID instructions.
    cpuid
    /// RDMSR and WRMSR instructions.
    msr
    /// Times that the thread slept.
    sleeps
    /// Interrupts delivered.
    interrupts
    /// NMIs delivered.
    nmis
    /// Exceptions delivered.
    exceptions
    /// Look-ups of translated code that missed.
    translated_misses
    /// Instructions of translated code that handlers of the interpreter ran.
    callouts
    /// Returns from the inner loop.
    leaves
    /// Units that were translated.
    translated_units
    /// Bytes of their code.
    translated_code_bytes
    /// Size of the code cache.
    code_cache_bytes
    /// Units that were dropped to make room for others.
    code_cache_evicted
    /// Times that all translated code was dropped.
    code_cache_flushes
    /// Not a count: the longest that the vCPU made room, or dropped all code, in its thread's processor time.
    code_cache_pause_ns_max
    /// Not a count: when this vCPU first fetched code at privilege level 3, on the machine's monotonic clock; zero if it never did.
    first_user_instruction_ns
}
