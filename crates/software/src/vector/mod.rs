//! x87, MMX, SSE and AVX: the registers, and how their instructions run.
//!
//! An instruction of these families runs on the host CPU itself, in a stub generated once for its normalised form
//! ([`stub`]): the stub loads the registers that the instruction reads, executes it, and stores what it writes. Results, rounding and
//! sticky flags are the CPU's own. The frequent forms have an entry before their stub ([`entry`]) and so are handlers without any Rust code; stores and
//! legacy moves between registers are handlers in Rust ([`moves`]).
//!
//! The x87 and MMX registers live in the host's x87 registers while the vCPU thread runs guest code: no Rust code uses them, so they
//! cost nothing per instruction. They are loaded when the first instruction needs them ([`VectorState::make_x87_live`]) and put back into
//! the image when the thread leaves the run loop ([`VectorState::retire`]). The pointers to the last instruction and
//! operand are kept beside them: those in the host's registers would name the engine's own addresses.
//!
//! Invariants:
//! - No host address reaches the guest: environment images take their pointers from [`Pointers`].
//! - The host's MXCSR always has the control bits that Rust code expects. While the guest's are the same, which is nearly always, its
//!   instructions run under the host's register and leave their sticky flags there; [`VectorState::mxcsr`] collects them. Rust code that
//!   may compute with floats (devices) is called between [`VectorState::pause_floats`] and [`VectorState::resume_floats`].
//! - XMM and YMM registers are in memory, in [`VectorState::ymm`], whenever Rust code runs. Whoever writes one writes as many bytes by one store as
//!   the next instruction loads by one load: a load that needs two earlier stores waits until both are in the host's cache.
//!
//! Map: `code_area` (executable memory), `stub` (makes stubs), `entry` (makes handlers of them), `signal` (numeric exceptions raised inside stubs), `run` (handlers that
//! call stubs), `moves`, `masked` (masked moves and gathers), `x87` (control instructions and environments), `area` (save areas in guest memory),
//! `fxsave`, `xsave`.

mod area;
pub mod code_area;
pub mod entry;
pub mod fxsave;
pub mod masked;
pub mod moves;
pub mod run;
mod signal;
pub mod stub;
#[cfg(test)]
mod tests;
pub mod x87;
pub mod xsave;

use std::arch::asm;

use crate::cpu::{Cpu, cr0, cr4};
use crate::fault::{Exception, Fault, vector};

/// Classes of instructions that CR0, CR4 and XCR0 switch on and off.
pub mod class {
    pub const X87: u8 = 1;
    pub const MMX: u8 = 2;
    pub const SSE: u8 = 4;
    pub const AVX: u8 = 8;
}

/// MXCSR as Rust code expects it: all exceptions masked, round to nearest.
pub const HOST_MXCSR: u32 = 0x1f80;
/// MXCSR's sticky flags.
const MXCSR_FLAGS: u32 = 0x3f;
/// MXCSR bits that exist.
pub const MXCSR_MASK: u32 = 0xffff;

/// A 256-bit register as four 64-bit words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C, align(32))]
pub struct Ymm(pub [u64; 4]);

/// The x87 registers in FXSAVE's 64-bit format; only its first 160 bytes are used.
#[derive(Clone)]
#[repr(C, align(64))]
pub struct X87Image(pub [u8; 512]);

/// Where the last x87 instruction and its operand were.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Pointers {
    /// The low 3 bits of the first opcode byte and the ModRM byte.
    pub opcode: u16,
    pub code_selector: u16,
    pub data_selector: u16,
    pub instruction: u64,
    pub data: u64,
}

/// The vector and x87 registers of one vCPU.
#[repr(C)]
pub struct VectorState {
    /// YMM0 to YMM15; the low halves are XMM0 to XMM15.
    pub ymm: [Ymm; 16],
    /// MXCSR, but for flags that are still in the host's.
    mxcsr: u32,
    /// Not 0: the guest's control bits are [`HOST_MXCSR`]'s.
    mxcsr_shared: u32,
    /// What stubs put back into MXCSR.
    host_mxcsr: u32,
    /// The [`class`]es that may run now; derived by [`Cpu::update_mode`].
    pub enabled: u8,
    /// 0: the x87 registers are in the host's; 1: they are in `image`.
    x87_missing: u8,
    pub pointers: Pointers,
    image: X87Image,
}

impl Default for VectorState {
    /// After power-on (SDM vol. 3, table 10-1).
    fn default() -> Self {
        let mut image = X87Image([0; 512]);
        image.0[0] = 0x40;
        image.0[4] = 0xff;
        VectorState {
            ymm: [Ymm::default(); 16],
            mxcsr: HOST_MXCSR,
            mxcsr_shared: 1,
            host_mxcsr: HOST_MXCSR,
            enabled: 0,
            x87_missing: 1,
            pointers: Pointers::default(),
            image,
        }
    }
}

impl VectorState {
    pub(crate) const MXCSR_OFFSET: usize = std::mem::offset_of!(VectorState, mxcsr);
    pub(crate) const MXCSR_SHARED_OFFSET: usize = std::mem::offset_of!(VectorState, mxcsr_shared);
    pub(crate) const HOST_MXCSR_OFFSET: usize = std::mem::offset_of!(VectorState, host_mxcsr);
    pub(crate) const X87_MISSING_OFFSET: usize = std::mem::offset_of!(VectorState, x87_missing);

