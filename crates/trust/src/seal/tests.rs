use std::num::NonZeroU8;

use proptest::prelude::*;

use super::*;

const LZ4: Form = Form::Encoded(NonZeroU8::MIN);
const HEADER: &[u8] = b"a record's header";

fn domain(byte: u8) -> Secret {
    Secret::take(&mut [byte; SECRET_BYTES])
}

/// As whoever stores chunks may name them.
fn name(domain: &Secret, chunk: &[u8]) -> ChunkName {
    *blake3::keyed_hash(&blake3::derive_key("polder store chunk names 1", domain.bytes()), chunk).as_bytes()
}

fn chunk() -> Vec<u8> {
    (0..16384u32).map(|at| ((at * at) >> 7) as u8).collect()
}

/// Hexadecimal digits of the first and the last bytes, which depend on all others.
fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The payload sealed, and its seal.
fn sealed(cipher: &ChunkCipher, name: &ChunkName, form: Form, payload: &[u8]) -> (Vec<u8>, Seal) {
    let mut bytes = payload.to_vec();
    let seal = cipher.seal(name, form, HEADER, &mut bytes);
    (bytes, seal)
}

/// If this fails the format has changed: stores that exist could no longer be read. A new format needs new contexts.
#[test]
fn the_format_of_sealed_chunks_is_as_it_was() {
    let domain = domain(0x11);
    let chunk = chunk();
    let name = name(&domain, &chunk);
    assert_eq!(hex(&name), "2117c09184c1ecbfcddea68dd62cd1aa11cd1772f87b1a97068d6877912ffeff");
    let cipher = ChunkCipher::of(&domain);
    let (bytes, seal) = sealed(&cipher, &name, Form::Whole, &chunk);
    assert_eq!(hex(&bytes[16368..]), "6bc35086bd3c77b57c57b90ae5e7102c");
    assert_eq!(
        (hex(&seal.nonce), hex(&seal.tag)),
        ("9acc6dafad9a1e19b60ff64e".into(), "6aae1a7a469ffaf5fd16faa1ec1863f6".into())
    );
    let (bytes, seal) = sealed(&cipher, &name, LZ4, &chunk[..1001]);
    assert_eq!(hex(&bytes[985..]), "f5b7907b01fd6202610ff06e9e13982a");
    assert_eq!(
        (hex(&seal.nonce), hex(&seal.tag)),
        ("d8b7dfd046f7e022437677c9".into(), "56b77a70b3686120c32e31f427b15de6".into())
    );
}

#[test]
fn the_format_of_sealed_records_is_as_it_was() {
    let cipher = LogCipher::of(&domain(0x22));
    let mut payload = *b"sixteen bytes of a guest's block";
    let tag = cipher.seal(LogPlace { epoch: 3, sequence: 0x1_0000_0002 }, HEADER, &mut payload);
    assert_eq!(
        (hex(&payload), hex(&tag)),
        (
            "ab7ee50d9c6ee6694eea813deaeeec40be8e22a5ea3a436c2e745c98e09a620e".into(),
            "c645c38ac44ba45db87d7883c1a57cc4".into()
        )
    );
}

#[test]
fn equal_chunks_of_a_domain_are_sealed_alike_and_those_of_another_have_nothing_in_common() {
    let chunk = chunk();
    let names = [1, 1, 2].map(|byte| name(&domain(byte), &chunk));
    assert_eq!(names[0], names[1]);
    assert_ne!(names[0], names[2]);
    for form in [Form::Whole, LZ4] {
        // Under one name, so that the secret alone makes the difference.
        let [one, same, other] = [1, 1, 2].map(|byte| sealed(&ChunkCipher::of(&domain(byte)), &names[0], form, &chunk));
        assert_eq!(one, same);
        assert_ne!(one.1.nonce, other.1.nonce);
        let equal = one.0.iter().zip(&other.0).filter(|(one, other)| one == other).count();
        assert!(equal < 200, "{equal} of 16384 bytes are equal; 64 are by chance");
    }
}

