//! PCI Express: one root bus of up to 32 single-function devices, reached by ECAM and by the old configuration ports.
//!
//! There is no firmware, so [`PciBus::add`] gives each memory BAR its first address; the guest may move it afterwards. A BAR
//! is claimed on the memory bus only while its function decodes memory, it lies wholly inside a PCI window and nothing
//! else is there: otherwise nobody answers at its address.
//!
//! Invariant: every access size and alignment has one stated outcome. Configuration accesses that are not naturally
//! aligned bytes, words or double words reach a function as single bytes.
//!
//! Modules: `config_space` (header, BARs, capabilities), `function` (the trait), `bus` (slots, decoding), `ports` (0xcf8 and
//! 0xcfc), `msix` (vectors, masks, pending bits), `intx` (shared interrupt lines), `host_bridge` (slot 0).

mod bus;
#[cfg(test)]
mod bus_tests;
mod config_space;
mod function;
mod host_bridge;
mod intx;
mod msix;
mod ports;

pub use bus::{Ecam, PCI_SLOTS, PciBus, PciError};
pub use config_space::{
    BarKind, BarPlace, COMMAND_BUS_MASTER, COMMAND_INTX_DISABLE, COMMAND_MEMORY, ConfigSpace, Identity,
};
pub use function::PciFunction;
pub use host_bridge::HostBridge;
pub use intx::SharedLine;
pub use msix::{MSIX_VECTORS_MAX, Msix};
pub use ports::ConfigPorts;
