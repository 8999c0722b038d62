//! Stubs: one guest instruction each, wrapped so that Rust can call it.
//!
//! Before an instruction becomes a stub it is *normalised*: its memory operand becomes `[rsi]`, its general registers become R10 and R11,
//! its XMM or YMM registers become number 1 to 4, each standing for a *slot* of the op. So all uses of an instruction share
//! one stub, and the number of stubs is bounded by the instruction set (see the test below). x87 and MMX registers keep their numbers: they are
//! live in the host.
//!
//! A stub is called with RDI = the `Cpu`, RSI = the host address of the memory operand, RDX = the op, and returns
//! in EAX one of [`DONE`], [`SIMD_EXCEPTION`], [`X87_EXCEPTION`], [`UNDEFINED`]. It changes no register that the System V ABI preserves, and uses no stack, so that a
//! landing can stand in for its end.

use std::collections::HashMap;
use std::io;
use std::mem::offset_of;
use std::sync::{Mutex, OnceLock};

use iced_x86::{
    CodeSize, Encoder, EncodingKind, Instruction, InstructionInfoFactory, OpAccess, OpKind, Register, RflagsBits,
};

use super::code_area::{AREA_BYTES, CodeArea};
use super::entry::Entry;
use super::{VectorState, signal};
use crate::cpu::Cpu;
use crate::op::{Flow, Handler, Op};

pub const DONE: u32 = 0;
pub const SIMD_EXCEPTION: u32 = 1;
pub const X87_EXCEPTION: u32 = 2;
pub const UNDEFINED: u32 = 3;

/// A stub's address and signature.
pub type StubFunction = unsafe extern "sysv64" fn(cpu: *mut Cpu, memory: *mut u8, op: *const Op) -> u32;

const YMM: u32 = (offset_of!(Cpu, vector) + offset_of!(VectorState, ymm)) as u32;
const MXCSR: u32 = (offset_of!(Cpu, vector) + offset_of!(VectorState, mxcsr)) as u32;
pub(super) const MXCSR_SHARED: u32 = (offset_of!(Cpu, vector) + offset_of!(VectorState, mxcsr_shared)) as u32;
const HOST_MXCSR: u32 = (offset_of!(Cpu, vector) + offset_of!(VectorState, host_mxcsr)) as u32;
const ARITHMETIC: u32 = offset_of!(Cpu, arithmetic) as u32;
const _: () = assert!(offset_of!(Cpu, gpr) == 0);

/// Where slots are in an op: register numbers, times 16 for XMM and YMM.
const SLOTS: [u8; 4] = [
    offset_of!(Op, first) as u8,
    offset_of!(Op, second) as u8,
    offset_of!(Op, extra) as u8,
    offset_of!(Op, extra2) as u8,
];

/// Slots that an instruction with a memory operand may use; the fourth holds the operand's size.
pub const SLOTS_WITH_MEMORY: usize = 3;

/// What a stub needs and what its op must hold.
pub struct Form {
    /// The register numbers for the slots.
    pub slots: [u8; 4],
    /// Where the stub is.
    pub address: u64,
    /// The stub with an entry before it, where one was asked for.
    pub whole: Option<Handler>,
}

struct Stubs {
    area: CodeArea,
    known: HashMap<[u8; 16], u64>,
    known_whole: HashMap<[u8; 16], Handler>,
}

static STUBS: OnceLock<Option<Mutex<Stubs>>> = OnceLock::new();

/// Makes the code area and takes SIGFPE over, once a process. An engine calls it before it confines itself, to hear of a host that refuses;
/// else the first vector instruction does.
pub fn prepare() -> io::Result<()> {
    let mut error = None;
    let stubs = STUBS.get_or_init(|| match make_stubs() {
        Ok(stubs) => Some(Mutex::new(stubs)),
        Err(cause) => {
            error = Some(cause);
            None
        }
    });
    match (stubs, error) {
        (Some(_), _) => Ok(()),
        (None, Some(cause)) => Err(cause),
        (None, None) => Err(io::Error::other("executable memory was refused before")),
    }
}

