//! Ids of stores, volumes and snapshots: 128 random bits.

use std::fmt;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Id(pub [u8; 16]);

impl Id {
    /// An id that nothing else has.
    pub fn random() -> Self {
        let mut bytes = [0; 16];
        let mut filled = 0;
        while filled < bytes.len() {
            match rustix::rand::getrandom(&mut bytes[filled..], rustix::rand::GetRandomFlags::empty()) {
                Ok(len) => filled += len,
                // Interrupted before the host's generator was ready.
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => unreachable!("every Linux since 3.17 gives random bytes: {error}"),
            }
        }
        Id(bytes)
    }

    /// The id that 32 hexadecimal digits write.
    pub fn from_hex(text: &str) -> Option<Id> {
        let value = u128::from_str_radix(text, 16).ok()?;
        (text.len() == 32 && !text.starts_with('+')).then(|| Id(value.to_be_bytes()))
    }
}

impl fmt::Display for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

impl fmt::Debug for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}
