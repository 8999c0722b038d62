//! A machine from power-on to its end.

use std::fs::File;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use polder_basics::Clock;
use polder_machine::GuestRequest;
use polder_memory::GuestMemory;

use crate::build::{Drained, Machine, Surroundings};
use crate::control::{Control, Event, Running};
use crate::engine::{self, EngineMaker};
use crate::files::Files;
use crate::gdb::Server;
use crate::stats::STATS_VERSION;
use crate::{MachineConfig, ResetPolicy, Stats, VmmError};

/// How often the process' memory is looked at.
const LOOK: Duration = Duration::from_secs(1);

/// How long a host that does not answer a disk is waited for: when the guest ended by itself, and when somebody ended it.
const DRAIN_OF_GUEST: Duration = Duration::from_secs(10);
const DRAIN_OF_ORDER: Duration = Duration::from_millis(500);
/// How long what a guest wrote to volumes may take to be stable when its machine ends.
const FLUSH_AT_END: Duration = Duration::from_secs(3);

/// Where the serial console's output goes. Input comes by [`Control::type_in`].
pub struct Console {
    pub output: File,
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The guest switched itself off.
    PoweredOff,
    /// The guest asked for a reset, and the machine was to end then.
    Reset,
    /// The guest kernel reported a panic.
    Panicked,
    /// A vCPU could not deliver a fault.
    TripleFault,
    TimedOut,
    /// A value was written to the debug-exit port.
    DebugExit(u32),
    /// [`Control::stop`] was called.
    Stopped,
}

impl Outcome {
    fn word(self) -> &'static str {
        match self {
            Outcome::PoweredOff => "powered-off",
            Outcome::Reset => "reset",
            Outcome::Panicked => "panicked",
            Outcome::TripleFault => "triple-fault",
            Outcome::TimedOut => "timed-out",
            Outcome::DebugExit(_) => "debug-exit",
            Outcome::Stopped => "stopped",
        }
    }
}

/// What there is to say of a run.
#[derive(Debug)]
pub struct Report {
    pub outcome: Outcome,
    pub stats: Stats,
    /// Whether the devices ended too, or some were left waiting for the host.
    pub drained: Drained,
}

/// Runs a machine until its guest ends it, its time is over or it is stopped. Blocks; the calling thread is the control thread.
/// `process_start_ns` is the process' first moment on `clock`.
pub fn run(
    config: &MachineConfig,
    console: Console,
    control: &Control,
    clock: Arc<dyn Clock>,
    process_start_ns: u64,
) -> Result<Report, VmmError> {
    let make = |services, cpus| engine::make(config, services, cpus);
    run_with(config, console, control, clock, process_start_ns, &make)
}

pub(crate) fn run_with(
    config: &MachineConfig,
    console: Console,
    control: &Control,
    clock: Arc<dyn Clock>,
    process_start_ns: u64,
    make_engine: EngineMaker<'_>,
) -> Result<Report, VmmError> {
    config.check()?;
    let mut files = Files::open(config)?;
    let gdb = config.gdb.as_ref().map(|gdb| Server::start(gdb, control)).transpose()?;
    let first_entry_ns = Arc::new(OnceLock::new());
    let mut stats = Stats { version: STATS_VERSION, ..Stats::default() };
    stats.memory.guest_ram_bytes = config.ram_bytes;
    stats.times.process_start_ns = process_start_ns;
    let start_ns = clock.monotonic_ns();
    let (outcome, drained) = loop {
        let around = Surroundings {
            config,
            files: &files,
            console: &console.output,
            control,
            clock: clock.clone(),
            first_entry_ns: first_entry_ns.clone(),
            make_engine,
            debugger: gdb.as_ref().map(Server::debugger),
        };
        control.forget_guest_events();
        let mut machine = Machine::build(&around)?;
        stats.boots += 1;
        if stats.boots == 1 {
            stats.times.vmm_ready_ns = clock.monotonic_ns();
        }
        stats.engine = machine.engine.name().to_owned();
        machine.gate.resume();
        let outcome = wait(config, control, clock.as_ref(), start_ns, &machine.memory, &mut stats);
        // Looked at before the machine is taken apart: this is what it held.
        stats.memory.look();
        let mut patience = Patience::new(config, control, clock.as_ref(), start_ns, outcome.as_ref().ok().copied());
        let drained = machine.shut_down(|| patience.lasts());
        if drained == Drained::Left {
            // Closing them would ask the host once more.
            std::mem::forget(std::mem::take(&mut files.disks));
        }
        stats.take_counters(machine.vcpus.iter().map(|vcpu| vcpu.counters()).collect());
        control.set_running(Running::default());
        if let Some(gdb) = &gdb {
            gdb.debugger().disown();
        }
        match outcome? {
            Outcome::Reset if config.reset == ResetPolicy::Reboot && drained == Drained::Left => {
                break (patience.ending(), drained);
            }
            Outcome::Reset if config.reset == ResetPolicy::Reboot => {}
            outcome => break (outcome, drained),
        }
    };
    if let Some(gdb) = &gdb {
        gdb.debugger().finish(Some(outcome));
    }
    stats.times.end_ns = clock.monotonic_ns();
    let drained = match drained {
        Drained::Left => Drained::Left,
        _ => files.close_disks(config, FLUSH_AT_END)?,
    };
    if drained == Drained::All {
        files.save_profile(config)?;
    }
    stats.times.first_vcpu_entry_ns = first_entry_ns.get().copied();
    stats.outcome = outcome.word().to_owned();
    Ok(Report { outcome, stats, drained })
}