fn make_stubs() -> io::Result<Stubs> {
    let mut area = CodeArea::new()?;
    let full = || io::Error::from(io::ErrorKind::StorageFull);
    let simd = area.add(&landing(true, SIMD_EXCEPTION)).ok_or_else(full)?;
    let x87 = area.add(&landing(false, X87_EXCEPTION)).ok_or_else(full)?;
    let undefined = area.add(&landing(false, UNDEFINED)).ok_or_else(full)?;
    signal::install(area.executable_range(), signal::Landings { x87, simd, undefined })?;
    Ok(Stubs { area, known: HashMap::new(), known_whole: HashMap::new() })
}

/// The end of a stub whose instruction faulted.
fn landing(simd: bool, code: u32) -> Vec<u8> {
    let mut emitter = Emitter::default();
    // A SIMD exception comes only with control bits of the guest's own. Otherwise the host's register may hold flags of the guest's.
    let skip = (!simd).then(|| emitter.jump_if_shared());
    if simd {
        emitter.with_displacement(&[0x0f, 0xae, 0x9f], MXCSR);
    }
    emitter.with_displacement(&[0x0f, 0xae, 0x97], HOST_MXCSR);
    if let Some(skip) = skip {
        emitter.land(skip);
    }
    if std::arch::is_x86_feature_detected!("avx") {
        emitter.bytes(&[0xc5, 0xf8, 0x77]);
    }
    if code == UNDEFINED {
        emitter.jump_to(refused as *const () as u64);
    } else {
        emitter.bytes(&[0xb8]);
        emitter.bytes(&code.to_le_bytes());
        emitter.bytes(&[0xc3]);
    }
    emitter.code
}

/// The host refused an instruction. A handler's answer and a stub's are the same here, as both kinds of code land here.
extern "sysv64" fn refused(cpu: &mut Cpu) -> u32 {
    const { assert!(UNDEFINED == Flow::Fault as u32) };
    let _ = cpu.raise_ud();
    UNDEFINED
}

/// Finds or makes the stub for an instruction, and with an entry the handler made of both. `None`: the instruction has a form that stubs do not know.
pub fn find(instruction: &Instruction, entry: Option<&Entry>) -> Option<Form> {
    let normalised = Normalised::new(instruction)?;
    prepare().ok()?;
    let stubs = STUBS.get()?.as_ref()?;
    let mut stubs = stubs.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let address = match stubs.known.get(&normalised.key) {
        Some(&address) => address,
        None => {
            let code = normalised.assemble(None)?;
            let address = stubs.area.add(&code)?;
            stubs.known.insert(normalised.key, address);
            address
        }
    };
    let whole = match (entry, stubs.known_whole.get(&normalised.key)) {
        (None, _) => None,
        (Some(_), Some(&handler)) => Some(handler),
        // Entries only make things quicker: half of the area is kept for what must be there.
        (Some(_), None) if stubs.area.used() > AREA_BYTES / 2 => None,
        (Some(entry), None) => {
            let code = normalised.assemble(Some(entry))?;
            let address = stubs.area.add(&code)?;
            // SAFETY: code with an entry is a handler: it takes the CPU in RDI and the op in RSI and gives a `Flow` in AL.
            let handler = unsafe { std::mem::transmute::<u64, Handler>(address) };
            stubs.known_whole.insert(normalised.key, handler);
            Some(handler)
        }
    };
    Some(Form { slots: normalised.slots, address, whole })
}

/// Bytes of the stub for an instruction.
#[cfg(test)]
pub fn size_of_stub(instruction: &Instruction) -> Option<usize> {
    Normalised::new(instruction)?.assemble(None).map(|code| code.len())
}

/// An instruction with its operands moved to where stubs have them.
struct Normalised {
    instruction: Instruction,
    slots: [u8; 4],
    /// The register in the instruction that stands for each slot.
    slot_registers: [Register; 4],
    slot_count: usize,
    /// The instruction's bytes, its length last.
    key: [u8; 16],
}

