//! Words that every other crate uses: sizes and clocks.
//!
//! Invariant: no I/O, no environment, no printing. Time reaches decisions only through [`Clock`], so that tests
//! and simulators can inject their own.

mod clock;
mod size;

pub use clock::{Clock, ManualClock, SystemClock};
pub use size::{ByteSize, GIB, KIB, MIB, ParseSizeError};
