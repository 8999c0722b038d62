//! Sizes in bytes, as people write them: `512M`, `2G`, `64MiB`.

use std::{fmt, str::FromStr};

/// 2^10 bytes.
pub const KIB: u64 = 1 << 10;
/// 2^20 bytes.
pub const MIB: u64 = 1 << 20;
/// 2^30 bytes.
pub const GIB: u64 = 1 << 30;

/// A number of bytes. Parses binary suffixes K, M, G, T (also `KiB` or `KB`, all powers of 1024); a bare number is bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteSize(pub u64);

/// The text is not a size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a size: write a whole number with an optional suffix K, M, G or T, such as 512M")]
pub struct ParseSizeError {
    text: String,
}

impl FromStr for ByteSize {
    type Err = ParseSizeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParseSizeError { text: text.to_owned() };
        let trimmed = text.trim();
        let digits_len = trimmed.bytes().take_while(u8::is_ascii_digit).count();
        let (digits, suffix) = trimmed.split_at(digits_len);
        let number: u64 = digits.parse().map_err(|_| error())?;
        let shift = match suffix.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 0,
            "k" | "kb" | "kib" => 10,
            "m" | "mb" | "mib" => 20,
            "g" | "gb" | "gib" => 30,
            "t" | "tb" | "tib" => 40,
            _ => return Err(error()),
        };
        number.checked_mul(1 << shift).map(ByteSize).ok_or_else(error)
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, name) in [(GIB * 1024, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")] {
            if self.0 >= unit && self.0.is_multiple_of(unit) {
                return write!(f, "{} {name}", self.0 / unit);
            }
        }
        write!(f, "{} B", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        assert_eq!("512M".parse(), Ok(ByteSize(512 * MIB)));
        assert_eq!("2 GiB".parse(), Ok(ByteSize(2 * GIB)));
        assert_eq!("4096".parse(), Ok(ByteSize(4096)));
        assert_eq!("1k".parse(), Ok(ByteSize(KIB)));
    }

    #[test]
    fn nonsense_and_overflow_are_refused() {
        for text in ["", "G", "-1", "12X", "1.5G", "99999999999999T"] {
            assert!(text.parse::<ByteSize>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_size_prints_in_its_largest_whole_unit() {
        assert_eq!(ByteSize(3 * GIB).to_string(), "3 GiB");
        assert_eq!(ByteSize(1536).to_string(), "1536 B");
    }
}
