//! Which loops are steady, and that nobody can tell.

use super::*;
use crate::cpu::{CodeSize, RAX, RCX};
use crate::testbench::{CODE, Stop, TABLES, TestBench, Tier, on_each_tier};
use crate::translate::guest_code;

fn loop_of(instructions: &[&[u8]]) -> Option<Loop> {
    Loop::find(&guest_code::decode(&instructions.concat(), 0x40_0100, 0, guest_code::ITEMS_MAX))
}

/// jnz back over so many bytes of the body.
fn back(body: usize) -> [u8; 2] {
    [0x75, (-(body as i8) - 2) as u8]
}

/// The loop with this body, `cmp rdx, rcx` and a jump back.
fn with_body(body: &[&[u8]]) -> Option<Loop> {
    let mut body = body.concat();
    body.extend([0x48, 0x39, 0xca]);
    loop_of(&[&body, &back(body.len()), &[0xc3]])
}

const LOAD: &[u8] = &[0x8b, 0x02]; // mov eax, [rdx]
const STORE_BEHIND: &[u8] = &[0x89, 0x42, 0xf8]; // mov [rdx - 8], eax
const STEP: &[u8] = &[0x48, 0x83, 0xc2, 0x08]; // add rdx, 8
const FRAME: &[u8] = &[0x03, 0x45, 0xf8]; // add eax, [rbp - 8]
const SKIP_LOAD: &[u8] = &[0xa8, 0x01, 0x74, 0x02]; // test al, 1; jz over LOAD

#[test]
fn accesses_that_move_in_small_steps_or_not_at_all_are_steady() {
    let found = with_body(&[LOAD, STEP, STORE_BEHIND, FRAME]).unwrap();
    let groups: Vec<_> = found.groups.iter().map(|group| (group.usage, group.start, group.end, group.limit)).collect();
    assert_eq!(groups, [(Use::Write, 0, 4, Some((0, 0))), (Use::Read, -8, -4, None)]);
    assert_eq!(found.limits, [Limit { register: 2, is_up: true }]);
    let shares: Vec<_> =
        found.shares.iter().map(|(item, _, share)| (*item, share.group, share.offset, share.varying)).collect();
    assert_eq!(shares, [(0, 0, 0, Some((2, 0))), (2, 0, -8, Some((2, 0))), (3, 1, 0, None)]);
}

#[test]
fn what_not_each_round_reaches_decides_nothing() {
    assert!(with_body(&[SKIP_LOAD, LOAD, STEP]).is_none());
    // It joins what is looked up in any case.
    assert_eq!(with_body(&[LOAD, SKIP_LOAD, LOAD, STEP]).unwrap().shares.len(), 2);
    // But not with more rights: mov eax, [rdx]; test al, 1; jz +2; mov [rdx], eax
    assert_eq!(with_body(&[LOAD, SKIP_LOAD, &[0x89, 0x02], STEP]).unwrap().shares.len(), 1);
    // Behind the first of two jumps back: add rdx, 8; test al, 1; jz back; mov eax, [rdx]
    assert!(with_body(&[STEP, &[0xa8, 1, 0x74, 0xf8], LOAD]).is_none());
}

#[test]
fn loops_that_move_otherwise_are_not_steady() {
    // add rdx, 0x200
    assert!(with_body(&[LOAD, &[0x48, 0x81, 0xc2, 0, 2, 0, 0]]).is_none(), "far");
    // mov rdx, [rdx]
    assert!(with_body(&[&[0x48, 0x8b, 0x12]]).is_none(), "a chain");
    // mov eax, [rdx + rcx]; add rdx, 8; add rcx, 8
    assert!(with_body(&[&[0x8b, 0x04, 0x0a], STEP, &[0x48, 0x83, 0xc1, 8]]).is_none(), "two registers");
    // mov eax, [rdx]; test al, 1; jz over the step
    assert!(with_body(&[LOAD, &[0xa8, 1, 0x74, 4], STEP]).is_none(), "sometimes");
    // mov eax, [rdx]; add rdx, 8; cpuid
    assert!(with_body(&[LOAD, STEP, &[0x0f, 0xa2]]).is_none(), "a handler");
    // adc eax, [rdx]: the carry lives from round to round
    let carried: &[&[u8]] = &[&[0x13, 0x02], &[0x48, 0x8d, 0x52, 0x08], &[0xff, 0xc9], &back(8), &[0xc3]];
    assert!(loop_of(carried).is_none(), "flags");
    // xchg [rdx], rdx: the address is asked for again behind it
    assert!(with_body(&[&[0x48, 0x89, 0xd0], &[0x48, 0x87, 0x00], STEP]).is_none(), "a register that is overwritten");
}

