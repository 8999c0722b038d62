//! Translated code where code, translations and targets change under it.

use crate::cpu::{RAX, RBX, RCX};
use crate::testbench::{CODE, CodeSize, DATA, Stop, TABLES, TestBench};

/// As machines have by default.
const CODE_CACHE_BYTES: usize = 64 << 20;

/// A bench that translates all code before it runs first, in privileged 64-bit code with all vector units on.
fn bench() -> Option<TestBench> {
    let mut bench = TestBench::translating(CODE_CACHE_BYTES)?;
    bench.cpu.xcr0 = 7;
    bench.cpu.update_mode();
    Some(bench)
}

fn vector(stop: Stop) -> u8 {
    match stop {
        Stop::Fault(exception) => exception.vector,
        stop => panic!("{stop:?}"),
    }
}

fn entry_of(page: u64) -> u64 {
    TABLES + 0x3000 + 8 * (page >> 12)
}

#[test]
fn indirect_jumps_to_addresses_that_are_not_canonical_fault() {
    let Some(mut bench) = bench() else { return };
    for privilege in [0, 3] {
        bench.set_mode(CodeSize::Bits64, privilege);
        bench.cpu.xcr0 = 7;
        bench.cpu.update_mode();
        // Also every value that an empty entry of a jump table might hold.
        for target in
            [1u64 << 63, 1 << 47, !0 << 47, !0, !1, !0xfff, !0x7ff, 0x8000_0000_0000_0123, 1 << 62, (1 << 63) - 1]
        {
            for code in [&[0xff, 0xe0][..], &[0xff, 0xd0], &[0x50, 0xc3]] {
                bench.cpu.gpr[RAX] = target;
                let stop = bench.run_code(code, 10);
                let canonical = target as i64 >> 47 == 0 || target as i64 >> 47 == -1;
                assert_eq!(vector(stop), if canonical { 14 } else { 13 }, "{target:#x} {code:x?}");
            }
        }
    }
}

#[test]
fn a_store_into_the_running_unit_takes_effect_at_the_next_instruction() {
    let Some(mut bench) = bench() else { return };
    // add byte [rip+3], 0x40 (turns the second add's immediate from 1 to 0x41); add eax, 1; ud2
    let code = [0x80, 0x05, 2, 0, 0, 0, 0x40, 0x83, 0xc0, 1, 0x0f, 0x0b];
    for _ in 0..3 {
        bench.cpu.gpr[RAX] = 0;
        assert_eq!(vector(bench.run_code(&code, 100)), 6);
        assert_eq!((bench.cpu.gpr[RAX], bench.cpu.rip), (0x41, CODE + 10));
    }
}

#[test]
fn a_loop_that_rewrites_its_own_immediate_sees_every_value() {
    let Some(mut bench) = bench() else { return };
    // mov ecx, 100; l: add eax, imm32 (0 at first); inc dword [rip - 10]; dec ecx; jnz l; ud2
    let mut code = vec![0xb9, 100, 0, 0, 0, 0x05, 0, 0, 0, 0];
    code.extend([0xff, 0x05, (-10i8) as u8, 0xff, 0xff, 0xff]);
    code.extend([0xff, 0xc9, 0x75, (-15i8) as u8, 0x0f, 0x0b]);
    bench.cpu.gpr[RAX] = 0;
    assert_eq!(vector(bench.run_code(&code, 100)), 6);
    assert_eq!((bench.cpu.gpr[RAX], bench.cpu.gpr[RCX]), ((0..100).sum::<u64>(), 0));
}

