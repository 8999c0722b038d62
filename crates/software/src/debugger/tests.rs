//! Breakpoints, watchpoints and steps on the engine itself, interpreted and translated.

use std::sync::Arc;

use polder_machine::state::SegmentState;
use polder_machine::{Engine, Vcpu, VcpuExit, Watchpoint};
use polder_memory::{GuestAddress, GuestMemory};

use super::*;
use crate::testbench::services;
use crate::{CpuModel, EngineOptions, SoftwareEngine, Translation};

const CODE: u64 = 0x10000;
const DATA: u64 = 0x20000;
const ALL: [Translation; 3] = [Translation::Never, Translation::Auto, Translation::Always];

struct Machine {
    engine: Arc<SoftwareEngine>,
    memory: GuestMemory,
    vcpu: Box<dyn Vcpu>,
}

/// 64-bit ring 0 code at `CODE`, the first 2 MiB mapped one to one.
fn machine(translation: Translation, code: &[u8]) -> Machine {
    let memory = GuestMemory::new(&[(GuestAddress(0), 2 << 20)]).unwrap();
    let model = CpuModel::named(CpuModel::NEWEST, &[]).unwrap();
    let engine = SoftwareEngine::new(
        services(memory.clone()),
        1,
        model,
        EngineOptions { translation, ..EngineOptions::default() },
    )
    .unwrap();
    for (address, entry) in [(0x1000, 0x2003u64), (0x2000, 0x3003), (0x3000, 0x83)] {
        memory.write_value(GuestAddress(address), &entry).unwrap();
    }
    memory.write(GuestAddress(CODE), code).unwrap();
    let mut state = VcpuState::power_on(true);
    let data = SegmentState { selector: 0x10, base: 0, limit: u32::MAX, attributes: 0xc093 };
    state.segments = [data; 6];
    state.segments[1] = SegmentState { selector: 8, base: 0, limit: u32::MAX, attributes: 0xa09b };
    (state.cr0, state.cr3, state.cr4, state.efer) = (0x8000_0031, 0x1000, 0x4_0620, 0x500);
    (state.rip, state.gpr[4], state.gpr[3], state.xcr0) = (CODE, 0x8000, DATA, 7);
    let mut vcpu = engine.take_vcpus().remove(0);
    vcpu.set_state(&state);
    Machine { engine, memory, vcpu }
}

impl Machine {
    fn orders(&mut self, step: bool, breakpoints: &[u64], watchpoints: &[Watchpoint]) {
        let orders = DebugOrders { step, breakpoints: breakpoints.to_vec(), watchpoints: watchpoints.to_vec() };
        self.vcpu.debug().unwrap().set_orders(&orders);
    }

    fn rip(&self) -> u64 {
        self.vcpu.state().rip - CODE
    }

    fn rax(&self) -> u64 {
        self.vcpu.state().gpr[0]
    }
}

/// 0: add rax, 1; 4: inc [rbx]; 7: cmp rax, 1000; 13: jne 0; 15: ud2 (a triple fault: there is no IDT)
const LOOP: [u8; 17] = [0x48, 0x83, 0xc0, 1, 0x48, 0xff, 0x03, 0x48, 0x3d, 0xe8, 3, 0, 0, 0x75, 0xf1, 0x0f, 0x0b];

#[test]
fn a_breakpoint_stops_before_its_instruction_every_time_it_is_met() {
    for translation in ALL {
        // At the block's start, in its middle, at its fused end.
        for (offset, added) in [(0, 0), (4, 1), (7, 1), (13, 1)] {
            let mut machine = machine(translation, &LOOP);
            let address = CODE + offset;
            for round in 0..200 {
                machine.orders(false, &[address], &[]);
                let exit = machine.vcpu.run();
                assert_eq!(exit, VcpuExit::Debug(DebugEvent::Breakpoint { address }), "{translation:?} {round}");
                assert_eq!((machine.rip(), machine.rax()), (offset, round + added), "{translation:?}");
                // As gdb does: away with it for a step over it.
                machine.orders(true, &[], &[]);
                assert_eq!(machine.vcpu.run(), VcpuExit::Debug(DebugEvent::Step));
            }
            machine.orders(false, &[], &[]);
            assert_eq!(machine.vcpu.run(), VcpuExit::TripleFault);
            assert_eq!((machine.rip(), machine.rax()), (15, 1000));
        }
    }
}

#[test]
fn a_breakpoint_set_in_hot_code_is_met() {
    for translation in ALL {
        // 0: inc rax; 3: jmp 0
        let mut machine = machine(translation, &[0x48, 0xff, 0xc0, 0xeb, 0xfb]);
        let handle = machine.engine.handles().remove(0);
        for offset in [3, 0] {
            machine.orders(false, &[], &[]);
            let stopper = std::thread::spawn({
                let handle = handle.clone();
                move || {
                    std::thread::sleep(std::time::Duration::from_millis(20));
                    handle.stop();
                }
            });
            assert_eq!(machine.vcpu.run(), VcpuExit::Stopped);
            stopper.join().unwrap();
            let address = CODE + offset;
            machine.orders(false, &[address], &[]);
            assert_eq!(machine.vcpu.run(), VcpuExit::Debug(DebugEvent::Breakpoint { address }), "{translation:?}");
            assert_eq!(machine.rip(), offset);
        }
    }
}

