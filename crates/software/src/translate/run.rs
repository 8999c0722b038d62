//! The loop around translated code.

use std::sync::atomic::{AtomicBool, Ordering};

use super::Translator;
use super::arena::CpuBox;
use super::frame::exit;
use super::generate::{MISS_WRITE, NOTED_LEAVES};
use super::lockstep::Before;
use super::thunks::{Enter, Functions};
use crate::block::COLD_FOR_EVER;
use crate::block_cache::Blocks;
use crate::cpu::{Cpu, RSP, cr4, is_canonical};
use crate::op::{Flow, Op};
use crate::page_walk::{Access, Privilege};
use crate::run::Outcome;
use crate::stopwatch::Activity;
use crate::tlb::WATCHED;
use crate::vector::class;

/// The functions that translated code calls.
pub const FUNCTIONS: Functions = Functions { miss, noted, callout, load_x87 };

/// A look-up missed: fills the table. Not 0: the access is the interpreter's.
unsafe extern "sysv64" fn miss(cpu: *mut Cpu) -> u32 {
    // SAFETY: translated code passes the processor that runs it, to which nobody else has a reference meanwhile.
    let cpu = unsafe { &mut *cpu };
    cpu.counters.translated_misses += 1;
    cpu.freshen_tables();
    let write = cpu.frame.miss & MISS_WRITE != 0;
    let bytes = u64::from(cpu.frame.miss & !MISS_WRITE);
    let linear = cpu.frame.miss_address;
    let access = if write { Access::Write } else { Access::Read };
    let filled = cpu.check_access(linear, bytes, access, crate::cpu::DS, Privilege::Current).is_ok();
    let entry = cpu.tlb.data_entry(linear);
    let tag = if write { entry.write_tag } else { entry.read_tag };
    let addend = entry.addend;
    if filled && tag == cpu.tlb.tag(linear, bytes) {
        if let Some(journal) = cpu.frame.journal.as_mut().filter(|_| write) {
            // SAFETY: the entry leads to guest RAM.
            unsafe { journal.keep(addend.wrapping_add(linear) as *mut u8) };
        }
        return 0;
    }
    cpu.frame.exit = exit::INTERPRET;
    1
}

/// A store to a watched page is done.
unsafe extern "sysv64" fn noted(cpu: *mut Cpu) -> u32 {
    // SAFETY: as in `miss`.
    let cpu = unsafe { &mut *cpu };
    let bytes = u64::from(cpu.frame.miss & !NOTED_LEAVES);
    cpu.stored_to_noted(cpu.frame.miss_address as *mut u8, bytes);
    cpu.frame.exit = exit::ATTENTION;
    u32::from(cpu.frame.miss & NOTED_LEAVES != 0 && cpu.frame_attention())
}

/// Translated code is about to use the x87 registers.
unsafe extern "sysv64" fn load_x87(cpu: *mut Cpu) -> u32 {
    // SAFETY: as in `miss`.
    let cpu = unsafe { &mut *cpu };
    cpu.vector.make_x87_live();
    0
}

/// An instruction that the interpreter runs.
unsafe extern "sysv64" fn callout(cpu: *mut Cpu, op: *const Op) -> u32 {
    // SAFETY: as in `miss`; the op belongs to the unit that runs.
    let (cpu, op) = unsafe { (&mut *cpu, &*op) };
    if cpu.frame.journal.is_some() {
        // What handlers do cannot be taken back.
        cpu.rip = op.rip(cpu);
        cpu.frame.exit = exit::INTERPRET;
        return 1;
    }
    cpu.counters.callouts += 1;
    cpu.freshen_tables();
    let nmi_blocked = cpu.nmi_blocked;
    // The outer loop sets the alarm for a new one: code that runs on without it would not be interrupted.
    let deadline = cpu.apic.timer.deadline();
    let tag = cpu.tlb.fetch_tag;
    let table = cpu.tlb.data_table();
    let flow = (op.handler.get())(cpu, op);
    // The unit counts it, if units count.
    let uncounted = u64::from(!cpu.stopwatch.is_on());
    cpu.instructions = cpu.instructions.wrapping_add(uncounted);
    match flow {
        Flow::Next => {
            if cpu.tlb.fetch_tag == tag && cpu.tlb.data_table() == table && !cpu.frame_attention() {
                return 0;
            }
            cpu.rip = op.next_rip(cpu);
            cpu.frame.exit = exit::ATTENTION;
        }
        Flow::Jump => cpu.frame.exit = exit::INDIRECT,
        Flow::Leave
            if cpu.nothing_waits() && cpu.nmi_blocked == nmi_blocked && cpu.apic.timer.deadline() == deadline =>
        {
            cpu.frame.exit = exit::INDIRECT;
        }
        Flow::Leave => cpu.frame.exit = exit::CALLOUT,
        Flow::Fault => {
            cpu.instructions = cpu.instructions.wrapping_sub(1);
            cpu.rip = op.rip(cpu);
            cpu.frame.exit = exit::FAULT;
        }
    }
    1
}