    /// Loads the x87 registers into the host's, if they are not there yet.
    #[inline(always)]
    pub fn make_x87_live(&mut self) {
        if self.x87_missing != 0 {
            self.load_image();
        }
    }

    #[cold]
    fn load_image(&mut self) {
        // FXRSTOR loads MXCSR too.
        self.pause_floats();
        self.image.0[24..28].copy_from_slice(&HOST_MXCSR.to_le_bytes());
        let control = u16::from_le_bytes([self.image.0[0], self.image.0[1]]) & 0x1f7f | 0x40;
        self.image.0[0..2].copy_from_slice(&control.to_le_bytes());
        // The host's pointers mean nothing; the guest's are in `pointers`.
        self.image.0[6..24].fill(0);
        // SAFETY: the image is 512 bytes, aligned to 64, with a legal MXCSR; all registers that FXRSTOR loads are declared lost.
        unsafe {
            asm!("fxrstor64 [{}]", in(reg) self.image.0.as_ptr(), clobber_abi("sysv64"), options(nostack, readonly))
        };
        self.x87_missing = 0;
    }

    /// Takes the x87 registers into the image; they stay live if they were.
    pub fn x87_image(&mut self) -> &X87Image {
        if self.x87_missing == 0 {
            // SAFETY: the image is 512 bytes, aligned to 64; FXSAVE changes no register.
            unsafe { asm!("fxsave64 [{}]", in(reg) self.image.0.as_mut_ptr(), options(nostack, preserves_flags)) };
        }
        &self.image
    }

    /// The image for writing: the host's registers no longer count.
    pub fn x87_image_mut(&mut self) -> &mut X87Image {
        self.x87_image();
        self.forget_live();
        &mut self.image
    }

    fn forget_live(&mut self) {
        if self.x87_missing == 0 {
            self.x87_missing = 1;
            // SAFETY: no Rust code depends on x87 registers; FNINIT leaves them as the ABI wants them.
            unsafe { asm!("fninit", options(nostack, nomem)) };
        }
    }

    /// MXCSR with all its flags.
    pub fn mxcsr(&mut self) -> u32 {
        if self.mxcsr_shared != 0 {
            let mut host = 0u32;
            // SAFETY: stores a register to a local variable.
            unsafe { asm!("stmxcsr [{}]", in(reg) &raw mut host, options(nostack, preserves_flags)) };
            self.mxcsr |= host & MXCSR_FLAGS;
        }
        self.mxcsr
    }

    /// Sets MXCSR; the caller has checked that only bits of [`MXCSR_MASK`] are set.
    pub fn set_mxcsr(&mut self, value: u32) {
        self.mxcsr = value;
        self.mxcsr_shared = u32::from(value & !MXCSR_FLAGS == HOST_MXCSR);
        self.resume_floats();
    }

    /// Collects the guest's flags before Rust code runs that may set flags of its own.
    pub fn pause_floats(&mut self) {
        self.mxcsr();
    }

    /// Drops the flags that Rust code has left: from here on they are the guest's.
    pub fn resume_floats(&mut self) {
        let host = HOST_MXCSR;
        // SAFETY: loads the value that Rust code expects, with no flag set.
        unsafe { asm!("ldmxcsr [{}]", in(reg) &raw const host, options(nostack, readonly, preserves_flags)) };
    }

    /// Takes all registers out of the host's. Called by the vCPU thread when it leaves the run loop, before the state may be looked at by
    /// others or run on by another thread.
    pub fn retire(&mut self) {
        self.pause_floats();
        self.resume_floats();
        if self.x87_missing == 0 {
            self.x87_image_mut();
        }
    }
}

impl Cpu {
    /// The instruction classes that CR0, CR4, XCR0 and the mode allow.
    #[inline]
    pub(crate) fn enabled_vector_classes(&self) -> u8 {
        if self.cr0 & cr0::TS != 0 {
            return 0;
        }
        let mut classes = 0;
        if self.cr0 & cr0::EM == 0 {
            classes |= class::X87 | class::MMX;
            if self.cr4 & cr4::OSFXSR != 0 {
                classes |= class::SSE;
            }
        }
        if self.cr4 & cr4::OSXSAVE != 0 && self.xcr0 & 6 == 6 && self.mode.protected {
            classes |= class::AVX;
        }
        classes
    }

    /// Raises what an instruction raises that needs `classes` while not all of them are enabled (SDM vol. 2, 2.4 and 23.25.3).
    #[cold]
    pub fn raise_disabled(&mut self, classes: u8) -> Fault {
        let emulated = self.cr0 & cr0::EM != 0;
        let undefined = if classes & class::AVX != 0 {
            self.cr4 & cr4::OSXSAVE == 0 || self.xcr0 & 6 != 6 || !self.mode.protected
        } else if classes & class::SSE != 0 {
            emulated || self.cr4 & cr4::OSFXSR == 0
        } else {
            classes & class::MMX != 0 && emulated
        };
        if undefined { self.raise_ud() } else { self.raise_nm() }
    }

    /// #MF
    #[cold]
    pub fn raise_x87(&mut self) -> Fault {
        self.raise(Exception { vector: vector::X87, error_code: None, detail: 0 })
    }

    /// #XM, or #UD where the guest does not expect it.
    #[cold]
    pub fn raise_simd(&mut self) -> Fault {
        if self.cr4 & cr4::OSXMMEXCPT == 0 {
            return self.raise_ud();
        }
        self.raise(Exception { vector: vector::SIMD, error_code: None, detail: 0 })
    }
}
