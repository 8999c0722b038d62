//! Logs by themselves: what a flush covers, and what a recovery takes for records.

use std::os::unix::fs::FileExt;

use super::*;
use crate::volume::log_file::{open_file, path_of};
use crate::volume::log_record::Change;
use crate::volume::spares::Spares;

const ID: Id = Id([7; 16]);
const FILE_LEN: u64 = FILE_LEN_RANGE.0;
const START: Position = Position { place: LogPlace(1 << 32 | 4096), sequence: 1, epoch: 0 };

/// What a recovery finds: the changes in order, and the log that goes on.
fn open(folder: &Path, epoch: u32, start: Position) -> Result<(Vec<Change>, LogWriter)> {
    let mut changes = Vec::new();
    let recovered = recover(
        folder,
        ID,
        epoch,
        start,
        FILE_LEN,
        || None,
        |appended, _| {
            changes.push(appended.change);
            Ok(true)
        },
    )?;
    Ok((changes, recovered.writer))
}

fn write(offset: u64) -> Change {
    Change::Write { offset }
}

/// Appends writes as one group.
fn append_all(log: &mut LogWriter, writes: &[(u64, &[u8])]) -> Result<Vec<Appended>> {
    let entry = |&(offset, payload): &(u64, _)| Entry::new(write(offset), payload);
    let mut appended = Vec::new();
    log.append_all(&writes.iter().map(entry).collect::<Vec<_>>(), &mut appended)?;
    Ok(appended)
}

fn append(log: &mut LogWriter, offset: u64) -> Appended {
    let payload = vec![(offset / 4096) as u8 | 0x40; 4096];
    append_all(log, &[(offset, &payload)]).unwrap().remove(0)
}

fn flush(log: &mut LogWriter) {
    let flush = log.begin_flush().unwrap();
    let result = flush.run();
    log.end_flush(&flush, &result);
}

fn flip(folder: &Path, place: LogPlace, bit: u64) {
    let file = File::options().read(true).write(true).open(path_of(folder, place.file())).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, place.offset() + bit / 8).unwrap();
    file.write_all_at(&[byte[0] ^ 1 << (bit % 8)], place.offset() + bit / 8).unwrap();
}

#[test]
fn a_flush_covers_what_was_written_while_another_ran_and_the_log_went_on_in_the_next_file() {
    let folder = tempfile::tempdir().unwrap();
    let (_, mut log) = open(folder.path(), 1, START).unwrap();
    append(&mut log, 0);
    let first = log.begin_flush().unwrap();
    append(&mut log, 4096);
    log.next_file(None).unwrap();
    append(&mut log, 8192);
    log.end_flush(&first, &Ok(()));
    let second = log.begin_flush().unwrap();
    let numbers: Vec<u32> = second.files.iter().map(|file| file.number).collect();
    assert_eq!((numbers, second.sequence), (vec![1, 2], 4));
    log.end_flush(&second, &Ok(()));
    assert!(log.begin_flush().unwrap().files.is_empty());
}

#[test]
fn after_a_sync_that_failed_nothing_is_promised() {
    let folder = tempfile::tempdir().unwrap();
    let (_, mut log) = open(folder.path(), 1, START).unwrap();
    append(&mut log, 0);
    let flush = log.begin_flush().unwrap();
    log.end_flush(&flush, &Err(io::ErrorKind::Other.into()));
    assert!(matches!(log.begin_flush(), Err(StoreError::Broken { .. })));
    assert!(matches!(append_all(&mut log, &[(0, &[])]), Err(StoreError::Broken { .. })));
}

#[test]
fn the_first_record_after_a_flush_begins_at_a_page_of_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let (_, mut log) = open(folder.path(), 1, START).unwrap();
    for _ in 0..3 {
        append(&mut log, 0);
        append(&mut log, 4096);
        flush(&mut log);
        let end = log.position().place.offset();
        let next = append(&mut log, 8192).place.offset() - HEADER_LEN as u64;
        assert!(next.is_multiple_of(PAGE_LEN) && next >= end);
    }
}

#[test]
fn a_recovery_stops_at_the_first_record_that_is_torn_in_either_shape() {
    // Zeros where a preallocated file was not written, and a file that ends.
    for shape in ["zeros", "short"] {
        for torn in 0..5u64 {
            let folder = tempfile::tempdir().unwrap();
            let (_, mut log) = open(folder.path(), 1, START).unwrap();
            let places: Vec<u64> = (0..5).map(|at| append(&mut log, at * 4096).place.offset()).collect();
            let file = File::options().write(true).open(path_of(folder.path(), 1)).unwrap();
            let tear = places[torn as usize] + 1000;
            match shape {
                "zeros" => file.write_all_at(&[0; 3096], tear).unwrap(),
                _ => file.set_len(tear).unwrap(),
            }
            let (found, _) = open(folder.path(), 2, START).unwrap();
            assert_eq!(found, (0..torn).map(|at| write(at * 4096)).collect::<Vec<_>>(), "{shape} {torn}");
        }
    }
}

