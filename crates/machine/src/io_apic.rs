//! The I/O APIC (Intel 82093AA, version 0x20): 24 pins become interrupt messages.
//!
//! Both engines use this one. A level-triggered pin sends one message, sets Remote IRR, and is looked at again when the local
//! APIC that took it reports its end: while the wire is still high, the message is sent anew. Polarity is stored and ignored: a wire
//! knows only whether its device asks, not at which voltage.
//!
//! Invariant: no message is sent with the lock held, so an engine may report the end of an interrupt from wherever it likes.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock};

use crate::layout::IO_APIC_PINS;
use crate::{AccessSize, BusDevice, EoiListener, InterruptLine, MsiMessage, MsiSink};

const PINS: usize = IO_APIC_PINS as usize;

/// Memory-mapped registers (82093AA, 3.1; the EOI register came with version 0x20).
const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;
const EOI: u64 = 0x40;

/// Indirect registers (82093AA, 3.2).
const ID: u8 = 0x00;
const VERSION: u8 = 0x01;
const ARBITRATION: u8 = 0x02;
const REDIRECTION: u8 = 0x10;

/// Highest pin in bits 16-23, version 0x20 in bits 0-7.
const VERSION_VALUE: u32 = (IO_APIC_PINS as u32 - 1) << 16 | 0x20;

/// A redirection entry (82093AA, 3.2.4).
#[derive(Debug, Clone, Copy)]
struct Redirection(u64);

impl Redirection {
    const MASKED: u64 = 1 << 16;
    const LEVEL: u64 = 1 << 15;
    const REMOTE_IRR: u64 = 1 << 14;
    const DELIVERY_STATUS: u64 = 1 << 12;
    /// Bits that software writes: vector, delivery mode, destination mode, polarity, trigger mode, mask, destination.
    const WRITABLE: u64 = 0xff00_0000_0001_ffff & !Self::REMOTE_IRR & !Self::DELIVERY_STATUS;

    fn is(self, bit: u64) -> bool {
        self.0 & bit != 0
    }

    fn vector(self) -> u8 {
        self.0 as u8
    }

    /// The message that this entry sends (SDM vol. 3, 11.11.1 and 11.11.2).
    fn message(self) -> MsiMessage {
        let delivery_mode = self.0 >> 8 & 7;
        let destination_mode = self.0 >> 11 & 1;
        let redirection_hint = u64::from(delivery_mode == 1);
        let level = self.is(Self::LEVEL);
        MsiMessage {
            address: 0xfee0_0000 | (self.0 >> 56) << 12 | redirection_hint << 3 | destination_mode << 2,
            data: self.vector() as u32 | (delivery_mode as u32) << 8 | if level { 0xc000 } else { 0 },
        }
    }
}

struct State {
    select: u8,
    id: u32,
    /// Levels of the wires, a bit a pin.
    wires: u32,
    redirections: [Redirection; PINS],
}

impl State {
    fn power_on() -> Self {
        State { select: 0, id: 0, wires: 0, redirections: [Redirection(Redirection::MASKED); PINS] }
    }

    /// The message that a pin sends now that its wire is, or has just become, high; notes that it was sent.
    fn fire(&mut self, pin: usize) -> Option<MsiMessage> {
        let entry = &mut self.redirections[pin];
        if entry.is(Redirection::MASKED) {
            return None;
        }
        if entry.is(Redirection::LEVEL) {
            if entry.is(Redirection::REMOTE_IRR) {
                return None;
            }
            entry.0 |= Redirection::REMOTE_IRR;
        }
        Some(entry.message())
    }

    fn set_wire(&mut self, pin: usize, asserted: bool) -> Option<MsiMessage> {
        let was = self.wires >> pin & 1 != 0;
        self.wires = self.wires & !(1 << pin) | u32::from(asserted) << pin;
        let level = self.redirections[pin].is(Redirection::LEVEL);
        (asserted && (level || !was)).then(|| self.fire(pin)).flatten()
    }

    /// A level-triggered pin whose wire is high and whose message is not under way fires.
    fn fire_level(&mut self, pin: usize) -> Option<MsiMessage> {
        (self.redirections[pin].is(Redirection::LEVEL) && self.wires >> pin & 1 != 0).then(|| self.fire(pin)).flatten()
    }

