//! FXSAVE, FXRSTOR, LDMXCSR and STMXCSR (SDM vol. 1, 10.5).

use super::area::SaveArea;
use super::{MXCSR_MASK, VectorState, class};
use crate::cpu::Cpu;
use crate::fault::Fault;
use crate::op::{Flow, Op};
use crate::ops::operand::flow;
use crate::page_walk::Access;

/// Bytes of the x87 part of the legacy area: header and ST0 to ST7. MXCSR and its mask are in the header.
pub(super) const X87_BYTES: usize = 160;
/// Where XMM0 is in the legacy area.
pub(super) const XMM_AT: u64 = 160;
/// Where MXCSR is in the legacy area.
pub(super) const MXCSR_AT: usize = 24;

impl VectorState {
    /// All registers as FXSAVE64 writes them, of a processor that does not run.
    pub(crate) fn resting_fxsave(&self) -> [u8; 512] {
        let mut bytes = [0; 512];
        bytes[..X87_BYTES].copy_from_slice(&self.image.0[..X87_BYTES]);
        bytes[6..8].copy_from_slice(&self.pointers.opcode.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.pointers.instruction.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.pointers.data.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.mxcsr.to_le_bytes());
        bytes[28..32].copy_from_slice(&MXCSR_MASK.to_le_bytes());
        for (target, register) in bytes[XMM_AT as usize..].chunks_exact_mut(16).zip(&self.ymm) {
            target[..8].copy_from_slice(&register.0[0].to_le_bytes());
            target[8..].copy_from_slice(&register.0[1].to_le_bytes());
        }
        bytes
    }
}

impl Cpu {
    /// Sets all registers from what FXSAVE64 writes, while the processor does not run. Bits that no processor has are dropped.
    pub(crate) fn set_resting_fxsave(&mut self, bytes: &[u8; 512]) {
        let mut x87 = [0; X87_BYTES];
        x87.copy_from_slice(&bytes[..X87_BYTES]);
        self.set_legacy_x87(&x87, true);
        self.vector.set_mxcsr(u32::from_le_bytes([bytes[24], bytes[25], bytes[26], bytes[27]]) & MXCSR_MASK);
        for (source, register) in bytes[XMM_AT as usize..].as_chunks::<16>().0.iter().zip(&mut self.vector.ymm) {
            let value = u128::from_le_bytes(*source);
            register.0[0] = value as u64;
            register.0[1] = (value >> 64) as u64;
        }
    }

    /// The first 160 bytes of a legacy save area. `wide`: pointers of 64 bits (REX.W).
    pub(super) fn legacy_x87(&mut self, wide: bool) -> [u8; X87_BYTES] {
        let pointers = self.vector.pointers;
        let mut bytes = [0; X87_BYTES];
        bytes.copy_from_slice(&self.vector.x87_image().0[..X87_BYTES]);
        bytes[6..8].copy_from_slice(&pointers.opcode.to_le_bytes());
        bytes[8..16].copy_from_slice(&pointers.instruction.to_le_bytes());
        bytes[16..24].copy_from_slice(&pointers.data.to_le_bytes());
        if !wide {
            bytes[12..16].copy_from_slice(&u32::from(pointers.code_selector).to_le_bytes());
            bytes[20..24].copy_from_slice(&u32::from(pointers.data_selector).to_le_bytes());
        }
        bytes[24..28].copy_from_slice(&self.vector.mxcsr().to_le_bytes());
        bytes[28..32].copy_from_slice(&MXCSR_MASK.to_le_bytes());
        bytes
    }

    /// Sets the x87 registers from the first 160 bytes of a legacy save area.
    pub(super) fn set_legacy_x87(&mut self, bytes: &[u8; X87_BYTES], wide: bool) {
        let qword = |at: usize| (0..8).fold(0, |value, index| value | u64::from(bytes[at + index]) << (8 * index));
        let pointers = &mut self.vector.pointers;
        pointers.opcode = u16::from_le_bytes([bytes[6], bytes[7]]) & 0x7ff;
        pointers.instruction = qword(8);
        pointers.data = qword(16);
        pointers.code_selector = 0;
        pointers.data_selector = 0;
        if !wide {
            pointers.code_selector = (pointers.instruction >> 32) as u16;
            pointers.data_selector = (pointers.data >> 32) as u16;
            pointers.instruction &= 0xffff_ffff;
            pointers.data &= 0xffff_ffff;
        }
        self.vector.x87_image_mut().0[..X87_BYTES].copy_from_slice(bytes);
        self.vector.normalise_image();
    }

    /// XMM registers that legacy areas hold in this mode.
    pub(super) fn xmm_count(&self) -> usize {
        if self.is_64_bit() { 16 } else { 8 }
    }

