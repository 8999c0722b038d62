//! Whole vCPUs on their threads, interpreted and translated: interrupts, sleeping, stopping, start-up messages.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use polder_machine::state::{RunState, SegmentState, TableState, VcpuState};
use polder_machine::{Engine, MsiMessage, Vcpu, VcpuExit, VcpuHandle};
use polder_memory::{GuestAddress, GuestMemory};

use crate::cpu::RSP;
use crate::cpu_model::CpuModel;
use crate::engine::{EngineOptions, SoftwareEngine, Translation};
use crate::testbench::services;

/// 64-bit code of privilege level 0, with the first 2 MiB mapped one to one.
pub const CODE: u64 = 0x8000;
/// Tables of pages at 0x1000, 0x2000 and 0x3000.
const TABLES: u64 = 0x1000;
const GDT: u64 = 0x4000;
const IDT: u64 = 0x1_0000;
/// Interrupt vector n leads to `HANDLERS + 16 * n`.
const HANDLERS: u64 = 0x2_0000;
/// Handlers that are too long for that place: `BODIES + 32 * n`.
const BODIES: u64 = 0x3_0000;
/// Longest wait for something that takes microseconds.
const PATIENCE: Duration = Duration::from_secs(20);

/// Runs a test with all code interpreted, with hot code translated, and with all code translated before it first runs.
pub fn on_each_translation(test: impl Fn(Translation)) {
    for translation in [Translation::Never, Translation::Auto, Translation::Always] {
        println!("translation: {translation:?}");
        test(translation);
    }
}

pub struct Machine {
    pub engine: Arc<SoftwareEngine>,
    pub memory: GuestMemory,
}

