//! AAA AAS AAD DAA DAS: decimal adjustments, which no 64-bit host instruction does.

use crate::cpu::{Cpu, RAX};
use crate::flags::ArithmeticFlags;
use crate::op::{Flow, Op};
use crate::ops::alu::{Binary, Or};

const CARRY: u16 = 0x100;
const ADJUST: u16 = 0x1000;

/// SF, ZF and PF of a byte; the others clear.
pub fn sign_zero_parity(value: u8) -> ArithmeticFlags {
    Or::run(value, 0, ArithmeticFlags::default()).1
}

fn adjusts(cpu: &Cpu) -> bool {
    cpu.gpr[RAX] as u8 & 0xf > 9 || cpu.arithmetic.0 & ADJUST != 0
}

/// DAA
pub extern "sysv64" fn daa(cpu: &mut Cpu, _op: &Op) -> Flow {
    decimal(cpu, |al, correction| al.wrapping_add(correction))
}

/// DAS
pub extern "sysv64" fn das(cpu: &mut Cpu, _op: &Op) -> Flow {
    decimal(cpu, |al, correction| al.wrapping_sub(correction))
}

fn decimal(cpu: &mut Cpu, correct: impl Fn(u8, u8) -> u8) -> Flow {
    let old = cpu.gpr[RAX] as u8;
    let low = adjusts(cpu);
    let high = old > 0x99 || cpu.arithmetic.carry();
    // DAS takes a borrow out of the low correction into CF (SDM vol. 2, DAS).
    let borrow = low && correct(0, 6) > 6 && old < 6;
    let mut al = old;
    if low {
        al = correct(al, 6);
    }
    if high {
        al = correct(al, 0x60);
    }
    cpu.set_byte(0, al);
    let carry = if high || borrow { CARRY } else { 0 };
    let adjust = if low { ADJUST } else { 0 };
    cpu.arithmetic = ArithmeticFlags(sign_zero_parity(al).0 & !(CARRY | ADJUST) | carry | adjust);
    Flow::Next
}

/// AAA
pub extern "sysv64" fn aaa(cpu: &mut Cpu, _op: &Op) -> Flow {
    ascii(cpu, 0x106)
}

/// AAS
pub extern "sysv64" fn aas(cpu: &mut Cpu, _op: &Op) -> Flow {
    ascii(cpu, 0x106u16.wrapping_neg())
}

fn ascii(cpu: &mut Cpu, correction: u16) -> Flow {
    let mut ax = cpu.gpr[RAX] as u16;
    let flags = if adjusts(cpu) {
        ax = ax.wrapping_add(correction);
        CARRY | ADJUST
    } else {
        0
    };
    ax &= 0xff0f;
    cpu.set_word(RAX as u8, ax);
    cpu.arithmetic = ArithmeticFlags(sign_zero_parity(ax as u8).0 & !(CARRY | ADJUST) | flags);
    Flow::Next
}

/// AAD: AL is AH times the immediate plus AL.
pub extern "sysv64" fn aad(cpu: &mut Cpu, op: &Op) -> Flow {
    let ax = cpu.gpr[RAX] as u16;
    let al = (ax as u8).wrapping_add(((ax >> 8) as u8).wrapping_mul(op.immediate as u8));
    cpu.set_word(RAX as u8, u16::from(al));
    cpu.arithmetic = sign_zero_parity(al);
    Flow::Next
}
