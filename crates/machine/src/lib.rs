//! The machine model: where engines and devices meet.
//!
//! Engines do not know devices, and devices do not know engines. A guest's access leaves an engine as (address, size, value) on a
//! [`Bus`]; an interrupt enters it as an [`MsiMessage`] through [`MsiSink`]. What a vCPU is, seen from outside, is [`Vcpu`] and
//! its architectural state [`VcpuState`], plain data that belongs to no engine.
//!
//! Modules: `access` (sizes), `bus` (ranges to devices), `interrupt` (MSI messages, interrupt lines, the end of an
//! interrupt), `request` (what a guest asks of its machine: power off, reset), `vcpu` (the engine's face), `debug` (what a debugger needs of a vCPU), `state`
//! (architectural registers), `layout` (where everything lies in guest-physical memory), `memory_map` (what the firmware says of
//! it), `io_apic` (pins to messages), `acpi` and `smbios` (the tables), `reset_code` (what lies at the BIOS entry), `acpi_registers` (what the tables' methods touch), `boot`
//! (kernels into memory).

mod access;
pub mod acpi;
pub mod acpi_registers;
pub mod boot;
mod bus;
pub mod debug;
mod interrupt;
mod io_apic;
pub mod layout;
pub mod memory_map;
mod request;
pub mod reset_code;
pub mod smbios;
pub mod state;
mod vcpu;

pub use access::AccessSize;
pub use bus::{Bus, BusDevice, BusError};
pub use debug::{DebugEvent, DebugOrders, DebugVcpu, VectorRegisters, WatchedAccess, Watchpoint};
pub use interrupt::{EoiListener, InterruptLine, MsiMessage, MsiSink};
pub use io_apic::IoApic;
pub use request::{GuestRequest, RequestSink};
pub use state::VcpuState;
pub use vcpu::{Engine, EngineError, EngineServices, Vcpu, VcpuExit, VcpuHandle};
