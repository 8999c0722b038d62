//! System instructions. (Owner: helper `system`.)

use crate::cpu::Cpu;
use crate::page_walk::Access;

impl Cpu {
    /// Notes that a data access may have met an enabled breakpoint.
    pub fn note_data_breakpoint(&mut self, _linear: u64, _bytes: u64, _access: Access) {}
}
