//! What the comparison with the host cannot reach: the stack, branches, faults, 16- and 32-bit code.

use crate::cpu::{CS, CodeSize, RAX, RBP, RBX, RCX, RDI, RDX, RSI, RSP, SS};
use crate::fault::vector;
use crate::flags;
use crate::testbench::{CODE, DATA, STACK, Stop, TestBench, Tier, on_each_tier};

/// Address of the page-table entry of a page in the bench's identity tables.
fn page_entry(address: u64) -> u64 {
    0x4000 + 8 * (address >> 12)
}

fn unmap(bench: &mut TestBench, address: u64) {
    bench.write(page_entry(address), &[0; 8]);
    bench.cpu.tlb.invalidate_page(address);
}

#[track_caller]
fn fault_vector(stop: Stop) -> (u8, Option<u32>, u64) {
    match stop {
        Stop::Fault(fault) => (fault.vector, fault.error_code, fault.detail),
        other => panic!("no fault but {other:?}"),
    }
}

#[track_caller]
fn run_to_ud2(bench: &mut TestBench, code: &[u8]) {
    let mut bytes = code.to_vec();
    bytes.extend([0x0f, 0x0b]);
    let stop = bench.run_code(&bytes, 100_000);
    assert_eq!(fault_vector(stop).0, vector::INVALID_OPCODE, "at {:x}", bench.cpu.rip);
    assert_eq!(bench.cpu.rip, CODE + code.len() as u64);
}

#[test]
fn a_call_pushes_the_next_address_and_a_return_takes_it() {
    on_each_tier(|tier| {
        let mut bench = TestBench::on(tier);
        // call +2; jmp +4; mov al, 7; ret 8; (after) ud2
        let stop = bench.run_code(&[0xe8, 2, 0, 0, 0, 0xeb, 5, 0xb0, 7, 0xc2, 8, 0, 0x0f, 0x0b], 100);
        assert_eq!(fault_vector(stop).0, vector::INVALID_OPCODE);
        assert_eq!((bench.cpu.rip, bench.cpu.gpr[RAX], bench.cpu.gpr[RSP]), (CODE + 12, 7, STACK + 8));
        assert_eq!(bench.read_u64(STACK - 8), CODE + 5);
        assert_eq!(bench.cpu.instructions, 4);
    });
}

#[test]
fn a_push_that_faults_leaves_the_stack_pointer() {
    on_each_tier(|tier| {
        let mut bench = TestBench::on(tier);
        unmap(&mut bench, STACK - 0x1000);
        for code in [&[0x50][..], &[0x6a, 1], &[0x9c], &[0xe8, 0, 0, 0, 0], &[0xc8, 0, 0, 0], &[0xff, 0x36]] {
            bench.cpu.gpr[RSI] = DATA;
            let stop = bench.run_code(code, 1);
            assert_eq!(fault_vector(stop), (vector::PAGE_FAULT, Some(2), STACK - 8), "{code:x?}");
            assert_eq!((bench.cpu.gpr[RSP], bench.cpu.gpr[RBP], bench.cpu.rip), (STACK, 0, CODE));
        }
    });
}

#[test]
fn pop_to_memory_addresses_with_the_moved_stack_pointer() {
    on_each_tier(|tier| {
        let mut bench = TestBench::on(tier);
        bench.write(STACK, &0x1122u64.to_le_bytes());
        // pop qword [rsp+8]
        run_to_ud2(&mut bench, &[0x8f, 0x44, 0x24, 8]);
        assert_eq!((bench.read_u64(STACK + 16), bench.cpu.gpr[RSP]), (0x1122, STACK + 8));
        bench.cpu.gpr[RSP] = STACK;
        // pop rsp
        run_to_ud2(&mut bench, &[0x5c]);
        assert_eq!(bench.cpu.gpr[RSP], 0x1122);
    });
}

#[test]
fn frames_nest() {
    on_each_tier(|tier| {
        let mut bench = TestBench::on(tier);
        bench.cpu.gpr[RBP] = STACK + 0x100;
        bench.write(STACK + 0xf8, &0xaaaau64.to_le_bytes());
        // enter 16, 2
        run_to_ud2(&mut bench, &[0xc8, 16, 0, 2]);
        assert_eq!((bench.cpu.gpr[RBP], bench.cpu.gpr[RSP]), (STACK - 8, STACK - 8 - 16 - 16));
        assert_eq!((bench.read_u64(STACK - 8), bench.read_u64(STACK - 16)), (STACK + 0x100, 0xaaaa));
        assert_eq!(bench.read_u64(STACK - 24), STACK - 8);
        run_to_ud2(&mut bench, &[0xc9]);
        assert_eq!((bench.cpu.gpr[RBP], bench.cpu.gpr[RSP]), (STACK + 0x100, STACK));
    });
}

