//! Instruction decode and execution from arbitrary bytes and state, in all modes: no panic, no hang, whatever the guest is.
#![no_main]

use std::cell::RefCell;

use libfuzzer_sys::fuzz_target;
use polder_software::testbench::TestBench;

thread_local! {
    /// One bench for all inputs: each input sets all of the state that it uses.
    static BENCH: RefCell<TestBench> = RefCell::new(TestBench::new());
}

fuzz_target!(|bytes: &[u8]| BENCH.with(|bench| bench.borrow_mut().run_arbitrary(bytes)));
