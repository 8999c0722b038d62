//! Choice of handlers for x87, MMX, SSE, AVX and the XSAVE family.

use iced_x86::{Code, CpuidFeature, Encoder, EncodingKind, Instruction, Mnemonic, OpAccess, OpKind, Register};

use super::{OpBuilder, register_number};
use crate::cpu::{CodeSize, RDI, ZERO};
use crate::op::{Handler, address};
use crate::vector::entry::Entry;
use crate::vector::{class, fxsave, masked, moves, run, stub, x87, xsave};

/// What this family executes; anything beyond is for a later CPU model.
const FEATURES: [CpuidFeature; 22] = [
    CpuidFeature::FPU,
    CpuidFeature::FPU287,
    CpuidFeature::FPU387,
    CpuidFeature::CMOV,
    CpuidFeature::MMX,
    CpuidFeature::SSE,
    CpuidFeature::SSE2,
    CpuidFeature::SSE3,
    CpuidFeature::SSSE3,
    CpuidFeature::SSE4_1,
    CpuidFeature::SSE4_2,
    CpuidFeature::AVX,
    CpuidFeature::AVX2,
    CpuidFeature::F16C,
    CpuidFeature::FMA,
    CpuidFeature::AES,
    CpuidFeature::SHA,
    CpuidFeature::PCLMULQDQ,
    CpuidFeature::FXSR,
    CpuidFeature::XSAVE,
    CpuidFeature::XSAVEOPT,
    CpuidFeature::XSAVEC,
];

/// The handler for a vector or x87 instruction; `None` for all others.
pub fn select(instruction: &Instruction, builder: &mut OpBuilder) -> Option<Handler> {
    let code = instruction.code();
    if code == Code::Wait {
        // The decoder counts it among the 8086's own.
        return Some(x87::wait);
    }
    if !matches!(code.encoding(), EncodingKind::Legacy | EncodingKind::VEX)
        // FWAIT is as old as the 8086.
        || code != Code::Wait && !code.cpuid_features().iter().all(|feature| FEATURES.contains(feature))
    {
        return None;
    }
    control(instruction, builder)
        .or_else(|| plain_move(instruction, builder))
        .or_else(|| zeroing(instruction, builder))
        .or_else(|| partial_memory(instruction, builder))
        .or_else(|| stubbed(instruction, builder))
}

/// Control and state instructions.
fn control(instruction: &Instruction, builder: &mut OpBuilder) -> Option<Handler> {
    let wide_area = |builder: &mut OpBuilder, wide: bool, handler: Handler| {
        builder.op.extra = u8::from(wide);
        Some(handler)
    };
    match instruction.code() {
        Code::Fninit => Some(x87::initialise),
        Code::Fnstsw_AX => Some(x87::store_status_ax),
        Code::Fnstenv_m14byte => wide_area(builder, false, x87::store_environment),
        Code::Fnstenv_m28byte => wide_area(builder, true, x87::store_environment),
        Code::Fldenv_m14byte => wide_area(builder, false, x87::load_environment),
        Code::Fldenv_m28byte => wide_area(builder, true, x87::load_environment),
        Code::Fnsave_m94byte => wide_area(builder, false, x87::save),
        Code::Fnsave_m108byte => wide_area(builder, true, x87::save),
        Code::Frstor_m94byte => wide_area(builder, false, x87::restore),
        Code::Frstor_m108byte => wide_area(builder, true, x87::restore),
        Code::Fxsave_m512byte => wide_area(builder, false, fxsave::save),
        Code::Fxsave64_m512byte => wide_area(builder, true, fxsave::save),
        Code::Fxrstor_m512byte => wide_area(builder, false, fxsave::restore),
        Code::Fxrstor64_m512byte => wide_area(builder, true, fxsave::restore),
        Code::Xsave_mem => wide_area(builder, false, xsave::xsave),
        Code::Xsave64_mem => wide_area(builder, true, xsave::xsave),
        Code::Xsaveopt_mem => wide_area(builder, false, xsave::xsaveopt),
        Code::Xsaveopt64_mem => wide_area(builder, true, xsave::xsaveopt),
        Code::Xsavec_mem => wide_area(builder, false, xsave::xsavec),
        Code::Xsavec64_mem => wide_area(builder, true, xsave::xsavec),
        Code::Xrstor_mem => wide_area(builder, false, xsave::xrstor),
        Code::Xrstor64_mem => wide_area(builder, true, xsave::xrstor),
        Code::Ldmxcsr_m32 => Some(fxsave::load_mxcsr::<{ class::SSE }>),
        Code::Stmxcsr_m32 => Some(fxsave::store_mxcsr::<{ class::SSE }>),
        Code::VEX_Vldmxcsr_m32 => Some(fxsave::load_mxcsr::<{ class::AVX }>),
        Code::VEX_Vstmxcsr_m32 => Some(fxsave::store_mxcsr::<{ class::AVX }>),
        Code::Movnti_m32_r32 | Code::Movnti_m64_r64 => {
            builder.op.first = register_number(instruction.op1_register())?;
            let wide = instruction.code() == Code::Movnti_m64_r64;
            Some(if wide { moves::store_general::<u64> } else { moves::store_general::<u32> })
        }
        Code::VEX_Vzeroupper => Some(moves::zero::<false>),
        Code::VEX_Vzeroall => Some(moves::zero::<true>),
        _ => None,
    }
}

