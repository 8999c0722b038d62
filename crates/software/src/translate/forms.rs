//! Which instructions can be emitted as themselves, and with what care.

use iced_x86::{Code, EncodingKind, Instruction, Mnemonic, OpKind, Register};

use super::assembler::{Mem, Reg};
use super::guest_code::{branch_target, general_register};
use super::registers::home;
use super::x87::uses_mmx;
use crate::lower::{has_offset_operand, is_immediate, vector_classes};
use crate::vector::class;

/// Whether an instruction is emitted as itself, if its registers and its memory operand allow that.
pub fn has_same_form(instruction: &Instruction) -> bool {
    let is_data = instruction.encoding() != EncodingKind::Legacy
        || uses_vectors(instruction)
        || uses_mmx(instruction)
        || is_known_integer(instruction);
    is_plain(instruction) && is_data
}

/// The classes of vector and x87 instructions of which this one is, as far as the host must not run it for the guest while the guest has turned them off.
pub fn classes(instruction: &Instruction) -> u8 {
    // VZEROUPPER and VZEROALL name no register.
    let is_bare = instruction.encoding() == EncodingKind::VEX && uses_vectors(instruction);
    vector_classes(instruction).unwrap_or(if is_bare { class::AVX } else { 0 })
}

/// Whether an instruction, one that is not emitted as itself, surely leaves the translation of addresses as it is, and what may be done at them.
pub fn keeps_translations(instruction: &Instruction) -> bool {
    let is_harmless = matches!(
        instruction.mnemonic(),
        Mnemonic::Push | Mnemonic::Pop | Mnemonic::Leave | Mnemonic::Lea | Mnemonic::Nop | Mnemonic::Endbr64
    );
    is_harmless
        || branch_target(instruction).is_some()
        || matches!(instruction.code(), Code::Jmp_rm64 | Code::Call_rm64 | Code::Retnq | Code::Retnq_imm16)
}

/// Gives a host instruction another memory operand.
pub fn set_memory(host: &mut Instruction, mem: Mem) {
    let name = |register: Reg| Register::RAX + u32::from(register.0);
    host.set_memory_base(mem.base.map_or(Register::None, name));
    host.set_memory_index(mem.index.map_or(Register::None, |(register, _)| name(register)));
    host.set_memory_index_scale(mem.index.map_or(1, |(_, shift)| 1 << shift));
    host.set_memory_displacement64(mem.displacement as i64 as u64);
    host.set_memory_displ_size(match mem.displacement {
        0 => 0,
        -128..128 => 1,
        _ => 8,
    });
    host.set_segment_prefix(Register::None);
}

/// Whether a memory operand has 64-bit address registers, or none.
pub fn has_wide_address(instruction: &Instruction) -> bool {
    let wide = |register: Register| register == Register::None || register.is_gpr64() || register == Register::RIP;
    wide(instruction.memory_base())
        && wide(instruction.memory_index())
        && !(instruction.memory_base() == Register::None
            && instruction.memory_index() == Register::None
            && instruction.memory_displ_size() == 4
            && instruction.memory_displacement64() > i32::MAX as u64
            && instruction.memory_displacement64() < 0xffff_ffff_8000_0000)
}

/// Operand kinds that can be renamed, and no prefix that means more.
pub fn is_plain(instruction: &Instruction) -> bool {
    let known = |kind| matches!(kind, OpKind::Register | OpKind::Memory | OpKind::Immediate8_2nd) || is_immediate(kind);
    let operands_known = (0..instruction.op_count()).all(|operand| {
        known(instruction.op_kind(operand))
            && (instruction.op_kind(operand) != OpKind::Register || {
                let register = instruction.op_register(operand);
                register.is_gpr() || register.is_xmm() || register.is_ymm() || register.is_mm()
            })
    });
    operands_known
        && !instruction.has_rep_prefix()
        && !instruction.has_repne_prefix()
        && !instruction.is_privileged()
        && !instruction.is_stack_instruction()
        && !instruction.is_save_restore_instruction()
        && !instruction.is_vsib()
        && instruction.encoding() != EncodingKind::EVEX
        && !is_excluded(instruction.mnemonic())
}

