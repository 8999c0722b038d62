//! Segment and gate descriptors: reading them from the tables, and what their bits say (SDM vol. 3, 3.4 and 5.8).

use polder_machine::state::SegmentState;

use crate::cpu::Cpu;
use crate::fault::{Exception, Fault, vector};

/// A descriptor as it lies in memory, with where it was found.
#[derive(Debug, Clone, Copy)]
pub struct Descriptor {
    /// The first eight bytes.
    pub raw: u64,
    /// Bytes 8 to 15 of system descriptors in IA-32e mode.
    pub high: u64,
    /// Linear address.
    pub address: u64,
    pub selector: u16,
}

/// Types of system descriptors.
pub mod kind {
    pub const TSS_16: u8 = 1;
    pub const LDT: u8 = 2;
    pub const TSS_16_BUSY: u8 = 3;
    pub const CALL_GATE_16: u8 = 4;
    pub const TASK_GATE: u8 = 5;
    pub const INTERRUPT_GATE_16: u8 = 6;
    pub const TRAP_GATE_16: u8 = 7;
    pub const TSS_32: u8 = 9;
    pub const TSS_32_BUSY: u8 = 11;
    pub const CALL_GATE_32: u8 = 12;
    pub const INTERRUPT_GATE_32: u8 = 14;
    pub const TRAP_GATE_32: u8 = 15;
}

impl Descriptor {
    /// Type and S bit together: 0 to 15 are system types, 16 to 31 code and data.
    pub fn kind(&self) -> u8 {
        (self.raw >> 40 & 0x1f) as u8
    }

    pub fn dpl(&self) -> u8 {
        (self.raw >> 45 & 3) as u8
    }

    pub fn is_present(&self) -> bool {
        self.raw >> 47 & 1 != 0
    }

    pub fn is_code(&self) -> bool {
        self.kind() & 0x18 == 0x18
    }

    pub fn is_conforming(&self) -> bool {
        self.kind() & 0x1c == 0x1c
    }

    pub fn is_writable_data(&self) -> bool {
        self.kind() & 0x1a == 0x12
    }

    /// Data, or code that may be read.
    pub fn is_readable(&self) -> bool {
        self.kind() & 0x10 != 0 && (!self.is_code() || self.kind() & 2 != 0)
    }

    /// L bit: 64-bit code.
    pub fn is_long(&self) -> bool {
        self.raw >> 53 & 1 != 0
    }

    /// D/B bit.
    pub fn is_big(&self) -> bool {
        self.raw >> 54 & 1 != 0
    }

    pub fn base(&self) -> u64 {
        self.raw >> 16 & 0xff_ffff | self.raw >> 32 & 0xff00_0000
    }

    /// The base of a 16-byte system descriptor.
    pub fn wide_base(&self) -> u64 {
        self.base() | self.high << 32
    }

    /// Limit in bytes, granularity applied.
    pub fn limit(&self) -> u32 {
        let limit = (self.raw & 0xffff | self.raw >> 32 & 0xf_0000) as u32;
        if self.raw >> 55 & 1 != 0 { limit << 12 | 0xfff } else { limit }
    }

    /// Attributes as `SegmentState` has them.
    pub fn attributes(&self) -> u16 {
        (self.raw >> 40) as u16 & 0xf0ff
    }

    /// The segment register that this descriptor gives, with another selector's RPL.
    pub fn segment(&self, selector: u16) -> SegmentState {
        SegmentState { selector, base: self.base(), limit: self.limit(), attributes: self.attributes() }
    }

    /// A gate's target selector.
    pub fn gate_selector(&self) -> u16 {
        (self.raw >> 16) as u16
    }

    /// A gate's target offset: 16, 32 or 64 bits of it.
    pub fn gate_offset(&self, wide: bool) -> u64 {
        let low = self.raw & 0xffff;
        match self.kind() {
            kind::CALL_GATE_16 | kind::INTERRUPT_GATE_16 | kind::TRAP_GATE_16 => low,
            _ => low | self.raw >> 32 & 0xffff_0000 | if wide { self.high << 32 } else { 0 },
        }
    }
}

/// Bytes in a TSS that hold the stack pointers, by its type.
pub fn is_32_bit_tss(attributes: u16) -> bool {
    attributes & 8 != 0
}

/// Whether a selector is null: index 0 of the GDT, any RPL.
pub fn is_null(selector: u16) -> bool {
    selector & 0xfffc == 0
}

impl Cpu {
    /// Raises an exception whose error code names a selector; `external` is the EXT bit.
    pub(crate) fn raise_selector(&mut self, vector: u8, selector: u16, external: u32) -> Fault {
        self.raise(Exception { vector, error_code: Some(u32::from(selector & 0xfffc) | external), detail: 0 })
    }

    /// The linear address of a selector's descriptor of `bytes` bytes, if it lies inside its table.
    pub(crate) fn descriptor_address(&self, selector: u16, bytes: u64) -> Option<u64> {
        let offset = u64::from(selector & 0xfff8);
        let (base, limit) = if selector & 4 != 0 {
            if self.ldtr.attributes & 0x80 == 0 || is_null(self.ldtr.selector) {
                return None;
            }
            (self.ldtr.base, u64::from(self.ldtr.limit))
        } else {
            (self.gdtr.base, u64::from(self.gdtr.limit))
        };
        (offset + bytes - 1 <= limit).then(|| base.wrapping_add(offset))
    }

    /// Reads a selector's descriptor; beyond the table's end raises `beyond` with the selector.
    pub(crate) fn descriptor(&mut self, selector: u16, beyond: u8, external: u32) -> Result<Descriptor, Fault> {
        match self.descriptor_address(selector, 8) {
            Some(address) => {
                let raw = self.load_implicit::<u64>(address)?;
                Ok(Descriptor { raw, high: 0, address, selector })
            }
            None => Err(self.raise_selector(beyond, selector, external)),
        }
    }

    /// Reads the second half of a system descriptor in IA-32e mode; the type bits there must be zero.
    pub(crate) fn widen_descriptor(&mut self, mut descriptor: Descriptor, beyond: u8) -> Result<Descriptor, Fault> {
        if !self.mode.long {
            return Ok(descriptor);
        }
        if self.descriptor_address(descriptor.selector, 16).is_none() {
            return Err(self.raise_selector(beyond, descriptor.selector, 0));
        }
        descriptor.high = self.load_implicit::<u64>(descriptor.address.wrapping_add(8))?;
        if descriptor.high >> 40 & 0x1f != 0 {
            return Err(self.raise_selector(vector::GENERAL_PROTECTION, descriptor.selector, 0));
        }
        Ok(descriptor)
    }

    /// Sets the accessed flag of a code or data descriptor in its table and in `descriptor`.
    pub(crate) fn mark_accessed(&mut self, descriptor: &mut Descriptor) -> Result<(), Fault> {
        if descriptor.raw >> 40 & 1 == 0 {
            descriptor.raw |= 1 << 40;
            self.store_implicit(descriptor.address.wrapping_add(5), (descriptor.raw >> 40) as u8)?;
        }
        Ok(())
    }
}
