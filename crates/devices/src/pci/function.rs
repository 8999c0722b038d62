//! What the PCI bus asks of a function.

use polder_machine::AccessSize;

use super::BarPlace;

/// A PCI function: configuration space and memory BARs. Called on vCPU threads, several at once; never blocks on I/O.
pub trait PciFunction: Send + Sync {
    /// Reads configuration space. The access is a naturally aligned byte, word or double word inside the 4 KiB.
    fn config_read(&self, offset: u16, size: AccessSize) -> u32;

    /// Writes configuration space; accesses as for reads.
    fn config_write(&self, offset: u16, size: AccessSize, value: u32);

    /// All BARs, decoded or not.
    fn bars(&self) -> Vec<BarPlace>;

    /// Whether the command register lets the function answer at its BARs.
    fn decodes_memory(&self) -> bool;

    /// Puts a BAR at an address, as firmware would; the bus does so once, when the function is added.
    fn place_bar(&self, index: u8, address: u64);

    /// Writes the interrupt line register, as firmware would.
    fn set_interrupt_line(&self, line: u8);

    /// Reads a BAR's registers. Any offset inside the BAR, any size and alignment can come.
    fn bar_read(&self, index: u8, offset: u64, size: AccessSize) -> u64;

    /// Writes a BAR's registers.
    fn bar_write(&self, index: u8, offset: u64, size: AccessSize, value: u64);
}
