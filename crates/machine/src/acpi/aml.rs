//! A small builder of AML, the byte code of ACPI's definition blocks (ACPI 6.5, chapter 20).
//!
//! Terms are byte strings; a function makes each. Only what `dsdt` says is here. Its input is our own constants, so a name
//! that cannot be encoded is a bug and asserts.

/// Encoded AML.
pub type Aml = Vec<u8>;

const ZERO: u8 = 0x00;
const ONE: u8 = 0x01;
const BYTE_PREFIX: u8 = 0x0a;
const WORD_PREFIX: u8 = 0x0b;
const DWORD_PREFIX: u8 = 0x0c;
const STRING_PREFIX: u8 = 0x0d;
const QWORD_PREFIX: u8 = 0x0e;
const NAME: u8 = 0x08;
const SCOPE: u8 = 0x10;
const BUFFER: u8 = 0x11;
const PACKAGE: u8 = 0x12;
const METHOD: u8 = 0x14;
const DUAL_NAME: u8 = 0x2e;
const MULTI_NAME: u8 = 0x2f;
const EXTENDED: u8 = 0x5b;
const EXTENDED_REGION: u8 = 0x80;
const EXTENDED_FIELD: u8 = 0x81;
const EXTENDED_DEVICE: u8 = 0x82;
const LOCAL0: u8 = 0x60;
const ARG0: u8 = 0x68;
const STORE: u8 = 0x70;
const AND: u8 = 0x7b;
const NOTIFY: u8 = 0x86;
const IF: u8 = 0xa0;
const RETURN: u8 = 0xa4;

/// Wraps `body` in its opcode and package length (ACPI 6.5, 20.2.4).
fn packaged(opcode: &[u8], body: &[u8]) -> Aml {
    let mut aml = opcode.to_vec();
    // The length counts its own bytes.
    if body.len() + 1 < 0x40 {
        aml.push(body.len() as u8 + 1);
    } else {
        let extra = (1..=3usize).find(|extra| body.len() + extra + 1 < 1 << (4 + 8 * extra));
        let extra = extra.expect("a term is shorter than 256 MiB");
        let len = body.len() + extra + 1;
        aml.push((extra as u8) << 6 | (len & 0xf) as u8);
        aml.extend_from_slice(&(len >> 4).to_le_bytes()[..extra]);
    }
    aml.extend_from_slice(body);
    aml
}

/// A name path such as `\_SB_.PCI0` or `_CRS`; segments shorter than four characters are filled with underscores.
pub fn path(text: &str) -> Aml {
    let (root, rest) = match text.strip_prefix('\\') {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let segments: Vec<[u8; 4]> = rest.split('.').filter(|segment| !segment.is_empty()).map(segment).collect();
    let mut aml = Vec::new();
    if root {
        aml.push(b'\\');
    }
    match segments.len() {
        0 => aml.push(ZERO),
        1 => {}
        2 => aml.push(DUAL_NAME),
        count => aml.extend([MULTI_NAME, count as u8]),
    }
    segments.iter().for_each(|segment| aml.extend(segment));
    aml
}

fn segment(text: &str) -> [u8; 4] {
    let legal = |byte: u8| byte == b'_' || byte.is_ascii_uppercase() || byte.is_ascii_digit();
    assert!(
        text.len() <= 4 && text.bytes().all(legal) && !text.as_bytes()[0].is_ascii_digit(),
        "{text} is an AML name"
    );
    let mut segment = [b'_'; 4];
    segment[..text.len()].copy_from_slice(text.as_bytes());
    segment
}

/// An integer constant in its shortest form.
pub fn integer(value: u64) -> Aml {
    match value {
        0 => vec![ZERO],
        1 => vec![ONE],
        2..=0xff => vec![BYTE_PREFIX, value as u8],
        0x100..=0xffff => [&[WORD_PREFIX][..], &(value as u16).to_le_bytes()].concat(),
        0x1_0000..=0xffff_ffff => [&[DWORD_PREFIX][..], &(value as u32).to_le_bytes()].concat(),
        _ => [&[QWORD_PREFIX][..], &value.to_le_bytes()].concat(),
    }
}

/// A string constant.
pub fn string(text: &str) -> Aml {
    assert!(text.is_ascii() && !text.contains('\0'), "AML strings are ASCII");
    [&[STRING_PREFIX][..], text.as_bytes(), &[0]].concat()
}

/// An EISA id such as `PNP0A08` as the integer that `_HID` takes (ACPI 6.5, 19.6.36).
pub fn eisa_id(text: &str) -> Aml {
    let bytes = text.as_bytes();
    assert!(bytes.len() == 7 && bytes[..3].iter().all(u8::is_ascii_uppercase), "{text} is an EISA id");
    let letters = bytes[..3].iter().fold(0u32, |value, byte| value << 5 | u32::from(byte - 0x40));
    let digits = u32::from_str_radix(&text[3..], 16).expect("an EISA id ends with four hexadecimal digits");
    integer((letters << 16 | digits).swap_bytes().into())
}

/// A buffer of bytes.
pub fn buffer(bytes: &[u8]) -> Aml {
    packaged(&[BUFFER], &[integer(bytes.len() as u64), bytes.to_vec()].concat())
}

/// A package of terms, at most 255.
pub fn package(terms: &[Aml]) -> Aml {
    let count = u8::try_from(terms.len()).expect("a package has at most 255 elements");
    packaged(&[PACKAGE], &[vec![count], terms.concat()].concat())
}

/// `Name (name, value)`.
pub fn name(name: &str, value: Aml) -> Aml {
    [vec![NAME], path(name), value].concat()
}

/// `Scope (name) { terms }`.
pub fn scope(name: &str, terms: &[Aml]) -> Aml {
    packaged(&[SCOPE], &[path(name), terms.concat()].concat())
}

/// `Device (name) { terms }`.
pub fn device(name: &str, terms: &[Aml]) -> Aml {
    packaged(&[EXTENDED, EXTENDED_DEVICE], &[path(name), terms.concat()].concat())
}

/// Whether a method may run on several processors at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Serialize {
    No,
    Yes,
}

