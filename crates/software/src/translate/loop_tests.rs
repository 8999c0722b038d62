//! Random loops, interpreted and translated: what a unit keeps from round to round changes nothing.
//!
//! Lockstep leaves units at jumps backwards, so it does not see this. Some loops are steady, some only nearly. The seed is printed on a failure; `POLDER_SEED` takes it back.

use crate::cpu::{CodeSize, RAX, RBX, RCX, RSP};
use crate::ops::against_host::{Random, seed};
use crate::testbench::{DATA, STACK, Stop, TestBench, Tier, on_each_tier};

const LOOPS: u64 = 500;
/// Bytes of data that loops reach, from [`DATA`] on.
const REACH: usize = 8 * 4096;
/// RSI, RDI, R8 and R10 point into the data; RBX, RDX and R9 hold numbers. RCX counts.
const POINTERS: [u8; 4] = [6, 7, 8, 10];
const NUMBERS: [u8; 3] = [3, 2, 9];

/// An instruction with ModRM: `[base + displacement]`, with `reg`.
fn with_memory(code: &mut Vec<u8>, opcode: &[u8], reg: u8, base: u8, displacement: i32) {
    code.push(0x48 | (reg >> 3) << 2 | base >> 3);
    code.extend(opcode);
    code.push(0x80 | (reg & 7) << 3 | base & 7);
    if base & 7 == RSP as u8 {
        code.push(0x24);
    }
    code.extend(displacement.to_le_bytes());
}

/// Between two instructions of the body somewhere: an access, a move of a pointer, arithmetic, a push and a pop, or a jump over the next one.
fn instruction(random: &mut Random, code: &mut Vec<u8>) {
    let number = NUMBERS[random.below(3) as usize];
    let pointer = POINTERS[random.below(4) as usize];
    let displacement = random.below(256) as i32 - 64;
    match random.below(15) {
        0..=2 => with_memory(code, &[0x8b], number, pointer, displacement),
        3 | 4 => with_memory(code, &[0x89], number, pointer, displacement),
        5 => with_memory(code, &[0x01], number, pointer, displacement),
        // add rax, [..]
        6 => with_memory(code, &[0x03], RAX as u8, pointer, displacement),
        // What lies on the stack.
        7 => with_memory(code, &[0x8b], number, RSP as u8, 8 * random.below(8) as i32),
        8 => with_memory(code, &[0x89], number, RSP as u8, 8 * random.below(8) as i32),
        // lea pointer, [pointer + few]
        9 => with_memory(code, &[0x8d], pointer, pointer, random.below(64) as i32 - 16),
        // mov number, [pointer + rcx * scale]; mov [pointer + rcx * scale], number
        10 | 11 => {
            let opcode = if random.below(2) == 0 { 0x8b } else { 0x89 };
            let scale = random.below(3) as u8;
            code.extend([0x48 | (number >> 3) << 2 | pointer >> 3, opcode, 0x44 | (number & 7) << 3]);
            code.extend([scale << 6 | (RCX as u8) << 3 | pointer & 7, random.below(128) as u8]);
        }
        // shld [pointer], number, cl
        13 => with_memory(code, &[0x0f, 0xa5], number, pointer, displacement),
        // push; pop
        12 => code.extend([0x53, 0x5a]),
        // imul rbx, rbx, 5
        _ => code.extend([0x48, 0x6b, 0xdb, 5]),
    }
}

