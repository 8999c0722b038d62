//! From a device to its driver: MSI-X vectors, or the ISR register and INTx (4.1.4.5, 4.1.5.4).

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};
use std::sync::{Arc, Mutex};

use polder_machine::InterruptLine;

use super::DeviceInterrupts;
use crate::lock;
use crate::pci::Msix;

/// The vector that stands for none (4.1.5.1.2).
pub(super) const NO_VECTOR: u16 = 0xffff;

const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

struct Intx {
    line: Arc<dyn InterruptLine>,
    isr: u8,
    /// The command register's interrupt disable bit.
    disabled: bool,
}

/// The interrupts of one virtio function. Its locks are leaves: nothing else is taken under them but the wires themselves.
pub(super) struct PciInterrupts {
    pub msix: Msix,
    queue_vectors: Vec<AtomicU16>,
    config_vector: AtomicU16,
    intx: Mutex<Intx>,
    generation: AtomicU8,
    needs_reset: AtomicBool,
    /// DRIVER_OK is set: the driver may be interrupted.
    live: AtomicBool,
}

impl PciInterrupts {
    pub fn new(queues: usize, msix: Msix, line: Arc<dyn InterruptLine>) -> Self {
        PciInterrupts {
            msix,
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            config_vector: AtomicU16::new(NO_VECTOR),
            intx: Mutex::new(Intx { line, isr: 0, disabled: false }),
            generation: AtomicU8::new(0),
            needs_reset: AtomicBool::new(false),
            live: AtomicBool::new(false),
        }
    }

    fn existing(&self, vector: u16) -> u16 {
        if vector < self.msix.vectors() { vector } else { NO_VECTOR }
    }

    pub fn queue_vector(&self, queue: u16) -> u16 {
        self.queue_vectors.get(queue as usize).map_or(NO_VECTOR, |vector| vector.load(Ordering::SeqCst))
    }

    /// Sets a queue's vector; one that does not exist reads back as none.
    pub fn set_queue_vector(&self, queue: u16, vector: u16) {
        if let Some(place) = self.queue_vectors.get(queue as usize) {
            place.store(self.existing(vector), Ordering::SeqCst);
        }
    }

    pub fn config_vector(&self) -> u16 {
        self.config_vector.load(Ordering::SeqCst)
    }

    pub fn set_config_vector(&self, vector: u16) {
        self.config_vector.store(self.existing(vector), Ordering::SeqCst);
    }

    pub fn generation(&self) -> u8 {
        self.generation.load(Ordering::SeqCst)
    }

    pub fn is_reset_needed(&self) -> bool {
        self.needs_reset.load(Ordering::SeqCst)
    }

    pub fn set_live(&self, live: bool) {
        self.live.store(live, Ordering::SeqCst);
    }

    /// The function was reset.
    pub fn reset(&self) {
        self.set_live(false);
        self.needs_reset.store(false, Ordering::SeqCst);
        self.config_vector.store(NO_VECTOR, Ordering::SeqCst);
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::SeqCst);
        }
        self.msix.clear_pending();
        self.read_isr();
    }

    /// The guest turned MSI-X on or off: a wire that is no longer used falls.
    pub fn msix_changed(&self) {
        self.drive(&lock(&self.intx));
    }

    /// The guest changed the command register's interrupt disable bit.
    pub fn set_intx_disabled(&self, disabled: bool) {
        let mut intx = lock(&self.intx);
        intx.disabled = disabled;
        self.drive(&intx);
    }

    /// Whether an interrupt is pending in the ISR register.
    pub fn is_intx_pending(&self) -> bool {
        lock(&self.intx).isr != 0
    }

    /// Reads the ISR register, which clears it.
    pub fn read_isr(&self) -> u8 {
        let mut intx = lock(&self.intx);
        let isr = std::mem::take(&mut intx.isr);
        self.drive(&intx);
        isr
    }

    fn drive(&self, intx: &Intx) {
        intx.line.set(intx.isr != 0 && !intx.disabled && !self.msix.is_enabled());
    }

    fn raise(&self, vector: u16, isr_bit: u8) {
        if !self.live.load(Ordering::SeqCst) {
            return;
        }
        if self.msix.is_enabled() {
            self.msix.trigger(vector);
        } else {
            let mut intx = lock(&self.intx);
            intx.isr |= isr_bit;
            self.drive(&intx);
        }
    }
}

impl DeviceInterrupts for PciInterrupts {
    fn queue_used(&self, queue: u16) {
        self.raise(self.queue_vector(queue), ISR_QUEUE);
    }

    fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.raise(self.config_vector(), ISR_CONFIG);
    }

    fn needs_reset(&self) {
        self.needs_reset.store(true, Ordering::SeqCst);
        self.raise(self.config_vector(), ISR_CONFIG);
    }
}
