//! A 16550A serial port.
//!
//! Registers as in the National Semiconductor PC16550D data sheet. Characters take no time: a byte written to the transmitter
//! is in the output at once, unless the output is full; then it waits in a small queue, and the line status says so, until
//! [`Serial::output_ready`] is called. Input comes from any thread through [`Serial::push_input`] into a bounded queue.
//!
//! What always holds: the interrupt line is high exactly while an enabled source is pending and OUT2 (the PC's interrupt gate)
//! is set; the transmitter's and the receiver's queues never exceed their bounds.

use std::collections::VecDeque;
use std::io::{ErrorKind, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use polder_machine::{AccessSize, BusDevice, InterruptLine};

use crate::byte_registers;

/// Bytes of I/O space.
pub const SERIAL_PORTS: u64 = 8;
/// Input bytes that wait for the guest at most; [`Serial::push_input`] takes no more.
pub const INPUT_LEN_MAX: usize = 64 * 1024;
/// Output bytes that wait for a full output at most: the transmitter's FIFO. Further bytes are lost, as on the wire.
pub const OUTPUT_LEN_MAX: usize = 16;

const IER_RECEIVED: u8 = 1 << 0;
const IER_TRANSMITTER_EMPTY: u8 = 1 << 1;
const IER_LINE_STATUS: u8 = 1 << 2;
const IER_MODEM_STATUS: u8 = 1 << 3;
const IER_MASK: u8 = 0x0f;

const IIR_NONE: u8 = 0x01;
const IIR_MODEM_STATUS: u8 = 0x00;
const IIR_TRANSMITTER_EMPTY: u8 = 0x02;
const IIR_RECEIVED: u8 = 0x04;
const IIR_LINE_STATUS: u8 = 0x06;
const IIR_TIMEOUT: u8 = 0x0c;
const IIR_FIFO_ENABLED: u8 = 0xc0;

const FCR_ENABLE: u8 = 1 << 0;
const FCR_CLEAR_RECEIVER: u8 = 1 << 1;
const FCR_CLEAR_TRANSMITTER: u8 = 1 << 2;

const LCR_DIVISOR_ACCESS: u8 = 1 << 7;

const MCR_DTR: u8 = 1 << 0;
const MCR_RTS: u8 = 1 << 1;
const MCR_OUT1: u8 = 1 << 2;
const MCR_OUT2: u8 = 1 << 3;
const MCR_LOOPBACK: u8 = 1 << 4;
const MCR_MASK: u8 = 0x1f;

const LSR_DATA_READY: u8 = 1 << 0;
const LSR_OVERRUN: u8 = 1 << 1;
const LSR_BREAK: u8 = 1 << 4;
const LSR_HOLDING_EMPTY: u8 = 1 << 5;
const LSR_TRANSMITTER_EMPTY: u8 = 1 << 6;

const MSR_RING: u8 = 1 << 6;
const MSR_CTS: u8 = 1 << 4;
const MSR_DSR: u8 = 1 << 5;
const MSR_DCD: u8 = 1 << 7;
/// A terminal that is there and listens.
const MSR_CONNECTED: u8 = MSR_CTS | MSR_DSR | MSR_DCD;

/// Depth of the receiver's FIFO, which the loopback mode can overrun.
const FIFO_LEN: usize = 16;

/// The 16550A. Offsets are those of the chip's registers.
pub struct Serial {
    line: Arc<dyn InterruptLine>,
    state: Mutex<State>,
}

struct State {
    output: Box<dyn Write + Send>,
    /// Written by the guest, not yet taken by the output.
    waiting_output: VecDeque<u8>,
    input: VecDeque<u8>,
    ier: u8,
    fcr: u8,
    lcr: u8,
    mcr: u8,
    /// Overrun and break; the other bits follow from the queues.
    line_errors: u8,
    /// Modem status that the guest last saw, to find what changed; the changes wait in `modem_changes`.
    modem_lines: u8,
    modem_changes: u8,
    scratch: u8,
    divisor: u16,
    /// The transmitter became empty and the guest has not heard of it.
    transmitter_interrupt: bool,
}

impl Serial {
    /// A port after power-on. `output` must not block: it takes what it can and says `WouldBlock` for the rest.
    pub fn new(output: Box<dyn Write + Send>, line: Arc<dyn InterruptLine>) -> Self {
        let state = State {
            output,
            waiting_output: VecDeque::new(),
            input: VecDeque::new(),
            ier: 0,
            fcr: 0,
            lcr: 0,
            mcr: 0,
            line_errors: 0,
            modem_lines: MSR_CONNECTED,
            modem_changes: 0,
            scratch: 0,
            divisor: 12,
            transmitter_interrupt: false,
        };
        Serial { line, state: Mutex::new(state) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the guest input; says how many bytes were taken. The rest can be offered again later. Any thread.
    pub fn push_input(&self, bytes: &[u8]) -> usize {
        let mut state = self.lock();
        let taken = bytes.len().min(INPUT_LEN_MAX - state.input.len().min(INPUT_LEN_MAX));
        state.input.extend(&bytes[..taken]);
        self.line.set(state.interrupt());
        taken
    }

    /// Input bytes that the guest has not read yet.
    pub fn input_len(&self) -> usize {
        self.lock().input.len()
    }

    /// Tells the guest of a break on the line (the system request key of a serial console).
    pub fn push_break(&self) {
        let mut state = self.lock();
        state.line_errors |= LSR_BREAK;
        if state.input.len() < INPUT_LEN_MAX {
            state.input.push_back(0);
        }
        self.line.set(state.interrupt());
    }

    /// The output can take bytes again. Any thread.
    pub fn output_ready(&self) {
        let mut state = self.lock();
        if !state.waiting_output.is_empty() {
            state.send_waiting();
        }
        self.line.set(state.interrupt());
    }

    fn read_byte(&self, offset: u64) -> u8 {
        let mut state = self.lock();
        let value = state.read(offset);
        self.line.set(state.interrupt());
        value
    }

    fn write_byte(&self, offset: u64, value: u8) {
        let mut state = self.lock();
        if offset == 0 && !state.divisor_access() {
            state.transmitter_interrupt = false;
            self.line.set(state.interrupt());
        }
        state.write(offset, value);
        self.line.set(state.interrupt());
    }
}

impl State {
    fn divisor_access(&self) -> bool {
        self.lcr & LCR_DIVISOR_ACCESS != 0
    }

    fn loopback(&self) -> bool {
        self.mcr & MCR_LOOPBACK != 0
    }

    fn read(&mut self, offset: u64) -> u8 {
        match offset {
            0 if self.divisor_access() => self.divisor as u8,
            1 if self.divisor_access() => (self.divisor >> 8) as u8,
            0 => self.input.pop_front().unwrap_or(0),
            1 => self.ier,
            2 => {
                let source = self.source();
                if source == IIR_TRANSMITTER_EMPTY {
                    self.transmitter_interrupt = false;
                }
                source | if self.fcr & FCR_ENABLE != 0 { IIR_FIFO_ENABLED } else { 0 }
            }
            3 => self.lcr,
            4 => self.mcr,
            5 => {
                let status = self.line_status();
                self.line_errors = 0;
                status
            }
            6 => {
                let changes = std::mem::take(&mut self.modem_changes);
                self.modem_lines | changes
            }
            7 => self.scratch,
            _ => 0xff,
        }
    }

    fn write(&mut self, offset: u64, value: u8) {
        match offset {
            0 if self.divisor_access() => self.divisor = self.divisor & 0xff00 | u16::from(value),
            1 if self.divisor_access() => self.divisor = self.divisor & 0x00ff | u16::from(value) << 8,
            0 => self.transmit(value),
            1 => {
                let enabled_now = value & !self.ier & IER_TRANSMITTER_EMPTY != 0;
                self.ier = value & IER_MASK;
                if enabled_now && self.waiting_output.is_empty() {
                    self.transmitter_interrupt = true;
                }
            }
            2 => {
                if (value ^ self.fcr) & FCR_ENABLE != 0 || value & FCR_CLEAR_RECEIVER != 0 {
                    // A real receiver holds 16 bytes; what lies beyond them in our queue is still on the wire and stays.
                    let held = self.input.len().min(FIFO_LEN);
                    self.input.drain(..held);
                }
                if (value ^ self.fcr) & FCR_ENABLE != 0 || value & FCR_CLEAR_TRANSMITTER != 0 {
                    self.waiting_output.clear();
                    self.transmitter_interrupt = true;
                }
                self.fcr = if value & FCR_ENABLE != 0 { value & 0xc9 } else { 0 };
            }
            3 => self.lcr = value,
            4 => {
                self.mcr = value & MCR_MASK;
                self.update_modem_lines();
            }
            7 => self.scratch = value,
            // The line and modem status registers are read-only in practice ("factory testing").
            _ => {}
        }
    }

    fn transmit(&mut self, value: u8) {
        if self.loopback() {
            let depth = if self.fcr & FCR_ENABLE != 0 { FIFO_LEN } else { 1 };
            if self.input.len() < depth {
                self.input.push_back(value);
            } else {
                self.line_errors |= LSR_OVERRUN;
            }
            self.transmitter_interrupt = true;
            return;
        }
        if self.waiting_output.len() < OUTPUT_LEN_MAX {
            self.waiting_output.push_back(value);
        }
        self.send_waiting();
    }

    /// Hands waiting bytes to the output; an empty queue afterwards is news for the guest.
    fn send_waiting(&mut self) {
        while !self.waiting_output.is_empty() {
            let (front, _) = self.waiting_output.as_slices();
            match self.output.write(front) {
                Ok(0) => break,
                Ok(taken) => {
                    let taken = taken.min(front.len());
                    self.waiting_output.drain(..taken);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                // Nobody listens any more: as on a cable that was pulled, the bytes are gone.
                Err(_) => self.waiting_output.clear(),
            }
        }
        if self.waiting_output.is_empty() {
            let _ = self.output.flush();
            self.transmitter_interrupt = true;
        }
    }

    fn update_modem_lines(&mut self) {
        let lines = if self.loopback() {
            let pairs = [(MCR_RTS, MSR_CTS), (MCR_DTR, MSR_DSR), (MCR_OUT1, MSR_RING), (MCR_OUT2, MSR_DCD)];
            pairs.iter().filter(|(output, _)| self.mcr & output != 0).fold(0, |lines, (_, input)| lines | input)
        } else {
            MSR_CONNECTED
        };
        let changed = lines ^ self.modem_lines;
        // Bit 2 reports the ring indicator's trailing edge only.
        let trailing_ring = changed & self.modem_lines & MSR_RING;
        self.modem_changes |= (changed & !MSR_RING | trailing_ring) >> 4;
        self.modem_lines = lines;
    }

    fn line_status(&self) -> u8 {
        let mut status = self.line_errors;
        if !self.input.is_empty() {
            status |= LSR_DATA_READY;
        }
        if self.waiting_output.is_empty() {
            status |= LSR_HOLDING_EMPTY | LSR_TRANSMITTER_EMPTY;
        }
        status
    }

    /// Bytes in the receiver from which on it interrupts.
    fn trigger_len(&self) -> usize {
        if self.fcr & FCR_ENABLE == 0 {
            return 1;
        }
        match self.fcr >> 6 {
            0 => 1,
            1 => 4,
            2 => 8,
            _ => 14,
        }
    }

    /// The pending source of the highest priority (data sheet, table IV), as the interrupt identification register has it.
    fn source(&self) -> u8 {
        if self.ier & IER_LINE_STATUS != 0 && self.line_errors != 0 {
            IIR_LINE_STATUS
        } else if self.ier & IER_RECEIVED != 0 && self.input.len() >= self.trigger_len() {
            IIR_RECEIVED
        } else if self.ier & IER_RECEIVED != 0 && !self.input.is_empty() {
            // Fewer bytes than the trigger level, and no more on the wire: the time-out of four characters is over.
            IIR_TIMEOUT
        } else if self.ier & IER_TRANSMITTER_EMPTY != 0 && self.transmitter_interrupt {
            IIR_TRANSMITTER_EMPTY
        } else if self.ier & IER_MODEM_STATUS != 0 && self.modem_changes != 0 {
            IIR_MODEM_STATUS
        } else {
            IIR_NONE
        }
    }

    fn interrupt(&self) -> bool {
        // In loopback mode OUT2 is disconnected from the pin, but the chip's interrupts stay fully operational.
        self.source() != IIR_NONE && (self.mcr & MCR_OUT2 != 0 || self.loopback())
    }
}

impl BusDevice for Serial {
    fn read(&self, offset: u64, size: AccessSize) -> u64 {
        byte_registers::read(offset, size, |offset| self.read_byte(offset))
    }

    fn write(&self, offset: u64, size: AccessSize, value: u64) {
        byte_registers::write(offset, size, value, |offset, value| self.write_byte(offset, value));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::{RecordingLine, SharedOutput};

    fn port() -> (Serial, SharedOutput, Arc<RecordingLine>) {
        let (output, line) = (SharedOutput::default(), Arc::new(RecordingLine::default()));
        let serial = Serial::new(Box::new(output.clone()), line.clone());
        serial.write(4, AccessSize::Byte, u64::from(MCR_OUT2));
        (serial, output, line)
    }

    fn read(serial: &Serial, offset: u64) -> u8 {
        serial.read(offset, AccessSize::Byte) as u8
    }

    fn write(serial: &Serial, offset: u64, value: u8) {
        serial.write(offset, AccessSize::Byte, u64::from(value));
    }

    #[test]
    fn bytes_written_come_out_in_order() {
        let (serial, output, _) = port();
        for byte in b"hello" {
            assert_eq!(read(&serial, 5) & 0x60, 0x60);
            write(&serial, 0, *byte);
        }
        assert_eq!(output.taken(), b"hello");
    }

    #[test]
    fn a_full_output_holds_the_transmitter_and_loses_nothing_in_the_fifo() {
        let (serial, output, line) = port();
        write(&serial, 1, IER_TRANSMITTER_EMPTY);
        assert_eq!(read(&serial, 2), IIR_TRANSMITTER_EMPTY);
        output.set_full(true);
        write(&serial, 0, b'a');
        assert_eq!(read(&serial, 5) & 0x60, 0);
        assert!(!line.level());
        output.set_full(false);
        serial.output_ready();
        assert!(line.level());
        assert_eq!(output.taken(), b"a");
        assert_eq!(read(&serial, 5) & 0x60, 0x60);
    }

    #[test]
    fn a_guest_that_ignores_a_full_output_cannot_grow_the_queue() {
        let (serial, output, _) = port();
        output.set_full(true);
        for _ in 0..1000 {
            write(&serial, 0, b'x');
        }
        output.set_full(false);
        serial.output_ready();
        assert_eq!(output.taken().len(), OUTPUT_LEN_MAX);
    }

    #[test]
    fn enabling_the_transmitter_interrupt_reports_an_empty_transmitter_each_time() {
        let (serial, _, line) = port();
        for _ in 0..2 {
            write(&serial, 1, IER_TRANSMITTER_EMPTY);
            assert!(line.level());
            assert_eq!(read(&serial, 2) & 0x0f, IIR_TRANSMITTER_EMPTY);
            assert!(!line.level());
            assert_eq!(read(&serial, 2) & 0x0f, IIR_NONE);
            write(&serial, 1, 0);
        }
    }

    #[test]
    fn every_byte_sent_makes_a_new_edge() {
        let (serial, _, line) = port();
        write(&serial, 1, IER_TRANSMITTER_EMPTY);
        let before = line.rising_edges();
        write(&serial, 0, b'a');
        write(&serial, 0, b'b');
        assert_eq!(line.rising_edges(), before + 2);
    }

    #[test]
    fn input_interrupts_until_it_is_read() {
        let (serial, _, line) = port();
        write(&serial, 2, FCR_ENABLE | 0xc0);
        write(&serial, 1, IER_RECEIVED);
        assert_eq!(serial.push_input(b"ok"), 2);
        assert!(line.level());
        assert_eq!(read(&serial, 2), IIR_TIMEOUT | IIR_FIFO_ENABLED);
        assert_eq!(serial.push_input(&[b'.'; 12]), 12);
        assert_eq!(read(&serial, 2), IIR_RECEIVED | IIR_FIFO_ENABLED);
        assert_eq!(read(&serial, 0), b'o');
        assert_eq!(read(&serial, 0), b'k');
        for _ in 0..12 {
            assert_eq!(read(&serial, 5) & LSR_DATA_READY, LSR_DATA_READY);
            assert_eq!(read(&serial, 0), b'.');
        }
        assert!(!line.level());
        assert_eq!(read(&serial, 5) & LSR_DATA_READY, 0);
        assert_eq!(read(&serial, 0), 0);
    }

    #[test]
    fn the_input_queue_is_bounded() {
        let (serial, _, _) = port();
        assert_eq!(serial.push_input(&vec![1; INPUT_LEN_MAX + 1]), INPUT_LEN_MAX);
        assert_eq!(serial.push_input(&[1]), 0);
        read(&serial, 0);
        assert_eq!(serial.push_input(&[1, 2]), 1);
    }

    #[test]
    fn without_out2_the_line_stays_low() {
        let (serial, _, line) = port();
        write(&serial, 4, 0);
        write(&serial, 1, IER_TRANSMITTER_EMPTY);
        assert!(!line.level());
        write(&serial, 4, MCR_OUT2);
        assert!(line.level());
    }

    #[test]
    fn the_loopback_test_of_an_8250_driver_passes() {
        let (serial, output, _) = port();
        write(&serial, 4, MCR_LOOPBACK | 0x0a);
        assert_eq!(read(&serial, 6) & 0xf0, 0x90);
        write(&serial, 0, 0x5a);
        assert_eq!(read(&serial, 0), 0x5a);
        assert!(output.taken().is_empty());
        write(&serial, 4, MCR_OUT2);
        assert_eq!(read(&serial, 6) & 0xf0, MSR_CONNECTED);
        assert_eq!(read(&serial, 6) & 0x0f, 0);
    }

    #[test]
    fn loopback_overruns_a_full_receiver() {
        let (serial, _, _) = port();
        write(&serial, 4, MCR_LOOPBACK);
        write(&serial, 0, 1);
        write(&serial, 0, 2);
        assert_eq!(read(&serial, 5) & LSR_OVERRUN, LSR_OVERRUN);
        assert_eq!(read(&serial, 5) & LSR_OVERRUN, 0);
        assert_eq!(read(&serial, 0), 1);
    }

    #[test]
    fn it_is_a_16550a_and_not_a_later_chip() {
        let (serial, _, _) = port();
        write(&serial, 1, 0xff);
        assert_eq!(read(&serial, 1), IER_MASK);
        write(&serial, 2, FCR_ENABLE | 0x20);
        assert_eq!(read(&serial, 2) & 0xe0, 0xc0);
        write(&serial, 7, 0xa5);
        assert_eq!(read(&serial, 7), 0xa5);
        write(&serial, 4, 0xff);
        assert_eq!(read(&serial, 4), MCR_MASK);
    }

    #[test]
    fn the_divisor_is_reached_through_its_access_bit_only() {
        let (serial, output, _) = port();
        write(&serial, 3, LCR_DIVISOR_ACCESS | 3);
        serial.write(0, AccessSize::Word, 0x1234);
        assert_eq!(serial.read(0, AccessSize::Word), 0x1234);
        write(&serial, 3, 3);
        assert_eq!(read(&serial, 1), 0);
        assert!(output.taken().is_empty());
    }

    #[test]
    fn wide_accesses_are_split_into_registers() {
        let (serial, _, _) = port();
        serial.write(4, AccessSize::Dword, 0x7700_0008);
        assert_eq!(serial.read(4, AccessSize::Dword), 0x77b0_6008);
        assert_eq!(serial.read(0, AccessSize::Qword), 0x77b0_6008_0001_0000);
        assert_eq!(serial.read(7, AccessSize::Word), 0xff77);
    }

    #[test]
    fn a_break_is_reported_once() {
        let (serial, _, line) = port();
        write(&serial, 1, IER_LINE_STATUS);
        serial.push_break();
        assert!(line.level());
        assert_eq!(read(&serial, 2), IIR_LINE_STATUS);
        assert_eq!(read(&serial, 5) & (LSR_BREAK | LSR_DATA_READY), LSR_BREAK | LSR_DATA_READY);
        assert!(!line.level());
    }
}
