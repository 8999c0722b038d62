//! The devices of a machine, each behind the traits of `polder-machine`.
//!
//! Invariants:
//! - A device never knows which engine runs the guest, and never blocks a vCPU on I/O.
//! - Every offset, size, value and byte in guest memory is hostile: nothing a guest does panics, loops without end, or makes a
//!   buffer grow beyond its named bound.
//! - What a device asks of its machine goes through [`polder_machine::RequestSink`] and [`polder_machine::InterruptLine`].
//!
//! Modules: `serial` (16550A), `queued_writer` (output that never blocks), `rtc` (MC146818 clock and CMOS), `pvpanic`,
//! `acpi_registers` (events, sleep), `generation_id`, `reset_port` (0xcf9, keyboard controller, 0x92), `test_devices`
//! and `fw_cfg` (what test guests expect), `byte_registers` (wide accesses to byte-wide registers), `pci` (root bus,
//! configuration space, MSI-X), `virtio` (queues, transport, devices), `lock` (taking a mutex).

mod acpi_registers;
mod byte_registers;
mod fw_cfg;
mod generation_id;
mod lock;
pub mod pci;
mod pvpanic;
mod queued_writer;
mod reset_port;
mod rtc;
mod serial;
pub mod test_devices;
#[cfg(test)]
mod test_support;
pub mod virtio;

pub use acpi_registers::AcpiRegisters;
pub use fw_cfg::{FW_CFG_PORTS, FwCfg};
pub use generation_id::{GENERATION_ID_LEN, GenerationId};
pub(crate) use lock::lock;
pub use pvpanic::Pvpanic;
pub use queued_writer::{QueuedWriter, QueuedWriterHandle};
pub use reset_port::{
    KEYBOARD_PORT, KEYBOARD_PORTS, KeyboardController, ResetControl, SYSTEM_CONTROL_A_PORT, SystemControlA,
};
pub use rtc::{CMOS_PORTS, Rtc};
pub use serial::{SERIAL_PORTS, Serial};
