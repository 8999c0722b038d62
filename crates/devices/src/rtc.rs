//! A real-time clock and CMOS memory: Motorola's MC146818A at ports 0x70 (index) and 0x71 (data).
//!
//! The time is the injected clock's wall time plus what the guest set. Flags (update ended, alarm, periodic) are worked out when
//! somebody looks, so an idle guest costs nothing; only while the guest has an interrupt enabled does a thread wait for the next
//! flag ([`Rtc::start_timer`]). The interrupt line is high exactly while an enabled flag is set (data sheet, "Interrupts").

mod calendar;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use polder_basics::{Clock, KIB, MIB};
use polder_machine::layout::LOW_RAM_END;
use polder_machine::{AccessSize, BusDevice, InterruptLine};

use crate::byte_registers;
use calendar::CalendarTime;

/// Ports of the device: index and data.
pub const CMOS_PORTS: u64 = 2;

const CMOS_LEN: usize = 128;
const NS_PER_S: u64 = 1_000_000_000;
/// An update begins this long after the update-in-progress bit is set (data sheet, table 6).
const UPDATE_IN_PROGRESS_NS: u64 = 244_000;

const SECONDS: u8 = 0x00;
const SECONDS_ALARM: u8 = 0x01;
const MINUTES: u8 = 0x02;
const MINUTES_ALARM: u8 = 0x03;
const HOURS: u8 = 0x04;
const HOURS_ALARM: u8 = 0x05;
const WEEKDAY: u8 = 0x06;
const DAY: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const REGISTER_A: u8 = 0x0a;
const REGISTER_B: u8 = 0x0b;
const REGISTER_C: u8 = 0x0c;
const REGISTER_D: u8 = 0x0d;
const CENTURY: u8 = 0x32;

const BASE_MEMORY_KIB: u8 = 0x15;
const EXTENDED_MEMORY_KIB: u8 = 0x17;
const EXTENDED_MEMORY_KIB_COPY: u8 = 0x30;
const MEMORY_ABOVE_16M: u8 = 0x34;
const MEMORY_ABOVE_4G: u8 = 0x5b;

const A_UPDATE_IN_PROGRESS: u8 = 1 << 7;
const A_POWER_ON: u8 = 0x26;

const B_DAYLIGHT_SAVING: u8 = 1 << 0;
const B_24_HOURS: u8 = 1 << 1;
const B_BINARY: u8 = 1 << 2;
const B_UPDATE_INTERRUPT: u8 = 1 << 4;
const B_ALARM_INTERRUPT: u8 = 1 << 5;
const B_PERIODIC_INTERRUPT: u8 = 1 << 6;
const B_SET: u8 = 1 << 7;
const B_INTERRUPTS: u8 = B_UPDATE_INTERRUPT | B_ALARM_INTERRUPT | B_PERIODIC_INTERRUPT;

/// Flags in register C; an interrupt is enabled by the bit of the same number in register B.
const C_UPDATE: u8 = B_UPDATE_INTERRUPT;
const C_ALARM: u8 = B_ALARM_INTERRUPT;
const C_PERIODIC: u8 = B_PERIODIC_INTERRUPT;
const C_INTERRUPT: u8 = 1 << 7;

const D_VALID: u8 = 1 << 7;

/// Hours' bit for the afternoon in 12-hour mode.
const HOURS_PM: u8 = 0x80;
/// An alarm byte with both top bits set matches every value.
const ALARM_ANY: u8 = 0xc0;

/// The clock and its memory.
pub struct Rtc {
    inner: Arc<Inner>,
}

/// Shared with the timer thread.
struct Inner {
    clock: Arc<dyn Clock>,
    line: Arc<dyn InterruptLine>,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    index: u8,
    /// Alarm bytes, register B, and every byte that the clock does not own.
    cmos: [u8; CMOS_LEN],
    register_a: u8,
    register_b: u8,
    flags: u8,
    /// Guest's time minus the host's wall time.
    offset_s: i64,
    /// The time as the guest sees it while it sets it (SET in register B).
    frozen: Option<CalendarTime>,
    /// Guest time, in nanoseconds, up to which the flags are worked out.
    seen_ns: u64,
    closed: bool,
}