/// The number of a vector or general register as slots have it.
fn slot(register: Register) -> Option<u8> {
    if register.is_xmm() || register.is_ymm() {
        Some((register.number() * 16) as u8)
    } else {
        register_number(register)
    }
}

/// The handlers of one instruction: between registers, from memory, to memory.
type Forms = (Option<Handler>, Option<Handler>, Option<Handler>);

/// Moves that have handlers in Rust; all others, loads among them, are stubs.
fn plain_move(instruction: &Instruction, builder: &mut OpBuilder) -> Option<Handler> {
    use Code::*;
    use moves::*;
    let (between, from_memory, to_memory): Forms = match instruction.code() {
        Movups_xmm_xmmm128 | Movupd_xmm_xmmm128 | Movdqu_xmm_xmmm128 | Lddqu_xmm_m128 => (Some(copy16), None, None),
        Movaps_xmm_xmmm128 | Movapd_xmm_xmmm128 | Movdqa_xmm_xmmm128 => (Some(copy16), None, None),
        Movups_xmmm128_xmm | Movupd_xmmm128_xmm | Movdqu_xmmm128_xmm => {
            (Some(copy16), None, Some(store16::<false, false>))
        }
        Movaps_xmmm128_xmm | Movapd_xmmm128_xmm | Movdqa_xmmm128_xmm | Movntdq_m128_xmm | Movntps_m128_xmm
        | Movntpd_m128_xmm => (Some(copy16), None, Some(store16::<false, true>)),
        VEX_Vmovups_xmmm128_xmm | VEX_Vmovupd_xmmm128_xmm | VEX_Vmovdqu_xmmm128_xmm => {
            (None, None, Some(store16::<true, false>))
        }
        VEX_Vmovaps_xmmm128_xmm
        | VEX_Vmovapd_xmmm128_xmm
        | VEX_Vmovdqa_xmmm128_xmm
        | VEX_Vmovntdq_m128_xmm
        | VEX_Vmovntps_m128_xmm
        | VEX_Vmovntpd_m128_xmm => (None, None, Some(store16::<true, true>)),
        VEX_Vmovups_ymmm256_ymm | VEX_Vmovupd_ymmm256_ymm | VEX_Vmovdqu_ymmm256_ymm => {
            (None, None, Some(store32::<false>))
        }
        VEX_Vmovaps_ymmm256_ymm
        | VEX_Vmovapd_ymmm256_ymm
        | VEX_Vmovdqa_ymmm256_ymm
        | VEX_Vmovntdq_m256_ymm
        | VEX_Vmovntps_m256_ymm
        | VEX_Vmovntpd_m256_ymm => (None, None, Some(store32::<true>)),
        Movss_xmmm32_xmm => (None, None, Some(store_scalar::<u32, false, false>)),
        Movsd_xmmm64_xmm | Movlps_m64_xmm | Movlpd_m64_xmm => (None, None, Some(store_scalar::<u64, false, false>)),
        Movhps_m64_xmm | Movhpd_m64_xmm => (None, None, Some(store_scalar::<u64, false, true>)),
        VEX_Vmovss_m32_xmm => (None, None, Some(store_scalar::<u32, true, false>)),
        VEX_Vmovsd_m64_xmm | VEX_Vmovlps_m64_xmm | VEX_Vmovlpd_m64_xmm => {
            (None, None, Some(store_scalar::<u64, true, false>))
        }
        VEX_Vmovhps_m64_xmm | VEX_Vmovhpd_m64_xmm => (None, None, Some(store_scalar::<u64, true, true>)),
        Movq_xmm_xmmm64 => (Some(copy8), None, None),
        Movq_xmmm64_xmm => (Some(copy8), None, Some(store_scalar::<u64, false, false>)),
        VEX_Vmovq_xmmm64_xmm => (None, None, Some(store_scalar::<u64, true, false>)),
        Movd_xmm_rm32 => (Some(from_general::<u32>), None, None),
        Movq_xmm_rm64 => (Some(from_general::<u64>), None, None),
        Movd_rm32_xmm => (Some(to_general::<u32, false>), None, Some(store_scalar::<u32, false, false>)),
        Movq_rm64_xmm => (Some(to_general::<u64, false>), None, Some(store_scalar::<u64, false, false>)),
        VEX_Vmovd_rm32_xmm => (Some(to_general::<u32, true>), None, Some(store_scalar::<u32, true, false>)),
        VEX_Vmovq_rm64_xmm => (Some(to_general::<u64, true>), None, Some(store_scalar::<u64, true, false>)),
        Movlps_xmm_m64 | Movlpd_xmm_m64 => (None, Some(load_half::<false>), None),
        Movhps_xmm_m64 | Movhpd_xmm_m64 => (None, Some(load_half::<true>), None),
        _ => return None,
    };
    let [first, second] = [instruction.op0_kind(), instruction.op1_kind()];
    let (handler, registers) = match (first, second) {
        (OpKind::Register, OpKind::Register) => (between?, [instruction.op0_register(), instruction.op1_register()]),
        (OpKind::Register, OpKind::Memory) => (from_memory?, [instruction.op0_register(), Register::None]),
        (OpKind::Memory, OpKind::Register) => (to_memory?, [instruction.op1_register(), Register::None]),
        _ => return None,
    };
    builder.op.first = slot(registers[0])?;
    builder.op.second = slot(registers[1]).unwrap_or(ZERO as u8);
    Some(handler)
}

