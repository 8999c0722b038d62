//! The loop around translated code.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use polder_memory::PAGE_SIZE;

use super::Translator;
use super::arena::{CpuBox, Jumps, jumps_of};
use super::cold::{NOTED_FAR, NOTED_LEAVES, NOTED_PAGE};
use super::frame::{LINKS_BETWEEN_AIMS, exit};
use super::generate::Shape;
use super::lockstep::Before;
use super::thunks::{Enter, Functions, GO_ON, LEAVE};
use super::units::Place;
use crate::block::COLD_FOR_EVER;
use crate::block_cache::Blocks;
use crate::cpu::{Cpu, RSP, cr4, is_canonical};
use crate::op::{Flow, Op};
use crate::page_walk::{Access, Privilege};
use crate::run::Outcome;
use crate::stopwatch::Activity;
use crate::tlb::WATCHED;

/// The functions that translated code calls.
pub const FUNCTIONS: Functions =
    Functions { miss_read, miss_write, noted, callout, load_x87, jump, link, interpret, attend };

unsafe extern "sysv64" fn miss_read(pointer: *mut Cpu) -> u64 {
    // SAFETY: as in `miss`.
    unsafe { miss(pointer, Access::Read) }
}

unsafe extern "sysv64" fn miss_write(pointer: *mut Cpu) -> u64 {
    // SAFETY: as in `miss`.
    unsafe { miss(pointer, Access::Write) }
}

/// A look-up missed: fills the table, or leaves the access to the interpreter.
///
/// # Safety
/// `pointer` is what translated code passes to functions that it calls: the processor that runs it, to which nobody else has a reference meanwhile.
unsafe fn miss(pointer: *mut Cpu, access: Access) -> u64 {
    // SAFETY: the caller's promise.
    let cpu = unsafe { &mut *pointer };
    cpu.counters.translated_misses += 1;
    cpu.freshen_tables();
    let bytes = cpu.frame.argument;
    let linear = cpu.frame.miss_address;
    let write = access == Access::Write;
    let filled = cpu.check_access(linear, bytes, access, crate::cpu::DS, Privilege::Current).is_ok();
    let entry = cpu.tlb.data_entry(linear);
    let tag = if write { entry.write_tag } else { entry.read_tag };
    let addend = entry.addend;
    if filled && tag == cpu.tlb.tag(linear, bytes) {
        if let Some(journal) = cpu.frame.journal.as_mut().filter(|_| write) {
            // SAFETY: the entry leads to guest RAM.
            unsafe { journal.keep(addend.wrapping_add(linear) as *mut u8) };
        }
        return GO_ON;
    }
    // SAFETY: as above; no reference to the processor is used after this.
    unsafe { leave_at_site(pointer, exit::INTERPRET) }
}

/// A store to a watched page is done.
unsafe extern "sysv64" fn noted(pointer: *mut Cpu) -> u64 {
    // SAFETY: as in `miss`.
    let cpu = unsafe { &mut *pointer };
    let argument = cpu.frame.argument;
    let bytes = argument & !(NOTED_LEAVES | NOTED_FAR);
    let host = cpu.frame.miss_address as *mut u8;
    if argument & NOTED_PAGE != 0 {
        cpu.stored_to_noted(host.map_addr(|address| address & !(PAGE_SIZE as usize - 1)), PAGE_SIZE);
        return GO_ON;
    }
    cpu.stored_to_noted(host, bytes);
    if argument & NOTED_LEAVES != 0 && cpu.frame_attention() {
        if argument & NOTED_FAR != 0 {
            cpu.frame.exit = exit::ATTENTION;
            return LEAVE;
        }
        // SAFETY: as in `miss`.
        return unsafe { leave_at_site(pointer, exit::ATTENTION) };
    }
    GO_ON
}

/// The interpreter runs the instruction.
unsafe extern "sysv64" fn interpret(pointer: *mut Cpu) -> u64 {
    // SAFETY: as in `miss`.
    unsafe { leave_at_site(pointer, exit::INTERPRET) }
}

/// Somebody wants attention.
unsafe extern "sysv64" fn attend(pointer: *mut Cpu) -> u64 {
    // SAFETY: as in `miss`.
    unsafe { leave_at_site(pointer, exit::ATTENTION) }
}

