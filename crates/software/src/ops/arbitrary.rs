//! Arbitrary bytes from arbitrary states, in every code size: nothing may panic, hang or leave the guest's memory.
//!
//! The seed is printed on a failure; `POLDER_SEED` takes it back and `POLDER_CASES` sets the number of cases.

use crate::cpu::{CodeSize, Cpu};
use crate::ops::against_host::{Random, variable};
use crate::testbench::{CODE, DATA, TestBench};

/// Blocks, or single instructions, that a case may run.
const BLOCKS_MAX: u32 = 30;

fn random_state(bench: &mut TestBench, random: &mut Random) {
    let code = [CodeSize::Bits16, CodeSize::Bits32, CodeSize::Bits64][random.below(3) as usize];
    bench.set_mode(code, if random.below(2) == 0 { 0 } else { 3 });
    let cpu: &mut Cpu = &mut bench.cpu;
    for register in &mut cpu.gpr[..16] {
        *register = match random.below(3) {
            0 => DATA + random.below(0x4000),
            _ => random.value(),
        };
    }
    for segment in &mut cpu.segments {
        if random.below(8) == 0 && code != CodeSize::Bits64 {
            segment.limit = random.value() as u32;
        }
    }
    if random.below(4) == 0 {
        // Real or virtual-8086 mode, or protected mode without paging.
        match random.below(3) {
            0 => cpu.cr0 &= !(crate::cpu::cr0::PE | crate::cpu::cr0::PG),
            1 => cpu.cr0 &= !crate::cpu::cr0::PG,
            _ => cpu.system_flags |= crate::flags::VM,
        }
        cpu.efer = 0;
        for segment in &mut cpu.segments {
            segment.attributes &= !(1 << 13);
        }
        cpu.tlb.flush_all();
    }
    let rflags = cpu.rflags() | random.next() & 0xcd5;
    cpu.set_rflags(rflags);
}

#[test]
fn arbitrary_bytes_never_panic() {
    let seed = variable("POLDER_SEED").unwrap_or(0xfeed);
    let cases = variable("POLDER_CASES").unwrap_or(20_000);
    let mut random = Random(seed | 1);
    let mut bench = TestBench::new();
    for case in 0..cases {
        random_state(&mut bench, &mut random);
        let mut bytes: Vec<u8> = (0..8).flat_map(|_| random.bytes()).collect();
        bytes.truncate(100);
        let at = if random.below(4) == 0 { CODE + 0xfff - random.below(16) } else { CODE + random.below(0x800) };
        bench.write(at, &bytes);
        bench.cpu.rip = if random.below(64) == 0 { bench.cpu.cut_rip(random.next()) } else { at };
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            if random.below(4) == 0 {
                bench.step(u64::from(BLOCKS_MAX));
            } else {
                bench.run_blocks(BLOCKS_MAX);
            }
        }));
        assert!(result.is_ok(), "seed {seed} case {case}: {bytes:02x?}");
        if case % 64 == 0 {
            // Tables may have been overwritten.
            bench = TestBench::new();
        }
    }
}
