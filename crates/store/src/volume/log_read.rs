//! Reading a volume's log: which records count, and where it ends.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

use crate::error::{Result, StoreError};
use crate::id::Id;
use crate::name::Name;
use crate::records::segment::read_up_to;
use crate::volume::extent_map::LogPlace;
use crate::volume::log_file::{LogFile, PAGE_LEN, open_file, read_whole, settle};
use crate::volume::log_record::{
    Appended, Change, HEADER_LEN, Header, PAYLOAD_LEN_MAX, Position, chunk_names, record_len, volume_tag,
};

/// What was read of a log.
pub(crate) struct Found {
    pub files: Vec<Arc<LogFile>>,
    /// Where it ends.
    pub end: Position,
    /// The offset of a record in the last file that is whole and does not count.
    pub refused: Option<u64>,
}

/// Reads a log from a position on and changes nothing: `found` hears of every record that is whole, and says whether it counts; the log ends
/// before the first that does not.
pub(crate) fn read(
    folder: &Path,
    id: Id,
    start: Position,
    mut found: impl FnMut(Appended, &[u8]) -> Result<bool>,
) -> Result<Found> {
    let volume = volume_tag(id);
    let mut files: Vec<Arc<LogFile>> = Vec::new();
    let mut at = start;
    let mut payload = Vec::new();
    let mut refused = None;
    while let Some(file) = open_file(folder, at.place.file(), volume)? {
        let file = Arc::new(file);
        files.push(file.clone());
        settle(&file.file).map_err(StoreError::file("read", &file.path))?;
        loop {
            let next = next_record(&file.file, &at, volume, &mut payload);
            let Some((header, offset)) = next.map_err(StoreError::file("read", &file.path))? else { break };
            let end = behind(&header, file.number, offset);
            let place = LogPlace::new(file.number, (offset + HEADER_LEN as u64) as u32);
            let appended = Appended { change: header.change, place, payload_len: payload.len() as u32, end };
            if !found(appended, &payload)? {
                refused = Some(offset);
                break;
            }
            at = end;
        }
        // The next file counts if it begins with the record that comes next.
        let next = Position { place: LogPlace::new(file.number + 1, PAGE_LEN as u32), ..at };
        let follower = open_file(folder, next.place.file(), volume)?;
        if let Some(offset) = promised_behind(&file, follower.as_ref(), &at, volume)? {
            return Err(StoreError::Damaged {
                path: file.path.clone(),
                offset,
                what: match refused {
                    None => format!("record {} of the log was promised and is not whole any more", at.sequence),
                    Some(_) => {
                        format!("record {} of the log was promised and names chunks that are not there", at.sequence)
                    }
                },
            });
        }
        let Some(file) = follower.filter(|_| refused.is_none()) else { break };
        let begins = next_record(&file.file, &next, volume, &mut payload);
        if begins.map_err(StoreError::file("read", &file.path))?.is_none() {
            break;
        }
        at = next;
    }
    Ok(Found { files, end: at, refused })
}

/// Chunks that a record of a log names.
pub(crate) struct NamedChunks {
    /// Where the record is, and its sequence number.
    pub at: Position,
    /// In the volume.
    pub offset: u64,
    pub names: Arc<[Name]>,
}

/// Looks for the records of a log that name chunks, from a position on, in files that somebody may be writing; whether the chunks are there
/// is not looked at. Gives them, where the log ends, and up to which sequence number its records were promised.
pub(crate) fn read_named_chunks(
    folder: &Path,
    id: Id,
    chunk_len: u64,
    start: Position,
) -> Result<(Vec<NamedChunks>, Position, u64)> {
    let volume = volume_tag(id);
    let (mut found, mut promised) = (Vec::new(), 0);
    let mut at = start;
    let mut payload = Vec::new();
    while let Some(file) = open_file(folder, at.place.file(), volume)? {
        loop {
            let next = next_record(&file.file, &at, volume, &mut payload);
            let Some((header, offset)) = next.map_err(StoreError::file("read", &file.path))? else { break };
            promised = promised.max(header.promised);
            if let Change::Chunks { offset, .. } = header.change
                && let Some(names) = chunk_names(header.change, &payload, chunk_len)
            {
                found.push(NamedChunks { at, offset, names });
            }
            at = behind(&header, file.number, offset);
        }
        let next = Position { place: LogPlace::new(file.number + 1, PAGE_LEN as u32), ..at };
        let Some(file) = open_file(folder, next.place.file(), volume)? else { break };
        let begins = next_record(&file.file, &next, volume, &mut payload);
        if begins.map_err(StoreError::file("read", &file.path))?.is_none() {
            break;
        }
        at = next;
    }
    Ok((found, at, promised))
}

