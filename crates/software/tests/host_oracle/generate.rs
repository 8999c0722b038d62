//! Random instructions: every code of the CPU model that may run natively in user mode, in every form.

use std::collections::BTreeMap;

use iced_x86::{
    Code, Decoder, DecoderOptions, EncodingKind, FlowControl, Instruction, Mnemonic, OpKind, Register, RflagsBits,
};
use polder_software::CpuModel;
use polder_software::testbench::{CODE, DATA, STACK};

use crate::native::{DATA_PAGES, GS_BASE, PAGE};
use crate::random::Random;

/// Where the instruction is.
pub const START: u64 = CODE + 0x800;
/// Where branches that take their target from a register or memory go.
pub const BRANCH_TARGET: u64 = CODE + 0x900;

/// What leads to one code.
#[derive(Debug, Clone, Copy)]
struct Template {
    /// 0 for none.
    prefix: u8,
    wide: bool,
    /// 0 to 3: legacy maps; 5 to 7: VEX maps 1 to 3.
    map: u8,
    /// VEX: pp and L.
    fields: u8,
    opcode: u8,
    modrm: u8,
}

/// A choice of instructions.
pub struct Generator {
    bits: u32,
    codes: Vec<(Code, Vec<Template>)>,
}

/// An instruction with the registers that it wants.
pub struct Generated {
    pub instruction: Instruction,
    pub bytes: Vec<u8>,
    /// General registers with values that lead to the data pages.
    pub registers: Vec<(usize, u64)>,
    /// A vector register with small indices.
    pub index_register: Option<usize>,
    /// Where the memory operand is.
    pub target: Option<u64>,
}

fn excluded(instruction: &Instruction) -> bool {
    use Mnemonic::*;
    let native_only = matches!(
        instruction.mnemonic(),
        Cpuid
            | Rdtsc
            | Rdtscp
            | Rdpmc
            | Rdrand
            | Rdseed
            | Rdpid
            | Syscall
            | Sysenter
            | Int
            | Int1
            | Int3
            | Into
            | Hlt
            | In
            | Out
            | Insb
            | Insw
            | Insd
            | Outsb
            | Outsw
            | Outsd
            | Cli
            | Sti
            | Popfq
            | Popfd
            | Popf
            | Iret
            | Iretd
            | Iretq
            | Sgdt
            | Sidt
            | Sldt
            | Str
            | Smsw
            | Lsl
            | Lar
            | Verr
            | Verw
            | Rdfsbase
            | Rdgsbase
            | Wrfsbase
            | Wrgsbase
            | Xgetbv
            | Xsave
            | Xsave64
            | Xsaveopt
            | Xsaveopt64
            | Xsavec
            | Xsavec64
            | Xrstor
            | Xrstor64
            | Fxsave
            | Fxsave64
            | Fxrstor
            | Fxrstor64
            | Retf
            | Lfs
            | Lgs
            | Lss
            | Les
            | Lds
            | Vmcall
            | Vmmcall
            | Vmfunc
            | Rdpkru
            | Wrpkru
            | Reservednop
            | Ud0
            | Ud1
            | Ud2
            | Fneni
            | Fndisi
            | Fnsetpm
            | Frstpm
            | Monitor
            | Mwait
            | Sysexit
            | Sysexitq
            | Sysret
            | Sysretq
            | Swapgs
            | Clac
            | Stac
            | Encls
            | Enclu
    );
    let segments = (0..instruction.op_count()).any(|operand| {
        let register = instruction.op_register(operand);
        instruction.op_kind(operand) == OpKind::Register
            && (register.is_segment_register() || register.is_cr() || register.is_dr())
    });
    let far = instruction.is_jmp_far()
        || instruction.is_call_far()
        || instruction.is_jmp_far_indirect()
        || instruction.is_call_far_indirect();
    // AMD's processors read 4 bytes for this one.
    let differs = instruction.code() == Code::Movsxd_r16_rm16;
    native_only
        || differs
        || segments
        || far
        || instruction.is_privileged()
        || instruction.memory_segment() == Register::FS && instruction.has_segment_prefix()
}

/// Near branches with an operand-size prefix do different things on processors of different vendors (SDM vol. 2, JMP; APM vol. 3, 1.2.3).
fn differs_by_vendor(instruction: &Instruction, bytes: &[u8]) -> bool {
    let branch = instruction.flow_control() != FlowControl::Next;
    // LOOPE and LOOPNE with REP prefixes too.
    let repeated = branch && bytes.iter().take(4).any(|byte| matches!(byte, 0xf2 | 0xf3));
    repeated && matches!(instruction.mnemonic(), Mnemonic::Loope | Mnemonic::Loopne)
        || branch && bytes.iter().take(4).any(|&byte| byte == 0x66)
}

