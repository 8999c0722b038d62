//! The host CPU as the oracle: random user-level instructions with random registers, flags, vectors, x87 state and memory run natively and
//! in the engine; everything is compared, faults included.
//!
//! `POLDER_SEED` takes a run back, `POLDER_CASES` sets the number of cases (a fast slice by default, millions at night), `POLDER_CASE`
//! runs a single case of the seed, `POLDER_ONLY` keeps the codes whose name contains it.

mod generate;
mod native;
mod random;

use std::collections::BTreeMap;
use std::sync::Mutex;

use generate::{BRANCH_TARGET, Generated, Generator, START};
use iced_x86::{Code, FlowControl, Mnemonic, OpKind, RflagsBits};
use native::{DATA_PAGES, GS_BASE, NO_FAULT, Native, PAGE, STATE, State};
use polder_software::CpuModel;
use polder_software::testbench::{CODE, CodeSize, DATA, STACK, Stop, TestBench};
use random::Random;

/// Cases of the fast slice.
const CASES: u64 = 500_000;
/// Cases of the nightly form.
const NIGHTLY_CASES: u64 = 5_000_000;
/// Differences to show before the run ends.
const DIFFERENCES_MAX: usize = 60;
/// Flags that instructions of user mode set: the arithmetic ones and DF.
const FLAGS: u64 = 0xcd5;

fn number_from(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| {
        let text = text.trim();
        text.strip_prefix("0x").map_or_else(|| text.parse().ok(), |hex| u64::from_str_radix(hex, 16).ok())
    })
}

/// Random registers.
fn random_state(random: &mut Random, generated: &Generated) -> State {
    // SAFETY: a state is plain integers.
    let mut state: State = unsafe { std::mem::zeroed() };
    for register in &mut state.gpr {
        *register = random.value();
    }
    // Wherever the stack pointer is not part of the test, signals need none: they have a stack of their own.
    state.gpr[4] = STACK - 0x100;
    for &(register, value) in &generated.registers {
        state.gpr[register] = value;
    }
    state.flags = random.next() & FLAGS & !0x400 | 0x202 | if random.chance(10) { 0x400 } else { 0 };
    let same = random.chance(5);
    for register in &mut state.ymm {
        *register = [random.value(), random.value(), random.value(), random.value()];
    }
    if same {
        state.ymm[1] = state.ymm[0];
    }
    if let Some(register) = generated.index_register {
        for word in &mut state.ymm[register] {
            *word = random.below(0x40) | random.below(0x40) << 32;
            if random.chance(30) {
                *word &= 0x3f;
            }
        }
    }
    let fx = &mut state.fx;
    let control: u16 = if random.chance(85) { 0x7f } else { 0x40 | random.next() as u16 & 0x3f };
    let control = control | random.next() as u16 & 0xf00;
    let exceptions = if random.chance(92) { 0 } else { random.next() as u16 & 0x3f };
    let mut status = random.next() as u16 & 0x7f00 | exceptions;
    if random.chance(60) {
        status &= !0x3800;
    }
    if exceptions & !control & 0x3f != 0 {
        status |= 0x8080;
    }
    fx[0..2].copy_from_slice(&control.to_le_bytes());
    fx[2..4].copy_from_slice(&status.to_le_bytes());
    fx[4] = match random.below(4) {
        0 => 0xff,
        1 => random.next() as u8,
        2 => 0,
        _ => 0xf0,
    };
    for register in 0..8 {
        fx[32 + 16 * register..42 + 16 * register].copy_from_slice(&random.x87_value());
    }
    let masks = if random.chance(85) { 0x1f80 } else { random.next() as u32 & 0x1f80 };
    let mxcsr = masks | random.next() as u32 & 0xe07f;
    let mxcsr = if random.chance(50) { masks } else { mxcsr };
    fx[24..28].copy_from_slice(&mxcsr.to_le_bytes());
    state
}

fn mxcsr_of(state: &State) -> u32 {
    u32::from_le_bytes([state.fx[24], state.fx[25], state.fx[26], state.fx[27]])
}

