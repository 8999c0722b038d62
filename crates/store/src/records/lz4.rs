//! Unpacks blocks of LZ4, for records that are read again and again.
//!
//! The crate that packs them unpacks a run that repeats a few bytes byte by byte: a chunk with runs of one value took it 3.8 µs, and takes
//! this 0.5. Where nothing repeats like that both take as long. Whatever the bytes are, no more is written than there is room
//! for, and each byte of them is looked at once.
//!
//! A block is a row of sequences: a token (the lengths of both parts), bytes as they are, how far back the others are found. The last has
//! bytes only. (The LZ4 block format, by Yann Collet.)

/// A length that goes on in further bytes.
const LONG: usize = 15;
/// What bytes of a short length are copied as.
const LITERALS_LEN: usize = 16;
/// The shortest repetition, and the longest one of a short length.
const MATCH_LEN_MIN: usize = 4;
const MATCH_LEN: usize = LONG - 1 + MATCH_LEN_MIN;
/// Up to here a loop is quicker than calls that copy.
const LOOP_LEN: usize = 12;

/// Unpacks a block to the front of `content`; how many bytes it became. None if it is damaged, or there is no room for it.
pub(super) fn unpack(packed: &[u8], content: &mut [u8]) -> Option<usize> {
    unpack_front(packed, content, usize::MAX)
}

/// As [`unpack`], but ends when there are `enough` bytes: how many there are then. What follows is not looked at, and nothing is to be made of
/// the bytes behind them.
pub(super) fn unpack_front(packed: &[u8], content: &mut [u8], enough: usize) -> Option<usize> {
    let (mut from, mut to) = (0, 0);
    loop {
        if to >= enough {
            return Some(to);
        }
        let token = *packed.get(from)?;
        from += 1;
        let mut literals = usize::from(token >> 4);
        match (packed.get(from..from + LITERALS_LEN), content.get_mut(to..to + LITERALS_LEN)) {
            // What is too much is written over by what comes next.
            (Some(source), Some(target)) if literals < LONG => target.copy_from_slice(source),
            _ => {
                if literals == LONG {
                    literals += rest_of_length(packed, &mut from)?;
                }
                content.get_mut(to..to + literals)?.copy_from_slice(packed.get(from..from + literals)?);
            }
        }
        from += literals;
        to += literals;
        if from == packed.len() {
            return Some(to);
        }
        let distance = usize::from(u16::from_le_bytes(*packed.get(from..)?.first_chunk()?));
        from += 2;
        let start = to.checked_sub(distance)?;
        let mut len = usize::from(token & 0xf);
        if len < LONG && distance >= MATCH_LEN && to + MATCH_LEN <= content.len() {
            content.copy_within(start..start + MATCH_LEN, to);
            to += len + MATCH_LEN_MIN;
            continue;
        }
        if len == LONG {
            len += rest_of_length(packed, &mut from)?;
        }
        to += len + MATCH_LEN_MIN;
        repeat(content.get_mut(start..to)?, distance)?;
    }
}

/// Fills bytes with what the first `distance` of them are.
fn repeat(bytes: &mut [u8], distance: usize) -> Option<()> {
    let len = bytes.len();
    if len - distance <= LOOP_LEN && distance > 0 {
        for at in distance..len {
            bytes[at] = bytes[at - distance];
        }
        return Some(());
    }
    let mut done = distance;
    while done < len {
        let count = done.min(len - done);
        let (source, target) = bytes.split_at_mut(done);
        target.get_mut(..count).filter(|target| !target.is_empty())?.copy_from_slice(&source[..count]);
        done += count;
    }
    Some(())
}

/// What further bytes add to a length. They are fewer than 2^32, so that lengths do not overflow.
fn rest_of_length(packed: &[u8], from: &mut usize) -> Option<usize> {
    let mut len = 0;
    loop {
        let byte = *packed.get(*from)?;
        *from += 1;
        len += usize::from(byte);
        if byte != u8::MAX {
            return Some(len);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lz4_flex::block::{compress, decompress_into};
    use proptest::prelude::*;

    /// Bytes with repetitions of all distances and lengths.
    fn content() -> impl Strategy<Value = Vec<u8>> {
        let part = (prop::collection::vec(any::<u8>(), 1..40), 1..400usize);
        prop::collection::vec(part, 0..40).prop_map(|parts| {
            parts.iter().flat_map(|(bytes, len)| bytes.iter().copied().cycle().take(*len)).collect::<Vec<u8>>()
        })
    }

    proptest! {
        #[test]
        fn what_was_packed_comes_back(content in content()) {
            let mut unpacked = vec![0; content.len()];
            prop_assert_eq!(unpack(&compress(&content), &mut unpacked), Some(content.len()));
            prop_assert_eq!(unpacked, content);
        }

        #[test]
        fn the_front_of_a_block_is_that_of_its_content(content in content(), enough in 0..20_000usize) {
            let mut unpacked = vec![0; content.len()];
            let len = unpack_front(&compress(&content), &mut unpacked, enough).unwrap();
            prop_assert!(len >= enough.min(content.len()) && len <= content.len());
            prop_assert_eq!(&unpacked[..len], &content[..len]);
        }

        /// Another reader of the format says the same of damaged blocks: either what they hold, or that they are damaged.
        #[test]
        fn damaged_blocks_are_refused_or_read_as_others_read_them(
            content in content(), at: usize, value: u8, cut in 0..20usize, room in 0..2000usize,
        ) {
            let mut packed = compress(&content);
            let len = packed.len();
            packed[at % len] = value;
            packed.truncate(len - cut.min(len - 1));
            let (mut ours, mut theirs) = (vec![0; room], vec![0; room]);
            let (read, other) = (unpack(&packed, &mut ours), decompress_into(&packed, &mut theirs).ok());
            if let (Some(read), Some(other)) = (read, other) {
                prop_assert_eq!(read, other);
                prop_assert_eq!(&ours[..read], &theirs[..read]);
            }
        }

        #[test]
        fn bytes_that_are_no_block_are_survived(packed in prop::collection::vec(any::<u8>(), 0..200), room in 0..300usize) {
            let mut content = vec![0; room];
            prop_assert!(unpack(&packed, &mut content).is_none_or(|len| len <= room));
        }
    }

    #[test]
    fn a_repetition_of_nothing_and_one_from_before_the_beginning_are_refused() {
        for distance in [0u8, 2, 200] {
            for token in [0x10, 0x1f] {
                let packed = [token, b'a', distance, 0, 1, 0x10, b'b'];
                assert_eq!(unpack(&packed, &mut [0; 64]), None, "{distance} {token}");
            }
        }
        assert_eq!(unpack(&[0x1f, b'a', 1, 0, 1, 0x10, b'b'], &mut [0; 64]), Some(22));
    }
}