/// SHA instructions: the manual wants aligned operands; some processors do not insist.
fn is_sha(instruction: &Instruction) -> bool {
    (Mnemonic::Sha1msg1..=Mnemonic::Sha256rnds2).contains(&instruction.mnemonic())
}

/// A branch into itself, or into what follows it, says nothing.
fn branches_here(instruction: &Instruction) -> bool {
    let near = matches!(instruction.op0_kind(), OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64);
    let here = START..instruction.next_ip() + 16;
    near && here.contains(&instruction.near_branch_target())
}

fn has_memory(instruction: &Instruction) -> bool {
    (0..instruction.op_count()).any(|operand| instruction.op_kind(operand) == OpKind::Memory)
}

impl Generator {
    /// All codes of the model in 64- or 32-bit code; only those whose name contains `only`.
    pub fn new(model: &CpuModel, bits: u32, only: &str) -> Generator {
        let mut codes: BTreeMap<usize, (Code, Vec<Template>)> = BTreeMap::new();
        let mut consider = |template: Template| {
            // A few trials, as some codes need SIB bytes or certain registers.
            for trial in 0..3 {
                let mut random = Random::new(trial);
                let bytes = template.bytes(&mut random, bits, true);
                let instruction = decode(bits, &bytes);
                let code = instruction.code();
                let known = matches!(code.encoding(), EncodingKind::Legacy | EncodingKind::VEX)
                    && code != Code::INVALID
                    && code.cpuid_features().iter().all(|&feature| model.supports(feature))
                    && !excluded(&instruction)
                    && format!("{code:?}").to_lowercase().contains(only);
                if known {
                    codes.entry(code as usize).or_insert((code, Vec::new())).1.push(template);
                    break;
                }
            }
        };
        for opcode in 0..=255u8 {
            for modrm in (0..8u8).flat_map(|reg| [reg << 3, 0xc0 | reg << 3]) {
                for wide in [false, true] {
                    if wide && bits == 32 {
                        continue;
                    }
                    for prefix in [0, 0x66, 0xf2, 0xf3] {
                        for map in 0..4 {
                            consider(Template { prefix, wide, map, fields: 0, opcode, modrm });
                        }
                    }
                    for fields in 0..8 {
                        for map in 5..8 {
                            consider(Template { prefix: 0, wide, map, fields, opcode, modrm });
                        }
                    }
                }
            }
        }
        // Instructions that are told apart by the whole ModRM byte.
        for opcode in 0xd8..=0xdf {
            for modrm in 0xc0..=0xff {
                consider(Template { prefix: 0, wide: false, map: 0, fields: 0, opcode, modrm });
            }
        }
        Generator { bits, codes: codes.into_values().collect() }
    }

    pub fn codes(&self) -> usize {
        self.codes.len()
    }

    /// A few instructions in a row, with comparisons and jumps over one instruction among them. The first one's registers are aimed; what the
    /// others make of them may fault. `instruction` is a NOP that stands for all.
    pub fn sequence(&self, random: &mut Random) -> Generated {
        let mut bytes = Vec::new();
        let mut registers = Vec::new();
        for position in 0..2 + random.below(6) {
            let next = self.simple(random, position == 0);
            registers.extend(next.registers);
            if random.chance(40) {
                // cmp or test of two registers, or whatever flags there are; then a jump over the next instruction, or to it.
                if random.chance(70) {
                    if self.bits == 64 && random.chance(50) {
                        bytes.push(0x48);
                    }
                    bytes.extend([random.pick(&[0x39, 0x85]), 0xc0 | random.next() as u8 & 0x3f]);
                }
                let distance = if random.chance(80) { next.bytes.len() as u8 } else { 0 };
                bytes.extend([0x70 | random.next() as u8 & 0xf, distance]);
            }
            bytes.extend(next.bytes);
        }
        let instruction = decode(self.bits, &[0x90]);
        Generated { instruction, bytes, registers, index_register: None, target: None }
    }

    /// An instruction that may stand in a sequence; from the second on mostly without memory operands.
    fn simple(&self, random: &mut Random, first: bool) -> Generated {
        loop {
            let generated = self.generate(random);
            let instruction = &generated.instruction;
            let fits = instruction.flow_control() == FlowControl::Next
                && instruction.rflags_undefined() == RflagsBits::NONE
                && generated.index_register.is_none()
                && !instruction.is_string_instruction()
                && !matches!(
                    instruction.mnemonic(),
                    Mnemonic::Fnstenv
                        | Mnemonic::Fnsave
                        | Mnemonic::Maskmovq
                        | Mnemonic::Maskmovdqu
                        | Mnemonic::Vmaskmovdqu
                        | Mnemonic::Enter
                        | Mnemonic::Pusha
                        | Mnemonic::Pushad
                        | Mnemonic::Ldmxcsr
                        | Mnemonic::Vldmxcsr
                )
                && !(is_sha(instruction) && has_memory(instruction))
                && (first || !has_memory(instruction) || random.chance(20));
            if fits {
                return generated;
            }
        }
    }