#[test]
fn a_push_and_a_store_over_two_pages_into_code_are_seen() {
    let Some(mut bench) = bench() else { return };
    let other = CODE + 0x1000;
    // The end of one page stores over its end: the first bytes of the next page are code that has run.
    bench.write(other, &[0xb8, 1, 0, 0, 0, 0xc3]);
    // call other; mov rbx, [DATA]; mov [other - 1], rbx; call other; ud2
    let mut code = vec![0xe8];
    code.extend(((other - CODE - 5) as u32).to_le_bytes());
    code.extend([0x48, 0x8b, 0x1c, 0x25]);
    code.extend((DATA as u32).to_le_bytes());
    code.extend([0x48, 0x89, 0x1c, 0x25]);
    code.extend((other as u32 - 1).to_le_bytes());
    code.push(0xe8);
    let next = code.len() as u64 + 4;
    code.extend(((other - CODE - next) as u32).to_le_bytes());
    code.extend([0x0f, 0x0b]);
    bench.write(DATA, &[0x90, 0xb8, 2, 0, 0, 0, 0xc3, 0x90]);
    assert_eq!(vector(bench.run_code(&code, 100)), 6);
    assert_eq!((bench.cpu.gpr[RAX], bench.cpu.rip), (2, CODE + next + 2 - 2));
    // Now with the stack in the code's page: the pushed return address is what runs next.
    // mov rsp, other + 8; mov rax, 0x0b0f...(ud2); push rax; jmp other
    let mut code = vec![0xbc];
    code.extend((other as u32 + 8).to_le_bytes());
    code.extend([0x48, 0xb8, 0xb8, 7, 0, 0, 0, 0x0f, 0x0b, 0x90, 0x50, 0xe9]);
    let next = code.len() as u64 + 4;
    code.extend(((other - CODE - next) as u32).to_le_bytes());
    assert_eq!(vector(bench.run_code(&code, 100)), 6);
    assert_eq!((bench.cpu.gpr[RAX], bench.cpu.rip), (7, other + 5));
}

#[test]
fn a_page_of_code_mapped_at_two_addresses_changes_at_both() {
    let Some(mut bench) = bench() else { return };
    let (first, second) = (CODE + 0x2000, CODE + 0x3000);
    bench.write(entry_of(second), &(first | 7).to_le_bytes());
    bench.write(first, &[0xb8, 1, 0, 0, 0, 0xc3]);
    // call second; mov byte [first + 1], 5; call second; add eax, [..]: then call first; ud2
    let mut code = Vec::new();
    let call = |code: &mut Vec<u8>, target: u64| {
        code.push(0xe8);
        let next = CODE + code.len() as u64 + 4;
        code.extend((target.wrapping_sub(next) as u32).to_le_bytes());
    };
    call(&mut code, second);
    code.extend([0x89, 0xc3, 0xc6, 0x04, 0x25]);
    code.extend((first as u32 + 1).to_le_bytes());
    code.push(5);
    call(&mut code, second);
    code.extend([0xc1, 0xe3, 4, 0x01, 0xc3]);
    call(&mut code, first);
    code.extend([0xc1, 0xe3, 4, 0x01, 0xc3, 0x0f, 0x0b]);
    assert_eq!(vector(bench.run_code(&code, 100)), 6);
    assert_eq!(bench.cpu.gpr[RBX], 0x155);
}

#[test]
fn code_that_maps_its_own_page_anew_goes_on_in_the_new_page() {
    let Some(mut bench) = bench() else { return };
    let (page, other) = (CODE + 0x4000, CODE + 0x5000);
    for flush in [&[0x0f, 0x01, 0x3e][..], &[0x0f, 0x20, 0xda, 0x0f, 0x22, 0xda]] {
        // mov [rdi], rax; invlpg [rsi] or mov rdx, cr3; mov cr3, rdx; jmp on; on: mov ebx, n; ud2
        let mut code = vec![0x48, 0x89, 0x07];
        code.extend(flush);
        code.extend([0xeb, 0, 0xbb, 1, 0, 0, 0, 0x0f, 0x0b]);
        bench.write(entry_of(page), &(page | 7).to_le_bytes());
        bench.cpu.tlb.flush_all();
        bench.write(page, &code);
        let at = code.len() - 6;
        code[at] = 2;
        bench.write(other, &code);
        for round in 0..2 {
            bench.cpu.gpr[RAX] = other | 7;
            bench.cpu.gpr[crate::cpu::RDI] = entry_of(page);
            bench.cpu.gpr[crate::cpu::RSI] = page;
            bench.cpu.rip = page;
            assert_eq!(vector(bench.run(100)), 6, "{round}");
            assert_eq!(bench.cpu.gpr[RBX], 2, "{round}");
        }
    }
}

