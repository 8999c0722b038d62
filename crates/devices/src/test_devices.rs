//! The devices that test guests expect: a debug-exit port and QEMU's `pc-testdev`.
//!
//! Only there with `--test-devices`. kvm-unit-tests ends through [`DebugExit`], moves interrupt pins through
//! [`TestInterrupts`], and reads back what it wrote to the ports of [`TestPorts`] and the page of [`TestMemory`].

use std::sync::{Arc, Mutex, PoisonError};

use polder_machine::{AccessSize, BusDevice, GuestRequest, InterruptLine, MsiMessage, MsiSink, RequestSink};

/// Ports of [`DebugExit`].
pub const DEBUG_EXIT_PORTS: u64 = 4;

/// A write ends the machine with status (value << 1) | 1.
pub struct DebugExit {
    requests: Arc<dyn RequestSink>,
}

impl DebugExit {
    /// A port that reports to `requests`.
    pub fn new(requests: Arc<dyn RequestSink>) -> Self {
        DebugExit { requests }
    }
}

impl BusDevice for DebugExit {
    fn read(&self, _offset: u64, _size: AccessSize) -> u64 {
        0
    }

    fn write(&self, _offset: u64, _size: AccessSize, value: u64) {
        self.requests.request(GuestRequest::DebugExit(value as u32));
    }
}

/// First port of [`TestPorts`] and how many there are.
pub const TEST_PORTS_START: u64 = 0xe0;
pub const TEST_PORTS_LEN: u64 = 12;

const ECHO_LEN: u64 = 4;

/// Ports 0xe0 to 0xe3 keep what was written. Ports 0xe4 to 0xe7 take the address of a page whose host mapping a test wants
/// dropped, which is nothing to a guest of ours, and ports 0xe8 to 0xeb keep one byte each.
#[derive(Default)]
pub struct TestPorts {
    bytes: Mutex<[u8; TEST_PORTS_LEN as usize]>,
}

impl BusDevice for TestPorts {
    fn read(&self, offset: u64, size: AccessSize) -> u64 {
        let bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        crate::byte_registers::read(offset, size, |offset| bytes.get(offset as usize).copied().unwrap_or(0xff))
    }

    fn write(&self, offset: u64, size: AccessSize, value: u64) {
        let mut bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        crate::byte_registers::write(offset, size, value, |offset, value| {
            let flush = (ECHO_LEN..2 * ECHO_LEN).contains(&offset);
            if let Some(byte) = bytes.get_mut(offset as usize).filter(|_| !flush) {
                *byte = value;
            }
        });
    }
}

/// First port of [`TestInterrupts`]; port 0x2000 + n is interrupt pin n.
pub const TEST_INTERRUPTS_START: u64 = 0x2000;

/// Pins that a PC's two 8259 have too.
const LEGACY_PINS: u64 = 16;

/// A write of anything but zero raises the pin of that number; zero lowers it. The first pins also send what a PC's 8259
/// would, as firmware leaves it: vectors 8 to 15 and 0x70 to 0x77, taken by a processor whose local APIC is not enabled.
pub struct TestInterrupts {
    lines: Vec<Arc<dyn InterruptLine>>,
    messages: Arc<dyn MsiSink>,
}

impl TestInterrupts {
    /// A port for each line, in order.
    pub fn new(lines: Vec<Arc<dyn InterruptLine>>, messages: Arc<dyn MsiSink>) -> Self {
        TestInterrupts { lines, messages }
    }
}

impl BusDevice for TestInterrupts {
    fn read(&self, _offset: u64, _size: AccessSize) -> u64 {
        0
    }

    fn write(&self, offset: u64, _size: AccessSize, value: u64) {
        if let Some(line) = usize::try_from(offset).ok().and_then(|index| self.lines.get(index)) {
            line.set(value != 0);
        }
        if offset < LEGACY_PINS && value != 0 {
            let vector = if offset < 8 { 8 + offset } else { 0x70 + offset - 8 };
            // Delivery mode 7: external interrupt, to the bootstrap processor.
            self.messages.send(MsiMessage { address: 0xfee0_0000, data: 0x700 | vector as u32 });
        }
    }
}