/// A register combined with itself to nothing.
fn zeroing(instruction: &Instruction, builder: &mut OpBuilder) -> Option<Handler> {
    use Code::*;
    if !matches!(instruction.code(), Xorps_xmm_xmmm128 | Xorpd_xmm_xmmm128 | Pxor_xmm_xmmm128)
        || instruction.op1_kind() != OpKind::Register
        || instruction.op0_register() != instruction.op1_register()
    {
        return None;
    }
    builder.op.first = slot(instruction.op0_register())?;
    Some(moves::clear)
}

/// Instructions that touch only a part of their memory operand.
fn partial_memory(instruction: &Instruction, builder: &mut OpBuilder) -> Option<Handler> {
    use Mnemonic::*;
    let register = |operand: u32| instruction.op_register(operand);
    match instruction.mnemonic() {
        Vmaskmovps | Vmaskmovpd | Vpmaskmovd | Vpmaskmovq => {
            let bits = if matches!(instruction.mnemonic(), Vmaskmovps | Vpmaskmovd) { 32 } else { 64 };
            let loads = instruction.op0_kind() == OpKind::Register;
            let registers = if loads { [register(0), register(1)] } else { [register(1), register(2)] };
            builder.op.first = slot(registers[0])?;
            builder.op.second = slot(registers[1])?;
            builder.op.extra = bits;
            builder.op.extra2 = registers[0].size() as u8;
            Some(if loads { masked::masked_load } else { masked::masked_store })
        }
        Maskmovdqu | Vmaskmovdqu | Maskmovq => {
            builder.op.segment = super::segment_number(instruction.memory_segment());
            builder.op.base = RDI as u8;
            builder.op.address_kind = match (builder.context.code == CodeSize::Bits64, instruction.op0_kind()) {
                (true, OpKind::MemorySegRDI) if builder.op.segment >= crate::cpu::FS => address::BASED,
                (true, OpKind::MemorySegRDI) => address::FLAT,
                (true, _) => address::CUT,
                (false, OpKind::MemorySegDI) => address::CHECKED_16,
                (false, _) => address::CHECKED_32,
            };
            if instruction.mnemonic() == Maskmovq {
                builder.op.first = register(1).number() as u8;
                builder.op.second = register(2).number() as u8;
                return Some(masked::masked_bytes_mmx);
            }
            builder.op.first = slot(register(1))?;
            builder.op.second = slot(register(2))?;
            Some(if instruction.mnemonic() == Maskmovdqu {
                masked::masked_bytes::<false>
            } else {
                masked::masked_bytes::<true>
            })
        }
        Vpgatherdd | Vpgatherdq | Vpgatherqd | Vpgatherqq | Vgatherdps | Vgatherdpd | Vgatherqps | Vgatherqpd => {
            let (target, index, mask) = (register(0), instruction.memory_index(), register(2));
            let numbers = [target, index, mask].map(Register::number);
            if numbers[0] == numbers[1] || numbers[1] == numbers[2] || numbers[0] == numbers[2] {
                return None;
            }
            let wide_index = matches!(instruction.mnemonic(), Vpgatherqd | Vpgatherqq | Vgatherqps | Vgatherqpd);
            let wide = matches!(instruction.mnemonic(), Vpgatherdq | Vpgatherqq | Vgatherdpd | Vgatherqpd);
            let elements = target.size() / if wide { 8 } else { 4 };
            let indices = index.size() / if wide_index { 8 } else { 4 };
            builder.op.first = slot(target)?;
            builder.op.second = slot(mask)?;
            builder.op.extra = slot(index)? | u8::from(wide_index) | u8::from(wide) << 1;
            builder.op.extra2 = elements.min(indices) as u8;
            Some(masked::gather)
        }
        _ => None,
    }
}

