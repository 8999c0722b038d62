//! The dirty log under guests that run: no store is lost, on any tier, whatever the look-up tables already hold.

use polder_machine::Engine;
use polder_memory::{GuestAddress, PAGE_SIZE};

use crate::cpu::{RAX, RBX, RSP};
use crate::testbench::{DATA, Stop, TestBench, on_each_tier};
use crate::vcpu_tests::{CODE, Machine, on_each_translation, spawn, start_state};

/// Stores to pages from RBX on. Pages 0 to 3: a plain store; a read and write of memory; XADD; MOVUPS. 4 to 9: REP STOSQ. 10 and 11: a store over two pages. 13: pushes
/// and a call.
fn stores(prefix: &[u8], end: &[u8]) -> Vec<u8> {
    let body: &[&[u8]] = &[
        &[0x48, 0xff, 0xc0],                            // inc rax
        &[0x48, 0x89, 0x03],                            // mov [rbx], rax
        &[0x01, 0x83, 8, 0x10, 0, 0],                   // add [rbx + 0x1008], eax
        &[0x50, 0x5a],                                  // push rax; pop rdx
        &[0xf0, 0x48, 0x0f, 0xc1, 0x93, 0, 0x20, 0, 0], // lock xadd [rbx + 0x2000], rdx
        &[0x66, 0x48, 0x0f, 0x6e, 0xc0],                // movq xmm0, rax
        &[0x0f, 0x11, 0x83, 0, 0x30, 0, 0],             // movups [rbx + 0x3000], xmm0
        &[0x48, 0x8d, 0xbb, 8, 0x40, 0, 0],             // lea rdi, [rbx + 0x4008]
        &[0xb9, 0, 10, 0, 0, 0xf3, 0x48, 0xab],         // mov ecx, 2560; rep stosq
        &[0x48, 0x89, 0x83, 0xfc, 0xaf, 0, 0],          // mov [rbx + 0xaffc], rax
        &[0xe8, 0, 0, 0, 0, 0x48, 0x83, 0xc4, 8],       // call the next instruction; add rsp, 8
    ];
    let mut code = [prefix, &body.concat()].concat();
    code.extend(end);
    code
}

/// Pages that the code stores to.
const PAGES: [u64; 13] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13];
/// First stack pointer, from RBX on.
const STACK: u64 = 0xd800;

#[test]
fn a_store_through_a_filled_entry_is_logged_in_each_round() {
    on_each_tier(|tier| {
        let mut bench = TestBench::on(tier);
        let code = stores(&[], &[0xf4]);
        for round in 0..6 {
            bench.cpu.halted = false;
            (bench.cpu.gpr[RAX], bench.cpu.gpr[RBX], bench.cpu.gpr[RSP]) = (round, DATA, DATA + STACK);
            if round == 0 {
                bench.write(crate::testbench::CODE, &code);
            }
            if round == 1 {
                bench.cpu.services.memory.notes().start_dirty_log();
            }
            bench.cpu.rip = crate::testbench::CODE;
            assert_eq!(bench.run(1 << 20), Stop::Halted);
            let dirty: Vec<u64> =
                bench.cpu.services.memory.notes().take_dirty().iter().map(|&page| page as u64).collect();
            let expected = PAGES.map(|page| DATA / PAGE_SIZE + page);
            assert_eq!(dirty, if round == 0 { &[][..] } else { &expected }, "{round}");
        }
    });
}

/// What live migration does: whoever copies what each round names, while vCPUs go on storing, has all of memory whenever they have stopped.
///
/// A vCPU that looks at a note too early loses a store only in the moment in which a round begins, and stores to the page again soon. So the vCPUs are stopped right after
/// a round has begun, many times.
#[test]
fn copies_of_what_each_round_names_add_up_to_the_memory_of_two_vcpus() {
    const ROUNDS: u32 = 60;
    let bases = [0x4_0000u64, 0x6_0000];
    on_each_translation(|translation| {
        let machine = Machine::new(2, translation);
        // Both store to one page too: lock inc qword [0x80000]
        let code = stores(&[0xf0, 0x48, 0xff, 0x04, 0x25, 0, 0, 8, 0], &[]);
        let back = -(code.len() as i32 + 5);
        machine.write(CODE, &[&code[..], &[0xe9], &back.to_le_bytes()].concat());
        let notes = machine.memory.notes();
        notes.start_dirty_log();
        let mut copy = vec![0; machine.memory.len() as usize];
        machine.memory.read(GuestAddress(0), &mut copy).unwrap();
        let take = |copy: &mut [u8]| {
            for page in notes.take_dirty() {
                let at = page * PAGE_SIZE as usize;
                let target = &mut copy[at..at + PAGE_SIZE as usize];
                machine.memory.read(GuestAddress(at as u64), target).unwrap();
            }
        };
        let mut vcpus = machine.engine.take_vcpus();
        for (vcpu, base) in vcpus.iter_mut().zip(bases) {
            let mut state = start_state();
            (state.gpr[RBX], state.gpr[RSP]) = (base, base + STACK);
            vcpu.set_state(&state);
        }
        for round in 0..ROUNDS {
            let threads: Vec<_> = vcpus.drain(..).map(spawn).collect();
            let written = bases.iter().flat_map(|base| PAGES.map(|page| base / PAGE_SIZE + page)).chain([0x80]);
            machine.wait_for("a store to each page", |_| written.clone().all(|page| notes.is_dirty(page as usize)));
            take(&mut copy);
            for handle in machine.engine.handles() {
                handle.stop();
            }
            vcpus.extend(threads.into_iter().map(|thread| thread.join().unwrap().0));
            take(&mut copy);
            let mut now = vec![0; copy.len()];
            machine.memory.read(GuestAddress(0), &mut now).unwrap();
            let pages = now.chunks(PAGE_SIZE as usize).zip(copy.chunks(PAGE_SIZE as usize));
            let lost: Vec<usize> =
                (0..).zip(pages).filter(|(_, (now, copy))| now != copy).map(|(page, _)| page).collect();
            assert!(lost.is_empty(), "round {round}: {lost:x?}");
        }
    });
}
