//! virtio console (5.3) with one port.
//!
//! The same contract as the serial port: output goes to a writer that never blocks and that may say `WouldBlock`, then the chain at
//! hand waits until [`Console::output_ready`]; input comes from any thread through [`Console::push_input`] into a bounded queue.

use std::collections::VecDeque;
use std::io::{ErrorKind, Write};
use std::sync::{Arc, Mutex};

use super::{
    ActivateError, Activation, Buffers, Chain, DeviceInterrupts, DeviceType, Queue, QueueError, Signal, VirtioDevice,
    Worker, copy_config,
};
use crate::lock::lock;

/// Input bytes that wait for the guest at most; [`Console::push_input`] takes no more.
pub const INPUT_LEN_MAX: usize = 64 * 1024;

/// The configuration tells the terminal's size (5.3.3).
const FEATURE_SIZE: u64 = 1 << 0;
/// The configuration takes single characters before the queues work.
const FEATURE_EMERGENCY_WRITE: u64 = 1 << 2;

const CONFIG_EMERGENCY_WRITE: u64 = 8;

const QUEUE_RECEIVE: u16 = 0;
const QUEUE_TRANSMIT: u16 = 1;
const QUEUE_SIZES: [u16; 2] = [64, 64];

/// Bytes copied at a time.
const CHUNK_LEN: usize = 4096;
/// Bytes of one chain that are written before the thread looks up again.
const TURN_LEN_MAX: usize = 64 * 1024;

/// The console device.
pub struct Console {
    shared: Arc<Shared>,
    active: Mutex<Option<Active>>,
}

struct Active {
    worker: Worker,
    interrupts: Arc<dyn DeviceInterrupts>,
}

struct Shared {
    output: Mutex<Box<dyn Write + Send>>,
    input: Mutex<VecDeque<u8>>,
    /// Columns and rows.
    size: Mutex<(u16, u16)>,
}

impl Console {
    /// A console on `output`, which must not block.
    pub fn new(output: Box<dyn Write + Send>) -> Self {
        let shared = Shared { output: Mutex::new(output), input: Mutex::default(), size: Mutex::new((80, 25)) };
        Console { shared: Arc::new(shared), active: Mutex::new(None) }
    }

    fn raise(&self) {
        if let Some(active) = &*lock(&self.active) {
            active.worker.raise();
        }
    }

    /// Gives the guest input; says how many bytes were taken. Any thread.
    pub fn push_input(&self, bytes: &[u8]) -> usize {
        let taken = {
            let mut input = lock(&self.shared.input);
            let taken = bytes.len().min(INPUT_LEN_MAX.saturating_sub(input.len()));
            input.extend(&bytes[..taken]);
            taken
        };
        self.raise();
        taken
    }

    /// The output can take bytes again. Any thread.
    pub fn output_ready(&self) {
        self.raise();
    }

    /// Tells the guest the terminal's size. Any thread.
    pub fn resize(&self, columns: u16, rows: u16) {
        *lock(&self.shared.size) = (columns, rows);
        if let Some(active) = &*lock(&self.active) {
            active.interrupts.config_changed();
        }
    }
}

impl VirtioDevice for Console {
    fn device_type(&self) -> DeviceType {
        DeviceType::Console
    }

    fn features(&self) -> u64 {
        FEATURE_SIZE | FEATURE_EMERGENCY_WRITE
    }

    fn queue_sizes(&self) -> Vec<u16> {
        QUEUE_SIZES.to_vec()
    }

    fn config_read(&self, offset: u64, target: &mut [u8]) {
        let (columns, rows) = *lock(&self.shared.size);
        let mut config = [0; 12];
        config[0..2].copy_from_slice(&columns.to_le_bytes());
        config[2..4].copy_from_slice(&rows.to_le_bytes());
        config[4..8].copy_from_slice(&1u32.to_le_bytes());
        copy_config(&config, offset, target);
    }

    fn config_write(&self, offset: u64, source: &[u8]) {
        if let (CONFIG_EMERGENCY_WRITE, Some(character)) = (offset, source.first()) {
            // An emergency has no second try: a full output loses it.
            let _ = lock(&self.shared.output).write(&[*character]);
        }
    }

    fn activate(&self, mut activation: Activation) -> Result<(), ActivateError> {
        let receive = activation.take_queue(QUEUE_RECEIVE)?;
        let transmit = activation.take_queue(QUEUE_TRANSMIT)?;
        let mut work = Work { shared: self.shared.clone(), receive, transmit, current: None };
        let interrupts = activation.interrupts;
        let for_thread = interrupts.clone();
        let worker = Worker::spawn("console", move |signal| {
            if let Err(error) = work.run(&signal, &*for_thread) {
                tracing::warn!(%error, "a console queue is malformed; the device stops");
                for_thread.needs_reset();
            }
        })?;
        *lock(&self.active) = Some(Active { worker, interrupts });
        Ok(())
    }

    fn notify(&self, _queue: u16) {
        self.raise();
    }

    fn reset(&self) {
        let active = lock(&self.active).take();
        drop(active);
    }
}

struct Work {
    shared: Arc<Shared>,
    receive: Queue,
    transmit: Queue,
    /// The chain that is being written, and how far.
    current: Option<(Chain, u64)>,
}

/// How far a turn came.
#[derive(PartialEq, Eq)]
enum Turn {
    Idle,
    More,
}

