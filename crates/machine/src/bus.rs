//! An address space of devices: I/O ports or memory-mapped registers.
//!
//! Accesses that no device can sensibly take are decided once, here: an unclaimed read gives all ones, an unclaimed write is dropped,
//! and an access that straddles the end of a device's range is split into bytes, each decided on its own.

use std::sync::{Arc, RwLock};

use crate::AccessSize;

/// A device's registers as a bus sees them. Called on vCPU threads, several at once; implementations lock inside and never
/// block on I/O. Offsets are relative to the start of the device's range; any offset, size and alignment inside the range can come.
pub trait BusDevice: Send + Sync {
    /// Reads `size` bytes at `offset`; bits above the size are ignored.
    fn read(&self, offset: u64, size: AccessSize) -> u64;
    /// Writes the low `size` bytes of `value` at `offset`; the bits above are zero.
    fn write(&self, offset: u64, size: AccessSize, value: u64);
}

/// The range cannot be claimed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the bus range of {len:#x} bytes at {start:#x} is empty, wraps or overlaps another device's")]
pub struct BusError {
    pub start: u64,
    pub len: u64,
}

struct Claim {
    start: u64,
    len: u64,
    device: Arc<dyn BusDevice>,
}

/// A map from address ranges to devices. Ranges never overlap.
#[derive(Default)]
pub struct Bus {
    /// Sorted by start.
    claims: RwLock<Vec<Claim>>,
}

impl std::fmt::Debug for Bus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bus").finish_non_exhaustive()
    }
}

impl Bus {
    /// A bus without devices.
    pub fn new() -> Self {
        Self::default()
    }

    /// Claims `start..start + len` for a device.
    pub fn insert(&self, start: u64, len: u64, device: Arc<dyn BusDevice>) -> Result<(), BusError> {
        let error = BusError { start, len };
        let last = start.checked_add(len.wrapping_sub(1)).filter(|_| len > 0).ok_or(BusError { start, len })?;
        let mut claims = self.claims.write().unwrap_or_else(|poisoned| poisoned.into_inner());
        let index = claims.partition_point(|claim| claim.start < start);
        let before_overlaps = index > 0 && claims[index - 1].start + (claims[index - 1].len - 1) >= start;
        let after_overlaps = claims.get(index).is_some_and(|claim| claim.start <= last);
        if before_overlaps || after_overlaps {
            return Err(error);
        }
        claims.insert(index, Claim { start, len, device });
        Ok(())
    }

    /// Gives up the range that starts at `start`; whether there was one.
    pub fn remove(&self, start: u64) -> bool {
        let mut claims = self.claims.write().unwrap_or_else(|poisoned| poisoned.into_inner());
        match claims.binary_search_by_key(&start, |claim| claim.start) {
            Ok(index) => {
                claims.remove(index);
                true
            }
            Err(_) => false,
        }
    }

    /// The device at `address`, the offset in its range and the bytes from there to the range's end.
    fn find(&self, address: u64) -> Option<(Arc<dyn BusDevice>, u64, u64)> {
        let claims = self.claims.read().unwrap_or_else(|poisoned| poisoned.into_inner());
        let index = claims.partition_point(|claim| claim.start <= address).checked_sub(1)?;
        let claim = &claims[index];
        let offset = address - claim.start;
        (offset < claim.len).then(|| (claim.device.clone(), offset, claim.len - offset))
    }

    /// Whether a device claims the address.
    pub fn is_claimed(&self, address: u64) -> bool {
        self.find(address).is_some()
    }

    /// Reads `size` bytes at `address`; bits above the size are zero.
    pub fn read(&self, address: u64, size: AccessSize) -> u64 {
        match self.find(address) {
            Some((device, offset, left)) if left >= size.bytes() => device.read(offset, size) & size.all_ones(),
            None if !self.is_claimed(address.wrapping_add(size.bytes() - 1)) => size.all_ones(),
            _ => (0..size.bytes()).fold(0, |value, index| {
                let byte = match self.find(address.wrapping_add(index)) {
                    Some((device, offset, _)) => device.read(offset, AccessSize::Byte) & 0xff,
                    None => 0xff,
                };
                value | byte << (8 * index)
            }),
        }
    }

    /// Writes the low `size` bytes of `value` at `address`.
    pub fn write(&self, address: u64, size: AccessSize, value: u64) {
        match self.find(address) {
            Some((device, offset, left)) if left >= size.bytes() => device.write(offset, size, value & size.all_ones()),
            None if !self.is_claimed(address.wrapping_add(size.bytes() - 1)) => {}
            _ => {
                for index in 0..size.bytes() {
                    if let Some((device, offset, _)) = self.find(address.wrapping_add(index)) {
                        device.write(offset, AccessSize::Byte, value >> (8 * index) & 0xff);
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Echo(Mutex<Vec<(u64, AccessSize, u64)>>);

    impl BusDevice for Echo {
        fn read(&self, offset: u64, size: AccessSize) -> u64 {
            offset | 0xffff_ff00 & size.all_ones()
        }

        fn write(&self, offset: u64, size: AccessSize, value: u64) {
            self.0.lock().unwrap().push((offset, size, value));
        }
    }

    #[test]
    fn unclaimed_reads_give_all_ones() {
        let bus = Bus::new();
        assert_eq!(bus.read(0x3f8, AccessSize::Word), 0xffff);
        assert_eq!(bus.read(u64::MAX, AccessSize::Qword), u64::MAX);
        bus.write(u64::MAX, AccessSize::Qword, 1);
    }

    #[test]
    fn an_access_over_the_end_of_a_device_is_split_into_bytes() {
        let bus = Bus::new();
        let device = Arc::new(Echo::default());
        bus.insert(0x10, 2, device.clone()).unwrap();
        assert_eq!(bus.read(0x11, AccessSize::Dword), 0xffff_ff01);
        assert_eq!(bus.read(0x0f, AccessSize::Word), 0x00ff);
        bus.write(0x11, AccessSize::Word, 0x1234);
        assert_eq!(*device.0.lock().unwrap(), [(1, AccessSize::Byte, 0x34)]);
    }

    #[test]
    fn overlaps_and_wraps_are_refused() {
        let bus = Bus::new();
        let device = Arc::new(Echo::default());
        bus.insert(0x10, 0x10, device.clone()).unwrap();
        for (start, len) in [(0x1f, 1), (0x0, 0x11), (0x18, 0x100), (0x50, 0), (u64::MAX, 2)] {
            assert_eq!(bus.insert(start, len, device.clone()), Err(BusError { start, len }));
        }
        assert!(bus.remove(0x10));
        assert!(!bus.remove(0x10));
        bus.insert(0x0, 0x11, device).unwrap();
    }
}
