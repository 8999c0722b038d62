//! The few bytes at the PC's BIOS entry, 0xf000:0xfff0, that reset the machine.
//!
//! There is no BIOS, but its entry is where a kernel jumps in real mode when it knows no other way to reboot. Linux does so on
//! hardware-reduced ACPI: it then prefers EFI's reset over the ACPI register and, without EFI, goes to the BIOS
//! (`efi_reboot_required`, `native_machine_emergency_restart`). A panic with `panic=-1` ends the same way.

use polder_memory::{GuestAddress, GuestMemory, MemoryError};

use crate::acpi::RESET_VALUE;
use crate::layout;

/// Writes the code.
pub fn write(memory: &GuestMemory) -> Result<(), MemoryError> {
    let [low, high] = (layout::RESET_PORT as u16).to_le_bytes();
    #[rustfmt::skip]
    let code = [
        0xfa,                   // cli
        0xba, low, high,        // mov dx, RESET_PORT
        0xb0, 0x00,             // mov al, 0: the reset bit acts when it rises
        0xee,                   // out dx, al
        0xb0, RESET_VALUE,      // mov al, RESET_VALUE
        0xee,                   // out dx, al
        0xf4,                   // hlt
        0xeb, 0xfd,             // jmp to the hlt
    ];
    memory.write(GuestAddress(layout::BIOS_ENTRY), &code)
}

#[cfg(test)]
mod tests {
    use super::*;
    use polder_memory::GuestMemory;

    #[test]
    fn the_bios_entry_writes_the_reset_register() {
        let memory = GuestMemory::new(&layout::ram_regions(64 << 20)).unwrap();
        write(&memory).unwrap();
        let mut code = [0; 16];
        memory.read(GuestAddress(0xf_fff0), &mut code).unwrap();
        assert_eq!(code[1..4], [0xba, 0xf9, 0x0c]);
        assert_eq!(code[4..10], [0xb0, 0, 0xee, 0xb0, 6, 0xee]);
    }
}
