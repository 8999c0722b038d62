//! The engine's own trace, for finding bugs.
//!
//! While a `tracing` subscriber takes level TRACE of target `polder::instructions`, every vCPU runs instruction by instruction and
//! tells of each before it runs; the same level of `polder::exceptions` tells of exceptions only and costs nothing else. Whoever
//! runs the engine decides what listens; the engine reads no environment.

use tracing::Level;

use crate::cpu::{CS, Cpu, RSP};

/// Whether instructions are told of.
#[inline]
pub fn is_on() -> bool {
    tracing::enabled!(target: "polder::instructions", Level::TRACE)
}

/// Tells of the instruction that runs next, with all registers.
#[cold]
pub fn instruction(cpu: &Cpu) {
    tracing::trace!(
        target: "polder::instructions",
        vcpu = cpu.apic.id(),
        cs = cpu.segments[usize::from(CS)].selector,
        "{:x} flags {:x} {:x?}",
        cpu.rip,
        cpu.rflags(),
        &cpu.gpr[..16]
    );
}

/// Tells of the exception that is about to be delivered.
#[inline]
pub fn exception(cpu: &Cpu) {
    tracing::trace!(
        target: "polder::exceptions",
        vcpu = cpu.apic.id(),
        "vector {} error {:x?} detail {:x} at {:x}:{:x} stack {:x} cr3 {:x}",
        cpu.fault.vector,
        cpu.fault.error_code,
        cpu.fault.detail,
        cpu.segments[usize::from(CS)].selector,
        cpu.rip,
        cpu.gpr[RSP],
        cpu.cr3
    );
}

/// Tells of the end of a vCPU.
#[cold]
pub fn triple_fault(cpu: &Cpu) {
    tracing::debug!(
        vcpu = cpu.apic.id(),
        "triple fault: exception {:x?} at {:x} flags {:x} cr0 {:x} cr2 {:x} cr3 {:x} cr4 {:x} efer {:x} idt {:x?} registers {:x?}",
        cpu.fault,
        cpu.rip,
        cpu.rflags(),
        cpu.cr0,
        cpu.cr2,
        cpu.cr3,
        cpu.cr4,
        cpu.efer,
        cpu.idtr,
        &cpu.gpr[..16]
    );
}
