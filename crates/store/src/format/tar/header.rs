//! The 512 bytes in front of each entry: ustar, GNU and the old form.

/// Bytes of a header, and what everything in an archive is a multiple of.
pub(super) const RECORD_LEN: usize = 512;

/// A checked header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) kind: u8,
    pub(super) path: Vec<u8>,
    pub(super) link: Vec<u8>,
    pub(super) mode: u64,
    pub(super) user: u64,
    pub(super) group: u64,
    pub(super) len: u64,
    pub(super) modified: i64,
    pub(super) major: u64,
    pub(super) minor: u64,
    /// The whole record, for what only one kind of entry has.
    pub(super) record: [u8; RECORD_LEN],
}

/// Reads a number: octal digits, or with the first bit set a big-endian one.
pub(super) fn number(field: &[u8]) -> Option<i64> {
    if field[0] & 0x80 != 0 {
        let negative = field[0] & 0x40 != 0;
        let mut value: i128 = if negative { -1 } else { 0 };
        for (index, byte) in field.iter().enumerate() {
            let byte = match index {
                0 if negative => byte | 0x80,
                0 => byte & 0x7f,
                _ => *byte,
            };
            value = value.checked_mul(256)?.checked_add(i128::from(byte))?;
        }
        return i64::try_from(value).ok();
    }
    let digits: Vec<u8> = field.iter().copied().skip_while(|byte| *byte == b' ').collect();
    let end = digits.iter().position(|byte| matches!(byte, 0 | b' ')).unwrap_or(digits.len());
    digits[..end].iter().try_fold(0_i64, |value, digit| match digit {
        b'0'..=b'7' => value.checked_mul(8)?.checked_add(i64::from(digit - b'0')),
        _ => None,
    })
}

fn text(field: &[u8]) -> &[u8] {
    &field[..field.iter().position(|byte| *byte == 0).unwrap_or(field.len())]
}

impl Header {
    /// Reads a record that is not all zeros; says what is wrong with it.
    pub(super) fn parse(record: &[u8; RECORD_LEN]) -> Result<Header, String> {
        let stated = number(&record[148..156]);
        let sum: i64 = record
            .iter()
            .enumerate()
            .map(|(at, byte)| if (148..156).contains(&at) { 32 } else { i64::from(*byte) })
            .sum();
        if stated != Some(sum) {
            return Err("its checksum is wrong: this is no tar archive, or it is damaged".to_owned());
        }
        let field = |name: &str, bytes: &[u8]| {
            number(bytes)
                .and_then(|value| u64::try_from(value).ok())
                .ok_or_else(|| format!("the field \"{name}\" is no number"))
        };
        let posix = &record[257..263] == b"ustar\0";
        let known = posix || &record[257..263] == b"ustar ";
        let mut path = text(&record[..100]).to_vec();
        let prefix = text(&record[345..500]);
        if posix && !prefix.is_empty() {
            path = [prefix, b"/", &path].concat();
        }
        let kind = record[156];
        let is_device = known && matches!(kind, b'3' | b'4');
        Ok(Header {
            kind,
            path,
            link: text(&record[157..257]).to_vec(),
            mode: field("mode", &record[100..108])?,
            user: field("uid", &record[108..116])?,
            group: field("gid", &record[116..124])?,
            len: field("size", &record[124..136])?,
            modified: number(&record[136..148]).ok_or("the field \"mtime\" is no number")?,
            major: if is_device { field("devmajor", &record[329..337])? } else { 0 },
            minor: if is_device { field("devminor", &record[337..345])? } else { 0 },
            record: *record,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_octal_or_binary() {
        assert_eq!(number(b"0000644\0"), Some(0o644));
        assert_eq!(number(b"   644 \0"), Some(0o644));
        assert_eq!(number(b"        "), Some(0));
        assert_eq!(number(b"\0\0\0\0"), Some(0));
        assert_eq!(number(b"77777777777\0"), Some(0o77777777777));
        assert_eq!(number(b"\x80\0\0\0\0\0\0\x01\0\0\0\0"), Some(1 << 32));
        assert_eq!(number(&[0xff; 12]), Some(-1));
        assert_eq!(number(b"\xbf\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"), None);
        assert_eq!(number(b"12x\0"), None);
        assert_eq!(number(b"-1\0"), None);
    }
}
