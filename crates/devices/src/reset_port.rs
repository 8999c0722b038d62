//! The ports through which PC software asks for a reset, with the little that it reads beside them.
//!
//! - [`ResetControl`], port 0xcf9: writing 1 to bit 2 where it was 0 resets (Intel ICH10 data sheet, 13.7.5). ACPI's reset register names it.
//! - [`KeyboardController`], ports 0x60 to 0x64: no keyboard, but the controller's command to pulse the reset line, its output
//!   port, and port 0x61, whose refresh bit toggles and whose timer output always reads as expired.
//! - [`SystemControlA`], port 0x92: fast reset and the A20 gate, which is always open.

use std::sync::{Arc, Mutex, PoisonError};

use polder_machine::{AccessSize, BusDevice, GuestRequest, RequestSink};

use crate::byte_registers;

const RESET_CPU: u8 = 1 << 2;
/// Bits that keep their value: reset type, reset, full reset.
const RESET_CONTROL_MASK: u8 = 0x0e;

/// Port 0xcf9, one byte. It lies inside the PCI configuration address register, which takes double words only.
pub struct ResetControl {
    requests: Arc<dyn RequestSink>,
    value: Mutex<u8>,
}

impl ResetControl {
    /// The register after power-on.
    pub fn new(requests: Arc<dyn RequestSink>) -> Self {
        ResetControl { requests, value: Mutex::new(0) }
    }
}

impl BusDevice for ResetControl {
    fn read(&self, _offset: u64, _size: AccessSize) -> u64 {
        u64::from(*self.value.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn write(&self, _offset: u64, _size: AccessSize, value: u64) {
        let new = value as u8 & RESET_CONTROL_MASK;
        let old = std::mem::replace(&mut *self.value.lock().unwrap_or_else(PoisonError::into_inner), new);
        if new & !old & RESET_CPU != 0 {
            self.requests.request(GuestRequest::Reset);
        }
    }
}

/// Ports that the keyboard controller and port 0x61 take, from 0x60 on.
pub const KEYBOARD_PORT: u64 = 0x60;
pub const KEYBOARD_PORTS: u64 = 5;

const DATA: u64 = 0;
const PORT_B: u64 = 1;
const COMMAND: u64 = 4;

const COMMAND_READ_OUTPUT_PORT: u8 = 0xd0;
const COMMAND_WRITE_OUTPUT_PORT: u8 = 0xd1;
/// Commands 0xf0 to 0xff pulse the output port's low bits that are clear in the command; bit 0 is the reset line.
const COMMAND_PULSE: u8 = 0xf0;

const STATUS_OUTPUT_FULL: u8 = 1 << 0;
const OUTPUT_RESET_INACTIVE: u8 = 1 << 0;
const OUTPUT_A20: u8 = 1 << 1;

const PORT_B_WRITABLE: u8 = 0x0f;
const PORT_B_REFRESH: u8 = 1 << 4;
const PORT_B_TIMER2_OUTPUT: u8 = 1 << 5;

/// An 8042 without keyboard and mouse, and port 0x61.
pub struct KeyboardController {
    requests: Arc<dyn RequestSink>,
    state: Mutex<KeyboardState>,
}

#[derive(Default)]
struct KeyboardState {
    /// A byte for the guest at port 0x60.
    output: Option<u8>,
    /// The next byte written to port 0x60 goes to the output port.
    expects_output_port: bool,
    port_b: u8,
    refresh: bool,
}

impl KeyboardController {
    /// The controller after power-on.
    pub fn new(requests: Arc<dyn RequestSink>) -> Self {
        KeyboardController { requests, state: Mutex::default() }
    }

    fn read_byte(&self, offset: u64) -> u8 {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match offset {
            DATA => state.output.take().unwrap_or(0),
            PORT_B => {
                state.refresh = !state.refresh;
                // A timer that is always expired ends every loop that waits for it; there is no 8254 to make it true later.
                state.port_b | PORT_B_TIMER2_OUTPUT | if state.refresh { PORT_B_REFRESH } else { 0 }
            }
            COMMAND => {
                if state.output.is_some() {
                    STATUS_OUTPUT_FULL
                } else {
                    0
                }
            }
            _ => 0xff,
        }
    }

    fn write_byte(&self, offset: u64, value: u8) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let reset = match offset {
            DATA => std::mem::take(&mut state.expects_output_port) && value & OUTPUT_RESET_INACTIVE == 0,
            PORT_B => {
                state.port_b = value & PORT_B_WRITABLE;
                false
            }
            COMMAND => {
                state.expects_output_port = value == COMMAND_WRITE_OUTPUT_PORT;
                if value == COMMAND_READ_OUTPUT_PORT {
                    state.output = Some(OUTPUT_RESET_INACTIVE | OUTPUT_A20);
                }
                value >= COMMAND_PULSE && value & OUTPUT_RESET_INACTIVE == 0
            }
            _ => false,
        };
        drop(state);
        if reset {
            self.requests.request(GuestRequest::Reset);
        }
    }
}

impl BusDevice for KeyboardController {
    fn read(&self, offset: u64, size: AccessSize) -> u64 {
        byte_registers::read(offset, size, |offset| self.read_byte(offset))
    }

