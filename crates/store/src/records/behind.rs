//! The end of a file that grows: bytes are gathered in memory and written a piece at a time by another thread, while the next piece is
//! gathered.
//!
//! Pieces go past the host's page cache where the file system can do that: what is stored is rarely read soon, would drive out what is
//! read often, and each page that is new to the cache costs more than writing it. What a full disk refuses stays in memory, can be read from
//! there, and is tried again with whatever is asked next.

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::records::aligned::{Aligned, DIRECT_LEN};
use crate::records::segment::read_up_to;
use crate::room::{self, Purpose};
use crate::workers::Workers;

/// Bytes of a piece.
const PIECE_LEN: usize = 1 << 20;
/// Pieces on their way at a time: a disk is busy while the next piece is gathered.
const PIECES_MAX: usize = 2;
/// Buffers that are kept for the next pieces.
const BUFFERS_KEPT: usize = 2 * (PIECES_MAX + 1);

/// How bytes reach a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Writing {
    /// Through the host's page cache, for what is about to be read.
    Cached,
    /// Past it, where the file system can.
    Direct,
}

/// Threads that write pieces, and buffers for them; for any number of files.
#[derive(Clone, Default)]
pub(crate) struct Writers {
    workers: Workers,
    buffers: Arc<Mutex<Vec<Buffer>>>,
}

impl Writers {
    fn buffers(&self) -> MutexGuard<'_, Vec<Buffer>> {
        self.buffers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn buffer(&self) -> Buffer {
        let kept = self.buffers().pop();
        kept.unwrap_or_else(Buffer::for_a_piece)
    }

    /// Keeps a buffer for the next piece: memory that was used before costs less than new memory.
    fn give(&self, mut buffer: Buffer) {
        buffer.len = 0;
        let mut buffers = self.buffers();
        if buffers.len() < BUFFERS_KEPT {
            buffers.push(buffer);
        }
    }
}

/// Bytes of a piece.
#[derive(Default)]
struct Buffer {
    room: Aligned,
    len: usize,
}

impl Buffer {
    fn for_a_piece() -> Self {
        Buffer { room: Aligned::zeros(PIECE_LEN), len: 0 }
    }

    fn bytes(&self) -> &[u8] {
        &self.room[..self.len]
    }

    fn room(&self) -> usize {
        PIECE_LEN - self.len
    }

    fn push(&mut self, more: &[u8]) {
        self.room[self.len..][..more.len()].copy_from_slice(more);
        self.len += more.len();
    }

    /// The bytes with zeros up to a whole block.
    fn padded(&mut self) -> &[u8] {
        let padded = self.len.next_multiple_of(DIRECT_LEN);
        self.room[self.len..padded].fill(0);
        &self.room[..padded]
    }
}

/// The two ways to a file.
#[derive(Clone)]
struct Ways {
    cached: Arc<File>,
    direct: Option<Arc<File>>,
    purpose: Purpose,
}

impl Ways {
    /// Writes bytes of a buffer, whole blocks of them.
    fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.leave_room(bytes)?;
        if let Some(direct) = &self.direct {
            match direct.write_all_at(bytes, offset) {
                // A file can be opened so and not written so.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
                written => return written,
            }
        }
        self.cached.write_all_at(bytes, offset)
    }

    /// Writes bytes through the page cache.
    fn write_cached(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.leave_room(bytes)?;
        self.cached.write_all_at(bytes, offset)
    }

    fn leave_room(&self, more: &[u8]) -> io::Result<()> {
        match self.purpose {
            Purpose::Grow if !more.is_empty() => room::leave(&*self.cached, more.len() as u64),
            _ => Ok(()),
        }
    }
}

/// A piece on its way to the file.
struct Piece {
    offset: u64,
    buffer: Arc<Buffer>,
    landing: Arc<Landing>,
}

/// What became of a piece; none while it is written.
#[derive(Default)]
struct Landing {
    result: Mutex<Option<io::Result<()>>>,
    landed: Condvar,
}

