//! From an operand's offset to its linear address.

use crate::cpu::{CS, Cpu};
use crate::fault::Fault;
use crate::op::{Op, address};
use crate::page_walk::Access;

impl Cpu {
    /// The offset of the op's memory operand, cut to its address size: what LEA gives before it is cut to the operand size.
    #[inline(always)]
    pub fn offset(&self, op: &Op) -> u64 {
        let base = self.gpr[usize::from(op.base) & 31];
        let index = self.gpr[usize::from(op.index) & 31] << (op.scale & 3);
        let offset = base.wrapping_add(index).wrapping_add(op.displacement as i64 as u64);
        match op.address_kind {
            address::FLAT | address::BASED => offset,
            address::NEXT_RIP => op.next_rip(self).wrapping_add(op.displacement as i64 as u64),
            address::CHECKED_16 => offset & 0xffff,
            _ => offset & 0xffff_ffff,
        }
    }

    /// The linear address of the op's memory operand of `bytes` bytes; checks the segment where the mode has limits.
    #[inline(always)]
    pub fn linear(&mut self, op: &Op, bytes: u64, access: Access) -> Result<u64, Fault> {
        if op.address_kind == address::FLAT {
            let base = self.gpr[usize::from(op.base) & 31];
            let index = self.gpr[usize::from(op.index) & 31] << (op.scale & 3);
            return Ok(base.wrapping_add(index).wrapping_add(op.displacement as i64 as u64));
        }
        let offset = self.offset(op);
        self.linear_at(op.segment, offset, bytes, access)
    }

    /// The linear address of `bytes` bytes at an offset in a segment, in any mode; checks the segment where the mode has limits.
    pub fn linear_at(&mut self, segment: u8, offset: u64, bytes: u64, access: Access) -> Result<u64, Fault> {
        let state = self.segments[usize::from(segment)];
        if self.is_64_bit() {
            let base = if segment >= crate::cpu::FS { state.base } else { 0 };
            return Ok(base.wrapping_add(offset));
        }
        let attributes = state.attributes;
        if self.mode.protected {
            let present = attributes & 0x80 != 0;
            let is_code = attributes & 8 != 0;
            let readable_or_writable = attributes & 2 != 0;
            let allowed = match access {
                Access::Read => !is_code || readable_or_writable,
                Access::Write => !is_code && readable_or_writable,
                Access::Fetch => segment == CS,
            };
            if !present || !allowed {
                return Err(self.raise_segment_fault(segment));
            }
        }
        let limit = u64::from(state.limit);
        let last = offset.wrapping_add(bytes - 1);
        let expands_down = self.mode.protected && attributes & 0xc == 4;
        let inside = if expands_down {
            let top = if attributes & 1 << 14 != 0 { 0xffff_ffff } else { 0xffff };
            offset > limit && last <= top
        } else {
            last <= limit && last >= offset
        };
        if !inside {
            return Err(self.raise_segment_fault(segment));
        }
        Ok(state.base.wrapping_add(offset) & 0xffff_ffff)
    }
}
