//! The XSAVE family (SDM vol. 1, chapter 13): state components x87, SSE, AVX and PKRU, in the standard and the compacted format.
//!
//! The modified optimisation of XSAVEOPT is not made: it is an optimisation. The init optimisation is.

use super::area::SaveArea;
use super::fxsave::{MXCSR_AT, X87_BYTES, XMM_AT};
use super::{MXCSR_MASK, Pointers};
use crate::cpu::{Cpu, RAX, RDX, cr0, cr4};
use crate::fault::Fault;
use crate::op::{Flow, Op};
use crate::ops::operand::flow;
use crate::page_walk::Access;

const X87: u64 = 1 << 0;
const SSE: u64 = 1 << 1;
const AVX: u64 = 1 << 2;
const PKRU: u64 = 1 << 9;
/// Set in XCOMP_BV of compacted areas.
const COMPACTED: u64 = 1 << 63;

const HEADER_AT: u64 = 512;
/// Where extended components begin, and the whole length of an area without them.
const EXTENDED_AT: u64 = 576;
const AVX_BYTES: u64 = 256;
const PKRU_BYTES: u64 = 8;
/// Where PKRU is in the standard format, as CPUID leaf 0xd says.
const PKRU_AT: u64 = 2688;
const MXCSR_INIT: u32 = 0x1f80;

/// Which instruction of the family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Xsave,
    Xsaveopt,
    Xsavec,
}

/// Where the extended components are.
#[derive(Debug, Clone, Copy)]
struct Layout {
    avx_at: u64,
    pkru_at: u64,
    len: u64,
}

impl Layout {
    fn standard(components: u64) -> Layout {
        let len = if components & PKRU != 0 {
            PKRU_AT + PKRU_BYTES
        } else if components & AVX != 0 {
            EXTENDED_AT + AVX_BYTES
        } else {
            EXTENDED_AT
        };
        Layout { avx_at: EXTENDED_AT, pkru_at: PKRU_AT, len }
    }

    /// No component asks for an alignment of its own.
    fn compacted(components: u64) -> Layout {
        let pkru_at = EXTENDED_AT + if components & AVX != 0 { AVX_BYTES } else { 0 };
        let len = pkru_at + if components & PKRU != 0 { PKRU_BYTES } else { 0 };
        Layout { avx_at: EXTENDED_AT, pkru_at, len }
    }
}

impl Cpu {
    /// What comes before every instruction of the family; tells the requested components (RFBM).
    fn begin_xsave(&mut self) -> Result<u64, Fault> {
        if self.cr4 & cr4::OSXSAVE == 0 {
            return Err(self.raise_ud());
        }
        if self.cr0 & cr0::TS != 0 {
            return Err(self.raise_nm());
        }
        let asked = self.gpr[RDX] << 32 | self.gpr[RAX] & 0xffff_ffff;
        Ok(asked & self.xcr0)
    }

    /// The components that are not in their initial configuration (XINUSE). MXCSR does not count.
    pub fn components_in_use(&mut self) -> u64 {
        let pointers = self.vector.pointers;
        let image = &self.vector.x87_image().0;
        let registers_clear =
            (0..8).all(|register| image[32 + 16 * register..42 + 16 * register].iter().all(|&byte| byte == 0));
        let x87_initial = image[..5] == [0x7f, 0x03, 0, 0, 0] && pointers == Pointers::default() && registers_clear;
        let count = self.xmm_count();
        let registers = &self.vector.ymm[..count];
        let sse = registers.iter().any(|register| register.0[0] | register.0[1] != 0);
        let avx = registers.iter().any(|register| register.0[2] | register.0[3] != 0);
        [(!x87_initial, X87), (sse, SSE), (avx, AVX), (self.pkru != 0, PKRU)]
            .into_iter()
            .filter(|&(in_use, _)| in_use)
            .fold(0, |bits, (_, bit)| bits | bit)
    }

    fn xsave(&mut self, op: &Op, kind: Kind) -> Result<(), Fault> {
        let requested = self.begin_xsave()?;
        let layout = match kind {
            Kind::Xsavec => Layout::compacted(requested),
            _ => Layout::standard(requested),
        };
        let area = self.aligned_area(op, layout.len, 64, Access::Write)?;
        let mut in_use = self.components_in_use();
        if kind == Kind::Xsavec && self.vector.mxcsr() != MXCSR_INIT {
            in_use |= SSE;
        }
        let saved = if kind == Kind::Xsave { requested } else { requested & in_use };
        let wide = op.extra != 0;
        let x87 = self.legacy_x87(wide);
        if saved & X87 != 0 {
            area.put(self, 0, &x87[..MXCSR_AT])?;
            area.put(self, 32, &x87[32..])?;
        }
        let mxcsr = match kind {
            Kind::Xsavec => saved & SSE != 0,
            _ => requested & (SSE | AVX) != 0,
        };
        if mxcsr {
            area.put(self, MXCSR_AT as u64, &x87[MXCSR_AT..32])?;
        }
        let count = self.xmm_count();
        if saved & SSE != 0 {
            let xmm = self.xmm_bytes();
            area.put(self, XMM_AT, &xmm[..16 * count])?;
        }
        if saved & AVX != 0 {
            let upper = self.upper_bytes();
            area.put(self, layout.avx_at, &upper[..16 * count])?;
        }
        if saved & PKRU != 0 {
            area.put(self, layout.pkru_at, &u64::from(self.pkru).to_le_bytes())?;
        }
        if kind == Kind::Xsavec {
            area.put(self, HEADER_AT, &(requested & in_use).to_le_bytes())?;
            area.put(self, HEADER_AT + 8, &(requested | COMPACTED).to_le_bytes())?;
        } else {
            let mut old = [0; 8];
            area.get(self, HEADER_AT, &mut old)?;
            let present = u64::from_le_bytes(old) & !requested | requested & in_use;
            area.put(self, HEADER_AT, &present.to_le_bytes())?;
        }
        area.finish(self);
        Ok(())
    }

