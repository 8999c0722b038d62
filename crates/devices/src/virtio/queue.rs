//! Split virtqueues (2.7), the device's side.
//!
//! The driver and the device share three areas of guest memory: the descriptor table, the available ring (driver to device) and
//! the used ring (device to driver). A [`Queue`] belongs to one worker thread; nothing of it is shared but guest memory.
//!
//! Ordering on x86: loads are not moved before earlier loads nor stores before earlier stores, so the index of a ring orders
//! its entries by itself. The one order that needs a fence is "publish the used index, then look whether the driver wants to
//! hear of it", and its mirror image "ask for notifications, then look whether something came": a store before a load.

use std::sync::atomic::{Ordering, fence};

use polder_memory::{GuestAddress, GuestMemory};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::chain::{Buffers, Chain};
use super::{DeviceInterrupts, FEATURE_EVENT_INDEX, FEATURE_INDIRECT};

/// The largest queue that the specification allows is 32768; ours is what Linux drivers fill in practice.
pub const QUEUE_SIZE_MAX: u16 = 1024;
/// The most descriptors in one chain, indirect ones included.
pub const CHAIN_LEN_MAX: u32 = 1024;

const DESCRIPTOR_NEXT: u16 = 1;
const DESCRIPTOR_WRITE: u16 = 2;
const DESCRIPTOR_INDIRECT: u16 = 4;
const AVAILABLE_NO_INTERRUPT: u16 = 1;
const USED_NO_NOTIFY: u16 = 1;
const DESCRIPTOR_LEN: u64 = 16;

/// What is wrong with a queue. The device that finds it asks for a reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// The size is zero, no power of two, or more than the device offered.
    #[error("a queue of {size} entries is not possible")]
    Size { size: u16 },
    /// A ring is misaligned or not RAM.
    #[error("a queue's ring at {address} is misaligned or not in RAM")]
    Place { address: GuestAddress },
    /// The driver made more chains available than the queue has entries.
    #[error("the available index is {ahead} entries ahead of a queue of {size}")]
    Runaway { ahead: u16, size: u16 },
    /// A chain names a descriptor outside its table.
    #[error("descriptor {index} is outside its table of {len}")]
    DescriptorIndex { index: u16, len: u32 },
    /// A chain does not end.
    #[error("a descriptor chain loops or is longer than {CHAIN_LEN_MAX}")]
    ChainLength,
    /// A buffer is not RAM.
    #[error("a buffer of {len} bytes at {address} is not in RAM")]
    Buffer { address: GuestAddress, len: u32 },
    /// The buffers of one chain come to 4 GiB or more.
    #[error("the buffers of a chain come to 4 GiB or more")]
    TooMuch,
    /// A buffer to read follows one to write.
    #[error("a buffer to read follows one to write")]
    Order,
    /// An indirect table is nested, continued, not negotiated, empty or of an uneven length.
    #[error("an indirect table is nested, continued, not negotiated, or has a wrong length of {len} bytes")]
    Indirect { len: u32 },
}

/// Where the driver put a queue, and how large it made it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct QueuePlace {
    pub size: u16,
    pub descriptors: GuestAddress,
    pub available: GuestAddress,
    pub used: GuestAddress,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

/// The device's end of one virtqueue.
#[derive(Debug)]
pub struct Queue {
    memory: GuestMemory,
    index: u16,
    place: QueuePlace,
    event_index: bool,
    indirect: bool,
    /// The next entry of the available ring to take.
    next_available: u16,
    /// The available index when it was last read.
    seen_available: u16,
    /// The next entry of the used ring to fill.
    next_used: u16,
    /// The used index when the driver's wish was last asked.
    told_used: u16,
}

