//! Links out of a page in several address spaces.

use super::arena::{BINDINGS, JUMPS};
use super::bindings::{Binding, Bindings, NO_BINDING};
use super::generate::Shape;
use super::units::Form;
use crate::cpu::{RAX, RCX, RSP, cr4};
use crate::testbench::{CODE, CodeSize, STACK, Stop, TABLES, TestBench};

/// Where the code that is far lies, as all spaces see it.
const FAR: u64 = CODE + 0x2_1000;
/// Another page of code, and one behind it.
const OTHER: u64 = CODE + 0x4_0000;
/// Tables of the second address space: it differs from the first in the first 2 MiB only.
const SECOND: u64 = 0x9000;
const USER: u64 = 4;
const NO_EXECUTE: u64 = 1 << 63;
/// Bit 63 of a new CR3: entries stay.
const KEEP: u64 = 1 << 63;
/// Times that code calls.
const CALLS: u64 = 10;

/// A bench that translates all code before it runs first, with two address spaces, in the first, at privilege level 0.
fn bench() -> Option<TestBench> {
    let mut bench = TestBench::translating(64 << 20)?;
    for level in 0..4 {
        let table: [u8; 4096] = bench.read(TABLES + 0x1000 * level);
        bench.write(SECOND + 0x1000 * level, &table);
        if level < 3 {
            bench.write(SECOND + 0x1000 * level, &((SECOND + 0x1000 * (level + 1)) | 7).to_le_bytes());
        }
    }
    bench.cpu.xcr0 = 7;
    bench.cpu.update_mode();
    set_cr4(&mut bench, cr4::PCIDE, true);
    // mov ecx, CALLS; l: call FAR; dec ecx; jnz l; ud2
    let mut code = vec![0xb9];
    code.extend((CALLS as u32).to_le_bytes());
    code.push(0xe8);
    code.extend(((FAR - CODE - 10) as u32).to_le_bytes());
    code.extend([0xff, 0xc9, 0x75, (-9i8) as u8, 0x0f, 0x0b]);
    bench.write(CODE, &code);
    bench.write(FAR, &adds(1));
    bench.write(OTHER, &adds(100));
    Some(bench)
}

/// `add eax, number; ret`.
fn adds(number: u8) -> [u8; 4] {
    [0x83, 0xc0, number, 0xc3]
}

/// Goes to an address space as an operating system with PCIDs does.
fn enter(bench: &mut TestBench, tables: u64) {
    let context = tables >> 12;
    bench.cpu.write_cr3(tables | context | KEEP).expect("the tables are there");
}

/// Sets or clears bits of CR4.
fn set_cr4(bench: &mut TestBench, bits: u64, on: bool) {
    let value = if on { bench.cpu.cr4 | bits } else { bench.cpu.cr4 & !bits };
    bench.cpu.write_cr4(value).expect("the model has them");
}

fn entry_of(tables: u64, page: u64) -> u64 {
    tables + 0x3000 + 8 * (page >> 12)
}

fn map(bench: &TestBench, tables: u64, page: u64, entry: u64) {
    bench.write(entry_of(tables, page), &entry.to_le_bytes());
}

/// Runs the calls; gives what they have added up, or the address of the page fault that ended them, with its error code.
fn run(bench: &mut TestBench) -> Result<u64, (u64, u32)> {
    bench.cpu.rip = CODE;
    bench.cpu.gpr[RAX] = 0;
    bench.cpu.gpr[RSP] = STACK;
    match bench.run(1000) {
        Stop::Fault(exception) if exception.vector == 6 => Ok(bench.cpu.gpr[RAX]),
        Stop::Fault(exception) if exception.vector == 14 => {
            Err((exception.detail, exception.error_code.unwrap_or_default()))
        }
        stop => panic!("{stop:?}"),
    }
}

fn exits(bench: &TestBench) -> u64 {
    bench.translation_counters().exit_link
}

