//! ACPI tables: what the machine has, told to the guest (ACPI 6.5, chapter 5, hardware-reduced).
//!
//! There is no firmware: [`write_tables`] puts everything into the BIOS area before the first instruction, and the boot protocols
//! pass the RSDP's address on. The register addresses come from `layout` and `acpi_registers`, nowhere else.

mod aml;
mod dsdt;
mod resources;
mod table;

use polder_memory::{GuestAddress, GuestMemory, MemoryError};

use crate::acpi_registers::{SLEEP_CONTROL, SLEEP_STATUS};
use crate::layout;
use crate::memory_map::{MemoryKind, memory_map};
use table::Table;

/// Writing [`RESET_VALUE`] to the port [`layout::RESET_PORT`] resets the machine.
pub const RESET_VALUE: u8 = 6;

/// What the tables depend on.
#[derive(Debug, Clone, Copy)]
pub struct AcpiConfig {
    pub cpus: u32,
    pub ram_bytes: u64,
}

/// Writes all tables into guest memory and returns the RSDP's address.
pub fn write_tables(memory: &GuestMemory, config: &AcpiConfig) -> Result<u64, MemoryError> {
    let mut next = layout::ACPI_TABLES_START;
    let mut place = |bytes: Vec<u8>| -> Result<u64, MemoryError> {
        let address = next;
        memory.write(GuestAddress(address), &bytes)?;
        next = (address + bytes.len() as u64).next_multiple_of(16);
        // The tables of the largest machine fit by far (a test shows it).
        debug_assert!(next <= layout::GENERATION_ID_START);
        Ok(address)
    };
    let dsdt = place(dsdt(config))?;
    let mut entries = Vec::new();
    for table in [fadt(dsdt), madt(config), mcfg(), srat(config)] {
        entries.push(place(table)?);
    }
    let mut xsdt = Table::new(b"XSDT", 1);
    entries.into_iter().for_each(|entry| xsdt.u64(entry));
    let xsdt = place(xsdt.finish())?;
    memory.write(GuestAddress(layout::RSDP_START), &rsdp(xsdt))?;
    Ok(layout::RSDP_START)
}

fn dsdt(config: &AcpiConfig) -> Vec<u8> {
    let mut table = Table::new(b"DSDT", 2);
    table.bytes(&dsdt::definition_block(config.cpus));
    table.finish()
}

/// The root pointer (5.2.5.3).
fn rsdp(xsdt: u64) -> Vec<u8> {
    let mut bytes = b"RSD PTR \0POLDER\x02".to_vec();
    bytes.extend([0; 4]);
    bytes.extend(36u32.to_le_bytes());
    bytes.extend(xsdt.to_le_bytes());
    bytes.extend([0; 4]);
    bytes[8] = table::checksum(&bytes[..20]);
    bytes[32] = table::checksum(&bytes);
    bytes
}

/// The fixed description table (5.2.9): almost everything in it is what hardware-reduced machines lack.
fn fadt(dsdt: u64) -> Vec<u8> {
    const WBINVD: u32 = 1 << 0;
    const C1_SUPPORTED: u32 = 1 << 2;
    const POWER_BUTTON_IS_A_DEVICE: u32 = 1 << 4;
    const NO_FIXED_SLEEP_BUTTON: u32 = 1 << 5;
    const NO_FIXED_RTC: u32 = 1 << 6;
    const RESET_REGISTER: u32 = 1 << 10;
    const HARDWARE_REDUCED: u32 = 1 << 20;
    const BOOT_LEGACY_DEVICES: u16 = 1 << 0;
    const BOOT_NO_VGA: u16 = 1 << 2;
    const LEN: usize = 276;
    let mut table = Table::new(b"FACP", 6);
    table.at(40);
    table.u32(dsdt as u32);
    table.at(109);
    table.u16(BOOT_LEGACY_DEVICES | BOOT_NO_VGA);
    table.at(112);
    table.u32(
        WBINVD
            | C1_SUPPORTED
            | POWER_BUTTON_IS_A_DEVICE
            | NO_FIXED_SLEEP_BUTTON
            | NO_FIXED_RTC
            | RESET_REGISTER
            | HARDWARE_REDUCED,
    );
    table.register(table::IO_SPACE, layout::RESET_PORT);
    table.u8(RESET_VALUE);
    // Minor version 5.
    table.at(131);
    table.u8(5);
    table.at(140);
    table.u64(dsdt);
    table.at(244);
    table.register(table::MEMORY_SPACE, layout::ACPI_REGISTERS_START + SLEEP_CONTROL);
    table.register(table::MEMORY_SPACE, layout::ACPI_REGISTERS_START + SLEEP_STATUS);
    table.bytes(b"polder\0\0");
    debug_assert_eq!(table.len(), LEN);
    table.finish()
}

