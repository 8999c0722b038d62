//! The ways into and out of translated code, generated once for each code cache.

use std::mem::offset_of;

use super::arena::{DATA, FAR, FarJump, HOSTS, KEYS, SECOND, verified_at};
use super::assembler::{Assembler, Binary, Label, Mem, R15, RAX, RBP, RBX, RCX, RDI, RSI, RSP, Reg, condition};
use super::bindings::NO_BINDING;
use super::frame::{
    ARGUMENT, ARITHMETIC, CALLOUT_OP, COUNTDOWN, EXIT, FAR_MASK, HOST_STACK, JOURNAL, JUMP_MASK, JUMP_TABLE,
    KEPT_ADDEND, KEPT_FLAGS, KEPT_RAX, MISS_ADDRESS, RETURN_ADDRESS, RIP, SPACE, TARGET, VECTORS_MISSING,
    VECTORS_WERE_MISSING, cpu_field, exit, register_slot, temporary,
};
use super::generate::Use;
use super::memory::ENTRY_SHIFT;
use super::registers::{ADDEND, ADDRESS, HOMES, SPARE};
use crate::counters::Counters;
use crate::cpu::{Cpu, Mode};
use crate::op::Op;
use crate::second_level::{HASH_FACTOR, HASH_SHIFT, USER_ENTRIES};
use crate::tlb::{DATA_ENTRIES, DataEntry, Tlb, USER};
use crate::vector::VectorState;

/// What a function that translated code calls returns: go on where it was called.
pub const GO_ON: u64 = 0;
/// Leave translated code, with the exit that the function stored. Every other value is the address of translated code to go on with.
pub const LEAVE: u64 = 1;

/// Called by thunks.
pub type Call = unsafe extern "sysv64" fn(cpu: *mut Cpu) -> u64;
pub type Callout = unsafe extern "sysv64" fn(cpu: *mut Cpu, op: *const Op) -> u64;
/// Enters translated code at `host`.
pub type Enter = unsafe extern "sysv64" fn(cpu: *mut Cpu, host: u64);

/// The Rust functions that translated code calls.
#[derive(Clone, Copy)]
pub struct Functions {
    /// A look-up for reading missed.
    pub miss_read: Call,
    /// A look-up for writing missed.
    pub miss_write: Call,
    /// A store went to a page that somebody watches.
    pub noted: Call,
    /// An instruction that has no translation.
    pub callout: Callout,
    /// The x87 registers are wanted in the host's.
    pub load_x87: Call,
    /// An indirect jump is not in the jump table.
    pub jump: Call,
    /// A link leads nowhere yet, or not to where the address space in use has its target.
    pub link: Call,
    /// The interpreter runs the instruction.
    pub interpret: Call,
    /// Somebody wants attention before the instruction.
    pub attend: Call,
}

/// Places of the thunks in the code cache, as distances from its start.
#[derive(Debug, Clone, Copy, Default)]
pub struct Thunks {
    pub enter: usize,
    pub exit: usize,
    pub miss_read: usize,
    pub miss_write: usize,
    pub noted: usize,
    pub callout: usize,
    pub load_vectors: usize,
    pub load_x87: usize,
    /// Called after an indirect jump that missed: RIP is stored, ADDRESS has it too.
    pub jump: usize,
    /// The same after a return that was not expected; RIP is not stored.
    pub return_missed: usize,
    /// Jumped to by a return to the address that empty entries have.
    pub no_return: usize,
    /// As `jump`, where the data table is no longer the one that code was entered with.
    pub jump_anew: usize,
    pub interpret: usize,
    pub attend: usize,
    /// Jumped to by a link that leads nowhere yet.
    pub link: usize,
    /// As `link`, for one out of the page: looks into the jump table first, for the address in ADDRESS.
    pub far_link: usize,
    /// Where the signal handler goes on after an exception in translated code.
    pub landing: usize,
}

