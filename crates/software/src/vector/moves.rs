//! Stores and legacy moves between registers, which are so frequent and so short that a stub would cost more than the move.
//!
//! Register numbers in slots are times 16, as stubs want them.

use std::arch::x86_64::{__m128i, _mm_load_si128, _mm_set_epi64x, _mm_store_si128, _mm_storeu_si128};

use super::run::operand_address;
use super::{Ymm, class};
use crate::access::GuestInt;
use crate::cpu::Cpu;
use crate::fault::Fault;
use crate::op::{Flow, Op};
use crate::ops::operand::flow;
use crate::page_walk::Access;

/// Register-number encodings of slots.
#[inline(always)]
fn number(slot: u8) -> usize {
    usize::from(slot >> 4)
}

/// The instruction class of an encoding.
const fn class_of(vex: bool) -> u8 {
    if vex { class::AVX } else { class::SSE }
}

#[inline(always)]
fn begin<const VEX: bool>(cpu: &mut Cpu) -> Result<(), Fault> {
    if cpu.vector.enabled & class_of(VEX) == 0 { Err(cpu.raise_disabled(class_of(VEX))) } else { Ok(()) }
}

/// Writes an XMM register and leaves the upper half of YMM. By one store: a stub loads all 16 bytes soon, and a load that needs two
/// earlier stores waits until both are in the cache.
#[inline(always)]
fn set_xmm(register: &mut Ymm, low: u64, high: u64) {
    // SAFETY: the register is 32 bytes, aligned to 32.
    unsafe {
        let value = _mm_set_epi64x(high as i64, low as i64);
        _mm_store_si128(register.0.as_mut_ptr().cast(), value);
    }
}

/// Stores 16 bytes of a register to memory.
pub extern "sysv64" fn store16<const VEX: bool, const ALIGNED: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    flow(store16_or_fault::<VEX, ALIGNED>(cpu, op))
}

#[inline(always)]
fn store16_or_fault<const VEX: bool, const ALIGNED: bool>(cpu: &mut Cpu, op: &Op) -> Result<(), Fault> {
    begin::<VEX>(cpu)?;
    let linear = operand_address::<ALIGNED>(cpu, op, 16, Access::Write)?;
    let register = cpu.vector.ymm[number(op.first)];
    match cpu.write_pointer(linear, 16, op.segment)? {
        Some(pointer) => {
            // SAFETY: the pointer is to 16 bytes of mapped RAM; the register is 32 bytes, aligned to 32.
            unsafe {
                let value = _mm_load_si128(register.0.as_ptr().cast());
                _mm_storeu_si128(pointer.cast::<__m128i>(), value);
            }
            cpu.written(linear, pointer, 16);
            Ok(())
        }
        None => {
            let value = u128::from(register.0[0]) | u128::from(register.0[1]) << 64;
            cpu.store_bytes(linear, &value.to_le_bytes(), op.segment)
        }
    }
}

/// Stores 32 bytes of a register to memory, as two host accesses of 16.
pub extern "sysv64" fn store32<const ALIGNED: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    flow(store32_or_fault::<ALIGNED>(cpu, op))
}

#[inline(always)]
fn store32_or_fault<const ALIGNED: bool>(cpu: &mut Cpu, op: &Op) -> Result<(), Fault> {
    begin::<true>(cpu)?;
    let linear = operand_address::<ALIGNED>(cpu, op, 32, Access::Write)?;
    let register = cpu.vector.ymm[number(op.first)];
    match cpu.write_pointer(linear, 32, op.segment)? {
        Some(pointer) => {
            let source = register.0.as_ptr().cast::<__m128i>();
            // SAFETY: the pointer is to 32 bytes of mapped RAM; the register is 32 bytes, aligned to 32.
            unsafe {
                let (low, high) = (_mm_load_si128(source), _mm_load_si128(source.add(1)));
                _mm_storeu_si128(pointer.cast(), low);
                _mm_storeu_si128(pointer.cast::<__m128i>().add(1), high);
            }
            cpu.written(linear, pointer, 32);
            Ok(())
        }
        None => {
            let mut bytes = [0; 32];
            for (target, word) in bytes.chunks_exact_mut(8).zip(register.0) {
                target.copy_from_slice(&word.to_le_bytes());
            }
            cpu.store_bytes(linear, &bytes, op.segment)
        }
    }
}