    /// A random instruction.
    pub fn generate(&self, random: &mut Random) -> Generated {
        loop {
            let (code, templates) = &self.codes[random.below(self.codes.len() as u64) as usize];
            let template = random.pick(templates);
            for _ in 0..8 {
                let bytes = template.bytes(random, self.bits, false);
                let instruction = decode(self.bits, &bytes);
                if instruction.code() == *code
                    && !excluded(&instruction)
                    && !differs_by_vendor(&instruction, &bytes)
                    && !branches_here(&instruction)
                {
                    let bytes = bytes[..instruction.len()].to_vec();
                    if let Some(generated) = aim(instruction, bytes, self.bits, random) {
                        return generated;
                    }
                }
            }
        }
    }
}

fn decode(bits: u32, bytes: &[u8]) -> Instruction {
    Decoder::with_ip(bits, bytes, START, DecoderOptions::NONE).decode()
}

impl Template {
    /// Bytes with everything random that the template leaves open; more than enough of them. `plain`: no optional prefixes.
    fn bytes(&self, random: &mut Random, bits: u32, plain: bool) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(32);
        let optional = |random: &mut Random, percent: u64| !plain && random.chance(percent);
        if optional(random, 4) {
            bytes.push(0x67);
        }
        if optional(random, 3) {
            bytes.push(if bits == 64 {
                random.pick(&[0x65, 0x3e, 0x36, 0x2e])
            } else {
                random.pick(&[0x26, 0x3e, 0x36])
            });
        }
        let extension = if plain || bits == 32 { 0 } else { random.next() as u8 & 7 };
        if self.map >= 5 {
            // R, X and B are inverted.
            bytes.push(0xc4);
            bytes.push((!extension & 7) << 5 | (self.map - 4));
            let vvvv = if random.chance(30) { 0xf } else { random.next() as u8 & 0xf | u8::from(bits == 32) << 3 };
            bytes.push(u8::from(self.wide) << 7 | vvvv << 3 | self.fields);
        } else {
            if self.prefix != 0 {
                bytes.push(self.prefix);
            } else if optional(random, 2) {
                bytes.push(0x66);
            }
            let rex = 0x40 | u8::from(self.wide) << 3 | extension;
            if bits == 64 && (self.wide || !plain && random.chance(40)) {
                bytes.push(rex);
            }
            bytes.extend_from_slice(match self.map {
                0 => &[][..],
                1 => &[0x0f],
                2 => &[0x0f, 0x38],
                _ => &[0x0f, 0x3a],
            });
        }
        let opcode = if self.map == 0 && matches!(self.opcode, 0x40..=0x5f | 0x90..=0x97 | 0xb0..=0xbf) {
            self.opcode & 0xf8 | random.next() as u8 & 7
        } else {
            self.opcode
        };
        bytes.push(opcode);
        let x87 = self.map == 0 && matches!(self.opcode, 0xd8..=0xdf);
        let reg = if plain || x87 || random.chance(50) { self.modrm >> 3 & 7 } else { random.next() as u8 & 7 };
        if self.modrm >= 0xc0 {
            let rm = if plain || x87 && random.chance(50) { self.modrm & 7 } else { random.next() as u8 & 7 };
            bytes.push(0xc0 | reg << 3 | rm);
        } else {
            let mode = random.below(3) as u8;
            bytes.push(mode << 6 | reg << 3 | random.next() as u8 & 7);
        }
        // SIB, displacement and immediate, whatever of them there is.
        for _ in 0..14 {
            bytes.push(random.next() as u8);
        }
        bytes
    }
}

