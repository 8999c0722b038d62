//! Flags, fences, cache hints, random numbers, BOUND, and instructions that do nothing.

use std::arch::asm;

use crate::cpu::{Cpu, RAX};
use crate::fault::{Exception, vector};
use crate::flags::{self, ArithmeticFlags};
use crate::op::{Flow, Op};
use crate::ops::operand::{Width, flow};
use crate::page_walk::Access;

/// NOP, prefetches, ENDBR and hints.
pub extern "sysv64" fn nothing(_cpu: &mut Cpu, _op: &Op) -> Flow {
    Flow::Next
}

/// PAUSEs after which the thread yields: a machine may have more vCPUs than the host has free processors, and the one that holds
/// the lock must get to run.
const PAUSES_BETWEEN_YIELDS: u32 = 128;

/// PAUSE: the host's too, for whoever shares its core.
pub extern "sysv64" fn pause(cpu: &mut Cpu, _op: &Op) -> Flow {
    std::hint::spin_loop();
    cpu.pauses = cpu.pauses.wrapping_add(1);
    if cpu.pauses.is_multiple_of(PAUSES_BETWEEN_YIELDS) {
        std::thread::yield_now();
    }
    Flow::Next
}

/// MFENCE, and the flushes of cache lines' ordering.
pub extern "sysv64" fn full_fence(_cpu: &mut Cpu, _op: &Op) -> Flow {
    // SAFETY: a fence.
    unsafe { asm!("mfence", options(nostack, preserves_flags)) };
    Flow::Next
}

/// LFENCE
pub extern "sysv64" fn load_fence(_cpu: &mut Cpu, _op: &Op) -> Flow {
    // SAFETY: a fence.
    unsafe { asm!("lfence", options(nostack, preserves_flags)) };
    Flow::Next
}

/// SFENCE
pub extern "sysv64" fn store_fence(_cpu: &mut Cpu, _op: &Op) -> Flow {
    // SAFETY: a fence.
    unsafe { asm!("sfence", options(nostack, preserves_flags)) };
    Flow::Next
}

/// CLFLUSH, CLFLUSHOPT, CLWB: checked as a load; the host's caches are coherent.
pub extern "sysv64" fn flush_line(cpu: &mut Cpu, op: &Op) -> Flow {
    let result = cpu.linear(op, 1, Access::Read).and_then(|linear| cpu.probe(linear, 1, Access::Read, op.segment));
    flow(result)
}

/// CLC (`op.extra` 0), STC (1), CMC (2).
pub extern "sysv64" fn change_carry(cpu: &mut Cpu, op: &Op) -> Flow {
    let carry = match op.extra {
        0 => false,
        1 => true,
        _ => !cpu.arithmetic.carry(),
    };
    cpu.set_carry(carry);
    Flow::Next
}

/// CLD
pub extern "sysv64" fn clear_direction(cpu: &mut Cpu, _op: &Op) -> Flow {
    cpu.system_flags &= !flags::DF;
    Flow::Next
}

/// STD
pub extern "sysv64" fn set_direction(cpu: &mut Cpu, _op: &Op) -> Flow {
    cpu.system_flags |= flags::DF;
    Flow::Next
}

/// LAHF
pub extern "sysv64" fn load_flags(cpu: &mut Cpu, _op: &Op) -> Flow {
    cpu.set_byte(1, (cpu.arithmetic.to_rflags() | 2) as u8);
    Flow::Next
}

/// SAHF
pub extern "sysv64" fn store_flags(cpu: &mut Cpu, _op: &Op) -> Flow {
    let overflow = cpu.arithmetic.to_rflags() & flags::OF;
    cpu.arithmetic = ArithmeticFlags::from_rflags(u64::from(cpu.byte(1)) | overflow);
    Flow::Next
}

/// SALC (undocumented): AL is CF's all-ones.
pub extern "sysv64" fn set_al_on_carry(cpu: &mut Cpu, _op: &Op) -> Flow {
    let value = if cpu.arithmetic.carry() { 0xff } else { 0 };
    cpu.set_byte(RAX as u8, value);
    Flow::Next
}

/// RDRAND and RDSEED from the host; `op.extra` is not zero for RDSEED.
pub extern "sysv64" fn random<T: Width>(cpu: &mut Cpu, op: &Op) -> Flow {
    let (value, good): (u64, u8);
    // SAFETY: the CPU model has these only where the host has.
    unsafe {
        if op.extra == 0 {
            asm!("rdrand {v}", "setc {g}", v = out(reg) value, g = out(reg_byte) good, options(nomem, nostack));
        } else {
            asm!("rdseed {v}", "setc {g}", v = out(reg) value, g = out(reg_byte) good, options(nomem, nostack));
        }
    }
    T::set_register(cpu, op.first, T::from_u64(if good != 0 { value } else { 0 }));
    cpu.arithmetic = ArithmeticFlags::from_rflags(u64::from(good));
    Flow::Next
}

/// RDPID
pub extern "sysv64" fn read_processor_id(cpu: &mut Cpu, op: &Op) -> Flow {
    cpu.gpr[usize::from(op.first) & 31] = u64::from(cpu.tsc_aux);
    Flow::Next
}

/// BOUND
pub extern "sysv64" fn bound<T: Width>(cpu: &mut Cpu, op: &Op) -> Flow {
    let index = T::register(cpu, op.first).to_i64();
    let bounds = cpu.linear(op, 2 * T::BYTES, Access::Read).and_then(|linear| {
        let lower: T = cpu.load(linear, op.segment)?;
        let upper: T = cpu.load(linear.wrapping_add(T::BYTES), op.segment)?;
        Ok((lower.to_i64(), upper.to_i64()))
    });
    match bounds {
        Ok((lower, upper)) if lower <= index && index <= upper => Flow::Next,
        Ok(_) => {
            let _ = cpu.raise(Exception { vector: vector::BOUND, error_code: None, detail: 0 });
            Flow::Fault
        }
        Err(_) => Flow::Fault,
    }
}