/// The position behind a record that begins at an offset of a file.
fn behind(header: &Header, file: u32, offset: u64) -> Position {
    Position {
        place: LogPlace::new(file, (offset + record_len(header.payload_len as usize)) as u32),
        sequence: header.sequence + 1,
        epoch: header.epoch,
    }
}

/// Where a record at a position begins: there, or at the next page.
fn record_places(at: &Position) -> impl Iterator<Item = u64> {
    let offset = at.place.offset();
    let page = offset.next_multiple_of(PAGE_LEN);
    std::iter::once(offset).chain((page != offset).then_some(page))
}

/// Reads the payload of a record; whether it is whole.
fn read_payload(file: &File, header: &Header, offset: u64, payload: &mut Vec<u8>) -> io::Result<bool> {
    payload.resize(header.payload_len as usize, 0);
    Ok(read_whole(file, payload, offset + HEADER_LEN as u64)? && crc32c::crc32c(payload) == header.checksum)
}

/// Where a record that should be at a position was damaged, if one was: records behind it say that it was promised. One record is as
/// long as a megabyte, so the one that follows it begins not far behind, or in the next file.
fn promised_behind(file: &LogFile, follower: Option<&LogFile>, at: &Position, volume: u64) -> Result<Option<u64>> {
    let reading = |file: &LogFile| {
        let path = file.path.clone();
        move |error| StoreError::file("read", &path)(error)
    };
    let start = at.place.offset();
    let mut window = vec![0; 2 * PAYLOAD_LEN_MAX];
    let len = read_up_to(&file.file, &mut window, start).map_err(reading(file))?;
    let follows = |header: &Header| header.sequence > at.sequence && header.epoch >= at.epoch;
    let mut payload = Vec::new();
    let mut promises = |file: &LogFile, offset: u64, header: &Header| -> io::Result<bool> {
        let begin = LogPlace::new(file.number, offset as u32);
        let mut next = Position { place: begin, sequence: header.sequence, epoch: at.epoch };
        while let Some((header, offset)) = next_record(&file.file, &next, volume, &mut payload)? {
            if header.promised > at.sequence {
                return Ok(true);
            }
            let end = offset + record_len(payload.len());
            let place = LogPlace::new(file.number, end as u32);
            next = Position { place, sequence: header.sequence + 1, epoch: header.epoch };
        }
        Ok(false)
    };
    for from in (0..len.saturating_sub(HEADER_LEN - 1)).step_by(HEADER_LEN) {
        let Some(header) = header_at(&window[from..], volume).filter(&follows) else { continue };
        if promises(file, start + from as u64, &header).map_err(reading(file))? {
            return Ok(Some(start));
        }
        break;
    }
    if let Some(follower) = follower {
        let mut bytes = [0; HEADER_LEN];
        if read_whole(&follower.file, &mut bytes, PAGE_LEN).map_err(reading(follower))?
            && let Some(header) = header_at(&bytes, volume).filter(&follows)
            && promises(follower, PAGE_LEN, &header).map_err(reading(follower))?
        {
            return Ok(Some(start));
        }
    }
    Ok(None)
}

fn header_at(bytes: &[u8], volume: u64) -> Option<Header> {
    Header::from_bytes(bytes.first_chunk()?, volume)
}

/// The record at a position, or at the page behind it, if one counts. Its payload is left in `payload`.
fn next_record(file: &File, at: &Position, volume: u64, payload: &mut Vec<u8>) -> io::Result<Option<(Header, u64)>> {
    for offset in record_places(at) {
        let mut bytes = [0; HEADER_LEN];
        if !read_whole(file, &mut bytes, offset)? {
            continue;
        }
        let Some(header) = Header::from_bytes(&bytes, volume) else { continue };
        if header.sequence != at.sequence || header.epoch < at.epoch {
            continue;
        }
        if read_payload(file, &header, offset, payload)? {
            return Ok(Some((header, offset)));
        }
    }
    Ok(None)
}