    fn write(&self, offset: u64, size: AccessSize, value: u64) {
        byte_registers::write(offset, size, value, |offset, value| self.write_byte(offset, value));
    }
}

/// Port of [`SystemControlA`], one byte.
pub const SYSTEM_CONTROL_A_PORT: u64 = 0x92;

const CONTROL_A_FAST_RESET: u8 = 1 << 0;
const CONTROL_A_A20: u8 = 1 << 1;

/// Port 0x92, one byte.
pub struct SystemControlA {
    requests: Arc<dyn RequestSink>,
    value: Mutex<u8>,
}

impl SystemControlA {
    /// The register after power-on.
    pub fn new(requests: Arc<dyn RequestSink>) -> Self {
        SystemControlA { requests, value: Mutex::new(0) }
    }
}

impl BusDevice for SystemControlA {
    fn read(&self, _offset: u64, _size: AccessSize) -> u64 {
        u64::from(*self.value.lock().unwrap_or_else(PoisonError::into_inner) | CONTROL_A_A20)
    }

    fn write(&self, _offset: u64, _size: AccessSize, value: u64) {
        let new = value as u8;
        let old = std::mem::replace(&mut *self.value.lock().unwrap_or_else(PoisonError::into_inner), new);
        if new & !old & CONTROL_A_FAST_RESET != 0 {
            self.requests.request(GuestRequest::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::RecordingRequests;

    #[test]
    fn the_reset_register_resets_on_the_rising_bit_only() {
        let requests = Arc::new(RecordingRequests::default());
        let port = ResetControl::new(requests.clone());
        port.write(0, AccessSize::Byte, 0x02);
        assert!(requests.taken().is_empty());
        port.write(0, AccessSize::Byte, 0x06);
        port.write(0, AccessSize::Byte, 0x0e);
        assert_eq!(requests.taken(), [GuestRequest::Reset]);
        assert_eq!(port.read(0, AccessSize::Byte), 0x0e);
    }

    #[test]
    fn the_keyboard_controllers_pulse_resets() {
        let requests = Arc::new(RecordingRequests::default());
        let controller = KeyboardController::new(requests.clone());
        assert_eq!(controller.read(COMMAND, AccessSize::Byte) & 2, 0);
        controller.write(COMMAND, AccessSize::Byte, 0xff);
        controller.write(COMMAND, AccessSize::Byte, 0xaa);
        assert!(requests.taken().is_empty());
        controller.write(COMMAND, AccessSize::Byte, 0xfe);
        assert_eq!(requests.taken(), [GuestRequest::Reset]);
    }

    #[test]
    fn the_output_port_resets_when_its_reset_bit_falls() {
        let requests = Arc::new(RecordingRequests::default());
        let controller = KeyboardController::new(requests.clone());
        controller.write(DATA, AccessSize::Byte, 0xfe);
        controller.write(COMMAND, AccessSize::Byte, 0xd1);
        controller.write(DATA, AccessSize::Byte, 0xdf);
        assert!(requests.taken().is_empty());
        controller.write(COMMAND, AccessSize::Byte, 0xd1);
        controller.write(DATA, AccessSize::Byte, 0xde);
        assert_eq!(requests.taken(), [GuestRequest::Reset]);
        controller.write(COMMAND, AccessSize::Byte, 0xd0);
        assert_eq!(controller.read(COMMAND, AccessSize::Byte), 1);
        assert_eq!(controller.read(DATA, AccessSize::Byte), 3);
        assert_eq!(controller.read(COMMAND, AccessSize::Byte), 0);
    }

    #[test]
    fn port_61_lets_every_wait_end() {
        let controller = KeyboardController::new(Arc::new(RecordingRequests::default()));
        controller.write(PORT_B, AccessSize::Byte, 0xff);
        let (first, second) = (controller.read(PORT_B, AccessSize::Byte), controller.read(PORT_B, AccessSize::Byte));
        assert_eq!(first ^ second, 0x10);
        assert_eq!(first & 0xef, 0x2f);
        assert_eq!(controller.read(2, AccessSize::Word), 0xffff);
    }

    #[test]
    fn port_92_resets_and_keeps_the_a20_gate_open() {
        let requests = Arc::new(RecordingRequests::default());
        let port = SystemControlA::new(requests.clone());
        port.write(0, AccessSize::Byte, 0);
        assert_eq!(port.read(0, AccessSize::Byte), 2);
        assert!(requests.taken().is_empty());
        port.write(0, AccessSize::Byte, 1);
        assert_eq!(requests.taken(), [GuestRequest::Reset]);
    }
}
