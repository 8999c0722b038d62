//! Reading a volume's log: which records count, and where it ends.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;

use crate::error::{Result, StoreError};
use crate::id::Id;
use crate::records::segment::read_up_to;
use crate::volume::extent_map::LogPlace;
use crate::volume::log_file::{LogFile, PAGE_LEN, open_file, read_whole, settle};
use crate::volume::log_record::{Appended, HEADER_LEN, Header, PAYLOAD_LEN_MAX, Position, record_len, volume_tag};

/// Reads a log from a position on and changes nothing: `found` hears of every record that counts. Gives the files that were read, and
/// where the log ends.
pub(crate) fn read(
    folder: &Path,
    id: Id,
    start: Position,
    mut found: impl FnMut(Appended, &[u8]),
) -> Result<(Vec<Arc<LogFile>>, Position)> {
    let volume = volume_tag(id);
    let mut files: Vec<Arc<LogFile>> = Vec::new();
    let mut at = start;
    let mut payload = Vec::new();
    while let Some(file) = open_file(folder, at.place.file(), volume)? {
        let file = Arc::new(file);
        files.push(file.clone());
        let reading = StoreError::file("read", &file.path);
        let end = (|| {
            settle(&file.file)?;
            while let Some((header, offset)) = next_record(&file.file, &at, volume, &mut payload)? {
                let begin = LogPlace::new(file.number, (offset + HEADER_LEN as u64) as u32);
                at = Position {
                    place: LogPlace::new(file.number, (offset + record_len(payload.len())) as u32),
                    sequence: at.sequence + 1,
                    epoch: header.epoch,
                };
                let appended =
                    Appended { change: header.change, place: begin, payload_len: payload.len() as u32, end: at };
                found(appended, &payload);
            }
            Ok(at)
        })();
        at = end.map_err(reading)?;
        // The next file counts if it begins with the record that comes next.
        let next = Position { place: LogPlace::new(file.number + 1, PAGE_LEN as u32), ..at };
        let follower = open_file(folder, next.place.file(), volume)?;
        if let Some(offset) = promised_behind(&file, follower.as_ref(), &at, volume)? {
            return Err(StoreError::Damaged {
                path: file.path.clone(),
                offset,
                what: format!("record {} of the log was promised and is not whole any more", at.sequence),
            });
        }
        let Some(file) = follower else { break };
        let begins = next_record(&file.file, &next, volume, &mut payload);
        if begins.map_err(StoreError::file("read", &file.path))?.is_none() {
            break;
        }
        at = next;
    }
    Ok((files, at))
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
    let offset = at.place.offset();
    let mut places = vec![offset, offset.next_multiple_of(PAGE_LEN)];
    places.dedup();
    for offset in places {
        let mut bytes = [0; HEADER_LEN];
        if !read_whole(file, &mut bytes, offset)? {
            continue;
        }
        let Some(header) = Header::from_bytes(&bytes, volume) else { continue };
        if header.sequence != at.sequence || header.epoch < at.epoch {
            continue;
        }
        payload.resize(header.payload_len as usize, 0);
        if read_whole(file, payload, offset + HEADER_LEN as u64)? && crc32c::crc32c(payload) == header.checksum {
            return Ok(Some((header, offset)));
        }
    }
    Ok(None)
}
