//! Promise: what the smallest guests rely on holds: entry, serial output, timers, SMP start-up, changed code, faults, and the
//! exit status says how a guest ended.

use std::path::Path;

use polder_tests::{Boot, Monitor, Outcome, Scratch};

/// Status of a tiny guest that found everything as it should be: (42 << 1) | 1.
const GOOD: i32 = 85;

/// A guest found everything as it should be, and said so.
fn good(outcome: &Outcome, said: &str) {
    outcome.expect_status(GOOD).expect_console(said);
}

/// Runs a guest interpreted, with hot code translated, and with all code translated before it first runs.
fn on_each_tier(boot: impl Fn() -> Boot, check: impl Fn(&Outcome)) {
    for translate in ["never", "auto", "always"] {
        println!("--translate {translate}");
        let scratch = Scratch::new();
        let stats = scratch.path().join("stats.json");
        check(&boot().option("--translate", translate).stats(&stats).run());
        if Monitor::chosen() == Monitor::Qemu {
            return;
        }
        let translates = is_x86_feature_detected!("bmi2") && is_x86_feature_detected!("avx");
        if translates && translate != "auto" {
            assert_eq!(counter(&stats, "translated_units") > 0, translate == "always");
        }
    }
}

/// A number of those that `--stats` has written.
fn counter(stats: &Path, name: &str) -> u64 {
    let text = std::fs::read(stats).expect("--stats writes its file");
    let facts: serde_json::Value = serde_json::from_slice(&text).expect("--stats writes JSON");
    facts["counters"][name].as_u64().unwrap_or_else(|| panic!("no {name} in {facts}"))
}

#[test]
fn a_pvh_guest_prints_and_its_debug_exit_value_is_the_status() {
    on_each_tier(|| Boot::tiny("hello").timeout_s(30), |outcome| good(outcome, "hello from a tiny guest"));
}

#[test]
fn the_local_apic_timer_wakes_a_halted_vcpu() {
    on_each_tier(|| Boot::tiny("timer").timeout_s(60), |outcome| good(outcome, "timer good"));
}

#[test]
fn vcpus_start_by_init_and_sipi_and_lose_no_locked_addition() {
    for cpus in [1, 2, 4, 8] {
        let boot = || Boot::tiny("smp").cpus(cpus).append(&format!("cpus={cpus}")).timeout_s(120);
        on_each_tier(boot, |outcome| good(outcome, &format!("smp good {cpus:08x}")));
    }
}

#[test]
fn changed_code_is_what_runs_next() {
    on_each_tier(|| Boot::tiny("selfmodify").timeout_s(60), |outcome| good(outcome, "selfmodify good"));
}

#[test]
fn eight_vcpus_that_patch_code_run_valid_versions_only() {
    // QEMU 7.2's TCG with a thread for each vCPU runs on in a breakpoint that is gone; with `-accel tcg,thread=single` the guest passes.
    if Monitor::chosen() == Monitor::Qemu {
        return;
    }
    let boot = || Boot::tiny("patch").cpus(8).append("cpus=8").timeout_s(300);
    on_each_tier(boot, |outcome| good(outcome, "patch good"));
}

#[test]
fn eight_vcpus_that_patch_code_run_valid_versions_only_while_translations_are_evicted() {
    if Monitor::chosen() == Monitor::Qemu {
        return;
    }
    let scratch = Scratch::new();
    let stats = scratch.path().join("stats.json");
    let boot = Boot::tiny("patch").cpus(8).append("cpus=8").timeout_s(300);
    let outcome = boot.option("--translate", "always").option("--code-cache", "1M").stats(&stats).run();
    good(&outcome, "patch good");
    // The functions that fill the cache go through it again and again.
    let units = counter(&stats, "translated_units");
    assert!(units == 0 || counter(&stats, "code_cache_evicted") > units / 2, "{outcome}");
}

#[test]
fn faults_carry_vector_error_code_and_address() {
    on_each_tier(|| Boot::tiny("faults").timeout_s(60), |outcome| good(outcome, "faults good"));
}

#[test]
fn a_guest_that_asks_for_a_reset_ends_with_10() {
    on_each_tier(|| Boot::tiny("reset").timeout_s(30), |outcome| _ = outcome.expect_status(10));
}

#[test]
fn a_triple_fault_ends_with_11() {
    on_each_tier(|| Boot::tiny("triple").timeout_s(30), |outcome| _ = outcome.expect_status(11));
}

#[test]
fn a_guest_that_never_ends_is_timed_out_with_124() {
    Boot::tiny("hang").timeout_s(3).run().expect_status(124).expect_console("halting for ever");
}