impl Machine {
    pub fn new(vcpu_count: u32, translation: Translation) -> Self {
        let memory = GuestMemory::new(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let model = CpuModel::named(CpuModel::NEWEST, &[]).unwrap();
        let options = EngineOptions { translation, ..EngineOptions::default() };
        let machine = Machine {
            engine: SoftwareEngine::new(services(memory.clone()), vcpu_count, model, options).unwrap(),
            memory,
        };
        let entries = [(TABLES, 0x2003), (0x2000, 0x3003), (0x3000, 0x83), (GDT + 8, 0x00af_9b00_0000_ffff)];
        for (address, entry) in entries.into_iter().chain([(GDT + 16, 0x00cf_9300_0000_ffff)]) {
            machine.write(address, &u64::to_le_bytes(entry));
        }
        for vector in 0..256 {
            let handler = HANDLERS + 16 * vector;
            let gate = handler & 0xffff | 8 << 16 | 0x8e << 40 | handler >> 16 << 48;
            machine.write(IDT + 16 * vector, &gate.to_le_bytes());
        }
        machine
    }

    pub fn write(&self, address: u64, bytes: &[u8]) {
        self.memory.write(GuestAddress(address), bytes).unwrap();
    }

    fn byte(&self, address: u64) -> u8 {
        self.memory.read_value(GuestAddress(address)).unwrap()
    }

    /// The handler of a vector: increments the byte at 0x700 + vector, ends the interrupt in x2APIC mode, returns.
    fn count_interrupts(&self, vector: u64) {
        let (handler, body) = (HANDLERS + 16 * vector, BODIES + 32 * vector);
        let jump = (body - (handler + 5)) as u32;
        self.write(handler, &[&[0xe9][..], &jump.to_le_bytes()].concat());
        // inc byte [0x700 + vector]; mov ecx, 0x80b; xor eax, eax; xor edx, edx; wrmsr; iretq
        let code = [0xb9, 0x0b, 0x08, 0, 0, 0x31, 0xc0, 0x31, 0xd2, 0x0f, 0x30, 0x48, 0xcf];
        self.write(body, &[&[0xfe, 0x04, 0x25, vector as u8, 0x07, 0, 0][..], &code].concat());
    }

    pub fn wait_for(&self, what: &str, condition: impl Fn(&Self) -> bool) {
        let start = Instant::now();
        while !condition(self) {
            assert!(start.elapsed() < PATIENCE, "{what} did not happen");
            std::thread::yield_now();
        }
    }
}

/// 64-bit mode at `CODE`, with all vector units on. The local APIC is as at power-on; [`prologue`] is code that changes that.
pub fn start_state() -> VcpuState {
    let mut state = VcpuState::power_on(true);
    state.segments = [SegmentState { selector: 0x10, base: 0, limit: u32::MAX, attributes: 0xc093 }; 6];
    state.segments[1] = SegmentState { selector: 8, base: 0, limit: u32::MAX, attributes: 0xa09b };
    state.gdtr = TableState { base: GDT, limit: 23 };
    state.idtr = TableState { base: IDT, limit: 4095 };
    (state.cr0, state.cr3, state.cr4, state.efer, state.xcr0) = (0x8000_0031, TABLES, 0x4_0620, 0x500, 7);
    state.rip = CODE;
    state.gpr[4] = 0x7000;
    state
}

/// Enables x2APIC mode and the APIC.
fn prologue() -> Vec<u8> {
    let mut code = Vec::new();
    for (msr, value) in [(0x1bu32, 0xfee0_0d00u32), (0x80f, 0x1ff)] {
        // mov ecx, msr; mov eax, value; xor edx, edx; wrmsr
        code.push(0xb9);
        code.extend(msr.to_le_bytes());
        code.push(0xb8);
        code.extend(value.to_le_bytes());
        code.extend([0x31, 0xd2, 0x0f, 0x30]);
    }
    code
}

pub fn spawn(mut vcpu: Box<dyn Vcpu>) -> JoinHandle<(Box<dyn Vcpu>, VcpuExit)> {
    std::thread::spawn(move || {
        let exit = vcpu.run();
        (vcpu, exit)
    })
}

#[test]
fn a_halted_vcpu_is_woken_by_a_message_from_a_device_every_time() {
    on_each_translation(|translation| {
        const ROUNDS: u32 = 2000;
        let machine = Machine::new(1, translation);
        machine.count_interrupts(0x41);
        // sti; hlt; jmp back to hlt
        let mut code = prologue();
        code.extend([0xfb, 0xf4, 0xeb, 0xfd]);
        machine.write(CODE, &code);
        let mut vcpu = machine.engine.take_vcpus().remove(0);
        vcpu.set_state(&start_state());
        let thread = spawn(vcpu);
        let sink = machine.engine.msi_sink();
        for round in 0..ROUNDS {
            if round == 0 {
                // The guest must have enabled its APIC first.
                machine.wait_for("HLT", |machine| counter(&*machine.engine.handles()[0], "sleeps") > 0);
            }
            sink.send(MsiMessage { address: 0xfee0_0000, data: 0x41 });
            machine.wait_for("the interrupt", |machine| machine.byte(0x741) == (round + 1) as u8);
        }
        machine.engine.handles()[0].stop();
        let (mut vcpu, exit) = thread.join().unwrap();
        assert_eq!(exit, VcpuExit::Stopped);
        // It may have been stopped before it came back to HLT.
        let start = Instant::now();
        while vcpu.state().run_state != RunState::Halted {
            assert!(start.elapsed() < PATIENCE, "it never comes back to HLT");
            let thread = spawn(vcpu);
            std::thread::sleep(Duration::from_millis(5));
            machine.engine.handles()[0].stop();
            vcpu = thread.join().unwrap().0;
        }
        assert_eq!(counter(&*machine.engine.handles()[0], "interrupts"), u64::from(ROUNDS));
    });
}

fn counter(handle: &dyn VcpuHandle, name: &str) -> u64 {
    handle.counters().into_iter().find(|entry| entry.0 == name).unwrap().1
}

#[test]
fn a_running_vcpu_stops_when_asked_and_goes_on_afterwards() {
    on_each_translation(|translation| {
        let machine = Machine::new(1, translation);
        // inc byte [0x700]; jmp back
        machine.write(CODE, &[0xfe, 0x04, 0x25, 0x00, 0x07, 0, 0, 0xeb, 0xf7]);
        let mut vcpu = machine.engine.take_vcpus().remove(0);
        vcpu.set_state(&start_state());
        for _ in 0..20 {
            let before = machine.byte(0x700);
            let thread = spawn(vcpu);
            machine.wait_for("progress", |machine| machine.byte(0x700) != before);
            machine.engine.handles()[0].stop();
            let exit;
            (vcpu, exit) = thread.join().unwrap();
            assert_eq!((exit, vcpu.state().run_state), (VcpuExit::Stopped, RunState::Runnable));
        }
        let translates = is_x86_feature_detected!("bmi2") && is_x86_feature_detected!("avx");
        let translated = counter(&*machine.engine.handles()[0], "translated_units");
        assert_eq!(translated > 0, translates && translation != Translation::Never);
        // A stop before the run counts for the next run.
        machine.engine.handles()[0].stop();
        assert_eq!(vcpu.run(), VcpuExit::Stopped);
    });
}

#[test]
fn an_exception_without_a_table_shuts_the_vcpu_down_and_a_reset_revives_it() {
    on_each_translation(|translation| {
        let machine = Machine::new(1, translation);
        machine.write(CODE, &[0x0f, 0x0b]);
        let mut vcpu = machine.engine.take_vcpus().remove(0);
        let mut state = start_state();
        state.idtr.limit = 0;
        vcpu.set_state(&state);
        assert_eq!(vcpu.run(), VcpuExit::TripleFault);
        vcpu.reset();
        assert_eq!(vcpu.state(), VcpuState::power_on(true));
    });
}

#[test]
fn a_state_set_is_the_state_read() {
    on_each_translation(|translation| {
        let machine = Machine::new(2, translation);
        let mut vcpus = machine.engine.take_vcpus();
        assert_eq!(vcpus[1].state(), VcpuState::power_on(false));
        let mut state = VcpuState::power_on(true);
        state.gpr = std::array::from_fn(|index| index as u64 * 0x1111);
        state.cr0 = 0x8005_0033;
        state.cr3 = 0x5000;
        state.cr4 = 0x6f0;
        state.cr8 = 9;
        state.efer = 0xd01;
        state.rflags = 0x246;
        state.xcr0 = 7;
        state.run_state = RunState::Halted;
        vcpus[0].set_state(&state);
        assert_eq!(vcpus[0].state(), state);
    });
}

#[test]
fn start_up_messages_start_the_others_at_their_page() {
    on_each_translation(|translation| {
        let machine = Machine::new(4, translation);
        // The others, in real mode: lock inc byte [0x700]; hlt
        machine.write(0x5000, &[0xf0, 0xfe, 0x06, 0x00, 0x07, 0xf4]);
        let mut code = prologue();
        // INIT to all others, then SIPI with vector 5, twice.
        for command in [0xc_4500u32, 0xc_4605, 0xc_4605] {
            // mov ecx, 0x830; mov eax, command; xor edx, edx; wrmsr
            code.extend([0xb9, 0x30, 0x08, 0, 0, 0xb8]);
            code.extend(command.to_le_bytes());
            code.extend([0x31, 0xd2, 0x0f, 0x30]);
        }
        code.push(0xf4);
        machine.write(CODE, &code);
        let mut vcpus = machine.engine.take_vcpus();
        vcpus[0].set_state(&start_state());
        let threads: Vec<_> = vcpus.into_iter().map(spawn).collect();
        machine.wait_for("the start of three vCPUs", |machine| machine.byte(0x700) == 3);
        for handle in machine.engine.handles() {
            handle.stop();
        }
        for thread in threads {
            assert_eq!(thread.join().unwrap().1, VcpuExit::Stopped);
        }
        assert_eq!(machine.byte(0x700), 3);
    });
}

#[test]
fn interrupts_between_two_vcpus_are_all_delivered() {
    on_each_translation(|translation| {
        const ROUNDS: u8 = 200;
        let machine = Machine::new(2, translation);
        // Each sends the other the interrupt that it got, until both counted ROUNDS.
        let ping_pong = |vector: u8, other: u32| {
            let mut code = prologue();
            let loop_start = code.len();
            // cli; cmp [0x700 + own], bl; jne on; sti; hlt; jmp back; on: inc bl; send; jmp back
            code.extend([0xfa, 0x38, 0x1c, 0x25, vector, 0x07, 0, 0, 0x75, 0x04, 0xfb, 0xf4, 0xeb, 0xf2, 0xfe, 0xc3]);
            code.extend([0xb9, 0x30, 0x08, 0, 0, 0xb8]);
            code.extend(u32::from(vector ^ 1).to_le_bytes());
            code.push(0xba);
            code.extend(other.to_le_bytes());
            code.extend([0x0f, 0x30]);
            let back = loop_start as i32 - (code.len() as i32 + 2);
            code.extend([0xeb, back as u8]);
            code
        };
        machine.write(CODE, &ping_pong(0x40, 1));
        machine.write(0x5000, &ping_pong(0x41, 0));
        machine.count_interrupts(0x40);
        machine.count_interrupts(0x41);
        let mut vcpus = machine.engine.take_vcpus();
        let mut state = start_state();
        vcpus[0].set_state(&state);
        state.rip = 0x5000;
        state.gpr[4] = 0x6000;
        vcpus[1].set_state(&state);
        let threads: Vec<_> = vcpus.into_iter().map(spawn).collect();
        machine.wait_for("both HLTs", |machine| {
            machine.engine.handles().iter().all(|handle| counter(&**handle, "sleeps") > 0)
        });
        machine.engine.msi_sink().send(MsiMessage { address: 0xfee0_0000, data: 0x40 });
        machine.wait_for("the ping-pong", |machine| {
            counter(&*machine.engine.handles()[1], "interrupts") >= u64::from(ROUNDS)
        });
        for handle in machine.engine.handles() {
            handle.stop();
        }
        for thread in threads {
            thread.join().unwrap();
        }
        let [first, second] = [0x740, 0x741].map(|address| machine.byte(address));
        assert!(first.wrapping_sub(second) <= 1, "{first} {second}");
    });
}

#[test]
fn code_that_another_vcpu_rewrites_is_run_as_rewritten() {
    on_each_translation(|translation| {
        let machine = Machine::new(2, translation);
        // vCPU 0 runs: mov al, 1 (immediate rewritten); mov [0x700], al; cmp byte [0x701], 0; je back; hlt
        let code =
            [0xb0, 0x01, 0x88, 0x04, 0x25, 0, 0x07, 0, 0, 0x80, 0x3c, 0x25, 0x01, 0x07, 0, 0, 0, 0x74, 0xed, 0xf4];
        machine.write(CODE, &code);
        let mut vcpus = machine.engine.take_vcpus();
        vcpus[0].set_state(&start_state());
        // vCPU 1 runs: inc byte [0x8001] until told to stop.
        let code = [0xfe, 0x04, 0x25, 0x01, 0x80, 0, 0, 0x80, 0x3c, 0x25, 0x01, 0x07, 0, 0, 0, 0x74, 0xef, 0xf4];
        machine.write(0x5000, &code);
        let mut state = start_state();
        state.rip = 0x5000;
        vcpus[1].set_state(&state);
        let threads: Vec<_> = vcpus.into_iter().map(spawn).collect();
        for _ in 0..50 {
            let before = machine.byte(0x700);
            machine.wait_for("a rewritten instruction", |machine| machine.byte(0x700) != before);
        }
        machine.write(0x701, &[1]);
        machine
            .wait_for("HLT", |machine| machine.engine.handles().iter().all(|handle| counter(&**handle, "sleeps") > 0));
        for handle in machine.engine.handles() {
            handle.stop();
        }
        for thread in threads {
            thread.join().unwrap();
        }
    });
}

#[test]
fn an_nmi_wakes_a_vcpu_that_takes_no_interrupts() {
    on_each_translation(|translation| {
        let machine = Machine::new(1, translation);
        // cli; hlt; mov byte [0x700], 1; hlt
        machine.write(CODE, &[0xfa, 0xf4, 0xc6, 0x04, 0x25, 0, 0x07, 0, 0, 0x01, 0xf4]);
        // The handler: iretq
        machine.write(HANDLERS + 16 * 2, &[0x48, 0xcf]);
        let mut vcpu = machine.engine.take_vcpus().remove(0);
        vcpu.set_state(&start_state());
        let thread = spawn(vcpu);
        machine.wait_for("HLT", |machine| counter(&*machine.engine.handles()[0], "sleeps") > 0);
        machine.engine.send_nmi();
        machine.wait_for("the code after HLT", |machine| machine.byte(0x700) == 1);
        machine.engine.handles()[0].stop();
        thread.join().unwrap();
    });
}

/// Single-stepping, because a breakpoint is on: each instruction is run alone, with no look at attention in between.
#[test]
fn a_handler_that_its_own_frame_is_pushed_over_runs_as_overwritten() {
    on_each_translation(|translation| {
        let machine = Machine::new(1, translation);
        let handler = HANDLERS + 16 * 2;
        // The handler: inc byte [0x700]; iretq
        machine.write(handler, &[0xfe, 0x04, 0x25, 0, 0x07, 0, 0, 0x48, 0xcf]);
        machine.write(handler + 0x20, &[0xf4, 0xf4]);
        // hlt; mov esp, handler + 0x20; jmp to the hlt. Of the frame, CS lies at the handler then: or [rax], al.
        machine.write(CODE, &[0xf4, 0xbc]);
        machine.write(CODE + 2, &(handler as u32 + 0x20).to_le_bytes());
        machine.write(CODE + 6, &[0xeb, 0xf8]);
        let mut vcpu = machine.engine.take_vcpus().remove(0);
        let mut state = start_state();
        state.gpr[0] = 0x710;
        state.debug[5] = 0x401;
        vcpu.set_state(&state);
        let thread = spawn(vcpu);
        for sleeps in 1..3 {
            machine.wait_for("HLT", |machine| counter(&*machine.engine.handles()[0], "sleeps") == sleeps);
            machine.engine.send_nmi();
        }
        machine.wait_for("the overwritten handler", |machine| machine.byte(0x710) != 0);
        machine.wait_for("its HLT", |machine| counter(&*machine.engine.handles()[0], "sleeps") == 3);
        assert_eq!(machine.byte(0x700), 1, "the old handler ran again");
        machine.engine.handles()[0].stop();
        thread.join().unwrap();
    });
}

#[test]
fn the_timer_interrupts_running_code_soon_after_its_deadline() {
    on_each_translation(|translation| {
        let machine = Machine::new(1, translation);
        machine.count_interrupts(0xec);
        let mut code = prologue();
        // LVT timer: one-shot, vector 0xec; divide by 1; initial count 25,000 (1 ms); sti; jmp self
        for (msr, value) in [(0x832u32, 0xecu32), (0x83e, 0xb), (0x838, 25_000)] {
            code.push(0xb9);
            code.extend(msr.to_le_bytes());
            code.push(0xb8);
            code.extend(value.to_le_bytes());
            code.extend([0x31, 0xd2, 0x0f, 0x30]);
        }
        code.extend([0xfb, 0xeb, 0xfe]);
        machine.write(CODE, &code);
        let mut vcpu = machine.engine.take_vcpus().remove(0);
        vcpu.set_state(&start_state());
        let thread = spawn(vcpu);
        machine.wait_for("the timer", |machine| machine.byte(0x7ec) == 1);
        machine.engine.handles()[0].stop();
        thread.join().unwrap();
    });
}

/// Nothing jumps backwards but returns: each function calls the next one twice, so that the first would come back after some 2^40 instructions.
#[test]
fn a_vcpu_that_only_calls_and_returns_stops_when_it_is_told_to() {
    const DEPTH: u64 = 40;
    on_each_translation(|translation| {
        let machine = Machine::new(1, translation);
        let function = |number: u64| CODE + 16 + 16 * number;
        // jmp to the first; the last one returns.
        machine.write(CODE, &[0xeb, 14]);
        for number in 0..DEPTH {
            // call the next; call the next; ret
            machine.write(function(number), &[0xe8, 11, 0, 0, 0, 0xe8, 6, 0, 0, 0, 0xc3]);
        }
        machine.write(function(DEPTH), &[0xc3]);
        let mut vcpu = machine.engine.take_vcpus().remove(0);
        let mut state = start_state();
        state.gpr[RSP] = 0x9_0000;
        vcpu.set_state(&state);
        let thread = spawn(vcpu);
        std::thread::sleep(Duration::from_millis(300));
        machine.engine.handles()[0].stop();
        machine.wait_for("the vCPU to stop", |_| thread.is_finished());
        let (vcpu, _) = thread.join().unwrap();
        let rsp = vcpu.state().gpr[RSP];
        assert!((0x9_0000 - 8 * (DEPTH + 1)..0x9_0000).contains(&rsp), "{rsp:#x}");
    });
}
