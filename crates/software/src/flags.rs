//! Arithmetic flags, captured from the host CPU.
//!
//! Handlers of arithmetic instructions execute the same instruction on the host and take its flags with `lahf; seto al`: AH is
//! SF ZF - AF - PF - CF, AL is OF. Flags that the manuals leave undefined thus come out as the host has them.

/// SF, ZF, AF, PF, CF in the high byte (as LAHF puts them into AH), OF in bit 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub struct ArithmeticFlags(pub u16);

impl Default for ArithmeticFlags {
    fn default() -> Self {
        ArithmeticFlags(0x0200)
    }
}

/// RFLAGS bits.
pub const CF: u64 = 1 << 0;
pub const PF: u64 = 1 << 2;
pub const AF: u64 = 1 << 4;
pub const ZF: u64 = 1 << 6;
pub const SF: u64 = 1 << 7;
pub const TF: u64 = 1 << 8;
pub const IF: u64 = 1 << 9;
pub const DF: u64 = 1 << 10;
pub const OF: u64 = 1 << 11;
pub const IOPL: u64 = 3 << 12;
pub const NT: u64 = 1 << 14;
pub const RF: u64 = 1 << 16;
pub const VM: u64 = 1 << 17;
pub const AC: u64 = 1 << 18;
pub const VIF: u64 = 1 << 19;
pub const VIP: u64 = 1 << 20;
pub const ID: u64 = 1 << 21;
/// The six arithmetic flags.
pub const ARITHMETIC: u64 = CF | PF | AF | ZF | SF | OF;
/// The flags that exist and are not arithmetic.
pub const SYSTEM: u64 = TF | IF | DF | IOPL | NT | RF | VM | AC | VIF | VIP | ID;

impl ArithmeticFlags {
    /// Takes the six arithmetic flags out of an RFLAGS image.
    #[inline(always)]
    pub fn from_rflags(rflags: u64) -> Self {
        ArithmeticFlags(((rflags & 0xd5) as u16 | 2) << 8 | (rflags >> 11 & 1) as u16)
    }

    /// The six flags at their places in RFLAGS.
    #[inline(always)]
    pub fn to_rflags(self) -> u64 {
        u64::from(self.0 >> 8 & 0xd5) | u64::from(self.0 & 1) << 11
    }

    #[inline(always)]
    pub fn carry(self) -> bool {
        self.0 & 0x100 != 0
    }

    #[inline(always)]
    pub fn parity(self) -> bool {
        self.0 & 0x400 != 0
    }

    #[inline(always)]
    pub fn zero(self) -> bool {
        self.0 & 0x4000 != 0
    }

    #[inline(always)]
    pub fn sign(self) -> bool {
        self.0 & 0x8000 != 0
    }

    #[inline(always)]
    pub fn overflow(self) -> bool {
        self.0 & 1 != 0
    }

    /// Evaluates an x86 condition code (the low four bits of Jcc's opcode).
    #[inline(always)]
    pub fn condition(self, code: u8) -> bool {
        let value = match code >> 1 & 7 {
            0 => self.overflow(),
            1 => self.carry(),
            2 => self.zero(),
            3 => self.0 & 0x4100 != 0,
            4 => self.sign(),
            5 => self.parity(),
            6 => self.sign() != self.overflow(),
            _ => self.zero() || self.sign() != self.overflow(),
        };
        value != (code & 1 != 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_survive_the_way_through_rflags() {
        for bits in 0..64u64 {
            let rflags = (0..6).zip([CF, PF, AF, ZF, SF, OF]).filter(|(i, _)| bits >> i & 1 != 0).map(|(_, f)| f).sum();
            assert_eq!(ArithmeticFlags::from_rflags(rflags).to_rflags(), rflags);
        }
    }

    #[test]
    fn conditions_follow_the_manual() {
        let less = ArithmeticFlags::from_rflags(SF);
        assert!(less.condition(0xc) && !less.condition(0xd) && less.condition(0xe));
        let equal = ArithmeticFlags::from_rflags(ZF);
        assert!(equal.condition(4) && equal.condition(6) && equal.condition(0xe) && !equal.condition(0xf));
        let below = ArithmeticFlags::from_rflags(CF);
        assert!(below.condition(2) && below.condition(6) && !below.condition(7));
    }
}
