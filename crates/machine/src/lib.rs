//! The machine model: where engines and devices meet.
//!
//! Engines do not know devices, and devices do not know engines. A guest's access leaves an engine as (address, size, value) on a
//! [`Bus`]; an interrupt enters it as an [`MsiMessage`] through [`MsiSink`]. What a vCPU is, seen from outside, is [`Vcpu`] and
//! its architectural state [`VcpuState`], plain data that belongs to no engine.
//!
//! Modules: `access` (sizes), `bus` (ranges to devices), `interrupt` (MSI messages, interrupt lines, the end of an
//! interrupt), `request` (what a guest asks of its machine: power off, reset), `vcpu` (the engine's face), `state`
//! (architectural registers), `layout` (where everything lies in guest-physical memory).

mod access;
pub mod acpi_registers;
mod bus;
mod interrupt;
pub mod layout;
mod request;
pub mod state;
mod vcpu;

pub use access::AccessSize;
pub use bus::{Bus, BusDevice, BusError};
pub use interrupt::{EoiListener, InterruptLine, MsiMessage, MsiSink};
pub use request::{GuestRequest, RequestSink};
pub use state::VcpuState;
pub use vcpu::{Engine, EngineError, EngineServices, Vcpu, VcpuExit, VcpuHandle};
