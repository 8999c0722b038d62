//! A small generator of random numbers with a taste for the ends of ranges.

/// SplitMix64: each case has a generator of its own, so one case can be run alone.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Random(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// A number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// True in `percent` of all cases.
    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// A 64-bit value: often an end of a range, a small number or a floating-point oddity.
    pub fn value(&mut self) -> u64 {
        const ODD: [u64; 16] = [
            0,
            u64::MAX,
            1,
            0x8000_0000_0000_0000,
            0x7fff_ffff_ffff_ffff,
            0x8000_0000,
            0x7fff_ffff,
            0xffff_ffff,
            0x3ff0_0000_0000_0000,
            0x7ff0_0000_0000_0000,
            0xfff8_0000_0000_0000,
            0x7ff0_0000_0000_0001,
            0x0000_0000_0000_0001,
            0x3f80_0000_3f80_0000,
            0x7f80_0001_ff80_0000,
            0x0000_0001_8000_0001,
        ];
        match self.below(8) {
            0 | 1 => self.pick(&ODD),
            2 => self.below(256),
            3 => self.below(256).wrapping_neg(),
            // Numbers of moderate size, as doubles and as pairs of floats.
            4 => ((self.below(2000) as f64 - 1000.0) / 8.0).to_bits(),
            5 => {
                let mut float = || u64::from(((self.below(2000) as f32 - 1000.0) / 8.0).to_bits());
                float() | float() << 32
            }
            _ => self.next(),
        }
    }

    /// 10 bytes of an x87 register, sometimes ones that no instruction makes.
    pub fn x87_value(&mut self) -> [u8; 10] {
        let exponent = match self.below(8) {
            0 => 0,
            1 => 0x7fff,
            2 => self.next() as u16 & 0x7fff,
            _ => 0x3fff - 40 + self.below(80) as u16,
        };
        let mut mantissa = match self.below(4) {
            0 => self.pick(&[0, 1, 1 << 63, 3 << 62, u64::MAX, 1 << 63 | 1]),
            _ => self.next(),
        };
        if exponent != 0 && !self.chance(3) {
            mantissa |= 1 << 63;
        }
        if exponent == 0 && !self.chance(10) {
            mantissa = if self.chance(70) { 0 } else { mantissa & !(1 << 63) };
        }
        let mut bytes = [0; 10];
        bytes[..8].copy_from_slice(&mantissa.to_le_bytes());
        bytes[8..].copy_from_slice(&(exponent | (self.next() as u16 & 0x8000)).to_le_bytes());
        bytes
    }
}