/// Instructions with effects beside their operands, or that the host must not run for the guest.
pub fn is_excluded(mnemonic: Mnemonic) -> bool {
    matches!(
        mnemonic,
        Mnemonic::Pause
            | Mnemonic::Ldmxcsr
            | Mnemonic::Stmxcsr
            | Mnemonic::Vldmxcsr
            | Mnemonic::Vstmxcsr
            | Mnemonic::Maskmovdqu
            | Mnemonic::Maskmovq
            | Mnemonic::Vmaskmovdqu
            | Mnemonic::Vmaskmovps
            | Mnemonic::Vmaskmovpd
            | Mnemonic::Vpmaskmovd
            | Mnemonic::Vpmaskmovq
            | Mnemonic::Rdrand
            | Mnemonic::Rdseed
            | Mnemonic::Rdpid
            | Mnemonic::Rdtsc
            | Mnemonic::Rdtscp
            | Mnemonic::Cpuid
            | Mnemonic::Xgetbv
            | Mnemonic::Rdfsbase
            | Mnemonic::Rdgsbase
            | Mnemonic::Wrfsbase
            | Mnemonic::Wrgsbase
            | Mnemonic::Rdpkru
            | Mnemonic::Wrpkru
    )
}

/// Whether XMM or YMM registers are involved.
pub fn uses_vectors(instruction: &Instruction) -> bool {
    let is_integer = matches!(
        instruction.mnemonic(),
        Mnemonic::Andn
            | Mnemonic::Bextr
            | Mnemonic::Blsi
            | Mnemonic::Blsmsk
            | Mnemonic::Blsr
            | Mnemonic::Bzhi
            | Mnemonic::Mulx
            | Mnemonic::Pdep
            | Mnemonic::Pext
            | Mnemonic::Rorx
            | Mnemonic::Sarx
            | Mnemonic::Shlx
            | Mnemonic::Shrx
    );
    let from_memory = matches!(
        instruction.mnemonic(),
        Mnemonic::Cvttsd2si
            | Mnemonic::Cvtsd2si
            | Mnemonic::Cvttss2si
            | Mnemonic::Cvtss2si
            | Mnemonic::Cvttps2pi
            | Mnemonic::Cvtps2pi
            | Mnemonic::Cvttpd2pi
            | Mnemonic::Cvtpd2pi
    );
    from_memory
        || instruction.encoding() == EncodingKind::VEX && !is_integer
        || (0..instruction.op_count()).any(|operand| {
            instruction.op_kind(operand) == OpKind::Register && {
                let register = instruction.op_register(operand);
                register.is_xmm() || register.is_ymm()
            }
        })
}

/// General-purpose instructions that mean the same on the host; others with legacy encoding go to the interpreter.
pub fn is_known_integer(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    match instruction.mnemonic() {
        // A bit offset in a register reaches beyond the operand.
        M::Bt | M::Bts | M::Btr | M::Btc => {
            instruction.op0_kind() == OpKind::Register || instruction.op1_kind() != OpKind::Register
        }
        M::Mov => {
            let is_special = |operand: u32| {
                let register = instruction.op_register(operand);
                instruction.op_kind(operand) == OpKind::Register && !register.is_gpr()
            };
            !is_special(0) && !is_special(1) && !has_offset_operand(instruction)
        }
        M::Movzx
        | M::Movsx
        | M::Movsxd
        | M::Add
        | M::Adc
        | M::Sub
        | M::Sbb
        | M::And
        | M::Or
        | M::Xor
        | M::Cmp
        | M::Test
        | M::Inc
        | M::Dec
        | M::Neg
        | M::Not
        | M::Shl
        | M::Sal
        | M::Shr
        | M::Sar
        | M::Rol
        | M::Ror
        | M::Rcl
        | M::Rcr
        | M::Shld
        | M::Shrd
        | M::Imul
        | M::Mul
        | M::Div
        | M::Idiv
        | M::Cbw
        | M::Cwde
        | M::Cdqe
        | M::Cwd
        | M::Cdq
        | M::Cqo
        | M::Xchg
        | M::Xadd
        | M::Cmpxchg
        | M::Cmpxchg8b
        | M::Cmpxchg16b
        | M::Bswap
        | M::Bsf
        | M::Bsr
        | M::Tzcnt
        | M::Lzcnt
        | M::Popcnt
        | M::Seta
        | M::Setae
        | M::Setb
        | M::Setbe
        | M::Sete
        | M::Setg
        | M::Setge
        | M::Setl
        | M::Setle
        | M::Setne
        | M::Setno
        | M::Setnp
        | M::Setns
        | M::Seto
        | M::Setp
        | M::Sets
        | M::Cmova
        | M::Cmovae
        | M::Cmovb
        | M::Cmovbe
        | M::Cmove
        | M::Cmovg
        | M::Cmovge
        | M::Cmovl
        | M::Cmovle
        | M::Cmovne
        | M::Cmovno
        | M::Cmovnp
        | M::Cmovns
        | M::Cmovo
        | M::Cmovp
        | M::Cmovs
        | M::Movbe
        | M::Crc32
        | M::Adcx
        | M::Adox
        | M::Lahf
        | M::Sahf
        | M::Clc
        | M::Stc
        | M::Cmc
        | M::Lfence
        | M::Sfence
        | M::Mfence
        | M::Movnti => true,
        _ => false,
    }
}