impl Normalised {
    fn new(original: &Instruction) -> Option<Self> {
        let mut instruction = *original;
        instruction.set_code_size(CodeSize::Code64);
        instruction.set_segment_prefix(Register::None);
        instruction.set_has_rep_prefix(false);
        instruction.set_has_repne_prefix(false);
        let mut slots = [0; 4];
        let mut slot_registers = [Register::None; 4];
        let mut slot_count = 0;
        let mut general = 0;
        let mut vectors = 0;
        let mut has_memory = false;
        for operand in 0..instruction.op_count() {
            match instruction.op_kind(operand) {
                OpKind::Register => {
                    let register = instruction.op_register(operand);
                    // The implicit XMM0 of BLENDV and SHA256RNDS2 is listed as an operand but is no part of the encoding.
                    let implicit = register == Register::XMM0
                        && operand == 2
                        && instruction.op_count() == 3
                        && instruction.code().encoding() == EncodingKind::Legacy;
                    let replacement = if implicit || register.is_mm() || register.is_st() {
                        continue;
                    } else if register.is_xmm() || register.is_ymm() {
                        vectors += 1;
                        let first = if register.is_xmm() { Register::XMM0 } else { Register::YMM0 };
                        *slots.get_mut(slot_count)? = (register.number() * 16) as u8;
                        first + vectors
                    } else if register.is_gpr32() || register.is_gpr64() {
                        general += 1;
                        let first = if register.is_gpr32() { Register::R9D } else { Register::R9 };
                        *slots.get_mut(slot_count)? = register.number() as u8;
                        first + general
                    } else {
                        return None;
                    };
                    slot_registers[slot_count] = replacement;
                    slot_count += 1;
                    instruction.set_op_register(operand, replacement);
                }
                OpKind::Memory => {
                    has_memory = true;
                    instruction.set_memory_base(Register::RSI);
                    instruction.set_memory_index(Register::None);
                    instruction.set_memory_index_scale(1);
                    instruction.set_memory_displacement64(0);
                    instruction.set_memory_displ_size(0);
                }
                OpKind::Immediate8 => {}
                _ => return None,
            }
        }
        if vectors > 4 || general > 2 || has_memory && slot_count > SLOTS_WITH_MEMORY {
            return None;
        }
        let mut encoder = Encoder::new(64);
        let len = encoder.encode(&instruction, 0).ok()?;
        let bytes = encoder.take_buffer();
        let mut key = [0; 16];
        key.get_mut(..len)?.copy_from_slice(&bytes);
        key[15] = len as u8;
        Some(Normalised { instruction, slots, slot_registers, slot_count, key })
    }

    fn slot_of(&self, register: Register) -> Option<usize> {
        self.slot_registers[..self.slot_count].iter().position(|slot| slot.full_register() == register.full_register())
    }