/// Chooses registers so that the memory operand lies in the data pages, most of the time.
fn aim(instruction: Instruction, mut bytes: Vec<u8>, bits: u32, random: &mut Random) -> Option<Generated> {
    let mut registers: Vec<(usize, u64)> = Vec::new();
    let mut index_register = None;
    let mut target = None;
    let stack = STACK - 0x200 + (random.below(64) << 3) - if random.chance(10) { random.below(8) } else { 0 };
    let span = DATA_PAGES * PAGE;
    // Implicit operands (strings, MASKMOV, XLAT) take a segment override too.
    let gs = if instruction.memory_segment() == Register::GS { GS_BASE } else { 0 };
    // Hosts differ in whether bytes that the mask leaves out may fault, and in what a branch to a bad place through a bad place raises.
    let inside = matches!(instruction.mnemonic(), Mnemonic::Maskmovdqu | Mnemonic::Maskmovq | Mnemonic::Vmaskmovdqu)
        || instruction.flow_control() != FlowControl::Next;
    let somewhere = |random: &mut Random| match random.below(20) {
        0 | 1 if inside => DATA + random.below(span - 600),
        0 => DATA + span - random.below(80),
        1 => DATA + PAGE - random.below(80),
        2..=5 => DATA + random.below(span - 600),
        6..=8 => DATA + (random.below(span - 600) & !15),
        _ => DATA + (random.below(span - 600) & !63),
    };
    if instruction.is_stack_instruction() {
        registers.push((4, stack));
        if matches!(instruction.mnemonic(), Mnemonic::Leave | Mnemonic::Enter) {
            // Away from where ENTER pushes, so that the order of its accesses does not show.
            registers.push((5, STACK + 0x200));
        }
    }
    if instruction.is_string_instruction() {
        registers.extend([(6, somewhere(random).wrapping_sub(gs)), (7, somewhere(random)), (1, random.below(40))]);
    }
    if matches!(instruction.mnemonic(), Mnemonic::Maskmovdqu | Mnemonic::Maskmovq | Mnemonic::Vmaskmovdqu) {
        registers.push((7, somewhere(random).wrapping_sub(gs)));
    }
    if instruction.mnemonic() == Mnemonic::Xlatb {
        registers.push((3, somewhere(random).wrapping_sub(gs)));
    }
    let sha = is_sha(&instruction);
    // What environments hold of addresses is left out of the comparison, so it must be known where they are.
    let environment = matches!(instruction.mnemonic(), Mnemonic::Fnstenv | Mnemonic::Fnsave);
    let wild = random.chance(3) && !sha && !environment;
    let narrow = instruction.memory_base().size() == 2
        || instruction.memory_index().size() == 2
        || instruction.memory_displ_size() == 2;
    if matches!(instruction.op0_kind(), OpKind::MemorySegDI) && inside {
        return None;
    }
    // The segment bases of the host's 32-bit code are not known.
    if bits == 32 && instruction.memory_segment() == Register::GS && instruction.has_segment_prefix() {
        return None;
    }
    if narrow && (sha || instruction.flow_control() != FlowControl::Next) {
        return None;
    }
    // 16-bit addresses do not reach any page: they all fault.
    if has_memory(&instruction) && !narrow && !wild && instruction.mnemonic() != Mnemonic::Nop {
        let at = somewhere(random) & if sha { !15 } else { !0 };
        target = Some(at);
        let at = at.wrapping_sub(gs);
        let (base, index) = (instruction.memory_base(), instruction.memory_index());
        let scale = u64::from(instruction.memory_index_scale());
        let displacement = instruction.memory_displacement64();
        let mut offsets = Decoder::with_ip(bits, &bytes, START, DecoderOptions::NONE);
        let decoded = offsets.decode();
        let place = offsets.get_constant_offsets(&decoded);
        let number = |register: Register| register.full_register().number();
        let mut indexed = 0;
        if index.is_xmm() || index.is_ymm() {
            index_register = Some(index.number());
        } else if index != Register::None && index != base {
            let value = random.below(0x2000).wrapping_sub(0x1000);
            registers.push((number(index), value));
            indexed = value.wrapping_mul(scale);
        }
        if base == Register::RIP || base == Register::EIP {
            let relative = at.wrapping_sub(instruction.next_ip()) as u32;
            let offset = place.displacement_offset();
            bytes[offset..offset + 4].copy_from_slice(&relative.to_le_bytes());
        } else if base == Register::None || base == index {
            // Only a displacement of 32 bits can lead there.
            if place.displacement_size() != 4 {
                return None;
            }
            let value = random.below(0x1000);
            if base == index && base != Register::None {
                registers.push((number(base), value));
                indexed = value.wrapping_mul(scale + 1);
            }
            let offset = place.displacement_offset();
            let relative = at.wrapping_sub(indexed) as u32;
            bytes[offset..offset + 4].copy_from_slice(&relative.to_le_bytes());
        } else {
            let mut value = at.wrapping_sub(indexed).wrapping_sub(displacement);
            if base.size() == 4 && !matches!(number(base), 4) {
                value = value & 0xffff_ffff | random.next() << 32;
            }
            registers.push((number(base), value));
        }
        if base == Register::None && index == Register::None && place.displacement_size() != 4 {
            return None;
        }
        let patched = decode(bits, &bytes);
        if patched.code() != instruction.code() {
            return None;
        }
        return Some(Generated { instruction: patched, bytes, registers, index_register, target });
    }
    if matches!(instruction.flow_control(), FlowControl::IndirectBranch | FlowControl::IndirectCall) {
        if instruction.op0_kind() != OpKind::Register {
            return None;
        }
        let register = instruction.op0_register().full_register().number();
        registers.retain(|entry| entry.0 != register);
        registers.push((register, BRANCH_TARGET));
    }
    Some(Generated { instruction, bytes, registers, index_register, target })
}
