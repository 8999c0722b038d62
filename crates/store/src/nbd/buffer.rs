//! The memory of one request, and the buffers that a connection uses again.

use super::POOLED_BYTES_MAX;
use super::protocol::DATA_HEAD_LEN_MAX;
use crate::disk::Buffer;
use std::ops::Range;

/// Where the data of a request begin in its bytes: before them is room for the head of the reply, so that both are sent as one.
pub(super) const DATA_START: usize = 64;
const _: () = assert!(DATA_START >= DATA_HEAD_LEN_MAX);

/// Bytes of a small buffer, which requests of up to 32 KiB share.
const SMALL_LEN: usize = DATA_START + (32 << 10);
/// Small buffers that are kept.
const SMALL_COUNT_MAX: usize = 64;
/// Holes that are remembered in one buffer. Where there are more, zeros are written.
const HOLES_MAX: usize = 16;

/// What is done with the parts of a read that have nothing stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Holes {
    /// Zeros are written.
    Filled,
    /// They are remembered, and their bytes mean nothing.
    Remembered,
}

/// The memory of one request.
pub(super) struct RequestBuffer {
    bytes: Vec<u8>,
    len: usize,
    remembers: bool,
    /// In order, and not touching one another.
    holes: Vec<Range<usize>>,
}

impl RequestBuffer {
    /// Takes what the disk reads and keeps none of it.
    pub fn sink(len: usize) -> Self {
        Self { bytes: Vec::new(), len, remembers: true, holes: Vec::new() }
    }

    /// The data.
    pub fn data(&mut self) -> &mut [u8] {
        &mut self.bytes[DATA_START..DATA_START + self.len]
    }

    /// Bytes of memory behind it.
    pub fn capacity_bytes(&self) -> usize {
        self.bytes.len()
    }

    /// All bytes, and the holes among the data, which begin at [`DATA_START`].
    pub fn into_parts(self) -> (Vec<u8>, Vec<Range<usize>>) {
        (self.bytes, self.holes)
    }

    fn is_sink(&self) -> bool {
        self.bytes.is_empty()
    }

    fn fill(&mut self, range: Range<usize>) {
        self.bytes[DATA_START + range.start..DATA_START + range.end].fill(0);
    }

    /// A disk that puts bytes where it had put zeros before gets its way.
    fn forget_holes_in(&mut self, range: &Range<usize>) {
        let touches = |hole: &Range<usize>| hole.start < range.end && range.start < hole.end;
        while let Some(index) = self.holes.iter().position(touches) {
            let hole = self.holes.remove(index);
            self.fill(hole);
        }
    }
}

impl Buffer for RequestBuffer {
    fn len(&self) -> usize {
        self.len
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        if self.is_sink() {
            return;
        }
        if !self.holes.is_empty() {
            self.forget_holes_in(&(at..at + bytes.len()));
        }
        self.bytes[DATA_START + at..DATA_START + at + bytes.len()].copy_from_slice(bytes);
    }

    fn put_zeros(&mut self, at: usize, len: usize) {
        if self.is_sink() || len == 0 {
            return;
        }
        if !self.remembers {
            return self.fill(at..at + len);
        }
        let mut hole = at..at + len;
        self.forget_holes_in(&hole);
        let index = self.holes.partition_point(|other| other.end < hole.start);
        if self.holes.get(index).is_some_and(|before| before.end == hole.start) {
            hole.start = self.holes.remove(index).start;
        }
        if self.holes.get(index).is_some_and(|after| after.start == hole.end) {
            hole.end = self.holes.remove(index).end;
        }
        if self.holes.len() == HOLES_MAX {
            return self.fill(hole);
        }
        self.holes.insert(index, hole);
    }

    fn take(&self, at: usize, bytes: &mut [u8]) {
        bytes.copy_from_slice(&self.bytes[DATA_START + at..DATA_START + at + bytes.len()]);
    }

    fn space(&mut self, at: usize, len: usize) -> Option<&mut [u8]> {
        if self.is_sink() {
            return None;
        }
        if !self.holes.is_empty() {
            self.forget_holes_in(&(at..at + len));
        }
        Some(&mut self.bytes[DATA_START + at..DATA_START + at + len])
    }

    fn bytes(&self) -> Option<&[u8]> {
        if self.is_sink() { None } else { Some(&self.bytes[DATA_START..DATA_START + self.len]) }
    }
}

/// Buffers of one connection. What is left in them was seen by its own client only.
#[derive(Default)]
pub(super) struct BufferPool {
    small: Vec<Vec<u8>>,
    large: Vec<Vec<u8>>,
    large_bytes: usize,
}

impl BufferPool {
    /// A buffer for `len` bytes of data, whatever they are now.
    pub fn get(&mut self, len: usize, holes: Holes) -> RequestBuffer {
        let needed = DATA_START + len;
        let bytes = if needed <= SMALL_LEN {
            self.small.pop().unwrap_or_else(|| vec![0; SMALL_LEN])
        } else {
            match self.large.iter().rposition(|bytes| bytes.len() >= needed) {
                Some(index) => {
                    let bytes = self.large.swap_remove(index);
                    self.large_bytes -= bytes.len();
                    bytes
                }
                None => vec![0; needed],
            }
        };
        RequestBuffer { bytes, len, remembers: holes == Holes::Remembered, holes: Vec::new() }
    }

    /// Lets go of all buffers.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    /// Takes a buffer back.
    pub fn put(&mut self, bytes: Vec<u8>) {
        if bytes.len() == SMALL_LEN {
            if self.small.len() < SMALL_COUNT_MAX {
                self.small.push(bytes);
            }
        } else if bytes.len() > SMALL_LEN && self.large_bytes + bytes.len() <= POOLED_BYTES_MAX {
            self.large_bytes += bytes.len();
            self.large.push(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn holes_that_touch_become_one() {
        let mut buffer = BufferPool::default().get(4096, Holes::Remembered);
        buffer.put_zeros(0, 512);
        buffer.put_zeros(1024, 512);
        buffer.put_zeros(512, 512);
        assert_eq!(buffer.holes.len(), 1);
        assert_eq!(buffer.holes[0], 0..1536);
    }

    proptest! {
        #[test]
        fn bytes_and_holes_are_what_was_put_last(
            puts in prop::collection::vec((0usize..120, 1usize..60, any::<bool>(), 1u8..), 1..60)
        ) {
            let mut buffer = BufferPool::default().get(180, Holes::Remembered);
            let mut expected = [0u8; 180];
            buffer.data().fill(0);
            for (at, len, zeros, value) in puts {
                if zeros {
                    // What a hole covers means nothing: make it visible if somebody looks.
                    buffer.put_zeros(at, len);
                    expected[at..at + len].fill(0);
                } else {
                    match buffer.space(at, len).filter(|_| value % 2 == 0) {
                        Some(space) => space.fill(value),
                        None => buffer.put(at, &vec![value; len]),
                    }
                    expected[at..at + len].fill(value);
                }
            }
            prop_assert!(buffer.holes.len() <= HOLES_MAX);
            prop_assert!(buffer.holes.windows(2).all(|pair| pair[0].end < pair[1].start));
            for hole in buffer.holes.clone() {
                buffer.fill(hole);
            }
            prop_assert_eq!(&*buffer.data(), &expected[..]);
            prop_assert_eq!(buffer.bytes(), Some(&expected[..]));
        }
    }
}