/// Puts a state into the engine.
fn set_engine(bench: &mut TestBench, state: &State) {
    let cpu = &mut bench.cpu;
    cpu.gpr[..16].copy_from_slice(&state.gpr);
    cpu.rip = START;
    cpu.set_rflags(state.flags);
    for (register, words) in cpu.vector.ymm.iter_mut().zip(&state.ymm) {
        register.0 = *words;
    }
    cpu.vector.set_mxcsr(mxcsr_of(state));
    cpu.vector.x87_image_mut().0[..160].copy_from_slice(&state.fx[..160]);
}

/// Flags that the manual leaves undefined after the instruction: the engine may differ there (a multiplication's SF, ZF, AF and PF differ
/// between vendors too).
fn undefined_flags(generated: &Generated) -> u64 {
    let undefined = generated.instruction.rflags_undefined();
    [
        (RflagsBits::CF, 0),
        (RflagsBits::PF, 2),
        (RflagsBits::AF, 4),
        (RflagsBits::ZF, 6),
        (RflagsBits::SF, 7),
        (RflagsBits::OF, 11),
    ]
    .into_iter()
    .filter(|(bit, _)| undefined & bit != 0)
    .fold(0, |mask, (_, position)| mask | 1 << position)
}

/// What differs, as lines of text. `ignored_flags`: translated code does not keep flags for exceptions that the code overwrites before it reads them.
#[allow(clippy::too_many_arguments)]
fn differences(
    bits: u32,
    ignored_flags: u64,
    bench: &mut TestBench,
    native: &mut Native,
    stop: Stop,
    state: &State,
    generated: &Generated,
) -> Vec<String> {
    let mut lines = Vec::new();
    let x87 = bench.x87();
    let mut compare = |name: String, engine: u64, host: u64| {
        if engine != host {
            lines.push(format!("  {name}: engine {engine:#x}, host {host:#x}"));
        }
    };
    let fault = match stop {
        Stop::Fault(exception) => Some(exception),
        _ => None,
    };
    let mut host_rip = state.rip;
    let mut host_vector = state.fault.vector;
    // A branch was taken: the page is full of breakpoints, and nothing is executable outside.
    let branched = generated.instruction.flow_control() != FlowControl::Next;
    if branched && host_vector == 3 {
        host_rip = host_rip.wrapping_sub(1);
        host_vector = NO_FAULT;
    } else if branched && host_vector == 14 && state.fault.address == state.rip && state.rip != START {
        host_vector = NO_FAULT;
    }
    // Hosts touch the parts of a long operand before they see that its end is beyond the segment's limit of 4 GiB.
    let beyond_limit = bits == 32 && host_vector == 14 && state.fault.address >= 0xffff_f000;
    if beyond_limit && fault.is_some_and(|exception| matches!(exception.vector, 12 | 13)) {
        return lines;
    }
    // Elements of a masked move that lie beyond the last address of 16 or 32 bits are at the first ones to some hosts (Zen 3). (A NOP stands
    // for a sequence.)
    let masked = matches!(
        generated.instruction.mnemonic(),
        Mnemonic::Vmaskmovps | Mnemonic::Vmaskmovpd | Mnemonic::Vpmaskmovd | Mnemonic::Vpmaskmovq
    );
    let wrapped = bits == 32 && host_vector == 14 && state.fault.address < 32;
    if wrapped && fault.is_some() && (masked || generated.instruction.code() == Code::Nopd) {
        return lines;
    }
    compare("vector".into(), fault.map_or(NO_FAULT, |exception| u64::from(exception.vector)), host_vector);
    compare("rip".into(), bench.cpu.rip, host_rip);
    if let (Some(exception), 14) = (fault, host_vector) {
        // Which part of a long operand the host touches first is its own affair. (A NOP stands for a sequence.)
        let long = matches!(
            generated.instruction.mnemonic(),
            Mnemonic::Frstor
                | Mnemonic::Fldenv
                | Mnemonic::Fnsave
                | Mnemonic::Fnstenv
                | Mnemonic::Maskmovq
                | Mnemonic::Maskmovdqu
                | Mnemonic::Vmaskmovdqu
        );
        let mask = if long || generated.instruction.code() == Code::Nopd { !0xfff } else { !0 };
        // As is which of two operands in memory: the engine begins with that of RSI, Zen 3 with that of RDI.
        let kinds = [generated.instruction.op0_kind(), generated.instruction.op1_kind()];
        let address_mask = match kinds {
            kinds if kinds.contains(&OpKind::MemoryESDI) => 0xffff,
            kinds if kinds.contains(&OpKind::MemoryESEDI) => 0xffff_ffff,
            _ => !0,
        };
        let compares = matches!(
            generated.instruction.code(),
            Code::Cmpsb_m8_m8 | Code::Cmpsw_m16_m16 | Code::Cmpsd_m32_m32 | Code::Cmpsq_m64_m64
        );
        let second = state.fault.address.wrapping_sub(state.gpr[7] & address_mask) < 8;
        let mask = if compares && second { 0 } else { mask };
        compare("fault address".into(), exception.detail & mask, state.fault.address & mask);
        // The kernel shows addresses from its TASK_SIZE_MAX on as present: that is a page below its own half (arch/x86/mm/fault.c).
        let mask = if state.fault.address >= 0x7fff_ffff_f000 { !1 } else { !0 };
        compare(
            "error code".into(),
            u64::from(exception.error_code.unwrap_or(0)) & mask,
            state.fault.error_code & mask,
        );
    }
    // What the upper halves of registers are outside 64-bit mode is undefined.
    let (registers, mask) = if bits == 64 { (16, !0) } else { (8, 0xffff_ffff) };
    for (number, (engine, host)) in bench.cpu.gpr.iter().zip(state.gpr).enumerate().take(registers) {
        compare(format!("gpr {number}"), engine & mask, host & mask);
    }
    let flags = FLAGS & !undefined_flags(generated) & !ignored_flags;
    compare("flags".into(), bench.cpu.rflags() & flags, state.flags & flags);
    // What of a gather's mask is left after a fault has meaning in its sign bits only.
    let gather_mask =
        (generated.index_register.is_some() && fault.is_some()).then(|| generated.instruction.op2_register().number());
    for (number, (engine, host)) in bench.cpu.vector.ymm.iter().zip(state.ymm).enumerate() {
        for (word, (engine, host)) in engine.0.iter().zip(host).enumerate() {
            let mask = if gather_mask == Some(number) { 0x8000_0000_0000_0000 } else { !0 };
            compare(format!("ymm {number} word {word}"), engine & mask, host & mask);
        }
    }
    compare("mxcsr".into(), u64::from(bench.cpu.vector.mxcsr()), u64::from(mxcsr_of(state)));
    // Neither the pointers nor MXCSR, which are bytes 6 to 31.
    let bytes = |source: &[u8], at: usize, len: usize| {
        (0..len).fold(0u64, |value, index| value | u64::from(source[at + index]) << (8 * index))
    };
    if fault.is_some() && generated.instruction.mnemonic() == Mnemonic::Maskmovq {
        // The host has marked the registers as in use before it stores.
        return lines;
    }
    compare("x87 control, status, tags".into(), bytes(&x87, 0, 5), bytes(&state.fx, 0, 5));
    for register in 0..8 {
        let at = 32 + 16 * register;
        compare(format!("st({register}) mantissa"), bytes(&x87, at, 8), bytes(&state.fx, at, 8));
        compare(format!("st({register}) exponent"), bytes(&x87, at + 8, 2), bytes(&state.fx, at + 8, 2));
    }
    let mut engine_memory = [0; (DATA_PAGES * PAGE) as usize];
    let mut check_memory = |address: u64, len: usize| {
        let engine = &mut engine_memory[..len];
        bench.read_into(address, engine);
        let host = native.memory(address, len);
        if engine != host {
            // Environments hold addresses, which are the engine's own affair.
            let pointers = match generated.instruction.mnemonic() {
                Mnemonic::Fnstenv | Mnemonic::Fnsave => {
                    let wide = !format!("{:?}", generated.instruction.code()).contains("14")
                        && !format!("{:?}", generated.instruction.code()).contains("94");
                    generated.target.map_or(0..0, |at| if wide { at + 12..at + 28 } else { at + 6..at + 14 })
                }
                _ => 0..0,
            };
            for (offset, (engine, host)) in (0..).zip(engine.iter().zip(host.iter())) {
                if engine != host && !pointers.contains(&(address + offset)) {
                    lines.push(format!("  memory {:#x}: engine {engine:#x}, host {host:#x}", address + offset));
                }
            }
            host.copy_from_slice(engine);
        }
    };
    check_memory(DATA, (DATA_PAGES * PAGE) as usize);
    check_memory(STACK - 0x400, 0x800);
    lines
}

