use proptest::prelude::*;

use super::*;

const DOMAIN: Subject = Subject { purpose: Purpose::Domain, id: [5; 16] };

fn key_file(byte: u8) -> KeyFile {
    KeyFile::of(Secret::take(&mut [byte; 32]))
}

fn passphrase(text: &str) -> Passphrase {
    Passphrase::new(text.as_bytes().to_vec()).unwrap()
}

fn cheap() -> Cost {
    Cost::new(32, 1, 1).unwrap()
}

fn secret() -> Secret {
    Secret::take(&mut [0xaa; 32])
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// With a checksum that is right, as somebody who wants to be believed would make it.
fn with_checksum(mut bytes: [u8; WRAPPED_KEY_BYTES]) -> [u8; WRAPPED_KEY_BYTES] {
    let checksum = checksum(&bytes);
    bytes[CHECKSUM..].copy_from_slice(&checksum);
    bytes
}

/// If this fails the format has changed: keys that exist could no longer be read. A new format needs a new version.
#[test]
fn the_format_of_wrapped_keys_is_as_it_was() {
    let under_file =
        WrappedKey::wrap_with(&secret(), DOMAIN, Protection::KeyFile(&key_file(1)), [3; 16], [4; 12]).unwrap();
    assert_eq!(
        hex(&under_file.to_bytes()),
        concat!(
            "504f4c444552574b010001010000000000000000000000000000000000000000",
            "0000000000000000050505050505050505050505050505058b04b4658545bb5e",
            "0404040404040404040404048cfeed1f6f26d2e4105bbd1da516e9847dcc27d8",
            "4547dc15504c79f8fe411b03e2e6dadc27afe3d61ec404ba455f5299fed30196"
        )
    );
    let volume = Subject { purpose: Purpose::Volume, id: [6; 16] };
    let passphrase = passphrase("correct horse");
    let protection = Protection::Passphrase(&passphrase, cheap());
    let under_passphrase = WrappedKey::wrap_with(&secret(), volume, protection, [3; 16], [4; 12]).unwrap();
    assert_eq!(
        hex(&under_passphrase.to_bytes()),
        concat!(
            "504f4c444552574b010002022000000001000000010000000303030303030303",
            "03030303030303030606060606060606060606060606060695e5c14ba1a6fad4",
            "0404040404040404040404043919af73d6b020341d8908ed4826cfe5b7e0bf11",
            "20160063ea2b4ca9d5f9502ef2ec5c2095f198b44785822bb30f48eab5372954"
        )
    );
}

#[test]
fn a_wrapped_key_is_read_back_and_opens_under_its_own_protection_only() {
    let (file, other_file, phrase) = (key_file(1), key_file(2), passphrase("correct horse"));
    let protections = [Protection::KeyFile(&file), Protection::Passphrase(&phrase, cheap())];
    let [under_file, under_phrase] = protections.map(|protection| {
        let wrapped = WrappedKey::wrap(&secret(), DOMAIN, protection).unwrap();
        let read = WrappedKey::from_bytes(&wrapped.to_bytes()).unwrap();
        assert_eq!(read, wrapped);
        read
    });
    let open = |wrapped: &WrappedKey, opener| wrapped.unwrap(DOMAIN, opener).map(|secret| *secret.bytes());
    assert_eq!(open(&under_file, Opener::KeyFile(&file)), Ok([0xaa; 32]));
    assert_eq!(open(&under_phrase, Opener::Passphrase(&phrase)), Ok([0xaa; 32]));
    assert_eq!(open(&under_file, Opener::KeyFile(&other_file)), Err(UnwrapError::WrongKeyFile));
    let wrong = passphrase("correct house");
    assert_eq!(open(&under_phrase, Opener::Passphrase(&wrong)), Err(UnwrapError::WrongPassphrase));
    assert_eq!(open(&under_file, Opener::Passphrase(&phrase)), Err(UnwrapError::NeedsKeyFile));
    assert_eq!(open(&under_phrase, Opener::KeyFile(&file)), Err(UnwrapError::NeedsPassphrase));
    assert_eq!((under_file.passphrase_cost(), under_phrase.passphrase_cost()), (None, Some(cheap())));
}

#[test]
fn a_wrapped_key_is_that_of_one_domain_or_volume() {
    let file = key_file(1);
    let wrapped = WrappedKey::wrap(&secret(), DOMAIN, Protection::KeyFile(&file)).unwrap();
    assert_eq!(wrapped.subject(), DOMAIN);
    for other in [Subject { purpose: Purpose::Volume, ..DOMAIN }, Subject { id: [6; 16], ..DOMAIN }] {
        assert_eq!(wrapped.unwrap(other, Opener::KeyFile(&file)).unwrap_err(), UnwrapError::OtherSubject);
    }
    // Made that of another, with a checksum that is right.
    let mut bytes = wrapped.to_bytes();
    bytes[40] = 6;
    let moved = WrappedKey::from_bytes(&with_checksum(bytes)).unwrap();
    assert_eq!(moved.unwrap(moved.subject(), Opener::KeyFile(&file)).unwrap_err(), UnwrapError::Changed);
}

#[test]
fn every_flipped_bit_of_a_wrapped_key_is_found_with_and_without_a_checksum_that_is_right() {
    let (file, phrase) = (key_file(1), passphrase("correct horse"));
    let wrapped =
        WrappedKey::wrap(&secret(), DOMAIN, Protection::Passphrase(&phrase, Cost::new(8, 1, 1).unwrap())).unwrap();
    let under_file = WrappedKey::wrap(&secret(), DOMAIN, Protection::KeyFile(&file)).unwrap();
    for (wrapped, opener) in [(&wrapped, Opener::Passphrase(&phrase)), (&under_file, Opener::KeyFile(&file))] {
        for bit in 0..8 * WRAPPED_KEY_BYTES {
            let mut bytes = wrapped.to_bytes();
            bytes[bit / 8] ^= 1 << (bit % 8);
            let error = WrappedKey::from_bytes(&bytes).unwrap_err();
            let expected = match bit / 8 {
                0..8 => ReadWrappedKeyError::Foreign,
                8..10 => ReadWrappedKeyError::UnknownVersion { version: 1 ^ 1 << (bit - 64) },
                _ => ReadWrappedKeyError::Damaged,
            };
            assert_eq!(error, expected, "bit {bit}");
            if bit / 8 < CHECKSUM
                && let Ok(believed) = WrappedKey::from_bytes(&with_checksum(bytes))
                // Memory that is allowed, but not in a test.
                && believed.passphrase_cost().is_none_or(|cost| cost.memory_kib() < 1 << 16)
            {
                assert!(believed.unwrap(DOMAIN, opener).is_err(), "bit {bit}");
            }
        }
    }
}

#[test]
fn a_wrapped_key_that_asks_for_too_much_is_refused_before_anything_is_allocated() {
    let phrase = passphrase("correct horse");
    let wrapped = WrappedKey::wrap(&secret(), DOMAIN, Protection::Passphrase(&phrase, cheap())).unwrap();
    for (at, value) in [(12, 100 << 20), (12, u32::MAX), (12, 7), (16, 17), (16, 0), (20, 5), (20, 0)] {
        let mut bytes = wrapped.to_bytes();
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        let error = WrappedKey::from_bytes(&with_checksum(bytes)).unwrap_err();
        assert!(matches!(error, ReadWrappedKeyError::TooCostly(_)), "{error}");
    }
}

#[test]
fn bytes_that_are_no_wrapped_key_are_called_that() {
    let bytes = WrappedKey::wrap(&secret(), DOMAIN, Protection::KeyFile(&key_file(1))).unwrap().to_bytes();
    for len in 0..bytes.len() {
        let expected = if len < 10 { ReadWrappedKeyError::Foreign } else { ReadWrappedKeyError::Damaged };
        assert_eq!(WrappedKey::from_bytes(&bytes[..len]), Err(expected));
    }
    assert_eq!(WrappedKey::from_bytes(&[&bytes[..], b"0"].concat()), Err(ReadWrappedKeyError::Damaged));
    for (at, value) in [(10, 0), (10, 3), (11, 0), (11, 3), (12, 1), (39, 1)] {
        let mut bytes = bytes;
        bytes[at] = value;
        assert_eq!(WrappedKey::from_bytes(&with_checksum(bytes)), Err(ReadWrappedKeyError::Unknown));
    }
}

#[test]
fn a_key_that_is_wrapped_anew_opens_under_the_new_protection_only() {
    let (file, phrase) = (key_file(1), passphrase("correct horse"));
    let old = WrappedKey::wrap(&secret(), DOMAIN, Protection::KeyFile(&file)).unwrap();
    let new = old.rewrap(Opener::KeyFile(&file), Protection::Passphrase(&phrase, cheap())).unwrap();
    assert_eq!(new.unwrap(DOMAIN, Opener::Passphrase(&phrase)).unwrap().bytes(), &[0xaa; 32]);
    assert_eq!(new.unwrap(DOMAIN, Opener::KeyFile(&file)).unwrap_err(), UnwrapError::NeedsPassphrase);
    let error = old.rewrap(Opener::KeyFile(&key_file(2)), Protection::KeyFile(&file)).unwrap_err();
    assert_eq!(error, RewrapError::Unwrap(UnwrapError::WrongKeyFile));
}

#[test]
fn a_secret_that_is_wrapped_twice_looks_different() {
    let file = key_file(1);
    let [one, other] = [0, 1].map(|_| WrappedKey::wrap(&secret(), DOMAIN, Protection::KeyFile(&file)).unwrap());
    assert_ne!((one.nonce, one.secret), (other.nonce, other.secret));
}

proptest! {
    #[test]
    fn arbitrary_bytes_are_refused_or_read_back(mut bytes in prop::array::uniform32(any::<u8>()), believed: bool) {
        let mut record = [0; WRAPPED_KEY_BYTES];
        record[..8].copy_from_slice(MAGIC);
        record[8] = 1;
        bytes[0] &= 3;
        bytes[1] &= 3;
        record[10..42].copy_from_slice(&bytes);
        let record = if believed { with_checksum(record) } else { record };
        if let Ok(read) = WrappedKey::from_bytes(&record) {
            prop_assert_eq!(read.to_bytes(), record);
            prop_assert!(read.passphrase_cost().is_none_or(|cost| cost.memory_kib() <= 1 << 20));
        }
    }
}
