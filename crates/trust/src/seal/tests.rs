use std::num::NonZeroU8;

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

fn cipher_of(byte: u8) -> ChunkCipher {
    ChunkCipher::of(&domain(byte)).unwrap()
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
    let cipher =
        ChunkCipher::from_nonce(&domain, [0x9a, 0xcc, 0x6d, 0xaf, 0xad, 0x9a, 0x1e, 0x19, 0xb6, 0x0f, 0xf6, 0x4e]);
    let (bytes, seal) = sealed(&cipher, &name, Form::Whole, &chunk);
    assert_eq!(hex(&bytes[16368..]), "6bc35086bd3c77b57c57b90ae5e7102c");
    assert_eq!(
        (hex(&seal.nonce), hex(&seal.tag)),
        ("9acc6dafad9a1e19b60ff64e".into(), "6aae1a7a469ffaf5fd16faa1ec1863f6".into())
    );
    let cipher =
        ChunkCipher::from_nonce(&domain, [0xd8, 0xb7, 0xdf, 0xd0, 0x46, 0xf7, 0xe0, 0x22, 0x43, 0x76, 0x77, 0xc9]);
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
fn equal_chunks_of_a_domain_have_one_name_and_those_of_another_have_nothing_in_common() {
    let chunk = chunk();
    let names = [1, 1, 2].map(|byte| name(&domain(byte), &chunk));
    assert_eq!(names[0], names[1]);
    assert_ne!(names[0], names[2]);
    for form in [Form::Whole, LZ4] {
        // Under one name and nonce, so that the secret alone makes the difference.
        let with = |byte| sealed(&ChunkCipher::from_nonce(&domain(byte), [5; 12]), &names[0], form, &chunk);
        let [one, same, other] = [1, 1, 2].map(with);
        assert_eq!(one, same);
        let equal = one.0.iter().zip(&other.0).filter(|(one, other)| one == other).count();
        assert!(equal < 200, "{equal} of 16384 bytes are equal; 64 are by chance");
    }
}

#[test]
fn what_was_sealed_opens_and_under_another_secret_name_or_form_it_does_not() {
    let (mine, other) = (cipher_of(1), cipher_of(2));
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
    let cipher = cipher_of(1);
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

#[test]
fn no_nonce_comes_twice_from_one_cipher_and_two_begin_at_two_places() {
    let (one, other) = (cipher_of(1), cipher_of(1));
    let mut seen = std::collections::HashSet::new();
    for cipher in [&one, &other] {
        for _ in 0..1000 {
            assert!(seen.insert(cipher.seal(&[9; 32], LZ4, HEADER, &mut [1, 2, 3]).nonce));
        }
    }
    // Also where its number starts again from zero.
    let last = ChunkCipher::from_nonce(&domain(1), [0xff; 12]);
    let nonces = [(); 2].map(|()| last.seal(&[9; 32], LZ4, HEADER, &mut []).nonce);
    assert_eq!(nonces, [[0xff; 12], [0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0]]);
}