#[test]
fn a_unit_at_the_end_of_a_page_goes_on_in_the_next_and_faults_there() {
    let Some(mut bench) = bench() else { return };
    let end = CODE + 0x7000;
    // mov eax, 1 | mov ebx, imm over the page's end | ud2
    bench.write(end - 7, &[0xb8, 1, 0, 0, 0, 0xbb, 2, 0, 0, 0, 0x0f, 0x0b]);
    for _ in 0..3 {
        bench.cpu.gpr[RBX] = 0;
        bench.cpu.rip = end - 7;
        assert_eq!(vector(bench.run(100)), 6);
        assert_eq!((bench.cpu.gpr[RAX], bench.cpu.gpr[RBX], bench.cpu.rip), (1, 2, end + 3));
    }
    // The next page goes: the instruction over the end faults, with nothing done.
    bench.write(entry_of(end), &0u64.to_le_bytes());
    bench.cpu.tlb.invalidate_page(end);
    (bench.cpu.gpr[RAX], bench.cpu.gpr[RBX]) = (0, 0);
    bench.cpu.rip = end - 7;
    assert!(matches!(bench.run(100), Stop::Fault(exception) if exception.vector == 14 && exception.detail == end));
    assert_eq!((bench.cpu.gpr[RAX], bench.cpu.gpr[RBX], bench.cpu.rip), (1, 0, end - 2));
    // So does code that ends exactly there.
    bench.write(end - 2, &[0x90, 0x90]);
    bench.cpu.rip = end - 2;
    assert!(matches!(bench.run(100), Stop::Fault(exception) if exception.vector == 14 && exception.detail == end));
    assert_eq!(bench.cpu.rip, end);
}

/// Pages of data side by side whose frames are not, so that a host address does not lead from one to the next.
fn scatter(bench: &mut TestBench) {
    for page in 0..4 {
        bench.write(entry_of(DATA + (page << 12)), &((DATA + 0x1_0000 + ((3 - page) << 13)) | 7).to_le_bytes());
    }
    bench.cpu.tlb.flush_all();
}

/// Where the bytes at an address of [`scatter`]ed data are in memory.
fn scattered(address: u64) -> u64 {
    let page = (address - DATA) >> 12;
    DATA + 0x1_0000 + ((3 - page) << 13) + address % 0x1000
}

#[test]
fn accesses_that_share_a_look_up_find_both_pages_where_they_lie_in_two() {
    let Some(mut bench) = bench() else { return };
    scatter(&mut bench);
    // mov rax, [rdi]; mov rbx, [rdi + 24]; mov [rdi + 8], rbx; mov [rdi + 16], rax; add [rdi + 8], rax; ud2
    let mut code = vec![0x48, 0x8b, 0x07, 0x48, 0x8b, 0x5f, 24, 0x48, 0x89, 0x5f, 8];
    code.extend([0x48, 0x89, 0x47, 16, 0x48, 0x01, 0x47, 8, 0x0f, 0x0b]);
    for end in [DATA + 0x1000, DATA + 0x2000, DATA + 0x3000] {
        for start in (end - 48..end + 8).chain([DATA]) {
            for n in 0..4 {
                for byte in 0..8 {
                    bench.write(scattered(start + 8 * n + byte), &[(n * 16 + byte) as u8]);
                }
            }
            bench.cpu.gpr[crate::cpu::RDI] = start;
            assert_eq!(vector(bench.run_code(&code, 100)), 6);
            let word = |n: u64| {
                u64::from_le_bytes(std::array::from_fn(|byte| {
                    bench.read::<1>(scattered(start + 8 * n + byte as u64))[0]
                }))
            };
            let first = 0x0706_0504_0302_0100;
            let last = 0x3736_3534_3332_3130;
            assert_eq!([word(0), word(1), word(2), word(3)], [first, first + last, first, last], "{start:#x}");
            assert_eq!((bench.cpu.gpr[RAX], bench.cpu.gpr[RBX]), (first, last));
        }
    }
    // Only the single accesses that cross are the interpreter's: of five, at seven places each, at three ends.
    assert_eq!(bench.translation_counters().interpreted_singly, 5 * 7 * 3);
}