/// `Method (name, arguments, serialize) { terms }`.
pub fn method(name: &str, arguments: u8, serialize: Serialize, terms: &[Aml]) -> Aml {
    let flags = arguments & 7 | u8::from(serialize == Serialize::Yes) << 3;
    packaged(&[METHOD], &[path(name), vec![flags], terms.concat()].concat())
}

/// The address space of an operation region (ACPI 6.5, table 5.150).
#[derive(Debug, Clone, Copy)]
pub enum Space {
    Memory = 0,
    Io = 1,
}

/// `OperationRegion (name, space, start, len)`.
pub fn operation_region(name: &str, space: Space, start: u64, len: u64) -> Aml {
    [vec![EXTENDED, EXTENDED_REGION], path(name), vec![space as u8], integer(start), integer(len)].concat()
}

/// The width of a field's accesses.
#[derive(Debug, Clone, Copy)]
pub enum Access {
    Byte = 1,
    Dword = 3,
}

/// `Field (region, access, NoLock, WriteAsZeros) { (name, bits), ... }`.
pub fn field(region: &str, access: Access, fields: &[(&str, u8)]) -> Aml {
    const WRITE_AS_ZEROS: u8 = 2 << 5;
    let mut body = [path(region), vec![access as u8 | WRITE_AS_ZEROS]].concat();
    for &(name, bits) in fields {
        body.extend(segment(name));
        // A field's length is encoded like a package length; less than 64 bits fit one byte.
        assert!(bits < 64, "fields are short");
        body.push(bits);
    }
    packaged(&[EXTENDED, EXTENDED_FIELD], &body)
}

/// Local variable 0 to 7.
pub fn local(index: u8) -> Aml {
    vec![LOCAL0 + (index & 7)]
}

/// Argument 0 to 6.
pub fn argument(index: u8) -> Aml {
    vec![ARG0 + index.min(6)]
}

/// `Store (value, target)`.
pub fn store(value: Aml, target: Aml) -> Aml {
    [vec![STORE], value, target].concat()
}

/// `And (left, right)`, the result unstored.
pub fn and(left: Aml, right: Aml) -> Aml {
    [vec![AND], left, right, vec![ZERO]].concat()
}

/// `If (predicate) { terms }`.
pub fn if_then(predicate: Aml, terms: &[Aml]) -> Aml {
    packaged(&[IF], &[predicate, terms.concat()].concat())
}

/// `Notify (object, value)`.
pub fn notify(object: &str, value: u64) -> Aml {
    [vec![NOTIFY], path(object), integer(value)].concat()
}

/// `Return (value)`.
pub fn return_value(value: Aml) -> Aml {
    [vec![RETURN], value].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn package_lengths_count_themselves() {
        assert_eq!(packaged(&[SCOPE], &[0; 62])[..2], [SCOPE, 63]);
        assert_eq!(packaged(&[SCOPE], &[0; 63])[..3], [SCOPE, 0x41, 4]);
        assert_eq!(packaged(&[SCOPE], &[0; 0x1000])[..4], [SCOPE, 0x83, 0x00, 0x01]);
    }

    #[test]
    fn names_and_ids_are_encoded_as_the_manual_says() {
        assert_eq!(path("\\"), b"\\\0");
        assert_eq!(path("_SB.PCI0"), b"\x2e_SB_PCI0");
        assert_eq!(path("\\_SB.PCI0.COM1"), b"\\\x2f\x03_SB_PCI0COM1");
        assert_eq!(eisa_id("PNP0A08"), [DWORD_PREFIX, 0x41, 0xd0, 0x0a, 0x08]);
    }
}
