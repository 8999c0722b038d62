use std::num::NonZeroU8;

use super::*;
use crate::keys::SECRET_BYTES;

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

const SUITES: [Suite; 2] = [Suite::Aes256Gcm, Suite::Aegis256X2];

/// The payload sealed, and its seal.
fn sealed_by(suite: Suite, cipher: &ChunkCipher, name: &ChunkName, form: Form, payload: &[u8]) -> (Vec<u8>, Seal) {
    let mut bytes = payload.to_vec();
    let seal = cipher.seal(suite, name, form, HEADER, &mut bytes);
    (bytes, seal)
}

/// If this fails the format has changed: stores that exist could no longer be read. A new format needs new contexts.
#[test]
fn the_format_of_sealed_chunks_is_as_it_was() {
    let domain = domain(0x11);
    let chunk = chunk();
    let name = name(&domain, &chunk);
    assert_eq!(hex(&name), "2117c09184c1ecbfcddea68dd62cd1aa11cd1772f87b1a97068d6877912ffeff");
    let whole = [0x9a, 0xcc, 0x6d, 0xaf, 0xad, 0x9a, 0x1e, 0x19, 0xb6, 0x0f, 0xf6, 0x4e];
    let packed = [0xd8, 0xb7, 0xdf, 0xd0, 0x46, 0xf7, 0xe0, 0x22, 0x43, 0x76, 0x77, 0xc9];
    for (suite, form, payload, nonce, end, tag) in [
        (
            Suite::Aes256Gcm,
            Form::Whole,
            &chunk[..],
            whole,
            "6bc35086bd3c77b57c57b90ae5e7102c",
            "6aae1a7a469ffaf5fd16faa1ec1863f6",
        ),
        (
            Suite::Aes256Gcm,
            LZ4,
            &chunk[..1001],
            packed,
            "f5b7907b01fd6202610ff06e9e13982a",
            "56b77a70b3686120c32e31f427b15de6",
        ),
        (
            Suite::Aegis256X2,
            Form::Whole,
            &chunk[..],
            whole,
            "8f6052163503dff7ae2e9a4d279cede2",
            "26dd47d0462d8e82754a829a4a2d4540",
        ),
        (
            Suite::Aegis256X2,
            LZ4,
            &chunk[..1001],
            packed,
            "ac9dabbec2a09263fe511eeb6f9ac6d1",
            "bae35c53b8ae36a25e0679cd3918b949",
        ),
    ] {
        let (bytes, seal) = sealed_by(suite, &ChunkCipher::from_nonce(&domain, nonce), &name, form, payload);
        let last = hex(&bytes[bytes.len() - 16..]);
        assert_eq!((&*last, &*hex(&seal.tag)), (end, tag), "{suite:?} {form:?}");
        assert_eq!(seal.nonce, nonce);
    }
}

#[test]
fn the_format_of_sealed_records_is_as_it_was() {
    for (suite, sealed, sealed_tag) in [
        (
            Suite::Aes256Gcm,
            "ab7ee50d9c6ee6694eea813deaeeec40be8e22a5ea3a436c2e745c98e09a620e",
            "c645c38ac44ba45db87d7883c1a57cc4",
        ),
        (
            Suite::Aegis256X2,
            "5c603a519bac4437792ff15c7810ca7eac0e1f28b95c37624894a4c4048661b7",
            "19b5b7b9d5f4c61b1877e46fda15b63d",
        ),
    ] {
        let cipher = LogCipher::of(suite, &domain(0x22));
        let mut payload = *b"sixteen bytes of a guest's block";
        let tag = cipher.seal(LogPlace { epoch: 3, sequence: 0x1_0000_0002 }, HEADER, &mut payload);
        assert_eq!((&*hex(&payload), &*hex(&tag)), (sealed, sealed_tag), "{suite:?}");
    }
}

/// The vector of draft-irtf-cfrg-aegis-aead for AEGIS-256X2 has a nonce of 32 bytes, which ours never are: the crate is held to it by its own
/// tests. Here the two suites, and two of their uses, have nothing in common.
#[test]
fn what_one_suite_has_sealed_the_other_does_not_open() {
    let cipher = cipher_of(1);
    let name = name(&domain(1), &chunk());
    for (suite, other) in [(SUITES[0], SUITES[1]), (SUITES[1], SUITES[0])] {
        let (bytes, seal) = sealed_by(suite, &cipher, &name, LZ4, &chunk());
        let open = |seal: &Seal| cipher.open(&name, LZ4, HEADER, seal, &mut bytes.clone());
        assert_eq!(open(&seal), Ok(()));
        assert_eq!(open(&Seal { suite: other, ..seal }), Err(Broken));
    }
}

#[test]
fn equal_chunks_of_a_domain_have_one_name_and_those_of_another_have_nothing_in_common() {
    let chunk = chunk();
    let names = [1, 1, 2].map(|byte| name(&domain(byte), &chunk));
    assert_eq!(names[0], names[1]);
    assert_ne!(names[0], names[2]);
    for (suite, form) in SUITES.into_iter().zip([Form::Whole, LZ4]) {
        // Under one name and nonce, so that the secret alone makes the difference.
        let with = |byte| sealed_by(suite, &ChunkCipher::from_nonce(&domain(byte), [5; 12]), &names[0], form, &chunk);
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
    for (suite, form) in SUITES.into_iter().flat_map(|suite| [(suite, Form::Whole), (suite, LZ4)]) {
        let (bytes, seal) = sealed_by(suite, &mine, &name, form, &chunk());
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
    for suite in SUITES {
        let (bytes, seal) = sealed_by(suite, &cipher, &name, LZ4, &chunk()[..100]);
        let whole = [HEADER, &seal.nonce, &seal.tag, &bytes].concat();
        let open = |stored: &[u8]| {
            let (header, rest) = stored.split_at(HEADER.len());
            let (nonce, rest) = rest.split_first_chunk().unwrap();
            let (tag, payload) = rest.split_first_chunk().unwrap();
            cipher.open(&name, LZ4, header, &Seal { suite, nonce: *nonce, tag: *tag }, &mut payload.to_vec())
        };
        assert_eq!(open(&whole), Ok(()));
        for bit in 0..8 * whole.len() {
            let mut damaged = whole.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(open(&damaged), Err(Broken), "{suite:?}, bit {bit}");
        }
    }
}

#[test]
fn a_record_of_a_log_opens_at_its_place_only() {
    for suite in SUITES {
        let cipher = LogCipher::of(suite, &domain(1));
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
        assert_eq!(open(&LogCipher::of(suite, &domain(2)), place, HEADER), Err(Broken));
    }
}

#[test]
fn no_nonce_comes_twice_from_one_cipher_and_two_begin_at_two_places() {
    let (one, other) = (cipher_of(1), cipher_of(1));
    let mut seen = std::collections::HashSet::new();
    for cipher in [&one, &other] {
        for _ in 0..1000 {
            assert!(seen.insert(cipher.seal(Suite::NEWEST, &[9; 32], LZ4, HEADER, &mut [1, 2, 3]).nonce));
        }
    }
    // Also where its number starts again from zero.
    let last = ChunkCipher::from_nonce(&domain(1), [0xff; 12]);
    let nonces = [(); 2].map(|()| last.seal(Suite::NEWEST, &[9; 32], LZ4, HEADER, &mut []).nonce);
    assert_eq!(nonces, [[0xff; 12], [0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0]]);
}
