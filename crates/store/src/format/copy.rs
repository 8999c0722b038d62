//! Brings a disk from one format into another.
//!
//! Reading (and with it decompression) runs on several threads; writing is the caller's thread, in ascending order. At most two
//! pieces a thread are in memory.

use super::{COPY_THREADS_MAX, Content, Extent, FormatError, Source, Target, is_zero};
use std::collections::VecDeque;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

/// The length of a piece in bytes, and what pieces are aligned to: the largest cluster of qcow2, so that no compressed cluster
/// is inflated twice.
pub const COPY_CHUNK_LEN: u64 = 2 << 20;

/// How far a source is asked to look for the end of an extent, in bytes.
const EXTENT_LEN_MAX: u64 = 1 << 30;

/// A piece on its way.
enum Piece {
    /// Zeros: bytes of the disk.
    Zeros(Range<u64>),
    /// Bytes that a reader fills in: where they go, and where they come from.
    Data(u64, Receiver<Result<Filled, FormatError>>),
}

/// A piece that was read, and which parts of it hold something.
struct Filled {
    bytes: Vec<u8>,
    data: Vec<Range<usize>>,
}

/// What a reader is asked to do.
struct Job {
    offset: u64,
    bytes: Vec<u8>,
    answer: SyncSender<Result<Filled, FormatError>>,
}

/// Writes all of `source` to `target`, which is at least as long; what is beyond the source's end becomes zeros. `progress` hears
/// how many bytes of the disk are done, after each piece. The target is not finished.
pub fn copy(
    source: &dyn Source,
    target: &mut dyn Target,
    threads: NonZeroUsize,
    progress: &mut dyn FnMut(u64),
) -> Result<(), FormatError> {
    if target.len() < source.len() {
        return Err(FormatError::TargetTooSmall { target_len: target.len(), needed_len: source.len() });
    }
    let granule = target.granule();
    let threads = threads.get().min(COPY_THREADS_MAX);
    let (jobs, job_list) = sync_channel::<Job>(2 * threads);
    let job_list = Mutex::new(job_list);
    std::thread::scope(|scope| {
        // Owned here, so that the readers see its end whichever way this block is left.
        let jobs = jobs;
        for _ in 0..threads {
            scope.spawn(|| read_jobs(source, granule, &job_list));
        }
        let mut pieces: VecDeque<Piece> = VecDeque::with_capacity(2 * threads);
        let mut spare: Vec<Vec<u8>> = Vec::new();
        let mut at = 0;
        let mut extents = Extents { source, end: 0, content: Content::Zeros, next: None };
        loop {
            while at < source.len() && pieces.len() < 2 * threads {
                extents.reach(at)?;
                let extent_end = extents.end;
                match extents.content {
                    Content::Zeros => {
                        pieces.push_back(Piece::Zeros(at..extent_end));
                        at = extent_end;
                    }
                    Content::Data => {
                        let to_boundary = COPY_CHUNK_LEN - at % COPY_CHUNK_LEN;
                        let len = (extent_end - at).min(to_boundary);
                        let mut bytes = spare.pop().unwrap_or_default();
                        bytes.resize(len as usize, 0);
                        let (answer, filled) = sync_channel(1);
                        jobs.send(Job { offset: at, bytes, answer }).expect("the readers live as long as this block");
                        pieces.push_back(Piece::Data(at, filled));
                        at += len;
                    }
                }
            }
            let Some(piece) = pieces.pop_front() else { break };
            match piece {
                Piece::Zeros(range) => {
                    target.zero(range.start, range.end - range.start)?;
                    progress(range.end);
                }
                Piece::Data(offset, filled) => {
                    let filled = filled.recv().expect("a reader answers every job")?;
                    write_filled(target, offset, &filled)?;
                    progress(offset + filled.bytes.len() as u64);
                    spare.push(filled.bytes);
                }
            }
        }
        if source.len() < target.len() {
            target.zero(source.len(), target.len() - source.len())?;
        }
        Ok(())
    })
}

/// The extents of a source, neighbours of one kind joined until they are worth a job.
struct Extents<'a> {
    source: &'a dyn Source,
    end: u64,
    content: Content,
    /// The neighbour that is of another kind.
    next: Option<Extent>,
}

