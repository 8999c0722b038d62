//! The registers of every device without queues: serial port, clock, ACPI, I/O APIC, reset, panic and test devices.
//!
//! Holds: no panic and no unbounded work for any access, of any size, anywhere in the devices' ranges.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use polder_basics::ManualClock;
use polder_devices::{
    AcpiRegisters, CMOS_PORTS, FW_CFG_PORTS, FwCfg, KEYBOARD_PORT, KEYBOARD_PORTS, KeyboardController, Pvpanic, Rtc,
    SERIAL_PORTS, SYSTEM_CONTROL_A_PORT, Serial, SystemControlA,
};
use polder_machine::layout::{
    ACPI_EVENT_GSI, ACPI_REGISTERS_LEN, ACPI_REGISTERS_START, CMOS_PORT, COM1_GSI, COM1_PORT, FW_CFG_PORT, IO_APIC_LEN,
    IO_APIC_START, PVPANIC_PORT, RTC_GSI,
};
use polder_machine::{
    AccessSize, Bus, EoiListener, GuestRequest, InterruptLine, IoApic, MsiMessage, MsiSink, RequestSink,
};

struct Nothing;

impl MsiSink for Nothing {
    fn send(&self, _message: MsiMessage) {}
}

impl RequestSink for Nothing {
    fn request(&self, _request: GuestRequest) {}
}

/// The port ranges of the devices: start and length.
const PORTS: [(u64, u64); 6] = [
    (COM1_PORT, SERIAL_PORTS),
    (CMOS_PORT, CMOS_PORTS),
    (PVPANIC_PORT, 1),
    (KEYBOARD_PORT, KEYBOARD_PORTS),
    (SYSTEM_CONTROL_A_PORT, 1),
    (FW_CFG_PORT, FW_CFG_PORTS),
];

fuzz_target!(|input: &[u8]| {
    let io_apic = IoApic::new();
    io_apic.connect(Arc::new(Nothing));
    let wire = |gsi| -> Arc<dyn InterruptLine> { io_apic.line(gsi).expect("the pin exists") };
    let requests: Arc<dyn RequestSink> = Arc::new(Nothing);
    let clock = Arc::new(ManualClock::new(1_700_000_000_000_000_000));
    let serial = Arc::new(Serial::new(Box::new(std::io::sink()), wire(COM1_GSI)));
    let rtc = Arc::new(Rtc::new(clock.clone(), wire(RTC_GSI), 1 << 30));
    let (ports, mmio) = (Bus::new(), Bus::new());
    let devices: [Arc<dyn polder_machine::BusDevice>; 6] = [
        serial.clone(),
        rtc.clone(),
        Arc::new(Pvpanic::new(requests.clone())),
        Arc::new(KeyboardController::new(requests.clone())),
        Arc::new(SystemControlA::new(requests.clone())),
        Arc::new(FwCfg::new(2, 1 << 30)),
    ];
    for ((start, len), device) in PORTS.into_iter().zip(devices) {
        ports.insert(start, len, device).expect("the ranges do not overlap");
    }
    let acpi = Arc::new(AcpiRegisters::new(wire(ACPI_EVENT_GSI), requests.clone()));
    mmio.insert(ACPI_REGISTERS_START, ACPI_REGISTERS_LEN, acpi.clone()).expect("the range is free");
    mmio.insert(IO_APIC_START, IO_APIC_LEN, io_apic.clone()).expect("the range is free");
    // Each step: what (1 byte), where (2), value (4).
    for step in input.as_chunks::<7>().0 {
        let [what, low, high, value @ ..] = *step;
        let size = [AccessSize::Byte, AccessSize::Word, AccessSize::Dword, AccessSize::Qword][(what & 3) as usize];
        let offset = u64::from(u16::from_le_bytes([low, high]));
        let word = u64::from(u32::from_le_bytes(value));
        let write = |bus: &Bus, address| {
            bus.write(address, size, word & size.all_ones());
            bus.read(address, size);
        };
        match what >> 2 & 15 {
            choice @ 0..=5 => {
                let (start, len) = PORTS[choice as usize];
                write(&ports, start + offset % len);
            }
            6 => write(&mmio, ACPI_REGISTERS_START + offset % ACPI_REGISTERS_LEN),
            7 | 8 => write(&mmio, IO_APIC_START + offset % 0x50),
            9 => write(&mmio, IO_APIC_START + offset % IO_APIC_LEN),
            10 => drop(serial.push_input(&value)),
            11 => serial.push_break(),
            12 => {
                clock.advance_ns(word << (offset % 32));
                rtc.tick();
            }
            13 => acpi.press_power_button(),
            14 => io_apic.end_of_interrupt(low),
            _ => wire(COM1_GSI + low % 20).set(high & 1 != 0),
        }
    }
    assert!(serial.input_len() <= 64 << 10);
});