/// Before the loop, in it and behind it; sometimes with a way round that leaves something out, and with a loop in the loop.
fn random_loop(random: &mut Random) -> Vec<u8> {
    let mut code = Vec::new();
    let leaves_out = random.below(2) == 0;
    let straight = |random: &mut Random, code: &mut Vec<u8>, most: u64| {
        for _ in 0..random.below(most) {
            let before = code.len();
            instruction(random, code);
            if leaves_out && random.below(4) == 0 {
                // Leave it out or not: test al, 1; jz over it
                let len = (code.len() - before) as u8;
                code.splice(before..before, [0xa8, 1, 0x74, len]);
            }
        }
    };
    straight(random, &mut code, 6);
    let head = code.len();
    straight(random, &mut code, 6);
    if random.below(3) == 0 {
        // mov r13d, 3; inner: ...; dec r13d; jnz inner
        code.extend([0x41, 0xbd, 3, 0, 0, 0]);
        let inner = code.len();
        straight(random, &mut code, 5);
        code.extend([0x41, 0xff, 0xcd]);
        let back = inner as i32 - (code.len() as i32 + 6);
        code.extend([0x0f, 0x85]);
        code.extend(back.to_le_bytes());
    }
    let middle = code.len() + 2;
    straight(random, &mut code, 6);
    // What the flags hold at the head matters to nobody: test al, 8. Then dec ecx or rcx; jnz head
    code.splice(head..head, [0xa8, 8]);
    if random.below(2) == 0 {
        code.push(0x48);
    }
    code.extend([0xff, 0xc9, 0x0f, 0x85]);
    let back = head as i32 - (code.len() as i32 + 4);
    code.extend(back.to_le_bytes());
    straight(random, &mut code, 6);
    if random.below(3) == 0 {
        // Into the loop from behind, perhaps round a handler: pause; mov ecx, 3; sub r14d, 1; jg middle
        if random.below(2) == 0 {
            code.extend([0xf3, 0x90]);
        }
        code.extend([0xb9, 3, 0, 0, 0, 0x41, 0x83, 0xee, 1, 0x0f, 0x8f]);
        let back = middle as i32 - (code.len() as i32 + 4);
        code.extend(back.to_le_bytes());
    }
    code.push(0xf4);
    code
}

struct Result {
    stop: Stop,
    registers: [u64; 16],
    memory: Vec<u8>,
    stack: [u8; 256],
}

fn run(tier: Tier, code: &[u8], random: &mut Random) -> Result {
    let mut bench = TestBench::on(tier);
    bench.set_mode(CodeSize::Bits64, 0);
    let mut memory = [0; REACH];
    memory.fill_with(|| random.next() as u8);
    bench.write(DATA, &memory);
    for register in [RAX, RBX, 2, 9] {
        bench.cpu.gpr[register] = random.next();
    }
    bench.cpu.gpr[14] = random.below(4);
    for pointer in POINTERS {
        // Near the seam of two pages, often.
        let seam = 4096 * (2 + random.below(3));
        bench.cpu.gpr[usize::from(pointer)] = DATA + seam - 300 + random.below(320);
    }
    let rounds = if random.below(4) == 0 { 150 } else { 20 };
    bench.cpu.gpr[RCX] = 1 + random.below(rounds);
    bench.cpu.gpr[RSP] = STACK - 96 + 8 * random.below(8);
    let stop = bench.run_code(code, 1 << 20);
    let mut registers = [0; 16];
    registers.copy_from_slice(&bench.cpu.gpr[..16]);
    Result { stop, registers, memory: bench.read::<REACH>(DATA).to_vec(), stack: bench.read(STACK - 128) }
}

#[test]
fn random_loops_do_the_same_on_each_tier() {
    let seed = seed();
    for number in 0..LOOPS {
        let seed = seed.wrapping_add(number).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut random = Random(seed);
        let code = random_loop(&mut random);
        let data = random.next() | 1;
        let expected = run(Tier::Interpreter, &code, &mut Random(data));
        on_each_tier(|tier| {
            let result = run(tier, &code, &mut Random(data));
            let message = format!("{tier:?} loop {number}: {code:02x?}");
            assert_eq!(result.stop, expected.stop, "{message}");
            assert_eq!(result.registers, expected.registers, "{message}");
            assert!(result.memory == expected.memory && result.stack == expected.stack, "{message}");
        });
    }
}
