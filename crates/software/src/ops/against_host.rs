//! Random general-purpose instructions, run by the engine and by the host itself, with the same registers, flags and memory.
//!
//! The seed is printed on a failure; `POLDER_SEED` takes it back and `POLDER_CASES` sets the number of cases. No instruction here uses the stack
//! pointer or jumps, so the host side is a stub in this process; divisions that fault in the engine are left out.

use std::time::{SystemTime, UNIX_EPOCH};

use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpKind, Register};

use crate::cpu::{CodeSize, RCX, RDI, RSI, RSP};
use crate::flags;
use crate::lower::{CodeContext, general_purpose};
use crate::testbench::{CODE, DATA, Stop, TestBench};

/// xorshift64*: small, and the same everywhere.
pub struct Random(pub u64);

impl Random {
    /// The next 64 bits.
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 32) % limit
    }

    /// Numbers near the edges as often as any others.
    pub fn value(&mut self) -> u64 {
        let edges =
            [0, 1, 0x7f, 0x80, 0xff, 0x7fff, 0x8000, 0xffff, 0x7fff_ffff, 0x8000_0000, 0xffff_ffff, 1 << 63, u64::MAX];
        match self.below(4) {
            0 => edges[self.below(edges.len() as u64) as usize],
            1 => self.next() >> self.below(64),
            2 => edges[self.below(edges.len() as u64) as usize].wrapping_add(self.below(5)).wrapping_sub(2),
            _ => self.next(),
        }
    }

    /// Something that often is an instruction.
    pub fn bytes(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let vex = self.below(8) == 0;
        if !vex {
            for prefix in [0x66, 0x67, 0xf2, 0xf3, 0xf0] {
                if self.below(if prefix == 0x66 { 4 } else { 12 }) == 0 {
                    bytes.push(prefix);
                }
            }
            if self.below(2) == 0 {
                bytes.push(0x40 | self.below(16) as u8);
            }
        }
        match self.below(8) {
            _ if vex => {
                // Three-byte VEX in maps 1 to 3, with L = 0.
                let map = 2 + self.below(2) as u8;
                bytes.extend([0xc4, 0xe0 & self.next() as u8 | map, self.next() as u8 & 0xfb]);
                bytes.push(if map == 3 { 0xf0 } else { 0xf0 | self.next() as u8 & 0xf });
                if map == 2 {
                    bytes[3] = [0xf2, 0xf3, 0xf5, 0xf6, 0xf7][self.below(5) as usize];
                }
            }
            0..=3 => bytes.push(self.next() as u8),
            4..=6 => bytes.extend([0x0f, self.next() as u8]),
            _ => bytes.extend([0x0f, 0x38, 0xf0 | self.next() as u8 & 0xf]),
        }
        for _ in 0..10 {
            bytes.push(self.value() as u8);
        }
        bytes.truncate(15);
        bytes
    }
}

/// Runs one instruction on the host. Registers in x86's order; RSP is not loaded.
struct Host {
    page: *mut u8,
}

const STATE_OFFSET: usize = 2048;
const FLAGS_OFFSET: usize = STATE_OFFSET + 16 * 8;
const SAVED_FLAGS_OFFSET: usize = FLAGS_OFFSET + 8;

impl Host {
    fn new() -> Host {
        use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
        let all = ProtFlags::READ | ProtFlags::WRITE | ProtFlags::EXEC;
        // SAFETY: a fresh page, and a range that nothing of this process occupies (FIXED_NOREPLACE).
        unsafe {
            let page = mmap_anonymous(std::ptr::null_mut(), 4096, all, MapFlags::PRIVATE).unwrap();
            let fixed = MapFlags::PRIVATE | MapFlags::FIXED_NOREPLACE;
            mmap_anonymous(DATA as *mut _, 0x10000, ProtFlags::READ | ProtFlags::WRITE, fixed).unwrap();
            Host { page: page.cast() }
        }
    }

