//! Random bytes as guests in all modes: nothing panics, nothing hangs.
//!
//! `POLDER_SEED` takes a run back, `POLDER_CASES` sets the number of guests, `POLDER_CASE` runs a single one of the seed. The coverage-guided
//! form of the same is the fuzz target `instructions`.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use polder_software::CODE_CACHE_BYTES_DEFAULT;
use polder_software::testbench::TestBench;

/// Guests of the fast slice.
const CASES: u64 = 20_000;
/// Guests of the nightly form.
const NIGHTLY_CASES: u64 = 500_000;
/// A guest of a few hundred steps that takes longer hangs.
const HANG: Duration = Duration::from_secs(60);

fn number_from(name: &str) -> Option<u64> {
    std::env::var(name).ok().and_then(|text| {
        let text = text.trim();
        text.strip_prefix("0x").map_or_else(|| text.parse().ok(), |hex| u64::from_str_radix(hex, 16).ok())
    })
}

/// SplitMix64
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

/// Bytes for one guest: uniform ones, with stretches of the escape bytes and prefixes that lead to rarer instructions.
fn guest(seed: u64) -> Vec<u8> {
    const LEADING: [u8; 16] =
        [0x0f, 0x0f, 0x66, 0xf2, 0xf3, 0xc4, 0xc5, 0x48, 0x67, 0x65, 0xf0, 0xd9, 0xdd, 0x8e, 0xcf, 0x9a];
    let mut state = seed;
    let len = 200 + next(&mut state) % 500;
    (0..len)
        .map(|_| {
            let random = next(&mut state);
            if random >> 32 & 7 == 0 { LEADING[(random >> 40) as usize & 15] } else { random as u8 }
        })
        .collect()
}

#[test]
fn arbitrary_bytes_in_all_modes_neither_panic_nor_hang() {
    run(TestBench::new(), 1);
}

#[test]
fn arbitrary_bytes_translated_before_they_run_neither_panic_nor_hang() {
    match TestBench::translating(CODE_CACHE_BYTES_DEFAULT) {
        Some(bench) => run(bench, 2),
        None => println!("the host lacks what translated code uses: not applicable"),
    }
}

#[test]
fn arbitrary_bytes_do_the_same_translated_and_interpreted() {
    match TestBench::in_lockstep() {
        Some(bench) => run(bench, 2),
        None => println!("the host lacks what translated code uses: not applicable"),
    }
}

/// Runs the guests, or a part of them.
fn run(mut bench: TestBench, part: u64) {
    let seed = number_from("POLDER_SEED").unwrap_or_else(|| {
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(1, |now| now.as_secs())
    });
    let nightly = std::env::var_os("POLDER_TEST_NIGHTLY").is_some();
    let cases = number_from("POLDER_CASES").unwrap_or(if nightly { NIGHTLY_CASES } else { CASES }) / part;
    println!("POLDER_SEED={seed:#x}, {cases} cases");
    let progress = Arc::new(AtomicU64::new(0));
    let watched = progress.clone();
    let (done, is_done) = std::sync::mpsc::channel::<()>();
    let watchdog = std::thread::spawn(move || {
        let mut before = u64::MAX;
        while is_done.recv_timeout(HANG) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            let now = watched.load(Ordering::Relaxed);
            if now == before {
                eprintln!("hangs: POLDER_SEED={seed:#x} POLDER_CASE={now}");
                std::process::abort();
            }
            before = now;
        }
    });
    for case in number_from("POLDER_CASE").map_or(0..cases, |case| case..case + 1) {
        progress.store(case, Ordering::Relaxed);
        let bytes = guest(seed.wrapping_add(case.wrapping_mul(0xd134_2543_de82_ef95)));
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| bench.run_arbitrary(&bytes)));
        assert!(result.is_ok(), "panics: POLDER_SEED={seed:#x} POLDER_CASE={case}");
        let (_, differences) = bench.lockstep();
        assert!(differences.is_empty(), "differs: POLDER_SEED={seed:#x} POLDER_CASE={case}: {differences:#?}");
    }
    if let (units @ 1.., _) = bench.lockstep() {
        println!("{units} units compared");
    }
    drop(done);
    assert!(watchdog.join().is_ok());
}