/// Everything else: a stub.
fn stubbed(instruction: &Instruction, builder: &mut OpBuilder) -> Option<Handler> {
    let classes = classes(instruction)?;
    let memory = (0..instruction.op_count()).any(|operand| instruction.op_kind(operand) == OpKind::Memory);
    let bytes = if memory { instruction.memory_size().size() } else { 0 };
    if memory && !(1..=64).contains(&bytes) {
        return None;
    }
    let writes = memory && writes_memory(instruction);
    let aligned = must_be_aligned(instruction);
    let keeps_pointers = classes == class::X87 && leaves_pointers(instruction);
    let handler = if keeps_pointers {
        match (memory, writes) {
            (false, _) => run::x87_register,
            (true, false) => run::x87_read,
            (true, true) => run::x87_write,
        }
    } else {
        stub_handler(classes, memory, writes, aligned)
    };
    let usual =
        matches!(classes, class::SSE | class::AVX) && !writes && (!memory || builder.op.address_kind == address::FLAT);
    let entry =
        usual.then_some(Entry { class: classes, bytes: bytes as u8, aligned: memory && aligned, slow: handler });
    let form = stub::find(instruction, entry.as_ref())?;
    let [first, second, third, fourth] = form.slots;
    builder.op.immediate = form.address;
    builder.op.first = first;
    builder.op.second = second;
    builder.op.extra = third;
    builder.op.extra2 = if memory { bytes as u8 } else { fourth };
    if keeps_pointers {
        let [low, high] = x87_opcode(instruction, builder.context.code).to_le_bytes();
        builder.op.first = low;
        builder.op.second = high;
    }
    Some(form.whole.unwrap_or(handler))
}

/// The handler in Rust that runs a stub.
fn stub_handler(classes: u8, memory: bool, writes: bool, aligned: bool) -> Handler {
    macro_rules! handler {
        ($class:expr) => {
            match (memory, writes, aligned) {
                (false, ..) => run::register::<{ $class }>,
                (true, false, false) => run::read::<{ $class }, false>,
                (true, false, true) => run::read::<{ $class }, true>,
                (true, true, false) => run::write::<{ $class }, false>,
                (true, true, true) => run::write::<{ $class }, true>,
            }
        };
    }
    match classes {
        class::X87 => handler!(class::X87),
        class::MMX => handler!(class::MMX),
        class::SSE => handler!(class::SSE),
        class::AVX => handler!(class::AVX),
        _ => handler!(class::SSE | class::MMX),
    }
}

