//! What waits to be sent to a client.

use super::IO_SLICES_MAX;
use super::buffer::BufferPool;
use std::collections::VecDeque;
use std::io::IoSlice;
use std::ops::Range;

/// Short messages are gathered in blocks of this many bytes.
const GATHER_LEN: usize = 4096;

/// A block of bytes, of which some ranges are to be sent.
struct Piece {
    bytes: Vec<u8>,
    first: Range<usize>,
    /// The later ranges, the last one first.
    rest: Vec<Range<usize>>,
    gathers: bool,
}

/// What waits to be sent, in order.
#[derive(Default)]
pub(super) struct Outgoing {
    pieces: VecDeque<Piece>,
    held_bytes: usize,
    spare: Option<Vec<u8>>,
}

impl Outgoing {
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Bytes of memory that wait here.
    pub fn held_bytes(&self) -> usize {
        self.held_bytes
    }

    /// Sends a short message.
    pub fn push_short(&mut self, message: &[u8]) {
        match self.pieces.back_mut() {
            Some(piece) if piece.gathers && piece.bytes.len() + message.len() <= GATHER_LEN => {
                piece.bytes.extend_from_slice(message);
                piece.first.end = piece.bytes.len();
            }
            _ => {
                let mut bytes = self.spare.take().unwrap_or_else(|| Vec::with_capacity(GATHER_LEN));
                bytes.extend_from_slice(message);
                self.held_bytes += bytes.capacity();
                self.pieces.push_back(Piece { first: 0..bytes.len(), bytes, rest: Vec::new(), gathers: true });
            }
        }
    }

    /// Sends one range of a block.
    pub fn push(&mut self, bytes: Vec<u8>, range: Range<usize>) {
        self.held_bytes += bytes.capacity();
        self.pieces.push_back(Piece { bytes, first: range, rest: Vec::new(), gathers: false });
    }

    /// Sends ranges of a block, in order; there is at least one.
    pub fn push_ranges(&mut self, bytes: Vec<u8>, mut ranges: Vec<Range<usize>>) {
        ranges.reverse();
        let first = ranges.pop().expect("a reply has a range");
        self.held_bytes += bytes.capacity();
        self.pieces.push_back(Piece { bytes, first, rest: ranges, gathers: false });
    }

    /// What is to be sent next, as much as one system call takes.
    pub fn slices(&self) -> Vec<IoSlice<'_>> {
        let ranges = self.pieces.iter().flat_map(|piece| {
            let ranges = std::iter::once(&piece.first).chain(piece.rest.iter().rev());
            ranges.map(|range| IoSlice::new(&piece.bytes[range.clone()]))
        });
        ranges.take(IO_SLICES_MAX).collect()
    }

    /// `sent` bytes of [`Outgoing::slices`] are gone; buffers go back to the pool.
    pub fn advance(&mut self, mut sent: usize, pool: &mut BufferPool) {
        while let Some(piece) = self.pieces.front_mut() {
            if sent < piece.first.len() {
                piece.first.start += sent;
                return;
            }
            sent -= piece.first.len();
            if let Some(next) = piece.rest.pop() {
                piece.first = next;
                continue;
            }
            let mut piece = self.pieces.pop_front().expect("looked at above");
            self.held_bytes -= piece.bytes.capacity();
            if piece.gathers {
                piece.bytes.clear();
                self.spare = Some(piece.bytes);
            } else {
                pool.put(piece.bytes);
            }
        }
    }
}
