//! Reads of many chunks at once.

use std::os::unix::fs::FileExt;

use super::*;
use crate::disk::Disk;
use crate::domain::SEAL_LEN;
use crate::name::Kind;
use crate::test_store::noise;
use crate::volume::Volume;
use crate::{Content, Key, Store, StoreOptions, VolumeOptions};
use polder_trust::keys::{KeyFile, Secret};

/// The open domain, and one that is encrypted.
const DOMAINS: [Option<&str>; 2] = [None, Some("vault")];

fn key() -> Key {
    Key::File(KeyFile::of(Secret::take(&mut [1; 32])))
}

/// Keeps no chunks, so that each read comes from the segments.
fn open(folder: &tempfile::TempDir) -> Arc<Store> {
    Store::open(folder.path(), StoreOptions { chunk_cache_bytes: 0, ..StoreOptions::default() }).unwrap()
}

/// A volume of that content, all of it in its tree, and read once.
fn disk_of(folder: &tempfile::TempDir, domain: Option<&str>, content: &[u8], chunk_len: u32) -> Arc<OpenDisk> {
    let store = open(folder);
    if let Some(domain) = domain {
        store.create_domain(domain, &key(), None).unwrap();
    }
    let zeros = Content::Zeros { capacity_bytes: content.len() as u64, chunk_len };
    store.create_volume_in("disk", &zeros, domain).unwrap();
    let volume = Volume::open(&store, "disk", VolumeOptions::default()).unwrap();
    volume.write_at(0, content).unwrap();
    volume.close().unwrap();
    drop(store);
    let store = open(folder);
    if let Some(domain) = domain {
        store.unlock_domain(domain, &key()).unwrap();
    }
    let volume = Volume::open(&store, "disk", VolumeOptions::default()).unwrap();
    let mut read = vec![0; content.len()];
    volume.read_at(0, &mut read).unwrap();
    assert!(read == content);
    Arc::new(OpenDisk::Volume(volume))
}

fn read(queue: &mut DiskQueue<Vec<u8>>, offset: u64, len: usize) -> Result<Vec<u8>, DiskError> {
    queue.submit(1, Operation::Read { offset, buffer: vec![9; len] });
    loop {
        if let Some(completion) = queue.next_completion() {
            return completion.result.map(|()| completion.buffer.unwrap_or_default());
        }
        let mut waited = [rustix::event::PollFd::from_borrowed_fd(queue.signal(), rustix::event::PollFlags::IN)];
        rustix::event::poll(&mut waited, Some(&rustix::time::Timespec { tv_sec: 10, tv_nsec: 0 })).unwrap();
        let _ = rustix::io::read(queue.signal(), &mut [0; 8]);
    }
}

#[test]
fn runs_of_chunks_come_to_their_places_whatever_they_are_made_of() {
    let lens = [4096, 16_384, 65_536];
    for (domain, chunk_len) in DOMAINS.into_iter().flat_map(|domain| lens.map(|len| (domain, len))) {
        let folder = tempfile::tempdir().unwrap();
        let mut content = noise(1, 40 * chunk_len);
        for (index, chunk) in content.chunks_exact_mut(chunk_len).enumerate() {
            match index % 7 {
                // Half of it repeats.
                1 | 2 => chunk[chunk_len / 2..].fill(index as u8),
                4 => chunk.fill(0),
                // The same as elsewhere: its record lies there.
                5 => chunk.copy_from_slice(&noise(2, chunk_len)),
                _ => {}
            }
        }
        let disk = disk_of(&folder, domain, &content, chunk_len as u32);
        let mut queue = disk.open_queue::<Vec<u8>>().unwrap();
        for (offset, chunks) in [(0, 40), (0, 4), (chunk_len, 13), (3 * chunk_len, 30), (512, 20)] {
            let expected = &content[offset..offset + chunks * chunk_len - offset % chunk_len];
            let read = read(&mut queue, offset as u64, expected.len()).unwrap();
            assert!(read == expected, "{domain:?}: {chunks} chunks of {chunk_len} at {offset}");
        }
    }
}

#[test]
fn chunks_that_lie_one_after_the_other_are_read_with_one_call() {
    for domain in DOMAINS {
        let folder = tempfile::tempdir().unwrap();
        let content = noise(1, 12 * 16_384);
        let disk = disk_of(&folder, domain, &content, 16_384);
        let queue = disk.open_queue::<Vec<u8>>().unwrap();
        let (mut pieces, mut buffer) = (Vec::new(), vec![0; content.len()]);
        let root = queue.view.plan(0, content.len(), &mut pieces).unwrap();
        assert_eq!(queue.try_run(root, &pieces, 0, &mut buffer, &mut None), Some(8));
        assert!(buffer[..8 * 16_384] == content[..8 * 16_384]);
        assert_eq!(queue.try_run(root, &pieces[8..], 8 * 16_384, &mut buffer, &mut None), Some(4));
        assert!(buffer == content);
        // Nothing but headers, seals and padding went through room of our own.
        assert!(queue.record.borrow().len() < 16_384, "{domain:?}");
    }
}

