//! What the machine, its vCPU threads and the server of gdb share.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use polder_machine::{DebugEvent, DebugOrders, Vcpu};
use polder_memory::GuestMemory;
use rustix::event::{EventfdFlags, eventfd};

use crate::gate::Gate;
use crate::{Outcome, VmmError};

/// A vCPU that its thread and, while that waits at the gate, the debugger use.
pub(crate) type SharedVcpu = Arc<Mutex<Box<dyn Vcpu>>>;

/// Takes a vCPU. One whose thread panicked is looked at all the same: the machine is about to end.
pub(crate) fn lock_vcpu(vcpu: &SharedVcpu) -> MutexGuard<'_, Box<dyn Vcpu>> {
    vcpu.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The machine that is debugged.
#[derive(Clone)]
pub(crate) struct Debuggee {
    pub(crate) gate: Arc<Gate>,
    pub(crate) vcpus: Vec<SharedVcpu>,
    pub(crate) memory: GuestMemory,
}

/// What a vCPU reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Finding {
    Event(DebugEvent),
    TripleFault,
}

/// How a vCPU is to go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Going {
    Stays,
    Steps,
    Runs,
}

/// What the server waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum News {
    /// A vCPU came back, and all others have been stopped.
    Found { index: usize, finding: Finding },
    /// There is no more machine; how it ended, if it ended well.
    End(Option<Outcome>),
}

struct State {
    machine: Option<Debuggee>,
    /// vCPUs of the machine, from its first power-on on.
    vcpu_count: usize,
    /// The vCPUs are to stay at the gate, those of a new machine too.
    stopped: bool,
    /// A gdb is there.
    attached: bool,
    /// Breakpoints and watchpoints; no steps.
    orders: DebugOrders,
    findings: VecDeque<(usize, Finding)>,
    end: Option<Option<Outcome>>,
}

/// One for each run, whatever resets it goes through.
pub(crate) struct Debugger {
    state: Mutex<State>,
    /// A machine came, or the end.
    changed: Condvar,
    /// Readable while there may be news.
    wake: OwnedFd,
}

impl Debugger {
    /// `stopped`: the first machine waits for gdb.
    pub(crate) fn new(stopped: bool) -> io::Result<Self> {
        let state = State {
            machine: None,
            vcpu_count: 0,
            stopped,
            attached: false,
            orders: DebugOrders::default(),
            findings: VecDeque::new(),
            end: None,
        };
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Debugger { state: Mutex::new(state), changed: Condvar::new(), wake })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn notify(&self) {
        // A full counter is readable as well.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Becomes readable when there may be news.
    pub(crate) fn wake(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// Goes over to a machine whose gate has not been opened yet.
    pub(crate) fn adopt(&self, machine: Debuggee, engine: &str) -> Result<(), VmmError> {
        let mut state = self.lock();
        for (index, vcpu) in machine.vcpus.iter().enumerate() {
            let mut vcpu = lock_vcpu(vcpu);
            let Some(debug) = vcpu.debug() else {
                return Err(VmmError::NoDebugger { engine: engine.to_owned() });
            };
            debug.set_orders(&state.orders);
            if state.stopped {
                machine.gate.hold(index);
            }
        }
        state.findings.clear();
        state.vcpu_count = machine.vcpus.len();
        state.machine = Some(machine);
        self.changed.notify_all();
        Ok(())
    }

    /// The machine was stopped; its vCPUs are let go of.
    pub(crate) fn disown(&self) {
        self.lock().machine = None;
    }

    /// There will be no other machine.
    pub(crate) fn finish(&self, outcome: Option<Outcome>) {
        let mut state = self.lock();
        state.machine = None;
        state.end.get_or_insert(outcome);
        drop(state);
        self.changed.notify_all();
        self.notify();
    }

    /// Waits until there is a machine; false if there will be none.
    pub(crate) fn wait_for_machine(&self) -> bool {
        let mut state = self.lock();
        while state.machine.is_none() && state.end.is_none() {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.end.is_none()
    }

    /// Whether a gdb is there to hear of findings.
    pub(crate) fn is_attached(&self) -> bool {
        self.lock().attached
    }

    /// Called by the thread of a vCPU that holds itself.
    pub(crate) fn report(&self, index: usize, finding: Finding) {
        self.lock().findings.push_back((index, finding));
        self.notify();
    }

    /// Stops all vCPUs and waits until they have stopped.
    pub(crate) fn stop(&self) {
        let mut state = self.lock();
        state.stopped = true;
        let machine = state.machine.clone();
        // Not under the lock: a vCPU on its way to the gate may have to report first.
        drop(state);
        if let Some(machine) = machine {
            machine.gate.hold_all();
        }
    }

    /// A gdb is there: the machine stops for it.
    pub(crate) fn attach(&self) {
        self.lock().attached = true;
        self.stop();
    }

    /// gdb is gone, and all that it wanted with it: the guest runs on.
    pub(crate) fn detach(&self) {
        self.stop();
        self.lock().attached = false;
        self.resume(&DebugOrders::default(), |_| Going::Runs);
    }

    /// Lets vCPUs go on, after [`Debugger::stop`]. `orders` hold no step.
    pub(crate) fn resume(&self, orders: &DebugOrders, going: impl Fn(usize) -> Going) {
        let mut state = self.lock();
        state.stopped = false;
        state.orders.clone_from(orders);
        // Breakpoints are met again, and a step that is not asked for again is not wanted any more. Data that was touched stays news.
        state.findings.retain(|(_, finding)| matches!(finding, Finding::Event(DebugEvent::Watchpoint(_))));
        if !state.findings.is_empty() {
            state.stopped = true;
            drop(state);
            return self.notify();
        }
        let Some(machine) = &state.machine else { return };
        for (index, vcpu) in machine.vcpus.iter().enumerate() {
            let step = going(index) == Going::Steps;
            if let Some(debug) = lock_vcpu(vcpu).debug() {
                debug.set_orders(&DebugOrders { step, ..orders.clone() });
            }
        }
        machine.gate.release(|index| going(index) != Going::Stays);
    }

    /// The next news; all vCPUs are stopped when it is a finding.
    pub(crate) fn take_news(&self) -> Option<News> {
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.wake, &mut count);
        let mut state = self.lock();
        if let Some(outcome) = state.end {
            return Some(News::End(outcome));
        }
        let (index, finding) = state.findings.pop_front()?;
        drop(state);
        self.stop();
        Some(News::Found { index, finding })
    }

    /// Whether the run is over.
    pub(crate) fn is_over(&self) -> bool {
        self.lock().end.is_some()
    }

    /// The number of vCPUs.
    pub(crate) fn vcpu_count(&self) -> usize {
        self.lock().vcpu_count
    }

    /// A vCPU and the machine's memory; none between two machines.
    pub(crate) fn vcpu(&self, index: usize) -> Option<(SharedVcpu, GuestMemory)> {
        let state = self.lock();
        let machine = state.machine.as_ref()?;
        Some((machine.vcpus.get(index)?.clone(), machine.memory.clone()))
    }
}