/// Copies the low 16 bytes of a register.
pub extern "sysv64" fn copy16(cpu: &mut Cpu, op: &Op) -> Flow {
    if let Err(fault) = begin::<false>(cpu) {
        return flow(Err(fault));
    }
    let source = cpu.vector.ymm[number(op.second)];
    set_xmm(&mut cpu.vector.ymm[number(op.first)], source.0[0], source.0[1]);
    Flow::Next
}

/// Stores the low 4 or 8 bytes of a register; with `HIGH` the upper 8 bytes of XMM.
pub extern "sysv64" fn store_scalar<T: GuestInt, const VEX: bool, const HIGH: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    if let Err(fault) = begin::<VEX>(cpu) {
        return flow(Err(fault));
    }
    let value = cpu.vector.ymm[number(op.first)].0[usize::from(HIGH)];
    flow(cpu.store_operand(op, T::from_u64(value)))
}

/// MOVQ between registers: the upper 8 bytes of XMM become zero.
pub extern "sysv64" fn copy8(cpu: &mut Cpu, op: &Op) -> Flow {
    if let Err(fault) = begin::<false>(cpu) {
        return flow(Err(fault));
    }
    let low = cpu.vector.ymm[number(op.second)].0[0];
    set_xmm(&mut cpu.vector.ymm[number(op.first)], low, 0);
    Flow::Next
}

/// MOVD and MOVQ from a general register.
pub extern "sysv64" fn from_general<T: GuestInt>(cpu: &mut Cpu, op: &Op) -> Flow {
    if let Err(fault) = begin::<false>(cpu) {
        return flow(Err(fault));
    }
    let value = T::from_u64(cpu.gpr[usize::from(op.second) & 31]).to_u64();
    set_xmm(&mut cpu.vector.ymm[number(op.first)], value, 0);
    Flow::Next
}

/// MOVD and MOVQ to a general register.
pub extern "sysv64" fn to_general<T: GuestInt, const VEX: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    if let Err(fault) = begin::<VEX>(cpu) {
        return flow(Err(fault));
    }
    let value = cpu.vector.ymm[number(op.second)].0[0];
    cpu.gpr[usize::from(op.first) & 31] = T::from_u64(value).to_u64();
    Flow::Next
}

/// MOVNTI: a store like any other, as all of memory is coherent; the only one of its family that no control bit switches off.
pub extern "sysv64" fn store_general<T: GuestInt>(cpu: &mut Cpu, op: &Op) -> Flow {
    let value = cpu.gpr[usize::from(op.first) & 31];
    flow(cpu.store_operand(op, T::from_u64(value)))
}

/// MOVLPS, MOVLPD, MOVHPS and MOVHPD from memory, legacy encodings: the other half stays.
pub extern "sysv64" fn load_half<const HIGH: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    match begin::<false>(cpu).and_then(|()| cpu.load_operand::<u64>(op)) {
        Ok(value) => {
            cpu.vector.ymm[number(op.first)].0[usize::from(HIGH)] = value;
            Flow::Next
        }
        Err(_) => Flow::Fault,
    }
}

/// XORPS, PXOR and their kin of a register with itself.
pub extern "sysv64" fn clear(cpu: &mut Cpu, op: &Op) -> Flow {
    if let Err(fault) = begin::<false>(cpu) {
        return flow(Err(fault));
    }
    set_xmm(&mut cpu.vector.ymm[number(op.first)], 0, 0);
    Flow::Next
}

/// VZEROUPPER, and with `ALL` VZEROALL
pub extern "sysv64" fn zero<const ALL: bool>(cpu: &mut Cpu, _op: &Op) -> Flow {
    if let Err(fault) = begin::<true>(cpu) {
        return flow(Err(fault));
    }
    let count = cpu.xmm_count();
    for register in &mut cpu.vector.ymm[..count] {
        if ALL {
            *register = Ymm::default();
        } else {
            register.0[2] = 0;
            register.0[3] = 0;
        }
    }
    Flow::Next
}
