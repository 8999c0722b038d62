//! QEMU's firmware configuration ports, as far as test guests read them: a signature, the number of CPUs, the RAM size.
//!
//! A guest selects an item by writing its number to the first port and reads its bytes, in order, from the second
//! (QEMU docs/specs/fw_cfg). Past an item's end, and for items that do not exist, bytes read as zero.

use std::sync::{Mutex, PoisonError};

use polder_machine::{AccessSize, BusDevice};

/// Ports of the device.
pub const FW_CFG_PORTS: u64 = 2;

const SELECTOR: u64 = 0;
const DATA: u64 = 1;

const ITEM_SIGNATURE: u16 = 0x00;
const ITEM_INTERFACE: u16 = 0x01;
const ITEM_RAM_BYTES: u16 = 0x03;
const ITEM_CPU_COUNT: u16 = 0x05;
const ITEM_CPU_COUNT_MAX: u16 = 0x0f;

/// The two ports.
pub struct FwCfg {
    cpu_count: u16,
    ram_bytes: u64,
    cursor: Mutex<Cursor>,
}

#[derive(Default)]
struct Cursor {
    item: u16,
    position: usize,
}

impl FwCfg {
    /// Ports that tell of a machine of this size.
    pub fn new(cpu_count: u16, ram_bytes: u64) -> Self {
        FwCfg { cpu_count, ram_bytes, cursor: Mutex::default() }
    }

    fn item_byte(&self, item: u16, position: usize) -> u8 {
        let byte = match item {
            ITEM_SIGNATURE => b"QEMU".get(position).copied(),
            // Bit 0: the traditional interface, without DMA.
            ITEM_INTERFACE => 1u32.to_le_bytes().get(position).copied(),
            ITEM_RAM_BYTES => self.ram_bytes.to_le_bytes().get(position).copied(),
            ITEM_CPU_COUNT | ITEM_CPU_COUNT_MAX => self.cpu_count.to_le_bytes().get(position).copied(),
            _ => None,
        };
        byte.unwrap_or(0)
    }
}

impl BusDevice for FwCfg {
    fn read(&self, offset: u64, size: AccessSize) -> u64 {
        if offset != DATA || size != AccessSize::Byte {
            return 0;
        }
        let mut cursor = self.cursor.lock().unwrap_or_else(PoisonError::into_inner);
        let byte = self.item_byte(cursor.item, cursor.position);
        cursor.position = cursor.position.saturating_add(1);
        u64::from(byte)
    }

    fn write(&self, offset: u64, size: AccessSize, value: u64) {
        if offset == SELECTOR && size == AccessSize::Word {
            *self.cursor.lock().unwrap_or_else(PoisonError::into_inner) = Cursor { item: value as u16, position: 0 };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(device: &FwCfg, item: u64, len: usize) -> Vec<u8> {
        device.write(0, AccessSize::Word, item);
        (0..len).map(|_| device.read(1, AccessSize::Byte) as u8).collect()
    }

    #[test]
    fn items_are_read_byte_by_byte_and_end_in_zeros() {
        let device = FwCfg::new(4, 0x1_2345_6789);
        assert_eq!(item(&device, 0, 6), b"QEMU\0\0");
        assert_eq!(item(&device, 5, 4), [4, 0, 0, 0]);
        assert_eq!(item(&device, 3, 8), 0x1_2345_6789u64.to_le_bytes());
        assert_eq!(item(&device, 0x11, 8), [0; 8]);
        assert_eq!(item(&device, 0xffff, 1), [0]);
    }

    #[test]
    fn accesses_of_other_sizes_change_nothing() {
        let device = FwCfg::new(1, 0);
        device.write(0, AccessSize::Word, 0);
        device.write(0, AccessSize::Byte, 5);
        device.write(1, AccessSize::Byte, 5);
        assert_eq!(device.read(0, AccessSize::Word), 0);
        assert_eq!(device.read(1, AccessSize::Dword), 0);
        assert_eq!(device.read(1, AccessSize::Byte), u64::from(b'Q'));
    }
}