/// What must be enabled; `None`: not an instruction of this family.
pub fn classes(instruction: &Instruction) -> Option<u8> {
    let code = instruction.code();
    let registers = (0..instruction.op_count())
        .filter(|&operand| instruction.op_kind(operand) == OpKind::Register)
        .map(|operand| instruction.op_register(operand));
    let (mut mmx, mut xmm) = (false, false);
    for register in registers {
        mmx |= register.is_mm();
        xmm |= register.is_xmm() || register.is_ymm();
    }
    let x87 = code
        .cpuid_features()
        .iter()
        .any(|feature| matches!(feature, CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387));
    let converts = matches!(
        instruction.mnemonic(),
        Mnemonic::Cvtps2pi | Mnemonic::Cvttps2pi | Mnemonic::Cvtpd2pi | Mnemonic::Cvttpd2pi
    );
    // From memory to a general register: the only conversions that name no vector register.
    let to_general = matches!(
        instruction.mnemonic(),
        Mnemonic::Cvtss2si
            | Mnemonic::Cvttss2si
            | Mnemonic::Cvtsd2si
            | Mnemonic::Cvttsd2si
            | Mnemonic::Vcvtss2si
            | Mnemonic::Vcvttss2si
            | Mnemonic::Vcvtsd2si
            | Mnemonic::Vcvttsd2si
    );
    match (mmx, xmm) {
        (true, true) => Some(class::SSE | class::MMX),
        (true, false) if converts => Some(class::SSE | class::MMX),
        (true, false) => Some(class::MMX),
        (false, true) if code.encoding() == EncodingKind::VEX => Some(class::AVX),
        (false, true) => Some(class::SSE),
        (false, false) if code == Code::Emms => Some(class::MMX),
        (false, false) if x87 => Some(class::X87),
        (false, false) if to_general => {
            Some(if code.encoding() == EncodingKind::VEX { class::AVX } else { class::SSE })
        }
        (false, false) => None,
    }
}

fn writes_memory(instruction: &Instruction) -> bool {
    let mut factory = iced_x86::InstructionInfoFactory::new();
    let info = factory.info(instruction);
    info.used_memory()
        .iter()
        .any(|memory| !matches!(memory.access(), OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess))
}

/// Whether a memory operand must be aligned to its size (SDM vol. 1, 14.9 and 4.1.1).
fn must_be_aligned(instruction: &Instruction) -> bool {
    use Mnemonic::*;
    let mnemonic = instruction.mnemonic();
    if instruction.code().encoding() == EncodingKind::VEX {
        return matches!(mnemonic, Vmovaps | Vmovapd | Vmovdqa | Vmovntps | Vmovntpd | Vmovntdq | Vmovntdqa);
    }
    instruction.memory_size().size() == 16
        && !matches!(
            mnemonic,
            Movups
                | Movupd
                | Movdqu
                | Lddqu
                | Pcmpestri
                | Pcmpestri64
                | Pcmpestrm
                | Pcmpestrm64
                | Pcmpistri
                | Pcmpistrm
        )
}

/// Whether an x87 instruction leaves its address in the environment: all but control instructions do (SDM vol. 1, 8.1.8).
pub(crate) fn leaves_pointers(instruction: &Instruction) -> bool {
    use Mnemonic::*;
    !matches!(instruction.mnemonic(), Fnclex | Fldcw | Fnstcw | Fnstsw | Fneni | Fndisi | Fnsetpm)
}