#[test]
fn a_damaged_chunk_of_a_run_is_an_error_and_its_neighbours_are_read() {
    for domain in DOMAINS {
        let folder = tempfile::tempdir().unwrap();
        let mut content = noise(1, 32 * 16_384);
        content[20 * 16_384 + 8192..21 * 16_384].fill(7);
        let disk = disk_of(&folder, domain, &content, 16_384);
        let segment = std::fs::read_dir(folder.path().join("segments")).unwrap().next().unwrap().unwrap().path();
        let file = std::fs::File::options().read(true).write(true).open(segment).unwrap();
        let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        let mut queue = disk.open_queue::<Vec<u8>>().unwrap();
        let secret = queue.view.store().unlocked(queue.view.domain()).unwrap();
        let header_of = |chunk: usize| {
            let content = &content[chunk * 16_384..][..16_384];
            let name = match &secret {
                Some(domain) => domain.namer.name(Kind::Data, content),
                None => crate::Namer::open().name(Kind::Data, content),
            };
            bytes.windows(Name::LEN).position(|window| window == name.0).unwrap() - 16
        };
        let seal_len = if domain.is_some() { SEAL_LEN } else { 0 };
        // In what is not packed, in its header, in what is before or at its front, and in what is packed.
        for (chunk, place) in [(6, 64 + seal_len + 70), (7, 20), (5, 64), (4, 64 + 12), (20, 64 + seal_len + 70)] {
            let at = header_of(chunk) + place;
            file.write_all_at(&[!bytes[at]], at as u64).unwrap();
            assert!(read(&mut queue, chunk as u64 * 16_384, 16_384).is_err(), "{domain:?} {chunk}");
            assert!(read(&mut queue, 0, content.len()).is_err(), "{domain:?} {chunk}");
            let whole = read(&mut queue, 8 * 16_384, 8 * 16_384).unwrap();
            assert!(whole == content[8 * 16_384..16 * 16_384]);
            file.write_all_at(&[bytes[at]], at as u64).unwrap();
            assert!(read(&mut queue, 0, content.len()).unwrap() == content, "{domain:?} {chunk}");
        }
    }
}

/// Many reads at a time, from memory and from the disk, of which the host reads some ahead.
#[test]
fn deep_reads_from_memory_and_from_the_disk_all_come_back() {
    const BLOCK: usize = 4096;
    let folder = tempfile::tempdir().unwrap();
    let mut content = noise(1, 128 * 16_384);
    content.chunks_mut(2 * 16_384).for_each(|chunks| chunks[8192..16_384].fill(7));
    let disk = disk_of(&folder, None, &content, 16_384);
    let mut queue = disk.open_queue::<Vec<u8>>().unwrap();
    for is_cached in [true, false, true] {
        if !is_cached {
            for entry in std::fs::read_dir(folder.path().join("segments")).unwrap() {
                let file = std::fs::File::open(entry.unwrap().path()).unwrap();
                file.sync_all().unwrap();
                rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
            }
        }
        let blocks = (content.len() / BLOCK) as u64;
        for token in 0..blocks {
            queue.submit(token, Operation::Read { offset: token * BLOCK as u64, buffer: vec![9; BLOCK] });
        }
        let mut missing: std::collections::BTreeSet<u64> = (0..blocks).collect();
        while queue.in_flight() > 0 {
            let Some(completion) = queue.next_completion() else {
                let mut waited =
                    [rustix::event::PollFd::from_borrowed_fd(queue.signal(), rustix::event::PollFlags::IN)];
                let patience = rustix::time::Timespec { tv_sec: 10, tv_nsec: 0 };
                assert_eq!(rustix::event::poll(&mut waited, Some(&patience)).unwrap(), 1, "nobody rang");
                let _ = rustix::io::read(queue.signal(), &mut [0; 8]);
                continue;
            };
            completion.result.unwrap();
            let at = completion.token as usize * BLOCK;
            assert!(completion.buffer.unwrap() == content[at..at + BLOCK], "{}", completion.token);
            assert!(missing.remove(&completion.token));
        }
        assert!(missing.is_empty());
    }
}
