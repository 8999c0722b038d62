//! The outer loop of one vCPU: everything between runs of blocks.
//!
//! Between runs the loop looks, in the order of the architecture (SDM vol. 3, table 6-2), at INIT, debug traps, NMIs, interrupts, and then
//! lets the code go on: one instruction where an interrupt shadow or single steps ask for it, else blocks until something happens.
//!
//! Four things bring the inner loop back: the attention flag (someone put something into the [`Inbox`]), an instruction that
//! changed what matters here, an exception, and the budget of [`BLOCKS_BETWEEN_LOOKS`], after which the timer's deadline is compared
//! with the TSC. A request that cannot be delivered now (IF clear, priority too low) needs no flag: whatever changes that comes back here.
//!
//! While halted the thread sleeps in the host until the inbox is signalled or the timer is due.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use polder_machine::state::{RunState, VcpuState};
use polder_machine::{DebugEvent, DebugVcpu, Vcpu, VcpuExit, VcpuHandle};

use crate::alarm::Alarm;
use crate::apic::{
    EVENT_INIT, EVENT_KICK, EVENT_NMI, EVENT_SECOND_NMI, EVENT_SIPI, EVENT_STOP, Inbox, LocalApic, Router,
};
use crate::block_cache::Blocks;
use crate::counters::Published;
use crate::cpu::{CS, Cpu};
use crate::engine::{EngineOptions, Measurements, PerfMap, Translation};
use crate::flags;
use crate::run::Outcome;
use crate::stopwatch::Activity;
use crate::system::Delivery;
use crate::time::{NEVER, host_tsc, ticks_to_ns};
use crate::trace;
use crate::translate::{CpuBox, FUNCTIONS, Translator};

/// Blocks between two looks at the clock: some 10 to 20 microseconds.
const BLOCKS_BETWEEN_LOOKS: u32 = 256;

/// One vCPU, owned by its thread.
pub struct SoftwareVcpu {
    cpu: CpuBox,
    blocks: Blocks,
    translator: Option<Box<Translator>>,
    inbox: Arc<Inbox>,
    published: Arc<Published>,
    /// INIT has come, SIPI has not.
    waits_for_sipi: bool,
    /// NMIs that wait: one, or two while none is being handled.
    nmis_pending: u32,
    /// A kick came while not halted: the next HLT does not halt.
    kicked: bool,
    /// The host's timer slack was set for this thread.
    slack_set: bool,
    /// Interrupts translated code when the timer is due.
    alarm: Option<Alarm>,
}

impl SoftwareVcpu {
    /// A vCPU after power-on.
    pub fn new(mut cpu: CpuBox, published: Arc<Published>, options: EngineOptions) -> io::Result<Self> {
        let inbox = cpu.apic.inbox().clone();
        if options.measurements == Measurements::All {
            cpu.stopwatch.start();
        }
        let mut translator = match options.translation.threshold() {
            Some(threshold) => Translator::new(FUNCTIONS, threshold, options.code_cache_bytes)?.map(Box::new),
            None => None,
        };
        if let Some(translator) = &mut translator {
            translator.listings.address = options.log_translation;
            if options.perf_map == PerfMap::Written {
                let path = format!("/tmp/perf-{}.map", std::process::id());
                translator.listings.map = Some(File::options().append(true).create(true).open(path)?);
            }
        }
        if options.translation == Translation::Lockstep
            && let Some(translator) = &mut translator
        {
            translator.lockstep = Some(Box::default());
        }
        inbox.set_arena(cpu.memory().clone());
        let waits_for_sipi = cpu.apic.id() != 0;
        Ok(SoftwareVcpu {
            cpu,
            blocks: Blocks::new(),
            translator,
            inbox,
            published,
            waits_for_sipi,
            nmis_pending: 0,
            kicked: false,
            slack_set: false,
            alarm: None,
        })
    }

    /// Takes everything out of the inbox; `true`: stop.
    fn attend(&mut self) -> bool {
        if !self.inbox.take_attention() {
            return false;
        }
        let stale = self.inbox.take_stale();
        if stale.everything {
            self.flush_code();
        }
        for (page_number, granules) in stale.pages {
            self.blocks.invalidate(page_number, granules);
            if let Some(translator) = &mut self.translator {
                translator.invalidate(page_number, granules, self.cpu.split().1);
            }
        }
        let (events, sipi_vector) = self.inbox.take_events();
        if events == 0 {
            return false;
        }
        if events & EVENT_INIT != 0 {
            self.init();
        }
        if events & EVENT_SIPI != 0 && self.waits_for_sipi {
            self.start_up(sipi_vector);
        }
        if events & EVENT_NMI != 0 {
            let arrived = 1 + u32::from(events & EVENT_SECOND_NMI != 0);
            let most = if self.cpu.nmi_blocked { 1 } else { 2 };
            self.nmis_pending = (self.nmis_pending + arrived).min(most);
        }
        if events & EVENT_KICK != 0 {
            self.kicked = true;
        }
        events & EVENT_STOP != 0
    }

