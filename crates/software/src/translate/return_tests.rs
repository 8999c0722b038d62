//! Returns, expected and unexpected: what a call remembers leads nowhere else than the stack does.

use crate::cpu::{CodeSize, RAX, RCX, RSP};
use crate::ops::against_host::{Random, seed};
use crate::testbench::{CODE, STACK, Stop, TestBench, Tier, on_each_tier};

const PROGRAMS: u64 = 60;
const FUNCTIONS: u64 = 12;
/// Bytes of a function; some lie in two pages.
const FUNCTION_BYTES: usize = 0x1d0;
/// A page in which one return address is the last, and one function begins in the next.
const START: u64 = CODE + 0x800;

fn address(function: u64) -> u64 {
    START + function * FUNCTION_BYTES as u64
}

/// A function: adds to RAX, calls functions behind it or itself, and goes back in one of several ways.
fn function(random: &mut Random, number: u64) -> Vec<u8> {
    let start = address(number);
    let mut code = Vec::new();
    for _ in 0..random.below(4) {
        // imul rax, rax, 7; add rax, few
        code.extend([0x48, 0x6b, 0xc0, 7, 0x48, 0x83, 0xc0, random.below(100) as u8]);
        let target = if number + 1 < FUNCTIONS { number + 1 + random.below(FUNCTIONS - number - 1) } else { continue };
        match random.below(4) {
            // call target
            0 | 1 => {
                code.push(0xe8);
                let next = start + code.len() as u64 + 4;
                code.extend((address(target).wrapping_sub(next) as u32).to_le_bytes());
            }
            // mov edx, target; call rdx
            2 => {
                code.push(0xba);
                code.extend((address(target) as u32).to_le_bytes());
                code.extend([0xff, 0xd2]);
            }
            // Call itself, up to 150 deep in all: dec ecx; jle over; call number
            _ => {
                code.extend([0xff, 0xc9, 0x7e, 5, 0xe8]);
                let next = start + code.len() as u64 + 4;
                code.extend((start.wrapping_sub(next) as u32).to_le_bytes());
            }
        }
    }
    match random.below(8) {
        // pop rdx; jmp rdx
        0 => code.extend([0x5a, 0xff, 0xe2]),
        // To the caller's caller, if RAX has a bit: test al, 8; jz +4; add rsp, 8; ret
        1 => code.extend([0xa8, 8, 0x74, 4, 0x48, 0x83, 0xc4, 8, 0xc3]),
        // What retpolines do: call +1; int3; mov rdx, [rsp + 8]; mov [rsp], rdx; ret 8
        2 => code.extend([0xe8, 1, 0, 0, 0, 0xcc, 0x48, 0x8b, 0x54, 0x24, 8, 0x48, 0x89, 0x14, 0x24, 0xc2, 8, 0]),
        _ => code.push(0xc3),
    }
    code
}

fn run(tier: Tier, functions: &[Vec<u8>]) -> (Stop, u64, u64, u64) {
    let mut bench = TestBench::on(tier);
    bench.set_mode(CodeSize::Bits64, 0);
    for (number, code) in (0..).zip(functions) {
        bench.write(address(number), code);
    }
    // hlt, where all frames end.
    bench.write(CODE, &[0xf4]);
    for frame in 0..64 {
        bench.write(STACK + 8 * frame, &CODE.to_le_bytes());
    }
    (bench.cpu.gpr[RAX], bench.cpu.gpr[RCX], bench.cpu.gpr[RSP]) = (1, 150, STACK);
    let mut stop = Stop::Halted;
    for _ in 0..3 {
        bench.cpu.halted = false;
        bench.cpu.rip = address(0);
        bench.cpu.gpr[RSP] = STACK;
        stop = bench.run(1 << 20);
    }
    (stop, bench.cpu.gpr[RAX], bench.cpu.gpr[RCX], bench.cpu.gpr[RSP])
}

#[test]
fn calls_and_unexpected_returns_lead_where_the_stack_says_on_each_tier() {
    let seed = seed();
    // Programs whose recursion went as deep as it may.
    let mut deep = 0;
    for number in 0..PROGRAMS {
        let mut random = Random(seed.wrapping_add(number).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let functions: Vec<Vec<u8>> = (0..FUNCTIONS).map(|number| function(&mut random, number)).collect();
        let expected = run(Tier::Interpreter, &functions);
        deep += u32::from(expected.2 as i32 <= 0);
        on_each_tier(|tier| assert_eq!(run(tier, &functions), expected, "{tier:?} {number}: {functions:02x?}"));
    }
    assert!(deep > 10, "{deep}");
}

#[test]
fn a_call_in_one_address_space_is_no_call_in_another() {
    let Some(mut bench) = TestBench::translating(64 << 20) else { return };
    bench.set_mode(CodeSize::Bits64, 0);
    bench.cpu.xcr0 = 7;
    bench.cpu.update_mode();
    // call f; ud2; f: mov cr3, rbx; mov cr3 to itself is another space without PCIDs; add eax, 1; ret
    let code = [0xe8, 2, 0, 0, 0, 0x0f, 0x0b, 0x0f, 0x22, 0xdb, 0x83, 0xc0, 1, 0xc3];
    bench.cpu.gpr[3] = bench.cpu.cr3;
    for round in 1..=50 {
        bench.cpu.gpr[RSP] = STACK;
        let stop = bench.run_code(&code, 1 << 20);
        assert!(matches!(stop, Stop::Fault(fault) if fault.vector == 6), "{stop:?}");
        assert_eq!((bench.cpu.gpr[RAX], bench.cpu.rip), (round, CODE + 5));
    }
}