#[test]
fn an_access_that_shares_a_look_up_faults_itself() {
    let Some(mut bench) = bench() else { return };
    scatter(&mut bench);
    let (first, second) = (DATA + 0x1000, DATA + 0x2000);
    // mov rax, [rdi]; mov rbx, [rdi + 8]; mov [rdi], rbx; ud2
    let code = [0x48, 0x8b, 0x07, 0x48, 0x8b, 0x5f, 8, 0x48, 0x89, 0x1f, 0x0f, 0x0b];
    let frame = |address: u64| scattered(address) & !0xfff;
    let entries = [(first, frame(first)), (second, frame(second))];
    // (what the second page's entry lacks, RDI, the instruction that faults, the address)
    let cases = [
        (7, second - 8, CODE + 3, second),
        (7, second - 4, CODE, second),
        (2, second, CODE + 7, second),
        (2, second - 8, 0, 0),
        (2, second - 4, CODE + 7, second),
        (7, second - 16, 0, 0),
    ];
    for privilege in [0, 3] {
        bench.set_mode(CodeSize::Bits64, privilege);
        (bench.cpu.xcr0, bench.cpu.cr0) = (7, bench.cpu.cr0 | crate::cpu::cr0::WP);
        bench.cpu.update_mode();
        for round in 0..2 {
            for (lacks, start, at, address) in cases {
                bench.write(entry_of(entries[0].0), &(entries[0].1 | 7).to_le_bytes());
                bench.write(entry_of(entries[1].0), &(entries[1].1 | 7 & !lacks).to_le_bytes());
                bench.cpu.tlb.flush_all();
                bench.cpu.gpr[crate::cpu::RDI] = start;
                match bench.run_code(&code, 100) {
                    Stop::Fault(exception) if at != 0 => {
                        let found = (exception.vector, exception.detail, bench.cpu.rip);
                        assert_eq!(found, (14, address, at), "{round} {lacks} {start:#x}");
                    }
                    stop => assert_eq!((vector(stop), at), (6, 0), "{round} {lacks} {start:#x}"),
                }
            }
        }
    }
}

#[test]
fn a_pop_into_memory_is_translated_and_leaves_no_trace_if_it_faults() {
    let Some(mut bench) = bench() else { return };
    let (stack, frame) = (DATA + 0x1000, DATA + 0x2ff8);
    // pop qword [rbp + 8]; pop qword [rax * 2 + DATA]; ud2
    let mut code = vec![0x8f, 0x45, 8, 0x8f, 0x04, 0x45];
    code.extend((DATA as u32).to_le_bytes());
    code.extend([0x0f, 0x0b]);
    bench.write(stack, &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]);
    let prepare = |bench: &mut TestBench, rights: u64| {
        bench.write(entry_of(DATA + 0x3000), &((DATA + 0x3000) | rights).to_le_bytes());
        bench.cpu.tlb.flush_all();
        bench.cpu.gpr[RAX] = 32;
        bench.cpu.gpr[crate::cpu::RSP] = stack;
        bench.cpu.gpr[crate::cpu::RBP] = frame;
    };
    prepare(&mut bench, 7);
    let before = bench.translation_counters().callouts;
    assert_eq!(vector(bench.run_code(&code, 100)), 6);
    // UD2 is the only one.
    assert_eq!(bench.translation_counters().callouts, before + 1);
    assert_eq!(bench.read::<8>(DATA + 0x3000), [1, 2, 3, 4, 5, 6, 7, 8]);
    assert_eq!(bench.read::<8>(DATA + 64), [9, 10, 11, 12, 13, 14, 15, 16]);
    assert_eq!(bench.cpu.gpr[crate::cpu::RSP], stack + 16);
    // The frame's page is not there.
    prepare(&mut bench, 0);
    let Stop::Fault(exception) = bench.run_code(&code, 100) else { panic!("it faults") };
    assert_eq!((exception.vector, exception.detail, bench.cpu.rip), (14, DATA + 0x3000, CODE));
    assert_eq!(bench.cpu.gpr[crate::cpu::RSP], stack);
}

