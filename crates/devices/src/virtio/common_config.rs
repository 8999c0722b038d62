//! The common configuration registers (4.1.4.3) as plain data: reads have no side effects, writes change only this.
//!
//! Decided here: a read of any size and alignment gives the registers' bytes. A write counts only if it is exactly one
//! register, or one half of a 64-bit one; any other is dropped. Registers of a queue that is selected but does not exist read
//! zero (its vector: none) and drop writes. A queue's place can be written until the queue is enabled or the driver is
//! ready, and a queue cannot be disabled but by reset.

use polder_machine::AccessSize;
use polder_memory::GuestAddress;

use super::QueuePlace;
use super::interrupts::PciInterrupts;

pub(super) const STATUS_DRIVER_OK: u8 = 4;
pub(super) const STATUS_FEATURES_OK: u8 = 8;
pub(super) const STATUS_NEEDS_RESET: u8 = 64;
/// ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK and FAILED: what a driver sets.
const STATUS_DRIVER_BITS: u8 = 1 | 2 | STATUS_DRIVER_OK | STATUS_FEATURES_OK | 128;

pub(super) const DEVICE_STATUS: u64 = 0x14;
const IMAGE_LEN: usize = 0x3c;

/// The registers of one queue.
#[derive(Debug, Clone, Copy)]
pub(super) struct QueueRegisters {
    pub size_max: u16,
    pub place: QueuePlace,
    pub enabled: bool,
}

impl QueueRegisters {
    fn new(size_max: u16) -> Self {
        QueueRegisters { size_max, place: QueuePlace { size: size_max, ..QueuePlace::default() }, enabled: false }
    }
}

/// All registers that the driver writes.
#[derive(Debug)]
pub(super) struct CommonConfig {
    offered_features: u64,
    device_feature_select: u32,
    driver_feature_select: u32,
    pub driver_features: u64,
    pub status: u8,
    queue_select: u16,
    pub queues: Vec<QueueRegisters>,
}

impl CommonConfig {
    pub fn new(offered_features: u64, queue_sizes: &[u16]) -> Self {
        CommonConfig {
            offered_features,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            status: 0,
            queue_select: 0,
            queues: queue_sizes.iter().map(|&size| QueueRegisters::new(size)).collect(),
        }
    }

    /// Back to power-on values.
    pub fn reset(&mut self) {
        let sizes: Vec<u16> = self.queues.iter().map(|queue| queue.size_max).collect();
        *self = CommonConfig::new(self.offered_features, &sizes);
    }

    fn image(&self, interrupts: &PciInterrupts) -> [u8; IMAGE_LEN] {
        let mut image = [0; IMAGE_LEN];
        let mut put = |offset: usize, bytes: &[u8]| image[offset..offset + bytes.len()].copy_from_slice(bytes);
        put(0x00, &self.device_feature_select.to_le_bytes());
        put(0x04, &half(self.offered_features, self.device_feature_select).to_le_bytes());
        put(0x08, &self.driver_feature_select.to_le_bytes());
        put(0x0c, &half(self.driver_features, self.driver_feature_select).to_le_bytes());
        put(0x10, &interrupts.config_vector().to_le_bytes());
        put(0x12, &(self.queues.len() as u16).to_le_bytes());
        let needs_reset = if interrupts.is_reset_needed() { STATUS_NEEDS_RESET } else { 0 };
        put(0x14, &[self.status | needs_reset]);
        put(0x15, &[interrupts.generation()]);
        put(0x16, &self.queue_select.to_le_bytes());
        put(0x1a, &interrupts.queue_vector(self.queue_select).to_le_bytes());
        if let Some(queue) = self.queues.get(self.queue_select as usize) {
            put(0x18, &queue.place.size.to_le_bytes());
            put(0x1c, &u16::from(queue.enabled).to_le_bytes());
            put(0x1e, &self.queue_select.to_le_bytes());
            put(0x20, &queue.place.descriptors.0.to_le_bytes());
            put(0x28, &queue.place.available.0.to_le_bytes());
            put(0x30, &queue.place.used.0.to_le_bytes());
            put(0x38, &self.queue_select.to_le_bytes());
        }
        image
    }

    pub fn read(&self, offset: u64, size: AccessSize, interrupts: &PciInterrupts) -> u64 {
        let image = self.image(interrupts);
        (0..size.bytes()).fold(0, |value, index| {
            let at = usize::try_from(offset.saturating_add(index)).unwrap_or(usize::MAX);
            value | u64::from(image.get(at).copied().unwrap_or(0)) << (8 * index)
        })
    }

    /// Writes a register other than the status.
    pub fn write(&mut self, offset: u64, size: AccessSize, value: u64, interrupts: &PciInterrupts) {
        use AccessSize::{Dword, Qword, Word};
        match (offset, size) {
            (0x00, Dword) => self.device_feature_select = value as u32,
            (0x08, Dword) => self.driver_feature_select = value as u32,
            // 3.1.1: features are settled once FEATURES_OK is set.
            (0x0c, Dword) if self.status & STATUS_FEATURES_OK == 0 => match self.driver_feature_select {
                0 => self.driver_features = self.driver_features & !0xffff_ffff | value & 0xffff_ffff,
                1 => self.driver_features = self.driver_features & 0xffff_ffff | value << 32,
                // A bit that was never offered: remembered as one, so that FEATURES_OK is refused.
                _ if value as u32 != 0 => self.driver_features |= !self.offered_features,
                _ => {}
            },
            (0x10, Word) => interrupts.set_config_vector(value as u16),
            (0x16, Word) => self.queue_select = value as u16,
            (0x1a, Word) => interrupts.set_queue_vector(self.queue_select, value as u16),
            (0x18, Word) => {
                if let Some(queue) = self.writable_queue() {
                    queue.place.size = value as u16;
                }
            }
            (0x1c, Word) if value == 1 => {
                if let Some(queue) = self.writable_queue() {
                    queue.enabled = true;
                }
            }
            (0x20..0x38, Dword | Qword) if offset.is_multiple_of(size.bytes()) => {
                let Some(queue) = self.writable_queue() else { return };
                let address = match offset & !7 {
                    0x20 => &mut queue.place.descriptors,
                    0x28 => &mut queue.place.available,
                    _ => &mut queue.place.used,
                };
                *address = GuestAddress(match (offset & 4, size) {
                    (_, Qword) => value,
                    (0, _) => address.0 & !0xffff_ffff | value & 0xffff_ffff,
                    _ => address.0 & 0xffff_ffff | value << 32,
                });
            }
            _ => {}
        }
    }

    fn writable_queue(&mut self) -> Option<&mut QueueRegisters> {
        if self.status & STATUS_DRIVER_OK != 0 {
            return None;
        }
        self.queues.get_mut(self.queue_select as usize).filter(|queue| !queue.enabled)
    }

    /// Takes a write of the status other than zero. Bits are only ever added. Returns whether the driver has just become ready.
    pub fn add_status(&mut self, value: u8) -> bool {
        let before = self.status;
        let mut added = value & STATUS_DRIVER_BITS & !before;
        let version_1 = self.driver_features & super::FEATURE_VERSION_1 != 0;
        if added & STATUS_FEATURES_OK != 0 && (self.driver_features & !self.offered_features != 0 || !version_1) {
            added &= !STATUS_FEATURES_OK;
        }
        if (before | added) & STATUS_FEATURES_OK == 0 {
            // 3.1.1, step 6: without agreed features there is no driver that is ready.
            added &= !STATUS_DRIVER_OK;
        }
        self.status |= added;
        added & STATUS_DRIVER_OK != 0
    }
}

fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}
