//! Instruction decode and execution from arbitrary bytes and state, in all modes: no panic, no hang, whatever the guest is. Interpreted, then translated
//! and compared with the interpreter unit by unit.
#![no_main]

use std::cell::RefCell;

use libfuzzer_sys::fuzz_target;
use polder_software::testbench::TestBench;

/// The benches' processors lie in mapped memory, where the leak sanitizer does not look for what they hold.
#[unsafe(no_mangle)]
extern "C" fn __lsan_is_turned_off() -> i32 {
    1
}

thread_local! {
    /// One bench for all inputs: each input sets all of the state that it uses.
    static BENCH: RefCell<TestBench> = RefCell::new(TestBench::new());
    static LOCKSTEP: RefCell<Option<TestBench>> = RefCell::new(TestBench::in_lockstep());
}

fuzz_target!(|bytes: &[u8]| {
    BENCH.with(|bench| bench.borrow_mut().run_arbitrary(bytes));
    LOCKSTEP.with(|bench| {
        if let Some(bench) = bench.borrow_mut().as_mut() {
            bench.run_arbitrary(bytes);
            assert!(bench.lockstep().1.is_empty(), "{:#?}", bench.lockstep().1);
        }
    });
});
