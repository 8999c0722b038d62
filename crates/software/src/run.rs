//! The inner loop: from block to block until something else is to be done.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::block::{Block, COLD_FOR_EVER};
use crate::block_cache::Blocks;
use crate::cpu::{BLOCK_RIP, Cpu};
use crate::op::{Flow, Op};
use crate::stopwatch::Activity;

/// Why [`Blocks::run`] came back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The attention flag is set.
    Attention,
    /// The budget of blocks is used up.
    Budget,
    /// An instruction changed something that the outer loop looks at; `cpu.rip` is the next instruction.
    Leave,
    /// An exception is to be delivered: `cpu.fault`, raised by the instruction at `cpu.rip`.
    Fault,
    /// The block at `cpu.rip` ran often enough to be translated.
    Hot,
}

impl Blocks {
    /// Runs guest code from `cpu.rip` on. The attention flag and the budget (in blocks) are looked at before every block. Interrupt shadow, trap flag
    /// and code breakpoints are the caller's concern: it uses [`Blocks::run_one`] while there are any.
    pub fn run(&mut self, cpu: &mut Cpu, attention: &AtomicBool, mut budget: u32) -> Outcome {
        self.run_blocks::<false>(cpu, attention, &mut budget, 0)
    }

    /// As [`Blocks::run`], until a block is met that has run `threshold` times. Takes what it has used from the budget.
    pub(crate) fn run_cold(
        &mut self,
        cpu: &mut Cpu,
        attention: &AtomicBool,
        budget: &mut u32,
        threshold: u32,
    ) -> Outcome {
        self.run_blocks::<true>(cpu, attention, budget, threshold)
    }

    #[inline(always)]
    fn run_blocks<const COUNTS: bool>(
        &mut self,
        cpu: &mut Cpu,
        attention: &AtomicBool,
        budget: &mut u32,
        threshold: u32,
    ) -> Outcome {
        let before = cpu.stopwatch.turn_to(Activity::Interpreter);
        let mut left = *budget;
        let mut last: *const Block = self.nowhere();
        let outcome = loop {
            if attention.load(Ordering::Relaxed) {
                break Outcome::Attention;
            }
            if left == 0 {
                break Outcome::Budget;
            }
            left -= 1;
            let Ok(block) = self.find_after(last, cpu) else { break Outcome::Fault };
            if COUNTS {
                // SAFETY: `find_after` gives a valid block.
                let heat = unsafe { &(*block).heat };
                match heat.get() {
                    COLD_FOR_EVER => {}
                    times if times >= threshold => break Outcome::Hot,
                    times => heat.set(times + 1),
                }
            }
            last = block;
            match execute(cpu, block) {
                Flow::Next | Flow::Jump => {}
                Flow::Leave => break Outcome::Leave,
                Flow::Fault => break Outcome::Fault,
            }
            if cpu.running.abandoned {
                break Outcome::Leave;
            }
        };
        *budget = left;
        self.finish(cpu);
        cpu.stopwatch.turn_to(before);
        outcome
    }

    /// Runs exactly one instruction (of a repeated string instruction as much as it does at a time). `Leave` is also the answer
    /// when it completed without anything special.
    pub fn run_one(&mut self, cpu: &mut Cpu) -> Outcome {
        let before = cpu.stopwatch.turn_to(Activity::Interpreter);
        let outcome = match self.find_single(cpu) {
            Err(_) => Outcome::Fault,
            Ok(block) => {
                cpu.gpr[BLOCK_RIP] = cpu.rip;
                cpu.running.set(block);
                // SAFETY: `find_single` gave a valid block whose first op is one instruction.
                let op = unsafe { &*(*block).ops };
                match (op.handler.get())(cpu, op) {
                    Flow::Next => {
                        cpu.rip = cpu.cut_rip(op.next_rip(cpu));
                        cpu.instructions = cpu.instructions.wrapping_add(1);
                        Outcome::Leave
                    }
                    Flow::Jump | Flow::Leave => {
                        cpu.instructions = cpu.instructions.wrapping_add(1);
                        Outcome::Leave
                    }
                    Flow::Fault => Outcome::Fault,
                }
            }
        };
        self.finish(cpu);
        cpu.stopwatch.turn_to(before);
        outcome
    }
}