/// Whether the engine stopped at an address that is mapped on the host only, or branched there: the host would go on. The engine runs
/// first, so a wild store is found before it reaches the process' own memory.
fn is_beyond_the_bench(stop: Stop, rip: u64) -> bool {
    let faulted =
        matches!(stop, Stop::Fault(exception) if exception.vector == 14 && native::only_the_host_has(exception.detail));
    faulted || !(CODE..CODE + PAGE).contains(&rip) && native::only_the_host_has(rip)
}

/// After a case that the engine ran alone: what it stored.
fn take_memory(bench: &TestBench, native: &mut Native) {
    for page in native::pages() {
        bench.read_into(page * PAGE, native.memory(page * PAGE, PAGE as usize));
    }
}

/// One test runs at a time: both use the same addresses.
static ALONE: Mutex<()> = Mutex::new(());

#[test]
fn the_engine_does_what_the_host_does_in_64_bit_mode() {
    compare_with_host(64, Unit::Instruction);
}

#[test]
fn the_engine_does_what_the_host_does_in_compatibility_mode() {
    compare_with_host(32, Unit::Instruction);
}

#[test]
fn sequences_in_blocks_do_what_the_host_does_in_64_bit_mode() {
    compare_with_host(64, Unit::Sequence);
}

#[test]
fn sequences_in_blocks_do_what_the_host_does_in_compatibility_mode() {
    compare_with_host(32, Unit::Sequence);
}

