//! A function's 4 KiB of configuration space: bytes, and which bits the guest may change.
//!
//! Layout: PCI Express Base Specification 5.0, 7.5.1 (type 0 header) and 7.5.3 (PCI Express capability). What always holds:
//! a bit changes only if the mask says so, so sizing a BAR by writing ones works by itself, and no write moves a capability.

use polder_machine::AccessSize;

const CONFIG_LEN: usize = 4096;
const LEGACY_LEN: usize = 256;
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BAR0: usize = 0x10;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const INTERRUPT_PIN: usize = 0x3d;
const FIRST_CAPABILITY: usize = 0x40;

/// Command register: the function answers at its memory BARs.
pub const COMMAND_MEMORY: u16 = 1 << 1;
/// Command register: the function may read and write memory, and so send message interrupts.
pub const COMMAND_BUS_MASTER: u16 = 1 << 2;
/// Command register: the function keeps its INTx line low.
pub const COMMAND_INTX_DISABLE: u16 = 1 << 10;
const COMMAND_PARITY: u16 = 1 << 6;
const COMMAND_SERR: u16 = 1 << 8;
const STATUS_INTERRUPT: u8 = 1 << 3;
const STATUS_CAPABILITIES: u8 = 1 << 4;

/// What a function is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    pub vendor: u16,
    pub device: u16,
    pub revision: u8,
    /// Base class, subclass, programming interface.
    pub class: [u8; 3],
    pub subsystem_vendor: u16,
    pub subsystem: u16,
}

/// The width of a memory BAR's address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BarKind {
    Memory32,
    /// Takes two BAR registers.
    Memory64,
}

/// Where a BAR lies now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BarPlace {
    pub index: u8,
    pub kind: BarKind,
    pub address: u64,
    pub len: u64,
}

/// Configuration space of one function.
pub struct ConfigSpace {
    bytes: Box<[u8]>,
    writable: Box<[u8]>,
    bars: [Option<(BarKind, u64)>; 6],
    /// The byte that points to the next capability.
    link: usize,
    next_capability: usize,
}

impl ConfigSpace {
    /// A type 0 header without BARs or capabilities.
    pub fn new(identity: &Identity) -> Self {
        let mut space = ConfigSpace {
            bytes: vec![0; CONFIG_LEN].into_boxed_slice(),
            writable: vec![0; CONFIG_LEN].into_boxed_slice(),
            bars: [None; 6],
            link: CAPABILITIES,
            next_capability: FIRST_CAPABILITY,
        };
        space.set_u16(0x00, identity.vendor);
        space.set_u16(0x02, identity.device);
        let [base, subclass, interface] = identity.class;
        space.bytes[0x08..0x0c].copy_from_slice(&[identity.revision, interface, subclass, base]);
        space.set_u16(0x2c, identity.subsystem_vendor);
        space.set_u16(0x2e, identity.subsystem);
        let command = COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_INTX_DISABLE | COMMAND_PARITY | COMMAND_SERR;
        space.writable[COMMAND..COMMAND + 2].copy_from_slice(&command.to_le_bytes());
        // Cache line size: a scratch register on PCI Express.
        space.writable[0x0c] = 0xff;
        space
    }

    fn set_u16(&mut self, offset: usize, value: u16) {
        self.bytes[offset..offset + 2].copy_from_slice(&value.to_le_bytes());
    }

    /// Declares a memory BAR. `len` is a power of two of at least 16 bytes; a 64-bit BAR takes `index + 1` as well.
    pub fn add_bar(&mut self, index: u8, kind: BarKind, len: u64) {
        let slot = index as usize;
        let registers = if kind == BarKind::Memory64 { 2 } else { 1 };
        assert!(
            len.is_power_of_two() && len >= 16 && slot + registers <= 6,
            "a BAR is a power of two and in the header"
        );
        assert!(kind == BarKind::Memory64 || len <= 1 << 31, "a 32-bit BAR fits in 32 bits");
        self.bars[slot] = Some((kind, len));
        let mask = (!(len - 1)).to_le_bytes();
        let start = BAR0 + 4 * slot;
        self.writable[start..start + 4 * registers].copy_from_slice(&mask[..4 * registers]);
        if kind == BarKind::Memory64 {
            self.bytes[start] = 0b100;
        }
    }

    /// Puts a BAR at `address`, as firmware would.
    pub fn place_bar(&mut self, index: u8, address: u64) {
        let Some((kind, len)) = self.bars.get(index as usize).copied().flatten() else { return };
        let aligned = address & !(len - 1);
        let start = BAR0 + 4 * index as usize;
        let low = aligned as u32 | u32::from(self.bytes[start] & 0xf);
        self.bytes[start..start + 4].copy_from_slice(&low.to_le_bytes());
        if kind == BarKind::Memory64 {
            self.bytes[start + 4..start + 8].copy_from_slice(&((aligned >> 32) as u32).to_le_bytes());
        }
    }

    /// All BARs, wherever they lie and whether or not they are decoded.
    pub fn bars(&self) -> Vec<BarPlace> {
        let register = |slot: usize| u64::from(self.read((BAR0 + 4 * slot) as u16, AccessSize::Dword));
        (0..6usize)
            .filter_map(|slot| {
                let (kind, len) = self.bars[slot]?;
                let mut address = register(slot) & !0xf;
                if kind == BarKind::Memory64 {
                    address |= register(slot + 1) << 32;
                }
                Some(BarPlace { index: slot as u8, kind, address, len })
            })
            .collect()
    }