#[test]
fn an_instruction_in_two_pages_is_translated_and_follows_both() {
    let Some(mut bench) = bench() else { return };
    let end = CODE + 0x7000;
    let other = CODE + 0x9000;
    // mov eax, imm over the page's end | ud2
    let code = [0xb8, 1, 0, 0, 0, 0x0f, 0x0b];
    bench.write(end - 2, &code);
    let run = |bench: &mut TestBench| {
        bench.cpu.rip = end - 2;
        assert_eq!(vector(bench.run(100)), 6);
        bench.cpu.gpr[RAX]
    };
    assert_eq!(run(&mut bench), 1);
    let interpreted = bench.translation_counters().interpreted_singly;
    assert_eq!(run(&mut bench), 1);
    assert_eq!(bench.translation_counters().interpreted_singly, interpreted);
    // Stores into either half are seen.
    bench.write(end + 1, &[3]);
    assert_eq!(run(&mut bench), 0x30001);
    bench.write(end - 1, &[2]);
    assert_eq!(run(&mut bench), 0x30002);
    // So is another second page, with a flush of its own, and the first again.
    bench.write(other, &[5, 0, 0, 0x0f, 0x0b]);
    for (frame, value) in [(other, 0x502), (end, 0x30002), (other, 0x502)] {
        bench.write(entry_of(end), &(frame | 7).to_le_bytes());
        bench.cpu.tlb.invalidate_page(end);
        assert_eq!(run(&mut bench), value);
    }
}

#[test]
fn vector_instructions_are_translated_as_far_as_they_are_enabled() {
    use crate::cpu::{cr0, cr4};
    let Some(mut bench) = bench() else { return };
    // addps xmm0, xmm0; inc eax; ud2 | vaddps ymm0, ymm0, ymm0; ud2 | vzeroupper; ud2 | fnop; ud2 | paddb mm0, mm0; ud2
    let codes: [(&[u8], u64); 5] = [
        (&[0x0f, 0x58, 0xc0, 0xff, 0xc0, 0x0f, 0x0b], 5),
        (&[0xc5, 0xfc, 0x58, 0xc0, 0x0f, 0x0b], 4),
        (&[0xc5, 0xf8, 0x77, 0x0f, 0x0b], 3),
        (&[0xd9, 0xd0, 0x0f, 0x0b], 2),
        (&[0x0f, 0xfc, 0xc0, 0x0f, 0x0b], 3),
    ];
    let everything = (bench.cpu.cr0, bench.cpu.cr4, bench.cpu.xcr0);
    let without = |bits: u64| everything.1 & !bits;
    // CR0, CR4 and XCR0; the vector that each of the codes raises at its start, or 0.
    let settings: [((u64, u64, u64), [u8; 5]); 6] = [
        (everything, [0; 5]),
        ((everything.0, everything.1, 3), [0, 6, 6, 0, 0]),
        ((everything.0, without(cr4::OSXSAVE), 1), [0, 6, 6, 0, 0]),
        ((everything.0, without(cr4::OSXSAVE | cr4::OSFXSR), 1), [6, 6, 6, 0, 0]),
        ((everything.0 | cr0::TS, everything.1, 7), [7; 5]),
        (everything, [0; 5]),
    ];
    for round in 0..2 {
        for ((cr0, cr4, xcr0), expected) in settings {
            (bench.cpu.cr0, bench.cpu.cr4, bench.cpu.xcr0) = (cr0, cr4, xcr0);
            bench.cpu.update_mode();
            for ((code, end), expected) in codes.iter().zip(expected) {
                let found = vector(bench.run_code(code, 100));
                let at = if expected == 0 { CODE + end } else { CODE };
                assert_eq!(
                    (found, bench.cpu.rip),
                    (if expected == 0 { 6 } else { expected }, at),
                    "{round} {cr0:#x} {cr4:#x} {xcr0} {code:x?}"
                );
            }
        }
    }
    assert!(bench.translation_counters().exit_interpret > 0);
}