impl Cpu {
    /// Whether somebody has asked for attention since translated code was entered.
    fn frame_attention(&self) -> bool {
        // SAFETY: the word is only ever accessed atomically while other threads know of it.
        let word: &std::sync::atomic::AtomicU32 = unsafe { &*(&raw const self.frame.jump_table).cast() };
        word.load(Ordering::Relaxed) == 0
    }

    /// Chooses the data table again after translated code has changed AC.
    #[inline]
    fn freshen_tables(&mut self) {
        if self.frame.tables_stale != 0 {
            self.frame.tables_stale = 0;
            self.select_tables();
        }
    }

    /// After a jump in translated code that led to no unit: it was the instruction's own fault if the address is not canonical (SDM vol. 2, JMP, CALL, RET).
    fn judge_jump(&mut self) {
        if self.frame.exit != exit::JUMP {
            return;
        }
        self.frame.exit = exit::INDIRECT;
        if !is_canonical(self.rip, 48) {
            self.rip = self.frame.miss_address;
            self.gpr[RSP] = self.gpr[RSP].wrapping_sub(u64::from(self.frame.miss));
            self.frame.exit = exit::INTERPRET;
        }
    }

    /// Whether an interrupt waits for IF or for its turn.
    #[inline]
    fn has_deferred(&self) -> bool {
        let inbox = self.apic.inbox();
        inbox.external().is_some() || inbox.highest_request().is_some()
    }

    /// Whether the outer loop would go on at once with the code at RIP.
    fn nothing_waits(&self) -> bool {
        !self.halted
            && !self.interrupt_shadow
            && !self.needs_single_step()
            && !self.trap_pending()
            && !self.has_deferred()
            && !self.frame_attention()
    }

    /// Whether the code at RIP may run translated: 64-bit code with everything on, nobody watching single accesses.
    #[inline]
    fn may_run_translated(&self) -> bool {
        const ALL: u8 = class::X87 | class::MMX | class::SSE | class::AVX;
        self.is_64_bit()
            && self.vector.enabled & ALL == ALL
            && self.tlb.data_table() != WATCHED
            && self.cr4 & cr4::LA57 == 0
            && matches!(self.mode.cpl, 0 | 3)
    }
}

impl Translator {
    /// Runs guest code from RIP on, translated where it is hot. As [`Blocks::run`]; `budget` counts interpreted blocks and returns from translated code.
    pub fn run(&mut self, cpu: &mut CpuBox, blocks: &mut Blocks, attention: &AtomicBool, budget: u32) -> Outcome {
        super::signal::set_code(self.cache.executable_range(), self.cache.address(self.thunks.landing));
        let mut left = budget;
        loop {
            if attention.load(Ordering::Relaxed) {
                return Outcome::Attention;
            }
            if left == 0 {
                return Outcome::Budget;
            }
            if !cpu.may_run_translated() {
                return blocks.run(cpu, attention, left);
            }
            let (processor, jumps) = cpu.split();
            if self.guards_user_pages != (processor.cr4 & cr4::SMAP != 0) {
                self.guards_user_pages = processor.cr4 & cr4::SMAP != 0;
                self.flush(jumps);
            }
            self.select_space(processor, jumps);
            let mut host = self.known(processor.rip, jumps);
            if host.is_none() {
                let mut unit = self.find(processor, jumps);
                if unit.is_none() && self.threshold == 0 {
                    unit = self.translate(processor, jumps).and_then(|_| self.find(processor, jumps));
                }
                host = unit.and_then(|unit| self.host_of(unit));
            }
            let Some(host) = host else {
                match blocks.run_cold(cpu, attention, &mut left, self.threshold) {
                    Outcome::Hot => {
                        let (processor, jumps) = cpu.split();
                        if self.was_evicted_lately(processor) {
                            blocks.set_heat(processor, 0);
                        } else if self.translate(processor, jumps).is_none() {
                            blocks.set_heat(processor, COLD_FOR_EVER);
                        }
                    }
                    outcome => return outcome,
                }
                continue;
            };
            left -= 1;
            cpu.stopwatch.turn_to(Activity::Translated);
            let outcome = self.enter(cpu, blocks, host, attention);
            cpu.stopwatch.turn_to(Activity::Engine);
            if let Some(outcome) = outcome {
                return outcome;
            }
        }
    }

