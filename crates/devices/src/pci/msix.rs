//! MSI-X: a table of interrupt messages with a mask and a pending bit each (PCI Express Base Specification 5.0, 7.7.2).
//!
//! Decided here: the table takes naturally aligned double and quad words only, other writes are dropped; reads of any size give
//! the bytes. A message that is masked, or that the function may not send for want of bus mastering, stays pending and goes
//! out once when that ends. Messages are sent under the table's lock: after a guest has masked a vector, none arrives.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use polder_machine::{AccessSize, MsiMessage, MsiSink};

use crate::lock;

/// The most vectors a function has here; the architecture allows 2048.
pub const MSIX_VECTORS_MAX: u16 = 128;

const ENTRY_LEN: u64 = 16;
const ENTRY_MASKED: u32 = 1;

#[derive(Clone, Copy)]
struct Entry {
    /// Address low, address high, data, vector control.
    words: [u32; 4],
}

struct State {
    entries: Vec<Entry>,
    pending: Vec<bool>,
    function_masked: bool,
    bus_master: bool,
}

/// The MSI-X part of a function.
pub struct Msix {
    sink: Arc<dyn MsiSink>,
    enabled: AtomicBool,
    state: Mutex<State>,
}

impl Msix {
    /// `vectors` vectors, all masked, MSI-X off.
    pub fn new(vectors: u16, sink: Arc<dyn MsiSink>) -> Self {
        let vectors = vectors.clamp(1, MSIX_VECTORS_MAX) as usize;
        Msix {
            sink,
            enabled: AtomicBool::new(false),
            state: Mutex::new(State {
                entries: vec![Entry { words: [0, 0, 0, ENTRY_MASKED] }; vectors],
                pending: vec![false; vectors],
                function_masked: false,
                bus_master: false,
            }),
        }
    }

    /// Number of vectors.
    pub fn vectors(&self) -> u16 {
        lock(&self.state).entries.len() as u16
    }

    /// The body of the capability (id 0x11) and its mask of writable bits. Both offsets are multiples of 8 in BAR `bar`.
    pub fn capability(&self, bar: u8, table_offset: u32, pending_offset: u32) -> ([u8; 10], [u8; 2]) {
        let mut body = [0; 10];
        body[0..2].copy_from_slice(&(self.vectors() - 1).to_le_bytes());
        body[2..6].copy_from_slice(&(table_offset | u32::from(bar)).to_le_bytes());
        body[6..10].copy_from_slice(&(pending_offset | u32::from(bar)).to_le_bytes());
        (body, [0, 0xc0])
    }

    /// The guest wrote the capability's message control register.
    pub fn set_control(&self, control: u16) {
        let mut state = lock(&self.state);
        self.enabled.store(control & 0x8000 != 0, Ordering::SeqCst);
        state.function_masked = control & 0x4000 != 0;
        self.flush(&mut state);
    }

    /// The guest changed the command register's bus master bit.
    pub fn set_bus_master(&self, bus_master: bool) {
        let mut state = lock(&self.state);
        state.bus_master = bus_master;
        self.flush(&mut state);
    }

    /// Whether the guest uses MSI-X rather than INTx.
    pub fn is_enabled(&self) -> bool {
        self.enabled.load(Ordering::SeqCst)
    }

    /// Raises a vector; one that does not exist is ignored.
    pub fn trigger(&self, vector: u16) {
        let mut state = lock(&self.state);
        if !self.is_enabled() {
            return;
        }
        if let Some(pending) = state.pending.get_mut(vector as usize) {
            *pending = true;
            self.send_pending(&mut state, vector as usize);
        }
    }

    /// Forgets pending messages; the device was reset.
    pub fn clear_pending(&self) {
        lock(&self.state).pending.fill(false);
    }

    fn flush(&self, state: &mut State) {
        for vector in 0..state.entries.len() {
            self.send_pending(state, vector);
        }
    }

    fn send_pending(&self, state: &mut State, vector: usize) {
        if !self.is_enabled() || state.function_masked || !state.bus_master || !state.pending[vector] {
            return;
        }
        let [low, high, data, control] = state.entries[vector].words;
        if control & ENTRY_MASKED == 0 {
            state.pending[vector] = false;
            self.sink.send(MsiMessage { address: u64::from(high) << 32 | u64::from(low), data });
        }
    }

    /// Reads the table at a byte offset; beyond its end are zeros.
    pub fn table_read(&self, offset: u64, size: AccessSize) -> u64 {
        let state = lock(&self.state);
        assemble(offset, size, |at| {
            let entry = state.entries.get((at / ENTRY_LEN) as usize)?;
            Some(entry.words[(at % ENTRY_LEN / 4) as usize].to_le_bytes()[(at % 4) as usize])
        })
    }