    /// The processor, for the debugger.
    pub(crate) fn cpu(&self) -> &Cpu {
        &self.cpu
    }

    pub(crate) fn cpu_mut(&mut self) -> &mut Cpu {
        &mut self.cpu
    }

    /// Drops all decoded and translated code.
    pub(crate) fn flush_code(&mut self) {
        self.blocks.flush();
        if let Some(translator) = &mut self.translator {
            translator.flush(self.cpu.split().1);
        }
    }

    /// INIT: power-on state, but for what the manual keeps: the time-stamp counter, MSRs, XCR0, vector registers (SDM vol. 3, table 10-1).
    fn init(&mut self) {
        let is_bootstrap = self.cpu.apic.id() == 0;
        let power_on = VcpuState::power_on(is_bootstrap);
        let xcr0 = self.cpu.xcr0;
        self.cpu.apic.init();
        self.load(&VcpuState { xcr0, ..power_on });
    }

    /// SIPI: real mode at the vector's page.
    fn start_up(&mut self, vector: u8) {
        self.waits_for_sipi = false;
        let code = &mut self.cpu.segments[usize::from(CS)];
        code.selector = u16::from(vector) << 8;
        code.base = u64::from(vector) << 12;
        self.cpu.rip = 0;
        self.cpu.update_mode();
    }

    /// Sets the registers of a [`VcpuState`].
    fn load(&mut self, state: &VcpuState) {
        let cpu = &mut *self.cpu;
        cpu.gpr[..16].copy_from_slice(&state.gpr);
        cpu.rip = state.rip;
        cpu.segments = state.segments;
        cpu.ldtr = state.ldtr;
        cpu.tr = state.tr;
        cpu.gdtr = state.gdtr;
        cpu.idtr = state.idtr;
        cpu.cr0 = state.cr0;
        cpu.cr2 = state.cr2;
        cpu.cr3 = state.cr3;
        cpu.cr4 = state.cr4;
        cpu.efer = state.efer;
        cpu.xcr0 = state.xcr0;
        cpu.debug = state.debug;
        cpu.apic.set_tpr((state.cr8 as u8 & 15) << 4);
        cpu.halted = state.run_state == RunState::Halted;
        cpu.interrupt_shadow = false;
        cpu.nmi_blocked = false;
        cpu.pending_debug = 0;
        cpu.late_fault = false;
        cpu.stack_shadow = false;
        cpu.set_rflags(state.rflags);
        cpu.set_apic_page();
        cpu.tlb.flush_all();
        if cpu.cr0 & crate::cpu::cr0::PG != 0 && cpu.cr4 & crate::cpu::cr4::PAE != 0 && !cpu.mode.long {
            // A state whose tables are bad faults when it runs.
            cpu.load_pae_pointers();
        }
        self.flush_code();
        self.waits_for_sipi = state.run_state == RunState::WaitForSipi;
        self.nmis_pending = 0;
        self.kicked = false;
    }

    /// Whether a halted vCPU has a reason to go on.
    fn wakes(&mut self) -> bool {
        if std::mem::take(&mut self.kicked) || self.nmis_pending > 0 && !self.cpu.nmi_blocked {
            return true;
        }
        self.cpu.end_quiet_interrupt();
        let is_wanted = self.inbox.external().is_some() || self.cpu.apic.deliverable().is_some();
        self.cpu.system_flags & flags::IF != 0 && is_wanted
    }

    /// Sleeps until the inbox is signalled or the timer is due.
    fn sleep(&mut self) {
        let deadline = self.cpu.apic.timer.deadline();
        let timeout = if deadline == NEVER {
            None
        } else {
            let now = host_tsc();
            if deadline <= now {
                return;
            }
            Some(ticks_to_ns(deadline - now, self.cpu.apic.timer.tsc_khz()))
        };
        self.cpu.counters.sleeps += 1;
        self.publish();
        self.cpu.stopwatch.turn_to(Activity::Asleep);
        self.inbox.sleep(timeout);
        self.cpu.stopwatch.turn_to(Activity::Engine);
    }

