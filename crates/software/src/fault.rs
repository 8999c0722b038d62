//! Exceptions on their way from an instruction to the guest's handler.

use crate::cpu::Cpu;

/// Exception vectors (SDM vol. 3, table 6-1).
pub mod vector {
    pub const DIVIDE_ERROR: u8 = 0;
    pub const DEBUG: u8 = 1;
    pub const NMI: u8 = 2;
    pub const BREAKPOINT: u8 = 3;
    pub const OVERFLOW: u8 = 4;
    pub const BOUND: u8 = 5;
    pub const INVALID_OPCODE: u8 = 6;
    pub const DEVICE_NOT_AVAILABLE: u8 = 7;
    pub const DOUBLE_FAULT: u8 = 8;
    pub const INVALID_TSS: u8 = 10;
    pub const SEGMENT_NOT_PRESENT: u8 = 11;
    pub const STACK: u8 = 12;
    pub const GENERAL_PROTECTION: u8 = 13;
    pub const PAGE_FAULT: u8 = 14;
    pub const X87: u8 = 16;
    pub const ALIGNMENT_CHECK: u8 = 17;
    pub const SIMD: u8 = 19;
    /// No exception of the architecture and never delivered: the next instruction is at a debugger's breakpoint.
    pub const DEBUGGER: u8 = 255;
}

/// An exception as it will be delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Exception {
    pub vector: u8,
    /// Pushed for the vectors that have one.
    pub error_code: Option<u32>,
    /// The linear address that goes to CR2 (page faults), or the bits that go to DR6 (debug exceptions).
    pub detail: u64,
}

/// Proof that [`Cpu::raise`] has recorded an exception in `cpu.fault`. An instruction that gets one stops at once and leaves no trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub struct Fault(());

impl Cpu {
    /// Records an exception; the run loop delivers it when the instruction has returned.
    #[cold]
    pub fn raise(&mut self, exception: Exception) -> Fault {
        self.fault = exception;
        Fault(())
    }

    /// The instruction at RIP is at a debugger's breakpoint.
    #[cold]
    pub(crate) fn raise_debugger(&mut self) -> Fault {
        self.raise(Exception { vector: vector::DEBUGGER, error_code: None, detail: 0 })
    }

    /// #UD
    #[cold]
    pub fn raise_ud(&mut self) -> Fault {
        self.raise(Exception { vector: vector::INVALID_OPCODE, error_code: None, detail: 0 })
    }

    /// #GP with an error code: 0, or a selector with its external and table bits.
    #[cold]
    pub fn raise_gp(&mut self, error_code: u32) -> Fault {
        self.raise(Exception { vector: vector::GENERAL_PROTECTION, error_code: Some(error_code), detail: 0 })
    }

    /// #SS with an error code.
    #[cold]
    pub fn raise_ss(&mut self, error_code: u32) -> Fault {
        self.raise(Exception { vector: vector::STACK, error_code: Some(error_code), detail: 0 })
    }

    /// #NM
    #[cold]
    pub fn raise_nm(&mut self) -> Fault {
        self.raise(Exception { vector: vector::DEVICE_NOT_AVAILABLE, error_code: None, detail: 0 })
    }

    /// #PF at `address`; `error_code` as in SDM vol. 3, 4.7.
    #[cold]
    pub fn raise_page_fault(&mut self, address: u64, error_code: u32) -> Fault {
        self.raise(Exception { vector: vector::PAGE_FAULT, error_code: Some(error_code), detail: address })
    }

    /// #GP(0), or #SS(0) for an access through SS: a non-canonical address or a limit violation.
    #[cold]
    pub fn raise_segment_fault(&mut self, segment: u8) -> Fault {
        if segment == crate::cpu::SS { self.raise_ss(0) } else { self.raise_gp(0) }
    }
}