#[test]
fn address_spaces_that_share_code_share_its_links() {
    let Some(mut bench) = bench() else { return };
    for _ in 0..100 {
        for tables in [TABLES, SECOND] {
            enter(&mut bench, tables);
            assert_eq!(run(&mut bench), Ok(CALLS));
        }
    }
    let before = exits(&bench);
    for _ in 0..100 {
        for tables in [TABLES, SECOND] {
            enter(&mut bench, tables);
            assert_eq!(run(&mut bench), Ok(CALLS));
        }
    }
    assert_eq!(exits(&bench), before);
    // Beside the two what the supervisor's pages are before one is found that is not global.
    assert_eq!(bench.translation_counters().translated_spaces, 3);
}

#[test]
fn a_new_address_space_asks_once_for_each_page_that_links_lead_to() {
    let Some(mut bench) = bench() else { return };
    // Eight calls of eight places in one page; ud2.
    let mut code = Vec::new();
    for number in 0..8 {
        code.push(0xe8);
        let next = CODE + code.len() as u64 + 4;
        code.extend(((FAR + 16 * number - next) as u32).to_le_bytes());
        bench.write(FAR + 16 * number, &adds(1));
    }
    code.extend([0x0f, 0x0b]);
    bench.write(CODE, &code);
    // Links are aimed when they ask, and they look into the jump table first most times.
    for _ in 0..1000 {
        assert_eq!(run(&mut bench), Ok(8));
    }
    for round in 0..10 {
        let before = exits(&bench);
        // Without PCIDs in the new CR3 that is a new space each time.
        bench.cpu.write_cr3(TABLES).expect("the tables are there");
        assert_eq!(run(&mut bench), Ok(8));
        assert!(exits(&bench) - before <= 1, "{round}: {}", exits(&bench) - before);
    }
}

#[test]
fn a_link_leads_to_what_each_address_space_has_there() {
    let Some(mut bench) = bench() else { return };
    map(&bench, SECOND, FAR, OTHER | 7);
    for round in 0..200 {
        for (tables, sum) in [(TABLES, CALLS), (SECOND, 100 * CALLS)] {
            enter(&mut bench, tables);
            assert_eq!(run(&mut bench), Ok(sum), "{round}");
        }
    }
    // Half of the jumps find the link aimed wrong; one of 64 of those aims it anew.
    assert!(exits(&bench) < 2 * 200 * CALLS / 32, "{}", exits(&bench));
    // What one of them has there changes: the other goes on.
    bench.write(OTHER, &adds(2));
    for (tables, sum) in [(TABLES, CALLS), (SECOND, 2 * CALLS), (TABLES, CALLS)] {
        enter(&mut bench, tables);
        assert_eq!(run(&mut bench), Ok(sum));
    }
}

#[test]
fn a_link_that_was_followed_sees_its_target_s_page_mapped_anew() {
    let Some(mut bench) = bench() else { return };
    let mut expected = CALLS;
    for round in 0..20 {
        for _ in 0..3 {
            assert_eq!(run(&mut bench), Ok(expected), "{round}");
        }
        let (frame, sum) = if round % 2 == 0 { (OTHER, 100 * CALLS) } else { (FAR, CALLS) };
        map(&bench, TABLES, FAR, frame | 7);
        expected = sum;
        // INVLPG; CR3 written without KEEP; everything flushed.
        match round % 3 {
            0 => bench.cpu.tlb.invalidate_page(FAR),
            1 => bench.cpu.write_cr3(TABLES).expect("the tables are there"),
            _ => bench.cpu.tlb.flush_all(),
        }
    }
    // Where another space was in use meanwhile, and only this one's was flushed.
    for round in 0..6 {
        enter(&mut bench, SECOND);
        assert_eq!(run(&mut bench), Ok(CALLS), "{round}");
        enter(&mut bench, TABLES);
        assert_eq!(run(&mut bench), Ok(expected), "{round}");
        enter(&mut bench, SECOND);
        let (frame, sum) = if round % 2 == 0 { (OTHER, 100 * CALLS) } else { (FAR, CALLS) };
        map(&bench, TABLES, FAR, frame | 7);
        expected = sum;
        bench.cpu.tlb.flush_context(TABLES >> 12);
    }
}

