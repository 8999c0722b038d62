//! Handlers that run stubs.
//!
//! The op's `immediate` is the stub's address, its slots hold register numbers, and with a memory operand `extra2` is
//! the operand's size. What comes first is what can fault without the instruction: the class switched off, the
//! segment, alignment, the page. Then the host executes the instruction.

use std::mem::transmute;

use super::stub::{DONE, SIMD_EXCEPTION, StubFunction, UNDEFINED};
use super::{Pointers, class};
use crate::cpu::{CS, Cpu, cr0};
use crate::fault::Fault;
use crate::op::{Flow, Op};
use crate::page_walk::Access;

/// Memory operands that are not in one page of RAM are copied here.
#[repr(align(64))]
struct Bounce([u8; 64]);

/// Calls the op's stub.
#[inline(always)]
fn call(cpu: &mut Cpu, memory: *mut u8, op: &Op) -> u32 {
    // SAFETY: lowering put the address of a stub here, made for exactly this form of op; the code area is never unmapped. `memory`
    // is valid for the operand's size.
    unsafe {
        let stub: StubFunction = transmute(op.immediate);
        stub(cpu, memory, op)
    }
}

/// Calls the op's stub; raises what the instruction raised.
#[inline(always)]
fn execute(cpu: &mut Cpu, memory: *mut u8, op: &Op) -> Flow {
    match call(cpu, memory, op) {
        DONE => Flow::Next,
        code => exception(cpu, memory, op, code),
    }
}

#[cold]
fn exception(cpu: &mut Cpu, memory: *mut u8, op: &Op, code: u32) -> Flow {
    if code == SIMD_EXCEPTION {
        let _ = cpu.raise_simd();
        return Flow::Fault;
    }
    if code == UNDEFINED {
        let _ = cpu.raise_ud();
        return Flow::Fault;
    }
    if cpu.cr0 & cr0::NE != 0 {
        let _ = cpu.raise_x87();
        return Flow::Fault;
    }
    // Without CR0.NE the error goes to a pin that this machine does not have; the instruction runs as if IGNNE# were asserted.
    let pending = cpu.vector.set_pending_aside();
    let again = call(cpu, memory, op);
    cpu.vector.put_pending_back(pending);
    match again {
        DONE => Flow::Next,
        SIMD_EXCEPTION => {
            let _ = cpu.raise_simd();
            Flow::Fault
        }
        _ => {
            let _ = cpu.raise_ud();
            Flow::Fault
        }
    }
}

/// What comes before an instruction of these classes; `false`: it may not run.
#[inline(always)]
fn begin<const CLASS: u8>(cpu: &mut Cpu) -> bool {
    if cpu.vector.enabled & CLASS != CLASS {
        let _ = cpu.raise_disabled(CLASS);
        return false;
    }
    if CLASS & (class::X87 | class::MMX) != 0 {
        cpu.vector.make_x87_live();
    }
    true
}

/// Remembers where an x87 instruction and its operand were. Its opcode is in the op's slots.
#[inline(always)]
fn remember(cpu: &mut Cpu, op: &Op, data: u64) {
    cpu.vector.pointers = Pointers {
        opcode: u16::from_le_bytes([op.first, op.second]),
        code_selector: cpu.segments[CS as usize].selector,
        data_selector: if data == NO_DATA { 0 } else { cpu.segments[usize::from(op.segment) % 6].selector },
        instruction: cpu.cut_rip(op.rip(cpu)),
        data: if data == NO_DATA { 0 } else { data },
    };
}

const NO_DATA: u64 = u64::MAX;

/// An instruction without a memory operand.
pub extern "sysv64" fn register<const CLASS: u8>(cpu: &mut Cpu, op: &Op) -> Flow {
    if !begin::<CLASS>(cpu) {
        return Flow::Fault;
    }
    execute(cpu, std::ptr::null_mut(), op)
}

/// An x87 instruction without a memory operand that leaves its address in the environment.
pub extern "sysv64" fn x87_register(cpu: &mut Cpu, op: &Op) -> Flow {
    if !begin::<{ class::X87 }>(cpu) {
        return Flow::Fault;
    }
    let flow = execute(cpu, std::ptr::null_mut(), op);
    if flow == Flow::Next {
        remember(cpu, op, NO_DATA);
    }
    flow
}

/// An instruction that reads its memory operand; with `ALIGNED` that must be aligned to its size.
pub extern "sysv64" fn read<const CLASS: u8, const ALIGNED: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    if !begin::<CLASS>(cpu) {
        return Flow::Fault;
    }
    let flow = read_operand::<ALIGNED>(cpu, op);
    if CLASS & (class::X87 | class::MMX) != 0 && flow == Flow::Fault {
        pending_first(cpu);
    }
    flow
}

/// An x87 exception that is already pending comes before what the operand raises.
#[cold]
fn pending_first(cpu: &mut Cpu) {
    if cpu.cr0 & cr0::NE != 0 && cpu.vector.x87_pending() {
        let _ = cpu.raise_x87();
    }
}