    /// The XMM registers as bytes.
    pub(super) fn xmm_bytes(&self) -> [u8; 256] {
        let mut bytes = [0; 256];
        for (target, register) in bytes.chunks_exact_mut(16).zip(&self.vector.ymm) {
            target[..8].copy_from_slice(&register.0[0].to_le_bytes());
            target[8..].copy_from_slice(&register.0[1].to_le_bytes());
        }
        bytes
    }

    /// Sets the XMM registers that exist in this mode; the upper halves of YMM stay.
    pub(super) fn set_xmm_bytes(&mut self, bytes: &[u8; 256]) {
        let count = self.xmm_count();
        for (source, register) in bytes.chunks_exact(16).zip(&mut self.vector.ymm).take(count) {
            let (words, _) = source.as_chunks::<8>();
            for (word, value) in register.0.iter_mut().zip(words) {
                *word = u64::from_le_bytes(*value);
            }
        }
    }

    /// The op's memory operand of `len` bytes, aligned to `alignment`.
    pub(super) fn aligned_area(
        &mut self,
        op: &Op,
        len: u64,
        alignment: u64,
        access: Access,
    ) -> Result<SaveArea, Fault> {
        let linear = self.linear(op, len, access)?;
        if self.is_64_bit() && !crate::cpu::is_canonical(linear, self.linear_bits()) {
            return Err(self.raise_segment_fault(op.segment));
        }
        if linear & (alignment - 1) != 0 {
            return Err(self.raise_gp(0));
        }
        SaveArea::new(self, linear, len, access, op.segment)
    }
}

/// FXSAVE (`extra`: REX.W)
pub extern "sysv64" fn save(cpu: &mut Cpu, op: &Op) -> Flow {
    flow(save_or_fault(cpu, op))
}

fn save_or_fault(cpu: &mut Cpu, op: &Op) -> Result<(), Fault> {
    if cpu.vector.enabled & class::X87 == 0 {
        return Err(cpu.raise_disabled(class::X87));
    }
    let area = cpu.aligned_area(op, 512, 16, Access::Write)?;
    let x87 = cpu.legacy_x87(op.extra != 0);
    let xmm = cpu.xmm_bytes();
    area.put(cpu, 0, &x87)?;
    area.put(cpu, XMM_AT, &xmm[..16 * cpu.xmm_count()])?;
    area.finish(cpu);
    Ok(())
}

/// FXRSTOR (`extra`: REX.W)
pub extern "sysv64" fn restore(cpu: &mut Cpu, op: &Op) -> Flow {
    flow(restore_or_fault(cpu, op))
}

fn restore_or_fault(cpu: &mut Cpu, op: &Op) -> Result<(), Fault> {
    if cpu.vector.enabled & class::X87 == 0 {
        return Err(cpu.raise_disabled(class::X87));
    }
    let area = cpu.aligned_area(op, 512, 16, Access::Read)?;
    let mut x87 = [0; X87_BYTES];
    let mut xmm = [0; 256];
    area.get(cpu, 0, &mut x87)?;
    area.get(cpu, XMM_AT, &mut xmm)?;
    let mxcsr = u32::from_le_bytes([x87[24], x87[25], x87[26], x87[27]]);
    if mxcsr & !MXCSR_MASK != 0 {
        return Err(cpu.raise_gp(0));
    }
    cpu.vector.set_mxcsr(mxcsr);
    cpu.set_legacy_x87(&x87, op.extra != 0);
    cpu.set_xmm_bytes(&xmm);
    Ok(())
}

/// LDMXCSR, VLDMXCSR
pub extern "sysv64" fn load_mxcsr<const CLASS: u8>(cpu: &mut Cpu, op: &Op) -> Flow {
    if cpu.vector.enabled & CLASS == 0 {
        let _ = cpu.raise_disabled(CLASS);
        return Flow::Fault;
    }
    match cpu.load_operand::<u32>(op) {
        Ok(value) if value & !MXCSR_MASK == 0 => {
            cpu.vector.set_mxcsr(value);
            Flow::Next
        }
        Ok(_) => {
            let _ = cpu.raise_gp(0);
            Flow::Fault
        }
        Err(_) => Flow::Fault,
    }
}

/// STMXCSR, VSTMXCSR
pub extern "sysv64" fn store_mxcsr<const CLASS: u8>(cpu: &mut Cpu, op: &Op) -> Flow {
    if cpu.vector.enabled & CLASS == 0 {
        let _ = cpu.raise_disabled(CLASS);
        return Flow::Fault;
    }
    let value = cpu.vector.mxcsr();
    flow(cpu.store_operand(op, value))
}
