//! The clock at register level.

use std::sync::Arc;

use polder_basics::{GIB, MIB, ManualClock};
use polder_machine::{AccessSize, BusDevice};

use super::{NS_PER_S, Rtc};
use crate::test_support::RecordingLine;

/// 2024-02-29 23:59:57 UTC, a Thursday.
const START_S: u64 = 1_709_251_197;

struct Bench {
    rtc: Arc<Rtc>,
    clock: Arc<ManualClock>,
    line: Arc<RecordingLine>,
}

fn bench() -> Bench {
    let (clock, line) = (Arc::new(ManualClock::new(START_S * NS_PER_S)), Arc::new(RecordingLine::default()));
    let rtc = Arc::new(Rtc::new(clock.clone(), line.clone(), 64 * MIB));
    Bench { rtc, clock, line }
}

impl Bench {
    fn read(&self, index: u8) -> u8 {
        self.rtc.write(0, AccessSize::Byte, u64::from(index));
        self.rtc.read(1, AccessSize::Byte) as u8
    }

    fn write(&self, index: u8, value: u8) {
        self.rtc.write(0, AccessSize::Byte, u64::from(index));
        self.rtc.write(1, AccessSize::Byte, u64::from(value));
    }

    fn time(&self) -> [u8; 8] {
        [0x32, 9, 8, 7, 6, 4, 2, 0].map(|index| self.read(index))
    }
}

#[test]
fn the_time_is_shown_in_bcd_and_24_hours_after_power_on() {
    let bench = bench();
    assert_eq!(bench.time(), [0x20, 0x24, 0x02, 0x29, 5, 0x23, 0x59, 0x57]);
    bench.clock.advance_ns(3 * NS_PER_S);
    assert_eq!(bench.time(), [0x20, 0x24, 0x03, 0x01, 6, 0, 0, 0]);
}

#[test]
fn binary_and_12_hour_modes_are_honoured() {
    let bench = bench();
    bench.write(0xb, 0x04);
    assert_eq!(bench.time(), [20, 24, 2, 29, 5, 11 | 0x80, 59, 57]);
    bench.clock.advance_ns(3 * NS_PER_S);
    assert_eq!(bench.read(4), 12);
    bench.write(4, 12 | 0x80);
    bench.write(0xb, 0x06);
    assert_eq!(bench.read(4), 12);
}

#[test]
fn a_time_set_under_the_set_bit_runs_on_from_there() {
    let bench = bench();
    bench.write(0xb, 0x82);
    for (index, value) in [(0x32, 0x19), (9, 0x99), (8, 0x12), (7, 0x31), (4, 0x23), (2, 0x59), (0, 0x59)] {
        bench.write(index, value);
    }
    bench.clock.advance_ns(5 * NS_PER_S);
    assert_eq!(bench.read(0), 0x59);
    bench.write(0xb, 0x02);
    bench.clock.advance_ns(NS_PER_S);
    assert_eq!(bench.time(), [0x20, 0x00, 0x01, 0x01, 7, 0, 0, 0]);
}

#[test]
fn an_update_is_announced_before_it_happens() {
    let bench = bench();
    assert_eq!(bench.read(0xa) & 0x80, 0);
    bench.clock.advance_ns(NS_PER_S - 200_000);
    assert_eq!(bench.read(0xa) & 0x80, 0x80);
    bench.clock.advance_ns(200_000);
    assert_eq!(bench.read(0xa) & 0x80, 0);
}

#[test]
fn update_interrupts_come_each_second_and_reading_c_ends_them() {
    let bench = bench();
    bench.write(0xb, 0x12);
    assert_eq!(bench.rtc.next_interrupt_ns(), Some(NS_PER_S));
    bench.clock.advance_ns(NS_PER_S);
    bench.rtc.tick();
    assert!(bench.line.level());
    assert_eq!(bench.rtc.next_interrupt_ns(), None);
    assert_eq!(bench.read(0xc) & 0xb0, 0x90);
    assert!(!bench.line.level());
    assert_eq!(bench.read(0xc), 0);
}

#[test]
fn an_alarm_fires_at_its_time_and_not_before() {
    let bench = bench();
    // One minute and a second past midnight.
    for (index, value) in [(5, 0x00), (3, 0x01), (1, 0x01)] {
        bench.write(index, value);
    }
    bench.write(0xb, 0x22);
    assert_eq!(bench.rtc.next_interrupt_ns(), Some(64 * NS_PER_S));
    bench.clock.advance_ns(63 * NS_PER_S);
    bench.rtc.tick();
    assert!(!bench.line.level());
    bench.clock.advance_ns(NS_PER_S);
    bench.rtc.tick();
    assert!(bench.line.level());
    assert_eq!(bench.read(0xc) & 0xa0, 0xa0);
}