#[test]
fn a_call_far_away_that_pushes_onto_a_page_of_code_gets_there() {
    let Some(mut bench) = bench() else { return };
    let target = CODE + 0x2_0000;
    // mov ebx, 7; ud2
    bench.write(target, &[0xbb, 7, 0, 0, 0, 0x0f, 0x0b]);
    // mov rsp, CODE + 0x100; call target
    let mut code = vec![0xbc];
    code.extend((CODE as u32 + 0x100).to_le_bytes());
    code.push(0xe8);
    code.extend(((target - CODE - 10) as u32).to_le_bytes());
    for _ in 0..3 {
        bench.cpu.gpr[RBX] = 0;
        assert_eq!(vector(bench.run_code(&code, 100)), 6);
        assert_eq!((bench.cpu.gpr[RBX], bench.cpu.rip), (7, target + 5));
        assert_eq!(bench.read_u64(CODE + 0xf8), CODE + 10);
    }
}

#[test]
fn code_that_tells_which_flags_are_live_is_watched_too() {
    let Some(mut bench) = bench() else { return };
    // cmp ebx, ebx; mov ecx, [DATA]; jmp +200 | add ecx, 1 or setz al; ud2
    let mut code = vec![0x39, 0xdb, 0x8b, 0x0c, 0x25];
    code.extend((DATA as u32).to_le_bytes());
    code.extend([0xe9, 200, 0, 0, 0]);
    let target = CODE + code.len() as u64 + 200;
    bench.write(target, &[0x83, 0xc1, 1, 0x0f, 0x0b]);
    assert_eq!(vector(bench.run_code(&code, 100)), 6);
    // The look-up of the load may no longer clobber what the comparison has found.
    bench.write(target, &[0x0f, 0x94, 0xc0, 0x0f, 0x0b]);
    bench.cpu.gpr[RAX] = 0;
    bench.cpu.rip = CODE;
    assert_eq!((vector(bench.run(100)), bench.cpu.gpr[RAX]), (6, 1));
}

#[test]
fn a_unit_goes_on_behind_a_jump_and_watches_what_the_jump_leaves_out() {
    let Some(mut bench) = bench() else { return };
    // cmp ebx, 1; je out; mov eax, 5; jmp on; out: mov eax, 6; ud2; on: add eax, 1; cmp eax, 9; jne end; mov eax, 0; end: ud2
    let mut code = vec![0x83, 0xfb, 1, 0x74, 7, 0xb8, 5, 0, 0, 0, 0xeb, 7, 0xb8, 6, 0, 0, 0, 0x0f, 0x0b];
    code.extend([0x83, 0xc0, 1, 0x83, 0xf8, 9, 0x75, 5, 0xb8, 0, 0, 0, 0, 0x0f, 0x0b]);
    for _ in 0..2 {
        for (choice, value, end) in [(0, 6, code.len() - 2), (1, 6, 17)] {
            bench.cpu.gpr[RBX] = choice;
            assert_eq!(vector(bench.run_code(&code, 100)), 6);
            assert_eq!((bench.cpu.gpr[RAX], bench.cpu.rip), (value, CODE + end as u64), "{choice}");
        }
    }
    // The same without writing the code anew, but for one byte behind the jump.
    bench.write(CODE + 21, &[4]);
    (bench.cpu.rip, bench.cpu.gpr[RBX]) = (CODE, 0);
    assert_eq!((vector(bench.run(100)), bench.cpu.gpr[RAX]), (6, 0));
}
