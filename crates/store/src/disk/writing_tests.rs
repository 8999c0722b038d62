//! Writes that are collected: their order, what has them carried out, and what becomes of each.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use polder_trust::keys::{KeyFile, Secret};

use super::*;
use crate::disk::{Disk, Operation};
use crate::domain::Key;
use crate::test_store::volume_content;
use crate::volume::Volume;
use crate::{Content, OpenDisk, Store, StoreOptions, VolumeOptions};

const MIB: u64 = 1 << 20;
const BLOCK: usize = BLOCK_LEN as usize;

fn store_in(folder: &tempfile::TempDir) -> Arc<Store> {
    Store::open(folder.path(), StoreOptions::default()).unwrap()
}

fn key() -> Key {
    Key::File(KeyFile::of(Secret::take(&mut [7; 32])))
}

/// A volume of 8 MiB in a new store, in a domain or in none.
fn new_volume(folder: &tempfile::TempDir, domain: Option<&str>, options: VolumeOptions) -> Volume {
    let store = store_in(folder);
    if let Some(domain) = domain {
        store.create_domain(domain, &key(), None).unwrap();
    }
    let content = Content::Zeros { capacity_bytes: 8 * MIB, chunk_len: 16_384 };
    store.create_volume_in("disk", &content, domain).unwrap();
    Volume::open(&store, "disk", options).unwrap()
}

fn disk_in(folder: &tempfile::TempDir) -> Arc<OpenDisk> {
    Arc::new(OpenDisk::Volume(new_volume(folder, None, VolumeOptions::default())))
}

fn volume(disk: &OpenDisk) -> &Volume {
    let OpenDisk::Volume(volume) = disk else { unreachable!("it was made as one") };
    volume
}

fn write<B>(offset: u64, buffer: B) -> Operation<B> {
    Operation::Write { offset, buffer, durability: Durability::Cached }
}

/// All that is in flight, in the order in which it completes.
fn all<B: Buffer>(queue: &mut DiskQueue<B>) -> Vec<Completion<B>> {
    let mut completions = Vec::new();
    while queue.in_flight() > 0 {
        if let Some(completion) = queue.next_completion() {
            completions.push(completion);
            continue;
        }
        let mut waited = [rustix::event::PollFd::from_borrowed_fd(queue.signal(), rustix::event::PollFlags::IN)];
        rustix::event::poll(&mut waited, Some(&rustix::time::Timespec { tv_sec: 20, tv_nsec: 0 })).unwrap();
        let _ = rustix::io::read(queue.signal(), &mut [0; 8]);
    }
    completions
}

fn all_well<B: Buffer>(queue: &mut DiskQueue<B>) -> Vec<Completion<B>> {
    let completions = all(queue);
    completions.iter().for_each(|completion| assert!(completion.result.is_ok(), "{:?}", completion.result));
    completions
}

/// Records that the volume's log ever got.
fn records(disk: &OpenDisk) -> u64 {
    volume(disk).core().sequence()
}

#[test]
fn writes_wait_until_completions_are_asked_for_and_come_in_their_order() {
    let folder = tempfile::tempdir().unwrap();
    let disk = disk_in(&folder);
    let mut queue = disk.open_queue::<Vec<u8>>().unwrap();
    let before = records(&disk);
    for token in 0..20 {
        queue.submit(token, write(BLOCK_LEN * (token % 3), vec![token as u8; 2 * BLOCK]));
    }
    assert_eq!((records(&disk), queue.in_flight()), (before, 20));
    let tokens: Vec<u64> = all_well(&mut queue).iter().map(|completion| completion.token).collect();
    assert_eq!(tokens, (0..20).collect::<Vec<_>>());
    assert_eq!(records(&disk), before + 20);
    let content = volume_content(volume(&disk));
    let firsts: Vec<u8> = content.chunks(BLOCK).take(4).map(|block| block[0]).collect();
    // 17 lies on blocks 2 and 3, then 18 on 0 and 1, then 19 on 1 and 2.
    assert_eq!(firsts, [18, 19, 19, 17]);
}