    /// The command register.
    pub fn command(&self) -> u16 {
        u16::from_le_bytes([self.bytes[COMMAND], self.bytes[COMMAND + 1]])
    }

    /// Says which interrupt pin the function uses (INTA is 1) and writes the line that firmware would have routed it to.
    pub fn set_interrupt(&mut self, pin: u8, line: u8) {
        self.bytes[INTERRUPT_PIN] = pin;
        self.bytes[INTERRUPT_LINE] = line;
        self.writable[INTERRUPT_LINE] = 0xff;
    }

    /// Shows in the status register whether the function wants its INTx line high.
    pub fn set_interrupt_status(&mut self, pending: bool) {
        let status = self.bytes[STATUS] & !STATUS_INTERRUPT;
        self.bytes[STATUS] = status | if pending { STATUS_INTERRUPT } else { 0 };
    }

    /// Adds a capability: `body` follows the id and the link. `writable` is the mask of the body's bits that the guest may change;
    /// missing bytes are read-only. Returns the capability's offset.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> u16 {
        let start = self.next_capability;
        let end = start + 2 + body.len();
        assert!(end <= LEGACY_LEN && writable.len() <= body.len(), "capabilities fit in 256 bytes");
        self.bytes[self.link] = start as u8;
        self.bytes[STATUS] |= STATUS_CAPABILITIES;
        self.bytes[start] = id;
        self.bytes[start + 2..end].copy_from_slice(body);
        self.writable[start + 2..start + 2 + writable.len()].copy_from_slice(writable);
        self.link = start + 1;
        self.next_capability = end.next_multiple_of(4);
        start as u16
    }

    /// Adds the PCI Express capability of a root complex integrated endpoint (7.5.3), so that Linux takes the function's 4 KiB
    /// for real. There is no link, and errors are not reported.
    pub fn add_express_capability(&mut self) {
        let mut body = [0u8; 0x3a];
        // Capability version 2, device type 9.
        body[0..2].copy_from_slice(&0x0092u16.to_le_bytes());
        // Device capabilities: role-based error reporting, payload of 128 bytes.
        body[2..6].copy_from_slice(&0x8000u32.to_le_bytes());
        let mut writable = [0u8; 0x3a];
        // Device control: error enables, relaxed ordering, payload sizes, no-snoop: kept, without effect.
        writable[6..8].copy_from_slice(&0x78ffu16.to_le_bytes());
        self.add_capability(0x10, &body, &writable);
    }

    /// Reads at an offset; bytes beyond the space are ones.
    pub fn read(&self, offset: u16, size: AccessSize) -> u32 {
        let start = offset as usize;
        (0..(size.bytes() as usize).min(4)).fold(0, |value, index| {
            let byte = self.bytes.get(start + index).copied().unwrap_or(0xff);
            value | u32::from(byte) << (8 * index)
        })
    }

    /// Writes the bits that the guest may change.
    pub fn write(&mut self, offset: u16, size: AccessSize, value: u32) {
        for index in 0..(size.bytes() as usize).min(4) {
            let at = offset as usize + index;
            if let (Some(byte), Some(mask)) = (self.bytes.get_mut(at), self.writable.get(at)) {
                *byte = *byte & !mask | (value >> (8 * index)) as u8 & mask;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        ConfigSpace::new(&Identity {
            vendor: 0x1234,
            device: 0x5678,
            revision: 1,
            class: [2, 0, 0],
            subsystem_vendor: 1,
            subsystem: 2,
        })
    }

    #[test]
    fn a_bar_is_sized_by_writing_ones() {
        let mut space = space();
        space.add_bar(0, BarKind::Memory64, 0x8000);
        space.add_bar(2, BarKind::Memory32, 0x1000);
        for offset in [0x10, 0x14, 0x18, 0x1c] {
            space.write(offset, AccessSize::Dword, u32::MAX);
        }
        assert_eq!(space.read(0x10, AccessSize::Dword), 0xffff_8004);
        assert_eq!(space.read(0x14, AccessSize::Dword), 0xffff_ffff);
        assert_eq!(space.read(0x18, AccessSize::Dword), 0xffff_f000);
        assert_eq!(space.read(0x1c, AccessSize::Dword), 0);
    }

    #[test]
    fn identity_and_capability_links_cannot_be_written() {
        let mut space = space();
        let first = space.add_capability(9, &[0; 14], &[0; 4]);
        let second = space.add_capability(0x11, &[0; 10], &[0, 0xc0]);
        let before: Vec<u32> = (0..64).map(|dword| space.read(dword * 4, AccessSize::Dword)).collect();
        for offset in 0..4096 {
            if !(0x04..0x08).contains(&offset) {
                space.write(offset, AccessSize::Byte, 0xff);
            }
        }
        assert_eq!(space.read(0x34, AccessSize::Byte), u32::from(first));
        assert_eq!(space.read(first + 1, AccessSize::Byte), u32::from(second));
        assert_eq!(space.read(second + 3, AccessSize::Byte), 0xc0);
        assert_eq!(space.read(0, AccessSize::Dword), before[0]);
        assert_eq!(space.read(0x34, AccessSize::Byte), before[0x34 / 4] & 0xff);
    }

    #[test]
    fn reads_beyond_the_space_are_ones() {
        assert_eq!(space().read(4095, AccessSize::Dword), 0xffff_ff00);
        assert_eq!(space().read(u16::MAX, AccessSize::Byte), 0xff);
    }
}
