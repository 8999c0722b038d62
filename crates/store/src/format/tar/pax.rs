//! The records of extended headers (POSIX.1-2001, pax): what does not fit into a header.

use super::super::ext4::Time;
use super::sparse::SparseMap;

/// Extended attributes of one entry, at most: more than a block of ext4 has room for.
const XATTRS_MAX: usize = 256;

/// What extended headers say of one entry.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Records {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    pub(super) len: Option<u64>,
    pub(super) user: Option<u64>,
    pub(super) group: Option<u64>,
    pub(super) modified: Option<Time>,
    pub(super) accessed: Option<Time>,
    pub(super) changed: Option<Time>,
    pub(super) major: Option<u64>,
    pub(super) minor: Option<u64>,
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
    /// An access control list in words, whose names only the machine that wrote them can read.
    pub(super) has_acl_text: bool,
    pub(super) sparse: Sparse,
}

/// What GNU tar says of a file with holes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Sparse {
    pub(super) name: Option<Vec<u8>>,
    pub(super) real_len: Option<u64>,
    /// The map lies in front of the content.
    pub(super) map_in_content: bool,
    pub(super) map: SparseMap,
    /// The offset whose length has not come yet.
    offset: Option<u64>,
}

fn decimal(value: &[u8]) -> Option<u64> {
    std::str::from_utf8(value).ok()?.parse().ok()
}

/// Seconds with a fraction, possibly negative.
fn time(value: &[u8]) -> Option<Time> {
    let text = std::str::from_utf8(value).ok()?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let seconds: i64 = whole.parse().ok()?;
    if !fraction.bytes().all(|digit| digit.is_ascii_digit()) {
        return None;
    }
    let digits: String = fraction.chars().chain("000000000".chars()).take(9).collect();
    let nanoseconds: u32 = digits.parse().ok()?;
    if whole.starts_with('-') && nanoseconds > 0 {
        return Some(Time { seconds: seconds.checked_sub(1)?, nanoseconds: 1_000_000_000 - nanoseconds });
    }
    Some(Time { seconds, nanoseconds })
}

impl Records {
    /// Adds the records of a header to those that are known; says which is wrong.
    pub(super) fn add(&mut self, mut bytes: &[u8]) -> Result<(), String> {
        let mut index = 0;
        while !bytes.is_empty() {
            let wrong = || format!("record {index} of its extended header is damaged");
            let space = bytes.iter().take(21).position(|byte| *byte == b' ').ok_or_else(wrong)?;
            let len = decimal(&bytes[..space]).and_then(|len| usize::try_from(len).ok()).ok_or_else(wrong)?;
            let record = bytes.get(space + 1..len).ok_or_else(wrong)?;
            let (last, record) = record.split_last().ok_or_else(wrong)?;
            let equals = record.iter().position(|byte| *byte == b'=').ok_or_else(wrong)?;
            if *last != b'\n' {
                return Err(wrong());
            }
            let (key, value) = (&record[..equals], &record[equals + 1..]);
            self.set(key, value).ok_or_else(|| {
                let key = super::super::error::printable(key);
                format!("record {index} of its extended header says nothing sensible of {key}")
            })?;
            bytes = &bytes[len..];
            index += 1;
        }
        Ok(())
    }

    fn set(&mut self, key: &[u8], value: &[u8]) -> Option<()> {
        // Without a value a record takes an earlier one back.
        let given = !value.is_empty();
        let bytes = || given.then(|| value.to_vec());
        let number = || if given { decimal(value).map(Some) } else { Some(None) };
        let moment = || if given { time(value).map(Some) } else { Some(None) };
        match key {
            b"path" => self.path = bytes(),
            b"linkpath" => self.link = bytes(),
            b"size" => self.len = number()?,
            b"uid" => self.user = number()?,
            b"gid" => self.group = number()?,
            b"mtime" => self.modified = moment()?,
            b"atime" => self.accessed = moment()?,
            b"ctime" => self.changed = moment()?,
            b"SCHILY.devmajor" => self.major = number()?,
            b"SCHILY.devminor" => self.minor = number()?,
            b"SCHILY.acl.access" | b"SCHILY.acl.default" => self.has_acl_text |= given,
            b"GNU.sparse.name" => self.sparse.name = bytes(),
            b"GNU.sparse.realsize" | b"GNU.sparse.size" => self.sparse.real_len = number()?,
            b"GNU.sparse.major" => self.sparse.map_in_content = value == b"1",
            b"GNU.sparse.offset" => self.sparse.offset = Some(decimal(value)?),
            b"GNU.sparse.numbytes" => self.sparse.map.push(self.sparse.offset.take()?, decimal(value)?)?,
            b"GNU.sparse.map" => {
                let numbers: Option<Vec<u64>> = value.split(|byte| *byte == b',').map(decimal).collect();
                for pair in numbers?.chunks(2) {
                    self.sparse.map.push(pair[0], *pair.get(1)?)?;
                }
            }
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    self.xattrs.retain(|(present, _)| present != name);
                    if self.xattrs.len() >= XATTRS_MAX {
                        return None;
                    }
                    self.xattrs.push((name.to_vec(), value.to_vec()));
                }
            }
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_fractions_and_may_lie_before_1970() {
        assert_eq!(time(b"12.5"), Some(Time { seconds: 12, nanoseconds: 500_000_000 }));
        assert_eq!(time(b"-1.25"), Some(Time { seconds: -2, nanoseconds: 750_000_000 }));
        assert_eq!(time(b"1.0000000019"), Some(Time { seconds: 1, nanoseconds: 1 }));
        assert_eq!((time(b"1.x"), time(b"x")), (None, None));
    }

    #[test]
    fn damaged_records_are_refused() {
        let mut good = Records::default();
        good.add(b"12 path=abc\n17 path=abc=de\nf\n").unwrap();
        assert_eq!(good.path.as_deref(), Some(&b"abc=de\nf"[..]));
        for bad in
            [&b"x"[..], b"3 a", b"99999999999999999999999 path=a\n", b"11 path=abc\n", b"0 path=a\n", b"12 uid=abcd\n"]
        {
            assert!(Records::default().add(bad).is_err(), "{}", String::from_utf8_lossy(bad));
        }
    }
}
