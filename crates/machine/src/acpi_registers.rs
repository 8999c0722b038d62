//! The register block at [`layout::ACPI_REGISTERS_START`](crate::layout::ACPI_REGISTERS_START), shared by the tables, which name
//! it, and the device, which implements it.
//!
//! Two things live here: the event status that the Generic Event Device's method reads after its interrupt (ACPI 6.5, 5.6.9), and
//! the sleep control and status registers of hardware-reduced ACPI (ACPI 6.5, 4.8.3.7).

/// 32 bits, read/write: a bit for each event that happened. Writing ones clears those bits. The event interrupt's line is high
/// while any bit is set.
pub const EVENT_STATUS: u64 = 0x0;
/// 8 bits, write: `SLP_TYP` in bits 2 to 4, `SLP_EN` in bit 5. Reads give zero.
pub const SLEEP_CONTROL: u64 = 0x4;
/// 8 bits, read/write: bit 7 (`WAK_STS`) is never set, for no sleep state but S5 exists.
pub const SLEEP_STATUS: u64 = 0x5;

/// Event bit: the power button was pressed.
pub const EVENT_POWER_BUTTON: u32 = 1 << 0;
/// Event bit: the VM generation id changed.
pub const EVENT_GENERATION_ID: u32 = 1 << 1;

/// `SLP_EN` in [`SLEEP_CONTROL`].
pub const SLEEP_ENABLE: u8 = 1 << 5;
/// The `SLP_TYP` value of S5, soft off.
pub const SLEEP_TYPE_S5: u8 = 5;

/// Whether a byte written to [`SLEEP_CONTROL`] switches the machine off.
pub fn is_power_off(sleep_control: u8) -> bool {
    sleep_control & SLEEP_ENABLE != 0 && sleep_control >> 2 & 7 == SLEEP_TYPE_S5
}