#[test]
fn a_loop_that_is_entered_in_its_middle_is_not_steady() {
    // mov eax, [rdx]; add rdx, 8; cmp rdx, rcx; jne back; add rdx, rsi; cmp rdx, rdi; jne to the step
    let tail: &[&[u8]] = &[LOAD, STEP, &[0x48, 0x39, 0xca], &back(9), &[0x48, 0x01, 0xf2, 0x48, 0x39, 0xfa]];
    assert!(loop_of(&[&tail.concat(), &[0xc3]]).is_some());
    let len = tail.concat().len() as i8 + 2;
    assert!(loop_of(&[&tail.concat(), &[0x75, (2 - len) as u8], &[0xc3]]).is_none());
}

#[test]
fn an_index_has_its_scale_and_a_register_that_shrinks_a_lower_limit() {
    // mov eax, [rsi + rcx*4 + 16]; sub rcx, 1; jnz back
    let found = loop_of(&[&[0x8b, 0x44, 0x8e, 0x10], &[0x48, 0x83, 0xe9, 1], &back(8), &[0xc3]]).unwrap();
    assert_eq!(found.limits, [Limit { register: 1, is_up: false }]);
    assert_eq!(found.groups[0].limit, Some((0, 2)));
    assert_eq!(found.shares[0].2.varying, Some((1, 2)));
}

/// Pages of data, in what the last level of the bench's tables maps.
const FIRST: u64 = 0x14_0000;
const PRESENT: u64 = 1;
const WRITABLE: u64 = 2;
const ACCESSED: u64 = 0x20;
const DIRTY: u64 = 0x40;
const NO_EXECUTE: u64 = 1 << 63;

fn entry_of(page: u64) -> u64 {
    TABLES + 0x3000 + 8 * (page >> 12)
}

fn map(bench: &TestBench, page: u64, to: u64, bits: u64) {
    bench.write(entry_of(page), &(to | bits | NO_EXECUTE).to_le_bytes());
}

/// add rax, [rdx]; mov [rdx], rax; add rdx, 8; cmp rdx, rcx; jne back; ud2
const SUMS: &[u8] =
    &[0x48, 0x03, 0x02, 0x48, 0x89, 0x02, 0x48, 0x83, 0xc2, 8, 0x48, 0x39, 0xca, 0x75, 0xf1, 0x0f, 0x0b];

#[test]
fn a_loop_faults_where_its_round_does_and_nothing_is_touched_ahead() {
    on_each_tier(|tier| {
        let mut bench = TestBench::on(tier);
        bench.set_mode(CodeSize::Bits64, 0);
        bench.cpu.xcr0 = 7;
        bench.cpu.update_mode();
        for (number, bits) in
            [PRESENT | WRITABLE, PRESENT | WRITABLE, PRESENT | WRITABLE, PRESENT].into_iter().enumerate()
        {
            map(&bench, FIRST + 4096 * number as u64, FIRST + 4096 * number as u64, bits);
        }
        let bits =
            |bench: &TestBench, number: u64| bench.read_u64(entry_of(FIRST + 4096 * number)) & (ACCESSED | DIRTY);
        bench.cpu.gpr[2] = FIRST + 8;
        bench.cpu.gpr[RCX] = FIRST + 2 * 4096;
        bench.cpu.gpr[RAX] = 1;
        bench.run_code(SUMS, 1 << 40);
        assert_eq!(bench.cpu.gpr[2], FIRST + 2 * 4096, "{tier:?}");
        assert_eq!((bits(&bench, 1), bits(&bench, 2)), (ACCESSED | DIRTY, 0), "{tier:?}: what lies behind the end");
        bench.cpu.cr0 |= crate::cpu::cr0::WP;
        bench.cpu.update_mode();
        bench.cpu.gpr[RCX] = 0;
        let stop = bench.run_code(SUMS, 1 << 40);
        let Stop::Fault(fault) = stop else { panic!("{tier:?}: {stop:?}") };
        assert_eq!((fault.vector, bench.cpu.gpr[2], bench.cpu.rip), (14, FIRST + 3 * 4096, CODE + 3), "{tier:?}");
        assert_eq!(bits(&bench, 3), ACCESSED, "{tier:?}: it was read, not written");
    });
}