impl Work {
    fn run(&mut self, signal: &Signal, interrupts: &dyn DeviceInterrupts) -> Result<(), QueueError> {
        while !signal.is_stopped() {
            let output = self.write_output()?;
            self.give_input()?;
            self.transmit.tell(interrupts);
            self.receive.tell(interrupts);
            if output == Turn::More {
                continue;
            }
            let more_output = self.current.is_none() && self.transmit.enable_notifications()?;
            let more_room = !lock(&self.shared.input).is_empty() && self.receive.enable_notifications()?;
            if !more_output && !more_room && !signal.wait() {
                break;
            }
        }
        Ok(())
    }

    /// Writes what the guest sent, for one turn, as far as the output takes it.
    fn write_output(&mut self) -> Result<Turn, QueueError> {
        let mut output = lock(&self.shared.output);
        let mut turn_len = 0;
        while turn_len < TURN_LEN_MAX {
            let (chain, done) = match self.current.take() {
                Some(current) => current,
                None => match self.transmit.pop()? {
                    Some(chain) => (chain, 0),
                    None => return Ok(Turn::Idle),
                },
            };
            match write_chunk(&mut **output, &chain.readable, done) {
                Some(written) if done + written as u64 >= chain.readable.len() => self.transmit.add_used(chain.head, 0),
                Some(written) => self.current = Some((chain, done + written as u64)),
                None => {
                    self.current = Some((chain, done));
                    return Ok(Turn::Idle);
                }
            }
            // Empty chains count too, so that a ring full of them has an end.
            turn_len += CHUNK_LEN;
        }
        Ok(Turn::More)
    }

    /// Gives waiting input to the guest as far as it has room.
    fn give_input(&mut self) -> Result<(), QueueError> {
        let mut input = lock(&self.shared.input);
        while !input.is_empty() {
            let Some(chain) = self.receive.pop()? else { break };
            let room = usize::try_from(chain.writable.len()).unwrap_or(usize::MAX);
            let len = room.min(input.len());
            let bytes: Vec<u8> = input.drain(..len).collect();
            // The room was just measured.
            let _ = chain.writable.write(0, &bytes);
            self.receive.add_used(chain.head, bytes.len() as u32);
        }
        Ok(())
    }
}

/// Writes the next bytes of a chain; `None` if the output is full. An output that is broken swallows everything.
fn write_chunk(output: &mut (dyn Write + Send), buffers: &Buffers, done: u64) -> Option<usize> {
    let len = (buffers.len() - done).min(CHUNK_LEN as u64) as usize;
    let mut chunk = [0; CHUNK_LEN];
    let chunk = &mut chunk[..len];
    if len == 0 || buffers.read(done, chunk).is_err() {
        return Some(len);
    }
    loop {
        match output.write(chunk) {
            Ok(0) => return None,
            Ok(written) => return Some(written.min(len)),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => return None,
            Err(_) => return Some(len),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::SharedOutput;
    use crate::virtio::testing::{CONFIG, DATA, Driver};
    use crate::virtio::{FEATURE_EVENT_INDEX, FEATURE_VERSION_1};
    use polder_machine::AccessSize;

    fn bench() -> (Arc<Console>, SharedOutput, Driver) {
        let output = SharedOutput::default();
        let console = Arc::new(Console::new(Box::new(output.clone())));
        let features = FEATURE_VERSION_1 | FEATURE_EVENT_INDEX | FEATURE_SIZE;
        let driver = Driver::ready(console.clone(), features);
        (console, output, driver)
    }

    #[test]
    fn what_the_guest_writes_comes_out() {
        let (_console, output, mut driver) = bench();
        driver.put(DATA, b"hello world");
        driver.send(1, &[(DATA, 6, false), (DATA + 6, 5, false)]);
        driver.wait_used(1);
        assert_eq!(output.taken(), b"hello world");
    }

    #[test]
    fn input_fills_the_guests_buffers_in_order() {
        let (console, _, mut driver) = bench();
        assert_eq!(console.push_input(b"abcdef"), 6);
        driver.send(0, &[(DATA, 4, true)]);
        assert_eq!(driver.wait_used(0).1, 4);
        driver.send(0, &[(DATA + 4, 4, true)]);
        assert_eq!(driver.wait_used(0).1, 2);
        assert_eq!(driver.bytes(DATA, 6), b"abcdef");
    }

    #[test]
    fn input_is_bounded() {
        let (console, _, _driver) = bench();
        assert_eq!(console.push_input(&vec![0; INPUT_LEN_MAX + 7]), INPUT_LEN_MAX);
        assert_eq!(console.push_input(b"x"), 0);
    }

    #[test]
    fn a_full_output_keeps_the_chain_until_there_is_room() {
        let (console, output, mut driver) = bench();
        output.set_full(true);
        driver.put(DATA, &[b'z'; 10_000]);
        driver.send(1, &[(DATA, 10_000, false)]);
        output.set_full(false);
        console.output_ready();
        driver.wait_used(1);
        assert_eq!(output.taken(), vec![b'z'; 10_000]);
    }

    #[test]
    fn a_size_and_an_emergency_character_pass_through_the_configuration() {
        let (console, output, driver) = bench();
        console.resize(132, 43);
        assert_eq!(driver.read(CONFIG, AccessSize::Word), 132);
        assert_eq!(driver.read(CONFIG + 2, AccessSize::Word), 43);
        driver.write(CONFIG + 8, AccessSize::Dword, u64::from(b'!'));
        assert_eq!(output.taken(), b"!");
    }

    #[test]
    fn empty_buffers_are_given_back() {
        let (console, _, mut driver) = bench();
        driver.send(1, &[(DATA, 0, false)]);
        driver.wait_used(1);
        driver.send(0, &[(DATA, 0, true)]);
        driver.send(0, &[(DATA, 1, true)]);
        console.push_input(b"k");
        assert_eq!(driver.wait_used(0).1, 0);
        assert_eq!(driver.wait_used(0).1, 1);
    }
}