const COUNTERS: usize = offset_of!(Cpu, counters);
const YMM: usize = offset_of!(Cpu, vector) + offset_of!(VectorState, ymm);

fn ymm_slot(register: u8) -> Mem {
    cpu_field(YMM + 32 * usize::from(register))
}

/// Adds to the displacement: RSP is lower by a return address.
fn above(mem: Mem, bytes: i32) -> Mem {
    Mem { displacement: mem.displacement + bytes, ..mem }
}

/// Writes all thunks at the start of a code cache.
pub fn generate(asm: &mut Assembler, functions: Functions) -> Thunks {
    let common = Common { leave: asm.label(), elsewhere: asm.label() };
    let exit = asm.label();
    let mut thunks = Thunks { enter: asm.position(), ..Thunks::default() };
    enter(asm);
    asm.bind(common.elsewhere);
    asm.store(TARGET, RAX);
    load_registers(asm);
    asm.jump_mem(TARGET);
    thunks.exit = asm.position();
    asm.bind(exit);
    save_registers(asm);
    save_vectors(asm);
    asm.bind(common.leave);
    leave(asm);
    thunks.miss_read = asm.position();
    look_further(asm, Use::Read);
    call_out(asm, functions.miss_read as *const () as u64, &common);
    thunks.miss_write = asm.position();
    look_further(asm, Use::Write);
    call_out(asm, functions.miss_write as *const () as u64, &common);
    thunks.noted = asm.position();
    call_out(asm, functions.noted as *const () as u64, &common);
    thunks.callout = asm.position();
    call_out(asm, functions.callout as *const () as u64, &common);
    thunks.load_x87 = asm.position();
    call_out(asm, functions.load_x87 as *const () as u64, &common);
    let for_good = [
        (&mut thunks.jump_anew, functions.jump),
        (&mut thunks.interpret, functions.interpret),
        (&mut thunks.attend, functions.attend),
    ];
    for (thunk, function) in for_good {
        *thunk = asm.position();
        asm.pop_mem(RETURN_ADDRESS);
        jump_out(asm, function as *const () as u64, &common);
    }
    thunks.return_missed = asm.position();
    asm.pop_mem(RETURN_ADDRESS);
    asm.store(RIP, ADDRESS);
    let (missing, far) = (asm.label(), asm.label());
    find_jump(asm, far);
    asm.jump_mem(found_jump());
    thunks.no_return = asm.position();
    asm.store(RIP, ADDRESS);
    asm.store32_imm(EXIT, exit::INDIRECT);
    asm.jump(exit);
    thunks.jump = asm.position();
    asm.pop_mem(RETURN_ADDRESS);
    asm.bind(far);
    find_far(asm, missing);
    asm.bind(missing);
    jump_out(asm, functions.jump as *const () as u64, &common);
    let link = asm.label();
    thunks.far_link = asm.position();
    far_link(asm, link);
    thunks.link = asm.position();
    asm.bind(link);
    jump_out(asm, functions.link as *const () as u64, &common);
    thunks.load_vectors = asm.position();
    load_vectors(asm);
    thunks.landing = asm.position();
    asm.store(MISS_ADDRESS, RCX);
    asm.store32_imm(EXIT, exit::HOST_FAULT);
    asm.jump(exit);
    thunks
}

