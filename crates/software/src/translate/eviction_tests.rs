//! A code cache that is too small for what runs.

use crate::CODE_CACHE_BYTES_MIN;
use crate::cpu::{CodeSize, RAX, RCX, RDX, RSP};
use crate::testbench::{CODE, Stop, TestBench};

/// Pieces of code: together they are more than the smallest cache holds.
const PIECES: u64 = 600;
const STORES: u64 = 40;
/// Beyond all of them.
const STACK: u64 = 0x30_0000;

/// `mov eax, number`; stores below the stack; `div ecx`, which faults.
fn piece(number: u32) -> Vec<u8> {
    let mut code = vec![0xb8];
    code.extend(number.to_le_bytes());
    for store in 1..=STORES {
        // mov [rsp - 8 * store], rax
        code.extend([0x48, 0x89, 0x84, 0x24]);
        code.extend((-8 * store as i32).to_le_bytes());
    }
    code.extend([0xf7, 0xf1]);
    code
}

#[test]
fn evicted_code_comes_back_and_faults_are_found_wherever_code_lies() {
    let Some(mut bench) = TestBench::translating(CODE_CACHE_BYTES_MIN) else { return };
    crate::vector::stub::prepare().expect("stubs");
    bench.set_mode(CodeSize::Bits64, 0);
    bench.cpu.xcr0 = 7;
    bench.cpu.update_mode();
    bench.cpu.gpr[RSP] = STACK;
    let address = |number: u64| CODE + 0x400 * number;
    for number in 0..PIECES {
        bench.write(address(number), &piece(number as u32));
    }
    for round in 0..4 {
        for number in 0..PIECES {
            // An earlier one now and then: some of those are still there.
            for number in [number, number.saturating_sub(number % 7 * 9)] {
                (bench.cpu.gpr[RCX], bench.cpu.gpr[RDX]) = (0, 0);
                bench.cpu.rip = address(number);
                let stop = bench.run(1000);
                assert!(matches!(stop, Stop::Fault(fault) if fault.vector == 0), "{round} {number} {stop:?}");
                let place = bench.cpu.rip - address(number);
                assert_eq!((bench.cpu.gpr[RAX], place), (number, 5 + 8 * STORES), "{round} {number}");
                assert_eq!(bench.read_u64(bench.cpu.gpr[RSP] - 8 * STORES), number);
            }
        }
    }
    let counters = bench.translation_counters();
    assert!(counters.code_cache_evicted > PIECES, "{counters:?}");
    assert!(counters.translated_units > counters.code_cache_evicted, "{counters:?}");
    // A flush with a full cache.
    bench.renew();
    let pause_ns = bench.translation_counters().code_cache_pause_ns_max;
    assert!((1..1_000_000).contains(&pause_ns), "{pause_ns}");
}
