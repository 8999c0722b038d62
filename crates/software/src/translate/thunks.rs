//! The ways into and out of translated code, generated once for each code cache.

use std::mem::offset_of;

use super::assembler::{
    Assembler, Binary, Label, Mem, R10, R11, R15, RAX, RBP, RBX, RCX, RDI, RSI, RSP, Reg, condition,
};
use super::frame::{
    ARITHMETIC, CALLOUT_OP, EXIT, HOST_STACK, MISS_ADDRESS, RETURN_ADDRESS, TARGET, TEMPORARY, VECTORS_MISSING,
    VECTORS_WERE_MISSING, cpu_field, exit, register_slot,
};
use super::registers::HOMES;
use crate::cpu::Cpu;
use crate::op::Op;
use crate::vector::VectorState;

/// Called by thunks. Returns 0 to go on where translated code called, else it leaves with the exit that the function stored.
pub type Miss = unsafe extern "sysv64" fn(cpu: *mut Cpu) -> u32;
pub type Callout = unsafe extern "sysv64" fn(cpu: *mut Cpu, op: *const Op) -> u32;
/// Enters translated code at `host`.
pub type Enter = unsafe extern "sysv64" fn(cpu: *mut Cpu, host: u64);

/// The Rust functions that translated code calls.
#[derive(Clone, Copy)]
pub struct Functions {
    /// A look-up missed.
    pub miss: Miss,
    /// A store went to a page that somebody watches.
    pub noted: Miss,
    /// An instruction that has no translation.
    pub callout: Callout,
    /// The x87 registers are wanted in the host's.
    pub load_x87: Miss,
}

/// Places of the thunks in the code cache, as distances from its start.
#[derive(Debug, Clone, Copy, Default)]
pub struct Thunks {
    pub enter: usize,
    pub exit: usize,
    pub miss: usize,
    pub noted: usize,
    pub callout: usize,
    pub load_vectors: usize,
    pub load_x87: usize,
    /// Where the signal handler goes on after an exception in translated code.
    pub landing: usize,
}

const YMM: usize = offset_of!(Cpu, vector) + offset_of!(VectorState, ymm);

fn ymm_slot(register: u8) -> Mem {
    cpu_field(YMM + 32 * usize::from(register))
}

/// Adds to the displacement: RSP is lower by a return address.
fn above(mem: Mem, bytes: i32) -> Mem {
    Mem { displacement: mem.displacement + bytes, ..mem }
}

/// Writes all thunks at the start of a code cache.
pub fn generate(asm: &mut Assembler, functions: Functions, avx: bool) -> Thunks {
    let leave = asm.label();
    let mut thunks = Thunks { enter: asm.position(), ..Thunks::default() };
    enter(asm);
    thunks.exit = asm.position();
    exit(asm, leave, avx);
    thunks.miss = asm.position();
    call_out(asm, functions.miss as *const () as u64, leave, avx);
    thunks.noted = asm.position();
    call_out(asm, functions.noted as *const () as u64, leave, avx);
    thunks.callout = asm.position();
    call_out(asm, functions.callout as *const () as u64, leave, avx);
    thunks.load_x87 = asm.position();
    call_out(asm, functions.load_x87 as *const () as u64, leave, avx);
    thunks.load_vectors = asm.position();
    load_vectors(asm, avx);
    thunks.landing = asm.position();
    asm.store(MISS_ADDRESS, RCX);
    asm.store32_imm(EXIT, exit::HOST_FAULT);
    exit(asm, leave, avx);
    thunks
}

fn enter(asm: &mut Assembler) {
    for register in [RBX, RBP, Reg(12), Reg(13), Reg(14), R15] {
        asm.push(register);
    }
    asm.store(Mem { base: Some(RDI), ..HOST_STACK }, RSP);
    asm.mov(RSP, RDI);
    asm.store(TARGET, RSI);
    load_registers(asm);
    asm.jump_mem(TARGET);
}

/// Loads flags and registers.
fn load_registers(asm: &mut Assembler) {
    asm.load_u16(RAX, ARITHMETIC);
    asm.flags_from_ax();
    for (guest, host) in HOMES {
        asm.load(host, register_slot(guest));
    }
}

/// Stores registers and flags; RAX and RCX are free afterwards.
fn save_registers(asm: &mut Assembler) {
    for (guest, host) in HOMES {
        asm.store(register_slot(guest), host);
    }
    asm.flags_to_ax();
    asm.store16(ARITHMETIC, RAX);
}