#[test]
fn translated_instructions_do_what_the_host_does() {
    compare_with_host(64, Unit::TranslatedInstruction);
}

#[test]
fn translated_sequences_do_what_the_host_does() {
    compare_with_host(64, Unit::TranslatedSequence);
}

/// A wild address may be one where the process that stands for the host has memory of its own: case 3935 of seed 0x6b039fff in 32-bit code
/// read the registers to be.
#[test]
fn a_wild_address_that_only_the_host_has_mapped_is_left_out() {
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let mut bench = TestBench::new();
    bench.enter_user_mode(CodeSize::Bits32, &native::pages(), GS_BASE);
    drop(TestBench::translating(polder_software::CODE_CACHE_BYTES_MIN));
    let _native = Native::new(32);
    let beyond = DATA + DATA_PAGES * PAGE;
    for (address, stopped, left_out) in [(DATA, false, false), (beyond, true, false), (STATE + 0xa00, true, true)] {
        // mov eax, [address]
        let mut code = [0xa1, 0, 0, 0, 0];
        code[1..].copy_from_slice(&(address as u32).to_le_bytes());
        bench.write(START, &code);
        bench.cpu.rip = START;
        let stop = bench.step(1);
        let found = (matches!(stop, Stop::Fault(_)), is_beyond_the_bench(stop, bench.cpu.rip));
        assert_eq!(found, (stopped, left_out), "{address:#x}");
    }
    // Case 2499142 of seed 0x6b03ba28 branched to where the kernel emulates system calls.
    assert!(is_beyond_the_bench(Stop::Limit, native::VSYSCALL + 0x9f0));
    assert!(!is_beyond_the_bench(Stop::Limit, beyond));
}

/// Case 4335668 of seed 0x6b03ba28 branched to the stack, where the host executes nothing.
#[test]
fn the_bench_executes_nothing_outside_its_code_page() {
    let mut bench = TestBench::new();
    bench.enter_user_mode(CodeSize::Bits64, &native::pages(), GS_BASE);
    for target in [STACK - 0x800, DATA + 0x100] {
        bench.write(target, &[0x90, 0xf4]);
        let mut code = [0xe9, 0, 0, 0, 0];
        code[1..].copy_from_slice(&(target.wrapping_sub(START + 5) as u32).to_le_bytes());
        bench.write(START, &code);
        bench.cpu.rip = START;
        let stop = bench.run(10);
        let fetch_failed =
            matches!(stop, Stop::Fault(exception) if exception.vector == 14 && exception.detail == target);
        assert!(fetch_failed, "{stop:?}");
    }
}

