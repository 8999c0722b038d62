//! The machine as `gdbstub` wants it.

use std::convert::Infallible;
use std::sync::Arc;

use gdbstub::common::{Signal, Tid};
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::multithread::{
    MultiThreadBase, MultiThreadResume, MultiThreadResumeOps, MultiThreadSchedulerLocking,
    MultiThreadSchedulerLockingOps, MultiThreadSingleStep, MultiThreadSingleStepOps,
};
use gdbstub::target::ext::base::single_register_access::{SingleRegisterAccess, SingleRegisterAccessOps};
use gdbstub::target::ext::breakpoints::{
    Breakpoints, BreakpointsOps, HwBreakpoint, HwBreakpointOps, HwWatchpoint, HwWatchpointOps, SwBreakpoint,
    SwBreakpointOps, WatchKind,
};
use gdbstub::target::ext::thread_extra_info::{ThreadExtraInfo, ThreadExtraInfoOps};
use gdbstub::target::{Target, TargetError, TargetResult};
use polder_machine::debug::{pages, translate};
use polder_machine::state::RunState;
use polder_machine::{DebugOrders, WatchedAccess, Watchpoint};
use polder_memory::{GuestAddress, GuestMemory};

use super::debugger::{Debugger, Going, SharedVcpu, lock_vcpu};
use super::registers::{GuestRegisters, RegisterNumber, X86_64};

/// Breakpoints that gdb may set, and watchpoints.
const BREAKPOINTS_MAX: usize = 4096;
const WATCHPOINTS_MAX: usize = 64;
/// EFAULT: nothing is mapped there.
const NOT_MAPPED: u8 = 14;

/// What one gdb wants of the machine.
pub(super) struct GuestTarget {
    debugger: Arc<Debugger>,
    software: Vec<u64>,
    hardware: Vec<u64>,
    watchpoints: Vec<Watchpoint>,
    /// What gdb said of each vCPU.
    going: Vec<Option<Going>>,
    /// What becomes of those that it did not mention.
    others: Going,
}

/// The thread of a vCPU.
pub(super) fn thread_of(index: usize) -> Tid {
    Tid::MIN.saturating_add(index)
}

impl GuestTarget {
    pub(super) fn new(debugger: Arc<Debugger>) -> Self {
        let going = vec![None; debugger.vcpu_count()];
        GuestTarget {
            debugger,
            software: Vec::new(),
            hardware: Vec::new(),
            watchpoints: Vec::new(),
            going,
            others: Going::Runs,
        }
    }

    /// Whether a breakpoint there was set as one of hardware.
    pub(super) fn is_hardware(&self, address: u64) -> bool {
        self.hardware.contains(&address) && !self.software.contains(&address)
    }

    fn vcpu(&self, thread: Tid) -> TargetResult<(SharedVcpu, GuestMemory), Self> {
        self.debugger.vcpu(thread.get() - 1).ok_or(TargetError::NonFatal)
    }

    fn registers(&self, thread: Tid) -> TargetResult<GuestRegisters, Self> {
        let (vcpu, _) = self.vcpu(thread)?;
        let mut vcpu = lock_vcpu(&vcpu);
        let vector = vcpu.debug().ok_or(TargetError::NonFatal)?.vector_registers();
        Ok(GuestRegisters { state: vcpu.state(), vector })
    }

    fn set_registers(&self, thread: Tid, registers: &GuestRegisters) -> TargetResult<(), Self> {
        let (vcpu, _) = self.vcpu(thread)?;
        let mut vcpu = lock_vcpu(&vcpu);
        vcpu.debug().ok_or(TargetError::NonFatal)?.set_registers(&registers.state, &registers.vector);
        Ok(())
    }

    fn set_going(&mut self, thread: Tid, going: Going) {
        if let Some(entry) = self.going.get_mut(thread.get() - 1) {
            *entry = Some(going);
        }
    }
}

