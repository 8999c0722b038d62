//! Promise: boots in a row all reach their end, and a machine's memory outside guest RAM stays within its bound; idle vCPUs cost next to nothing.

mod idle;

use polder_tests::{Boot, Kernel, Monitor, Scratch, nightly};

/// Boots in a row: half of them with four vCPUs.
const BOOTS: u32 = 6;
const BOOTS_NIGHTLY: u32 = 100;
/// Resident memory of the process that is not guest RAM: the binary, the block cache of each vCPU, queues and stacks.
const OUTSIDE_BYTES_MAX: u64 = 512 << 20;

#[test]
fn boots_in_a_row_all_reach_their_prompt_within_the_memory_bound() {
    let scratch = Scratch::new();
    let stats = scratch.path().join("stats.json");
    let boots = if nightly() { BOOTS_NIGHTLY } else { BOOTS };
    for boot in 1..=boots {
        let cpus = if boot % 2 == 0 { 4 } else { 1 };
        // The shell's prompt is what a user sees: the commands are typed at it, and their result must be right.
        let outcome = Boot::linux(Kernel::Cloud, "")
            .cpus(cpus)
            .answer("/ # ", "echo answer-$((6*7)); seq 1 1000 | sha256sum | cut -c1-16\n")
            .answer("67d4ff71d43921d5", "exit\n")
            .stats(&stats)
            .timeout_s(300)
            .run();
        outcome.expect_status(0).expect_console("answer-42").expect_console("67d4ff71d43921d5");
        assert_eq!(outcome.ready("cpus"), cpus.to_string(), "boot {boot} of {boots}");
        if Monitor::chosen() == Monitor::Polder {
            let text = std::fs::read_to_string(&stats).expect("--stats writes its file");
            let facts: serde_json::Value = serde_json::from_str(&text).expect("--stats writes JSON");
            let outside = facts["memory"]["outside_guest_ram_bytes_max"].as_u64().expect("the bytes outside guest RAM");
            assert!(outside <= OUTSIDE_BYTES_MAX, "boot {boot}: {outside} bytes outside guest RAM");
        }
    }
}

#[test]
fn a_run_counts_what_it_did() {
    let scratch = Scratch::new();
    let stats = scratch.path().join("stats.json");
    Boot::linux(Kernel::Cloud, "true").stats(&stats).timeout_s(300).run().expect_status(0);
    let text = std::fs::read_to_string(&stats).expect("--stats writes its file");
    let facts: serde_json::Value = serde_json::from_str(&text).expect("--stats writes JSON");
    let time = |name: &str| facts["times"][name].as_u64().unwrap_or_else(|| panic!("no {name} in {text}"));
    let order = ["process_start_ns", "vmm_ready_ns", "first_vcpu_entry_ns", "first_user_instruction_ns", "end_ns"];
    assert!(order.map(time).is_sorted(), "times are not in order: {text}");
    let instructions = facts["counters"]["instructions"].as_u64().expect("instructions are counted");
    assert!(instructions > 10_000_000, "a kernel boots with more than {instructions} instructions");
    let counter = |name: &str| facts["counters"][name].as_u64().unwrap_or_else(|| panic!("no {name} in {text}"));
    let activities = ["interpreter_ns", "translator_ns", "translated_ns", "devices_ns", "asleep_ns", "engine_ns"];
    let sum: u64 = activities.map(counter).iter().sum();
    let ran = time("end_ns") - time("first_vcpu_entry_ns");
    assert!(sum <= ran && sum > ran / 2, "{sum} ns of {ran} are accounted for: {text}");
    let exits = ["exit_link", "exit_indirect", "exit_interpret", "exit_attention", "exit_callout"].map(counter);
    assert!(counter("translated_units") == 0 || exits.iter().all(|&count| count > 0), "{text}");
}
