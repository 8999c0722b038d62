//! Tests of the look-up tables.

use std::sync::Arc;

use super::*;
use crate::translate::ArenaMemory;

fn tlb() -> Tlb {
    let arena = Arc::new(ArenaMemory::new().unwrap());
    // SAFETY: the arena's only ones.
    Tlb::new(unsafe { DataTables::new(arena) })
}

fn hit(tlb: &Tlb, linear: u64) -> bool {
    tlb.data_entry(linear).read_tag == tlb.tag(linear, 1)
}

#[test]
fn a_switch_back_with_keep_finds_its_entries() {
    let mut tlb = tlb();
    tlb.data.select(USER);
    tlb.switch_context(1, false);
    tlb.fill_data(USER, 0x5000, std::ptr::null_mut(), std::ptr::null(), true, Scope::LocalUser);
    assert!(hit(&tlb, 0x5fff) && tlb.data_entry(0x5fff).read_tag != tlb.tag(0x5fff, 2));
    tlb.switch_context(2, true);
    assert!(!hit(&tlb, 0x5000));
    tlb.switch_context(1, true);
    assert!(hit(&tlb, 0x5000));
    tlb.switch_context(1, false);
    assert!(!hit(&tlb, 0x5000));
}

#[test]
fn generations_run_out_without_reviving_old_entries() {
    let mut tlb = tlb();
    tlb.switch_context(7, false);
    tlb.fill_data(SUPERVISOR_OPEN, 0x5000, std::ptr::null_mut(), std::ptr::null(), true, Scope::LocalUser);
    for _ in 0..3 * GENERATION_MAX {
        tlb.flush_all();
        assert!(!hit(&tlb, 0x5000));
    }
}

#[test]
fn invalidating_a_large_page_drops_all_its_parts() {
    let mut tlb = tlb();
    tlb.switch_context(1, false);
    let huge = 0xffff_8880_4000_0000;
    for (linear, shift) in [(0x60_0000, 21), (0x7f_f000, 21), (huge, 30), (huge + 0x3fff_f000, 30)] {
        tlb.fill_data(SUPERVISOR_OPEN, linear, std::ptr::null_mut(), std::ptr::null(), true, Scope::LocalUser);
        tlb.note_large(linear, shift);
    }
    tlb.fill_data(SUPERVISOR_OPEN, 0x1_0080_1000, std::ptr::null_mut(), std::ptr::null(), true, Scope::LocalUser);
    tlb.invalidate_page(0x60_1000);
    assert!(!hit(&tlb, 0x60_0000) && !hit(&tlb, 0x7f_f000) && hit(&tlb, huge) && hit(&tlb, 0x1_0080_1000));
    tlb.invalidate_page(huge + 0x123_4567);
    assert!(!hit(&tlb, huge) && !hit(&tlb, huge + 0x3fff_f000));
}

#[test]
fn only_pages_that_led_to_code_change_the_fetch_tag() {
    let mut tlb = tlb();
    tlb.switch_context(1, false);
    tlb.note_way(0x5abc);
    let tag = tlb.fetch_tag;
    tlb.invalidate_page(0x6000);
    assert_eq!(tlb.fetch_tag, tag);
    tlb.invalidate_page(0x5000);
    assert_ne!(tlb.fetch_tag, tag);
    let tag = tlb.fetch_tag;
    // A part of a large page without code; with code in another part; of a page of 1 GiB.
    tlb.note_way(0x5abc);
    tlb.note_large(0x40_0000, 21);
    tlb.invalidate_page(0x40_3000);
    assert_eq!(tlb.fetch_tag, tag);
    for (linear, shift) in [(0x40_0000, 21), (3 << 30, 30)] {
        tlb.note_large(linear, shift);
        tlb.note_way(linear + 0x1f_f123);
        let tag = tlb.fetch_tag;
        tlb.invalidate_page(linear + 0x3000);
        assert_ne!(tlb.fetch_tag, tag);
    }
}

#[test]
fn the_ways_of_the_privilege_that_does_not_run_are_forgotten_too() {
    let mut tlb = tlb();
    tlb.switch_context(1, false);
    tlb.note_large(0x40_0000, 21);
    for page in [0x5000, 0x40_5000] {
        tlb.note_way(page);
        let tag = tlb.fetch_tag;
        tlb.code_base = CODE_ENTRIES;
        tlb.retag();
        let user = tlb.fetch_tag;
        tlb.invalidate_page(page & !0x3fff);
        tlb.invalidate_page(page);
        assert_eq!(tlb.fetch_tag, user);
        tlb.code_base = 0;
        tlb.retag();
        assert_ne!(tlb.fetch_tag, tag);
    }
}

fn fill(tlb: &mut Tlb, linear: u64, scope: Scope) {
    tlb.fill_data(SUPERVISOR_OPEN, linear, std::ptr::null_mut(), std::ptr::null(), true, scope);
}

#[test]
fn global_entries_of_the_supervisor_outlive_switches_and_others_do_not() {
    let mut tlb = tlb();
    tlb.switch_context(1, false);
    fill(&mut tlb, 0x5000, Scope::Global);
    fill(&mut tlb, 0x6000, Scope::LocalSupervisor);
    fill(&mut tlb, 0x7000, Scope::LocalUser);
    assert!(hit(&tlb, 0x5000) && hit(&tlb, 0x6000) && hit(&tlb, 0x7000));
    tlb.switch_context(2, false);
    assert!(hit(&tlb, 0x5000) && !hit(&tlb, 0x6000) && !hit(&tlb, 0x7000));
    // A global page in the place of another one, and the other way round.
    fill(&mut tlb, 0x7000, Scope::Global);
    fill(&mut tlb, 0x5000, Scope::LocalUser);
    tlb.flush_context(2);
    assert!(hit(&tlb, 0x7000) && !hit(&tlb, 0x5000));
    tlb.invalidate_page(0x7000);
    assert!(!hit(&tlb, 0x7000));
    fill(&mut tlb, 0x7000, Scope::Global);
    tlb.flush_all();
    assert!(!hit(&tlb, 0x7000));
}