    /// Writes the table.
    pub fn table_write(&self, offset: u64, size: AccessSize, value: u64) {
        if size.bytes() < 4 || !offset.is_multiple_of(size.bytes()) {
            return;
        }
        let mut state = lock(&self.state);
        for half in 0..size.bytes() / 4 {
            let at = offset.wrapping_add(4 * half);
            let vector = (at / ENTRY_LEN) as usize;
            let Some(entry) = state.entries.get_mut(vector) else { return };
            let word = (value >> (32 * half)) as u32;
            match at % ENTRY_LEN / 4 {
                0 => entry.words[0] = word & !3,
                3 => {
                    entry.words[3] = word & ENTRY_MASKED;
                    self.send_pending(&mut state, vector);
                }
                index => entry.words[index as usize] = word,
            }
        }
    }

    /// Reads the pending bit array; it cannot be written.
    pub fn pending_read(&self, offset: u64, size: AccessSize) -> u64 {
        let state = lock(&self.state);
        assemble(offset, size, |at| {
            let first = (at as usize).checked_mul(8)?;
            let bits = state.pending.get(first..(first + 8).min(state.pending.len()).max(first))?;
            Some(bits.iter().enumerate().fold(0, |byte, (bit, &set)| byte | u8::from(set) << bit))
        })
    }
}

/// Puts a value together from bytes; missing bytes are zero.
fn assemble(offset: u64, size: AccessSize, byte: impl Fn(u64) -> Option<u8>) -> u64 {
    (0..size.bytes()).fold(0, |value, index| {
        let byte = offset.checked_add(index).and_then(&byte).unwrap_or(0);
        value | u64::from(byte) << (8 * index)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use AccessSize::{Byte, Dword, Qword, Word};

    #[derive(Default)]
    struct Recorder(Mutex<Vec<MsiMessage>>);

    impl MsiSink for Recorder {
        fn send(&self, message: MsiMessage) {
            self.0.lock().unwrap().push(message);
        }
    }

    fn msix(vectors: u16) -> (Arc<Recorder>, Msix) {
        let recorder = Arc::new(Recorder::default());
        let msix = Msix::new(vectors, recorder.clone());
        msix.set_bus_master(true);
        (recorder, msix)
    }

    #[test]
    fn a_masked_message_stays_pending_and_is_sent_once_when_unmasked() {
        let (recorder, msix) = msix(3);
        msix.set_control(0x8000);
        msix.table_write(16, Qword, 0xfee0_1000);
        msix.table_write(24, Dword, 0x4041);
        msix.trigger(1);
        msix.trigger(1);
        assert_eq!(msix.pending_read(0, Byte), 0b10);
        assert!(recorder.0.lock().unwrap().is_empty());
        msix.table_write(28, Dword, 0);
        assert_eq!(*recorder.0.lock().unwrap(), [MsiMessage { address: 0xfee0_1000, data: 0x4041 }]);
        assert_eq!(msix.pending_read(0, Qword), 0);
    }

    #[test]
    fn the_function_mask_and_bus_mastering_hold_messages_back() {
        let (recorder, msix) = msix(1);
        msix.table_write(8, Qword, 7);
        msix.set_control(0xc000);
        msix.trigger(0);
        msix.set_bus_master(false);
        msix.set_control(0x8000);
        assert!(recorder.0.lock().unwrap().is_empty());
        msix.set_bus_master(true);
        assert_eq!(recorder.0.lock().unwrap().len(), 1);
    }

    #[test]
    fn short_misaligned_and_far_accesses_do_no_harm() {
        let (_, msix) = msix(2);
        msix.table_write(0, Dword, 0xaabb_ccdc);
        for (offset, size) in [(0, Byte), (0, Word), (2, Dword), (4, Qword), (32, Dword), (u64::MAX - 3, Dword)] {
            msix.table_write(offset, size, u64::MAX);
        }
        assert_eq!(msix.table_read(0, Dword), 0xaabb_ccdc);
        assert_eq!(msix.table_read(4, Dword), 0);
        assert_eq!(msix.table_read(1, Word), 0xbbcc);
        assert_eq!(msix.table_read(u64::MAX, Qword), 0);
        assert_eq!(msix.pending_read(u64::MAX / 4, Qword), 0);
        msix.trigger(2);
        msix.trigger(u16::MAX);
    }

    #[test]
    fn a_wide_write_at_the_end_of_an_entry_stays_inside_the_table() {
        let (_, msix) = msix(1);
        msix.table_write(8, Qword, 1 << 32 | 5);
        assert_eq!(msix.table_read(8, Qword), 1 << 32 | 5);
        assert_eq!(msix.table_read(12, Qword), 1);
    }
}
