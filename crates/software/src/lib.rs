//! The software engine: unmodified x86-64 guests without hardware virtualization.
//!
//! Stage 1: guest code is decoded once into blocks of ops (one instruction each, with its operands resolved and
//! a handler chosen for its exact form) and then interpreted from there. Integer, control-flow and system instructions are
//! handlers in Rust; vector and x87 instructions run on the host CPU itself through small generated stubs, so their results are the CPU's own.
//!
//! Invariants:
//! - Nothing a guest does makes the engine panic, hang or grow: arithmetic on guest numbers wraps, every cache has a bound, and
//!   every loop over guest data ends or looks at the attention flag.
//! - The engine knows no device: whatever is not RAM or the local APIC goes to the buses of `polder_machine`.
//! - An instruction either completes or leaves no trace: a handler changes registers only after its last possible fault.
//! - Guest memory is touched by one host instruction for each guest access, so atomicity and ordering are the host's own.
//!
//! Map: `cpu` (the registers of one vCPU), `fault` (exceptions on their way), `flags` (arithmetic flags as the host CPU computes
//! them), `op` (a decoded instruction), `tlb`, `page_walk`, `access` (guest memory at linear addresses), `segmentation`
//! (from offsets to linear addresses), `lower` (from bytes to ops), `ops` (handlers of general-purpose instructions), `block` and
//! `block_cache` (runs of ops and where they are found), `run` (the inner loop), `testbench` (a bare processor for tests, and `arbitrary`, which makes a guest of arbitrary bytes; both are there only with the feature `testbench`). Around the core: `cpu_feature`, `cpu_model` and `msr` (what processor the guest sees), `time` (the TSC), `alarm` (what interrupts translated code in time), `apic`
//! (local APICs and the inboxes by which threads reach each other), `paravirt` (KVM's clock and hypercalls), `vcpu` (the outer loop), `engine`, `debugger` (a debugger's breakpoints and steps), `trace`, `counters`.

mod access;
mod alarm;
mod apic;
#[cfg(any(test, feature = "testbench"))]
mod arbitrary;
mod block;
mod block_cache;
mod counters;
mod cpu;
mod cpu_feature;
mod cpu_model;
mod debugger;
#[cfg(test)]
mod dirty_log_tests;
mod engine;
mod fault;
mod flags;
mod lower;
mod msr;
mod op;
mod ops;
mod page_walk;
mod paravirt;
mod run;
mod second_level;
mod segmentation;
mod stopwatch;
mod system;
#[cfg(any(test, feature = "testbench"))]
pub mod testbench;
mod time;
mod tlb;
mod trace;
mod translate;
mod vcpu;
#[cfg(test)]
mod vcpu_tests;
mod vector;

pub use cpu_model::{CpuModel, CpuModelError, Feature};
pub use engine::{
    CODE_CACHE_BYTES_DEFAULT, CODE_CACHE_BYTES_MAX, CODE_CACHE_BYTES_MIN, EngineOptions, Measurements, PerfMap,
    SoftwareEngine, Translation,
};
