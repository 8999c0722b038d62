//! Where guest registers are while translated code runs.
//!
//! Twelve live in host registers, most of them in the one of the same name; RCX lives in R9 and RSP in R15, because RCX is scratch (JRCXZ tests it
//! without touching flags) and RSP points at the processor. R9, R10, R11 and R15 stay in memory: compilers use them least.

use super::assembler::{R9, R10, R11, R15, RCX, Reg};

/// Scratch: an address on its way through the look-up.
pub const ADDRESS: Reg = R10;
/// Scratch: the index into a table, then what is to be added to the address.
pub const ADDEND: Reg = R11;
/// Scratch: what is compared, then the note of a page that is stored to.
pub const SPARE: Reg = RCX;

/// The host register that a guest register lives in, or none for those in memory.
pub const fn home(register: u8) -> Option<Reg> {
    match register {
        1 => Some(R9),
        4 => Some(R15),
        9 | 10 | 11 | 15 => None,
        _ => Some(Reg(register)),
    }
}

/// All guest registers in host registers.
pub const HOMES: [(u8, Reg); 12] = [
    (0, Reg(0)),
    (1, R9),
    (2, Reg(2)),
    (3, Reg(3)),
    (4, R15),
    (5, Reg(5)),
    (6, Reg(6)),
    (7, Reg(7)),
    (8, Reg(8)),
    (12, Reg(12)),
    (13, Reg(13)),
    (14, Reg(14)),
];
