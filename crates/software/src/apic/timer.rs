//! The local APIC's timer: one-shot, periodic and TSC-deadline (SDM vol. 3, 11.5.4). All times are host TSC ticks.

use crate::cpu_model::APIC_TIMER_HZ;
use crate::time::NEVER;

/// Mode bits 17-18 of the timer's LVT entry.
const MODE_ONE_SHOT: u32 = 0;
const MODE_PERIODIC: u32 = 1;
const MODE_TSC_DEADLINE: u32 = 2;

/// The timer's registers.
#[derive(Debug)]
pub struct Timer {
    tsc_khz: u64,
    mode: u32,
    initial: u32,
    divide: u32,
    /// When it fires next; [`NEVER`] while it is not armed.
    deadline: u64,
    /// IA32_TSC_DEADLINE as the guest wrote it; zero when not armed.
    tsc_deadline: u64,
}

impl Timer {
    /// A timer that is not armed.
    pub fn new(tsc_khz: u64) -> Self {
        Timer { tsc_khz, mode: MODE_ONE_SHOT, initial: 0, divide: 0, deadline: NEVER, tsc_deadline: 0 }
    }

    /// Power-on.
    pub fn reset(&mut self) {
        *self = Timer::new(self.tsc_khz);
    }

    /// Frequency of the TSC.
    pub fn tsc_khz(&self) -> u64 {
        self.tsc_khz
    }

    /// When the timer fires next, or [`NEVER`].
    #[inline(always)]
    pub fn deadline(&self) -> u64 {
        self.deadline
    }

    /// Initial count register.
    pub fn initial(&self) -> u32 {
        self.initial
    }

    /// Divide configuration register.
    pub fn divide(&self) -> u32 {
        self.divide
    }

    /// What the input clock is divided by.
    fn divisor(&self) -> u64 {
        let bits = self.divide & 3 | self.divide >> 1 & 4;
        1 << ((bits + 1) & 7)
    }

    fn ticks(&self, count: u32) -> u64 {
        let ticks = u128::from(count) * u128::from(self.divisor()) * u128::from(self.tsc_khz * 1000);
        // At least one, so that a period never is zero.
        (ticks / u128::from(APIC_TIMER_HZ)).max(1) as u64
    }

    /// Current count register.
    pub fn current(&self, now: u64) -> u32 {
        if self.mode == MODE_TSC_DEADLINE || self.deadline == NEVER {
            return 0;
        }
        let left = u128::from(self.deadline.saturating_sub(now)) * u128::from(APIC_TIMER_HZ);
        let count = left.div_ceil(u128::from(self.tsc_khz * 1000) * u128::from(self.divisor()));
        u32::try_from(count).unwrap_or(u32::MAX).min(self.initial)
    }

    /// Writes the initial count: starts the timer anew; zero stops it. Ignored in TSC-deadline mode.
    pub fn set_initial(&mut self, count: u32, now: u64) {
        if self.mode == MODE_TSC_DEADLINE {
            return;
        }
        self.initial = count;
        self.deadline = if count == 0 { NEVER } else { now.saturating_add(self.ticks(count)) };
    }

    /// Writes the divide configuration: the count that is left goes on at the new pace.
    pub fn set_divide(&mut self, divide: u32, now: u64) {
        let left = self.current(now);
        self.divide = divide;
        if self.mode != MODE_TSC_DEADLINE && self.deadline != NEVER {
            self.deadline = now.saturating_add(self.ticks(left));
        }
    }

    /// Sets the mode; a change to or from TSC-deadline mode disarms the timer.
    pub fn set_mode(&mut self, mode: u32) {
        if mode != self.mode && (mode == MODE_TSC_DEADLINE || self.mode == MODE_TSC_DEADLINE) {
            self.deadline = NEVER;
            self.tsc_deadline = 0;
            self.initial = 0;
        }
        self.mode = mode;
    }

    /// IA32_TSC_DEADLINE.
    pub fn tsc_deadline(&self) -> u64 {
        self.tsc_deadline
    }

    /// Writes IA32_TSC_DEADLINE, a guest TSC value; ignored in the other modes. `tsc_offset` is what the guest's TSC is ahead of the host's.
    pub fn set_tsc_deadline(&mut self, deadline: u64, tsc_offset: u64, now: u64) {
        if self.mode != MODE_TSC_DEADLINE {
            return;
        }
        self.tsc_deadline = deadline;
        self.deadline = if deadline == 0 {
            NEVER
        } else {
            // In guest time, so that a deadline before the host's zero is not taken for the far future.
            let guest_now = now.wrapping_add(tsc_offset);
            now.saturating_add(deadline.saturating_sub(guest_now)).min(NEVER - 1)
        };
    }

