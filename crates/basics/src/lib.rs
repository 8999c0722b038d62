//! Words that every other crate uses: sizes, clocks, and the protocol between host and agent.
//!
//! Invariant: no I/O, no environment, no printing. Time reaches decisions only through [`Clock`], so that tests
//! and simulators can inject their own.

pub mod agent_protocol;
mod clock;
mod size;

pub use clock::{Clock, ManualClock, SystemClock};
pub use size::{ByteSize, GIB, KIB, MIB, ParseSizeError};