    /// Runs translated code from `host` on until it comes back. `None`: go on.
    fn enter(&mut self, cpu: &mut CpuBox, blocks: &mut Blocks, host: u64, attention: &AtomicBool) -> Option<Outcome> {
        let memory = cpu.memory().clone();
        let word = memory.attention();
        let (processor, jumps) = cpu.split();
        let mut host = host;
        loop {
            let table = self.select_space(processor, jumps);
            // Either this sees a request for attention, or whoever makes it clears the word after this.
            // In lockstep it stays as if somebody had asked: jumps backwards and indirect ones leave.
            word.swap(if self.lockstep.is_some() { 0 } else { table }, Ordering::SeqCst);
            if attention.load(Ordering::SeqCst) {
                return Some(Outcome::Attention);
            }
            processor.frame.deferred = u32::from(processor.has_deferred());
            let before = self.lockstep.is_some().then(|| Before::take(processor));
            // SAFETY: the thunk is code of the signature; the cache is executable.
            let enter: Enter = unsafe { std::mem::transmute(self.cache.address(self.thunks.enter)) };
            // SAFETY: `host` is the start of a valid unit for the processor's address space and mode.
            unsafe { enter(processor, host) };
            processor.judge_jump();
            let exit = processor.frame.exit;
            processor.freshen_tables();
            processor.counters.count_exit(exit);
            if exit == exit::INTERPRET && processor.stopwatch.is_on() {
                // It is counted when it runs.
                processor.instructions = processor.instructions.wrapping_sub(1);
            }
            if let Some(before) = before {
                return self.compare(cpu, blocks, &before);
            }
            if exit < exit::FIRST {
                let target = self.link_target(exit)?;
                processor.rip = target;
                let unit = self.find(processor, jumps);
                match unit {
                    Some(unit) if self.is_valid(unit) => {
                        self.aim(exit, unit, processor.frame.space);
                        host = self.host_of(unit)?;
                        continue;
                    }
                    _ => return None,
                }
            }
            match exit {
                exit::INDIRECT => {
                    let guards_user_pages = processor.cr4 & cr4::SMAP != 0;
                    if !processor.may_run_translated() || guards_user_pages != self.guards_user_pages {
                        return None;
                    }
                    self.select_space(processor, jumps);
                    host = match self.known(processor.rip, jumps) {
                        Some(host) => host,
                        None => {
                            let unit = self.find(processor, jumps)?;
                            self.host_of(unit)?
                        }
                    };
                }
                exit::ATTENTION => return None,
                exit::CALLOUT => return Some(Outcome::Leave),
                exit::FAULT => return Some(Outcome::Fault),
                exit::HOST_FAULT => {
                    let site = self.guest_of_fault(processor.frame.miss_address)?;
                    processor.rip = site.rip;
                    if let Some(last) = site.x87 {
                        processor.remember_x87(last);
                    }
                    return self.interpret(cpu, blocks);
                }
                _ => return self.interpret(cpu, blocks),
            }
        }
    }

    /// Interprets the instruction at RIP.
    pub(super) fn interpret(&mut self, cpu: &mut CpuBox, blocks: &mut Blocks) -> Option<Outcome> {
        cpu.counters.interpreted_singly += 1;
        Some(blocks.run_one(cpu))
    }
}