impl Queue {
    /// Checks what the driver set up. `index` is the queue's number, `size_max` what the device offered.
    pub fn new(
        memory: GuestMemory,
        index: u16,
        place: QueuePlace,
        size_max: u16,
        features: u64,
    ) -> Result<Self, QueueError> {
        let size = place.size;
        if !size.is_power_of_two() || size > size_max.min(QUEUE_SIZE_MAX) {
            return Err(QueueError::Size { size });
        }
        let entries = u64::from(size);
        // 2.7: alignments of 16, 2 and 4 bytes; both rings end with the other side's event index.
        let areas = [
            (place.descriptors, 16, DESCRIPTOR_LEN * entries),
            (place.available, 2, 6 + 2 * entries),
            (place.used, 4, 6 + 8 * entries),
        ];
        for (address, alignment, len) in areas {
            if address.0 % alignment != 0 || memory.host_range(address, len).is_err() {
                return Err(QueueError::Place { address });
            }
        }
        Ok(Queue {
            memory,
            index,
            place,
            event_index: features & FEATURE_EVENT_INDEX != 0,
            indirect: features & FEATURE_INDIRECT != 0,
            next_available: 0,
            seen_available: 0,
            next_used: 0,
            told_used: 0,
        })
    }

    /// The queue's number in its device.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Number of entries.
    pub fn size(&self) -> u16 {
        self.place.size
    }

    // The areas were checked to be RAM, and RAM stays: these accesses cannot fail.
    fn load_u16(&self, base: GuestAddress, offset: u64) -> u16 {
        self.memory.load_u16(GuestAddress(base.0 + offset)).unwrap_or(0)
    }

    fn store_u16(&self, base: GuestAddress, offset: u64, value: u16) {
        let _ = self.memory.store_u16(GuestAddress(base.0 + offset), value);
    }

    fn slot(&self, position: u16) -> u64 {
        u64::from(position & (self.place.size - 1))
    }

    /// Looks at the available index; how many chains wait.
    fn waiting(&mut self) -> Result<u16, QueueError> {
        if self.seen_available == self.next_available {
            self.seen_available = self.load_u16(self.place.available, 2);
        }
        let ahead = self.seen_available.wrapping_sub(self.next_available);
        if ahead > self.place.size {
            return Err(QueueError::Runaway { ahead, size: self.place.size });
        }
        Ok(ahead)
    }

    /// Whether a chain waits.
    pub fn has_waiting(&mut self) -> Result<bool, QueueError> {
        Ok(self.waiting()? > 0)
    }

    /// Takes the next chain, if one waits.
    pub fn pop(&mut self) -> Result<Option<Chain>, QueueError> {
        if self.waiting()? == 0 {
            return Ok(None);
        }
        let head = self.load_u16(self.place.available, 4 + 2 * self.slot(self.next_available));
        let chain = self.chain(head)?;
        self.next_available = self.next_available.wrapping_add(1);
        Ok(Some(chain))
    }

    /// Puts the `count` chains that were popped last back, to be popped again.
    pub fn unpop(&mut self, count: u16) {
        self.next_available = self.next_available.wrapping_sub(count);
    }

    fn descriptor(&self, table: GuestAddress, table_len: u32, index: u16) -> Result<Descriptor, QueueError> {
        if u32::from(index) >= table_len {
            return Err(QueueError::DescriptorIndex { index, len: table_len });
        }
        let address = GuestAddress(table.0 + DESCRIPTOR_LEN * u64::from(index));
        self.memory.read_value(address).map_err(|_| QueueError::Place { address })
    }

    /// Copies a chain out of guest memory, each descriptor once, and checks it.
    fn chain(&self, head: u16) -> Result<Chain, QueueError> {
        let mut readable = Buffers::new(self.memory.clone());
        let mut writable = Buffers::new(self.memory.clone());
        let (mut table, mut table_len) = (self.place.descriptors, u32::from(self.place.size));
        let mut in_indirect = false;
        let mut index = head;
        let mut left = CHAIN_LEN_MAX;
        loop {
            left = left.checked_sub(1).ok_or(QueueError::ChainLength)?;
            let descriptor = self.descriptor(table, table_len, index)?;
            let len = descriptor.len;
            let address = GuestAddress(descriptor.address);
            if descriptor.flags & DESCRIPTOR_INDIRECT != 0 {
                let whole = len > 0 && u64::from(len) % DESCRIPTOR_LEN == 0;
                let ends = descriptor.flags & DESCRIPTOR_NEXT == 0;
                if in_indirect || !self.indirect || !whole || !ends {
                    return Err(QueueError::Indirect { len });
                }
                if self.memory.host_range(address, len.into()).is_err() {
                    return Err(QueueError::Buffer { address, len });
                }
                (table, table_len) = (address, len / DESCRIPTOR_LEN as u32);
                in_indirect = true;
                index = 0;
                continue;
            }
            if len > 0 && self.memory.host_range(address, len.into()).is_err() {
                return Err(QueueError::Buffer { address, len });
            }
            let fits = if descriptor.flags & DESCRIPTOR_WRITE != 0 {
                writable.push(address, len)
            } else if writable.is_empty() {
                readable.push(address, len)
            } else {
                return Err(QueueError::Order);
            };
            if !fits {
                return Err(QueueError::TooMuch);
            }
            if descriptor.flags & DESCRIPTOR_NEXT == 0 {
                return Ok(Chain { head, readable, writable });
            }
            index = descriptor.next;
        }
    }

