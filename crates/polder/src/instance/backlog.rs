//! The last output of a console, for those who come later or read slowly.
//!
//! Bytes are numbered from the console's first one. A reader keeps the number of the next byte it wants; one that falls behind the
//! oldest byte kept goes on from there.

use std::collections::VecDeque;

/// Bytes kept.
pub const BACKLOG_LEN_MAX: usize = 256 * 1024;

/// The last [`BACKLOG_LEN_MAX`] bytes.
#[derive(Default)]
pub struct Backlog {
    bytes: VecDeque<u8>,
    /// The number of the first byte kept.
    start: u64,
}

impl Backlog {
    /// Adds output; the oldest bytes make room.
    pub fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend(bytes);
        let excess = self.bytes.len().saturating_sub(BACKLOG_LEN_MAX);
        self.bytes.drain(..excess);
        self.start += excess as u64;
    }

    /// The number of the oldest byte kept.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// The number that the next byte will have.
    pub fn end(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }

    /// Some bytes from number `position` on, or from the oldest; and the number of the first of them. Empty only at the end.
    pub fn from(&self, position: u64) -> (u64, &[u8]) {
        let position = position.clamp(self.start, self.end());
        let offset = (position - self.start) as usize;
        let (front, back) = self.bytes.as_slices();
        let bytes = if offset < front.len() { &front[offset..] } else { &back[offset - front.len()..] };
        (position, bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_all(backlog: &Backlog, mut position: u64) -> Vec<u8> {
        let mut read = Vec::new();
        loop {
            let (at, bytes) = backlog.from(position);
            if bytes.is_empty() {
                return read;
            }
            read.extend_from_slice(bytes);
            position = at + bytes.len() as u64;
        }
    }

    #[test]
    fn a_late_reader_gets_what_is_kept() {
        let mut backlog = Backlog::default();
        backlog.push(b"hello ");
        backlog.push(b"world");
        assert_eq!(read_all(&backlog, 0), b"hello world");
        assert_eq!(read_all(&backlog, 6), b"world");
        assert_eq!(read_all(&backlog, 999), b"");
    }

    #[test]
    fn the_oldest_bytes_make_room_and_a_slow_reader_skips_them() {
        let mut backlog = Backlog::default();
        for round in 0..100u8 {
            backlog.push(&[round; 10_000]);
        }
        assert_eq!(backlog.end(), 1_000_000);
        assert_eq!(backlog.end() - backlog.start(), BACKLOG_LEN_MAX as u64);
        let read = read_all(&backlog, 0);
        assert_eq!(read.len(), BACKLOG_LEN_MAX);
        assert_eq!(read.last(), Some(&99));
    }
}