/// Processors store these pointers at different times; the interpreter is what translated code must agree with.
#[test]
fn translated_sequences_leave_the_x87_pointers_that_the_interpreter_leaves() {
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let Some(translated) = TestBench::translating(polder_software::CODE_CACHE_BYTES_DEFAULT) else {
        println!("the host lacks what translated code uses: not applicable");
        return;
    };
    let model = CpuModel::named(CpuModel::NEWEST, &[]).expect("the newest model");
    // The names of x87 codes start with it; a few others contain it.
    let generator = Generator::new(&model, 64, "f");
    let seed = number_from("POLDER_SEED").unwrap_or(1);
    let cases = number_from("POLDER_CASES").unwrap_or(CASES) / 20;
    println!("POLDER_SEED={seed:#x}, {cases} cases");
    let mut benches = [TestBench::new(), translated];
    for bench in &mut benches {
        bench.enter_user_mode(CodeSize::Bits64, &native::pages(), GS_BASE);
    }
    let mut moved = 0;
    for case in number_from("POLDER_CASE").map_or(0..cases, |case| case..case + 1) {
        let mut random = Random::new(seed.wrapping_add(case.wrapping_mul(0xd134_2543_de82_ef95)));
        let generated = generator.sequence(&mut random);
        let state = random_state(&mut random, &generated);
        let mut code = [0x90; 128];
        code[..generated.bytes.len()].copy_from_slice(&generated.bytes);
        code[generated.bytes.len()] = 0xf4;
        let [interpreter, translator] = benches.each_mut().map(|bench| {
            bench.write(CODE, &[0xcc; PAGE as usize]);
            bench.write(START, &code);
            set_engine(bench, &state);
            bench.cpu.vector.pointers = Default::default();
            let stop = bench.run(1000);
            bench.cpu.vector.retire();
            (stop, bench.cpu.rip, bench.cpu.vector.pointers)
        });
        assert_eq!(interpreter, translator, "POLDER_SEED={seed:#x} POLDER_CASE={case}: {:x?}", generated.bytes);
        moved += u64::from(interpreter.2 != Default::default());
    }
    let is_whole_run = number_from("POLDER_CASE").is_none();
    assert!(!is_whole_run || moved > cases / 4, "too few x87 instructions ran: {moved}");
}

/// What the host may not show of itself: selectors and the time-stamp counter.
#[test]
fn translated_code_reads_selectors_and_the_time_as_the_interpreter_does() {
    let Some(translated) = TestBench::translating(polder_software::CODE_CACHE_BYTES_DEFAULT) else {
        println!("the host lacks what translated code uses: not applicable");
        return;
    };
    // mov eax, cs; mov r10, ss; mov ecx, es; mov ebx, ecx; rdtsc; mov esi, eax; mov edi, edx; rdtscp; hlt
    const PROGRAM: [u8; 20] = [
        0x8c, 0xc8, 0x4d, 0x8c, 0xd2, 0x8c, 0xc1, 0x89, 0xcb, 0x0f, 0x31, 0x89, 0xc6, 0x89, 0xd7, 0x0f, 0x01, 0xf9,
        0xf4, 0x90,
    ];
    let [interpreter, translator] = [TestBench::new(), translated].map(|mut bench| {
        bench.cpu.tsc_aux = 0x8000_0007;
        bench.cpu.gpr[..16].fill(!0);
        let stop = bench.run_code(&PROGRAM, 1000);
        assert_eq!(stop, Stop::Halted);
        bench.cpu.gpr
    });
    let time = |high: u64, low: u64| {
        assert!(high >> 32 == 0 && low >> 32 == 0, "{high:x} {low:x}");
        high << 32 | low
    };
    let first = |gpr: &[u64; 32]| time(gpr[7], gpr[6]);
    let second = |gpr: &[u64; 32]| time(gpr[2], gpr[0]);
    for gpr in [interpreter, translator] {
        assert_eq!((gpr[1], gpr[3], gpr[10]), (0x8000_0007, 8, 0x18));
        assert!(first(&gpr) < second(&gpr));
    }
    // Each bench was switched on at its own time: both count from about zero.
    assert!(second(&interpreter).abs_diff(second(&translator)) < 1 << 40);
}