/// Whether it puts an index into ECX.
pub fn writes_rcx(instruction: &Instruction) -> bool {
    matches!(
        instruction.mnemonic(),
        Mnemonic::Pcmpestri
            | Mnemonic::Pcmpestri64
            | Mnemonic::Pcmpistri
            | Mnemonic::Vpcmpestri
            | Mnemonic::Vpcmpestri64
            | Mnemonic::Vpcmpistri
    )
}

/// Whether the operand is CL because the opcode says so.
pub fn is_implied_count(instruction: &Instruction, operand: u32) -> bool {
    let is_shift = matches!(
        instruction.mnemonic(),
        Mnemonic::Shl
            | Mnemonic::Sal
            | Mnemonic::Shr
            | Mnemonic::Sar
            | Mnemonic::Rol
            | Mnemonic::Ror
            | Mnemonic::Rcl
            | Mnemonic::Rcr
            | Mnemonic::Shld
            | Mnemonic::Shrd
    );
    is_shift
        && operand == instruction.op_count() - 1
        && instruction.op_kind(operand) == OpKind::Register
        && instruction.op_register(operand) == Register::CL
}

/// Whether the host may fault in it although its operands are there.
pub fn may_raise(instruction: &Instruction) -> bool {
    matches!(instruction.mnemonic(), Mnemonic::Div | Mnemonic::Idiv | Mnemonic::Cmpxchg16b) || uses_vectors(instruction)
}

pub fn set_operand_register(instruction: &mut Instruction, operand: u32, register: Register) {
    match operand {
        0 => instruction.set_op0_register(register),
        1 => instruction.set_op1_register(register),
        2 => instruction.set_op2_register(register),
        _ => instruction.set_op3_register(register),
    }
}

/// Host registers to turn by 8 bits around an instruction whose operands are AH, CH, DH or BH but that needs a REX prefix on the host, which
/// has no names for those. `None`: it does not work.
pub fn turned_homes(instruction: &Instruction) -> Option<Vec<Reg>> {
    if may_raise(instruction) || matches!(instruction.mnemonic(), Mnemonic::Cmpxchg | Mnemonic::Mul | Mnemonic::Imul) {
        return None;
    }
    let operands = (0..instruction.op_count()).filter(|&operand| instruction.op_kind(operand) == OpKind::Register);
    let registers: Vec<(u8, bool)> =
        operands.filter_map(|operand| general_register(instruction.op_register(operand))).collect();
    let mut homes = Vec::new();
    for (index, &(number, high)) in registers.iter().enumerate() {
        if registers[..index].iter().any(|&(other, _)| other == number) {
            return None;
        }
        if high {
            homes.push(home(number)?);
        }
    }
    Some(homes)
}

/// A host register in the width of a guest register.
pub fn renamed(register: Register, host: Reg) -> Register {
    let first = match register.size() {
        8 => Register::RAX,
        4 => Register::EAX,
        2 => Register::AX,
        _ => return byte_register(host),
    };
    first + u32::from(host.0)
}

/// The low byte of a host register.
pub fn byte_register(host: Reg) -> Register {
    match host.0 {
        number @ 0..=3 => Register::AL + u32::from(number),
        number @ 4..=7 => Register::SPL + u32::from(number - 4),
        number => Register::R8L + u32::from(number - 8),
    }
}
