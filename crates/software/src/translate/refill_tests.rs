//! Look-ups that the first level has lost are found in the second one by translated code itself, and only what is still true.

use crate::cpu::{CodeSize, RAX, RCX};
use crate::testbench::{CODE, DATA, Stop, TABLES, TestBench};
use crate::tlb::DATA_ENTRIES;

/// A linear address in the same place of the first level as [`DATA`].
const RIVAL: u64 = DATA + 4096 * DATA_ENTRIES as u64;
/// The page that it leads to, another one that it can lead to, and a page for a table.
const PAGE: u64 = DATA + 0x1_0000;
const OTHER: u64 = DATA + 0x2_0000;
const TABLE: u64 = 0x9000;
const ROUNDS: u64 = 100;

/// A bench in user mode, in which RIVAL leads to PAGE. Its code adds [rsi] and [rdi] to RAX in turn and stores to both, RCX times.
fn bench() -> Option<TestBench> {
    let mut bench = TestBench::translating(64 << 20)?;
    bench.set_mode(CodeSize::Bits64, 3);
    bench.cpu.update_mode();
    bench.write(TABLES + 0x2000 + 8 * (RIVAL >> 21), &(TABLE | 7).to_le_bytes());
    map(&bench, PAGE);
    bench.cpu.gpr[6] = DATA;
    bench.cpu.gpr[7] = RIVAL;
    bench.write(DATA, &1u64.to_le_bytes());
    bench.write(PAGE, &1000u64.to_le_bytes());
    bench.write(OTHER, &1_000_000u64.to_le_bytes());
    // add rax, [rsi]; add rax, [rdi]; add [rsi + 8], rax; add [rdi + 8], rax; pause; sub rcx, 1; jnz back; ud2
    let code = [
        0x48, 0x03, 0x06, 0x48, 0x03, 0x07, 0x48, 0x01, 0x46, 8, 0x48, 0x01, 0x47, 8, 0xf3, 0x90, 0x48, 0x83, 0xe9, 1,
        0x75, 0xea, 0x0f, 0x0b,
    ];
    bench.write(CODE, &code);
    Some(bench)
}

fn map(bench: &TestBench, page: u64) {
    bench.write(TABLE + 8 * (RIVAL >> 12 & 511), &(page | 7).to_le_bytes());
}

fn run(bench: &mut TestBench) {
    bench.cpu.rip = CODE;
    bench.cpu.gpr[RAX] = 0;
    bench.cpu.gpr[RCX] = ROUNDS;
    let stop = bench.run(1 << 40);
    assert!(matches!(stop, Stop::Fault(fault) if fault.vector == 6), "{stop:?}");
}

#[test]
fn pages_in_one_place_of_the_first_level_are_found_without_a_call() {
    let Some(mut bench) = bench() else { return };
    run(&mut bench);
    assert_eq!(bench.cpu.gpr[RAX], ROUNDS * 1001);
    let counters = bench.translation_counters();
    // Both pages, to be read and to be written; all others of some four in a round are refills.
    assert!(counters.translated_misses <= 8, "{counters:?}");
    assert!(counters.translated_refills >= 2 * ROUNDS, "{counters:?}");
    let sums: u64 = (1..=ROUNDS).map(|round| round * 1001).sum();
    assert_eq!((bench.read_u64(DATA + 8), bench.read_u64(PAGE + 8)), (sums, sums));
}

#[test]
fn what_was_invalidated_or_belongs_to_another_time_is_not_found() {
    let Some(mut bench) = bench() else { return };
    run(&mut bench);
    map(&bench, OTHER);
    run(&mut bench);
    assert_eq!(bench.cpu.gpr[RAX], ROUNDS * 1001, "nobody has told of the change");
    bench.cpu.tlb.invalidate_page(RIVAL);
    run(&mut bench);
    assert_eq!(bench.cpu.gpr[RAX], ROUNDS * 1_000_001);
    map(&bench, PAGE);
    bench.cpu.tlb.flush_all();
    run(&mut bench);
    assert_eq!(bench.cpu.gpr[RAX], ROUNDS * 1001);
    // A page that may only be read: a store to it faults, however often it was refilled for reads.
    bench.write(TABLE + 8 * (RIVAL >> 12 & 511), &(PAGE | 5).to_le_bytes());
    bench.cpu.tlb.flush_all();
    bench.cpu.rip = CODE;
    bench.cpu.gpr[RCX] = ROUNDS;
    let stop = bench.run(1 << 40);
    let Stop::Fault(fault) = stop else { panic!("{stop:?}") };
    assert_eq!((fault.vector, fault.detail, bench.cpu.rip), (14, RIVAL + 8, CODE + 10));
}
