//! An engine as the rest of the house sees it.

use std::sync::Arc;

use polder_basics::Clock;
use polder_memory::GuestMemory;

use crate::{Bus, DebugEvent, DebugVcpu, EoiListener, MsiSink, VcpuState};

/// What a machine gives its engine.
#[derive(Clone)]
pub struct EngineServices {
    pub memory: GuestMemory,
    /// I/O ports.
    pub ports: Arc<Bus>,
    /// Memory-mapped registers, by guest-physical address; asked for addresses that are neither RAM nor the local APIC.
    pub mmio: Arc<Bus>,
    /// Hears of the end of level-triggered interrupts.
    pub eoi: Arc<dyn EoiListener>,
    pub clock: Arc<dyn Clock>,
}

/// Why [`Vcpu::run`] came back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VcpuExit {
    /// [`VcpuHandle::stop`] was called.
    Stopped,
    /// A triple fault or shutdown: the machine resets or ends.
    TripleFault,
    /// A debugger's order is carried out, or what it told the vCPU to look out for was met.
    Debug(DebugEvent),
}

/// The engine cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The host lacks something that the engine needs.
    #[error("the host lacks {what}, which the {engine} engine needs")]
    HostLacks { engine: &'static str, what: String },
    /// The number of vCPUs is out of range.
    #[error("a machine has 1 to {max} vCPUs, not {asked}")]
    VcpuCount { asked: u32, max: u32 },
    /// A call to the host failed.
    #[error("the host refused {what}")]
    Host {
        what: &'static str,
        #[source]
        source: std::io::Error,
    },
}

/// One virtual processor. Owned by one thread.
pub trait Vcpu: Send {
    /// Runs guest code until there is a reason to come back. Port and memory-mapped accesses, interrupts, HLT and start-up
    /// messages are handled inside. May be called again after [`VcpuExit::Stopped`] and [`VcpuExit::Debug`].
    fn run(&mut self) -> VcpuExit;
    /// The architectural state; only between runs.
    fn state(&self) -> VcpuState;
    /// Sets the architectural state; only between runs. Interrupts in flight and caches of translations are dropped.
    fn set_state(&mut self, state: &VcpuState);
    /// Power-on state, local APIC included.
    fn reset(&mut self);
    /// The vCPU as a debugger sees it, where the engine lets one in; only between runs.
    fn debug(&mut self) -> Option<&mut dyn DebugVcpu> {
        None
    }
}

/// Reaches a vCPU from other threads.
pub trait VcpuHandle: Send + Sync {
    /// Makes the current or the next [`Vcpu::run`] come back with [`VcpuExit::Stopped`] soon.
    fn stop(&self);
    /// What the vCPU has counted so far, by name: instructions, exits by kind, interrupts.
    fn counters(&self) -> Vec<(&'static str, u64)>;
}

/// A machine's processors and their interrupt messages.
pub trait Engine: Send + Sync {
    /// `kvm` or `software`.
    fn name(&self) -> &'static str;
    /// Hands out the vCPUs, once, in index order; vCPU i has APIC id i. vCPU 0 is the bootstrap processor.
    fn take_vcpus(&self) -> Vec<Box<dyn Vcpu>>;
    /// Handles in index order.
    fn handles(&self) -> Vec<Arc<dyn VcpuHandle>>;
    /// Where interrupt messages go.
    fn msi_sink(&self) -> Arc<dyn MsiSink>;
    /// Sends a non-maskable interrupt to all vCPUs.
    fn send_nmi(&self);
}
