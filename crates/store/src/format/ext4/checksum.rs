//! CRC-32C as ext4 uses it: seeded, chained, and not inverted at the end.

/// Goes on from `crc` over `bytes`.
pub(super) fn crc32c(crc: u32, bytes: &[u8]) -> u32 {
    !crc32c::crc32c_append(!crc, bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_check_value_of_the_standard_comes_out() {
        assert_eq!(!crc32c(!0, b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(crc32c(!0, b"12345"), b"6789"), crc32c(!0, b"123456789"));
    }
}