#[test]
fn a_link_that_was_followed_faults_where_fetch_does() {
    let Some(mut bench) = bench() else { return };
    let no_page = (FAR, 0x10);
    let denied = (FAR, 0x11);
    for round in 0..3 {
        bench.set_mode(CodeSize::Bits64, 0);
        set_cr4(&mut bench, cr4::PCIDE, true);
        bench.cpu.update_mode();
        map(&bench, TABLES, FAR, FAR | 7);
        bench.cpu.tlb.flush_all();
        assert_eq!(run(&mut bench), Ok(CALLS), "{round}");
        // Gone, back, no code any more, back.
        for (entry, result) in
            [(0, Err(no_page)), (FAR | 7, Ok(CALLS)), (FAR | 7 | NO_EXECUTE, Err(denied)), (FAR | 7, Ok(CALLS))]
        {
            map(&bench, TABLES, FAR, entry);
            bench.cpu.tlb.invalidate_page(FAR);
            assert_eq!(run(&mut bench), result, "{round} {entry:#x}");
            assert_eq!(run(&mut bench), result, "{round} {entry:#x}");
        }
        // A supervisor's page, used by the supervisor, is no code for a program, though both come over the same link.
        map(&bench, TABLES, FAR, FAR | 7 & !USER);
        bench.cpu.tlb.invalidate_page(FAR);
        assert_eq!(run(&mut bench), Ok(CALLS));
        bench.set_mode(CodeSize::Bits64, 3);
        bench.cpu.update_mode();
        assert_eq!(run(&mut bench), Err((FAR, 0x15)), "{round}");
        bench.set_mode(CodeSize::Bits64, 0);
        bench.cpu.update_mode();
        assert_eq!(run(&mut bench), Ok(CALLS));
        // SMEP: a program's page is no code for the supervisor any more, which comes from a page of its own.
        map(&bench, TABLES, CODE, CODE | 7 & !USER);
        map(&bench, TABLES, FAR, FAR | 7);
        bench.cpu.tlb.flush_all();
        assert_eq!(run(&mut bench), Ok(CALLS), "{round}");
        set_cr4(&mut bench, cr4::SMEP, true);
        assert_eq!(run(&mut bench), Err(denied), "{round}");
        set_cr4(&mut bench, cr4::SMEP, false);
        assert_eq!(run(&mut bench), Ok(CALLS), "{round}");
        map(&bench, TABLES, CODE, CODE | 7);
    }
}

#[test]
fn a_link_to_an_instruction_in_two_pages_follows_both() {
    let Some(mut bench) = bench() else { return };
    let end = FAR + 0x1000;
    // add eax, 1 over the page's end; ret
    bench.write(end - 1, &[0x83, 0xc0, 1, 0xc3]);
    bench.write(OTHER, &[0xc0, 100, 0xc3]);
    let next = CODE + 10;
    bench.write(CODE + 6, &((end - 1 - next) as u32).to_le_bytes());
    map(&bench, SECOND, end, OTHER | 7);
    for round in 0..100 {
        for (tables, sum) in [(TABLES, CALLS), (SECOND, 100 * CALLS)] {
            enter(&mut bench, tables);
            assert_eq!(run(&mut bench), Ok(sum), "{round}");
        }
    }
    // One space: the second page goes and comes back as another.
    enter(&mut bench, TABLES);
    let mut expected = CALLS;
    for (frame, sum) in [(OTHER, 100 * CALLS), (end, CALLS), (OTHER, 100 * CALLS)] {
        for _ in 0..3 {
            assert_eq!(run(&mut bench), Ok(expected));
        }
        map(&bench, TABLES, end, frame | 7);
        bench.cpu.tlb.invalidate_page(end);
        expected = sum;
    }
    assert_eq!(run(&mut bench), Ok(expected));
}

#[test]
fn code_that_is_dropped_leaves_no_way_behind() {
    let Some(mut bench) = bench() else { return };
    map(&bench, SECOND, FAR, OTHER | 7);
    // Each round drops the only unit of a binding; the number is given anew in the other space, by turns.
    for round in 1..60u64 {
        let (tables, page) = if round % 2 == 0 { (TABLES, FAR) } else { (SECOND, OTHER) };
        enter(&mut bench, tables);
        bench.write(page, &adds(round as u8));
        for _ in 0..3 {
            assert_eq!(run(&mut bench), Ok(round * CALLS), "{round}");
            assert_eq!(bench.cpu.gpr[RCX], 0);
        }
        let other = if tables == TABLES { SECOND } else { TABLES };
        enter(&mut bench, other);
        let sum = if round == 1 { CALLS } else { (round - 1) * CALLS };
        assert_eq!(run(&mut bench), Ok(sum), "{round}");
    }
}