/// Where [`TestMemory`] lies and how long it is.
pub const TEST_MEMORY_START: u64 = 0xff00_0000;
pub const TEST_MEMORY_LEN: u64 = 0x1_0000;

/// Memory behind the bus: every access leaves the guest, and reads give what was written.
pub struct TestMemory {
    bytes: Mutex<Vec<u8>>,
}

impl Default for TestMemory {
    fn default() -> Self {
        TestMemory { bytes: Mutex::new(vec![0; TEST_MEMORY_LEN as usize]) }
    }
}

impl BusDevice for TestMemory {
    fn read(&self, offset: u64, size: AccessSize) -> u64 {
        let bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        crate::byte_registers::read(offset, size, |offset| bytes.get(offset as usize).copied().unwrap_or(0xff))
    }

    fn write(&self, offset: u64, size: AccessSize, value: u64) {
        let mut bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        crate::byte_registers::write(offset, size, value, |offset, value| {
            if let Some(byte) = bytes.get_mut(offset as usize) {
                *byte = value;
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::{RecordingLine, RecordingRequests};

    #[test]
    fn a_debug_exit_carries_its_value() {
        let requests = Arc::new(RecordingRequests::default());
        let device = DebugExit::new(requests.clone());
        device.write(0, AccessSize::Byte, 0x2a);
        device.write(0, AccessSize::Dword, 0x1234_5678);
        assert_eq!(requests.taken(), [GuestRequest::DebugExit(0x2a), GuestRequest::DebugExit(0x1234_5678)]);
    }

    #[test]
    fn test_ports_echo_by_byte_lane() {
        let device = TestPorts::default();
        device.write(0, AccessSize::Dword, 0x4433_2211);
        device.write(1, AccessSize::Byte, 0xaa);
        assert_eq!(device.read(0, AccessSize::Dword), 0x4433_aa11);
        assert_eq!(device.read(1, AccessSize::Word), 0x33aa);
        device.write(4, AccessSize::Dword, 0xdead_beef);
        assert_eq!(device.read(4, AccessSize::Dword), 0);
        assert_eq!(device.read(11, AccessSize::Word), 0xff00);
    }

    #[derive(Default)]
    struct Messages(Mutex<Vec<u32>>);

    impl MsiSink for Messages {
        fn send(&self, message: MsiMessage) {
            self.0.lock().unwrap().push(message.data);
        }
    }

    #[test]
    fn interrupt_ports_move_their_pin_and_no_other() {
        let lines: Vec<Arc<RecordingLine>> = (0..2).map(|_| Arc::default()).collect();
        let messages = Arc::new(Messages::default());
        let all = lines.iter().map(|line| line.clone() as Arc<dyn InterruptLine>).collect();
        let device = TestInterrupts::new(all, messages.clone());
        device.write(1, AccessSize::Byte, 1);
        assert!(lines[1].level() && !lines[0].level());
        device.write(1, AccessSize::Byte, 0);
        assert!(!lines[1].level());
        device.write(2, AccessSize::Byte, 1);
        device.write(u64::MAX, AccessSize::Byte, 1);
        device.write(11, AccessSize::Dword, 1);
        device.write(11, AccessSize::Dword, 0);
        assert_eq!(*messages.0.lock().unwrap(), [0x709, 0x70a, 0x773]);
    }

    #[test]
    fn test_memory_keeps_bytes_and_ends_where_it_says() {
        let device = TestMemory::default();
        device.write(0xfff, AccessSize::Qword, 0x8877_6655_4433_2211);
        assert_eq!(device.read(0x1003, AccessSize::Dword), 0x8877_6655);
        device.write(TEST_MEMORY_LEN - 1, AccessSize::Word, 0x2211);
        assert_eq!(device.read(TEST_MEMORY_LEN - 1, AccessSize::Word), 0xff11);
    }
}