/// The interrupt controllers (5.2.12): a local APIC a vCPU, one I/O APIC, LINT1 as NMI, and no 8259s. ISA interrupts are
/// wired to the pins of the same number, so nothing is overridden.
fn madt(config: &AcpiConfig) -> Vec<u8> {
    const ENABLED: u32 = 1;
    /// APIC ids from here on do not fit the 8-bit entry (5.2.12.12).
    const X2APIC_FIRST: u32 = 255;
    let mut table = Table::new(b"APIC", 5);
    table.u32(layout::LOCAL_APIC_START as u32);
    table.u32(0);
    for id in 0..config.cpus {
        if id < X2APIC_FIRST {
            table.bytes(&[0, 8, id as u8, id as u8]);
            table.u32(ENABLED);
        } else {
            table.bytes(&[9, 16, 0, 0]);
            table.u32(id);
            table.u32(ENABLED);
            table.u32(id);
        }
    }
    table.bytes(&[1, 12, 0, 0]);
    table.u32(layout::IO_APIC_START as u32);
    table.u32(0);
    table.bytes(&[4, 6, 0xff, 0, 0, 1]);
    table.finish()
}

/// The configuration space (PCI Firmware Specification 3.3, 4.1.2).
fn mcfg() -> Vec<u8> {
    let mut table = Table::new(b"MCFG", 1);
    table.u64(0);
    table.u64(layout::ECAM_START);
    table.u16(0);
    table.bytes(&[0, (layout::ECAM_LEN >> 20) as u8 - 1]);
    table.u32(0);
    table.finish()
}

/// The affinity of processors and memory (5.2.16): one domain.
fn srat(config: &AcpiConfig) -> Vec<u8> {
    const ENABLED: u32 = 1;
    let mut table = Table::new(b"SRAT", 3);
    table.u32(1);
    table.u64(0);
    for id in 0..config.cpus {
        table.bytes(&[2, 24, 0, 0]);
        for value in [0, id, ENABLED, 0, 0] {
            table.u32(value);
        }
    }
    for range in memory_map(config.ram_bytes).iter().filter(|range| range.kind == MemoryKind::Ram) {
        table.bytes(&[1, 40]);
        table.u32(0);
        table.u16(0);
        table.u64(range.start);
        table.u64(range.len);
        table.u32(0);
        table.u32(ENABLED);
        table.u64(0);
    }
    table.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use polder_basics::MIB;

    fn tables(cpus: u32) -> (GuestMemory, u64) {
        let memory = GuestMemory::new(&layout::ram_regions(64 * MIB)).unwrap();
        let rsdp = write_tables(&memory, &AcpiConfig { cpus, ram_bytes: 64 * MIB }).unwrap();
        (memory, rsdp)
    }

    fn bytes(memory: &GuestMemory, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        memory.read(GuestAddress(address), &mut bytes).unwrap();
        bytes
    }

    fn table_at(memory: &GuestMemory, address: u64) -> Vec<u8> {
        let len = memory.load_u32(GuestAddress(address + 4)).unwrap();
        bytes(memory, address, len as usize)
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn all(memory: &GuestMemory, rsdp: u64) -> Vec<Vec<u8>> {
        let xsdt = table_at(memory, memory.load_u64(GuestAddress(rsdp + 24)).unwrap());
        let mut tables: Vec<_> =
            xsdt[36..].chunks(8).map(|entry| table_at(memory, u64::from_le_bytes(entry.try_into().unwrap()))).collect();
        let fadt = tables.iter().find(|table| table.starts_with(b"FACP")).unwrap();
        let dsdt = u64::from_le_bytes(fadt[140..148].try_into().unwrap());
        tables.push(table_at(memory, dsdt));
        tables.push(xsdt);
        tables
    }

    #[test]
    fn every_table_is_found_from_the_root_and_sums_to_zero() {
        let (memory, rsdp) = tables(8);
        let root = bytes(&memory, rsdp, 36);
        assert_eq!((sum(&root[..20]), sum(&root)), (0, 0));
        let tables = all(&memory, rsdp);
        assert_eq!(tables.len(), 6);
        assert!(tables.iter().all(|table| sum(table) == 0));
    }

    #[test]
    fn the_tables_of_the_largest_machine_fit() {
        let (memory, rsdp) = tables(8);
        let total: usize = all(&memory, rsdp).iter().map(|table| table.len() + 16).sum();
        assert!(total as u64 <= layout::GENERATION_ID_START - layout::ACPI_TABLES_START, "{total}");
    }

    /// The outside judge: ACPICA's disassembler, where it is installed (Debian: acpica-tools).
    #[test]
    fn acpica_disassembles_and_recompiles_every_table() {
        let Ok(version) = std::process::Command::new("iasl").arg("-v").output() else {
            eprintln!("skipped: iasl is not installed");
            return;
        };
        assert!(version.status.success());
        let (memory, rsdp) = tables(4);
        let folder = std::env::temp_dir().join(format!("polder-acpi-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        for table in all(&memory, rsdp) {
            let name = String::from_utf8_lossy(&table[..4]).into_owned();
            std::fs::write(folder.join(format!("{name}.aml")), &table).unwrap();
            let run = |arguments: &[&str]| {
                let output = std::process::Command::new("iasl").current_dir(&folder).args(arguments).output().unwrap();
                let text =
                    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
                (output.status.success(), text)
            };
            let (disassembled, text) = run(&["-d", &format!("{name}.aml")]);
            assert!(disassembled && !text.contains("Error") && !text.contains("Warning"), "{name}: {text}");
            let (compiled, text) = run(&["-we", "-p", "again", &format!("{name}.dsl")]);
            assert!(compiled, "{name}: {text}");
        }
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