fn add(list: &mut Vec<u64>, address: u64) -> bool {
    let has_room = list.len() < BREAKPOINTS_MAX;
    if has_room && !list.contains(&address) {
        list.push(address);
    }
    has_room
}

fn remove(list: &mut Vec<u64>, address: u64) -> bool {
    let before = list.len();
    list.retain(|&known| known != address);
    list.len() != before
}

fn watchpoint(address: u64, len: u64, kind: WatchKind) -> Watchpoint {
    let access = match kind {
        WatchKind::Read => WatchedAccess::Read,
        WatchKind::Write => WatchedAccess::Write,
        WatchKind::ReadWrite => WatchedAccess::ReadOrWrite,
    };
    Watchpoint { address, len, access }
}

impl Target for GuestTarget {
    type Arch = X86_64;
    type Error = Infallible;

    fn base_ops(&mut self) -> BaseOps<'_, X86_64, Infallible> {
        BaseOps::MultiThread(self)
    }

    fn support_breakpoints(&mut self) -> Option<BreakpointsOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadBase for GuestTarget {
    fn read_registers(&mut self, registers: &mut GuestRegisters, thread: Tid) -> TargetResult<(), Self> {
        *registers = self.registers(thread)?;
        Ok(())
    }

    fn write_registers(&mut self, registers: &GuestRegisters, thread: Tid) -> TargetResult<(), Self> {
        self.set_registers(thread, registers)
    }

    fn support_single_register_access(&mut self) -> Option<SingleRegisterAccessOps<'_, Tid, Self>> {
        Some(self)
    }

    fn read_addrs(&mut self, start: u64, data: &mut [u8], thread: Tid) -> TargetResult<usize, Self> {
        let (vcpu, memory) = self.vcpu(thread)?;
        let state = lock_vcpu(&vcpu).state();
        let mut done = 0;
        for (at, len) in pages(start, data.len()) {
            let physical = translate(&memory, &state, start.wrapping_add(at as u64));
            // Memory-mapped registers are left alone: reading some changes them.
            match physical.map(|physical| memory.read(GuestAddress(physical), &mut data[at..at + len])) {
                Some(Ok(())) => done = at + len,
                _ => break,
            }
        }
        if done == 0 && !data.is_empty() { Err(TargetError::Errno(NOT_MAPPED)) } else { Ok(done) }
    }

    fn write_addrs(&mut self, start: u64, data: &[u8], thread: Tid) -> TargetResult<(), Self> {
        let (vcpu, memory) = self.vcpu(thread)?;
        let state = lock_vcpu(&vcpu).state();
        for (at, len) in pages(start, data.len()) {
            let physical = translate(&memory, &state, start.wrapping_add(at as u64));
            match physical.map(|physical| memory.write(GuestAddress(physical), &data[at..at + len])) {
                Some(Ok(())) => {}
                _ => return Err(TargetError::Errno(NOT_MAPPED)),
            }
        }
        Ok(())
    }

    fn list_active_threads(&mut self, is_active: &mut dyn FnMut(Tid)) -> Result<(), Infallible> {
        (0..self.going.len()).for_each(|index| is_active(thread_of(index)));
        Ok(())
    }

    fn support_resume(&mut self) -> Option<MultiThreadResumeOps<'_, Self>> {
        Some(self)
    }

    fn support_thread_extra_info(&mut self) -> Option<ThreadExtraInfoOps<'_, Self>> {
        Some(self)
    }
}

impl SingleRegisterAccess<Tid> for GuestTarget {
    fn read_register(&mut self, thread: Tid, number: RegisterNumber, buffer: &mut [u8]) -> TargetResult<usize, Self> {
        let (bytes, len) = self.registers(thread)?.get(number);
        buffer.get_mut(..len).ok_or(TargetError::NonFatal)?.copy_from_slice(&bytes[..len]);
        Ok(len)
    }

