//! The calibration guest: a small loop of kernel-mode code, run for longer and longer until its speed is known.
//!
//! Some hosts have a /dev/kvm that works and emulates kernel-mode code at a million instructions a second. Only measuring tells.

use std::time::{Duration, Instant};

use polder_vmm::CalibrationGuest;

const FIRST_TURNS: u32 = 1 << 10;
const LAST_TURNS: u32 = 1 << 24;
/// A run this long gives a speed; the whole calibration takes at most a few times as long.
const LONG_ENOUGH: Duration = Duration::from_millis(8);

/// Instructions per second of whoever runs `run(turns)`: the guest's loop for that many turns.
pub fn measure<E>(mut run: impl FnMut(u32) -> Result<(), E>) -> Result<f64, E> {
    // The first run pays for page faults and the like.
    run(1)?;
    let mut turns = FIRST_TURNS;
    loop {
        let start = Instant::now();
        run(turns)?;
        let took = start.elapsed();
        if took >= LONG_ENOUGH || turns >= LAST_TURNS {
            let instructions = (u64::from(turns) * CalibrationGuest::INSTRUCTIONS_PER_TURN) as f64;
            return Ok(instructions / took.as_secs_f64().max(1e-9));
        }
        turns *= 4;
    }
}
