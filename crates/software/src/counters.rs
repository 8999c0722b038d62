//! What a vCPU counts.
//!
//! The vCPU's thread counts in plain integers ([`Counters`]) and publishes them now and then ([`Published`]), so that counting costs
//! nothing and others can read at any time.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::stopwatch::{Activity, Stopwatch};
use crate::translate::exit;

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
    /// Look-ups of translated code that missed,
    translated_misses
    /// and others that did too, but found the page in the second level by themselves.
    translated_refills
    /// Instructions of translated code that handlers of the interpreter ran.
    callouts
    /// Returns from the inner loop.
    leaves
    /// Times that translated code asked where to go on: over a jump that leads to no code yet,
    exit_link
    /// over an indirect jump that is not in the jump table, or after a handler that jumped.
    exit_indirect
    /// Returns from translated code: for an instruction that the interpreter runs,
    exit_interpret
    /// because somebody wants attention or the address space changed,
    exit_attention
    /// because a handler of the interpreter left,
    exit_callout
    /// because one faulted,
    exit_fault
    /// because the host raised an exception.
    exit_host_fault
    /// Instructions that the interpreter ran singly between two runs of translated code.
    interpreted_singly
    /// Not counts but nanoseconds of the vCPU's thread, if they are measured: in the interpreter,
    interpreter_ns
    /// making translations,
    translator_ns
    /// in translated code, in what it calls and finding the next of it,
    translated_ns
    /// in devices,
    devices_ns
    /// asleep in the host,
    asleep_ns
    /// and in the rest of the engine.
    engine_ns
    /// Units that were translated.
    translated_units
    /// Those of them that go on behind a jump.
    translated_superblocks
    /// Those of them that are a loop whose look-ups last for many rounds.
    translated_loops
    /// Units that were copied to another linear address,
    translated_copies
    /// and units that were moved to one.
    translated_moves
    /// Bytes of the code of units and copies.
    translated_code_bytes
    /// Times that translated code met an address space that it did not know, or no longer.
    translated_spaces
    /// Size of the code cache.
    code_cache_bytes
    /// Units that were dropped to make room for others.
    code_cache_evicted
    /// Times that all translated code was dropped.
    code_cache_flushes
    /// Not a count: the longest that the vCPU made room, or dropped all code, in its thread's processor time.
    code_cache_pause_ns_max
    /// In lockstep: units compared with the interpreter.
    lockstep_units
    /// In lockstep: instructions of those.
    lockstep_instructions
    /// In lockstep: units that did something else than the interpreter.
    lockstep_differences
    /// Not a count: when this vCPU first fetched code at privilege level 3, on the machine's monotonic clock; zero if it never did.
    first_user_instruction_ns
}

impl Counters {
    /// Counts why translated code came back: a number of [`exit`].
    #[inline]
    pub fn count_exit(&mut self, exit: u32) {
        let counter = match exit {
            // Counted when it asked.
            exit::INDIRECT => return,
            exit::ATTENTION => &mut self.exit_attention,
            exit::CALLOUT => &mut self.exit_callout,
            exit::FAULT => &mut self.exit_fault,
            exit::HOST_FAULT => &mut self.exit_host_fault,
            _ => &mut self.exit_interpret,
        };
        *counter += 1;
    }

    /// Takes the times that a stopwatch measured.
    pub fn take_times(&mut self, watch: &Stopwatch, tsc_khz: u64) {
        self.interpreter_ns = watch.ns(Activity::Interpreter, tsc_khz);
        self.translator_ns = watch.ns(Activity::Translator, tsc_khz);
        self.translated_ns = watch.ns(Activity::Translated, tsc_khz);
        self.devices_ns = watch.ns(Activity::Devices, tsc_khz);
        self.asleep_ns = watch.ns(Activity::Asleep, tsc_khz);
        self.engine_ns = watch.ns(Activity::Engine, tsc_khz);
    }
}
