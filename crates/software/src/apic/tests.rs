//! The local APIC's rules, one test each. Time is a number: 2.5 GHz, 100 TSC ticks an APIC timer tick.

use std::sync::Arc;

use polder_machine::{MsiMessage, MsiSink};

use super::inbox::{EVENT_INIT, EVENT_NMI, EVENT_SIPI, Inbox};
use super::local::{LocalApic, Refused, register};
use super::router::{Destination, Message, Router, delivery};

const KHZ: u64 = 2_500_000;
const BASE: u64 = 0xfee0_0000;
const ON: u64 = 1 << 11;
const X2APIC: u64 = 1 << 10 | ON;

/// A machine of APICs that are on and software-enabled.
fn machine(count: usize) -> Vec<LocalApic> {
    let router = Arc::new(Router::new((0..count).map(|_| Arc::new(Inbox::default())).collect()));
    let mut apics: Vec<LocalApic> = (0..count).map(|index| LocalApic::new(router.clone(), index, KHZ)).collect();
    for apic in &mut apics {
        apic.write(register::SVR, 0x1ff, 0).unwrap();
    }
    apics
}

fn one() -> LocalApic {
    machine(1).remove(0)
}

fn x2apic(count: usize) -> Vec<LocalApic> {
    let mut apics = machine(count);
    for apic in &mut apics {
        apic.set_base(BASE | X2APIC).unwrap();
    }
    apics
}

fn send(apics: &[LocalApic], destination: Destination, kind: u8, vector: u8) {
    apics[0].router().deliver(Message { destination, delivery: kind, vector, is_level: false });
}

fn requested(apics: &[LocalApic]) -> Vec<Option<u8>> {
    apics.iter().map(|apic| apic.inbox().highest_request()).collect()
}

#[test]
fn a_request_is_deliverable_only_above_the_processor_priority() {
    let mut apic = one();
    apic.inbox().post_fixed(0x51, false);
    assert_eq!(apic.deliverable(), Some(0x51));
    apic.set_tpr(0x50);
    assert_eq!((apic.deliverable(), apic.ppr()), (None, 0x50));
    apic.set_tpr(0x4f);
    apic.accept(0x51);
    assert_eq!(apic.ppr(), 0x50);
    apic.inbox().post_fixed(0x5f, false);
    assert_eq!(apic.deliverable(), None);
    apic.inbox().post_fixed(0x60, false);
    assert_eq!(apic.deliverable(), Some(0x60));
}

#[test]
fn the_end_of_an_interrupt_ends_the_highest_in_service() {
    let mut apic = one();
    for vector in [0x41, 0x62] {
        apic.inbox().post_fixed(vector, false);
        apic.accept(vector);
    }
    assert_eq!(apic.read(register::ISR + 2, 0).unwrap(), 1 << 1);
    assert_eq!(apic.read(register::ISR + 3, 0).unwrap(), 1 << 2);
    assert_eq!(apic.write(register::EOI, 0, 0), Ok(None));
    assert_eq!((apic.read(register::ISR + 3, 0).unwrap(), apic.ppr()), (0, 0x40));
    assert_eq!(apic.write(register::EOI, 0, 0), Ok(None));
    assert_eq!((apic.ppr(), apic.write(register::EOI, 0, 0)), (0, Ok(None)));
}

#[test]
fn only_a_level_triggered_interrupt_tells_the_io_apic_of_its_end() {
    let mut apic = one();
    apic.inbox().post_fixed(0x41, true);
    assert_eq!(apic.read(register::TMR + 2, 0).unwrap(), 1 << 1);
    apic.accept(0x41);
    assert_eq!(apic.write(register::EOI, 0, 0), Ok(Some(0x41)));
    apic.inbox().post_fixed(0x41, false);
    apic.accept(0x41);
    assert_eq!(apic.write(register::EOI, 0, 0), Ok(None));
}

#[test]
fn a_lower_priority_wakes_a_request_that_waited() {
    let mut apic = one();
    apic.set_tpr(0xff);
    apic.inbox().post_fixed(0x41, false);
    assert!(apic.inbox().take_attention());
    apic.set_tpr(0);
    assert!(apic.inbox().take_attention());
    apic.accept(0x41);
    apic.inbox().post_fixed(0x42, false);
    apic.inbox().take_attention();
    apic.end_of_interrupt();
    assert!(apic.inbox().take_attention());
}

