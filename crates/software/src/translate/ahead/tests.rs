//! Code with the look-up ahead does what it says, and is as short as code in a better order.

use crate::cpu::{CodeSize, RAX, RCX, RSP};
use crate::testbench::{CODE, DATA, STACK, Stop, TestBench, on_each_tier};

/// Bytes that the translation of some code has, which ends by UD2.
fn length(code: &[u8]) -> Option<u64> {
    let mut bench = TestBench::translating(64 << 20)?;
    bench.set_mode(CodeSize::Bits64, 0);
    bench.cpu.gpr[7] = DATA;
    bench.run_code(code, 1 << 40);
    Some(bench.translation_counters().translated_code_bytes)
}

#[test]
fn a_load_between_a_comparison_and_its_jump_is_as_short_as_one_before_both() {
    // cmp rax, rcx; mov edx, [rdi + 4]; je +0; ud2
    let between = length(&[0x48, 0x39, 0xc8, 0x8b, 0x57, 4, 0x74, 0, 0x0f, 0x0b]);
    // mov edx, [rdi + 4]; cmp rax, rcx; je +0; ud2
    let before = length(&[0x8b, 0x57, 4, 0x48, 0x39, 0xc8, 0x74, 0, 0x0f, 0x0b]);
    assert_eq!(between, before);
    // add rsp, 16; pop rbx; ud2, beside pop rbx; add rsp, 16; ud2
    let behind = length(&[0x48, 0x83, 0xc4, 16, 0x5b, 0x0f, 0x0b]);
    let first = length(&[0x5b, 0x48, 0x83, 0xc4, 16, 0x0f, 0x0b]);
    let (Some(behind), Some(first)) = (behind, first) else { return };
    // A displacement.
    assert!(behind <= first + 8, "{behind} {first}");
}

#[test]
fn addresses_are_those_behind_the_instructions_between() {
    on_each_tier(|tier| {
        let mut bench = TestBench::on(tier);
        bench.set_mode(CodeSize::Bits64, 0);
        bench.write(DATA, &std::array::from_fn::<u8, 128, _>(|at| at as u8));
        bench.write(STACK + 16, &0x1122_3344u64.to_le_bytes());
        bench.cpu.gpr[7] = DATA;
        bench.cpu.gpr[RCX] = 3;
        // add rdi, 8; mov eax, [rdi + rcx*8]; jnc +0; add rsp, 16; lea rsi, [rdi]; pop rbx; sbb edx, edx; mov [rdi], eax; ud2
        let code = [
            0x48, 0x83, 0xc7, 8, 0x8b, 0x04, 0xcf, 0x73, 0, 0x48, 0x83, 0xc4, 16, 0x48, 0x8d, 0x37, 0x5b, 0x19, 0xd2,
            0x89, 0x07, 0x0f, 0x0b,
        ];
        let stop = bench.run_code(&code, 1 << 40);
        assert!(matches!(stop, Stop::Fault(fault) if fault.vector == 6), "{tier:?}: {stop:?}");
        let gpr = &bench.cpu.gpr;
        assert_eq!((gpr[RAX], gpr[3], gpr[2]), (0x2322_2120, 0x1122_3344, 0), "{tier:?}");
        assert_eq!((gpr[6], gpr[RSP], bench.cpu.rip), (DATA + 8, STACK + 24, CODE + 21), "{tier:?}");
        assert_eq!(bench.read::<4>(DATA + 8), [0x20, 0x21, 0x22, 0x23], "{tier:?}");
    });
}

#[test]
fn a_fault_is_that_of_the_access_with_the_flags_of_the_instruction_before() {
    on_each_tier(|tier| {
        let mut bench = TestBench::on(tier);
        bench.set_mode(CodeSize::Bits64, 0);
        bench.cpu.gpr[7] = 1 << 40;
        // cmp edi, 1; mov [rdi], eax; jb +0; ud2
        let stop = bench.run_code(&[0x83, 0xff, 1, 0x89, 0x07, 0x72, 0, 0x0f, 0x0b], 1 << 40);
        let Stop::Fault(fault) = stop else { panic!("{tier:?}: {stop:?}") };
        assert_eq!((fault.vector, fault.detail, bench.cpu.rip), (14, 1 << 40, CODE + 3), "{tier:?}");
        assert_eq!(bench.cpu.rflags() & 1, 1, "{tier:?}: below");
    });
}

#[test]
fn of_two_accesses_each_has_its_own() {
    on_each_tier(|tier| {
        let mut bench = TestBench::on(tier);
        bench.set_mode(CodeSize::Bits64, 0);
        (bench.cpu.gpr[7], bench.cpu.gpr[9]) = (DATA, DATA + 0x340);
        bench.write(STACK, &0x1122_3344u64.to_le_bytes());
        bench.write(DATA, &0x5566_7788u64.to_le_bytes());
        // cmp edi, r8d; pop [r9]; cmp edi, r8d; push [rdi]; rcl ecx, 1; ud2
        bench.run_code(
            &[0x41, 0x3b, 0xf8, 0x41, 0x8f, 1, 0x41, 0x3b, 0xf8, 0xff, 0x37, 0xd1, 0xd1, 0x0f, 0x0b],
            1 << 40,
        );
        assert_eq!((bench.read_u64(DATA + 0x340), bench.read_u64(STACK)), (0x1122_3344, 0x5566_7788), "{tier:?}");
        assert_eq!(bench.cpu.gpr[RSP], STACK, "{tier:?}");
    });
}