    /// Gives a chain back with the number of bytes written to it, without telling the driver yet.
    pub fn add_used(&mut self, head: u16, written: u32) {
        self.set_used(0, head, written);
        self.publish_used(1);
    }

    /// Fills the used entry `ahead` places after the next one. The driver sees it after [`Queue::publish_used`].
    pub fn set_used(&mut self, ahead: u16, head: u16, written: u32) {
        let entry = u64::from(head) | u64::from(written) << 32;
        let offset = 4 + 8 * self.slot(self.next_used.wrapping_add(ahead));
        let _ = self.memory.write(GuestAddress(self.place.used.0 + offset), &entry.to_le_bytes());
    }

    /// Shows the driver the next `count` used entries at once.
    pub fn publish_used(&mut self, count: u16) {
        self.next_used = self.next_used.wrapping_add(count);
        self.store_u16(self.place.used, 2, self.next_used);
    }

    /// Whether the driver wants an interrupt for what was given back since the last time this was asked.
    pub fn interrupt_wanted(&mut self) -> bool {
        // The used index must be visible before the driver's wish is read (2.7.7.2).
        fence(Ordering::SeqCst);
        if self.told_used == self.next_used {
            return false;
        }
        let before = std::mem::replace(&mut self.told_used, self.next_used);
        if !self.event_index {
            return self.load_u16(self.place.available, 0) & AVAILABLE_NO_INTERRUPT == 0;
        }
        let event = self.load_u16(self.place.available, 4 + 2 * u64::from(self.place.size));
        // The event lies among the entries given back since (2.7.10.1).
        self.next_used.wrapping_sub(event).wrapping_sub(1) < self.next_used.wrapping_sub(before)
    }

    /// Interrupts the driver if it wants to hear of what was given back.
    pub fn tell(&mut self, interrupts: &dyn DeviceInterrupts) {
        if self.interrupt_wanted() {
            interrupts.queue_used(self.index);
        }
    }

    /// Tells the driver that its notifications are not needed for now. A wish, not a promise.
    pub fn disable_notifications(&mut self) {
        if !self.event_index {
            self.store_u16(self.place.used, 0, USED_NO_NOTIFY);
        }
    }

    /// Asks the driver to notify the device of chains from here on. Returns whether one waits: then go on, no notification may
    /// follow.
    pub fn enable_notifications(&mut self) -> Result<bool, QueueError> {
        self.enable_notifications_of_more()?;
        self.has_waiting()
    }

    /// For a device that wants more chains than wait now: asks the driver to notify it of the next one beyond those it has
    /// seen. Returns whether more came since it last found none to pop.
    pub fn enable_notifications_of_more(&mut self) -> Result<bool, QueueError> {
        let seen = self.seen_available;
        if self.event_index {
            // Not `next_available`: the driver compares with its own index, which is past all that wait already.
            let offset = 4 + 8 * u64::from(self.place.size);
            self.store_u16(self.place.used, offset, seen);
        } else {
            self.store_u16(self.place.used, 0, 0);
        }
        // The wish must be visible before the index is read again.
        fence(Ordering::SeqCst);
        self.seen_available = self.load_u16(self.place.available, 2);
        self.waiting()?;
        Ok(self.seen_available != seen)
    }
}