/// Leaves translated code at the instruction that the call stands for.
///
/// # Safety
/// As for [`around`].
unsafe fn leave_at_site(pointer: *mut Cpu, exit: u32) -> u64 {
    // SAFETY: the caller's promise.
    let (translator, cpu, _) = unsafe { around(pointer) };
    cpu.stand_at(translator.caller(cpu));
    cpu.frame.exit = exit;
    LEAVE
}

/// Translated code is about to use the x87 registers.
unsafe extern "sysv64" fn load_x87(cpu: *mut Cpu) -> u64 {
    // SAFETY: as in `miss`.
    let cpu = unsafe { &mut *cpu };
    cpu.vector.make_x87_live();
    GO_ON
}

/// An instruction that the interpreter runs.
unsafe extern "sysv64" fn callout(pointer: *mut Cpu, op: *const Op) -> u64 {
    // SAFETY: as in `miss`; the op belongs to the unit that runs.
    let (cpu, op) = unsafe { (&mut *pointer, &*op) };
    if cpu.frame.journal.is_some() {
        // What handlers do cannot be taken back.
        cpu.rip = op.rip(cpu);
        cpu.frame.exit = exit::INTERPRET;
        return LEAVE;
    }
    cpu.counters.callouts += 1;
    cpu.freshen_tables();
    let nmi_blocked = cpu.nmi_blocked;
    // The outer loop sets the alarm for a new one: code that runs on without it would not be interrupted.
    let deadline = cpu.apic.timer.deadline();
    let tag = cpu.tlb.fetch_tag;
    let table = cpu.tlb.data_table();
    let enabled = cpu.vector.enabled;
    let flow = (op.handler.get())(cpu, op);
    // The unit counts it, if units count.
    let uncounted = u64::from(!cpu.stopwatch.is_on());
    cpu.instructions = cpu.instructions.wrapping_add(uncounted);
    match flow {
        Flow::Next => {
            let is_same = cpu.tlb.fetch_tag == tag && cpu.tlb.data_table() == table && cpu.vector.enabled == enabled;
            if is_same && !cpu.frame_attention() {
                return GO_ON;
            }
            cpu.rip = op.next_rip(cpu);
            cpu.frame.exit = exit::ATTENTION;
        }
        Flow::Jump => {
            // SAFETY: the processor that translated code runs on, and no reference to it is used after this.
            return unsafe { elsewhere(pointer) };
        }
        Flow::Leave
            if cpu.nothing_waits() && cpu.nmi_blocked == nmi_blocked && cpu.apic.timer.deadline() == deadline =>
        {
            // SAFETY: as above.
            return unsafe { elsewhere(pointer) };
        }
        Flow::Leave => cpu.frame.exit = exit::CALLOUT,
        Flow::Fault => {
            cpu.instructions = cpu.instructions.wrapping_sub(1);
            cpu.rip = op.rip(cpu);
            cpu.frame.exit = exit::FAULT;
        }
    }
    LEAVE
}

/// An indirect jump is not in the jump table.
unsafe extern "sysv64" fn jump(pointer: *mut Cpu) -> u64 {
    // SAFETY: as in `miss`.
    let (translator, cpu, _) = unsafe { around(pointer) };
    if !is_canonical(cpu.rip, 48) {
        // It faults itself (SDM vol. 2, JMP, CALL, RET).
        let place = translator.caller(cpu);
        cpu.rip = place.rip;
        cpu.gpr[RSP] = cpu.gpr[RSP].wrapping_sub(i64::from(place.moved) as u64);
        cpu.frame.exit = exit::INTERPRET;
        return LEAVE;
    }
    // SAFETY: as in `callout`.
    unsafe { elsewhere(pointer) }
}

/// A link leads nowhere yet, or not to where the address space in use has its target; its number is in `exit`.
unsafe extern "sysv64" fn link(pointer: *mut Cpu) -> u64 {
    // SAFETY: as in `callout`.
    let (translator, cpu, jumps) = unsafe { around(pointer) };
    cpu.counters.exit_link += 1;
    let anew = cpu.frame.countdown == 0;
    if anew {
        cpu.frame.countdown = LINKS_BETWEEN_AIMS;
    }
    translator.over_link(cpu, jumps, anew).unwrap_or(LEAVE)
}

