//! Masked moves and gathers, element by element: elements that the mask leaves out must not fault.

use super::{Ymm, class};
use crate::cpu::{Cpu, RDI, is_canonical};
use crate::fault::Fault;
use crate::op::{Flow, Op, address};
use crate::ops::operand::flow;
use crate::page_walk::Access;

fn begin(cpu: &mut Cpu, classes: u8) -> Result<(), Fault> {
    if cpu.vector.enabled & classes != classes { Err(cpu.raise_disabled(classes)) } else { Ok(()) }
}

fn number(slot: u8) -> usize {
    usize::from(slot >> 4)
}

/// Element `index` of `bits` bits.
fn element(register: &Ymm, index: usize, bits: usize) -> u64 {
    let word = register.0[(index * bits / 64) % 4] >> (index * bits % 64);
    if bits == 32 { word & 0xffff_ffff } else { word }
}

fn set_element(register: &mut Ymm, index: usize, bits: usize, value: u64) {
    let word = &mut register.0[(index * bits / 64) % 4];
    if bits == 32 {
        let shift = index * 32 % 64;
        *word = *word & !(0xffff_ffff << shift) | (value & 0xffff_ffff) << shift;
    } else {
        *word = value;
    }
}

fn selected(mask: &Ymm, index: usize, bits: usize) -> bool {
    element(mask, index, bits) >> (bits - 1) & 1 != 0
}

/// Cuts an offset to the op's address size.
fn cut_offset(op: &Op, offset: u64) -> u64 {
    match op.address_kind {
        address::FLAT | address::BASED | address::NEXT_RIP => offset,
        address::CHECKED_16 => offset & 0xffff,
        _ => offset & 0xffff_ffff,
    }
}

/// The linear addresses of the elements that a mask selects, `bytes` bytes each, one after the other from `offset` on. All are checked against the
/// segment before any is touched; the address size cuts the operand's offset, not where its elements are.
fn element_addresses<const N: usize>(
    cpu: &mut Cpu,
    op: &Op,
    offset: u64,
    bytes: u64,
    access: Access,
    selected: impl Fn(usize) -> bool,
) -> Result<[Option<u64>; N], Fault> {
    let offset = cut_offset(op, offset);
    let mut addresses = [None; N];
    for (index, address) in addresses.iter_mut().enumerate() {
        if selected(index) {
            let offset = offset.wrapping_add(index as u64 * bytes);
            *address = Some(cpu.linear_at(op.segment, offset, bytes, access)?);
        }
    }
    Ok(addresses)
}

fn load_element(cpu: &mut Cpu, linear: u64, bits: usize, segment: u8) -> Result<u64, Fault> {
    if bits == 32 { cpu.load::<u32>(linear, segment).map(u64::from) } else { cpu.load::<u64>(linear, segment) }
}

/// VMASKMOVPS, VMASKMOVPD, VPMASKMOVD and VPMASKMOVQ from memory. Slots: target, mask. `extra`: bits of an element; `extra2`: bytes in all.
pub extern "sysv64" fn masked_load(cpu: &mut Cpu, op: &Op) -> Flow {
    flow(masked_load_or_fault(cpu, op))
}

fn masked_load_or_fault(cpu: &mut Cpu, op: &Op) -> Result<(), Fault> {
    begin(cpu, class::AVX)?;
    let bits = usize::from(op.extra);
    let mask = cpu.vector.ymm[number(op.second)];
    let bytes = bits as u64 / 8;
    let count = usize::from(op.extra2) * 8 / bits;
    let addresses: [_; 8] = element_addresses(cpu, op, cpu.offset(op), bytes, Access::Read, |index| {
        index < count && selected(&mask, index, bits)
    })?;
    let mut result = Ymm::default();
    for (index, address) in addresses.into_iter().enumerate() {
        if let Some(linear) = address {
            let value = load_element(cpu, linear, bits, op.segment)?;
            set_element(&mut result, index, bits, value);
        }
    }
    cpu.vector.ymm[number(op.first)] = result;
    Ok(())
}

/// The same to memory. Slots: mask, source.
pub extern "sysv64" fn masked_store(cpu: &mut Cpu, op: &Op) -> Flow {
    flow(masked_store_or_fault(cpu, op))
}

fn masked_store_or_fault(cpu: &mut Cpu, op: &Op) -> Result<(), Fault> {
    begin(cpu, class::AVX)?;
    let bits = usize::from(op.extra);
    let bytes = bits as u64 / 8;
    let mask = cpu.vector.ymm[number(op.first)];
    let source = cpu.vector.ymm[number(op.second)];
    let count = usize::from(op.extra2) * 8 / bits;
    let addresses: [_; 8] = element_addresses(cpu, op, cpu.offset(op), bytes, Access::Write, |index| {
        index < count && selected(&mask, index, bits)
    })?;
    for address in addresses.into_iter().flatten() {
        cpu.probe(address, bytes, Access::Write, op.segment)?;
    }
    for (index, address) in addresses.into_iter().enumerate() {
        let Some(address) = address else { continue };
        let value = element(&source, index, bits);
        if bits == 32 {
            cpu.store(address, value as u32, op.segment)?;
        } else {
            cpu.store(address, value, op.segment)?;
        }
    }
    Ok(())
}