    fn run(&self, instruction: &[u8], gpr: &mut [u64; 16], rflags: &mut u64) {
        let mut code: Vec<u8> = vec![0x53, 0x55, 0x41, 0x54, 0x41, 0x55, 0x41, 0x56, 0x41, 0x57];
        let relative = |code: &mut Vec<u8>, opcode: &[u8], target: usize| {
            code.extend(opcode);
            let next = code.len() + 4;
            code.extend((target as i32 - next as i32).to_le_bytes());
        };
        code.push(0x9c);
        relative(&mut code, &[0x8f, 0x05], SAVED_FLAGS_OFFSET);
        relative(&mut code, &[0xff, 0x35], FLAGS_OFFSET);
        code.push(0x9d);
        let registers = || (0..16u8).filter(|&number| usize::from(number) != RSP);
        for number in registers() {
            let opcode = [0x48 | (number >> 3) << 2, 0x8b, (number & 7) << 3 | 5];
            relative(&mut code, &opcode, STATE_OFFSET + 8 * usize::from(number));
        }
        code.extend(instruction);
        for number in registers() {
            let opcode = [0x48 | (number >> 3) << 2, 0x89, (number & 7) << 3 | 5];
            relative(&mut code, &opcode, STATE_OFFSET + 8 * usize::from(number));
        }
        code.push(0x9c);
        relative(&mut code, &[0x8f, 0x05], FLAGS_OFFSET);
        relative(&mut code, &[0xff, 0x35], SAVED_FLAGS_OFFSET);
        code.push(0x9d);
        code.extend([0x41, 0x5f, 0x41, 0x5e, 0x41, 0x5d, 0x41, 0x5c, 0x5d, 0x5b, 0xc3]);
        assert!(code.len() < STATE_OFFSET);
        // SAFETY: the page is ours, readable, writable and executable; the stub keeps the calling convention. The instruction under
        // test touches memory only in the data range, where `place_operands` has led it.
        unsafe {
            std::ptr::copy_nonoverlapping(code.as_ptr(), self.page, code.len());
            let state: *mut u64 = self.page.add(STATE_OFFSET).cast();
            std::ptr::copy_nonoverlapping(gpr.as_ptr(), state, 16);
            state.add(16).write(*rflags);
            let stub: extern "C" fn() = std::mem::transmute(self.page);
            stub();
            std::ptr::copy_nonoverlapping(state, gpr.as_mut_ptr(), 16);
            *rflags = state.add(16).read();
        }
    }

    fn data(&mut self) -> &mut [u8] {
        // SAFETY: mapped by `new`; the test is the only user.
        unsafe { std::slice::from_raw_parts_mut(DATA as *mut u8, 0x10000) }
    }
}

/// Whether the instruction can be tested so; sets registers that lead its memory operands into the data.
fn place_operands(instruction: &Instruction, random: &mut Random, gpr: &mut [u64; 16]) -> bool {
    let excluded = matches!(
        instruction.mnemonic(),
        Mnemonic::Rdrand
            | Mnemonic::Rdseed
            | Mnemonic::Rdpid
            | Mnemonic::Clflush
            | Mnemonic::Clflushopt
            | Mnemonic::Clwb
            | Mnemonic::Enter
            // With REX.B this is XCHG to processors and PAUSE to the decoder.
            | Mnemonic::Pause
            | Mnemonic::Leave
            | Mnemonic::Cmpxchg16b
    );
    if excluded || instruction.flow_control() != FlowControl::Next || instruction.is_stack_instruction() {
        return false;
    }
    let mut factory = InstructionInfoFactory::new();
    let info = factory.info(instruction);
    if info.used_registers().iter().any(|used| used.register().full_register() == Register::RSP) {
        return false;
    }
    if matches!(instruction.segment_prefix(), Register::FS | Register::GS) {
        return false;
    }
    let middle = DATA + 0x8000 + random.below(0x1010);
    if instruction.is_string_instruction() {
        gpr[RSI] = middle;
        gpr[RDI] = DATA + 0x8000 + random.below(0x1010);
        gpr[RCX] = random.below(40);
        return instruction.memory_segment() != Register::FS;
    }
    if (0..instruction.op_count()).any(|operand| instruction.op_kind(operand) == OpKind::Memory) {
        let (base, index) = (instruction.memory_base(), instruction.memory_index());
        if instruction.mnemonic() == Mnemonic::Lea {
            return !matches!(base, Register::RIP | Register::EIP);
        }
        if instruction.mnemonic() == Mnemonic::Xlatb {
            gpr[3] = middle;
            return true;
        }
        let is_bit_test =
            matches!(instruction.mnemonic(), Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc);
        if is_bit_test && instruction.op1_kind() == OpKind::Register {
            let number = instruction.op1_register().full_register().number();
            gpr[number] = (random.next() as i64 >> 50) as u64;
        }
        if !base.is_gpr() || base.full_register() == index.full_register() {
            return false;
        }
        let scaled = if index.is_gpr() {
            let value = gpr[index.full_register().number()];
            let value = if index.is_gpr32() { value & 0xffff_ffff } else { value };
            value.wrapping_mul(u64::from(instruction.memory_index_scale()))
        } else {
            0
        };
        let wanted = middle.wrapping_sub(scaled).wrapping_sub(instruction.memory_displacement64());
        gpr[base.full_register().number()] = wanted;
        if is_bit_test && instruction.op1_kind() == OpKind::Register {
            // The base must not be the bit's number.
            return instruction.op1_register().full_register() != base.full_register();
        }
        // A register that is also written as an operand may stay; only its value here matters.
    }
    true
}