#[test]
fn a_loop_sees_a_page_that_is_mapped_anew_under_it() {
    let Some(mut bench) = TestBench::translating(64 << 20) else { return };
    bench.set_mode(CodeSize::Bits64, 0);
    bench.cpu.xcr0 = 7;
    bench.cpu.update_mode();
    map(&bench, FIRST, FIRST, PRESENT);
    map(&bench, FIRST + 4096, FIRST + 4096, PRESENT);
    bench.write(FIRST, &1u64.to_le_bytes());
    bench.write(FIRST + 4096, &0u64.to_le_bytes());
    bench.cpu.gpr[2] = FIRST;
    // cmp qword [rdx], 0; jne back; hlt: it goes on for ever
    bench.write(CODE, &[0x48, 0x83, 0x3a, 0, 0x75, 0xfa, 0xf4]);
    bench.cpu.rip = CODE;
    bench.run_blocks(10);
    assert_ne!(bench.cpu.rip, CODE + 7);
    assert_eq!(bench.translation_counters().translated_loops, 1);
    map(&bench, FIRST, FIRST + 4096, PRESENT);
    bench.cpu.tlb.invalidate_page(FIRST);
    let stop = bench.run(1 << 40);
    assert!(!matches!(stop, Stop::Limit), "{stop:?}");
    assert_eq!(bench.cpu.rip, CODE + 7);
}

#[test]
fn a_loop_that_is_entered_in_its_middle_uses_the_registers_of_then() {
    on_each_tier(|tier| {
        let mut bench = TestBench::on(tier);
        bench.set_mode(CodeSize::Bits64, 0);
        bench.write(FIRST, &std::array::from_fn::<u8, 64, _>(|at| at as u8));
        bench.cpu.gpr[2] = FIRST;
        bench.cpu.gpr[RCX] = 20;
        // add ebx, 1; add eax, [rdx]; sub ecx, 1; jnz back; lea rdx, [rdx + 16]; pause; mov ecx, 3; sub r14d, 1; jg to the second; ud2
        let code = [
            0x83, 0xc3, 1, 0x03, 0x02, 0x83, 0xe9, 1, 0x75, 0xf6, 0x48, 0x8d, 0x52, 16, 0xf3, 0x90, 0xb9, 3, 0, 0, 0,
            0x41, 0x83, 0xee, 1, 0x7f, 0xe8, 0x0f, 0x0b,
        ];
        bench.cpu.gpr[14] = 2;
        bench.cpu.gpr[RAX] = 0;
        bench.run_code(&code, 1 << 40);
        let word = |at: u32| u32::from_le_bytes(std::array::from_fn(|byte| (at + byte as u32) as u8));
        let sum = word(0).wrapping_mul(20).wrapping_add(word(16).wrapping_mul(3));
        assert_eq!(bench.cpu.gpr[RAX] as u32, sum, "{tier:?}");
    });
}

#[test]
fn a_store_that_needs_all_scratch_registers_still_finds_the_note_of_its_page() {
    let run = |tier| {
        let mut bench = TestBench::on(tier);
        bench.set_mode(CodeSize::Bits64, 0);
        bench.write(FIRST, &std::array::from_fn::<u8, 256, _>(|at| at as u8));
        (bench.cpu.gpr[9], bench.cpu.gpr[10]) = (0x0123_4567_89ab_cdef, FIRST);
        bench.cpu.gpr[RCX] = 30;
        // shld [r10], r9, cl; add r10, 8; sub rcx, 1; jnz back; ud2
        let code = [0x4d, 0x0f, 0xa5, 0x0a, 0x49, 0x83, 0xc2, 8, 0x48, 0x83, 0xe9, 1, 0x75, 0xf2, 0x0f, 0x0b];
        let stop = bench.run_code(&code, 1 << 40);
        assert!(matches!(stop, Stop::Fault(fault) if fault.vector == 6), "{tier:?}: {stop:?}");
        bench.read::<256>(FIRST)
    };
    let expected = run(Tier::Interpreter);
    on_each_tier(|tier| assert_eq!(run(tier), expected, "{tier:?}"));
}