/// MASKMOVDQU: bytes selected by the mask's bytes go to DS:rDI. Slots: source, mask.
pub extern "sysv64" fn masked_bytes<const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    let result = begin(cpu, if VEX { class::AVX } else { class::SSE }).and_then(|()| {
        let bytes = |register: &Ymm| (u128::from(register.0[0]) | u128::from(register.0[1]) << 64).to_le_bytes();
        let source = bytes(&cpu.vector.ymm[number(op.first)]);
        let mask = bytes(&cpu.vector.ymm[number(op.second)]);
        store_masked_bytes(cpu, op, &source, &mask)
    });
    flow(result)
}

/// MASKMOVQ: the same with 8 bytes. Slots: numbers of MMX registers.
pub extern "sysv64" fn masked_bytes_mmx(cpu: &mut Cpu, op: &Op) -> Flow {
    flow(masked_bytes_mmx_or_fault(cpu, op))
}

fn masked_bytes_mmx_or_fault(cpu: &mut Cpu, op: &Op) -> Result<(), Fault> {
    begin(cpu, class::MMX)?;
    if cpu.cr0 & crate::cpu::cr0::NE != 0 && cpu.vector.x87_pending() {
        return Err(cpu.raise_x87());
    }
    let source = cpu.vector.mmx(op.first);
    let mask = cpu.vector.mmx(op.second);
    store_masked_bytes(cpu, op, &source.to_le_bytes(), &mask.to_le_bytes())?;
    cpu.vector.enter_mmx();
    Ok(())
}

fn store_masked_bytes(cpu: &mut Cpu, op: &Op, source: &[u8], mask: &[u8]) -> Result<(), Fault> {
    let addresses: [_; 16] = element_addresses(cpu, op, cpu.gpr[RDI], 1, Access::Write, |index| {
        mask.get(index).is_some_and(|byte| byte & 0x80 != 0)
    })?;
    for address in addresses.into_iter().flatten() {
        cpu.probe(address, 1, Access::Write, op.segment)?;
    }
    for (address, &byte) in addresses.into_iter().zip(source) {
        if let Some(address) = address {
            cpu.store(address, byte, op.segment)?;
        }
    }
    Ok(())
}

/// Gathers. Slots: target, mask. `extra`: the index register times 16, plus 1 for indices of 64 bits, 2 for elements of 64 bits, 4 for a
/// YMM target, 8 for a count of elements limited to half (64-bit indices of 32-bit elements).
pub extern "sysv64" fn gather(cpu: &mut Cpu, op: &Op) -> Flow {
    flow(gather_or_fault(cpu, op))
}

fn gather_or_fault(cpu: &mut Cpu, op: &Op) -> Result<(), Fault> {
    begin(cpu, class::AVX)?;
    let index_bits = if op.extra & 1 != 0 { 64 } else { 32 };
    let bits = if op.extra & 2 != 0 { 64 } else { 32 };
    let count = usize::from(op.extra2);
    let indices = cpu.vector.ymm[number(op.extra)];
    let (target, mask) = (number(op.first), number(op.second));
    let bytes = bits as u64 / 8;
    for index in 0..count {
        if selected(&cpu.vector.ymm[mask], index, bits) {
            let raw = element(&indices, index, index_bits);
            let distance = if index_bits == 32 { raw as u32 as i32 as i64 as u64 } else { raw } << (op.scale & 3);
            // A fault leaves the elements before it done and their mask bits clear: the instruction then goes on where it was.
            let offset = cut_offset(op, cpu.offset(op).wrapping_add(distance));
            let linear = cpu.linear_at(op.segment, offset, bytes, Access::Read)?;
            if cpu.is_64_bit() && !is_canonical(linear, cpu.linear_bits()) {
                return Err(cpu.raise_segment_fault(op.segment));
            }
            let value = load_element(cpu, linear, bits, op.segment)?;
            set_element(&mut cpu.vector.ymm[target], index, bits, value);
        }
        set_element(&mut cpu.vector.ymm[mask], index, bits, 0);
    }
    // What lies beyond the elements becomes zero, in the target and in the mask.
    for index in count..256 / bits {
        set_element(&mut cpu.vector.ymm[target], index, bits, 0);
        set_element(&mut cpu.vector.ymm[mask], index, bits, 0);
    }
    Ok(())
}
