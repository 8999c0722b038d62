//! Where a vCPU's time goes.
//!
//! The thread says what it turns to; the time-stamp counter is read at each turn. Off, a turn costs one test.

use crate::time::{host_tsc, ticks_to_ns};

/// What a vCPU's thread does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum Activity {
    /// The rest: delivery of interrupts and exceptions, looks for code and for attention.
    Engine,
    /// Runs instructions one by one.
    Interpreter,
    /// Makes host code.
    Translator,
    /// Runs it, with what it calls and finding the next of it.
    Translated,
    /// Accesses to ports and registers of devices.
    Devices,
    /// Waits in the host.
    Asleep,
}

const ACTIVITIES: usize = Activity::Asleep as usize + 1;

/// One vCPU's stopwatch.
#[derive(Debug, Clone, Copy)]
pub struct Stopwatch {
    is_on: bool,
    now: Activity,
    since: u64,
    ticks: [u64; ACTIVITIES],
}

impl Default for Stopwatch {
    fn default() -> Self {
        Stopwatch { is_on: false, now: Activity::Engine, since: 0, ticks: [0; ACTIVITIES] }
    }
}

impl Stopwatch {
    /// Starts from zero.
    pub fn start(&mut self) {
        *self = Stopwatch { is_on: true, since: host_tsc(), ..Stopwatch::default() };
    }

    pub fn is_on(&self) -> bool {
        self.is_on
    }

    /// The thread turns to something; gives what it did before.
    #[inline(always)]
    pub fn turn_to(&mut self, activity: Activity) -> Activity {
        if self.is_on { self.turn(activity) } else { Activity::Engine }
    }

    #[inline(never)]
    fn turn(&mut self, activity: Activity) -> Activity {
        let now = host_tsc();
        self.ticks[self.now as usize] += now.wrapping_sub(self.since);
        self.since = now;
        std::mem::replace(&mut self.now, activity)
    }

    /// What ran by while the vCPU was stopped is not counted.
    pub fn skip(&mut self) {
        self.since = host_tsc();
    }

    /// Nanoseconds of an activity so far.
    pub fn ns(&self, activity: Activity, tsc_khz: u64) -> u64 {
        ticks_to_ns(self.ticks[activity as usize], tsc_khz)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_goes_to_what_the_thread_turned_to() {
        let mut watch = Stopwatch::default();
        assert_eq!(watch.turn_to(Activity::Devices), Activity::Engine);
        assert_eq!(watch.ns(Activity::Devices, 1_000_000), 0);
        watch.start();
        assert_eq!(watch.turn_to(Activity::Interpreter), Activity::Engine);
        let start = host_tsc();
        while host_tsc() < start + 1_000_000 {}
        assert_eq!(watch.turn_to(Activity::Devices), Activity::Interpreter);
        assert!(watch.ns(Activity::Interpreter, 1_000_000) >= 1_000_000);
        assert_eq!(watch.ns(Activity::Devices, 1_000_000), 0);
    }
}