#[test]
fn without_global_pages_supervisor_entries_belong_to_their_address_space() {
    let mut tlb = tlb();
    tlb.switch_context(1, false);
    for page in 1..=u64::from(LOCAL_KERNEL_PAGES_MAX) {
        fill(&mut tlb, page * PAGE_SIZE, Scope::LocalSupervisor);
    }
    let last = u64::from(LOCAL_KERNEL_PAGES_MAX) * PAGE_SIZE;
    assert!(hit(&tlb, last) && !hit(&tlb, PAGE_SIZE));
    tlb.switch_context(2, true);
    assert!(!hit(&tlb, last));
    fill(&mut tlb, PAGE_SIZE, Scope::Global);
    tlb.switch_context(1, true);
    assert!(hit(&tlb, last) && !hit(&tlb, PAGE_SIZE));
    tlb.flush_all();
    assert!(!hit(&tlb, last));
    fill(&mut tlb, last, Scope::Global);
    tlb.switch_context(2, false);
    assert!(hit(&tlb, last));
}

#[test]
fn the_supervisor_s_fetch_tag_changes_with_the_address_space_only_after_ways_that_are_not_global() {
    let mut tlb = tlb();
    tlb.switch_context(1, false);
    tlb.fill_code(0x5000, 9, Scope::Global);
    tlb.note_way(0x5123);
    let global = tlb.fetch_tag;
    tlb.switch_context(2, false);
    assert_eq!((tlb.fetch_tag, tlb.code_page(0x5123)), (global, Some(9)));
    tlb.fill_code(0x6000, 10, Scope::LocalUser);
    tlb.note_way(0x6123);
    let local = tlb.fetch_tag;
    assert_ne!(local, global);
    tlb.switch_context(3, false);
    assert_eq!((tlb.fetch_tag, tlb.code_page(0x5123), tlb.code_page(0x6123)), (global, Some(9), None));
    tlb.switch_context(2, true);
    tlb.note_way(0x6123);
    assert_eq!((tlb.fetch_tag, tlb.code_page(0x6123)), (local, Some(10)));
    tlb.flush_all();
    assert!(tlb.fetch_tag != global && tlb.code_page(0x5123).is_none());
}

#[test]
fn the_second_level_gives_back_what_another_page_has_displaced_and_nothing_that_was_dropped() {
    const APART: u64 = DATA_ENTRIES as u64 * PAGE_SIZE;
    let back = |tlb: &mut Tlb, linear| !hit(tlb, linear) && tlb.refill(linear, true).is_some() && hit(tlb, linear);
    let mut tlb = tlb();
    tlb.switch_context(1, false);
    fill(&mut tlb, 0x5000, Scope::Global);
    fill(&mut tlb, 0x5000 + APART, Scope::LocalUser);
    assert!(back(&mut tlb, 0x5000) && tlb.refill(0x5000 + APART, false).is_none());
    // The global entry is not mistaken for the one that it displaced.
    tlb.switch_context(2, false);
    assert!(hit(&tlb, 0x5000));
    fill(&mut tlb, 0x5000 + APART, Scope::Global);
    tlb.data.select(USER);
    assert!(tlb.refill(0x5000, false).is_none());
    tlb.data.select(WATCHED);
    assert!(tlb.refill(0x5000, false).is_none());
    tlb.data.select(SUPERVISOR_OPEN);
    tlb.invalidate_page(0x5000);
    assert!(tlb.refill(0x5000, false).is_none());
    fill(&mut tlb, 0x5000, Scope::Global);
    assert!(back(&mut tlb, 0x5000 + APART));
    tlb.note_large(0x5000, 21);
    tlb.invalidate_page(0x6000);
    assert!(tlb.refill(0x5000, false).is_none());
    tlb.flush_all();
    assert!(tlb.refill(0x5000 + APART, false).is_none());
    tlb.fill_data(SUPERVISOR_OPEN, 0x5000, std::ptr::null_mut(), std::ptr::null(), false, Scope::Global);
    assert!(tlb.refill(0x5000, true).is_none() && tlb.refill(0x5000, false).is_some());
}

#[test]
fn generations_run_out_with_global_entries_too() {
    let mut tlb = tlb();
    for round in 0..3 * GENERATION_MAX {
        tlb.flush_all();
        assert!(!hit(&tlb, 0x5000), "{round}");
        fill(&mut tlb, 0x5000, Scope::Global);
        assert!(tlb.generations[USER] != tlb.generations[SUPERVISOR], "{round}");
        tlb.switch_context(round % 3, false);
        assert!(!hit(&tlb, 0x6000), "{round}");
        fill(&mut tlb, 0x6000, Scope::LocalUser);
    }
}

#[test]
fn flushing_a_context_touches_no_other() {
    let mut tlb = tlb();
    tlb.switch_context(1, false);
    tlb.fill_data(SUPERVISOR_OPEN, 0x5000, std::ptr::null_mut(), std::ptr::null(), true, Scope::LocalUser);
    tlb.switch_context(2, false);
    tlb.fill_data(SUPERVISOR_OPEN, 0x6000, std::ptr::null_mut(), std::ptr::null(), true, Scope::LocalUser);
    tlb.flush_context(1);
    assert!(hit(&tlb, 0x6000));
    tlb.flush_context(2);
    assert!(!hit(&tlb, 0x6000));
    tlb.switch_context(1, true);
    assert!(!hit(&tlb, 0x5000));
}
