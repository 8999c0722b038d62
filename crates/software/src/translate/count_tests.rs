//! Instructions of translated code are counted if anybody asked for it.

use crate::CODE_CACHE_BYTES_MIN;
use crate::cpu::{CodeSize, RAX};
use crate::testbench::{Stop, TestBench};

#[test]
fn a_translated_loop_counts_its_instructions_exactly() {
    let Some(mut bench) = TestBench::translating(CODE_CACHE_BYTES_MIN) else { return };
    bench.set_mode(CodeSize::Bits64, 0);
    bench.cpu.xcr0 = 7;
    bench.cpu.update_mode();
    bench.cpu.stopwatch.start();
    // add eax, 1; test al, 1; jz +3; lea ecx, [rcx+1]; cmp eax, 1000; jne back; ud2
    let code = [0x83, 0xc0, 1, 0xa8, 1, 0x74, 3, 0x8d, 0x49, 1, 0x3d, 0xe8, 3, 0, 0, 0x75, 0xef, 0x0f, 0x0b];
    let stop = bench.run_code(&code, 1 << 40);
    assert!(matches!(stop, Stop::Fault(fault) if fault.vector == 6), "{stop:?}");
    // Every second turn leaves out one of the six.
    assert_eq!((bench.cpu.gpr[RAX], bench.cpu.instructions), (1000, 5500));
    assert!(bench.translation_counters().translated_units > 0);
}