    fn publish(&mut self) {
        if let Some(translator) = &self.translator {
            translator.report(&mut self.cpu.counters);
        }
        let cpu = &mut *self.cpu;
        cpu.counters.take_times(&cpu.stopwatch, cpu.apic.timer.tsc_khz());
        self.published.publish(self.cpu.instructions, &self.cpu.counters);
    }

    /// Delivers what waits to be delivered before the next instruction. `traps_only`: interrupts stay out.
    fn deliver_pending(&mut self, traps_only: bool) -> Delivery {
        let cpu = &mut *self.cpu;
        if cpu.trap_pending() {
            cpu.counters.exceptions += 1;
            if cpu.deliver_trap() == Delivery::TripleFault {
                return Delivery::TripleFault;
            }
        }
        if cpu.interrupt_shadow || traps_only {
            return Delivery::Done;
        }
        if self.nmis_pending > 0 && !cpu.nmi_blocked {
            self.nmis_pending -= 1;
            cpu.counters.nmis += 1;
            return cpu.deliver_nmi();
        }
        if cpu.system_flags & flags::IF == 0 {
            return Delivery::Done;
        }
        if self.inbox.external().is_some()
            && let Some(vector) = self.inbox.take_external()
        {
            cpu.counters.interrupts += 1;
            return cpu.deliver_interrupt(vector);
        }
        if self.inbox.highest_request().is_none() {
            return Delivery::Done;
        }
        cpu.end_quiet_interrupt();
        if let Some(vector) = cpu.apic.deliverable() {
            cpu.apic.accept(vector);
            cpu.offer_quiet_end();
            cpu.counters.interrupts += 1;
            return cpu.deliver_interrupt(vector);
        }
        Delivery::Done
    }

    /// Runs one instruction, or blocks.
    fn advance(&mut self) -> Delivery {
        let traced = trace::is_on();
        if !(self.cpu.interrupt_shadow || self.cpu.needs_single_step() || traced) {
            let outcome = match &mut self.translator {
                Some(translator) => {
                    translator.run(&mut self.cpu, &mut self.blocks, self.inbox.attention(), BLOCKS_BETWEEN_LOOKS)
                }
                None => self.blocks.run(&mut self.cpu, self.inbox.attention(), BLOCKS_BETWEEN_LOOKS),
            };
            return self.finish(outcome);
        }
        if self.cpu.is_at_breakpoint() {
            return Delivery::Done;
        }
        if traced {
            trace::instruction(&self.cpu);
        }
        let step = match self.cpu.before_step() {
            Ok(step) => step,
            Err(_) => return self.finish(Outcome::Fault),
        };
        self.cpu.interrupt_shadow = false;
        let outcome = self.blocks.run_one(&mut self.cpu);
        if outcome != Outcome::Fault {
            self.cpu.after_step(step);
        }
        self.finish(outcome)
    }

    /// A debugger's step: one instruction, or what is delivered before it. Interrupts only where the vCPU was halted until one came.
    fn step(&mut self, woken: bool) -> VcpuExit {
        let rip = self.cpu.rip;
        let delivery = match self.deliver_pending(!woken) {
            Delivery::Done if self.cpu.rip == rip => self.advance(),
            delivery => delivery,
        };
        if delivery == Delivery::TripleFault {
            trace::triple_fault(&self.cpu);
            return VcpuExit::TripleFault;
        }
        VcpuExit::Debug(self.cpu.debugger.take_event().unwrap_or(DebugEvent::Step))
    }

    fn finish(&mut self, outcome: Outcome) -> Delivery {
        self.cpu.counters.leaves += 1;
        if outcome != Outcome::Fault || self.cpu.met_breakpoint() {
            return Delivery::Done;
        }
        self.cpu.debugger.forget_event();
        self.cpu.counters.exceptions += 1;
        trace::exception(&self.cpu);
        self.cpu.deliver_exception()
    }

    /// Looks whether the timer is due, and sets the alarm for when it will be.
    fn poll_timer(&mut self) {
        let now = host_tsc();
        self.cpu.apic.poll_timer(now);
        if let Some(alarm) = &mut self.alarm {
            let timer = &self.cpu.apic.timer;
            alarm.set(timer.deadline(), now, timer.tsc_khz());
        }
    }