/// What a case consists of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unit {
    /// One instruction, run on its own.
    Instruction,
    /// A few instructions, run by the block loop as guests are.
    Sequence,
    /// One instruction, translated.
    TranslatedInstruction,
    /// A few instructions, translated.
    TranslatedSequence,
}

impl Unit {
    fn is_sequence(self) -> bool {
        matches!(self, Unit::Sequence | Unit::TranslatedSequence)
    }

    fn is_translated(self) -> bool {
        matches!(self, Unit::TranslatedInstruction | Unit::TranslatedSequence)
    }
}

fn compare_with_host(bits: u32, unit: Unit) {
    let _alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if !std::arch::is_x86_feature_detected!("avx") {
        println!("the host has no AVX: not applicable");
        return;
    }
    let model = CpuModel::named(CpuModel::NEWEST, &[]).expect("the newest model");
    let only = std::env::var("POLDER_ONLY").unwrap_or_default().to_lowercase();
    let generator = Generator::new(&model, bits, &only);
    let seed = number_from("POLDER_SEED").unwrap_or_else(|| {
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(1, |now| now.as_secs())
    });
    let single = number_from("POLDER_CASE");
    let nightly = std::env::var_os("POLDER_TEST_NIGHTLY").is_some();
    let cases = number_from("POLDER_CASES").unwrap_or(if nightly { NIGHTLY_CASES } else { CASES });
    // A sequence is worth several instructions.
    let cases = if unit.is_sequence() { cases / 4 } else { cases };
    println!("POLDER_SEED={seed:#x}, {cases} cases of {unit:?}, {} codes in {bits}-bit code", generator.codes());
    let bench = if unit.is_translated() {
        TestBench::translating(polder_software::CODE_CACHE_BYTES_DEFAULT)
    } else {
        Some(TestBench::new())
    };
    let Some(mut bench) = bench else {
        println!("the host lacks what translated code uses: not applicable");
        return;
    };
    bench.enter_user_mode(if bits == 64 { CodeSize::Bits64 } else { CodeSize::Bits32 }, &native::pages(), GS_BASE);
    bench.write(CODE, &[0xcc; PAGE as usize]);
    // The native half forwards what is not its own to handlers installed before it, once a process: the engine's and the translator's must be among them, whichever test
    // comes first.
    drop(TestBench::translating(polder_software::CODE_CACHE_BYTES_MIN));
    let mut native = Native::new(bits);
    let mut found: BTreeMap<String, (usize, u64)> = BTreeMap::new();
    let (mut shown, mut left_out) = (0, 0);
    // For a case that ends the process.
    let trace = std::env::var_os("POLDER_TRACE").is_some();
    for case in single.map_or(0..cases, |case| case..case + 1) {
        let mut random = Random::new(seed.wrapping_add(case.wrapping_mul(0xd134_2543_de82_ef95)));
        let generated = match unit {
            _ if unit.is_sequence() => generator.sequence(&mut random),
            _ => generator.generate(&mut random),
        };
        let mut state = random_state(&mut random, &generated);
        // Fresh bytes around the operand, on both sides.
        let around = generated.target.unwrap_or(DATA).clamp(DATA, DATA + DATA_PAGES * PAGE - 64);
        let mut fresh = [0u8; 64];
        for word in fresh.chunks_exact_mut(8) {
            word.copy_from_slice(&random.value().to_le_bytes());
        }
        let mut put = |address: u64, bytes: &[u8]| {
            bench.write(address, bytes);
            native.memory(address, bytes.len()).copy_from_slice(bytes);
        };
        put(around, &fresh);
        if matches!(generated.instruction.mnemonic(), Mnemonic::Ldmxcsr | Mnemonic::Vldmxcsr)
            && let Some(third) = generated.target.map(|target| target.wrapping_add(2))
            && (DATA..DATA + DATA_PAGES * PAGE).contains(&third)
        {
            // Bit 17 of MXCSR exists on AMD's processors only.
            put(third, &[bench.read::<1>(third)[0] & !2]);
        }
        if generated.instruction.flow_control() != FlowControl::Next {
            // Earlier stores may have gone where the branch goes.
            put(CODE, &[0xcc; PAGE as usize]);
        }
        match generated.instruction.flow_control() {
            FlowControl::Return => {
                if let Some(&(_, stack)) = generated.registers.iter().find(|entry| entry.0 == 4) {
                    put(stack, &BRANCH_TARGET.to_le_bytes());
                }
            }
            FlowControl::IndirectBranch | FlowControl::IndirectCall => put(around, &BRANCH_TARGET.to_le_bytes()),
            _ => {}
        }
        if trace {
            println!("{case}: {:x?} {:?}", generated.bytes, generated.instruction.code());
        }
        if single.is_some() {
            println!("{:x?} {:?}\nregisters {:x?}", generated.bytes, generated.instruction.code(), state.gpr);
            println!("fx {:x?}", &state.fx[..160]);
            println!("ymm {:x?}", state.ymm);
        }
        set_engine(&mut bench, &state);
        // The code page reads the same on both sides.
        let mut code = [0xcc; 192];
        let len = generated.bytes.len();
        code[..len].copy_from_slice(&generated.bytes);
        code[len..len + 7].copy_from_slice(&native.exit_jump());
        let stop = match unit {
            Unit::Instruction => {
                bench.write(START, &code[..32]);
                bench.step(1)
            }
            _ => {
                // The jump at the end leads nowhere on this side, so it faults.
                bench.write(START, &code);
                let stop = bench.run(1000);
                let branched = generated.instruction.flow_control() != FlowControl::Next;
                let rip = bench.cpu.rip;
                // There is no table of interrupts on this side for the breakpoint to go through.
                let is_breakpoint = |stop| {
                    matches!(stop, Stop::Fault(exception) if exception.vector == 14)
                        && (CODE..CODE + PAGE).contains(&rip)
                        && bench.read::<1>(rip) == [0xcc]
                };
                let fetch_failed = |stop| matches!(stop, Stop::Fault(exception) if exception.vector == 14 && exception.detail == rip && rip != START);
                let ended = matches!(stop, Stop::Fault(_)) && bench.cpu.rip == START + len as u64
                    || branched && (is_breakpoint(stop) || fetch_failed(stop));
                if ended { Stop::Limit } else { stop }
            }
        };
        bench.cpu.vector.retire();
        if bench.read::<192>(START)[..len + 7] != code[..len + 7] {
            // It has stored into the jump at its end, or before that, and ends elsewhere on each side.
            take_memory(&bench, &mut native);
            left_out += 1;
            continue;
        }
        if is_beyond_the_bench(stop, bench.cpu.rip) {
            take_memory(&bench, &mut native);
            left_out += 1;
            continue;
        }
        native.run(&mut state, START, &code, len);
        let undefined = if unit.is_translated() && matches!(stop, Stop::Fault(_)) { !0 } else { 0 };
        let lines = differences(bits, undefined, &mut bench, &mut native, stop, &state, &generated);
        if !lines.is_empty() {
            let name = format!("{:?}", generated.instruction.code());
            let entry = found.entry(name.clone()).or_insert((0, case));
            entry.0 += 1;
            if entry.0 <= 2 && shown < DIFFERENCES_MAX {
                shown += 1;
                println!("POLDER_SEED={seed:#x} POLDER_CASE={case}: {name} {:x?}", generated.bytes);
                for line in lines.iter().take(8) {
                    println!("{line}");
                }
            }
            if found.len() > 200 {
                break;
            }
        }
    }
    for (name, (count, case)) in &found {
        println!("{name}: {count} differences, first in case {case}");
    }
    assert!(found.is_empty(), "the engine differs from the host: POLDER_SEED={seed:#x}");
    assert!(left_out <= 1 + cases / 1000, "{left_out} of {cases} cases were left out: POLDER_SEED={seed:#x}");
}
