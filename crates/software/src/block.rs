//! Blocks of ops. (Owner: helper `integer`.)

use crate::cpu::Cpu;

impl Cpu {
    /// Makes the block that is running end after the current instruction: its bytes may have changed.
    pub fn abandon_block(&mut self) {}
}