    /// Sleeps of this thread end when they should: Linux adds 50 microseconds unless told not to.
    fn set_timer_slack(&mut self) {
        if !self.slack_set {
            self.slack_set = true;
            // SAFETY: sets a number of the calling thread. It cannot fail in a way that matters.
            unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1, 0, 0, 0) };
        }
    }
}

impl Vcpu for SoftwareVcpu {
    fn run(&mut self) -> VcpuExit {
        self.set_timer_slack();
        self.alarm = self.translator.is_some().then(Alarm::new).flatten();
        Alarm::attach(Some(&self.inbox));
        self.cpu.vector.resume_floats();
        self.cpu.stopwatch.skip();
        let exit = loop {
            if self.attend() {
                break VcpuExit::Stopped;
            }
            if self.cpu.apic.timer.deadline() != NEVER {
                self.poll_timer();
            }
            if self.waits_for_sipi {
                self.sleep();
                continue;
            }
            let woken = self.cpu.halted;
            if woken {
                if !self.wakes() {
                    self.sleep();
                    continue;
                }
                self.cpu.halted = false;
            }
            if self.cpu.debugger.steps() {
                break self.step(woken);
            }
            let mut delivery = self.deliver_pending(false);
            // What was delivered may have been pushed over code, which a single step would still run.
            if delivery == Delivery::Done && !self.inbox.attention().load(Ordering::Relaxed) {
                delivery = self.advance();
            }
            if delivery == Delivery::TripleFault {
                trace::triple_fault(&self.cpu);
                break VcpuExit::TripleFault;
            }
            if let Some(event) = self.cpu.debugger.take_event() {
                break VcpuExit::Debug(event);
            }
        };
        self.cpu.vector.retire();
        self.cpu.stopwatch.turn_to(Activity::Engine);
        self.alarm = None;
        Alarm::attach(None);
        self.publish();
        exit
    }

    fn state(&self) -> VcpuState {
        let cpu = &*self.cpu;
        let mut gpr = [0; 16];
        gpr.copy_from_slice(&cpu.gpr[..16]);
        VcpuState {
            gpr,
            rip: cpu.rip,
            rflags: cpu.rflags(),
            segments: cpu.segments,
            ldtr: cpu.ldtr,
            tr: cpu.tr,
            gdtr: cpu.gdtr,
            idtr: cpu.idtr,
            cr0: cpu.cr0,
            cr2: cpu.cr2,
            cr3: cpu.cr3,
            cr4: cpu.cr4,
            cr8: cpu.cr8(),
            efer: cpu.efer,
            xcr0: cpu.xcr0,
            debug: cpu.debug,
            run_state: match (self.waits_for_sipi, cpu.halted) {
                (true, _) => RunState::WaitForSipi,
                (false, true) => RunState::Halted,
                (false, false) => RunState::Runnable,
            },
        }
    }

    fn debug(&mut self) -> Option<&mut dyn DebugVcpu> {
        Some(self)
    }

    fn set_state(&mut self, state: &VcpuState) {
        self.inbox.clear_requests();
        self.load(state);
    }

    fn reset(&mut self) {
        let old = &mut *self.cpu;
        let index = old.apic.id() as usize;
        let router: Arc<Router> = old.apic.router().clone();
        // What was sent to the processor before the reset is void; a request to stop is not.
        self.inbox.take_external();
        self.inbox.take_event(EVENT_INIT | EVENT_SIPI | EVENT_NMI | EVENT_SECOND_NMI | EVENT_KICK);
        let apic = LocalApic::new(router, index, old.apic.timer.tsc_khz());
        let (services, model, epoch_tsc) = (old.services.clone(), old.model.clone(), old.epoch_tsc);
        let (counters, stopwatch, instructions) = (old.counters, old.stopwatch, old.instructions);
        let debugger = std::mem::take(&mut old.debugger);
        self.cpu.replace(|tables| {
            let cpu = Cpu::with_platform(tables, services, model, apic, epoch_tsc);
            Cpu { counters, stopwatch, instructions, debugger, ..cpu }
        });
        // The new look-up tables count their generations anew.
        self.flush_code();
        self.waits_for_sipi = index != 0;
        self.nmis_pending = 0;
        self.kicked = false;
    }
}

/// Reaches a vCPU from other threads.
pub struct SoftwareHandle {
    pub(crate) inbox: Arc<Inbox>,
    pub(crate) published: Arc<Published>,
}

impl VcpuHandle for SoftwareHandle {
    fn stop(&self) {
        self.inbox.post_event(EVENT_STOP);
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        self.published.read()
    }
}