/// Ways out of calls of Rust functions.
struct Common {
    /// Back to the loop around translated code.
    leave: Label,
    /// To the translated code whose address is in RAX.
    elsewhere: Label,
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

/// Back to who entered.
fn leave(asm: &mut Assembler) {
    asm.load(RSP, HOST_STACK);
    for register in [R15, Reg(14), Reg(13), Reg(12), RBP, RBX] {
        asm.pop(register);
    }
    asm.ret();
}

/// Puts the guest's vector registers back, if they are loaded; notes in `vectors_were_missing` whether they were.
fn save_vectors(asm: &mut Assembler) {
    let skip = asm.label();
    asm.load(RCX, VECTORS_MISSING);
    asm.store(VECTORS_WERE_MISSING, RCX);
    asm.binary_imm(Binary::Cmp, RCX, 0);
    asm.jump_if(condition::NOT_EQUAL, skip);
    for register in 0..16 {
        asm.store_ymm(ymm_slot(register), register);
    }
    asm.store_mxcsr(cpu_field(offset_of!(Cpu, vector) + VectorState::MXCSR_OFFSET));
    asm.load_mxcsr(cpu_field(offset_of!(Cpu, vector) + VectorState::HOST_MXCSR_OFFSET));
    asm.store_imm(VECTORS_MISSING, 1);
    asm.bind(skip);
}

/// Calls a Rust function with the guest's registers in the processor. What it returns is in RAX and has been compared with LEAVE.
fn call_rust(asm: &mut Assembler, function: u64) {
    save_registers(asm);
    save_vectors(asm);
    asm.mov(RDI, RSP);
    asm.load(RSI, CALLOUT_OP);
    asm.constant(RAX, function);
    asm.call_reg(RAX);
    asm.binary_imm(Binary::Cmp, RAX, LEAVE as i32);
}

/// A look-up of SPARE bytes at ADDRESS missed: brings the entry back from the second level, if that has it, and returns to try again. For user code
/// only: other tables' entries have to be accounted for. Else goes on behind, with all as it was; ADDEND apart.
fn look_further(asm: &mut Assembler, usage: Use) {
    let missing = asm.label();
    let here = |mem| above(mem, 8);
    let tag = match usage {
        Use::Read => offset_of!(DataEntry, read_tag),
        Use::Write => offset_of!(DataEntry, write_tag),
    };
    let second = |offset: usize| here(Mem::indexed(RSP, ADDEND, 0, (SECOND + offset) as i32));
    let first = |offset: usize| here(Mem::indexed(RSP, RAX, 0, (DATA + offset) as i32));
    asm.store(here(KEPT_RAX), RAX);
    asm.store(here(ARGUMENT), SPARE);
    asm.flags_to_ax();
    asm.store(here(KEPT_FLAGS), RAX);
    asm.compare8_imm(here(cpu_field(offset_of!(Cpu, mode) + offset_of!(Mode, cpl))), 3);
    asm.jump_if(condition::NOT_EQUAL, missing);
    if usage == Use::Write {
        // Lockstep wants to hear of all pages stored to.
        asm.binary_mem_imm(Binary::Cmp, here(JOURNAL), 0);
        asm.jump_if(condition::NOT_EQUAL, missing);
    }
    asm.lea(ADDEND, Mem::indexed(ADDRESS, SPARE, 0, -1));
    asm.mov(SPARE, ADDRESS);
    asm.binary_imm(Binary::And, ADDEND, -4096);
    asm.binary_imm(Binary::And, SPARE, -4096);
    asm.binary(Binary::Cmp, ADDEND, SPARE);
    asm.jump_if(condition::NOT_EQUAL, missing);
    asm.binary_mem(Binary::Or, SPARE, here(cpu_field(offset_of!(Cpu, tlb) + Tlb::generation_offset(USER))));
    asm.shift_right(ADDEND, 12);
    asm.constant(RAX, HASH_FACTOR);
    asm.multiply(ADDEND, RAX);
    asm.shift_right(ADDEND, HASH_SHIFT);
    asm.binary32_imm(Binary::And, ADDEND, USER_ENTRIES as i32 - 1);
    asm.shift_left(ADDEND, ENTRY_SHIFT);
    asm.binary_mem(Binary::Cmp, SPARE, second(tag));
    asm.jump_if(condition::NOT_EQUAL, missing);
    asm.mov(RAX, ADDRESS);
    asm.shift_right(RAX, 12 - ENTRY_SHIFT);
    asm.binary32_imm(Binary::And, RAX, ((DATA_ENTRIES - 1) << ENTRY_SHIFT) as i32);
    for offset in (0..size_of::<DataEntry>()).step_by(8) {
        asm.load(SPARE, second(offset));
        asm.store(first(offset), SPARE);
    }
    asm.binary_mem_imm(Binary::Add, here(cpu_field(COUNTERS + offset_of!(Counters, translated_refills))), 1);
    let restore = |asm: &mut Assembler| {
        asm.load_u16(RAX, here(KEPT_FLAGS));
        asm.flags_from_ax();
        asm.load(RAX, here(KEPT_RAX));
        asm.load(SPARE, here(ARGUMENT));
    };
    restore(asm);
    asm.ret();
    asm.bind(missing);
    restore(asm);
}

/// A call into Rust and back, or elsewhere. The caller's return address is on the stack. Registers and flags stay, SPARE apart.
fn call_out(asm: &mut Assembler, function: u64, common: &Common) {
    asm.pop_mem(RETURN_ADDRESS);
    asm.store(MISS_ADDRESS, ADDRESS);
    asm.store(ARGUMENT, SPARE);
    asm.store(KEPT_ADDEND, ADDEND);
    call_rust(asm, function);
    asm.jump_if(condition::EQUAL, common.leave);
    asm.jump_if(condition::ABOVE, common.elsewhere);
    let skip = asm.label();
    asm.binary_mem_imm(Binary::Cmp, VECTORS_WERE_MISSING, 0);
    asm.jump_if(condition::NOT_EQUAL, skip);
    load_mxcsr(asm, 0);
    load_vector_registers(asm, 0);
    asm.store_imm(VECTORS_MISSING, 0);
    asm.bind(skip);
    load_registers(asm);
    asm.load(ADDRESS, MISS_ADDRESS);
    asm.load(ADDEND, KEPT_ADDEND);
    asm.jump_mem(RETURN_ADDRESS);
}

/// A call into Rust that never comes back to where it was.
fn jump_out(asm: &mut Assembler, function: u64, common: &Common) {
    call_rust(asm, function);
    asm.jump_if(condition::ABOVE, common.elsewhere);
    asm.jump(common.leave);
}

/// Jumps to the code for the guest address in ADDRESS if the jump table knows it, else to `link`; now and then to `link` all the same, so
/// that a link that is used often is aimed at its code. Changes no flag.
fn far_link(asm: &mut Assembler, link: Label) {
    asm.load32(SPARE, COUNTDOWN);
    asm.lea32(SPARE, Mem::base(SPARE, -1));
    asm.store32(COUNTDOWN, SPARE);
    let asks = asm.label();
    asm.jump_if_rcx_zero(asks);
    find_jump(asm, asks);
    asm.jump_mem(found_jump());
    asm.bind(asks);
    asm.jump(link);
}

/// Looks the guest address in ADDRESS up in the jump table; uses SPARE and ADDEND, no flags. Goes to `missing`, or on with ADDEND for [`found_jump`].
pub fn find_jump(asm: &mut Assembler, missing: Label) {
    asm.extract(ADDEND, ADDRESS, JUMP_MASK);
    asm.load32(SPARE, JUMP_TABLE);
    asm.lea(ADDEND, Mem::indexed(ADDEND, SPARE, 0, 0));
    asm.load(SPARE, Mem::indexed(RSP, ADDEND, 3, KEYS));
    asm.not(SPARE);
    asm.lea(SPARE, Mem::indexed(SPARE, ADDRESS, 0, 1));
    asm.jump_unless_rcx_zero(missing);
}

/// Jumps to the code for the guest address in ADDRESS, which RIP has too, if the table for all address spaces knows it, and keeps it in the jump table; else goes to
/// `missing`. Uses the scratch registers, no flags.
fn find_far(asm: &mut Assembler, missing: Label) {
    const FAR_SHIFT: u8 = size_of::<FarJump>().trailing_zeros() as u8 - 3;
    let field = |offset: usize| Mem::indexed(RSP, ADDEND, 3, FAR + offset as i32);
    asm.extract(ADDEND, ADDRESS, FAR_MASK);
    asm.lea(ADDEND, Mem { base: None, index: Some((ADDEND, FAR_SHIFT)), displacement: 0 });
    asm.load(SPARE, field(offset_of!(FarJump, linear)));
    asm.not(SPARE);
    asm.lea(SPARE, Mem::indexed(SPARE, ADDRESS, 0, 1));
    asm.jump_unless_rcx_zero(missing);
    asm.load32(SPARE, field(offset_of!(FarJump, binding)));
    asm.load32(ADDRESS, SPACE);
    asm.lea(SPARE, Mem::indexed(SPARE, ADDRESS, 0, 0));
    asm.load_u8(SPARE, Mem::indexed(RSP, SPARE, 0, verified_at(NO_BINDING)));
    let (verified, calm) = (asm.label(), asm.label());
    asm.jump_unless_rcx_zero(verified);
    asm.jump(missing);
    asm.bind(verified);
    // A request for attention clears the index.
    asm.load32(SPARE, JUMP_TABLE);
    asm.jump_unless_rcx_zero(calm);
    asm.jump(missing);
    asm.bind(calm);
    asm.load(ADDRESS, field(offset_of!(FarJump, host)));
    asm.store(TARGET, ADDRESS);
    asm.load(ADDRESS, RIP);
    asm.extract(ADDEND, ADDRESS, JUMP_MASK);
    asm.lea(ADDEND, Mem::indexed(ADDEND, SPARE, 0, 0));
    asm.store(Mem::indexed(RSP, ADDEND, 3, KEYS), ADDRESS);
    asm.load(SPARE, TARGET);
    asm.store(found_jump(), SPARE);
    asm.jump_mem(TARGET);
}

/// Where the code is that [`find_jump`] has found.
pub fn found_jump() -> Mem {
    Mem::indexed(RSP, ADDEND, 3, HOSTS)
}

/// Loads the vector registers. Upper halves that are all zero are made so by VZEROUPPER and loads that never name them: legacy SSE instructions
/// merge their results into upper halves that the host takes for used, and wait for the register's last value for that (Intel's optimization manual, 3.11.6; AMD's Zen does the same). Uses flags.
fn load_vector_registers(asm: &mut Assembler, bias: i32) {
    let (long, done) = (asm.label(), asm.label());
    let lower = |register| above(ymm_slot(register), bias);
    let upper = |register| above(lower(register), 16);
    asm.load_xmm(0, upper(0));
    for register in 1..16 {
        asm.or_xmm0(upper(register));
    }
    asm.test_xmm0();
    asm.jump_if(condition::NOT_EQUAL, long);
    asm.zero_upper();
    for register in 0..16 {
        asm.load_xmm(register, lower(register));
    }
    asm.jump(done);
    asm.bind(long);
    for register in 0..16 {
        asm.load_ymm(register, lower(register));
    }
    asm.bind(done);
}

/// Loads the guest's MXCSR. Uses RAX, RCX and flags.
fn load_mxcsr(asm: &mut Assembler, bias: i32) {
    let vector = |offset| above(cpu_field(offset_of!(Cpu, vector) + offset), bias);
    let temporary = above(temporary(2), bias);
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
fn load_vectors(asm: &mut Assembler) {
    let temporary = |index| above(temporary(index), 8);
    asm.store(temporary(0), RAX);
    asm.flags_to_ax();
    asm.store(temporary(1), RAX);
    load_mxcsr(asm, 8);
    load_vector_registers(asm, 8);
    asm.store_imm(above(VECTORS_MISSING, 8), 0);
    asm.load_u16(RAX, temporary(1));
    asm.flags_from_ax();
    asm.load(RAX, temporary(0));
    asm.ret();
}