#[test]
fn a_software_disabled_apic_takes_no_fixed_interrupts_and_masks_its_own() {
    let mut apics = machine(1);
    apics[0].write(register::LVT_TIMER, 0x40, 0).unwrap();
    apics[0].write(register::SVR, 0xff, 0).unwrap();
    assert_eq!(apics[0].read(register::LVT_TIMER, 0).unwrap(), 0x1_0040);
    apics[0].write(register::LVT_TIMER, 0x40, 0).unwrap();
    assert_eq!(apics[0].read(register::LVT_TIMER, 0).unwrap(), 0x1_0040);
    send(&apics, Destination::All, delivery::FIXED, 0x41);
    assert_eq!(requested(&apics), [None]);
    send(&apics, Destination::All, delivery::NMI, 0);
    assert_eq!(apics[0].inbox().take_events().0, EVENT_NMI);
}

#[test]
fn physical_destinations_name_one_or_all() {
    let apics = machine(3);
    send(&apics, Destination::Physical(1), delivery::FIXED, 0x41);
    assert_eq!(requested(&apics), [None, Some(0x41), None]);
    send(&apics, Destination::Physical(u32::MAX), delivery::FIXED, 0x42);
    assert_eq!(requested(&apics), [Some(0x42); 3]);
    send(&apics, Destination::Physical(7), delivery::FIXED, 0x43);
    assert_eq!(requested(&apics), [Some(0x42); 3]);
}

#[test]
fn logical_destinations_follow_the_flat_and_the_cluster_model() {
    let mut apics = machine(3);
    for (index, apic) in apics.iter_mut().enumerate() {
        apic.write(register::LDR, 1 << (24 + index), 0).unwrap();
    }
    send(&apics, Destination::Logical(0b101), delivery::FIXED, 0x41);
    assert_eq!(requested(&apics), [Some(0x41), None, Some(0x41)]);
    for (index, apic) in apics.iter_mut().enumerate() {
        apic.write(register::DFR, 0x0fff_ffff, 0).unwrap();
        // Cluster 1 has vCPUs 0 and 1, cluster 2 has vCPU 2.
        apic.write(register::LDR, [0x11, 0x12, 0x21][index] << 24, 0).unwrap();
    }
    send(&apics, Destination::Logical(0x13), delivery::FIXED, 0x51);
    assert_eq!(requested(&apics), [Some(0x51), Some(0x51), Some(0x41)]);
    send(&apics, Destination::Logical(0x21), delivery::FIXED, 0x52);
    assert_eq!(requested(&apics), [Some(0x51), Some(0x51), Some(0x52)]);
}

#[test]
fn x2apic_logical_ids_derive_from_the_physical_ones() {
    let mut apics = x2apic(18);
    assert_eq!(apics[17].read(register::ID, 0).unwrap(), 17);
    assert_eq!(apics[17].read(register::LDR, 0).unwrap(), 0x1_0002);
    send(&apics, Destination::Logical(0x1_0003), delivery::FIXED, 0x41);
    let taken: Vec<usize> = (0..18).filter(|&index| requested(&apics)[index].is_some()).collect();
    assert_eq!(taken, [16, 17]);
}

#[test]
fn the_lowest_priority_wins_and_equals_take_turns() {
    let mut apics = machine(3);
    apics[0].set_tpr(0x30);
    for vector in [0x81, 0x82, 0x83, 0x84] {
        send(&apics, Destination::All, delivery::LOWEST_PRIORITY, vector);
    }
    let [first, second, third] = requested(&apics)[..] else { unreachable!() };
    assert_eq!(first, None);
    assert!(second.is_some() && third.is_some());
}

#[test]
fn shorthands_name_self_all_and_others() {
    let mut apics = machine(3);
    apics[1].write(register::ICR, 1 << 18 | 0x41, 0).unwrap();
    assert_eq!(requested(&apics), [None, Some(0x41), None]);
    apics[1].write(register::ICR, 3 << 18 | 0x42, 0).unwrap();
    assert_eq!(requested(&apics), [Some(0x42), Some(0x41), Some(0x42)]);
    apics[1].write(register::ICR, 2 << 18 | 0x43, 0).unwrap();
    assert_eq!(requested(&apics), [Some(0x43); 3]);
}

#[test]
fn the_two_halves_of_the_command_register_send_when_the_low_one_is_written() {
    let mut apics = machine(3);
    apics[0].write(register::ICR_HIGH, 2 << 24, 0).unwrap();
    assert_eq!(requested(&apics), [None; 3]);
    apics[0].write(register::ICR, 0x1041, 0).unwrap();
    assert_eq!(requested(&apics), [None, None, Some(0x41)]);
    // The delivery status reads as idle.
    assert_eq!(apics[0].read(register::ICR, 0).unwrap(), 0x41);
    assert_eq!(apics[0].read(register::ICR_HIGH, 0).unwrap(), 2 << 24);
}

