//! The ACPI registers of a hardware-reduced machine: events, sleep control and sleep status.
//!
//! The layout lies in [`polder_machine::acpi_registers`], which the DSDT's AML names too (ACPI 6.5, 4.8.3.7 for the sleep registers,
//! 5.6.9 for the generic event device). The interrupt line is high while an event is pending; writing ones to the event register clears
//! those events.

use std::sync::{Arc, Mutex, PoisonError};

use polder_machine::acpi_registers::{
    EVENT_GENERATION_ID, EVENT_POWER_BUTTON, EVENT_STATUS, SLEEP_CONTROL, is_power_off,
};
use polder_machine::{AccessSize, BusDevice, GuestRequest, InterruptLine, RequestSink};

use crate::byte_registers;

const EVENT_STATUS_LAST: u64 = EVENT_STATUS + 3;

/// The event device and the sleep registers.
pub struct AcpiRegisters {
    line: Arc<dyn InterruptLine>,
    requests: Arc<dyn RequestSink>,
    pending_events: Mutex<u32>,
}

impl AcpiRegisters {
    /// Registers without pending events.
    pub fn new(line: Arc<dyn InterruptLine>, requests: Arc<dyn RequestSink>) -> Self {
        AcpiRegisters { line, requests, pending_events: Mutex::new(0) }
    }

    /// Presses the power button: the guest is asked to switch itself off. Any thread.
    pub fn press_power_button(&self) {
        self.raise(EVENT_POWER_BUTTON);
    }

    /// Tells the guest that its generation id changed. Any thread.
    pub fn announce_generation_id(&self) {
        self.raise(EVENT_GENERATION_ID);
    }

    fn raise(&self, event: u32) {
        let mut pending = self.pending_events.lock().unwrap_or_else(PoisonError::into_inner);
        *pending |= event;
        self.line.set(true);
    }

    fn pending(&self) -> u32 {
        *self.pending_events.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn clear(&self, events: u32) {
        let mut pending = self.pending_events.lock().unwrap_or_else(PoisonError::into_inner);
        *pending &= !events;
        self.line.set(*pending != 0);
    }
}

impl BusDevice for AcpiRegisters {
    fn read(&self, offset: u64, size: AccessSize) -> u64 {
        let events = self.pending().to_le_bytes();
        // Everything but the event register reads as zero: sleep control by its definition, sleep status because there is no
        // sleep but S5 and so never a wake-up.
        byte_registers::read(offset, size, |offset| {
            let index = usize::try_from(offset.wrapping_sub(EVENT_STATUS)).unwrap_or(usize::MAX);
            events.get(index).copied().unwrap_or(0)
        })
    }

    fn write(&self, offset: u64, size: AccessSize, value: u64) {
        byte_registers::write(offset, size, value, |offset, value| match offset {
            EVENT_STATUS..=EVENT_STATUS_LAST => self.clear(u32::from(value) << (8 * (offset - EVENT_STATUS))),
            SLEEP_CONTROL if is_power_off(value) => self.requests.request(GuestRequest::PowerOff),
            _ => {}
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::{RecordingLine, RecordingRequests};
    use polder_machine::acpi_registers::SLEEP_STATUS;

    fn device() -> (AcpiRegisters, Arc<RecordingLine>, Arc<RecordingRequests>) {
        let (line, requests) = (Arc::new(RecordingLine::default()), Arc::new(RecordingRequests::default()));
        (AcpiRegisters::new(line.clone(), requests.clone()), line, requests)
    }

    #[test]
    fn events_wait_until_they_are_cleared() {
        let (device, line, _) = device();
        device.press_power_button();
        device.announce_generation_id();
        assert!(line.level());
        assert_eq!(device.read(EVENT_STATUS, AccessSize::Dword), 3);
        device.write(EVENT_STATUS, AccessSize::Dword, u64::from(EVENT_POWER_BUTTON));
        assert!(line.level());
        assert_eq!(device.read(EVENT_STATUS, AccessSize::Byte), u64::from(EVENT_GENERATION_ID));
        device.write(EVENT_STATUS, AccessSize::Dword, u64::from(EVENT_GENERATION_ID));
        assert!(!line.level());
        assert_eq!(device.read(EVENT_STATUS, AccessSize::Dword), 0);
    }

    #[test]
    fn a_partial_write_clears_the_events_of_its_bytes_only() {
        let (device, line, _) = device();
        device.press_power_button();
        device.write(EVENT_STATUS + 1, AccessSize::Byte, 0xff);
        device.write(EVENT_STATUS + 2, AccessSize::Word, 0xffff);
        assert!(line.level());
        device.write(EVENT_STATUS, AccessSize::Byte, 0xff);
        assert!(!line.level());
    }

    #[test]
    fn only_s5_with_the_enable_bit_powers_off() {
        let (device, _, requests) = device();
        for value in [0x14, 0x20, 0x2c, 0] {
            device.write(SLEEP_CONTROL, AccessSize::Byte, value);
        }
        device.write(SLEEP_STATUS, AccessSize::Byte, 0x34);
        assert!(requests.taken().is_empty());
        device.write(SLEEP_CONTROL, AccessSize::Byte, 0x34);
        assert_eq!(requests.taken(), [GuestRequest::PowerOff]);
    }

    #[test]
    fn a_wide_access_is_split_into_its_bytes() {
        let (device, _, requests) = device();
        device.write(SLEEP_CONTROL - 2, AccessSize::Dword, 0x0034_0000);
        assert_eq!(requests.taken(), [GuestRequest::PowerOff]);
        device.write(u64::MAX, AccessSize::Qword, u64::MAX);
        device.press_power_button();
        assert_eq!(device.read(0, AccessSize::Qword), 1);
        assert_eq!(device.read(0xfff, AccessSize::Qword), 0);
    }
}
