//! MOV and its kin: MOVZX MOVSX MOVSXD MOVBE BSWAP XCHG CMOVcc SETcc LEA XLAT, and the sign extensions of the accumulator.

use crate::access::GuestInt;
use crate::cpu::{Cpu, RAX, RBX, RDX};
use crate::fault::Fault;
use crate::op::{Flow, Op, address};
use crate::ops::operand::{Place, Source, Width, flow};
use crate::page_walk::Access;

/// MOV to a register.
pub extern "sysv64" fn to_register<T: Width, S: Source>(cpu: &mut Cpu, op: &Op) -> Flow {
    let Ok(value) = S::read::<T>(cpu, op) else { return Flow::Fault };
    T::set_register(cpu, op.first, value);
    Flow::Next
}

/// MOV to memory.
pub extern "sysv64" fn to_memory<T: Width, S: Source>(cpu: &mut Cpu, op: &Op) -> Flow {
    let Ok(value) = S::read::<T>(cpu, op) else { return Flow::Fault };
    flow(cpu.store_operand(op, value))
}

/// MOV between the accumulator and memory at a full offset, which is the immediate. `op.extra` is not zero for a store.
pub extern "sysv64" fn at_offset<T: Width>(cpu: &mut Cpu, op: &Op) -> Flow {
    flow(access_at_offset::<T>(cpu, op))
}

fn access_at_offset<T: Width>(cpu: &mut Cpu, op: &Op) -> Result<(), Fault> {
    if op.extra != 0 {
        let linear = cpu.linear_at(op.segment, op.immediate, T::BYTES, Access::Write)?;
        cpu.store(linear, T::from_u64(cpu.gpr[RAX]), op.segment)
    } else {
        let linear = cpu.linear_at(op.segment, op.immediate, T::BYTES, Access::Read)?;
        let value: T = cpu.load(linear, op.segment)?;
        T::set_register(cpu, RAX as u8, value);
        Ok(())
    }
}

/// MOVZX from `N` to `T`.
pub extern "sysv64" fn zero_extend<N: Width, T: Width, S: Source>(cpu: &mut Cpu, op: &Op) -> Flow {
    let Ok(value) = S::read::<N>(cpu, op) else { return Flow::Fault };
    T::set_register(cpu, op.first, T::from_u64(value.to_u64()));
    Flow::Next
}

/// MOVSX and MOVSXD from `N` to `T`.
pub extern "sysv64" fn sign_extend<N: Width, T: Width, S: Source>(cpu: &mut Cpu, op: &Op) -> Flow {
    let Ok(value) = S::read::<N>(cpu, op) else { return Flow::Fault };
    T::set_register(cpu, op.first, T::from_u64(value.to_i64() as u64));
    Flow::Next
}

fn swap_bytes<T: GuestInt>(value: T) -> T {
    T::from_u64(value.to_u64().swap_bytes() >> (64 - 8 * T::BYTES))
}

/// BSWAP. With 16 bits (undefined) the result is zero, as on Intel's processors.
pub extern "sysv64" fn byte_swap<T: Width>(cpu: &mut Cpu, op: &Op) -> Flow {
    let value = if T::BYTES == 2 { T::default() } else { swap_bytes(T::register(cpu, op.first)) };
    T::set_register(cpu, op.first, value);
    Flow::Next
}

/// MOVBE to a register.
pub extern "sysv64" fn load_swapped<T: Width>(cpu: &mut Cpu, op: &Op) -> Flow {
    let Ok(value) = cpu.load_operand::<T>(op) else { return Flow::Fault };
    T::set_register(cpu, op.first, swap_bytes(value));
    Flow::Next
}

/// MOVBE to memory.
pub extern "sysv64" fn store_swapped<T: Width>(cpu: &mut Cpu, op: &Op) -> Flow {
    flow(cpu.store_operand(op, swap_bytes(T::register(cpu, op.second))))
}

/// XCHG of two registers.
pub extern "sysv64" fn exchange<T: Width>(cpu: &mut Cpu, op: &Op) -> Flow {
    let (first, second) = (T::register(cpu, op.first), T::register(cpu, op.second));
    T::set_register(cpu, op.first, second);
    T::set_register(cpu, op.second, first);
    Flow::Next
}

/// CMOVcc. The source is read in any case, and a 32-bit target's upper half is cleared.
pub extern "sysv64" fn move_if<const CONDITION: u8, T: Width, S: Source>(cpu: &mut Cpu, op: &Op) -> Flow {
    let Ok(value) = S::read::<T>(cpu, op) else { return Flow::Fault };
    let value = if cpu.arithmetic.condition(CONDITION) { value } else { T::register(cpu, op.first) };
    T::set_register(cpu, op.first, value);
    Flow::Next
}

/// SETcc
pub extern "sysv64" fn set_if<const CONDITION: u8, D: Place>(cpu: &mut Cpu, op: &Op) -> Flow {
    let value = u8::from(cpu.arithmetic.condition(CONDITION));
    flow(D::write(cpu, op, value))
}

/// LEA
pub extern "sysv64" fn load_address<T: Width>(cpu: &mut Cpu, op: &Op) -> Flow {
    T::set_register(cpu, op.first, T::from_u64(cpu.offset(op)));
    Flow::Next
}

/// LEA of 64 bits where the offset is base, index and displacement.
pub extern "sysv64" fn load_address_flat(cpu: &mut Cpu, op: &Op) -> Flow {
    debug_assert!(matches!(op.address_kind, address::FLAT | address::BASED));
    let base = cpu.gpr[usize::from(op.base) & 31];
    let index = cpu.gpr[usize::from(op.index) & 31] << (op.scale & 3);
    cpu.gpr[usize::from(op.first) & 31] = base.wrapping_add(index).wrapping_add(op.displacement as i64 as u64);
    Flow::Next
}

/// XLAT: AL becomes the byte at (E/R)BX + AL. The op's memory operand is \[RBX\] in the address size.
pub extern "sysv64" fn translate_byte(cpu: &mut Cpu, op: &Op) -> Flow {
    let offset = cpu.gpr[RBX].wrapping_add(cpu.gpr[RAX] & 0xff);
    let offset = cut_offset(op, offset);
    let value =
        cpu.linear_at(op.segment, offset, 1, Access::Read).and_then(|linear| cpu.load::<u8>(linear, op.segment));
    match value {
        Ok(value) => {
            cpu.set_byte(0, value);
            Flow::Next
        }
        Err(_) => Flow::Fault,
    }
}

/// An offset cut to the op's address size.
#[inline(always)]
pub fn cut_offset(op: &Op, offset: u64) -> u64 {
    match op.address_kind {
        address::FLAT | address::BASED | address::NEXT_RIP => offset,
        address::CHECKED_16 => offset & 0xffff,
        _ => offset & 0xffff_ffff,
    }
}

/// CBW, CWDE, CDQE: the accumulator's lower half, sign-extended.
pub extern "sysv64" fn extend_accumulator<N: Width, T: Width>(cpu: &mut Cpu, _op: &Op) -> Flow {
    let value = N::from_u64(cpu.gpr[RAX]).to_i64();
    T::set_register(cpu, RAX as u8, T::from_u64(value as u64));
    Flow::Next
}

/// CWD, CDQ, CQO: the accumulator's sign all over RDX.
pub extern "sysv64" fn extend_to_data<T: Width>(cpu: &mut Cpu, _op: &Op) -> Flow {
    let sign = T::from_u64(cpu.gpr[RAX]).to_i64() >> 63;
    T::set_register(cpu, RDX as u8, T::from_u64(sign as u64));
    Flow::Next
}