    fn read_indirect(&self) -> u32 {
        match self.select {
            ID | ARBITRATION => self.id,
            VERSION => VERSION_VALUE,
            register => match self.redirections.get(usize::from(register.wrapping_sub(REDIRECTION) / 2)) {
                Some(entry) if register >= REDIRECTION => (entry.0 >> (32 * (register & 1))) as u32,
                _ => 0,
            },
        }
    }

    fn write_indirect(&mut self, value: u32) -> Option<MsiMessage> {
        let register = self.select;
        if register == ID {
            self.id = value & 0x0f00_0000;
        }
        if register < REDIRECTION {
            return None;
        }
        let pin = usize::from((register - REDIRECTION) / 2);
        let entry = self.redirections.get_mut(pin)?;
        let shift = 32 * (register & 1);
        let half = 0xffff_ffff << shift & Redirection::WRITABLE;
        entry.0 = entry.0 & !half | u64::from(value) << shift & half;
        if !entry.is(Redirection::LEVEL) {
            // Guests clear a stuck Remote IRR by making the entry edge-triggered for a moment.
            entry.0 &= !Redirection::REMOTE_IRR;
        }
        self.fire_level(pin)
    }
}

/// The I/O APIC. Its registers are a [`BusDevice`] of 4 KiB; its pins are the [`InterruptLine`]s that [`IoApic::line`] makes.
pub struct IoApic {
    state: Mutex<State>,
    sink: OnceLock<Arc<dyn MsiSink>>,
}

impl std::fmt::Debug for IoApic {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IoApic").finish_non_exhaustive()
    }
}

impl Default for IoApic {
    fn default() -> Self {
        IoApic { state: Mutex::new(State::power_on()), sink: OnceLock::new() }
    }
}

impl IoApic {
    /// An I/O APIC after power-on; its messages are dropped until it is connected.
    pub fn new() -> Arc<Self> {
        Arc::new(Self::default())
    }

    /// Sets where the messages go. Once; a second call changes nothing.
    pub fn connect(&self, sink: Arc<dyn MsiSink>) {
        let _ = self.sink.set(sink);
    }

    /// The wire to a pin (a global system interrupt), or `None` if there is no such pin. All wires to one pin are the same wire.
    pub fn line(self: &Arc<Self>, pin: u8) -> Option<Arc<dyn InterruptLine>> {
        (pin < IO_APIC_PINS).then(|| Arc::new(Pin { io_apic: self.clone(), pin: pin.into() }) as Arc<dyn InterruptLine>)
    }

    /// The power-on state: all pins masked.
    pub fn reset(&self) {
        *self.state() = State::power_on();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn send(&self, message: Option<MsiMessage>) {
        if let (Some(message), Some(sink)) = (message, self.sink.get()) {
            sink.send(message);
        }
    }
}

impl BusDevice for IoApic {
    fn read(&self, offset: u64, _size: AccessSize) -> u64 {
        let state = self.state();
        match offset {
            SELECT => state.select.into(),
            WINDOW => state.read_indirect().into(),
            _ => 0,
        }
    }

    fn write(&self, offset: u64, _size: AccessSize, value: u64) {
        match offset {
            SELECT => self.state().select = value as u8,
            WINDOW => {
                let message = self.state().write_indirect(value as u32);
                self.send(message);
            }
            EOI => self.end_of_interrupt(value as u8),
            _ => {}
        }
    }
}

impl EoiListener for IoApic {
    fn end_of_interrupt(&self, vector: u8) {
        let mut messages = [None; PINS];
        {
            let mut state = self.state();
            for (pin, message) in messages.iter_mut().enumerate() {
                let entry = &mut state.redirections[pin];
                if entry.is(Redirection::LEVEL) && entry.is(Redirection::REMOTE_IRR) && entry.vector() == vector {
                    entry.0 &= !Redirection::REMOTE_IRR;
                    *message = state.fire_level(pin);
                }
            }
        }
        for message in messages {
            self.send(message);
        }
    }
}

struct Pin {
    io_apic: Arc<IoApic>,
    pin: usize,
}

impl InterruptLine for Pin {
    fn set(&self, asserted: bool) {
        let message = self.io_apic.state().set_wire(self.pin, asserted);
        self.io_apic.send(message);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<MsiMessage>>);

    impl MsiSink for Recorder {
        fn send(&self, message: MsiMessage) {
            self.0.lock().unwrap().push(message);
        }
    }

    impl Recorder {
        fn take(&self) -> Vec<MsiMessage> {
            std::mem::take(&mut self.0.lock().unwrap())
        }
    }