#[test]
fn an_alarm_byte_can_match_everything_or_nothing() {
    let bench = bench();
    for index in [5, 3, 1] {
        bench.write(index, 0xff);
    }
    bench.write(0xb, 0x22);
    assert_eq!(bench.rtc.next_interrupt_ns(), Some(NS_PER_S));
    bench.write(1, 0x30);
    assert_eq!(bench.rtc.next_interrupt_ns(), Some(33 * NS_PER_S));
    bench.write(3, 0x75);
    assert_eq!(bench.rtc.next_interrupt_ns(), None);
}

#[test]
fn the_periodic_interrupt_follows_its_rate() {
    let bench = bench();
    bench.write(0xa, 0x26);
    bench.write(0xb, 0x42);
    let next_ns = bench.rtc.next_interrupt_ns().unwrap();
    assert!(next_ns <= NS_PER_S / 1024 + 1, "{next_ns}");
    bench.clock.advance_ns(next_ns);
    bench.rtc.tick();
    assert_eq!(bench.line.rising_edges(), 1);
    assert_eq!(bench.read(0xc), 0xc0);
    bench.write(0xa, 0x20);
    assert_eq!(bench.rtc.next_interrupt_ns(), None);
}

/// Hands every rising edge to the test.
struct ChannelLine(std::sync::mpsc::Sender<()>, std::sync::Mutex<bool>);

impl polder_machine::InterruptLine for ChannelLine {
    fn set(&self, asserted: bool) {
        let was_asserted = std::mem::replace(&mut *self.1.lock().unwrap(), asserted);
        if asserted && !was_asserted {
            let _ = self.0.send(());
        }
    }
}

#[test]
fn the_timer_thread_raises_the_line_by_itself() {
    let (sender, raised) = std::sync::mpsc::channel();
    let rtc = Rtc::new(Arc::new(polder_basics::SystemClock), Arc::new(ChannelLine(sender, false.into())), 64 * MIB);
    rtc.start_timer().unwrap();
    rtc.write(0, AccessSize::Word, 0x420b);
    for _ in 0..3 {
        raised.recv_timeout(std::time::Duration::from_secs(10)).unwrap();
        rtc.write(0, AccessSize::Byte, 0x0c);
        assert_eq!(rtc.read(1, AccessSize::Byte) & 0xc0, 0xc0);
    }
}

#[test]
fn memory_sizes_stand_in_the_usual_bytes() {
    let bench = bench();
    assert_eq!([bench.read(0x15), bench.read(0x16)], 640u16.to_le_bytes());
    assert_eq!([bench.read(0x30), bench.read(0x31)], (63u16 * 1024).to_le_bytes());
    assert_eq!([bench.read(0x34), bench.read(0x35)], (48u16 * 16).to_le_bytes());
    let large = Rtc::new(Arc::new(ManualClock::new(0)), Arc::new(()), 5 * GIB);
    large.write(0, AccessSize::Byte, 0x5c);
    // 5 GiB less the 2.75 GiB below the hole, in units of 64 KiB.
    assert_eq!(large.read(1, AccessSize::Byte), (36_864 >> 8) & 0xff);
}

#[test]
fn other_bytes_are_memory_and_the_index_ignores_the_nmi_bit() {
    let bench = bench();
    bench.write(0x0f, 0x0a);
    assert_eq!(bench.read(0x8f), 0x0a);
    bench.write(0x0d, 0);
    assert_eq!(bench.read(0x0d), 0x80);
}

#[test]
fn a_word_write_selects_and_sets_in_one_access() {
    let bench = bench();
    bench.rtc.write(0, AccessSize::Word, 0x5a0e);
    assert_eq!(bench.rtc.read(0, AccessSize::Word), 0x5aff);
    assert_eq!(bench.rtc.read(1, AccessSize::Dword), 0xffff_ff5a);
}

#[test]
fn every_byte_value_in_every_register_is_survived() {
    let bench = bench();
    for index in 0..=255 {
        for value in 0..=255 {
            bench.write(index, value);
            bench.clock.advance_ns(1_234_567_890);
            bench.rtc.tick();
            bench.rtc.next_interrupt_ns();
            bench.read(index);
        }
    }
}