#[test]
fn what_was_sealed_opens_and_under_another_secret_name_or_form_it_does_not() {
    let (mine, other) = (ChunkCipher::of(&domain(1)), ChunkCipher::of(&domain(2)));
    let name = name(&domain(1), &chunk());
    for form in [Form::Whole, LZ4] {
        let (bytes, seal) = sealed(&mine, &name, form, &chunk());
        let open = |cipher: &ChunkCipher, name: &ChunkName, form: Form| {
            let mut bytes = bytes.clone();
            cipher.open(name, form, HEADER, &seal, &mut bytes).map(|()| bytes)
        };
        assert_eq!(open(&mine, &name, form), Ok(chunk()));
        assert_eq!(open(&other, &name, form), Err(Broken));
        assert_eq!(open(&mine, &[7; 32], form), Err(Broken));
        let another = if form == LZ4 { Form::Whole } else { LZ4 };
        assert_eq!(open(&mine, &name, another), Err(Broken));
    }
}

#[test]
fn every_flipped_bit_of_payload_header_nonce_or_tag_is_found() {
    let cipher = ChunkCipher::of(&domain(1));
    let name = name(&domain(1), &chunk());
    let (bytes, seal) = sealed(&cipher, &name, LZ4, &chunk()[..100]);
    let whole = [HEADER, &seal.nonce, &seal.tag, &bytes].concat();
    let open = |stored: &[u8]| {
        let (header, rest) = stored.split_at(HEADER.len());
        let (nonce, rest) = rest.split_first_chunk().unwrap();
        let (tag, payload) = rest.split_first_chunk().unwrap();
        cipher.open(&name, LZ4, header, &Seal { nonce: *nonce, tag: *tag }, &mut payload.to_vec())
    };
    assert_eq!(open(&whole), Ok(()));
    for bit in 0..8 * whole.len() {
        let mut damaged = whole.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(open(&damaged), Err(Broken), "bit {bit}");
    }
}

#[test]
fn a_record_of_a_log_opens_at_its_place_only() {
    let cipher = LogCipher::of(&domain(1));
    let place = LogPlace { epoch: 1, sequence: 7 };
    let mut bytes = b"a guest's block".to_vec();
    let tag = cipher.seal(place, HEADER, &mut bytes);
    let open = |cipher: &LogCipher, place: LogPlace, header: &[u8]| {
        let mut bytes = bytes.clone();
        cipher.open(place, header, &tag, &mut bytes).map(|()| bytes)
    };
    assert_eq!(open(&cipher, place, HEADER), Ok(b"a guest's block".to_vec()));
    assert_eq!(open(&cipher, LogPlace { sequence: 8, ..place }, HEADER), Err(Broken));
    assert_eq!(open(&cipher, LogPlace { epoch: 2, ..place }, HEADER), Err(Broken));
    assert_eq!(open(&cipher, place, b"another header"), Err(Broken));
    assert_eq!(open(&LogCipher::of(&domain(2)), place, HEADER), Err(Broken));
}

/// A change to what is sealed: at a place, by a number of bytes, or of the length.
fn changed(payload: &[u8], header: &[u8], change: usize, at: usize) -> (Vec<u8>, Vec<u8>) {
    let (mut payload, mut header) = (payload.to_vec(), header.to_vec());
    let len = payload.len();
    match change {
        0 if len > 0 => payload[at % len] ^= 1 << (at % 8),
        1 => payload.push(0),
        2 if len > 0 => payload.truncate(at % len),
        3 if len > 16 => payload.rotate_left(1 + at % 15),
        4 if !header.is_empty() => header[0] ^= 1 << (at % 8),
        _ => header.push(0),
    }
    (payload, header)
}

proptest! {
    /// All under one chunk's key, as a compressor's releases or a record that is written anew might have it.
    #[test]
    fn two_payloads_under_one_key_have_two_nonces(
        payload in prop::collection::vec(any::<u8>(), 0..600),
        header in prop::collection::vec(any::<u8>(), 0..40),
        change in 0..6usize,
        at in any::<usize>(),
    ) {
        let cipher = ChunkCipher::of(&domain(1));
        let (other, other_header) = changed(&payload, &header, change, at);
        prop_assume!((&payload, &header) != (&other, &other_header));
        let nonce = |header: &[u8], payload: &[u8]| cipher.seal(&[9; 32], LZ4, header, &mut payload.to_vec()).nonce;
        prop_assert_ne!(nonce(&header, &payload), nonce(&other_header, &other));
    }
}

#[test]
fn a_whole_chunk_under_two_headers_has_two_nonces() {
    let cipher = ChunkCipher::of(&domain(1));
    let name = name(&domain(1), &chunk());
    let nonce = |header: &[u8]| cipher.seal(&name, Form::Whole, header, &mut chunk()).nonce;
    assert_ne!(nonce(b"one"), nonce(b"other"));
}