#[test]
fn popf_changes_only_what_the_privilege_allows() {
    on_each_tier(|tier| {
        let all = u64::MAX;
        let mut bench = TestBench::on(tier);
        bench.cpu.gpr[RAX] = all & !flags::TF;
        // push rax; popfq
        run_to_ud2(&mut bench, &[0x50, 0x9d]);
        let expected =
            flags::ARITHMETIC | flags::SYSTEM & !(flags::TF | flags::VM | flags::RF | flags::VIF | flags::VIP) | 2;
        assert_eq!(bench.cpu.rflags(), expected);
        bench.set_mode(CodeSize::Bits64, 3);
        bench.cpu.gpr[RAX] = all & !flags::TF;
        run_to_ud2(&mut bench, &[0x50, 0x9d]);
        assert_eq!(bench.cpu.rflags(), expected & !(flags::IF | flags::IOPL));
    });
}

#[test]
fn divisions_that_do_not_fit_raise_divide_error() {
    on_each_tier(|tier| {
        let mut bench = TestBench::on(tier);
        let cases: [(&[u8], u64, u64, u64); 7] = [
            (&[0x48, 0xf7, 0xf3], 5, 0, 0),                         // div rbx by zero
            (&[0x48, 0xf7, 0xf3], 0, 3, 3),                         // quotient 2^64
            (&[0x48, 0xf7, 0xfb], 1 << 63, u64::MAX, u64::MAX),     // idiv MIN by -1
            (&[0x48, 0xf7, 0xfb], 0, 1 << 62, 1),                   // far too large
            (&[0xf7, 0xfb], 0x8000_0000, 0xffff_ffff, 0xffff_ffff), // idiv of 32 bits
            (&[0x66, 0xf7, 0xf3], 0, 1, 1),                         // div of 16 bits
            (&[0xf6, 0xfb], 0x8000, 0, 0xff),                       // idiv of 8 bits
        ];
        for (code, rax, rdx, rbx) in cases {
            (bench.cpu.gpr[RAX], bench.cpu.gpr[RDX], bench.cpu.gpr[RBX]) = (rax, rdx, rbx);
            let stop = bench.run_code(code, 1);
            assert_eq!(fault_vector(stop).0, vector::DIVIDE_ERROR, "{code:x?}");
            assert_eq!((bench.cpu.gpr[RAX], bench.cpu.gpr[RDX], bench.cpu.rip), (rax, rdx, CODE));
        }
        // The most negative quotients that fit.
        (bench.cpu.gpr[RAX], bench.cpu.gpr[RDX], bench.cpu.gpr[RBX]) = (1 << 63, u64::MAX, 1);
        run_to_ud2(&mut bench, &[0x48, 0xf7, 0xfb]);
        assert_eq!((bench.cpu.gpr[RAX], bench.cpu.gpr[RDX]), (1 << 63, 0));
        (bench.cpu.gpr[RAX], bench.cpu.gpr[RDX], bench.cpu.gpr[RBX]) = (1 << 63, u64::MAX - 1, 3);
        run_to_ud2(&mut bench, &[0x48, 0xf7, 0xfb]);
        assert_eq!(bench.cpu.gpr[RAX] as i64, (((-2i128 << 64) + (1 << 63)) / 3) as i64);
    });
}

#[test]
fn a_branch_to_a_non_canonical_address_faults_where_it_stands() {
    on_each_tier(|tier| {
        let mut bench = TestBench::on(tier);
        bench.cpu.gpr[RAX] = 1 << 63;
        for code in [&[0xff, 0xe0][..], &[0xff, 0xd0]] {
            let stop = bench.run_code(code, 1);
            assert_eq!((fault_vector(stop), bench.cpu.rip), ((vector::GENERAL_PROTECTION, Some(0), 0), CODE));
            assert_eq!(bench.cpu.gpr[RSP], STACK);
        }
        bench.write(STACK, &(1u64 << 63).to_le_bytes());
        let stop = bench.run_code(&[0xc3], 1);
        assert_eq!(
            (fault_vector(stop).0, bench.cpu.rip, bench.cpu.gpr[RSP]),
            (vector::GENERAL_PROTECTION, CODE, STACK)
        );
    });
}