/// A number from the environment.
pub fn variable(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| text.parse().ok())
}

/// POLDER_SEED, which takes a run back, or the time; printed.
pub fn seed() -> u64 {
    let time = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |time| time.as_nanos() as u64);
    let seed = variable("POLDER_SEED").unwrap_or_else(time);
    println!("POLDER_SEED={seed}");
    seed
}

#[test]
fn general_purpose_instructions_do_what_the_host_does() {
    let seed = variable("POLDER_SEED").unwrap_or(0x00c0_ffee);
    let cases = variable("POLDER_CASES").unwrap_or(200_000);
    let mut random = Random(seed | 1);
    let mut host = Host::new();
    let mut bench = TestBench::new();
    let mut tested = 0u64;
    let mut kinds = std::collections::BTreeMap::new();
    for case in 0..cases {
        let bytes = random.bytes();
        let instruction = Decoder::with_ip(64, &bytes, CODE, DecoderOptions::NONE).decode();
        let mut gpr: [u64; 16] = std::array::from_fn(|_| random.value());
        gpr[RSP] = 0;
        if instruction.is_invalid() || !place_operands(&instruction, &mut random, &mut gpr) {
            continue;
        }
        let context = CodeContext { code: CodeSize::Bits64, block_rip: CODE };
        if !general_purpose(&instruction, context) {
            continue;
        }
        let bytes = &bytes[..instruction.len()];
        let mut rflags = random.next() & (flags::ARITHMETIC | flags::DF) | 2;
        if rflags & flags::DF != 0 && !instruction.is_string_instruction() {
            rflags &= !flags::DF;
        }
        let data: Vec<u8> = (0..0x200).flat_map(|_| random.value().to_le_bytes()).collect();
        let data_at = DATA + 0x8000;
        let window = 0x8000 - 0x400..0x8000 + 0x2000;
        host.data()[window.clone()].fill(0x5a);
        host.data()[0x8000..0x9000].copy_from_slice(&data);
        bench.write(DATA + window.start as u64, &vec![0x5a; window.len()]);
        bench.write(data_at, &data);
        bench.cpu.gpr[..16].copy_from_slice(&gpr);
        bench.cpu.set_rflags(rflags);
        bench.write(CODE, bytes);
        bench.cpu.rip = CODE;
        // A repeated string instruction may need more than one step.
        let mut stop = Stop::Limit;
        while stop == Stop::Limit && bench.cpu.rip == CODE {
            stop = bench.step(1);
        }
        if let Stop::Fault(fault) = stop {
            let divides = matches!(instruction.mnemonic(), Mnemonic::Div | Mnemonic::Idiv);
            assert!(divides && fault.vector == 0, "seed {seed} case {case}: {instruction} {bytes:02x?}: {fault:?}");
            continue;
        }
        let mut expected = gpr;
        let mut expected_flags = rflags;
        host.run(bytes, &mut expected, &mut expected_flags);
        let undefined = [
            (iced_x86::RflagsBits::CF, flags::CF),
            (iced_x86::RflagsBits::PF, flags::PF),
            (iced_x86::RflagsBits::AF, flags::AF),
            (iced_x86::RflagsBits::ZF, flags::ZF),
            (iced_x86::RflagsBits::SF, flags::SF),
            (iced_x86::RflagsBits::OF, flags::OF),
        ]
        .iter()
        .filter(|&&(bit, _)| instruction.rflags_undefined() & bit != 0)
        .fold(0, |mask, &(_, flag)| mask | flag);
        let compared = (flags::ARITHMETIC | flags::DF) & !undefined;
        let got = (&bench.cpu.gpr[..16], bench.cpu.rflags() & compared);
        let want = (&expected[..], expected_flags & compared);
        assert!(
            got == want,
            "seed {seed} case {case}: {instruction} {bytes:02x?}\nbefore {gpr:x?} {rflags:x}\ngot    {:x?} {:x}\nwant   {:x?} {:x}",
            got.0,
            got.1,
            want.0,
            want.1
        );
        let mut memory = vec![0; window.len()];
        bench.cpu.services.memory.read(polder_memory::GuestAddress(DATA + window.start as u64), &mut memory).unwrap();
        assert!(
            memory == host.data()[window.clone()],
            "seed {seed} case {case}: {instruction} {bytes:02x?}: memory differs"
        );
        assert_eq!(bench.cpu.rip, CODE + bytes.len() as u64, "{instruction}");
        tested += 1;
        *kinds.entry(format!("{:?}", instruction.mnemonic())).or_insert(0u32) += 1;
    }
    assert!(tested > cases / 20, "only {tested} of {cases} cases ran");
    if variable("POLDER_CASES").is_some() {
        println!("{tested} cases: {kinds:?}");
    }
}
