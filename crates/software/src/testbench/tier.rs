//! The same test on each tier: interpreted, translated before it first runs, and both compared.

use std::sync::atomic::AtomicBool;

use iced_x86::Decoder;
use polder_memory::{GuestAddress, PAGE_SIZE};

use super::TestBench;
use crate::CODE_CACHE_BYTES_MIN;
use crate::block_cache;
use crate::cpu::is_canonical;
use crate::run::Outcome;

/// What runs the code of a bench.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tier {
    Interpreter,
    /// Everything that can be translated is, before it runs for the first time.
    Translator,
    /// As `Translator`, and each unit is compared with the interpreter.
    Lockstep,
}

/// Runs a test on each tier that the host has, and names the tier where it fails. A bench in lockstep that saw a difference fails when it goes.
pub fn on_each_tier(test: impl Fn(Tier)) {
    let mut tiers = vec![Tier::Interpreter];
    if TestBench::translating(CODE_CACHE_BYTES_MIN).is_some() {
        tiers.extend([Tier::Translator, Tier::Lockstep]);
    }
    for tier in tiers {
        println!("on {tier:?}");
        test(tier);
    }
}

impl TestBench {
    /// As [`TestBench::new`], on a tier, with all vector units on: code is translated with those only. Instructions are counted on each tier.
    pub fn on(tier: Tier) -> TestBench {
        let bench = match tier {
            Tier::Interpreter => Some(TestBench::new()),
            Tier::Translator => TestBench::translating(CODE_CACHE_BYTES_MIN),
            Tier::Lockstep => TestBench::in_lockstep(),
        };
        let mut bench = bench.expect("tiers that the host has");
        bench.cpu.xcr0 = 7;
        bench.cpu.update_mode();
        bench.cpu.stopwatch.start();
        bench
    }

    /// Runs one instruction by the tier that the bench has; only fetching it may also fault.
    pub(crate) fn run_one(&mut self) -> Outcome {
        let len = if self.translator.is_some() { self.instruction_len() } else { None };
        let Some(len) = len else { return self.blocks.run_one(&mut self.cpu) };
        // Nothing else is known, and what is translated now ends behind the instruction: whatever comes next leaves translated code.
        self.flush();
        let next = self.cpu.rip.wrapping_add(len);
        self.cpu.debugger.set_cuts(&[next]);
        let before = self.cpu.instructions;
        let mut outcome = Outcome::Budget;
        while outcome == Outcome::Budget && self.cpu.instructions == before {
            outcome = self.advance(&AtomicBool::new(false), 1);
        }
        self.cpu.debugger.set_cuts(&[]);
        self.flush();
        outcome
    }

    /// Bytes of the instruction at RIP; `None` if it is none that the translator looks at.
    fn instruction_len(&mut self) -> Option<u64> {
        let cpu = &mut *self.cpu;
        if !cpu.is_64_bit() || !is_canonical(cpu.rip, 48) || cpu.interrupt_shadow || cpu.needs_single_step() {
            return None;
        }
        let page_number = block_cache::code_page(cpu, cpu.rip).ok()?;
        let offset = cpu.rip % PAGE_SIZE;
        let mut bytes = vec![0; (PAGE_SIZE - offset) as usize];
        self.cpu.services.memory.read(GuestAddress(page_number * PAGE_SIZE + offset), &mut bytes).ok()?;
        let options = self.cpu.model.decoder_options();
        let instruction = Decoder::with_ip(64, &bytes, self.cpu.rip, options).decode();
        (!instruction.is_invalid()).then_some(instruction.len() as u64)
    }
}

impl Drop for TestBench {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            let (_, differences) = self.lockstep();
            assert!(differences.is_empty(), "{differences:#?}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::{RAX, RBX, RSP};
    use crate::testbench::{CODE, STACK, Stop};

    /// 0: inc rax; 3: call 9; 8: nop; 9: inc rbx; 12: jmp 0
    const CODE_BYTES: [u8; 14] = [0x48, 0xff, 0xc0, 0xe8, 1, 0, 0, 0, 0x90, 0x48, 0xff, 0xc3, 0xeb, 0xf2];

    #[test]
    fn steps_are_of_one_instruction_on_each_tier() {
        on_each_tier(|tier| {
            let mut bench = TestBench::on(tier);
            bench.write(CODE, &CODE_BYTES);
            bench.cpu.rip = CODE;
            let mut seen = Vec::new();
            for _ in 0..6 {
                assert_eq!(bench.step(1), Stop::Limit);
                seen.push(bench.cpu.rip - CODE);
            }
            assert_eq!(seen, [3, 9, 12, 0, 3, 9]);
            let gpr = &bench.cpu.gpr;
            assert_eq!((gpr[RAX], gpr[RBX], gpr[RSP], bench.cpu.instructions), (2, 1, STACK - 16, 6));
            let translated = bench.translation_counters().translated_units;
            assert_eq!(translated, if tier == Tier::Interpreter { 0 } else { 6 });
            assert_eq!(bench.lockstep().0, if tier == Tier::Lockstep { 6 } else { 0 });
        });
    }
}