#[test]
fn an_instruction_of_sixteen_bytes_is_a_protection_fault() {
    on_each_tier(|tier| {
        let mut bench = TestBench::on(tier);
        let mut code = [0x66; 16];
        code[15] = 0x90;
        let stop = bench.run_code(&code, 1);
        assert_eq!(fault_vector(stop), (vector::GENERAL_PROTECTION, Some(0), 0));
        run_to_ud2(&mut bench, &code[1..]);
    });
}

#[test]
fn repeated_moves_stop_exactly_at_the_faulting_element() {
    on_each_tier(|tier| {
        let mut bench = TestBench::on(tier);
        unmap(&mut bench, DATA + 0x3000);
        for (code, size) in [(&[0xf3, 0xa4][..], 1), (&[0xf3, 0x48, 0xa5], 8)] {
            bench.cpu.gpr[RSI] = DATA + 0x10;
            bench.cpu.gpr[RDI] = DATA + 0x1804;
            bench.cpu.gpr[RCX] = 0x4000;
            let stop = bench.run_code(code, 1);
            let whole = (0x3000 - 0x1804) / size;
            assert_eq!(fault_vector(stop), (vector::PAGE_FAULT, Some(2), DATA + 0x3000));
            assert_eq!(
                (bench.cpu.gpr[RSI], bench.cpu.gpr[RDI], bench.cpu.gpr[RCX], bench.cpu.rip),
                (DATA + 0x10 + whole * size, DATA + 0x1804 + whole * size, 0x4000 - whole, CODE)
            );
        }
    });
}

#[test]
fn overlapping_repeated_moves_copy_element_by_element() {
    on_each_tier(|tier| {
        let mut bench = TestBench::on(tier);
        bench.write(DATA, &[1, 2, 3, 4, 5, 6, 7, 8]);
        bench.cpu.gpr[RSI] = DATA;
        bench.cpu.gpr[RDI] = DATA + 2;
        bench.cpu.gpr[RCX] = 6;
        run_to_ud2(&mut bench, &[0xf3, 0xa4]);
        assert_eq!(bench.read(DATA), [1, 2, 1, 2, 1, 2, 1, 2]);
        assert_eq!((bench.cpu.gpr[RCX], bench.cpu.instructions), (0, 1));
    });
}

#[test]
fn long_repetitions_count_as_one_instruction() {
    on_each_tier(|tier| {
        let mut bench = TestBench::on(tier);
        bench.cpu.gpr[RDI] = DATA;
        bench.cpu.gpr[RSI] = DATA;
        bench.cpu.gpr[RCX] = 0x20_0000;
        // rep stosb; then scan them all again: repe scasb
        run_to_ud2(&mut bench, &[0xf3, 0xaa]);
        let first = bench.cpu.instructions;
        assert_eq!(bench.cpu.gpr[RCX], 0);
        (bench.cpu.gpr[RDI], bench.cpu.gpr[RCX]) = (DATA, 0x1_0000);
        run_to_ud2(&mut bench, &[0xf3, 0xae]);
        assert_eq!(bench.cpu.gpr[RCX], 0);
        // Translated code counts a repetition each time that it gets to it, and what follows up to the next branch with it.
        if tier != Tier::Translator {
            assert_eq!((first, bench.cpu.instructions), (1, 2));
        }
    });
}

#[test]
fn a_locked_operand_over_two_pages_is_changed_as_a_whole() {
    on_each_tier(|tier| {
        let mut bench = TestBench::on(tier);
        let at = DATA + 0xffc;
        bench.write(at, &0x1122_3344_ffff_ffffu64.to_le_bytes());
        bench.cpu.gpr[RSI] = at;
        // lock inc qword [rsi]
        run_to_ud2(&mut bench, &[0xf0, 0x48, 0xff, 0x06]);
        assert_eq!(bench.read_u64(at), 0x1122_3345_0000_0000);
        bench.cpu.gpr[RAX] = 0x1122_3345_0000_0000;
        bench.cpu.gpr[RCX] = 77;
        // lock cmpxchg [rsi], rcx
        run_to_ud2(&mut bench, &[0xf0, 0x48, 0x0f, 0xb1, 0x0e]);
        assert!(bench.read_u64(at) == 77 && bench.cpu.arithmetic.zero());
    });
}