    /// The guest's TSC was set: a TSC deadline keeps its guest value.
    pub fn tsc_changed(&mut self, tsc_offset: u64, now: u64) {
        if self.tsc_deadline != 0 {
            self.set_tsc_deadline(self.tsc_deadline, tsc_offset, now);
        }
    }

    /// Whether the timer fires now; arms the next period.
    pub fn expire(&mut self, now: u64) -> bool {
        if now < self.deadline {
            return false;
        }
        if self.mode == MODE_PERIODIC && self.initial != 0 {
            let period = self.ticks(self.initial);
            let missed = (now - self.deadline) / period;
            self.deadline = self.deadline.saturating_add((missed + 1).saturating_mul(period));
        } else {
            self.deadline = NEVER;
            self.tsc_deadline = 0;
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 2.5 GHz: 100 TSC ticks an APIC tick.
    const KHZ: u64 = 2_500_000;

    fn timer(mode: u32, divide: u32) -> Timer {
        let mut timer = Timer::new(KHZ);
        timer.set_mode(mode);
        timer.set_divide(divide, 0);
        timer
    }

    #[test]
    fn a_one_shot_fires_once_when_its_count_is_used_up() {
        let mut timer = timer(MODE_ONE_SHOT, 0b1011);
        timer.set_initial(10, 5000);
        assert_eq!(timer.deadline(), 6000);
        assert_eq!(
            (timer.current(5000), timer.current(5001), timer.current(5900), timer.current(6000)),
            (10, 10, 1, 0)
        );
        assert!(!timer.expire(5999));
        assert!(timer.expire(6000));
        assert!(!timer.expire(u64::MAX - 1));
        assert_eq!((timer.initial(), timer.current(6000)), (10, 0));
    }

    #[test]
    fn the_divider_is_the_manuals() {
        for (divide, divisor) in [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (10, 128), (11, 1)] {
            assert_eq!(timer(MODE_ONE_SHOT, divide).divisor(), divisor, "{divide}");
        }
    }

    #[test]
    fn a_periodic_timer_skips_what_it_missed_and_keeps_its_phase() {
        let mut timer = timer(MODE_PERIODIC, 0b1011);
        timer.set_initial(10, 0);
        assert!(timer.expire(1000));
        assert_eq!(timer.deadline(), 2000);
        assert!(timer.expire(5300));
        assert_eq!((timer.deadline(), timer.current(5300)), (6000, 7));
        timer.set_initial(0, 5300);
        assert_eq!(timer.deadline(), NEVER);
    }

    #[test]
    fn a_tsc_deadline_is_in_guest_time_and_fires_once() {
        let mut timer = timer(MODE_TSC_DEADLINE, 0);
        timer.set_initial(10, 0);
        assert_eq!(timer.deadline(), NEVER);
        // The guest's TSC is 1000 behind the host's.
        let offset = 0u64.wrapping_sub(1000);
        timer.set_tsc_deadline(500, offset, 1200);
        assert_eq!((timer.deadline(), timer.tsc_deadline()), (1500, 500));
        timer.tsc_changed(offset.wrapping_add(100), 1200);
        assert_eq!(timer.deadline(), 1400);
        assert!(timer.expire(1400));
        assert_eq!((timer.deadline(), timer.tsc_deadline()), (NEVER, 0));
        timer.set_tsc_deadline(1, offset, 5000);
        assert!(timer.expire(5000));
    }

    #[test]
    fn leaving_tsc_deadline_mode_disarms() {
        let mut timer = timer(MODE_TSC_DEADLINE, 0);
        timer.set_tsc_deadline(500, 0, 0);
        timer.set_mode(MODE_ONE_SHOT);
        assert_eq!((timer.deadline(), timer.tsc_deadline()), (NEVER, 0));
        timer.set_tsc_deadline(500, 0, 0);
        assert_eq!(timer.deadline(), NEVER);
    }

    #[test]
    fn switching_between_one_shot_and_periodic_keeps_counting() {
        let mut timer = timer(MODE_ONE_SHOT, 0b1011);
        timer.set_initial(10, 0);
        timer.set_mode(MODE_PERIODIC);
        assert!(timer.expire(1000));
        assert_eq!(timer.deadline(), 2000);
    }
}