#[test]
fn numbers_of_bindings_are_bounded_and_hold_nowhere_when_they_are_given_anew() {
    let mut bench = TestBench::new();
    let form = Form::now(&bench.cpu, Shape::Shared);
    let (_, jumps) = bench.cpu.split();
    let mut bindings = Bindings::default();
    let binding = |page: u64| Binding::new(page, page, None, form);
    let first = bindings.take(binding(0), 7, 0);
    assert_eq!(bindings.take(binding(0), 8, 0), first);
    let others: Vec<u32> = (1..BINDINGS as u64 - 1).map(|page| bindings.take(binding(page), 9, 0)).collect();
    assert!(!others.contains(&NO_BINDING) && !others.contains(&first));
    assert_eq!(bindings.take(binding(1 << 20), 10, 0), NO_BINDING);
    for space in [1, 15] {
        jumps.verify(space, NO_BINDING);
        jumps.verify(space, first);
        assert!(jumps.is_verified(space, first) && !jumps.is_verified(space, NO_BINDING));
        assert!(others.iter().all(|&other| !jumps.is_verified(space, other)));
    }
    bindings.give_back(NO_BINDING, 7, jumps);
    bindings.give_back(first, 7, jumps);
    assert_eq!(bindings.take(binding(1 << 20), 10, 0), NO_BINDING);
    bindings.give_back(first, 8, jumps);
    assert_eq!(bindings.take(binding(1 << 20), 10, 0), first);
    assert!((0..16).all(|space| !jumps.is_verified(space, first)));
}

/// An address whose entry in a jump table is that of [`FAR`].
const IN_ITS_WAY: u64 = FAR + JUMPS as u64;

/// A bench whose code calls [`FAR`] and [`IN_ITS_WAY`] through a register, in turn.
fn bench_of_indirect_calls() -> Option<TestBench> {
    let mut bench = bench()?;
    // mov ecx, CALLS; l: mov edx, FAR; call rdx; mov edx, IN_ITS_WAY; call rdx; dec ecx; jnz l; ud2
    let mut code = vec![0xb9];
    code.extend((CALLS as u32).to_le_bytes());
    for target in [FAR, IN_ITS_WAY] {
        code.push(0xba);
        code.extend((target as u32).to_le_bytes());
        code.extend([0xff, 0xd2]);
    }
    code.extend([0xff, 0xc9, 0x75, (-18i8) as u8, 0x0f, 0x0b]);
    bench.write(CODE, &code);
    bench.write(IN_ITS_WAY, &adds(10));
    enter(&mut bench, TABLES);
    Some(bench)
}

#[test]
fn indirect_jumps_that_are_in_each_other_s_way_stay_in_translated_code() {
    let Some(mut bench) = bench_of_indirect_calls() else { return };
    assert_eq!(run(&mut bench), Ok(11 * CALLS));
    let before = bench.translation_counters().exit_indirect;
    for _ in 0..100 {
        assert_eq!(run(&mut bench), Ok(11 * CALLS));
    }
    let exits = bench.translation_counters().exit_indirect - before;
    assert!(exits <= 100, "{exits} for {} calls", 200 * CALLS);
}

#[test]
fn an_indirect_jump_leads_to_what_each_address_space_has_there() {
    let Some(mut bench) = bench_of_indirect_calls() else { return };
    map(&bench, SECOND, IN_ITS_WAY, OTHER | 7);
    for round in 0..100 {
        for (tables, sum) in [(TABLES, 11 * CALLS), (SECOND, 101 * CALLS)] {
            enter(&mut bench, tables);
            assert_eq!(run(&mut bench), Ok(sum), "{round}");
        }
        // Other code where the first space has jumped to.
        let number = 10 + round as u8 % 2;
        bench.write(IN_ITS_WAY, &adds(number));
        enter(&mut bench, TABLES);
        assert_eq!(run(&mut bench), Ok((1 + u64::from(number)) * CALLS), "{round}");
        bench.write(IN_ITS_WAY, &adds(10));
    }
}