#[test]
fn cmpxchg16b_wants_alignment_and_swaps_sixteen_bytes() {
    on_each_tier(|tier| {
        let mut bench = TestBench::on(tier);
        bench.cpu.gpr[RSI] = DATA + 8;
        let code = [0xf0, 0x48, 0x0f, 0xc7, 0x0e];
        let stop = bench.run_code(&code, 1);
        assert_eq!(fault_vector(stop), (vector::GENERAL_PROTECTION, Some(0), 0));
        bench.cpu.gpr[RSI] = DATA;
        (bench.cpu.gpr[RBX], bench.cpu.gpr[RCX]) = (5, 6);
        run_to_ud2(&mut bench, &code);
        assert!(bench.cpu.arithmetic.zero());
        assert_eq!((bench.read_u64(DATA), bench.read_u64(DATA + 8)), (5, 6));
        run_to_ud2(&mut bench, &code);
        assert!(!bench.cpu.arithmetic.zero());
        assert_eq!((bench.cpu.gpr[RAX], bench.cpu.gpr[RDX]), (5, 6));
    });
}

#[test]
fn sixteen_bit_code_keeps_the_upper_halves() {
    on_each_tier(|tier| {
        let mut bench = TestBench::on(tier);
        bench.set_mode(CodeSize::Bits16, 0);
        // A segment whose base makes IP small.
        bench.cpu.segments[CS as usize].base = CODE;
        bench.cpu.segments[CS as usize].limit = 0xffff;
        bench.cpu.segments[SS as usize].base = STACK;
        bench.cpu.gpr[RSP] = 0xabcd_0000;
        bench.cpu.gpr[RAX] = 0xffff_1234;
        bench.cpu.gpr[RCX] = 0x7_0002;
        // push ax; pop cx (cx = 1234); loop -1 would be endless; call +0; ud2
        bench.write(CODE, &[0x50, 0x59, 0xe8, 0, 0, 0x0f, 0x0b]);
        bench.cpu.rip = 0;
        let stop = bench.run(100);
        assert_eq!(fault_vector(stop).0, vector::INVALID_OPCODE);
        assert_eq!((bench.cpu.gpr[RCX], bench.cpu.gpr[RSP], bench.cpu.rip), (0x7_1234, 0xabcd_fffe, 5));
        assert_eq!(bench.read::<2>(STACK + 0xfffe), [5, 0]);
    });
}

#[test]
fn code_past_its_segments_limit_is_a_protection_fault() {
    on_each_tier(|tier| {
        let mut bench = TestBench::on(tier);
        bench.set_mode(CodeSize::Bits32, 0);
        bench.cpu.segments[CS as usize].limit = CODE as u32 + 2;
        // inc eax; then mov eax, imm32 reaches over the limit
        let stop = bench.run_code(&[0x40, 0xb8, 1, 2, 3, 4], 10);
        assert_eq!(fault_vector(stop), (vector::GENERAL_PROTECTION, Some(0), 0));
        assert_eq!((bench.cpu.gpr[RAX], bench.cpu.rip), (1, CODE + 1));
        // The same bytes run when the limit allows, and fault again when it is lowered.
        bench.cpu.segments[CS as usize].limit = u32::MAX;
        bench.cpu.rip = CODE + 1;
        bench.step(1);
        assert_eq!(bench.cpu.gpr[RAX], 0x0403_0201);
        bench.cpu.segments[CS as usize].limit = CODE as u32 + 2;
        bench.cpu.rip = CODE + 1;
        let stop = bench.run(1);
        assert_eq!(fault_vector(stop).0, vector::GENERAL_PROTECTION);
    });
}

