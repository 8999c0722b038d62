//! Where everything lies in guest-physical memory and I/O space.

use polder_memory::GuestAddress;

/// End of the RAM below the 4 GiB hole: RAM beyond this many bytes continues at 4 GiB.
pub const LOW_RAM_END: u64 = 0xb000_0000;
/// Start of the RAM above the hole.
pub const HIGH_RAM_START: u64 = 1 << 32;

/// PCI Express configuration space (ECAM), 256 buses of 1 MiB; bus 0 is the only one.
pub const ECAM_START: u64 = 0xb000_0000;
/// Bytes of ECAM: one bus.
pub const ECAM_LEN: u64 = 1 << 20;
/// 32-bit PCI memory window.
pub const PCI_MMIO32_START: u64 = 0xc000_0000;
pub const PCI_MMIO32_LEN: u64 = 0x3000_0000;
/// 64-bit PCI memory window, above all RAM (at most 16 GiB + the hole).
pub const PCI_MMIO64_START: u64 = 0x40_0000_0000;
pub const PCI_MMIO64_LEN: u64 = 0x40_0000_0000;

/// I/O APIC registers.
pub const IO_APIC_START: u64 = 0xfec0_0000;
pub const IO_APIC_LEN: u64 = 0x1000;
/// Pins of the I/O APIC.
pub const IO_APIC_PINS: u8 = 24;
/// Local APIC registers at reset.
pub const LOCAL_APIC_START: u64 = 0xfee0_0000;

/// ACPI: generic event device (power button) and sleep registers, memory-mapped.
pub const ACPI_REGISTERS_START: u64 = 0xfed0_0000;
pub const ACPI_REGISTERS_LEN: u64 = 0x1000;
/// First I/O port of the serial console.
pub const COM1_PORT: u64 = 0x3f8;
pub const CMOS_PORT: u64 = 0x70;
pub const PVPANIC_PORT: u64 = 0x505;
pub const RESET_PORT: u64 = 0xcf9;
pub const PCI_CONFIG_PORT: u64 = 0xcf8;
pub const DEBUG_EXIT_PORT: u64 = 0xf4;
pub const FW_CFG_PORT: u64 = 0x510;

/// Interrupt pins (global system interrupts).
pub const COM1_GSI: u8 = 4;
pub const RTC_GSI: u8 = 8;
pub const ACPI_EVENT_GSI: u8 = 9;
/// PCI INTx pins A-D of slot s: PCI_INTX_GSI + (s + pin) % 4.
pub const PCI_INTX_GSI: u8 = 16;

/// Low memory used at boot. The real-mode area 0x9fc00-0xfffff is reserved in e820 as on every PC.
pub const EBDA_START: u64 = 0x9_fc00;
/// ACPI tables and SMBIOS lie in the BIOS area.
pub const RSDP_START: u64 = 0xe_0000;
pub const ACPI_TABLES_START: u64 = 0xe_0100;
pub const SMBIOS_START: u64 = 0xf_0000;
/// Where real-mode code enters the BIOS to reset, 0xf000:0xfff0.
pub const BIOS_ENTRY: u64 = 0xf_fff0;
/// The page of the VM generation id: RAM that the memory map reserves, in the BIOS area.
pub const GENERATION_ID_START: u64 = 0xe_f000;
pub const GENERATION_ID_LEN: u64 = 0x1000;
pub const HIGH_MEMORY_START: u64 = 0x10_0000;
/// Scratch of the boot protocols: GDT, zero page or PVH start info, command line.
pub const BOOT_GDT_START: u64 = 0x500;
pub const BOOT_PARAMETERS_START: u64 = 0x7000;
pub const BOOT_PAGE_TABLES_START: u64 = 0x9000;
pub const COMMAND_LINE_START: u64 = 0x2_0000;
pub const COMMAND_LINE_LEN_MAX: u64 = 0x1_0000;

/// The RAM regions of a machine with `ram_bytes` of memory.
pub fn ram_regions(ram_bytes: u64) -> Vec<(GuestAddress, u64)> {
    if ram_bytes <= LOW_RAM_END {
        vec![(GuestAddress(0), ram_bytes)]
    } else {
        vec![(GuestAddress(0), LOW_RAM_END), (GuestAddress(HIGH_RAM_START), ram_bytes - LOW_RAM_END)]
    }
}