fn exit(asm: &mut Assembler, leave: Label, avx: bool) {
    save_registers(asm);
    save_vectors(asm, avx);
    if asm.is_bound(leave) {
        asm.jump(leave);
        return;
    }
    asm.bind(leave);
    asm.load(RSP, HOST_STACK);
    for register in [R15, Reg(14), Reg(13), Reg(12), RBP, RBX] {
        asm.pop(register);
    }
    asm.ret();
}

/// Puts the guest's vector registers back, if they are loaded; notes in `vectors_were_missing` whether they were.
fn save_vectors(asm: &mut Assembler, avx: bool) {
    let skip = asm.label();
    asm.load(RCX, VECTORS_MISSING);
    asm.store(VECTORS_WERE_MISSING, RCX);
    asm.binary_imm(Binary::Cmp, RCX, 0);
    asm.jump_if(condition::NOT_EQUAL, skip);
    for register in 0..16 {
        if avx {
            asm.store_ymm(ymm_slot(register), register);
        } else {
            asm.store_xmm(ymm_slot(register), register);
        }
    }
    asm.store_mxcsr(cpu_field(offset_of!(Cpu, vector) + VectorState::MXCSR_OFFSET));
    asm.load_mxcsr(cpu_field(offset_of!(Cpu, vector) + VectorState::HOST_MXCSR_OFFSET));
    asm.store_imm(VECTORS_MISSING, 1);
    asm.bind(skip);
}

/// A call into Rust and back. The caller's return address is on the stack.
fn call_out(asm: &mut Assembler, function: u64, leave: Label, avx: bool) {
    asm.pop(R11);
    asm.store(RETURN_ADDRESS, R11);
    asm.store(MISS_ADDRESS, R10);
    save_registers(asm);
    save_vectors(asm, avx);
    asm.mov(RDI, RSP);
    asm.load(RSI, CALLOUT_OP);
    asm.constant(RAX, function);
    asm.call_reg(RAX);
    // TEST EAX, EAX
    asm.raw(&[0x85, 0xc0]);
    asm.jump_if(condition::NOT_EQUAL, leave);
    let skip = asm.label();
    asm.binary_mem_imm(Binary::Cmp, VECTORS_WERE_MISSING, 0);
    asm.jump_if(condition::NOT_EQUAL, skip);
    load_mxcsr(asm, 0);
    load_vector_registers(asm, avx, 0);
    asm.store_imm(VECTORS_MISSING, 0);
    asm.bind(skip);
    load_registers(asm);
    asm.load(R10, MISS_ADDRESS);
    asm.jump_mem(RETURN_ADDRESS);
}

fn load_vector_registers(asm: &mut Assembler, avx: bool, bias: i32) {
    for register in 0..16 {
        let slot = above(ymm_slot(register), bias);
        if avx {
            asm.load_ymm(register, slot);
        } else {
            asm.load_xmm(register, slot);
        }
    }
}

/// Loads the guest's MXCSR. Uses RAX, RCX and flags.
fn load_mxcsr(asm: &mut Assembler, bias: i32) {
    let vector = |offset| above(cpu_field(offset_of!(Cpu, vector) + offset), bias);
    let temporary = above(TEMPORARY, bias + 16);
    // While the guest shares the host's control bits, its sticky flags may still be in the host's register.
    let private = asm.label();
    asm.binary32_mem_imm(Binary::Cmp, vector(VectorState::MXCSR_SHARED_OFFSET), 0);
    asm.jump_if(condition::EQUAL, private);
    asm.store_mxcsr(temporary);
    asm.load32(RCX, temporary);
    asm.binary32_imm(Binary::And, RCX, 0x3f);
    asm.load32(RAX, vector(VectorState::MXCSR_OFFSET));
    asm.binary(Binary::Or, RCX, RAX);
    asm.store32(vector(VectorState::MXCSR_OFFSET), RCX);
    asm.bind(private);
    asm.load_mxcsr(vector(VectorState::MXCSR_OFFSET));
}

/// Loads the vector registers; called by code that is about to use them, with flags live. Uses RCX.
fn load_vectors(asm: &mut Assembler, avx: bool) {
    let temporary = |index: i32| above(TEMPORARY, 8 + 8 * index);
    asm.store(temporary(0), RAX);
    asm.flags_to_ax();
    asm.store(temporary(1), RAX);
    load_mxcsr(asm, 8);
    load_vector_registers(asm, avx, 8);
    asm.store_imm(above(VECTORS_MISSING, 8), 0);
    asm.load_u16(RAX, temporary(1));
    asm.flags_from_ax();
    asm.load(RAX, temporary(0));
    asm.ret();
}