/// The opcode as the environment has it: the low 3 bits of the first byte, and the ModRM byte.
pub(crate) fn x87_opcode(instruction: &Instruction, code: CodeSize) -> u16 {
    let bitness = match code {
        CodeSize::Bits16 => 16,
        CodeSize::Bits32 => 32,
        CodeSize::Bits64 => 64,
    };
    let mut encoder = Encoder::new(bitness);
    if encoder.encode(instruction, instruction.ip()).is_err() {
        return 0;
    }
    let bytes = encoder.take_buffer();
    let opcode = bytes.iter().position(|byte| (0xd8..=0xdf).contains(byte));
    let pair = opcode.and_then(|at| Some((*bytes.get(at)?, *bytes.get(at + 1)?)));
    pair.map_or(0, |(first, second)| u16::from(first & 7) << 8 | u16::from(second))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use iced_x86::{Decoder, DecoderOptions};

    use super::*;
    use crate::lower::{CodeContext, lower, undefined};

    /// Every instruction of the vector and x87 opcode maps, in register forms with all values of the ModRM byte's `reg` field (and with all
    /// of `rm` where the register is live in the host), and in one memory form.
    fn all_instructions() -> Vec<Instruction> {
        let mut found = Vec::new();
        let mut try_bytes = |bytes: &[u8]| {
            let mut decoder = Decoder::with_ip(64, bytes, 0x1000, DecoderOptions::NONE);
            let instruction = decoder.decode();
            let code = instruction.code();
            if code != Code::INVALID
                && matches!(code.encoding(), EncodingKind::Legacy | EncodingKind::VEX)
                && code.cpuid_features().iter().all(|feature| FEATURES.contains(feature))
            {
                found.push(instruction);
            }
        };
        let modrm = (0..8u8).flat_map(|reg| [reg << 3 | 6, 0xc0 | reg << 3 | 1]);
        for escape in 0xd8..=0xdfu8 {
            for modrm in 0..=255u8 {
                try_bytes(&[escape, modrm, 0, 0, 0, 0]);
                try_bytes(&[0x66, escape, modrm, 0, 0, 0, 0]);
            }
        }
        try_bytes(&[0x9b]);
        for modrm in modrm {
            for opcode in 0..=255u8 {
                for prefix in [&[][..], &[0x66], &[0xf2], &[0xf3]] {
                    for rex in [&[][..], &[0x48]] {
                        for map in [&[0x0f][..], &[0x0f, 0x38], &[0x0f, 0x3a]] {
                            try_bytes(&[prefix, rex, map, &[opcode, modrm, 0, 0, 0, 0, 0]].concat());
                        }
                    }
                }
                for map in 1..=3u8 {
                    for fields in 0..16u8 {
                        // W, L and pp; vvvv 1111 and, for a third operand, another register.
                        for vvvv in [0x78, 0x68] {
                            let last = fields >> 3 << 7 | vvvv | fields & 7;
                            // VSIB needs a SIB byte: ModRM's rm of 4 in the memory form.
                            try_bytes(&[0xc4, 0xe0 | map, last, opcode, modrm, 0x10, 0, 0, 0, 0]);
                            try_bytes(&[0xc4, 0xe0 | map, last, opcode, modrm & 0xf8 | 4, 0x30, 0, 0, 0, 0]);
                        }
                    }
                }
            }
        }
        found
    }

    #[test]
    fn every_instruction_of_the_family_has_a_handler_and_all_stubs_fit_the_area() {
        let mut stubs = BTreeSet::new();
        let mut bytes = 0;
        let mut without = BTreeSet::new();
        for instruction in all_instructions() {
            let context = CodeContext { code: CodeSize::Bits64, block_rip: 0x1000 };
            let (op, _) = lower(&instruction, context);
            if std::ptr::fn_addr_eq(op.handler.get(), undefined as Handler) {
                without.insert(format!("{:?}", instruction.code()));
            }
            if let Some(size) = stub::size_of_stub(&instruction)
                && let Some(form) = stub::find(&instruction, None)
                && stubs.insert(form.address)
            {
                let immediate = (0..instruction.op_count()).any(|o| instruction.op_kind(o) == OpKind::Immediate8);
                // MMX registers keep their numbers; the enumeration has only one `rm`.
                let mmx = instruction.op_count() > 1 && instruction.op1_register().is_mm();
                bytes += size.next_multiple_of(16) * if immediate { 256 } else { 1 } * if mmx { 8 } else { 1 };
            }
        }
        println!("{} stubs, {} KiB", stubs.len(), bytes >> 10);
        println!("{:?}", without);
        assert!(stubs.len() > 1000);
        assert!(bytes < crate::vector::code_area::AREA_BYTES / 2, "{bytes}");
    }
}