    fn xrstor(&mut self, op: &Op) -> Result<(), Fault> {
        let requested = self.begin_xsave()?;
        let header_area = self.aligned_area(op, EXTENDED_AT, 64, Access::Read)?;
        let mut header = [0; 64];
        header_area.get(self, HEADER_AT, &mut header)?;
        let word = |at: usize| (0..8).fold(0, |value, index| value | u64::from(header[at + index]) << (8 * index));
        let (present, compaction) = (word(0), word(8));
        let compacted = compaction & COMPACTED != 0;
        let legal = if compacted {
            let layout = compaction & !COMPACTED;
            layout & !self.xcr0 == 0 && present & !layout == 0 && header[16..].iter().all(|&byte| byte == 0)
        } else {
            compaction == 0 && present & !self.xcr0 == 0 && word(16) == 0
        };
        if !legal {
            return Err(self.raise_gp(0));
        }
        let layout = if compacted { Layout::compacted(compaction) } else { Layout::standard(requested & present) };
        let area: SaveArea = self.aligned_area(op, layout.len, 64, Access::Read)?;
        let loaded = requested & present;
        let mut x87 = [0; X87_BYTES];
        area.get(self, 0, &mut x87)?;
        let mut mxcsr = self.vector.mxcsr();
        let loads_mxcsr = if compacted { loaded & SSE != 0 } else { requested & (SSE | AVX) != 0 };
        if loads_mxcsr {
            mxcsr = u32::from_le_bytes([x87[24], x87[25], x87[26], x87[27]]);
            if mxcsr & !MXCSR_MASK != 0 {
                return Err(self.raise_gp(0));
            }
        } else if compacted && requested & SSE != 0 {
            mxcsr = MXCSR_INIT;
        }
        let mut xmm = [0; 256];
        let mut upper = [0; 256];
        let mut pkru = [0; 4];
        if loaded & SSE != 0 {
            area.get(self, XMM_AT, &mut xmm)?;
        }
        if loaded & AVX != 0 {
            area.get(self, layout.avx_at, &mut upper)?;
        }
        if loaded & PKRU != 0 {
            area.get(self, layout.pkru_at, &mut pkru)?;
        }
        // From here on nothing faults.
        self.vector.set_mxcsr(mxcsr);
        if requested & X87 != 0 {
            if loaded & X87 == 0 {
                x87 = [0; X87_BYTES];
                x87[..2].copy_from_slice(&[0x7f, 0x03]);
            }
            self.set_legacy_x87(&x87, op.extra != 0);
        }
        if requested & SSE != 0 {
            self.set_xmm_bytes(&xmm);
        }
        if requested & AVX != 0 {
            self.set_upper_bytes(&upper);
        }
        if requested & PKRU != 0 {
            self.pkru = u32::from_le_bytes(pkru);
            self.tlb.flush_all();
        }
        Ok(())
    }

    /// The upper halves of the YMM registers as bytes.
    fn upper_bytes(&self) -> [u8; 256] {
        let mut bytes = [0; 256];
        for (target, register) in bytes.chunks_exact_mut(16).zip(&self.vector.ymm) {
            target[..8].copy_from_slice(&register.0[2].to_le_bytes());
            target[8..].copy_from_slice(&register.0[3].to_le_bytes());
        }
        bytes
    }

    fn set_upper_bytes(&mut self, bytes: &[u8; 256]) {
        let count = self.xmm_count();
        for (source, register) in bytes.chunks_exact(16).zip(&mut self.vector.ymm).take(count) {
            let (words, _) = source.as_chunks::<8>();
            for (word, value) in register.0[2..].iter_mut().zip(words) {
                *word = u64::from_le_bytes(*value);
            }
        }
    }
}

/// XSAVE (`extra`: REX.W)
pub extern "sysv64" fn xsave(cpu: &mut Cpu, op: &Op) -> Flow {
    flow(cpu.xsave(op, Kind::Xsave))
}

/// XSAVEOPT (`extra`: REX.W)
pub extern "sysv64" fn xsaveopt(cpu: &mut Cpu, op: &Op) -> Flow {
    flow(cpu.xsave(op, Kind::Xsaveopt))
}

/// XSAVEC (`extra`: REX.W)
pub extern "sysv64" fn xsavec(cpu: &mut Cpu, op: &Op) -> Flow {
    flow(cpu.xsave(op, Kind::Xsavec))
}

/// XRSTOR (`extra`: REX.W)
pub extern "sysv64" fn xrstor(cpu: &mut Cpu, op: &Op) -> Flow {
    flow(cpu.xrstor(op))
}
