//! Where vCPU threads wait while the machine is paused or a debugger holds them, and where they learn that it is over.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use polder_machine::VcpuHandle;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Running,
    Paused,
    Stopped,
}

struct State {
    phase: Phase,
    /// The vCPUs that a debugger holds, whatever the phase.
    held: Vec<bool>,
    /// Threads that are outside guest code and stay there until the phase changes.
    waiting: usize,
    /// Threads that have not ended.
    threads: usize,
}

/// One for each machine.
pub(crate) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
    vcpus: Vec<Arc<dyn VcpuHandle>>,
}

/// A vCPU thread's place at the gate; dropping it says that the thread has ended.
pub(crate) struct Pass<'a> {
    gate: &'a Gate,
    index: usize,
}

impl Gate {
    /// A gate that is closed until [`Gate::resume`].
    pub(crate) fn new(vcpus: Vec<Arc<dyn VcpuHandle>>) -> Self {
        let state = State { phase: Phase::Paused, held: vec![false; vcpus.len()], waiting: 0, threads: vcpus.len() };
        Gate { state: Mutex::new(state), changed: Condvar::new(), vcpus }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The place of one vCPU thread, taken once by each.
    pub(crate) fn pass(&self, index: usize) -> Pass<'_> {
        Pass { gate: self, index }
    }

    /// Opens the gate. After a stop it stays shut.
    pub(crate) fn resume(&self) {
        let mut state = self.lock();
        if state.phase == Phase::Paused {
            state.phase = Phase::Running;
            self.changed.notify_all();
        }
    }

    /// Closes the gate and waits until no vCPU is in guest code.
    pub(crate) fn pause(&self) {
        self.leave(Phase::Paused);
        let mut state = self.lock();
        while state.phase == Phase::Paused && state.waiting < state.threads {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Ends all vCPU threads soon; join them afterwards.
    pub(crate) fn stop(&self) {
        self.leave(Phase::Stopped);
    }

    /// Holds a vCPU when it comes to the gate next.
    pub(crate) fn hold(&self, index: usize) {
        if let Some(held) = self.lock().held.get_mut(index) {
            *held = true;
        }
    }

    /// Holds all vCPUs and waits until none is in guest code, or the machine is over.
    pub(crate) fn hold_all(&self) {
        self.lock().held.fill(true);
        self.vcpus.iter().for_each(|vcpu| vcpu.stop());
        let mut state = self.lock();
        while state.phase != Phase::Stopped && state.waiting < state.threads {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Lets go of the vCPUs that are wanted; the others stay as they are.
    pub(crate) fn release(&self, wanted: impl Fn(usize) -> bool) {
        let mut state = self.lock();
        for (index, held) in state.held.iter_mut().enumerate() {
            *held &= !wanted(index);
        }
        self.changed.notify_all();
    }

    fn leave(&self, phase: Phase) {
        let mut state = self.lock();
        if state.phase != Phase::Stopped {
            state.phase = phase;
        }
        self.changed.notify_all();
        drop(state);
        self.vcpus.iter().for_each(|vcpu| vcpu.stop());
    }
}

impl Pass<'_> {
    /// Waits until this vCPU runs; false when the machine is over.
    pub(crate) fn enter(&self) -> bool {
        self.wait(|state| match state.phase {
            Phase::Running => !state.held[self.index],
            Phase::Paused => false,
            Phase::Stopped => true,
        }) == Phase::Running
    }

    /// Waits until the machine is over: this vCPU has nothing left to run.
    pub(crate) fn wait_for_end(&self) {
        self.wait(|state| state.phase == Phase::Stopped);
    }

    fn wait(&self, until: impl Fn(&State) -> bool) -> Phase {
        let mut state = self.gate.lock();
        state.waiting += 1;
        self.gate.changed.notify_all();
        while !until(&state) {
            state = self.gate.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.waiting -= 1;
        state.phase
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        self.gate.lock().threads -= 1;
        self.gate.changed.notify_all();
    }
}