#[test]
fn what_counts_on_its_place_in_the_order_comes_after_what_was_collected() {
    let folder = tempfile::tempdir().unwrap();
    let disk = disk_in(&folder);
    let mut queue = disk.open_queue::<Vec<u8>>().unwrap();
    let core = volume(&disk).core().clone();
    let two = |queue: &mut DiskQueue<Vec<u8>>, fill: u8| {
        queue.submit(1, write(0, vec![fill; BLOCK]));
        queue.submit(2, write(BLOCK_LEN, vec![fill; BLOCK]));
    };
    // A read of the same bytes sees them; one of others leaves them.
    two(&mut queue, 1);
    queue.submit(3, Operation::Read { offset: 2 * BLOCK_LEN, buffer: vec![9; BLOCK] });
    assert_eq!(queue.collected.len(), 2);
    queue.submit(4, Operation::Read { offset: BLOCK_LEN + 512, buffer: vec![9; BLOCK] });
    assert_eq!(queue.collected.len(), 0);
    let completions = all_well(&mut queue);
    let read = completions.into_iter().find(|completion| completion.token == 4).unwrap().buffer.unwrap();
    assert!(read[..BLOCK - 512] == [1; BLOCK - 512] && read[BLOCK - 512..] == [0; 512]);
    // Zeros and writes that are not collected lie over them.
    two(&mut queue, 2);
    queue.submit(3, Operation::Discard { offset: 0, len: BLOCK_LEN, durability: Durability::Cached });
    queue.submit(4, write(BLOCK_LEN, vec![3; 2 * COLLECTED_LEN_MAX]));
    all_well(&mut queue);
    let content = volume_content(volume(&disk));
    assert_eq!((content[0], content[BLOCK], content[2 * COLLECTED_LEN_MAX]), (0, 3, 3));
    // A flush makes them stable.
    two(&mut queue, 4);
    assert!(core.all_is_stable() || queue.collected.len() == 2);
    queue.submit(3, Operation::Flush);
    all_well(&mut queue);
    assert!(core.all_is_stable());
    assert_eq!(volume_content(volume(&disk))[BLOCK], 4);
    // So does each that asks for it.
    for token in 1..4 {
        let durability = if token == 2 { Durability::Stable } else { Durability::Cached };
        queue.submit(token, Operation::Write { offset: token * BLOCK_LEN, buffer: vec![5; BLOCK], durability });
    }
    let before = records(&disk);
    assert_eq!(all_well(&mut queue).len(), 3);
    assert_eq!(records(&disk), before + 3);
    assert!(core.all_is_stable());
}

#[test]
fn a_queue_that_goes_carries_out_what_it_collected() {
    let folder = tempfile::tempdir().unwrap();
    let disk = disk_in(&folder);
    let mut queue = disk.open_queue::<Vec<u8>>().unwrap();
    for token in 0..5 {
        queue.submit(token, write(token * BLOCK_LEN, vec![7; BLOCK]));
    }
    drop(queue);
    assert!(volume_content(volume(&disk))[..5 * BLOCK] == [7; 5 * BLOCK]);
}

#[test]
fn a_write_that_fails_takes_none_of_its_group_along() {
    let folder = tempfile::tempdir().unwrap();
    let disk = disk_in(&folder);
    let mut queue = disk.open_queue::<Vec<u8>>().unwrap();
    let mut outcomes = |places: &[u64], shrink: Option<u64>| -> Vec<bool> {
        for (token, place) in (0..).zip(places) {
            queue.submit(token, write(place * BLOCK_LEN, vec![*place as u8; BLOCK]));
        }
        if let Some(blocks) = shrink {
            volume(&disk).resize(blocks * BLOCK_LEN).unwrap();
        }
        let mut completions = all(&mut queue);
        completions.sort_by_key(|completion| completion.token);
        let is_outside = |result: &Result<(), DiskError>| matches!(result, Err(DiskError::OutOfRange { .. }));
        completions.iter().for_each(|completion| assert!(completion.buffer.is_some()));
        completions.iter().for_each(|c| assert!(c.result.is_ok() || is_outside(&c.result), "{:?}", c.result));
        completions.iter().map(|completion| completion.result.is_ok()).collect()
    };
    // The volume has 2,048 blocks, then 100.
    assert_eq!(outcomes(&[2048, 3, 2049, 4, u64::MAX / BLOCK_LEN, 5], None), [false, true, false, true, false, true]);
    assert_eq!(outcomes(&[99, 100, 2000, 98], Some(100)), [true, false, false, true]);
    let content = volume_content(volume(&disk));
    for block in [3, 4, 5, 98, 99] {
        assert_eq!(content[block * BLOCK], block as u8);
    }
}

/// Copies a folder that is in use.
fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() {
            copy(&path, &target);
        } else if path.is_file() {
            std::fs::copy(&path, &target).unwrap();
        }
    }
}