impl Rtc {
    /// A clock that shows the wall time in UTC, with the machine's memory size in the usual bytes.
    pub fn new(clock: Arc<dyn Clock>, line: Arc<dyn InterruptLine>, ram_bytes: u64) -> Self {
        let mut cmos = [0; CMOS_LEN];
        let mut set = |index: u8, len: usize, value: u64| {
            cmos[usize::from(index)..][..len].copy_from_slice(&value.to_le_bytes()[..len]);
        };
        let low = ram_bytes.min(LOW_RAM_END);
        let high = ram_bytes - low;
        let extended_kib = (low.saturating_sub(MIB) / KIB).min(63 * KIB);
        set(BASE_MEMORY_KIB, 2, 640);
        set(EXTENDED_MEMORY_KIB, 2, extended_kib);
        set(EXTENDED_MEMORY_KIB_COPY, 2, extended_kib);
        set(MEMORY_ABOVE_16M, 2, low.saturating_sub(16 * MIB) / (64 * KIB));
        set(MEMORY_ABOVE_4G, 3, high / (64 * KIB));
        let seen_ns = clock.wall_ns();
        let state = State {
            index: 0,
            cmos,
            register_a: A_POWER_ON,
            register_b: B_24_HOURS,
            flags: 0,
            offset_s: 0,
            frozen: None,
            seen_ns,
            closed: false,
        };
        Rtc { inner: Arc::new(Inner { clock, line, state: Mutex::new(state), changed: Condvar::new() }) }
    }

    /// Works out the flags up to now and moves the line. The timer thread does so in time; anybody may.
    pub fn tick(&self) {
        let mut state = self.inner.lock();
        self.inner.tick(&mut state);
    }

    /// Nanoseconds until an enabled interrupt is due, `None` if none is.
    pub fn next_interrupt_ns(&self) -> Option<u64> {
        self.inner.lock().next_interrupt_ns(self.inner.clock.wall_ns())
    }