#[test]
fn a_record_that_a_recovery_dropped_never_comes_back() {
    let folder = tempfile::tempdir().unwrap();
    let (_, mut log) = open(folder.path(), 1, START).unwrap();
    let torn = append(&mut log, 4096).place;
    append(&mut log, 8192);
    append(&mut log, 12_288);
    flip(folder.path(), torn, 77);
    // The place of the torn record is taken by one of the same length: those behind it follow it seamlessly.
    let (found, mut log) = open(folder.path(), 2, START).unwrap();
    assert_eq!(found, []);
    append(&mut log, 16_384);
    let moved = log.position();
    let (found, log) = open(folder.path(), 3, START).unwrap();
    assert_eq!(found, [write(16_384)]);
    assert_eq!(log.position().sequence, 2);
    drop(log);
    // Neither if the log is read from behind the new record on, as after it was moved into the tree.
    let (found, _) = open(folder.path(), 3, moved).unwrap();
    assert_eq!(found, []);
}

#[test]
fn a_recovery_goes_on_in_the_next_file_and_not_in_one_that_was_only_begun() {
    let folder = tempfile::tempdir().unwrap();
    let (_, mut log) = open(folder.path(), 1, START).unwrap();
    let spares = Spares::new(folder.path().to_owned());
    let mut expected = Vec::new();
    for file in 0..3 {
        while log.fits(4096) {
            expected.push(write(file * 4096));
            append(&mut log, file * 4096);
        }
        if file == 1 {
            // As if what was in it had been moved into the tree: its records are older, and it is used again.
            flush(&mut log);
        }
        spares.make(FILE_LEN).unwrap();
        log.next_file(spares.take(FILE_LEN)).unwrap();
    }
    for epoch in 2..5 {
        let (found, log) = open(folder.path(), epoch, START).unwrap();
        assert_eq!(found, expected);
        assert_eq!(log.position().place.file(), 3);
    }
}

#[test]
fn a_file_that_is_used_again_holds_nothing_of_what_was_in_it() {
    let folder = tempfile::tempdir().unwrap();
    let (_, mut log) = open(folder.path(), 1, START).unwrap();
    while log.fits(4096) {
        append(&mut log, 0);
    }
    log.next_file(None).unwrap();
    let end = log.position();
    append(&mut log, 4096);
    let first = open_file(folder.path(), 1, volume_tag(ID)).unwrap().unwrap();
    let spares = Spares::new(folder.path().to_owned());
    spares.give(std::slice::from_ref(&first), FILE_LEN).unwrap();
    let (found, mut log) = open(folder.path(), 2, end).unwrap();
    assert_eq!(found, [write(4096)]);
    while log.fits(4096) {
        append(&mut log, 8192);
    }
    log.next_file(spares.take(FILE_LEN)).unwrap();
    append(&mut log, 12_288);
    let (found, _) = open(folder.path(), 3, end).unwrap();
    assert_eq!((found[0], found[found.len() - 1]), (write(4096), write(12_288)));
    assert!(found[1..found.len() - 1].iter().all(|&change| change == write(8192)));
}

#[test]
fn a_file_whose_header_was_not_written_yet_ends_the_log() {
    let folder = tempfile::tempdir().unwrap();
    let (_, mut log) = open(folder.path(), 1, START).unwrap();
    append(&mut log, 4096);
    std::fs::copy(path_of(folder.path(), 1), path_of(folder.path(), 2)).unwrap();
    let (found, mut log) = open(folder.path(), 2, START).unwrap();
    assert_eq!(found, [write(4096)]);
    while log.fits(4096) {
        append(&mut log, 0);
    }
    log.next_file(None).unwrap();
    append(&mut log, 8192);
    let (found, _) = open(folder.path(), 3, START).unwrap();
    assert_eq!(found.last(), Some(&write(8192)));
}

#[test]
fn a_flipped_bit_in_a_record_that_was_promised_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let (_, mut log) = open(folder.path(), 1, START).unwrap();
    let mut places = Vec::new();
    for round in 0..6 {
        for part in 0..3 {
            places.push(append(&mut log, (round * 3 + part) * 4096).place);
        }
        flush(&mut log);
    }
    // What follows says that all of those were promised.
    append(&mut log, 0);
    append(&mut log, 0);
    for (at, place) in places.iter().enumerate() {
        for bit in [0, 8 * 15 + 1, 8 * 40, 8 * 61, 8 * 64, 8 * 1000 + 5, 8 * (64 + 4095) + 7] {
            let header = LogPlace(place.0 - HEADER_LEN as u64);
            flip(folder.path(), header, bit);
            match open(folder.path(), 2, START).map(|(found, _)| found.len()) {
                Err(StoreError::Damaged { what, .. }) => {
                    assert!(what.contains(&format!("record {}", at + 1)), "{what}");
                }
                other => panic!("record {at}, bit {bit}: {other:?}"),
            }
            flip(folder.path(), header, bit);
        }
    }
    assert_eq!(open(folder.path(), 2, START).unwrap().0.len(), 20);
}