    fn write_register(&mut self, thread: Tid, number: RegisterNumber, value: &[u8]) -> TargetResult<(), Self> {
        let mut registers = self.registers(thread)?;
        if !registers.set(number, value) {
            return Err(TargetError::NonFatal);
        }
        self.set_registers(thread, &registers)
    }
}

impl ThreadExtraInfo for GuestTarget {
    fn thread_extra_info(&self, thread: Tid, buffer: &mut [u8]) -> Result<usize, Infallible> {
        let doing = match self.vcpu(thread).map(|(vcpu, _)| lock_vcpu(&vcpu).state().run_state) {
            Ok(RunState::Runnable) => "runs",
            Ok(RunState::Halted) => "halted",
            Ok(RunState::WaitForSipi) => "waits for its start",
            Err(_) => "gone",
        };
        let text = format!("vCPU {}, {doing}", thread.get() - 1);
        let len = text.len().min(buffer.len());
        buffer[..len].copy_from_slice(&text.as_bytes()[..len]);
        Ok(len)
    }
}

impl MultiThreadResume for GuestTarget {
    fn resume(&mut self) -> Result<(), Infallible> {
        let mut orders = DebugOrders { watchpoints: self.watchpoints.clone(), ..DebugOrders::default() };
        orders.breakpoints.extend(self.software.iter().chain(&self.hardware));
        self.debugger.resume(&orders, |index| self.going.get(index).copied().flatten().unwrap_or(self.others));
        Ok(())
    }

    fn clear_resume_actions(&mut self) -> Result<(), Infallible> {
        self.going.fill(None);
        self.others = Going::Runs;
        Ok(())
    }

    fn set_resume_action_continue(&mut self, thread: Tid, _signal: Option<Signal>) -> Result<(), Infallible> {
        self.set_going(thread, Going::Runs);
        Ok(())
    }

    fn support_single_step(&mut self) -> Option<MultiThreadSingleStepOps<'_, Self>> {
        Some(self)
    }

    fn support_scheduler_locking(&mut self) -> Option<MultiThreadSchedulerLockingOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadSingleStep for GuestTarget {
    fn set_resume_action_step(&mut self, thread: Tid, _signal: Option<Signal>) -> Result<(), Infallible> {
        self.set_going(thread, Going::Steps);
        Ok(())
    }
}

impl MultiThreadSchedulerLocking for GuestTarget {
    fn set_resume_action_scheduler_lock(&mut self) -> Result<(), Infallible> {
        self.others = Going::Stays;
        Ok(())
    }
}

impl Breakpoints for GuestTarget {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_breakpoint(&mut self) -> Option<HwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_watchpoint(&mut self) -> Option<HwWatchpointOps<'_, Self>> {
        Some(self)
    }
}

impl SwBreakpoint for GuestTarget {
    fn add_sw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        Ok(add(&mut self.software, address))
    }

    fn remove_sw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        Ok(remove(&mut self.software, address))
    }
}

impl HwBreakpoint for GuestTarget {
    fn add_hw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        Ok(add(&mut self.hardware, address))
    }

    fn remove_hw_breakpoint(&mut self, address: u64, _kind: usize) -> TargetResult<bool, Self> {
        Ok(remove(&mut self.hardware, address))
    }
}

impl HwWatchpoint for GuestTarget {
    fn add_hw_watchpoint(&mut self, address: u64, len: u64, kind: WatchKind) -> TargetResult<bool, Self> {
        let point = watchpoint(address, len, kind);
        let fits = len > 0 && self.watchpoints.len() < WATCHPOINTS_MAX;
        if fits && !self.watchpoints.contains(&point) {
            self.watchpoints.push(point);
        }
        Ok(fits)
    }

    fn remove_hw_watchpoint(&mut self, address: u64, len: u64, kind: WatchKind) -> TargetResult<bool, Self> {
        let point = watchpoint(address, len, kind);
        let before = self.watchpoints.len();
        self.watchpoints.retain(|known| *known != point);
        Ok(self.watchpoints.len() != before)
    }
}
