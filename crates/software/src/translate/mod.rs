//! Translation: hot guest code becomes host code.
//!
//! Guest and host speak the same instruction set, so most instructions are emitted as themselves, on registers and flags that stay in the
//! host's. What has to be added is the look-up of each memory operand ([`generate`]) and the finding of code behind jumps. Cold code, and everything that
//! is not 64-bit code, is interpreted: an instruction always means what its handler of the interpreter means.
//!
//! A *unit* is translated at a time: the instructions from one address to the first call, return or
//! far jump, inside one page; a jump a little further on is followed. A unit is a
//! function of its bytes, their physical and their linear address, of the data table in use and of which vector and x87 instructions are enabled. Ways out of a unit to known addresses are
//! *links*: jumps that lead into cold code until they are taken for the first time and are then aimed at the other unit. A link out of the
//! page looks whether the target's page is mapped in the address space in use as it was where the target was made ([`bindings`]). Other jumps go through a jump table for the address space.
//!
//! Invariants:
//! - At each instruction's start all guest registers are at home ([`registers`]) and flags are in the host's, so that translated code may be left
//!   at any of them. It is entered at the start of a unit only: what a group has found out holds from its head on.
//! - A cycle of translated code passes a poll: a jump backwards looks at [`frame::Frame::jump_table`], indirect ones and returns index with it.
//! - Translated code touches guest memory through a matching entry of the look-up tables only, and looks at the note after each store.
//! - Units are made and dropped by the vCPU's own thread while it is out of translated code; links are aimed in calls of such code too.
//!
//! Map: `arena` (where the processor lies), `frame` (what translated code keeps there), `registers` (where guest registers are), `assembler`, `thunks` (ways in and out),
//! `cache` (memory for code), `guest_code` (units and live flags), `facts` (about one instruction), `values` (what is known of addresses), `groups` and `steady` (accesses that share a look-up, in a loop for all its rounds), `generate` and `cold` (a unit's host code), `instruction` (which of an instruction's forms), `memory` and `ahead` (look-ups), `jumps`, `stack`, `forms` (instructions emitted as themselves), `x87`, `bits`, `strings`, `processor_state`, `system` (host code for families), `units` and `links` (what is translated), `eviction` (what goes again), `spaces` and `bindings` (how it is found), `fetch` (bytes of code), `copies` and `moves` (units at other addresses), `run`
//! (the loop around), `signal` (exceptions on the host), `lockstep` (each unit compared with the interpreter).

mod ahead;
mod arena;
mod assembler;
#[cfg(test)]
mod binding_tests;
mod bindings;
mod bits;
mod cache;
mod cold;
mod copies;
#[cfg(test)]
mod count_tests;
mod eviction;
#[cfg(test)]
mod eviction_tests;
mod facts;
mod fetch;
mod forms;
mod frame;
mod generate;
mod groups;
mod guest_code;
mod instruction;
mod jumps;
mod links;
mod listing;
mod lockstep;
#[cfg(test)]
mod loop_tests;
mod memory;
#[cfg(test)]
mod move_tests;
mod moves;
mod processor_state;
#[cfg(test)]
mod refill_tests;
mod registers;
#[cfg(test)]
mod return_tests;
mod run;
mod signal;
mod spaces;
mod stack;
mod steady;
mod strings;
mod system;
#[cfg(test)]
mod tests;
mod thunks;
mod units;
mod values;
mod x87;

pub use arena::{ArenaMemory, CpuBox};
pub use frame::{Frame, exit};
pub use run::FUNCTIONS;
pub(crate) use signal::redirect;
pub use units::Translator;
