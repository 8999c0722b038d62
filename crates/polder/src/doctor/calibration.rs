//! The calibration guest: a small loop of kernel-mode code, run for longer and longer until its speed is known.
//!
//! Some hosts have a /dev/kvm that works and emulates kernel-mode code at a million instructions a second. Only measuring tells.

use std::time::{Duration, Instant};

/// Where the guest's code lies, and the address that it stores to.
pub const CODE_START: u64 = 0x10_0000;
pub const DATA_START: u64 = 0x11_0000;
/// The port that the guest writes when the loop is done.
pub const DONE_PORT: u16 = 0x10;
/// Memory that the guest needs.
pub const MEMORY_LEN: u64 = 2 << 20;

/// 32-bit code: `ecx` counts down, `ebx` points to data; then a write to the done port, and once more from the start.
pub const CODE: [u8; 14] = [
    0x01,
    0xc8, // again: add eax, ecx
    0x31,
    0x03, // xor [ebx], eax
    0x83,
    0xe9,
    0x01, // sub ecx, 1
    0x75,
    0xf7, // jnz again
    0xe6,
    DONE_PORT as u8, // out DONE_PORT, al
    0xeb,
    0xf3, // jmp again
    0xf4, // hlt
];
/// Instructions in one turn of the loop.
const INSTRUCTIONS_PER_TURN: u64 = 4;

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
            let instructions = (u64::from(turns) * INSTRUCTIONS_PER_TURN) as f64;
            return Ok(instructions / took.as_secs_f64().max(1e-9));
        }
        turns *= 4;
    }
}