#[test]
fn groups_of_an_encrypted_volume_are_sealed_and_found_again_in_its_log() {
    let folder = tempfile::tempdir().unwrap();
    let disk = Arc::new(OpenDisk::Volume(new_volume(&folder, Some("tenant"), VolumeOptions::default())));
    let mut queue = disk.open_queue::<Vec<u8>>().unwrap();
    let fill = b"the dike at Kinderdijk is leaking ".repeat(128);
    for token in 0..40u64 {
        let mut block = fill[..BLOCK].to_vec();
        block[..8].copy_from_slice(&token.to_le_bytes());
        // Some of several blocks.
        queue.submit(token, write(4 * token * BLOCK_LEN, block.repeat(token as usize % 3 + 1)));
    }
    all_well(&mut queue);
    let log = std::fs::read(volume(&disk).core().folder.join("log-00000001")).unwrap();
    assert!(!log.windows(20).any(|part| part == &fill[100..120]));
    volume(&disk).flush().unwrap();
    // What a crash would leave.
    let after = tempfile::tempdir().unwrap();
    copy(folder.path(), after.path());
    let store = store_in(&after);
    store.unlock_domain("tenant", &key()).unwrap();
    let content = volume_content(&Volume::open(&store, "disk", VolumeOptions::default()).unwrap());
    for token in 0..40u64 {
        for copy in 0..=token % 3 {
            let at = (4 * token + copy) as usize * BLOCK;
            assert_eq!(content[at..at + 8], token.to_le_bytes());
            assert!(content[at + 8..at + BLOCK] == fill[8..BLOCK]);
        }
    }
}

#[test]
fn groups_go_on_in_the_next_file_of_the_log_and_wait_while_it_is_full() {
    let folder = tempfile::tempdir().unwrap();
    let options = VolumeOptions { log_bytes_max: 6 * MIB, log_file_bytes: 2 * MIB, ..VolumeOptions::default() };
    let options = VolumeOptions { log_bytes_start: 4 * MIB, ..options };
    let disk = Arc::new(OpenDisk::Volume(new_volume(&folder, None, options)));
    let mut queue = disk.open_queue::<Vec<u8>>().unwrap();
    // 24 MiB in groups of 300: a group is longer than one call to the host takes, and than what is left of a file.
    for group in 0..20u64 {
        for token in 0..300 {
            let place = (group * 300 + token) % 2048;
            queue.submit(token, write(place * BLOCK_LEN, (group * 300 + token).to_le_bytes().repeat(BLOCK / 8)));
        }
        assert_eq!(all_well(&mut queue).len(), 300);
    }
    drop(queue);
    let content = volume_content(volume(&disk));
    for (place, block) in (0u64..).zip(content.chunks(BLOCK)) {
        let last = (0..6000).rev().find(|write| write % 2048 == place).unwrap_or_default();
        assert!(block == last.to_le_bytes().repeat(BLOCK / 8), "block {place}");
    }
}

/// Memory that says how often it was taken, and shows itself to nobody.
struct Taken(Vec<u8>, Arc<AtomicUsize>);

impl Buffer for Taken {
    fn len(&self) -> usize {
        self.0.len()
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn put_zeros(&mut self, at: usize, len: usize) {
        self.0[at..at + len].fill(0);
    }

    fn take(&self, at: usize, bytes: &mut [u8]) {
        self.1.fetch_add(bytes.len(), SeqCst);
        bytes.copy_from_slice(&self.0[at..at + bytes.len()]);
    }
}

#[test]
fn memory_of_a_guest_is_taken_once_also_where_a_write_has_to_wait() {
    let folder = tempfile::tempdir().unwrap();
    // Two groups fill the log; nothing is moved before it is full.
    let options = VolumeOptions { log_bytes_max: MIB, log_bytes_start: MIB, ..VolumeOptions::default() };
    let disk = Arc::new(OpenDisk::Volume(new_volume(&folder, None, options)));
    let mut queue = disk.open_queue::<Taken>().unwrap();
    let taken = Arc::new(AtomicUsize::new(0));
    for group in 0..8u64 {
        for token in 0..100 {
            let place = group * 100 + token;
            queue.submit(token, write(place * BLOCK_LEN, Taken(vec![place as u8; BLOCK], taken.clone())));
        }
        assert_eq!(all_well(&mut queue).len(), 100);
    }
    assert_eq!(taken.load(SeqCst), 800 * BLOCK);
    let content = volume_content(volume(&disk));
    assert!((0..800).all(|place| content[place * BLOCK..][..BLOCK] == [place as u8; BLOCK]));
}