#[test]
fn a_record_that_was_not_promised_can_be_torn_with_others_behind_it() {
    let folder = tempfile::tempdir().unwrap();
    let (_, mut log) = open(folder.path(), 1, START).unwrap();
    append(&mut log, 0);
    flush(&mut log);
    let torn = append(&mut log, 4096).place;
    for at in 2..300 {
        append(&mut log, at * 4096);
    }
    flip(folder.path(), torn, 99);
    assert_eq!(open(folder.path(), 2, START).unwrap().0, [write(0)]);
}

#[test]
fn a_log_that_begins_in_a_file_that_was_lost_goes_on_where_the_next_recovery_looks() {
    let folder = tempfile::tempdir().unwrap();
    let start = Position { place: LogPlace::new(5, 40_960), sequence: 70, epoch: 3 };
    let (found, mut log) = open(folder.path(), 4, start).unwrap();
    assert_eq!(found, []);
    append(&mut log, 4096);
    assert_eq!(open(folder.path(), 5, start).unwrap().0, [write(4096)]);
}

#[test]
fn records_of_a_group_are_found_as_if_they_had_come_alone() {
    let payloads: Vec<Vec<u8>> = (0..600usize).map(|at| vec![at as u8; [4096, 4144, 0, 8208][at % 4]]).collect();
    let writes: Vec<(u64, &[u8])> = (0..).map(|at| at * 4096).zip(payloads.iter().map(Vec::as_slice)).collect();
    let folder = tempfile::tempdir().unwrap();
    let (_, mut log) = open(folder.path(), 1, START).unwrap();
    let mut places = Vec::new();
    while places.len() < writes.len() {
        let rest = &writes[places.len()..];
        if !log.fits(rest[0].1.len()) {
            log.next_file(None).unwrap();
        }
        let appended = append_all(&mut log, rest).unwrap();
        assert!((1..=GROUP_LEN_MAX).contains(&appended.len()));
        places.extend(appended.iter().map(|record| (record.place, record.payload_len as usize)));
    }
    // The file ends inside a group.
    assert_eq!(log.position().place.file(), 2);
    for ((place, len), payload) in places.iter().zip(&payloads) {
        let file = File::open(path_of(folder.path(), place.file())).unwrap();
        let mut read = vec![0; *len];
        file.read_exact_at(&mut read, place.offset()).unwrap();
        assert!(read == *payload);
    }
    let (found, _) = open(folder.path(), 2, START).unwrap();
    assert_eq!(found, writes.iter().map(|(offset, _)| write(*offset)).collect::<Vec<_>>());
}

#[test]
fn of_a_group_that_the_host_took_a_part_of_what_is_whole_counts() {
    let folder = tempfile::tempdir().unwrap();
    let (_, mut log) = open(folder.path(), 1, START).unwrap();
    // A file of five pages that does not grow: the header's, and four for records.
    let file = rustix::fs::memfd_create("log", rustix::fs::MemfdFlags::ALLOW_SEALING).unwrap();
    rustix::fs::ftruncate(&file, 5 * PAGE_LEN).unwrap();
    rustix::fs::fcntl_add_seals(&file, rustix::fs::SealFlags::GROW).unwrap();
    log.file = Arc::new(LogFile { number: 1, file: file.into(), path: path_of(folder.path(), 1), format: FORMAT });
    log.allocated = FILE_LEN;
    let payload = [7; 4096];
    let entries: Vec<Entry> = (0..6).map(|at| Entry::new(write(at * 4096), &payload)).collect();
    let mut appended = Vec::new();
    let result = log.append_all(&entries, &mut appended);
    assert!(matches!(result, Err(StoreError::File { .. })), "{:?}", result.err());
    let whole: Vec<Change> = appended.iter().map(|record| record.change).collect();
    assert_eq!(whole, [write(0), write(4096), write(8192)]);
    assert_eq!(log.position().sequence, START.sequence + 3);
    assert_eq!(log.position().place.offset(), PAGE_LEN + 3 * (HEADER_LEN as u64 + 4096));
    // Nothing is promised behind a record that could not be written.
    assert!(log.broken().is_some());
}

#[test]
fn a_log_that_an_earlier_release_began_is_of_this_one_once_it_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let (_, mut log) = open(folder.path(), 1, START).unwrap();
    append(&mut log, 0);
    flush(&mut log);
    let path = path_of(folder.path(), 1);
    let header = || std::fs::read(&path).unwrap()[..HEADER_LEN].to_vec();
    let now = header();
    let mut earlier = now.clone();
    earlier[16] = 1;
    let checksum = crc32c::crc32c(&earlier[..60]);
    earlier[60..].copy_from_slice(&checksum.to_le_bytes());
    log.file().file.write_all_at(&earlier, 0).unwrap();
    let read = log_read::read(folder.path(), ID, START, |_, _| Ok(true)).unwrap();
    assert_eq!(read.end.sequence, START.sequence + 1);
    assert_eq!(header(), earlier, "whoever only reads changes nothing");
    let (found, _) = open(folder.path(), 2, START).unwrap();
    assert_eq!((found, header()), (vec![write(0)], now));
}