#[test]
fn init_and_start_up_reach_the_others_and_a_de_assert_is_nothing() {
    let mut apics = machine(2);
    apics[0].write(register::ICR_HIGH, 1 << 24, 0).unwrap();
    apics[0].write(register::ICR, 0xc500, 0).unwrap();
    apics[0].write(register::ICR, 0x8500, 0).unwrap();
    assert_eq!(apics[1].inbox().take_events(), (EVENT_INIT, 0));
    apics[0].write(register::ICR, 0x0699, 0).unwrap();
    assert_eq!(apics[1].inbox().take_events(), (EVENT_SIPI, 0x99));
    assert_eq!(apics[0].inbox().take_events(), (0, 0));
}

#[test]
fn an_illegal_vector_is_an_error_and_is_not_sent() {
    let mut apics = machine(2);
    apics[0].write(register::LVT_ERROR, 0xfe, 0).unwrap();
    apics[0].write(register::ICR, 3 << 18 | 0x0f, 0).unwrap();
    assert_eq!(requested(&apics), [Some(0xfe), None]);
    assert_eq!(apics[0].read(register::ESR, 0).unwrap(), 0);
    apics[0].write(register::ESR, 0, 0).unwrap();
    assert_eq!(apics[0].read(register::ESR, 0).unwrap(), 1 << 5);
    apics[0].write(register::ESR, 0, 0).unwrap();
    assert_eq!(apics[0].read(register::ESR, 0).unwrap(), 0);
}

#[test]
fn an_illegal_register_is_an_error_in_xapic_mode_and_a_fault_in_x2apic_mode() {
    let mut apic = one();
    assert_eq!(apic.read(0x3f, 0), Err(Refused));
    apic.write(register::ESR, 0, 0).unwrap();
    assert_eq!(apic.read(register::ESR, 0).unwrap(), 1 << 7);
    let mut apic = x2apic(1).remove(0);
    for (number, value) in [
        (register::ID, 0),
        (register::VERSION, 0),
        (register::LDR, 0),
        (register::DFR, 0),
        (register::ICR_HIGH, 0),
        (register::ISR, 0),
        (register::EOI, 1),
        (register::ESR, 1),
        (register::TPR, 0x100),
        (register::SVR, 1 << 12),
        (register::SELF_IPI, 0x100),
        (register::LVT_TIMER, 1 << 20),
        (register::ICR, 1 << 20),
    ] {
        assert_eq!(apic.write(number, value, 0), Err(Refused), "{number:#x}");
    }
    for number in [register::DFR, register::ICR_HIGH, register::EOI, register::SELF_IPI] {
        assert_eq!(apic.read(number, 0), Err(Refused), "{number:#x}");
    }
    apic.write(register::SELF_IPI, 0x55, 0).unwrap();
    assert_eq!(apic.inbox().highest_request(), Some(0x55));
}

#[test]
fn the_base_register_allows_only_the_manuals_transitions() {
    let off = BASE;
    let cases = [
        (BASE | ON, BASE | X2APIC, true),
        (BASE | ON, off, true),
        (BASE | ON, BASE | 1 << 10, false),
        (BASE | X2APIC, BASE | ON, false),
        (BASE | X2APIC, off, true),
        (off, BASE | X2APIC, false),
        (off, BASE | ON, true),
        (BASE | ON, BASE | ON | 1 << 40, false),
        (BASE | ON, BASE | ON | 1 << 9, false),
        (BASE | ON, 0x1000 | ON, true),
    ];
    for (from, to, allowed) in cases {
        let mut apic = one();
        apic.set_base(from).unwrap();
        assert_eq!(apic.set_base(to).is_ok(), allowed, "{from:#x} to {to:#x}");
        // The bootstrap flag stays whatever is written.
        assert_eq!(apic.base(), if allowed { to } else { from } | 1 << 8);
    }
}

#[test]
fn an_apic_that_is_off_has_no_page_and_takes_nothing() {
    let mut apics = machine(1);
    assert_eq!(apics[0].page(), BASE >> 12);
    apics[0].set_base(BASE).unwrap();
    assert_eq!(apics[0].page(), u64::MAX);
    send(&apics, Destination::Physical(0), delivery::FIXED, 0x41);
    assert_eq!(requested(&apics), [None]);
    apics[0].set_base(0x1234_5000 | ON).unwrap();
    assert_eq!(apics[0].page(), 0x12345);
}