impl Extents<'_> {
    /// Looks further if everything before `at` is done.
    fn reach(&mut self, at: u64) -> Result<(), FormatError> {
        if at < self.end {
            return Ok(());
        }
        let mut extent = match self.next.take() {
            Some(extent) => extent,
            None => self.source.extent_at(at, EXTENT_LEN_MAX)?,
        };
        while extent.len < COPY_CHUNK_LEN && at + extent.len < self.source.len() {
            let next = self.source.extent_at(at + extent.len, EXTENT_LEN_MAX)?;
            if next.content != extent.content {
                self.next = Some(next);
                break;
            }
            extent.len += next.len;
        }
        (self.end, self.content) = (at + extent.len, extent.content);
        Ok(())
    }
}

fn read_jobs(source: &dyn Source, granule: usize, jobs: &Mutex<Receiver<Job>>) {
    loop {
        let job = jobs.lock().expect("no holder panics").recv();
        let Ok(Job { offset, mut bytes, answer }) = job else { return };
        let filled = source.read_at(offset, &mut bytes).map(|()| {
            let data = data_ranges(offset, &bytes, granule);
            Filled { bytes, data }
        });
        // The caller may have gone after an error elsewhere.
        let _ = answer.send(filled);
    }
}

/// The parts that are not whole granules of zeros, neighbours joined.
fn data_ranges(offset: u64, bytes: &[u8], granule: usize) -> Vec<Range<usize>> {
    let mut ranges: Vec<Range<usize>> = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        let to_boundary = granule - (offset as usize + at) % granule;
        let end = (at + to_boundary).min(bytes.len());
        if !is_zero(&bytes[at..end]) {
            match ranges.last_mut() {
                Some(last) if last.end == at => last.end = end,
                _ => ranges.push(at..end),
            }
        }
        at = end;
    }
    ranges
}

fn write_filled(target: &mut dyn Target, offset: u64, filled: &Filled) -> Result<(), FormatError> {
    let mut zeros_from = 0;
    for range in &filled.data {
        if zeros_from < range.start {
            target.zero(offset + zeros_from as u64, (range.start - zeros_from) as u64)?;
        }
        target.write_at(offset + range.start as u64, &filled.bytes[range.clone()])?;
        zeros_from = range.end;
    }
    if zeros_from < filled.bytes.len() {
        target.zero(offset + zeros_from as u64, (filled.bytes.len() - zeros_from) as u64)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::test_folder::TestFolder;
    use super::super::{RawSource, RawTarget};
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn a_copy_is_equal_and_leaves_zeros_out() {
        let folder = TestFolder::new("copy");
        let mut bytes = vec![0; (5 << 20) + 4096 + 100];
        for (index, byte) in bytes[3 << 20..].iter_mut().enumerate() {
            *byte = (index % 251) as u8;
        }
        bytes[(4 << 20)..(4 << 20) + 65536].fill(0);
        std::fs::write(folder.path("from"), &bytes).unwrap();
        let source = RawSource::open(&folder.path("from")).unwrap();
        let mut target = RawTarget::create(&folder.path("to"), 8 << 20).unwrap();
        let mut heard = Vec::new();
        copy(&source, &mut target, NonZeroUsize::new(3).unwrap(), &mut |done| heard.push(done)).unwrap();
        target.finish().unwrap();
        let written = std::fs::read(folder.path("to")).unwrap();
        assert!(written[..bytes.len()] == bytes && is_zero(&written[bytes.len()..]));
        assert_eq!(heard.last(), Some(&(bytes.len() as u64)));
        assert!(heard.is_sorted());
        let taken = std::fs::metadata(folder.path("to")).unwrap().blocks() * 512;
        assert!(taken < (3 << 20), "{taken} bytes are taken: the zeros were written");
    }

    #[test]
    fn a_target_that_is_too_small_is_refused() {
        let folder = TestFolder::new("copy-small");
        std::fs::write(folder.path("from"), [1; 100]).unwrap();
        let source = RawSource::open(&folder.path("from")).unwrap();
        let mut target = RawTarget::create(&folder.path("to"), 99).unwrap();
        let refused = copy(&source, &mut target, NonZeroUsize::MIN, &mut |_| ());
        assert!(matches!(refused, Err(FormatError::TargetTooSmall { target_len: 99, needed_len: 100 })));
    }
}