impl Landing {
    fn result(&self) -> MutexGuard<'_, Option<io::Result<()>>> {
        self.result.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, result: io::Result<()>) {
        *self.result() = Some(result);
        self.landed.notify_all();
    }

    /// Waits until it was written, or not.
    fn wait(&self) -> io::Result<()> {
        let mut result = self.result();
        loop {
            match result.take() {
                Some(result) => return result,
                None => result = self.landed.wait(result).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }
}

/// The end of a file that grows.
pub(crate) struct Behind {
    ways: Ways,
    writers: Writers,
    /// Each begins where the one before ends, and the gathered bytes behind the last.
    pieces: VecDeque<Piece>,
    /// Where the gathered bytes belong: at a multiple of [`DIRECT_LEN`].
    start: u64,
    /// The piece that is being filled; never whole for long.
    gathered: Buffer,
    /// Gathered bytes that can be read from the file already.
    readable: usize,
}

impl Behind {
    /// The end of an empty file, which is opened a second time by its path.
    pub fn new(file: Arc<File>, path: &Path, writing: Writing, purpose: Purpose, writers: &Writers) -> Self {
        let direct = match writing {
            Writing::Cached => None,
            Writing::Direct => {
                let flags = rustix::fs::OFlags::DIRECT.bits() as i32;
                // Some file systems have no such way.
                File::options().write(true).custom_flags(flags).open(path).ok().map(Arc::new)
            }
        };
        Behind {
            ways: Ways { cached: file, direct, purpose },
            writers: writers.clone(),
            pieces: VecDeque::new(),
            start: 0,
            gathered: writers.buffer(),
            readable: 0,
        }
    }

    /// For reading what was [flushed](Self::flush).
    pub fn file(&self) -> &Arc<File> {
        &self.ways.cached
    }

    pub fn len(&self) -> u64 {
        self.start + self.gathered.len as u64
    }

    /// Sees to it that the next piece can be begun; after it a megabyte can be added without an error.
    pub fn make_room(&mut self) -> io::Result<()> {
        while self.pieces.len() > PIECES_MAX {
            self.land()?;
        }
        Ok(())
    }

    /// Adds bytes. There must be [room](Self::make_room).
    pub fn push(&mut self, mut more: &[u8]) {
        loop {
            let (now, later) = more.split_at(more.len().min(self.gathered.room()));
            self.gathered.push(now);
            if self.gathered.room() > 0 {
                return;
            }
            self.send();
            more = later;
        }
    }

    /// Has what was gathered, a whole piece, written by another thread.
    fn send(&mut self) {
        let buffer = std::mem::replace(&mut self.gathered, self.writers.buffer());
        let piece = Piece { offset: self.start, buffer: Arc::new(buffer), landing: Arc::default() };
        self.start += PIECE_LEN as u64;
        self.readable = 0;
        let (ways, bytes, landing, offset) =
            (self.ways.clone(), piece.buffer.clone(), piece.landing.clone(), piece.offset);
        self.writers.workers.run(move || {
            let written = ways.write(bytes.bytes(), offset);
            drop((bytes, ways));
            landing.set(written);
        });
        self.pieces.push_back(piece);
    }

    /// Waits until the first piece is in the file. One that could not be written is tried once more.
    fn land(&mut self) -> io::Result<()> {
        let Some(piece) = self.pieces.front() else { return Ok(()) };
        if piece.landing.wait().is_err()
            && let Err(error) = self.ways.write(piece.buffer.bytes(), piece.offset)
        {
            piece.landing.set(Err(io::Error::from(error.kind())));
            return Err(error);
        }
        let buffer = self.pieces.pop_front().map(|piece| Arc::try_unwrap(piece.buffer));
        if let Some(Ok(buffer)) = buffer {
            self.writers.give(buffer);
        }
        Ok(())
    }

    fn land_all(&mut self) -> io::Result<()> {
        while !self.pieces.is_empty() {
            self.land()?;
        }
        Ok(())
    }

    /// Writes what the file does not have through the page cache.
    fn write_rest(&mut self) -> io::Result<()> {
        let rest = &self.gathered.bytes()[self.readable..];
        self.ways.write_cached(rest, self.start + self.readable as u64)?;
        self.readable = self.gathered.len;
        Ok(())
    }

    /// Hands everything to the host, so that it can be read from the file. What is no whole piece stays here, too, until it is one.
    pub fn flush(&mut self) -> io::Result<()> {
        self.land_all()?;
        self.write_rest()
    }

    /// As [`flush`](Self::flush) for what is about to be synced. There may be zeros behind the end then, up to a whole block.
    pub fn write_all(&mut self) -> io::Result<()> {
        self.land_all()?;
        if self.ways.direct.is_some() && self.readable < self.gathered.len {
            let from = self.readable / DIRECT_LEN * DIRECT_LEN;
            self.ways.write(&self.gathered.padded()[from..], self.start + from as u64)?;
            self.readable = self.gathered.len;
            return Ok(());
        }
        self.write_rest()
    }

    /// Whether all bytes before a place can be read from the file.
    pub fn is_readable(&self, end: u64) -> bool {
        let known = self.pieces.front().map_or(self.start + self.readable as u64, |piece| piece.offset);
        end.min(self.len()) <= known
    }

    /// Reads from wherever the bytes are, up to the end; gives how many there were.
    pub fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
        let len = (bytes.len() as u64).min(self.len().saturating_sub(offset)) as usize;
        let bytes = &mut bytes[..len];
        let pieces = self.pieces.iter().map(|piece| (piece.offset, piece.buffer.bytes()));
        let parts = pieces.chain([(self.start, self.gathered.bytes())]);
        let in_memory = self.pieces.front().map_or(self.start, |piece| piece.offset);
        let in_file = (in_memory.saturating_sub(offset) as usize).min(len);
        if read_up_to(&self.ways.cached, &mut bytes[..in_file], offset)? < in_file {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        for (begin, part) in parts {
            let from = begin.max(offset);
            let to = (begin + part.len() as u64).min(offset + len as u64);
            if from < to {
                bytes[(from - offset) as usize..(to - offset) as usize]
                    .copy_from_slice(&part[(from - begin) as usize..(to - begin) as usize]);
            }
        }
        Ok(len)
    }
}

impl Drop for Behind {
    fn drop(&mut self) {
        for piece in self.pieces.drain(..) {
            if let Ok(buffer) = Arc::try_unwrap(piece.buffer) {
                self.writers.give(buffer);
            }
        }
        let gathered = std::mem::take(&mut self.gathered);
        self.writers.give(gathered);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_store::noise;

    fn behind(folder: &tempfile::TempDir, writing: Writing) -> Behind {
        let path = folder.path().join("file");
        let file = File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
        Behind::new(Arc::new(file), &path, writing, Purpose::Grow, &Writers::default())
    }

    /// A file that takes nothing: what is written to it fails as on a full disk, until it is replaced.
    fn fill(behind: &mut Behind) -> Ways {
        let full = Arc::new(File::options().write(true).open("/dev/full").unwrap());
        std::mem::replace(&mut behind.ways, Ways { cached: full, direct: None, purpose: Purpose::Grow })
    }

    fn read(behind: &Behind, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let found = behind.read_at(&mut bytes, offset).unwrap();
        bytes.truncate(found);
        bytes
    }

    #[test]
    fn what_was_added_is_read_from_wherever_it_is_and_ends_in_the_file() {
        for writing in [Writing::Cached, Writing::Direct] {
            let folder = tempfile::tempdir().unwrap();
            let mut behind = behind(&folder, writing);
            let mut all = Vec::new();
            for turn in 0..400u64 {
                let more = noise(turn, 1 + (turn as usize * 7919) % 40_000);
                behind.make_room().unwrap();
                behind.push(&more);
                all.extend_from_slice(&more);
                match turn % 50 {
                    20 => behind.flush().unwrap(),
                    45 => behind.write_all().unwrap(),
                    _ => {}
                }
                if matches!(turn % 50, 20 | 45) {
                    assert!(behind.is_readable(all.len() as u64));
                    let mut found = vec![0; all.len()];
                    behind.file().read_exact_at(&mut found, 0).unwrap();
                    assert!(found == all);
                }
                let from = (turn as usize * 104_729) % all.len();
                let len = 60_000.min(all.len() - from);
                assert!(read(&behind, from as u64, 60_000) == all[from..from + len], "{turn}");
                // What can be read from the file is there.
                let end = (from + len) as u64;
                if behind.is_readable(end) {
                    let mut found = vec![0; len];
                    behind.file().read_exact_at(&mut found, from as u64).unwrap();
                    assert!(found == all[from..from + len], "{turn}");
                }
            }
            assert_eq!(behind.len(), all.len() as u64);
            assert!(read(&behind, all.len() as u64 + 5, 10).is_empty());
        }
    }

    /// What straddles two pieces, the first of which is in the file, is read whole as well.
    #[test]
    fn a_full_disk_refuses_more_in_time_and_keeps_all_that_it_took_readable() {
        let folder = tempfile::tempdir().unwrap();
        let mut behind = behind(&folder, Writing::Direct);
        let first = noise(1, PIECE_LEN + 5000);
        behind.push(&first);
        behind.flush().unwrap();
        let ways = fill(&mut behind);
        // Reading goes on from the file that is there.
        let mut all = first;
        let refused = loop {
            if let Err(error) = behind.make_room() {
                break error;
            }
            let more = noise(all.len() as u64, 16_448);
            behind.push(&more);
            all.extend_from_slice(&more);
            assert!(all.len() < 16 * PIECE_LEN, "nothing is refused");
        };
        assert_eq!(refused.kind(), io::ErrorKind::StorageFull);
        assert!(behind.flush().is_err() && behind.write_all().is_err() && behind.make_room().is_err());
        let full = std::mem::replace(&mut behind.ways, ways);
        for from in [0, PIECE_LEN - 3000, PIECE_LEN + 100, 2 * PIECE_LEN - 10, all.len() - 20_000] {
            assert!(read(&behind, from as u64, 20_000) == all[from..(from + 20_000).min(all.len())]);
        }
        assert!(!behind.is_readable(PIECE_LEN as u64 + 6000));
        drop(full);
        // There is room again.
        behind.write_all().unwrap();
        let mut found = vec![0; all.len()];
        behind.file().read_exact_at(&mut found, 0).unwrap();
        assert!(found == all);
    }
}