    fn assemble(&self, entry: Option<&Entry>) -> Option<Vec<u8>> {
        let vex = self.instruction.code().encoding() == EncodingKind::VEX;
        let mut info = InstructionInfoFactory::new();
        let used = info.info(&self.instruction).used_registers().to_vec();
        let mut emitter = Emitter::default();
        let computes = uses_mxcsr(&self.instruction);
        let to_slow = entry.map(|entry| emitter.enter(entry, computes));
        let mut implicit_loads = Vec::new();
        let mut stores = Vec::new();
        let mut implicit_stores = Vec::new();
        let wide = (0..self.instruction.op_count()).any(|operand| self.instruction.op_register(operand).is_ymm());
        for register in &used {
            let name = register.register();
            let full = name.full_register();
            let (reads, writes) = match register.access() {
                OpAccess::Read | OpAccess::CondRead => (true, false),
                OpAccess::Write => (false, true),
                OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite => (true, true),
                _ => (false, false),
            };
            if name.is_mm() || name.is_st() || full == Register::RSI {
                continue;
            }
            // Legacy encodings keep the parts of a destination that they do not name.
            let reads = reads || writes && !vex;
            match self.slot_of(name) {
                Some(slot) => {
                    if reads {
                        emitter.load_slot(slot, name, vex);
                    }
                    if writes {
                        stores.push((slot, name));
                    }
                }
                None if name.is_vector_register() && name.number() == 0 => {
                    if reads {
                        emitter.load_xmm0(vex);
                    }
                    if writes {
                        implicit_stores.push(full);
                    }
                }
                None if matches!(full, Register::RAX | Register::RCX | Register::RDX) => {
                    if reads {
                        implicit_loads.push(full);
                    }
                    if writes {
                        implicit_stores.push(full);
                    }
                }
                None => return None,
            }
        }
        // RDX then no longer points to the op.
        if implicit_loads.contains(&Register::RDX) && !stores.is_empty() {
            return None;
        }
        let reads_flags = self.instruction.rflags_read() != RflagsBits::NONE;
        let writes_flags = self.instruction.rflags_modified() & ARITHMETIC_RFLAGS != RflagsBits::NONE;
        // The address of a slot needs RAX; no instruction has results in RAX and in a slot.
        let general_store = stores.iter().any(|(_, name)| name.is_gpr());
        if general_store && implicit_stores.contains(&Register::RAX) {
            return None;
        }
        let execute = |emitter: &mut Emitter, own_mxcsr: bool| {
            if own_mxcsr {
                emitter.with_displacement(&[0x0f, 0xae, 0x97], MXCSR);
            }
            if reads_flags || writes_flags {
                // movzx eax, word [flags]; add al, 127 (OF from bit 0); sahf
                emitter.with_displacement(&[0x0f, 0xb7, 0x87], ARITHMETIC);
                emitter.bytes(&[0x04, 0x7f, 0x9e]);
            }
            for &register in &implicit_loads {
                emitter.load_implicit(register);
            }
            emitter.bytes(&self.key[..usize::from(self.key[15])]);
            for &(slot, name) in &stores {
                emitter.store_slot(slot, name, vex);
            }
            for &register in &implicit_stores {
                emitter.store_implicit(register, vex);
            }
            if writes_flags {
                // lahf; seto al; mov [flags], ax
                emitter.bytes(&[0x9f, 0x0f, 0x90, 0xc0]);
                emitter.with_displacement(&[0x66, 0x89, 0x87], ARITHMETIC);
            }
            if own_mxcsr {
                emitter.with_displacement(&[0x0f, 0xae, 0x9f], MXCSR);
                emitter.with_displacement(&[0x0f, 0xae, 0x97], HOST_MXCSR);
            }
            if wide {
                emitter.bytes(&[0xc5, 0xf8, 0x77]);
            }
            emitter.bytes(&[0x31, 0xc0, 0xc3]);
        };
        if computes && entry.is_none() {
            let shared = emitter.jump_if_shared();
            execute(&mut emitter, true);
            emitter.land(shared);
        }
        execute(&mut emitter, false);
        if let (Some(entry), Some(jumps)) = (entry, to_slow) {
            jumps.into_iter().for_each(|jump| emitter.land(jump));
            // mov rsi, rdx
            emitter.bytes(&[0x48, 0x89, 0xd6]);
            emitter.jump_to(entry.slow as *const () as u64);
        }
        Some(emitter.code)
    }
}

const ARITHMETIC_RFLAGS: u32 =
    RflagsBits::CF | RflagsBits::PF | RflagsBits::AF | RflagsBits::ZF | RflagsBits::SF | RflagsBits::OF;

/// Whether the instruction computes with floating-point numbers. Those that only move or combine bits are listed; anything else counts.
fn uses_mxcsr(instruction: &Instruction) -> bool {
    if instruction.code().cpuid_features().iter().all(|feature| {
        let name = format!("{feature:?}");
        name.starts_with("FPU") || name == "MMX"
    }) {
        return false;
    }
    let name = format!("{:?}", instruction.mnemonic()).to_lowercase();
    let name = name.strip_prefix('v').unwrap_or(&name);
    const BITS_ONLY: [&str; 18] = [
        "p",
        "mov",
        "aes",
        "sha",
        "and",
        "or",
        "xor",
        "unpck",
        "blend",
        "insert",
        "extract",
        "broadcast",
        "zero",
        "mask",
        "lddqu",
        "test",
        "emms",
        "gf2p8",
    ];
    !BITS_ONLY.iter().any(|prefix| name.starts_with(prefix))
}