#[test]
fn pusha_and_popa_pass_over_the_stack_pointer() {
    on_each_tier(|tier| {
        let mut bench = TestBench::on(tier);
        bench.set_mode(CodeSize::Bits32, 0);
        for (register, value) in (1..).zip([RAX, RCX, RDX, RBX, RBP, RSI, RDI]) {
            bench.cpu.gpr[value] = register;
        }
        run_to_ud2(&mut bench, &[0x60]);
        assert_eq!(bench.cpu.gpr[RSP], STACK - 32);
        let stored: [u8; 32] = bench.read(STACK - 32);
        let words: Vec<u32> = stored.chunks(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect();
        assert_eq!(words, [7, 6, 5, STACK as u32, 4, 3, 2, 1]);
        run_to_ud2(&mut bench, &[0x61]);
        assert_eq!((bench.cpu.gpr[RSP], bench.cpu.gpr[RAX], bench.cpu.gpr[RDI]), (STACK, 1, 7));
    });
}

#[test]
fn decimal_adjustments_follow_the_manual() {
    on_each_tier(|tier| {
        let mut bench = TestBench::on(tier);
        bench.set_mode(CodeSize::Bits32, 0);
        bench.cpu.gpr[RAX] = 0x79;
        // add al, 0x35; daa (SDM vol. 2, DAA: example)
        run_to_ud2(&mut bench, &[0x04, 0x35, 0x27]);
        assert_eq!(bench.cpu.gpr[RAX], 0x14);
        assert!(bench.cpu.arithmetic.carry());
        bench.cpu.gpr[RAX] = 0x35;
        // sub al, 0x47; das
        run_to_ud2(&mut bench, &[0x2c, 0x47, 0x2f]);
        assert_eq!(bench.cpu.gpr[RAX], 0x88);
        assert!(bench.cpu.arithmetic.carry());
        bench.cpu.gpr[RAX] = 0x0f;
        // aaa
        run_to_ud2(&mut bench, &[0x37]);
        assert_eq!(bench.cpu.gpr[RAX], 0x105);
        bench.cpu.gpr[RAX] = 63;
        // aam; aad
        run_to_ud2(&mut bench, &[0xd4, 10]);
        assert_eq!(bench.cpu.gpr[RAX], 0x603);
        run_to_ud2(&mut bench, &[0xd5, 10]);
        assert_eq!(bench.cpu.gpr[RAX], 63);
    });
}

#[test]
fn bound_and_bit_strings_reach_as_far_as_their_index_says() {
    on_each_tier(|tier| {
        let mut bench = TestBench::on(tier);
        bench.cpu.gpr[RSI] = DATA + 0x100;
        bench.cpu.gpr[RAX] = (-9i64) as u64;
        // bts [rsi], rax
        run_to_ud2(&mut bench, &[0x48, 0x0f, 0xab, 0x06]);
        assert_eq!(bench.read_u64(DATA + 0xf8), 1 << 55);
        // lock btr [rsi], rax
        run_to_ud2(&mut bench, &[0xf0, 0x48, 0x0f, 0xb3, 0x06]);
        assert!(bench.read_u64(DATA + 0xf8) == 0 && bench.cpu.arithmetic.carry());
        bench.set_mode(CodeSize::Bits32, 0);
        bench.write(DATA, &[0, 0, 0, 0, 9, 0, 0, 0]);
        bench.cpu.gpr[RSI] = DATA;
        bench.cpu.gpr[RAX] = 9;
        run_to_ud2(&mut bench, &[0x62, 0x06]);
        bench.cpu.gpr[RAX] = 10;
        let stop = bench.run_code(&[0x62, 0x06], 1);
        assert_eq!(fault_vector(stop).0, vector::BOUND);
    });
}

#[test]
fn a_store_through_a_stale_translation_is_noticed_where_it_goes() {
    on_each_tier(|tier| {
        let mut bench = TestBench::on(tier);
        let (function, alias, elsewhere) = (DATA, DATA + 0x1000, DATA + 0x2000);
        bench.write(function, &[0xb0, 1, 0xc3]);
        bench.write(page_entry(alias), &(function | 0x67).to_le_bytes());
        bench.cpu.gpr[RBX] = alias;
        bench.cpu.gpr[RDX] = function;
        bench.cpu.gpr[RSI] = page_entry(alias);
        bench.cpu.gpr[RDI] = elsewhere | 0x67;
        // The guest changes its table and flushes nothing: the second store may go by the old translation, and then changes the function.
        // mov byte [rbx + 1], 5; call rdx; mov rbp, rax; mov [rsi], rdi; mov byte [rbx + 1], 6; call rdx
        let code =
            [0xc6, 0x43, 0x01, 5, 0xff, 0xd2, 0x48, 0x89, 0xc5, 0x48, 0x89, 0x3e, 0xc6, 0x43, 0x01, 6, 0xff, 0xd2];
        run_to_ud2(&mut bench, &code);
        assert_eq!(bench.cpu.gpr[RBP] & 0xff, 5);
        let byte = bench.read::<1>(function + 1)[0];
        assert_eq!(bench.cpu.gpr[RAX] & 0xff, u64::from(byte));
        // In lockstep every first store of a unit to a page is looked up anew.
        let is_by_new_table = tier == Tier::Lockstep && bench.read::<1>(elsewhere + 1) == [6];
        assert_eq!(byte, if is_by_new_table { 5 } else { 6 });
    });
}