#[test]
fn the_guest_sees_no_breakpoint_in_its_code_or_registers() {
    for translation in ALL {
        // 0: mov al, [rip - 6] (its own first byte); 6: mov rcx, dr7; 9: ud2
        let code = [0x8a, 0x05, 0xfa, 0xff, 0xff, 0xff, 0x0f, 0x21, 0xf9, 0x0f, 0x0b];
        let mut machine = machine(translation, &code);
        machine.orders(false, &[CODE + 9], &[]);
        assert_eq!(machine.vcpu.run(), VcpuExit::Debug(DebugEvent::Breakpoint { address: CODE + 9 }));
        let state = machine.vcpu.state();
        assert_eq!((state.gpr[0], state.gpr[1], state.rflags & 0x100), (0x8a, 0x400, 0));
    }
}

#[test]
fn a_step_runs_one_instruction() {
    for translation in ALL {
        let mut machine = machine(translation, &LOOP);
        let mut seen = Vec::new();
        machine.orders(true, &[CODE, CODE + 4], &[]);
        for _ in 0..5 {
            assert_eq!(machine.vcpu.run(), VcpuExit::Debug(DebugEvent::Step));
            seen.push(machine.rip());
        }
        assert_eq!(seen, [4, 7, 13, 0, 4], "{translation:?}");
    }
}

#[test]
fn a_watchpoint_stops_after_the_access_that_it_wants() {
    for translation in ALL {
        // 0: mov eax, [rbx]; 2: mov [rbx + 6], eax; 5: mov eax, [rbx + 8]; 8: jmp 0
        let mut machine = machine(translation, &[0x8b, 0x03, 0x89, 0x43, 6, 0x8b, 0x43, 8, 0xeb, 0xf6]);
        for (access, ends) in
            [(WatchedAccess::Read, [8, 8]), (WatchedAccess::Write, [5, 5]), (WatchedAccess::ReadOrWrite, [5, 8])]
        {
            let point = Watchpoint { address: DATA + 8, len: 2, access };
            machine.orders(false, &[], &[point]);
            let mut state = machine.vcpu.state();
            state.rip = CODE;
            let vector = machine.vcpu.debug().unwrap().vector_registers();
            machine.vcpu.debug().unwrap().set_registers(&state, &vector);
            for end in ends {
                assert_eq!(machine.vcpu.run(), VcpuExit::Debug(DebugEvent::Watchpoint(point)), "{translation:?}");
                assert_eq!(machine.rip(), end);
            }
        }
    }
}

#[test]
fn registers_are_read_and_set() {
    // 0: addsd xmm1, xmm1; 4: vaddps ymm2, ymm2, ymm2; 8: fadd st0, st0; 10: ud2
    let code = [0xf2, 0x0f, 0x58, 0xc9, 0xc5, 0xec, 0x58, 0xd2, 0xd8, 0xc0, 0x0f, 0x0b];
    let mut machine = machine(Translation::Always, &code);
    let mut state = machine.vcpu.state();
    state.gpr[0] = 77;
    state.segments[5].base = 0x1234_5678_9abc;
    state.rflags = 0xffff_ffff;
    let mut vector = machine.vcpu.debug().unwrap().vector_registers();
    vector.fxsave[160 + 16..160 + 24].copy_from_slice(&1.5f64.to_le_bytes());
    vector.ymm_high[2] = u128::from(2.5f32.to_bits());
    // ST0 is in use and holds 1.0.
    vector.fxsave[4] = 1;
    vector.fxsave[3] = 0;
    vector.fxsave[32..42].copy_from_slice(&[0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0x3f]);
    machine.vcpu.debug().unwrap().set_registers(&state, &vector);
    assert_eq!(machine.vcpu.state().rflags & 1 << 17, 0, "virtual-8086 mode is not for debuggers to enter");
    state.rflags = 2;
    machine.vcpu.debug().unwrap().set_registers(&state, &vector);
    machine.orders(false, &[CODE + 10], &[]);
    assert_eq!(machine.vcpu.run(), VcpuExit::Debug(DebugEvent::Breakpoint { address: CODE + 10 }));
    let after = machine.vcpu.debug().unwrap().vector_registers();
    assert_eq!(after.fxsave[160 + 16..160 + 24], 3f64.to_le_bytes());
    assert_eq!(after.ymm_high[2] as u32, 5f32.to_bits());
    assert_eq!(after.fxsave[32..42], [0, 0, 0, 0, 0, 0, 0, 0x80, 0, 0x40]);
    assert_eq!((machine.rax(), machine.vcpu.state().segments[5].base), (77, 0x1234_5678_9abc));
    assert_eq!(polder_machine::debug::translate(&machine.memory, &machine.vcpu.state(), CODE), Some(CODE));
}