/// How long the devices' work in flight is waited for where the host does not answer.
struct Patience<'a> {
    config: &'a MachineConfig,
    control: &'a Control,
    clock: &'a dyn Clock,
    start_ns: u64,
    begin_ns: u64,
    /// Nothing for a machine that is to boot again: its disk must be quiet first.
    bound: Option<Duration>,
}

impl<'a> Patience<'a> {
    fn new(
        config: &'a MachineConfig,
        control: &'a Control,
        clock: &'a dyn Clock,
        start_ns: u64,
        outcome: Option<Outcome>,
    ) -> Self {
        let bound = match outcome {
            Some(Outcome::Reset) if config.reset == ResetPolicy::Reboot => None,
            Some(Outcome::PoweredOff | Outcome::Reset | Outcome::DebugExit(_)) => Some(DRAIN_OF_GUEST),
            _ => Some(DRAIN_OF_ORDER),
        };
        Patience { config, control, clock, start_ns, begin_ns: clock.monotonic_ns(), bound }
    }

    fn is_time_up(&self) -> bool {
        let ran = Duration::from_nanos(self.clock.monotonic_ns().saturating_sub(self.start_ns));
        self.config.timeout.is_some_and(|timeout| ran >= timeout)
    }

    /// Whether to wait on.
    fn lasts(&mut self) -> bool {
        if self.bound != Some(DRAIN_OF_ORDER) && (self.control.is_stop_ordered() || self.is_time_up()) {
            self.begin_ns = self.clock.monotonic_ns();
            self.bound = Some(DRAIN_OF_ORDER);
        }
        let waited = Duration::from_nanos(self.clock.monotonic_ns().saturating_sub(self.begin_ns));
        self.bound.is_none_or(|bound| waited < bound)
    }

    /// What ended the patience with a machine that was to boot again.
    fn ending(&self) -> Outcome {
        if self.control.is_stop_ordered() { Outcome::Stopped } else { Outcome::TimedOut }
    }
}

/// Waits for the event that ends this boot.
fn wait(
    config: &MachineConfig,
    control: &Control,
    clock: &dyn Clock,
    start_ns: u64,
    memory: &GuestMemory,
    stats: &mut Stats,
) -> Result<Outcome, VmmError> {
    if config.dirty_log_period.is_some() {
        memory.notes().start_dirty_log();
    }
    loop {
        let left = match config.timeout {
            Some(timeout) => {
                let ran = Duration::from_nanos(clock.monotonic_ns().saturating_sub(start_ns));
                match timeout.checked_sub(ran) {
                    Some(left) if !left.is_zero() => left,
                    _ => return Ok(Outcome::TimedOut),
                }
            }
            None => LOOK,
        };
        match control.wait(left.min(config.dirty_log_period.unwrap_or(LOOK))) {
            None => {
                if config.dirty_log_period.is_some() {
                    memory.notes().take_dirty();
                }
                stats.memory.look();
            }
            Some(Event::Guest(GuestRequest::PowerOff)) => return Ok(Outcome::PoweredOff),
            Some(Event::Guest(GuestRequest::Reset)) => return Ok(Outcome::Reset),
            Some(Event::Guest(GuestRequest::Panicked)) => return Ok(Outcome::Panicked),
            Some(Event::Guest(GuestRequest::DebugExit(value))) => return Ok(Outcome::DebugExit(value)),
            // The guest goes on by itself.
            Some(Event::Guest(GuestRequest::CrashLoaded)) => {}
            Some(Event::TripleFault) => return Ok(Outcome::TripleFault),
            Some(Event::VcpuDied { index }) => return Err(VmmError::VcpuDied { index }),
            Some(Event::Stop) => return Ok(Outcome::Stopped),
        }
    }
}