    fn connected() -> (Arc<IoApic>, Arc<Recorder>) {
        let io_apic = IoApic::new();
        let recorder = Arc::new(Recorder::default());
        io_apic.connect(recorder.clone());
        (io_apic, recorder)
    }

    fn set_entry(io_apic: &IoApic, pin: u8, entry: u64) {
        for (half, value) in [(1, entry >> 32), (0, entry & 0xffff_ffff)] {
            io_apic.write(SELECT, AccessSize::Dword, u64::from(REDIRECTION + 2 * pin + half));
            io_apic.write(WINDOW, AccessSize::Dword, value);
        }
    }

    fn low_half(io_apic: &IoApic, pin: u8) -> u64 {
        io_apic.write(SELECT, AccessSize::Dword, u64::from(REDIRECTION + 2 * pin));
        io_apic.read(WINDOW, AccessSize::Dword)
    }

    #[test]
    fn an_edge_sends_one_message_with_the_entrys_destination() {
        let (io_apic, recorder) = connected();
        set_entry(&io_apic, 4, 0x0300_0000_0000_0931);
        let line = io_apic.line(4).unwrap();
        line.set(true);
        line.set(true);
        assert_eq!(recorder.take(), [MsiMessage { address: 0xfee0_3008 | 1 << 2, data: 0x131 }]);
        line.set(false);
        line.set(true);
        assert_eq!(recorder.take().len(), 1);
    }

    #[test]
    fn a_level_is_sent_again_at_its_end_while_the_wire_stays_high() {
        let (io_apic, recorder) = connected();
        set_entry(&io_apic, 9, 0x8000 | 0x55);
        let line = io_apic.line(9).unwrap();
        line.set(true);
        line.set(true);
        assert_eq!(recorder.take(), [MsiMessage { address: 0xfee0_0000, data: 0xc055 }]);
        assert_ne!(low_half(&io_apic, 9) & Redirection::REMOTE_IRR, 0);
        io_apic.end_of_interrupt(0x54);
        assert_eq!(recorder.take(), []);
        io_apic.end_of_interrupt(0x55);
        assert_eq!(recorder.take().len(), 1);
        line.set(false);
        io_apic.write(EOI, AccessSize::Dword, 0x55);
        assert_eq!(recorder.take(), []);
        assert_eq!(low_half(&io_apic, 9) & Redirection::REMOTE_IRR, 0);
    }

    #[test]
    fn a_masked_level_fires_when_unmasked_and_a_masked_edge_is_lost() {
        let (io_apic, recorder) = connected();
        set_entry(&io_apic, 10, Redirection::MASKED | 0x8000 | 0x40);
        set_entry(&io_apic, 11, Redirection::MASKED | 0x41);
        io_apic.line(10).unwrap().set(true);
        io_apic.line(11).unwrap().pulse();
        assert_eq!(recorder.take(), []);
        set_entry(&io_apic, 10, 0x8000 | 0x40);
        set_entry(&io_apic, 11, 0x41);
        assert_eq!(recorder.take(), [MsiMessage { address: 0xfee0_0000, data: 0xc040 }]);
    }

    #[test]
    fn an_entry_made_edge_triggered_loses_its_remote_irr() {
        let (io_apic, _recorder) = connected();
        set_entry(&io_apic, 5, 0x8000 | 0x40);
        io_apic.line(5).unwrap().set(true);
        set_entry(&io_apic, 5, Redirection::MASKED | 0x40);
        set_entry(&io_apic, 5, Redirection::MASKED | 0x8000 | 0x40);
        assert_eq!(low_half(&io_apic, 5) & Redirection::REMOTE_IRR, 0);
    }

    #[test]
    fn every_offset_and_register_can_be_touched() {
        let (io_apic, _recorder) = connected();
        for select in 0..=0xff {
            io_apic.write(SELECT, AccessSize::Byte, select);
            io_apic.write(WINDOW, AccessSize::Qword, u64::MAX);
            io_apic.read(WINDOW, AccessSize::Byte);
        }
        for offset in 0..0x1000 {
            io_apic.write(offset, AccessSize::Qword, u64::MAX);
            io_apic.read(offset, AccessSize::Word);
        }
        assert!(io_apic.line(IO_APIC_PINS).is_none());
        io_apic.reset();
        io_apic.write(SELECT, AccessSize::Byte, VERSION.into());
        assert_eq!(io_apic.read(WINDOW, AccessSize::Dword), 0x17_0020);
    }
}
