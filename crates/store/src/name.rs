//! Names of what the store holds: a keyed BLAKE3 hash of the content.
//!
//! Equal content has an equal name inside one naming domain, and so is stored once. Data, tree nodes and nodes are named
//! under different keys: bytes that a guest wrote never pass for a part of the store's own structure.

use std::fmt;
use std::sync::Arc;

use polder_trust::keys::Secret;

/// What a record of the store is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// Bytes of a disk, of memory or of a file.
    Data = 1,
    /// A part of a tree: the names of its children.
    Tree = 2,
    /// A node of an instance's life tree.
    Node = 3,
}

impl Kind {
    pub(crate) fn from_byte(byte: u8) -> Option<Self> {
        [Kind::Data, Kind::Tree, Kind::Node].into_iter().find(|&kind| kind as u8 == byte)
    }
}

/// The name of a record: 256 bits. All zeros names nothing: a part of a disk that reads as zeros.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Name(pub [u8; Name::LEN]);

impl Name {
    pub const LEN: usize = 32;
    /// Bytes of a name that the index keeps.
    pub(crate) const PREFIX_LEN: usize = 12;
    /// Names nothing.
    pub const NONE: Name = Name([0; Name::LEN]);

    pub fn is_none(&self) -> bool {
        *self == Name::NONE
    }

    pub(crate) fn prefix(&self) -> [u8; Name::PREFIX_LEN] {
        let mut prefix = [0; Name::PREFIX_LEN];
        prefix.copy_from_slice(&self.0[..Name::PREFIX_LEN]);
        prefix
    }

    /// The name that 64 hexadecimal digits write.
    pub fn from_hex(text: &str) -> Option<Name> {
        let digits = text.as_bytes();
        if digits.len() != 2 * Name::LEN {
            return None;
        }
        let mut name = Name::NONE;
        for (byte, pair) in name.0.iter_mut().zip(digits.chunks_exact(2)) {
            let digit = |digit: u8| (digit as char).to_digit(16);
            *byte = (digit(pair[0])? << 4 | digit(pair[1])?) as u8;
        }
        Some(name)
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// Gives names inside one domain.
#[derive(Clone)]
pub struct Namer {
    /// Wiped with the last who has them.
    keys: Arc<[Secret; 3]>,
}

impl Namer {
    /// Names under a secret: who does not know it can neither guess names nor learn from them what is stored.
    pub fn new(secret: &[u8; 32]) -> Self {
        let key = |context| Secret::take(&mut blake3::derive_key(context, secret));
        Namer {
            keys: Arc::new([
                key("polder store 2026 name of data"),
                key("polder store 2026 name of a tree"),
                key("polder store 2026 name of a node"),
            ]),
        }
    }

    /// Names that are the same in every store: what two stores hold can be compared.
    pub fn open() -> Self {
        Namer::new(&[0; 32])
    }

    /// The name of `bytes`.
    pub fn name(&self, kind: Kind, bytes: &[u8]) -> Name {
        Name(*blake3::keyed_hash(self.keys[kind as usize - 1].bytes(), bytes).as_bytes())
    }
}

impl fmt::Debug for Namer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Namer")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_depends_on_content_kind_and_domain() {
        let (open, closed) = (Namer::open(), Namer::new(&[7; 32]));
        let name = open.name(Kind::Data, b"water");
        assert_eq!(name, Namer::open().name(Kind::Data, b"water"));
        for other in
            [open.name(Kind::Data, b"land"), open.name(Kind::Tree, b"water"), closed.name(Kind::Data, b"water")]
        {
            assert_ne!(name, other);
        }
        // Part of the format: stores written by earlier releases hold such names.
        assert_eq!(name.to_string(), "8ee7b433c80a8be01c3563d136149b336318e612b2ca57a1970ac6c7ea332ab3");
    }

    #[test]
    fn a_name_is_read_back_from_its_digits() {
        let name = Namer::open().name(Kind::Node, b"dike");
        assert_eq!(Name::from_hex(&name.to_string()), Some(name));
        for text in ["", "00", &"g".repeat(64), &"é".repeat(32)] {
            assert_eq!(Name::from_hex(text), None, "{text}");
        }
    }
}