/// Runs a block; never returns `Next`.
#[inline(always)]
fn execute(cpu: &mut Cpu, block: *const Block) -> Flow {
    cpu.gpr[BLOCK_RIP] = cpu.rip;
    cpu.running.set(block);
    // SAFETY: the block was found valid and lives until `finish`; its last op returns something else than `Next`, so
    // `op` never leaves the block's ops.
    unsafe {
        let first: *const Op = (*block).ops;
        let mut op = first;
        let flow = loop {
            let flow = ((*op).handler.get())(cpu, &*op);
            if flow != Flow::Next {
                break flow;
            }
            op = op.add(1);
        };
        let before = op.offset_from_unsigned(first) as u64;
        if flow == Flow::Fault {
            cpu.instructions = cpu.instructions.wrapping_add(before);
            cpu.rip = cpu.cut_rip((*op).rip(cpu));
        } else {
            cpu.instructions = cpu.instructions.wrapping_add(before + 1);
        }
        flow
    }
}

#[cfg(test)]
mod tests {
    use crate::cpu::RAX;
    use crate::testbench::{CODE, Stop, TestBench};

    #[test]
    fn a_loop_counts_its_instructions_exactly() {
        let mut bench = TestBench::new();
        // mov is not needed: add eax, 1; cmp eax, 10; jne back; ud2
        let code = [0x83, 0xc0, 1, 0x83, 0xf8, 10, 0x75, 0xf8, 0x0f, 0x0b];
        let stop = bench.run_code(&code, 1000);
        assert!(matches!(stop, Stop::Fault(fault) if fault.vector == 6), "{stop:?}");
        assert_eq!((bench.cpu.gpr[RAX], bench.cpu.instructions, bench.cpu.rip), (10, 30, CODE + 8));
    }

    #[test]
    fn a_store_into_the_next_instruction_takes_effect_at_once() {
        let mut bench = TestBench::new();
        // add byte [rip+3], 0x40 (turns the second add's immediate from 1 to 0x41); add eax, 1; ud2
        let code = [0x80, 0x05, 2, 0, 0, 0, 0x40, 0x83, 0xc0, 1, 0x0f, 0x0b];
        for round in 1..=3 {
            bench.cpu.gpr[RAX] = 0;
            let stop = bench.run_code(&code, 1000);
            assert!(matches!(stop, Stop::Fault(fault) if fault.vector == 6), "{stop:?}");
            assert_eq!((bench.cpu.gpr[RAX], bench.cpu.instructions), (0x41, 2 * round));
        }
    }

    #[test]
    fn an_instruction_over_two_pages_runs_and_faults_on_the_second() {
        let mut bench = TestBench::new();
        bench.write(CODE + 0xffe, &[0x83, 0xc0, 1, 0x0f, 0x0b]);
        bench.cpu.rip = CODE + 0xffe;
        let stop = bench.run(100);
        assert!(matches!(stop, Stop::Fault(fault) if fault.vector == 6), "{stop:?}");
        assert_eq!((bench.cpu.gpr[RAX], bench.cpu.rip), (1, CODE + 0x1001));
        // Page not present: table entry of CODE + 0x1000.
        bench.write(0x1000 + 0x3000 + 8 * ((CODE >> 12) + 1), &[0]);
        bench.cpu.tlb.invalidate_page(CODE + 0x1000);
        bench.cpu.rip = CODE + 0xffe;
        let stop = bench.run(100);
        assert!(matches!(stop, Stop::Fault(fault) if fault.vector == 14 && fault.detail == CODE + 0x1000), "{stop:?}");
        assert_eq!((bench.cpu.gpr[RAX], bench.cpu.rip), (1, CODE + 0xffe));
    }
}