/// Writes the few instructions around the one that matters. Registers: RDI the CPU, RDX the op, RAX scratch.
#[derive(Default)]
pub(super) struct Emitter {
    code: Vec<u8>,
}

impl Emitter {
    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        self.code.extend_from_slice(bytes);
    }

    pub(super) fn with_displacement(&mut self, bytes: &[u8], displacement: u32) {
        self.bytes(bytes);
        self.bytes(&displacement.to_le_bytes());
    }

    /// cmp dword [shared], 0; jne to where [`Emitter::land`] says
    fn jump_if_shared(&mut self) -> usize {
        self.with_displacement(&[0x83, 0xbf], MXCSR_SHARED);
        self.bytes(&[0, 0x0f, 0x85, 0, 0, 0, 0]);
        self.code.len()
    }

    /// Makes the jump that ended at `from` lead here.
    fn land(&mut self, from: usize) {
        let distance = (self.code.len() - from) as u32;
        self.code[from - 4..from].copy_from_slice(&distance.to_le_bytes());
    }

    /// jmp to an address, by way of RAX
    fn jump_to(&mut self, address: u64) {
        self.bytes(&[0x48, 0xb8]);
        self.bytes(&address.to_le_bytes());
        self.bytes(&[0xff, 0xe0]);
    }

    /// jcc to where [`Emitter::land`] says
    pub(super) fn jump_if(&mut self, condition: u8) -> usize {
        self.bytes(&[0x0f, 0x80 | condition, 0, 0, 0, 0]);
        self.code.len()
    }

    /// movzx eax, byte [rdx + slot]
    fn slot_number(&mut self, slot: usize) {
        self.bytes(&[0x0f, 0xb6, 0x42, SLOTS[slot]]);
    }

    /// (v)movups of `register` with [rdi + rax * 2 + YMM]
    fn vector_slot(&mut self, opcode: u8, register: Register, vex: bool, wide: bool) {
        match (vex, wide) {
            (false, _) => self.bytes(&[0x0f]),
            (true, false) => self.bytes(&[0xc5, 0xf8]),
            (true, true) => self.bytes(&[0xc5, 0xfc]),
        }
        self.with_displacement(&[opcode, 0x84 | (register.number() as u8 & 7) << 3, 0x47], YMM);
    }

    fn load_slot(&mut self, slot: usize, register: Register, vex: bool) {
        self.slot_number(slot);
        if register.is_gpr() {
            // mov r10 or r11, [rdi + rax * 8]
            let number = register.full_register().number() as u8;
            self.bytes(&[0x4c, 0x8b, 0x04 | (number & 7) << 3, 0xc7]);
        } else {
            self.vector_slot(0x10, register, vex, register.is_ymm());
        }
    }

    fn store_slot(&mut self, slot: usize, register: Register, vex: bool) {
        self.slot_number(slot);
        if register.is_gpr() {
            let number = register.full_register().number() as u8;
            self.bytes(&[0x4c, 0x89, 0x04 | (number & 7) << 3, 0xc7]);
        } else {
            // A VEX instruction clears what it does not write.
            self.vector_slot(0x11, register, vex, vex);
        }
    }

    fn load_xmm0(&mut self, vex: bool) {
        self.bytes(if vex { &[0xc5, 0xf8] } else { &[0x0f] });
        self.with_displacement(&[0x10, 0x87], YMM);
    }

    /// mov rax, rcx or rdx, [rdi + 8 * number]
    fn load_implicit(&mut self, register: Register) {
        let number = register.number() as u8;
        self.bytes(&[0x48, 0x8b, 0x47 | number << 3, number * 8]);
    }

    fn store_implicit(&mut self, register: Register, vex: bool) {
        let number = register.number() as u8;
        if register.is_gpr() {
            self.bytes(&[0x48, 0x89, 0x47 | number << 3, number * 8]);
        } else {
            self.bytes(if vex { &[0xc5, 0xfc] } else { &[0x0f] });
            self.with_displacement(&[0x11, 0x87], YMM);
        }
    }
}