/// Where to go on after something has led to RIP.
///
/// # Safety
/// As for [`around`].
unsafe fn elsewhere(pointer: *mut Cpu) -> u64 {
    // SAFETY: the caller's promise.
    let (translator, cpu, jumps) = unsafe { around(pointer) };
    cpu.counters.exit_indirect += 1;
    cpu.frame.exit = exit::INDIRECT;
    translator.successor(cpu, jumps).unwrap_or(LEAVE)
}

/// The translator whose code runs, its processor and jump tables.
///
/// # Safety
/// `pointer` is what translated code passes to the functions that it calls; the call has no other references to these three.
unsafe fn around<'a>(pointer: *mut Cpu) -> (&'a mut Translator, &'a mut Cpu, &'a mut Jumps) {
    // SAFETY: `Translator::enter` made the pointers from its own exclusive references, which it does not use until translated code returns.
    unsafe {
        let translator = std::ptr::with_exposed_provenance_mut::<Translator>((*pointer).frame.translator);
        (&mut *translator, &mut *pointer, jumps_of(pointer))
    }
}

impl Cpu {
    /// The index of the jump table in use, which others clear when they want attention.
    fn attention_word(&self) -> &AtomicU32 {
        // SAFETY: the word is only ever accessed atomically while other threads know of it.
        unsafe { &*(&raw const self.frame.jump_table).cast() }
    }

    /// Whether somebody has asked for attention since translated code was entered.
    fn frame_attention(&self) -> bool {
        self.attention_word().load(Ordering::Relaxed) == 0
    }

    /// Chooses the data table again after translated code has changed AC.
    #[inline]
    fn freshen_tables(&mut self) {
        if self.frame.tables_stale != 0 {
            self.frame.tables_stale = 0;
            self.select_tables();
        }
    }

