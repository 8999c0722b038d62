//! The virtual machine's generation id: 16 bytes in guest memory that change whenever the machine's life forks.
//!
//! A guest that sees a new id reseeds its random generator and drops what must not exist twice ("Virtual Machine Generation ID",
//! Microsoft, 2018; Linux drivers/virt/vmgenid.c). The bytes are in place before the guest hears of them.

use std::sync::Arc;

use polder_memory::{GuestAddress, GuestMemory, MemoryError};

use crate::AcpiRegisters;

/// Bytes of an id.
pub const GENERATION_ID_LEN: usize = 16;

/// Keeps the id in guest memory.
pub struct GenerationId {
    memory: GuestMemory,
    address: GuestAddress,
    registers: Arc<AcpiRegisters>,
}

impl GenerationId {
    /// Writes the first id at `address`, before the guest runs. ACPI's ADDR object names the same address.
    pub fn new(
        memory: GuestMemory,
        address: GuestAddress,
        id: [u8; GENERATION_ID_LEN],
        registers: Arc<AcpiRegisters>,
    ) -> Result<Self, MemoryError> {
        memory.write(address, &id)?;
        Ok(GenerationId { memory, address, registers })
    }

    /// Writes a new id and tells the guest.
    pub fn change(&self, id: [u8; GENERATION_ID_LEN]) -> Result<(), MemoryError> {
        self.memory.write(self.address, &id)?;
        self.registers.announce_generation_id();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::{RecordingLine, RecordingRequests};
    use polder_machine::acpi_registers::{EVENT_GENERATION_ID, EVENT_STATUS};
    use polder_machine::{AccessSize, BusDevice};

    #[test]
    fn a_change_is_in_memory_and_announced() {
        let memory = GuestMemory::new(&[(GuestAddress(0), 0x1000)]).unwrap();
        let line = Arc::new(RecordingLine::default());
        let registers = Arc::new(AcpiRegisters::new(line.clone(), Arc::new(RecordingRequests::default())));
        let device = GenerationId::new(memory.clone(), GuestAddress(0x800), [1; 16], registers.clone()).unwrap();
        assert!(!line.level());
        device.change([2; 16]).unwrap();
        assert!(line.level());
        assert_eq!(registers.read(EVENT_STATUS, AccessSize::Dword), u64::from(EVENT_GENERATION_ID));
        assert_eq!(memory.read_value::<[u8; 16]>(GuestAddress(0x800)).unwrap(), [2; 16]);
    }

    #[test]
    fn an_address_outside_ram_is_refused() {
        let memory = GuestMemory::new(&[(GuestAddress(0), 0x1000)]).unwrap();
        let registers = Arc::new(AcpiRegisters::new(Arc::new(()), Arc::new(RecordingRequests::default())));
        assert!(GenerationId::new(memory, GuestAddress(0xff8), [0; 16], registers).is_err());
    }
}
