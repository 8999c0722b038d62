//! INVLPG, INVPCID and the cache instructions (SDM vol. 3, 4.10.4).

use crate::cpu::{CodeSize, Cpu, cr4, is_canonical};
use crate::fault::Fault;
use crate::op::{Flow, Op};
use crate::page_walk::Access;

impl Cpu {
    /// INVLPG; a non-canonical address is no error.
    pub(crate) fn op_invalidate_page(&mut self, op: &Op) -> Result<Flow, Fault> {
        self.require_cpl_0()?;
        let offset = self.offset(op);
        let base = match self.mode.code {
            CodeSize::Bits64 if op.segment < crate::cpu::FS => 0,
            _ => self.segments[usize::from(op.segment) % 6].base,
        };
        let linear = self.wrap_linear(base.wrapping_add(offset));
        self.tlb.invalidate_page(linear);
        Ok(self.leave(op))
    }

    /// INVPCID. `first`: the register with the type.
    pub(crate) fn op_invalidate_context(&mut self, op: &Op) -> Result<Flow, Fault> {
        if !self.mode.protected && !self.mode.virtual_8086 {
            // Real mode has no privilege levels; the instruction works there too.
        } else {
            self.require_cpl_0()?;
        }
        let linear = self.linear(op, 16, Access::Read)?;
        let pcid = self.load::<u64>(linear, op.segment)?;
        let at = self.wrap_linear(linear.wrapping_add(8));
        let address = self.load::<u64>(at, op.segment)?;
        let mut kind = self.gpr[usize::from(op.first) % 16];
        if !self.is_64_bit() {
            kind &= 0xffff_ffff;
        }
        let has_pcids = self.cr4 & cr4::PCIDE != 0;
        let bad_context = kind < 2 && pcid != 0 && !has_pcids;
        let bad_address = kind == 0 && !is_canonical(address, self.base_bits());
        if kind > 3 || pcid >> 12 != 0 || bad_context || bad_address {
            return Err(self.raise_gp(0));
        }
        match kind {
            0 => self.tlb.invalidate_page(address),
            1 => self.tlb.flush_context(pcid),
            _ => self.tlb.flush_all(),
        }
        Ok(self.leave(op))
    }

    /// INVD, WBINVD, WBNOINVD: there is no cache to write back.
    pub(crate) fn op_cache(&mut self, _op: &Op) -> Result<Flow, Fault> {
        self.require_cpl_0()?;
        Ok(Flow::Next)
    }
}
