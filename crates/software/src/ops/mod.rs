//! Handlers of the general-purpose instructions.
//!
//! A handler is a function generic over the operation, the operand's width and the operands' form, so that each instance is a
//! few host instructions. Arithmetic is executed by the same host instruction in inline assembly; its flags are the host's.

#[cfg(test)]
pub(crate) mod against_host;
pub mod alu;
pub mod atomic;
pub mod bits;
pub mod branch;
pub mod decimal;
pub mod misc;
pub mod movement;
pub mod multiply;
pub mod operand;
pub mod shift;
pub mod stack;
pub mod string;
#[cfg(test)]
mod tests;