    /// Puts RIP, and what code had still to store, to where translated code was left.
    pub(super) fn stand_at(&mut self, place: Place) {
        self.rip = place.rip;
        if let Some(last) = place.x87 {
            self.remember_x87(last);
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

    /// Whether the code at RIP may run translated: 64-bit code, nobody watching single accesses.
    #[inline]
    fn may_run_translated(&self) -> bool {
        self.is_64_bit()
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
        // The code at this address is hot.
        let mut hot = None;
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
            let rip = processor.rip;
            let mut host = None;
            if let Some((_, shape)) = self.wanted.take().filter(|&(wanted, _)| wanted == rip) {
                let known = self.unit_at(processor, jumps, shape);
                let Some(unit) = known.or_else(|| self.translate(processor, jumps, shape)) else {
                    return self.interpret(cpu, blocks);
                };
                host = self.host_of(unit);
            }
            if host.is_none() && self.cold.take() != Some(rip) {
                self.select_space(processor, jumps);
                host = self.known(rip, jumps);
                if host.is_none() {
                    let mut unit = self.find(processor, jumps);
                    if unit.is_none() && (self.threshold == 0 || hot == Some(rip)) {
                        unit = self.make(processor, jumps, blocks);
                    }
                    host = unit.and_then(|unit| self.host_of(unit));
                }
            }
            let Some(host) = host else {
                match blocks.run_cold(cpu, attention, &mut left, self.threshold) {
                    // Most often it is translated: cold code came to it.
                    Outcome::Hot => hot = Some(cpu.rip),
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

    /// Translates the code at RIP, which is hot and has no unit. `None`: it stays with the interpreter, for some time or for good.
    fn make(&mut self, cpu: &mut Cpu, jumps: &mut Jumps, blocks: &mut Blocks) -> Option<u32> {
        if self.threshold != 0 && self.was_evicted_lately(cpu.rip) {
            blocks.set_heat(cpu, 0);
            return None;
        }
        if self.translate(cpu, jumps, Shape::Shared).is_none() {
            blocks.set_heat(cpu, COLD_FOR_EVER);
            return None;
        }
        self.find(cpu, jumps)
    }

    /// Runs translated code from `host` on until it comes back. `None`: go on.
    fn enter(&mut self, cpu: &mut CpuBox, blocks: &mut Blocks, host: u64, attention: &AtomicBool) -> Option<Outcome> {
        let (processor, jumps) = cpu.split();
        let table = self.select_space(processor, jumps);
        // Either this sees a request for attention, or whoever makes it clears the word after this.
        // In lockstep it stays as if somebody had asked: jumps backwards and indirect ones leave.
        processor.attention_word().swap(if self.lockstep.is_some() { 0 } else { table }, Ordering::SeqCst);
        if attention.load(Ordering::SeqCst) {
            return Some(Outcome::Attention);
        }
        processor.frame.deferred = u32::from(processor.has_deferred());
        let before = self.lockstep.is_some().then(|| Before::take(processor));
        // SAFETY: the thunk is code of the signature; the cache is executable.
        let enter: Enter = unsafe { std::mem::transmute(self.cache.address(self.thunks.enter)) };
        processor.frame.translator = (&raw mut *self).expose_provenance();
        // SAFETY: `host` is the start of a valid unit for the processor's address space and mode. No reference to the translator, the processor
        // or its jump tables is used until this returns.
        unsafe { enter(cpu.as_mut_ptr(), host) };
        let processor = &mut **cpu;
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
        match exit {
            exit::INDIRECT | exit::ATTENTION => None,
            exit::CALLOUT => Some(Outcome::Leave),
            exit::FAULT => Some(Outcome::Fault),
            exit::HOST_FAULT => {
                let place = self.guest_of(processor.frame.miss_address)?;
                processor.stand_at(place);
                Some(self.interpret(cpu, blocks))
            }
            _ => Some(self.interpret(cpu, blocks)),
        }
    }

    /// What the call that translated code has just made stands for.
    fn caller(&self, cpu: &Cpu) -> Place {
        self.guest_of(cpu.frame.return_address - 1).expect("every such call is noted when it is emitted")
    }

    /// The code for RIP, which a handler or a jump in translated code has led to. `None`: the loop around translated code has to see to it.
    fn successor(&mut self, cpu: &mut Cpu, jumps: &mut Jumps) -> Option<u64> {
        let guards_user_pages = cpu.cr4 & cr4::SMAP != 0;
        cpu.freshen_tables();
        // In lockstep the way there sets no accessed bit before the interpreter has come as far.
        if self.lockstep.is_some() || !cpu.may_run_translated() || guards_user_pages != self.guards_user_pages {
            return None;
        }
        self.select_space(cpu, jumps);
        let host = match self.known(cpu.rip, jumps) {
            Some(host) => host,
            None => {
                let Some(unit) = self.find(cpu, jumps) else {
                    self.cold = Some(cpu.rip);
                    return None;
                };
                self.host_of(unit)?
            }
        };
        cpu.frame.deferred = u32::from(cpu.has_deferred());
        self.go_on_in_space(cpu, jumps).then_some(host)
    }

    /// The code that the link whose number is in `exit` leads to; RIP is set. `anew`: the link is aimed there even if it leads elsewhere in other address spaces.
    fn over_link(&mut self, cpu: &mut Cpu, jumps: &mut Jumps, anew: bool) -> Option<u64> {
        let link = std::mem::replace(&mut cpu.frame.exit, exit::INDIRECT);
        let (target, shape) = self.link_target(link)?;
        cpu.rip = target;
        if self.lockstep.is_some() {
            return None;
        }
        cpu.freshen_tables();
        let unit = if shape == Shape::Shared {
            self.find(cpu, jumps)?
        } else {
            // Making it might drop the unit that runs.
            self.wanted = Some((target, shape));
            self.unit_at(cpu, jumps, shape)?
        };
        self.wanted = None;
        self.aim(link, unit, anew);
        let host = self.host_of(unit)?;
        self.go_on_in_space(cpu, jumps).then_some(host)
    }

    /// Lets translated code go on in the processor's address space, unless somebody wants attention.
    fn go_on_in_space(&mut self, cpu: &mut Cpu, jumps: &mut Jumps) -> bool {
        let table = self.select_space(cpu, jumps);
        let word = cpu.attention_word();
        let now = word.load(Ordering::Relaxed);
        now == table || now != 0 && word.compare_exchange(now, table, Ordering::SeqCst, Ordering::Relaxed).is_ok()
    }

    /// Interprets the instruction at RIP.
    pub(super) fn interpret(&mut self, cpu: &mut CpuBox, blocks: &mut Blocks) -> Outcome {
        cpu.counters.interpreted_singly += 1;
        blocks.run_one(cpu)
    }
}