#[test]
fn the_timer_interrupts_once_through_its_table_entry() {
    let mut apic = one();
    apic.write(register::TIMER_DIVIDE, 0xb, 0).unwrap();
    apic.write(register::LVT_TIMER, 0xec, 0).unwrap();
    apic.write(register::TIMER_INITIAL, 10, 1000).unwrap();
    assert_eq!(apic.read(register::TIMER_CURRENT, 1500).unwrap(), 5);
    apic.poll_timer(1999);
    assert_eq!(apic.inbox().highest_request(), None);
    apic.poll_timer(2000);
    assert_eq!(apic.inbox().highest_request(), Some(0xec));
    apic.accept(0xec);
    apic.poll_timer(1 << 40);
    assert_eq!(apic.inbox().highest_request(), None);
}

#[test]
fn a_masked_timer_runs_silently_and_one_with_an_illegal_vector_errs() {
    let mut apic = one();
    apic.write(register::TIMER_INITIAL, 10, 0).unwrap();
    apic.poll_timer(1 << 40);
    assert_eq!(apic.inbox().highest_request(), None);
    apic.write(register::LVT_TIMER, 0x0f, 0).unwrap();
    apic.write(register::TIMER_INITIAL, 10, 0).unwrap();
    apic.poll_timer(1 << 40);
    apic.write(register::ESR, 0, 0).unwrap();
    assert_eq!(apic.read(register::ESR, 0).unwrap(), 1 << 6);
    assert_eq!(apic.inbox().highest_request(), None);
}

#[test]
fn messages_from_devices_find_their_way() {
    let apics = machine(2);
    let router = apics[0].router().clone();
    router.send(MsiMessage { address: 0xfee0_1000, data: 0x41 });
    assert_eq!(requested(&apics), [None, Some(0x41)]);
    router.send(MsiMessage { address: 0xfeef_f000, data: 0x8042 });
    assert_eq!(requested(&apics), [Some(0x42); 2]);
    assert!(apics[0].inbox().is_level(0x42));
    // Vectors below 16, SMI and external interrupts are dropped.
    for data in [0x0f, 0x0243, 0x0743] {
        router.send(MsiMessage { address: 0xfeef_f000, data });
    }
    assert_eq!(requested(&apics), [Some(0x42); 2]);
    router.send(MsiMessage { address: 0xfee0_0000, data: 0x400 });
    assert_eq!(apics[0].inbox().take_events().0, EVENT_NMI);
}

#[test]
fn init_clears_everything_but_base_and_id() {
    let mut apics = x2apic(2);
    let apic = &mut apics[1];
    apic.set_tpr(0x30);
    apic.inbox().post_fixed(0x41, true);
    apic.accept(0x41);
    apic.inbox().post_fixed(0x42, true);
    apic.write(register::LVT_TIMER, 0xec, 0).unwrap();
    apic.write(register::TIMER_INITIAL, 10, 0).unwrap();
    apic.init();
    assert!(apic.is_x2apic());
    assert_eq!((apic.ppr(), apic.deliverable(), apic.timer.deadline()), (0, None, u64::MAX));
    assert_eq!(apic.read(register::LVT_TIMER, 0).unwrap(), 0x1_0000);
    assert_eq!((apic.read(register::ID, 0).unwrap(), apic.read(register::LDR, 0).unwrap()), (1, 2));
    assert_eq!(apic.inbox().level_bits(2), 0);
}

/// A generator of numbers that repeats with its seed (xorshift).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Mostly small or special numbers.
    fn value(&mut self) -> u64 {
        match self.next() % 6 {
            0 => 0,
            1 => u64::MAX,
            2 => self.next() & 0xff,
            3 => self.next() & 0xffff_ffff,
            4 => 1 << (self.next() % 64),
            _ => self.next(),
        }
    }
}

#[test]
fn no_register_access_at_any_time_is_a_panic() {
    let mut random = Random(crate::ops::against_host::seed() | 1);
    let mut apics = machine(3);
    for _ in 0..200_000 {
        let apic = &mut apics[(random.next() % 3) as usize];
        let (number, value, now) = (random.next() as u32 % 0x42, random.value(), random.value());
        match random.next() % 12 {
            0..=4 => drop(apic.write(number, value, now)),
            5..=7 => drop(apic.read(number, now)),
            8 => apic.poll_timer(now),
            9 => apic.timer.set_tsc_deadline(value, random.value(), now),
            10 => {
                let _ = apic.set_base(BASE | value & 0xfff);
            }
            _ => {
                if let Some(vector) = apic.deliverable() {
                    assert!(vector >> 4 > apic.ppr() >> 4);
                    apic.accept(vector);
                }
                apic.router().send(MsiMessage { address: value, data: random.value() as u32 });
            }
        }
    }
}
