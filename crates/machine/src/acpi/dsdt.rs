//! The differentiated definition block: the devices that a guest cannot find by itself, and what to do with their events.

use super::aml::{
    Access, Aml, Serialize, Space, and, argument, device, eisa_id, field, if_then, integer, local, method, name,
    notify, operation_region, package, path, return_value, scope, store, string,
};
use super::resources::{
    Window, bus_numbers, isa_interrupt, level_interrupt, memory_window, memory32, port_window, ports, template,
};
use crate::acpi_registers::{EVENT_GENERATION_ID, EVENT_POWER_BUTTON, EVENT_STATUS, SLEEP_TYPE_S5};
use crate::layout;

/// Everything that a definition block depends on.
pub(super) fn definition_block(cpus: u32) -> Aml {
    let devices: Vec<Aml> = [
        vec![host_bridge(), reserved_memory(), serial(), clock(), panic(), generation_id(), power_button(), events()],
        (0..cpus).map(processor).collect(),
    ]
    .concat();
    [
        scope("\\_SB", &devices),
        name("\\_S5", package(&[integer(SLEEP_TYPE_S5.into()), integer(0), integer(0), integer(0)])),
    ]
    .concat()
}

/// `_STA`: present, enabled, shown, working (ACPI 6.5, 6.3.7).
fn present() -> Aml {
    name("_STA", integer(0xf))
}

fn processor(index: u32) -> Aml {
    device(
        &format!("C{index:03X}"),
        &[name("_HID", string("ACPI0007")), name("_UID", integer(index.into())), present()],
    )
}

/// The PCI Express host bridge, its windows, and where the INTx pins of each slot lead.
fn host_bridge() -> Aml {
    let windows = template(&[
        bus_numbers(0, (layout::ECAM_LEN >> 20) as u16 - 1),
        ports(layout::PCI_CONFIG_PORT as u16, 8),
        port_window(0, layout::PCI_CONFIG_PORT as u16 - 1),
        port_window(layout::PCI_CONFIG_PORT as u16 + 8, 0xffff),
        memory_window(Window::Produced, layout::PCI_MMIO32_START, layout::PCI_MMIO32_LEN),
        memory_window(Window::Produced, layout::PCI_MMIO64_START, layout::PCI_MMIO64_LEN),
    ]);
    let routes: Vec<Aml> = (0..32u64)
        .flat_map(|slot| (0..4u64).map(move |pin| (slot, pin)))
        .map(|(slot, pin)| {
            let gsi = u64::from(layout::PCI_INTX_GSI) + (slot + pin) % 4;
            package(&[integer(slot << 16 | 0xffff), integer(pin), integer(0), integer(gsi)])
        })
        .collect();
    device(
        "PCI0",
        &[
            name("_HID", eisa_id("PNP0A08")),
            name("_CID", eisa_id("PNP0A03")),
            name("_UID", integer(0)),
            name("_SEG", integer(0)),
            name("_BBN", integer(0)),
            name("_CBA", integer(layout::ECAM_START)),
            name("_CRS", windows),
            name("_PRT", package(&routes)),
            // The guest may control every PCI Express feature that it asks for: there is no firmware to share them with.
            method("_OSC", 4, Serialize::No, &[return_value(argument(3))]),
        ],
    )
}

/// The configuration space, which Linux wants claimed by a motherboard device before it uses it.
fn reserved_memory() -> Aml {
    device(
        "MBRD",
        &[
            name("_HID", eisa_id("PNP0C02")),
            name("_UID", integer(0)),
            name("_CRS", template(&[memory32(layout::ECAM_START as u32, layout::ECAM_LEN as u32)])),
        ],
    )
}

fn serial() -> Aml {
    device(
        "COM1",
        &[
            name("_HID", eisa_id("PNP0501")),
            name("_UID", integer(1)),
            present(),
            name("_CRS", template(&[ports(layout::COM1_PORT as u16, 8), isa_interrupt(layout::COM1_GSI)])),
        ],
    )
}

fn clock() -> Aml {
    device(
        "RTC0",
        &[
            name("_HID", eisa_id("PNP0B00")),
            name("_CRS", template(&[ports(layout::CMOS_PORT as u16, 2), isa_interrupt(layout::RTC_GSI)])),
        ],
    )
}

/// The panic device as Linux's `pvpanic` driver knows it.
fn panic() -> Aml {
    device(
        "PEVT",
        &[
            name("_HID", string("QEMU0001")),
            present(),
            name("_CRS", template(&[ports(layout::PVPANIC_PORT as u16, 1)])),
            operation_region("PEOR", Space::Io, layout::PVPANIC_PORT, 1),
            field("PEOR", Access::Byte, &[("PEPT", 8)]),
            method("RDPT", 0, Serialize::Yes, &[store(path("PEPT"), local(0)), return_value(local(0))]),
            method("WRPT", 1, Serialize::Yes, &[store(argument(0), path("PEPT"))]),
        ],
    )
}

/// The VM generation id ("Virtual Machine Generation ID", Microsoft, 2012): `ADDR` is the physical address, low and high half.
fn generation_id() -> Aml {
    let address = layout::GENERATION_ID_START;
    device(
        "VGEN",
        &[
            name("_HID", string("PLDR0001")),
            name("_CID", string("VM_Gen_Counter")),
            name("_DDN", string("VM_Gen_Counter")),
            present(),
            name("ADDR", package(&[integer(address & 0xffff_ffff), integer(address >> 32)])),
        ],
    )
}

fn power_button() -> Aml {
    device("PWRB", &[name("_HID", eisa_id("PNP0C0C")), name("_UID", integer(0)), present()])
}

/// The Generic Event Device (ACPI 6.5, 5.6.9): its interrupt's method reads which events happened, acknowledges just
/// these, and tells the devices.
fn events() -> Aml {
    const STATUS_CHANGED: u64 = 0x80;
    let when = |bit: u32, target: &str| if_then(and(local(0), integer(bit.into())), &[notify(target, STATUS_CHANGED)]);
    device(
        "GED0",
        &[
            name("_HID", string("ACPI0013")),
            name("_UID", integer(0)),
            name("_CRS", template(&[level_interrupt(layout::ACPI_EVENT_GSI)])),
            operation_region("EREG", Space::Memory, layout::ACPI_REGISTERS_START + EVENT_STATUS, 4),
            field("EREG", Access::Dword, &[("ESTS", 32)]),
            method(
                "_EVT",
                1,
                Serialize::Yes,
                &[
                    store(path("ESTS"), local(0)),
                    store(local(0), path("ESTS")),
                    when(EVENT_POWER_BUTTON, "PWRB"),
                    when(EVENT_GENERATION_ID, "VGEN"),
                ],
            ),
        ],
    )
}
