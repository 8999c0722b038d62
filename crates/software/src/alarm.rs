//! An alarm for a vCPU's thread: at a moment of the time-stamp counter it gets the vCPU's attention.
//!
//! Translated code runs as long as the guest likes without coming back; the local APIC's timer must be noticed all the same. A POSIX
//! timer sends a signal to the thread itself; its handler sets the two flags that [`Inbox::signal`] sets.

use std::cell::Cell;
use std::ptr;
use std::sync::Once;

use crate::apic::Inbox;
use crate::time::{NEVER, ticks_to_ns};

thread_local! {
    /// The inbox of the vCPU that this thread runs, while it runs.
    static INBOX: Cell<*const Inbox> = const { Cell::new(ptr::null()) };
    /// The alarm has rung since it was set. Clocks differ: it may have been early.
    static RUNG: Cell<bool> = const { Cell::new(false) };
}

/// One thread's timer.
///
/// Only the thread that made it sets it.
pub struct Alarm {
    timer: libc::timer_t,
    /// The deadline that the timer is set to.
    deadline: u64,
}

// SAFETY: the id is a number to the kernel, valid in the whole process.
unsafe impl Send for Alarm {}

fn signal_number() -> libc::c_int {
    libc::SIGRTMIN() + 2
}

extern "C" fn ring(_signal: libc::c_int) {
    RUNG.set(true);
    let inbox = INBOX.get();
    if !inbox.is_null() {
        // SAFETY: set while the vCPU runs on this thread and holds the inbox.
        unsafe { (*inbox).attract() };
    }
}

impl Alarm {
    /// An alarm for the calling thread; `None` if the host has none left, in which case the timer is looked at whenever the vCPU comes by.
    pub fn new() -> Option<Alarm> {
        static ONCE: Once = Once::new();
        ONCE.call_once(|| {
            let handler: extern "C" fn(libc::c_int) = ring;
            // SAFETY: an all-zero sigaction is a valid value; the handler touches a thread-local without a destructor and atomics.
            unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = handler as usize;
                action.sa_flags = libc::SA_RESTART | libc::SA_ONSTACK;
                libc::sigaction(signal_number(), &action, ptr::null_mut());
            }
        });
        // SAFETY: an all-zero sigevent is a valid value; the kernel writes the timer's id.
        unsafe {
            let mut event: libc::sigevent = std::mem::zeroed();
            event.sigev_notify = libc::SIGEV_THREAD_ID;
            event.sigev_signo = signal_number();
            event.sigev_notify_thread_id = libc::gettid();
            let mut timer: libc::timer_t = ptr::null_mut();
            let made = libc::timer_create(libc::CLOCK_MONOTONIC, &mut event, &mut timer) == 0;
            made.then_some(Alarm { timer, deadline: NEVER })
        }
    }

    /// Says whose attention the calling thread's alarms get; `None` before the inbox may go.
    pub fn attach(inbox: Option<&Inbox>) {
        INBOX.set(inbox.map_or(ptr::null(), ptr::from_ref));
    }

    /// Sets the alarm to a deadline in ticks of the time-stamp counter. One that has been set stays; a spurious alarm does no harm.
    #[inline]
    pub fn set(&mut self, deadline: u64, now: u64, tsc_khz: u64) {
        if deadline != self.deadline || RUNG.take() {
            self.arm(deadline, now, tsc_khz);
        }
    }

    fn arm(&mut self, deadline: u64, now: u64, tsc_khz: u64) {
        RUNG.set(false);
        self.deadline = deadline;
        if deadline == NEVER || deadline <= now {
            return;
        }
        let ns = ticks_to_ns(deadline - now, tsc_khz).max(1);
        let value = libc::timespec { tv_sec: (ns / 1_000_000_000) as i64, tv_nsec: (ns % 1_000_000_000) as i64 };
        let none = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        let setting = libc::itimerspec { it_interval: none, it_value: value };
        // SAFETY: the timer is this object's own; failing would make the timer late, not wrong.
        unsafe { libc::timer_settime(self.timer, 0, &setting, ptr::null_mut()) };
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        // SAFETY: the timer is this object's own.
        unsafe { libc::timer_delete(self.timer) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::time;

    #[test]
    fn an_alarm_gets_attention_at_its_time() {
        let inbox = Inbox::default();
        Alarm::attach(Some(&inbox));
        let mut alarm = Alarm::new().expect("a timer");
        let (now, khz) = (time::host_tsc(), time::tsc_khz());
        // 20 ms
        alarm.set(now + 20 * khz, now, khz);
        assert!(!inbox.take_attention());
        while time::host_tsc() < now + 2000 * khz && !inbox.take_attention() {
            std::hint::spin_loop();
        }
        assert!((20..2000).contains(&((time::host_tsc() - now) / khz)));
        Alarm::attach(None);
    }
}
