//! Which blocks of a volume lie in its log: ranges of blocks to places, the newest write on top.

use std::collections::BTreeMap;
use std::ops::Range;

/// Bytes of a block, the unit in which a log and its map know a volume.
pub(crate) const BLOCK_LEN: u64 = 4096;

/// Where the content of a range begins: in the log, in a chunk that the log names, or nowhere because it is zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    Log(LogPlace),
    Chunks(ChunkPlace),
    Zeros,
}

impl Place {
    /// The place `blocks` further on.
    fn advanced(self, blocks: u64) -> Place {
        match self {
            Place::Log(place) => Place::Log(LogPlace(place.0 + blocks * BLOCK_LEN)),
            Place::Chunks(place) => Place::Chunks(ChunkPlace { block: place.block + blocks as u32, ..place }),
            Place::Zeros => Place::Zeros,
        }
    }
}

/// A block of chunks that a record of the log names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ChunkPlace {
    /// The names.
    pub record: LogPlace,
    /// Counted from the first chunk's first.
    pub block: u32,
}

/// A byte of a log: the number of the file (high half) and the offset in it. Later bytes have higher numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct LogPlace(pub u64);

impl LogPlace {
    pub fn new(file: u32, offset: u32) -> Self {
        LogPlace(u64::from(file) << 32 | u64::from(offset))
    }

    pub fn file(self) -> u32 {
        (self.0 >> 32) as u32
    }

    pub fn offset(self) -> u64 {
        self.0 & 0xffff_ffff
    }
}

#[derive(Debug, Clone, Copy)]
struct Extent {
    blocks: u64,
    place: Place,
}

/// Ranges of blocks and where they lie. Ranges do not overlap.
#[derive(Debug, Clone, Default)]
pub(crate) struct ExtentMap(BTreeMap<u64, Extent>);

impl ExtentMap {
    /// Lays a range over what was there.
    pub fn insert(&mut self, range: Range<u64>, place: Place) {
        if range.is_empty() {
            return;
        }
        self.cut(&range);
        self.0.insert(range.start, Extent { blocks: range.end - range.start, place });
    }

    /// Takes a range out.
    pub fn cut(&mut self, range: &Range<u64>) {
        if let Some((&start, extent)) = self.0.range_mut(..range.start).next_back() {
            let end = start + extent.blocks;
            if end > range.start {
                let tail = *extent;
                extent.blocks = range.start - start;
                if end > range.end {
                    let place = tail.place.advanced(range.end - start);
                    self.0.insert(range.end, Extent { blocks: end - range.end, place });
                }
            }
        }
        while let Some((&start, &extent)) = self.0.range(range.start..range.end).next() {
            self.0.remove(&start);
            let end = start + extent.blocks;
            if end > range.end {
                let place = extent.place.advanced(range.end - start);
                self.0.insert(range.end, Extent { blocks: end - range.end, place });
            }
        }
    }

    /// What is known of a range: its parts in order, those that are not here as `None`.
    pub fn parts(&self, range: Range<u64>) -> Parts<'_> {
        let before = self.0.range(..range.start).next_back();
        let before = before.filter(|(start, extent)| *start + extent.blocks > range.start);
        let first = before.map_or(range.start, |(&start, _)| start);
        Parts { extents: self.0.range(first..range.end.max(first)), next: None, at: range.start, end: range.end }
    }

    /// All ranges, in order.
    pub fn iter(&self) -> impl Iterator<Item = (Range<u64>, Place)> + '_ {
        self.0.iter().map(|(&start, extent)| (start..start + extent.blocks, extent.place))
    }
}

/// The parts of a range.
pub(crate) struct Parts<'a> {
    extents: std::collections::btree_map::Range<'a, u64, Extent>,
    /// Taken from the map and not given out yet.
    next: Option<(u64, Extent)>,
    at: u64,
    end: u64,
}

impl Iterator for Parts<'_> {
    type Item = (Range<u64>, Option<Place>);

    fn next(&mut self) -> Option<Self::Item> {
        if self.at >= self.end {
            return None;
        }
        let upcoming = self.next.take().or_else(|| self.extents.next().map(|(&start, &extent)| (start, extent)));
        let from = self.at;
        match upcoming {
            Some((start, extent)) if start <= from => {
                self.at = (start + extent.blocks).min(self.end);
                Some((from..self.at, Some(extent.place.advanced(from - start))))
            }
            Some((start, extent)) => {
                self.next = Some((start, extent));
                self.at = start.min(self.end);
                Some((from..self.at, None))
            }
            None => {
                self.at = self.end;
                Some((from..self.end, None))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_newest_range_is_on_top(
            ranges in prop::collection::vec((0..60u64, 1..20u64, 0..3u8), 0..40),
            look in (0..60u64, 0..30u64),
        ) {
            let mut map = ExtentMap::default();
            let mut blocks = vec![None; 100];
            for (index, (start, len, kind)) in ranges.into_iter().enumerate() {
                let range = start..start + len;
                let place = match kind {
                    0 => Some(Place::Zeros),
                    1 => Some(Place::Log(LogPlace::new(index as u32, 64))),
                    _ => None,
                };
                match place {
                    Some(place) => map.insert(range.clone(), place),
                    None => map.cut(&range),
                }
                for block in range {
                    blocks[block as usize] = place.map(|place| place.advanced(block - start));
                }
            }
            let range = look.0..look.0 + look.1;
            let mut at = range.start;
            for (part, place) in map.parts(range.clone()) {
                prop_assert_eq!(part.start, at);
                prop_assert!(!part.is_empty());
                for block in part.clone() {
                    let expected = place.map(|place| place.advanced(block - part.start));
                    prop_assert_eq!(expected, blocks[block as usize], "block {}", block);
                }
                at = part.end;
            }
            prop_assert_eq!(at, range.end);
        }
    }
}
