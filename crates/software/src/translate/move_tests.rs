//! The same code at many linear addresses, in one address space after the other.

use crate::cpu::{RAX, RBX, RSP};
use crate::fault::vector;
use crate::ops::against_host::{Random, seed};
use crate::testbench::{CODE, STACK, Stop, TABLES, TestBench};

/// The second page of code at every other place.
const OTHER: u64 = CODE + 0x4_0000;
/// Tables of levels 3 to 1, one set for each distance of the code from [`CODE`].
const SETS: u64 = 0x20_0000;
const DISTANCES: u64 = 62;
/// Addresses that the code lies at, each in a part of the address space of its own.
const PLACES: u64 = 120;
const STEPS: u64 = 3000;
/// The number that a function in the first page adds.
const NUMBER: u64 = CODE + 0x103;

fn call(from: u64, to: u64) -> Vec<u8> {
    let mut code = vec![0xe8];
    code.extend((to.wrapping_sub(from + 5) as u32).to_le_bytes());
    code
}

/// Writes the code, and tables that lead to it from all places.
fn prepare(bench: &mut TestBench) {
    bench.cpu.xcr0 = 7;
    bench.cpu.update_mode();
    for distance in 0..DISTANCES {
        let set = SETS + 0x3000 * distance;
        for level in 0..3 {
            let table: [u8; 4096] = bench.read(TABLES + 0x1000 * (level + 1));
            bench.write(set + 0x1000 * level, &table);
        }
        let pages = [CODE, if distance % 2 == 0 { CODE + 0x1000 } else { OTHER }];
        let first = (CODE >> 12) + distance;
        let entries = [(set, set + 0x1000), (set + 0x1000, set + 0x2000)].into_iter();
        let of_code = (first..).zip(pages).map(|(page, to)| (set + 0x2000 + 8 * page, to));
        for (at, to) in entries.chain(of_code) {
            bench.write(at, &(to | 7).to_le_bytes());
        }
    }
    for place in 1..=PLACES + 1 {
        let set = SETS + 0x3000 * (place % DISTANCES);
        bench.write(TABLES + 8 * place, &(set | 7).to_le_bytes());
    }
    // xor eax, eax; lea rbx, [rip]; mov ecx, 3
    let mut code = vec![0x31, 0xc0, 0x48, 0x8d, 0x1d, 0, 0, 0, 0, 0xb9, 3, 0, 0, 0];
    // l: calls of the functions below, the third by lea rdx, [rip + n]; call rdx
    code.extend(call(CODE + 14, CODE + 0x100));
    code.extend(call(CODE + 19, CODE + 0x1040));
    code.extend([0x48, 0x8d, 0x15]);
    code.extend((0x200u32 - 31).to_le_bytes());
    // call rdx; dec ecx; jnz l; ud2
    code.extend([0xff, 0xd2, 0xff, 0xc9, 0x75, (14i8 - 37) as u8, 0x0f, 0x0b]);
    bench.write(CODE, &code);
    // Each function adds its address, multiplied: lea rsi, [rip]; lea rax, [rsi + 2 * rax]
    let add_address = [0x48, 0x8d, 0x35, 0, 0, 0, 0, 0x48, 0x8d, 0x04, 0x46];
    // add eax, 1; test al, 1; jnz n; add eax, 2; n: the same; ret
    let mut near = vec![0x48, 0x83, 0xc0, 1, 0xa8, 1, 0x75, 4, 0x48, 0x83, 0xc0, 2];
    near.extend(add_address);
    near.push(0xc3);
    bench.write(CODE + 0x100, &near);
    let mut near = add_address.to_vec();
    near.push(0xc3);
    bench.write(CODE + 0x200, &near);
    // The same; call of the first page; ret. In the other page it adds 5 before.
    let mut far = add_address.to_vec();
    far.extend(call(CODE + 0x1040 + far.len() as u64, CODE + 0x100));
    far.push(0xc3);
    bench.write(CODE + 0x1040, &far);
    let mut far = vec![0x48, 0x83, 0xc0, 5];
    far.extend(add_address);
    far.extend(call(CODE + 0x1040 + far.len() as u64, CODE + 0x100));
    far.push(0xc3);
    bench.write(OTHER + 0x40, &far);
}

/// Runs the code at a place; gives RAX, RBX and RIP.
fn run(bench: &mut TestBench, place: u64) -> [u64; 3] {
    bench.cpu.rip = (place << 39) + 0x1000 * (place % DISTANCES) + CODE;
    bench.cpu.gpr[RSP] = STACK;
    let stop = bench.run(1000);
    assert!(matches!(stop, Stop::Fault(fault) if fault.vector == 6), "{place} {stop:?}");
    assert_eq!(bench.cpu.gpr[RSP], STACK);
    [bench.cpu.gpr[RAX], bench.cpu.gpr[RBX], bench.cpu.rip]
}

fn steps(bench: &mut TestBench, steps: u64) {
    let seed = seed();
    let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    let mut reference = TestBench::new();
    prepare(bench);
    prepare(&mut reference);
    for step in 0..steps {
        // New programs most often, old ones now and then; some time in one address space, or each run in a new one.
        let newest = step / 20 % PLACES;
        let place = 1 + if random.next().is_multiple_of(2) { random.next() % PLACES } else { newest };
        let is_new_space = random.next().is_multiple_of(3);
        let number = random.next().is_multiple_of(16).then(|| random.next() as u8 & 0x7f);
        let [expected, got] = [&mut reference, &mut *bench].map(|bench| {
            if is_new_space {
                bench.cpu.write_cr3(TABLES).expect("the tables are there");
            }
            if let Some(number) = number {
                bench.write(NUMBER, &[number]);
            }
            run(bench, place)
        });
        assert_eq!(got, expected, "seed {seed} step {step} place {place}");
    }
}

#[test]
fn code_that_moves_does_as_the_interpreter_does() {
    let Some(mut bench) = TestBench::translating(64 << 20) else { return };
    steps(&mut bench, STEPS);
    let counters = bench.translation_counters();
    assert!(counters.translated_moves > 500, "{counters:?}");
    assert!(counters.translated_copies > 100, "{counters:?}");
}

#[test]
fn code_does_not_move_to_a_page_with_a_breakpoint() {
    let Some(mut bench) = TestBench::translating(64 << 20) else { return };
    prepare(&mut bench);
    for place in 1..=PLACES {
        bench.cpu.write_cr3(TABLES).expect("the tables are there");
        run(&mut bench, place);
    }
    let place = PLACES + 1;
    let code = (place << 39) + 0x1000 * (place % DISTANCES) + CODE;
    // Behind the first instruction, where a function further on in the page returns to.
    bench.cpu.debugger.break_at(&[code + 2]);
    bench.write(STACK, &code.to_le_bytes());
    (bench.cpu.rip, bench.cpu.gpr[RSP]) = (code + 0x200, STACK);
    let stop = bench.run(1000);
    assert!(matches!(stop, Stop::Fault(fault) if fault.vector == vector::DEBUGGER), "{stop:?}");
    assert_eq!(bench.cpu.rip, code + 2);
}

#[test]
fn code_that_moves_does_the_same_in_lockstep() {
    let Some(mut bench) = TestBench::in_lockstep() else { return };
    steps(&mut bench, STEPS / 4);
    let (units, told) = bench.lockstep();
    assert!(units > STEPS && told.is_empty(), "{units} {told:?}");
    assert!(bench.translation_counters().translated_moves > 100);
}