    /// Starts the thread that raises interrupts in time. It ends when the clock is dropped.
    pub fn start_timer(&self) -> std::io::Result<()> {
        let inner = self.inner.clone();
        std::thread::Builder::new().name("rtc".to_owned()).spawn(move || inner.run_timer())?;
        Ok(())
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tick(&self, state: &mut State) {
        state.catch_up(self.clock.wall_ns());
        self.line.set(state.interrupt());
    }

    fn run_timer(&self) {
        let mut state = self.lock();
        while !state.closed {
            self.tick(&mut state);
            state = match state.next_interrupt_ns(self.clock.wall_ns()) {
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
                Some(wait_ns) => {
                    let result = self.changed.wait_timeout(state, Duration::from_nanos(wait_ns));
                    result.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    fn read_byte(&self, offset: u64) -> u8 {
        let mut state = self.lock();
        if offset != 1 {
            // The index register is write-only; the chipset drives nothing.
            return 0xff;
        }
        let now_ns = self.clock.wall_ns();
        let value = state.read(now_ns);
        self.line.set(state.interrupt());
        let armed = state.index == REGISTER_C;
        drop(state);
        if armed {
            // The flags are clear now: the timer thread waits for the next ones.
            self.changed.notify_all();
        }
        value
    }

    fn write_byte(&self, offset: u64, value: u8) {
        let mut state = self.lock();
        match offset {
            // Bit 7 of the index port masks NMI, which nothing raises through it.
            0 => state.index = value & 0x7f,
            1 => {
                state.write(value, self.clock.wall_ns());
                self.line.set(state.interrupt());
                drop(state);
                self.changed.notify_all();
            }
            _ => {}
        }
    }
}

impl Drop for Rtc {
    fn drop(&mut self) {
        self.inner.lock().closed = true;
        self.inner.changed.notify_all();
    }
}

impl State {
    fn guest_ns(&self, wall_ns: u64) -> u64 {
        wall_ns.saturating_add_signed(self.offset_s.saturating_mul(NS_PER_S as i64))
    }

    fn read(&mut self, wall_ns: u64) -> u8 {
        let now_ns = self.guest_ns(wall_ns);
        let time = self.frozen.unwrap_or_else(|| CalendarTime::from_unix_s(now_ns / NS_PER_S));
        match self.index {
            SECONDS => self.encode(time.second),
            MINUTES => self.encode(time.minute),
            HOURS => self.encode_hour(time.hour),
            WEEKDAY => self.encode(time.weekday),
            DAY => self.encode(time.day),
            MONTH => self.encode(time.month),
            YEAR => self.encode((time.year % 100) as u8),
            CENTURY => self.encode((time.year / 100 % 100) as u8),
            REGISTER_A => {
                let updating = self.frozen.is_none() && NS_PER_S - now_ns % NS_PER_S <= UPDATE_IN_PROGRESS_NS;
                self.register_a | if updating { A_UPDATE_IN_PROGRESS } else { 0 }
            }
            REGISTER_B => self.register_b,
            REGISTER_C => {
                self.catch_up(wall_ns);
                let interrupt = if self.interrupt() { C_INTERRUPT } else { 0 };
                std::mem::take(&mut self.flags) | interrupt
            }
            REGISTER_D => D_VALID,
            index => self.cmos[usize::from(index & 0x7f)],
        }
    }

    fn write(&mut self, value: u8, wall_ns: u64) {
        self.catch_up(wall_ns);
        match self.index {
            SECONDS | MINUTES | HOURS | WEEKDAY | DAY | MONTH | YEAR | CENTURY => self.set_time(value, wall_ns),
            REGISTER_A => self.register_a = value & !A_UPDATE_IN_PROGRESS,
            REGISTER_B => self.set_register_b(value, wall_ns),
            REGISTER_C | REGISTER_D => {}
            index => self.cmos[usize::from(index & 0x7f)] = value,
        }
    }

    fn set_register_b(&mut self, value: u8, wall_ns: u64) {
        // SET clears the update interrupt's enable (data sheet, "Register B").
        let value = if value & B_SET != 0 { value & !B_UPDATE_INTERRUPT } else { value };
        let (was_set, is_set) = (self.register_b & B_SET != 0, value & B_SET != 0);
        if !was_set && is_set {
            self.frozen = Some(CalendarTime::from_unix_s(self.guest_ns(wall_ns) / NS_PER_S));
        } else if was_set
            && !is_set
            && let Some(time) = self.frozen.take()
        {
            self.apply(time, wall_ns);
        }
        self.register_b = value & !B_DAYLIGHT_SAVING;
    }

    fn set_time(&mut self, value: u8, wall_ns: u64) {
        let guest_s = self.guest_ns(wall_ns) / NS_PER_S;
        let mut time = self.frozen.unwrap_or_else(|| CalendarTime::from_unix_s(guest_s));
        let number = self.decode(value);
        match self.index {
            SECONDS => time.second = number,
            MINUTES => time.minute = number,
            HOURS => time.hour = self.decode_hour(value),
            WEEKDAY => time.weekday = number,
            DAY => time.day = number,
            MONTH => time.month = number,
            YEAR => time.year = time.year / 100 * 100 + u16::from(number % 100),
            _ => time.year = u16::from(number % 100) * 100 + time.year % 100,
        }
        if self.frozen.is_some() {
            self.frozen = Some(time);
        } else {
            self.apply(time, wall_ns);
        }
    }

    fn apply(&mut self, time: CalendarTime, wall_ns: u64) {
        self.offset_s = time.to_unix_s() as i64 - (wall_ns / NS_PER_S) as i64;
        self.seen_ns = self.guest_ns(wall_ns);
    }

    fn encode(&self, value: u8) -> u8 {
        if self.register_b & B_BINARY != 0 { value } else { ((value / 10 % 10) << 4) | (value % 10) }
    }

    fn decode(&self, value: u8) -> u8 {
        if self.register_b & B_BINARY != 0 { value } else { (value >> 4) * 10 + (value & 0x0f) }
    }

    fn encode_hour(&self, hour: u8) -> u8 {
        if self.register_b & B_24_HOURS != 0 {
            return self.encode(hour);
        }
        let twelve = if hour.is_multiple_of(12) { 12 } else { hour % 12 };
        self.encode(twelve) | if hour >= 12 { HOURS_PM } else { 0 }
    }

    fn decode_hour(&self, value: u8) -> u8 {
        if self.register_b & B_24_HOURS != 0 {
            return self.decode(value);
        }
        let afternoon = if value & HOURS_PM != 0 { 12 } else { 0 };
        self.decode(value & !HOURS_PM) % 12 + afternoon
    }

    /// Nanoseconds between periodic flags (data sheet, table 5, with a 32.768 kHz time base).
    fn period_ns(&self) -> Option<u64> {
        match self.register_a & 0x0f {
            0 => None,
            // Rates 1 and 2 are those of 8 and 9 on this time base.
            rate @ 1..=2 => Some(NS_PER_S * (1 << (rate + 6)) / 32768),
            rate => Some(NS_PER_S * (1 << (rate - 1)) / 32768),
        }
    }

    /// The first second after `after_s` in which the alarm matches.
    fn next_alarm_s(&self, after_s: u64) -> Option<u64> {
        let byte = |index: u8| self.cmos[usize::from(index)];
        let matches = |alarm: u8, decoded: u8, value: u8| alarm & ALARM_ANY == ALARM_ANY || decoded == value;
        let (hour, minute, second) = (byte(HOURS_ALARM), byte(MINUTES_ALARM), byte(SECONDS_ALARM));
        let (hour_number, minute_number, second_number) =
            (self.decode_hour(hour), self.decode(minute), self.decode(second));
        let seconds = |from: u8| (from..60).find(|value| matches(second, second_number, *value));
        let minutes = |from: u8, value: u8| value >= from && matches(minute, minute_number, value);
        let start = after_s + 1;
        let now = CalendarTime::from_unix_s(start);
        let midnight = start - start % 86_400;
        for day_hour in u64::from(now.hour)..48 {
            if !matches(hour, hour_number, (day_hour % 24) as u8) {
                continue;
            }
            let this_hour = day_hour == u64::from(now.hour);
            for value in (0..60).filter(|value| minutes(if this_hour { now.minute } else { 0 }, *value)) {
                let from = if this_hour && value == now.minute { now.second } else { 0 };
                if let Some(second) = seconds(from) {
                    return Some(midnight + day_hour * 3600 + u64::from(value) * 60 + u64::from(second));
                }
            }
        }
        None
    }

    /// Sets the flags of everything that happened since the last look.
    fn catch_up(&mut self, wall_ns: u64) {
        let now_ns = self.guest_ns(wall_ns);
        let seen_ns = std::mem::replace(&mut self.seen_ns, now_ns);
        if now_ns <= seen_ns {
            // The host's wall clock was set back: what was due stays due from the new time on.
            return;
        }
        if let Some(period_ns) = self.period_ns()
            && now_ns / period_ns != seen_ns / period_ns
        {
            self.flags |= C_PERIODIC;
        }
        let (seen_s, now_s) = (seen_ns / NS_PER_S, now_ns / NS_PER_S);
        if self.frozen.is_none() && now_s != seen_s {
            self.flags |= C_UPDATE;
            if self.next_alarm_s(seen_s).is_some_and(|alarm_s| alarm_s <= now_s) {
                self.flags |= C_ALARM;
            }
        }
    }

    fn interrupt(&self) -> bool {
        self.flags & self.register_b & B_INTERRUPTS != 0
    }

    fn next_interrupt_ns(&self, wall_ns: u64) -> Option<u64> {
        // A flag that is already set raises nothing new until register C is read.
        let waits_for = |bit: u8| self.register_b & bit != 0 && self.flags & bit == 0;
        let now_ns = self.guest_ns(wall_ns);
        let running = self.frozen.is_none();
        let periodic = self.period_ns().filter(|_| waits_for(C_PERIODIC)).map(|period| period - now_ns % period);
        let update = (running && waits_for(C_UPDATE)).then(|| NS_PER_S - now_ns % NS_PER_S);
        let alarm = (running && waits_for(C_ALARM))
            .then(|| self.next_alarm_s(now_ns / NS_PER_S))
            .flatten()
            .map(|alarm_s| alarm_s * NS_PER_S - now_ns);
        [periodic, update, alarm].into_iter().flatten().min()
    }
}

impl BusDevice for Rtc {
    fn read(&self, offset: u64, size: AccessSize) -> u64 {
        byte_registers::read(offset, size, |offset| self.inner.read_byte(offset))
    }

    fn write(&self, offset: u64, size: AccessSize, value: u64) {
        byte_registers::write(offset, size, value, |offset, value| self.inner.write_byte(offset, value));
    }
}