#[inline(always)]
fn read_operand<const ALIGNED: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    let bytes = u64::from(op.extra2);
    let Ok(linear) = operand_address::<ALIGNED>(cpu, op, bytes, Access::Read) else { return Flow::Fault };
    match cpu.read_pointer(linear, bytes, op.segment) {
        Ok(Some(pointer)) => execute(cpu, pointer.cast_mut(), op),
        Ok(None) => read_bounced(cpu, op, linear),
        Err(_) => Flow::Fault,
    }
}

/// The linear address of the op's operand; with `ALIGNED` it must be aligned to its size, which counts before the segment's limit does.
#[inline(always)]
pub(super) fn operand_address<const ALIGNED: bool>(
    cpu: &mut Cpu,
    op: &Op,
    bytes: u64,
    access: Access,
) -> Result<u64, Fault> {
    match cpu.linear(op, bytes, access) {
        Ok(linear) if ALIGNED && linear & (bytes - 1) != 0 => Err(cpu.raise_gp(0)),
        Err(fault) if ALIGNED => Err(misaligned_first(cpu, op, bytes, fault)),
        result => result,
    }
}

#[cold]
fn misaligned_first(cpu: &mut Cpu, op: &Op, bytes: u64, fault: Fault) -> Fault {
    let linear = cpu.segments[usize::from(op.segment) % 6].base.wrapping_add(cpu.offset(op));
    if linear & (bytes - 1) != 0 { cpu.raise_gp(0) } else { fault }
}

#[cold]
fn read_bounced(cpu: &mut Cpu, op: &Op, linear: u64) -> Flow {
    let mut bounce = Bounce([0; 64]);
    let bytes = usize::from(op.extra2).min(64);
    // Registers of devices are read as a whole where the bus knows the size.
    let loaded = match bytes {
        4 => cpu.load::<u32>(linear, op.segment).map(|value| bounce.0[..4].copy_from_slice(&value.to_le_bytes())),
        8 => cpu.load::<u64>(linear, op.segment).map(|value| bounce.0[..8].copy_from_slice(&value.to_le_bytes())),
        _ => cpu.load_bytes(linear, &mut bounce.0[..bytes], op.segment),
    };
    if loaded.is_err() {
        return Flow::Fault;
    }
    execute(cpu, bounce.0.as_mut_ptr(), op)
}

/// An x87 instruction that reads its memory operand and leaves addresses in the environment.
pub extern "sysv64" fn x87_read(cpu: &mut Cpu, op: &Op) -> Flow {
    let flow = read::<{ class::X87 }, false>(cpu, op);
    if flow == Flow::Next {
        let data = cpu.offset(op);
        remember(cpu, op, data);
    }
    flow
}

/// An instruction that writes its memory operand.
pub extern "sysv64" fn write<const CLASS: u8, const ALIGNED: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    if !begin::<CLASS>(cpu) {
        return Flow::Fault;
    }
    let flow = write_operand::<CLASS, ALIGNED>(cpu, op);
    // Of the x87 class only FNSTCW and FNSTSW come here, which do not wait.
    if CLASS & class::MMX != 0 && flow == Flow::Fault {
        pending_first(cpu);
    }
    flow
}

#[inline(always)]
fn write_operand<const CLASS: u8, const ALIGNED: bool>(cpu: &mut Cpu, op: &Op) -> Flow {
    let bytes = u64::from(op.extra2);
    let Ok(linear) = operand_address::<ALIGNED>(cpu, op, bytes, Access::Write) else { return Flow::Fault };
    match cpu.write_pointer(linear, bytes, op.segment) {
        Ok(Some(pointer)) => {
            let flow = execute(cpu, pointer, op);
            if flow == Flow::Next {
                cpu.written(linear, pointer, bytes);
            }
            flow
        }
        Ok(None) => write_bounced::<CLASS>(cpu, op, linear),
        Err(_) => Flow::Fault,
    }
}

#[cold]
fn write_bounced<const CLASS: u8>(cpu: &mut Cpu, op: &Op, linear: u64) -> Flow {
    let mut bounce = Bounce([0; 64]);
    let bytes = usize::from(op.extra2).min(64);
    let target = &mut bounce.0[..bytes];
    if CLASS & class::X87 != 0 && cpu.load_bytes(linear, target, op.segment).is_err() {
        // (An x87 store with an unmasked exception completes without storing: what is written back is then what was there.)
        return Flow::Fault;
    }
    let flow = execute(cpu, target.as_mut_ptr(), op);
    if flow == Flow::Next && cpu.store_bytes(linear, target, op.segment).is_err() {
        return Flow::Fault;
    }
    flow
}

/// An x87 instruction that writes its memory operand and leaves addresses in the environment.
pub extern "sysv64" fn x87_write(cpu: &mut Cpu, op: &Op) -> Flow {
    let flow = write::<{ class::X87 }, false>(cpu, op);
    if flow == Flow::Next {
        let data = cpu.offset(op);
        remember(cpu, op, data);
    } else if cpu.vector.enabled & class::X87 != 0 {
        pending_first(cpu);
    }
    flow
}
