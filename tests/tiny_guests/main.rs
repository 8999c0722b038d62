//! Promise: what the smallest guests rely on holds: entry, serial output, timers, SMP start-up, changed code, faults, and the
//! exit status says how a guest ended.

use polder_tests::Boot;

/// Status of a tiny guest that found everything as it should be: (42 << 1) | 1.
const GOOD: i32 = 85;

#[test]
fn a_pvh_guest_prints_and_its_debug_exit_value_is_the_status() {
    Boot::tiny("hello").timeout_s(30).run().expect_status(GOOD).expect_console("hello from a tiny guest");
}

#[test]
fn the_local_apic_timer_wakes_a_halted_vcpu() {
    Boot::tiny("timer").timeout_s(60).run().expect_status(GOOD).expect_console("timer good");
}

#[test]
fn vcpus_start_by_init_and_sipi_and_lose_no_locked_addition() {
    for cpus in [1, 2, 4, 8] {
        let outcome = Boot::tiny("smp").cpus(cpus).append(&format!("cpus={cpus}")).timeout_s(120).run();
        outcome.expect_status(GOOD).expect_console(&format!("smp good {cpus:08x}"));
    }
}

#[test]
fn changed_code_is_what_runs_next() {
    Boot::tiny("selfmodify").timeout_s(60).run().expect_status(GOOD).expect_console("selfmodify good");
}

#[test]
fn faults_carry_vector_error_code_and_address() {
    Boot::tiny("faults").timeout_s(60).run().expect_status(GOOD).expect_console("faults good");
}

#[test]
fn a_guest_that_asks_for_a_reset_ends_with_10() {
    Boot::tiny("reset").timeout_s(30).run().expect_status(10);
}

#[test]
fn a_triple_fault_ends_with_11() {
    Boot::tiny("triple").timeout_s(30).run().expect_status(11);
}

#[test]
fn a_guest_that_never_ends_is_timed_out_with_124() {
    Boot::tiny("hang").timeout_s(3).run().expect_status(124).expect_console("halting for ever");
}
