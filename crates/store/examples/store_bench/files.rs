//! Plain files: what disks are made of, what the host's disk can do, and the least room that chunks can take.

use std::collections::HashSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{Advice, fadvise};
use serde_json::json;

use crate::Outcome;
use crate::arguments::Arguments;
use crate::figures::Figures;
use crate::random::Random;

const MIB: usize = 1 << 20;
const BLOCK: usize = 4096;
const CHUNK: usize = 16 << 10;

/// `file= bytes= data_percent=`: a disk. Of its megabytes that share is data, spread evenly, and the rest a hole; half of the
/// chunks of the data cannot be packed, the others to half their size.
pub fn make_data(arguments: &Arguments) -> Outcome {
    let bytes: usize = arguments.number("bytes")?;
    let data_percent: usize = arguments.number_or("data_percent", 100)?;
    let mut random = Random::new(arguments.number_or("seed", 1)?);
    let file = File::create(arguments.path("file")?)?;
    file.set_len(bytes as u64)?;
    let mut part = vec![0; MIB];
    let mut written = 0;
    for index in 0..bytes.div_ceil(MIB) {
        let len = (bytes - index * MIB).min(MIB);
        if (index * data_percent) % 100 >= data_percent {
            continue;
        }
        random.fill(&mut part);
        for chunk in part.chunks_mut(2 * CHUNK) {
            for line in chunk[..CHUNK].chunks_mut(1024) {
                line[512..].fill(b'p');
            }
        }
        file.write_all_at(&part[..len], (index * MIB) as u64)?;
        written += len;
    }
    file.sync_all()?;
    Ok(json!({ "data_bytes": written }))
}

/// Paths of files and folders: what the host's page cache holds of them is written back and dropped.
pub fn evict_all(arguments: &Arguments) -> Outcome {
    arguments.paths.iter().try_for_each(|path| evict(path))?;
    Ok(json!({}))
}

fn evict(path: &Path) -> Outcome<()> {
    let facts = std::fs::symlink_metadata(path)?;
    if facts.is_dir() {
        for entry in std::fs::read_dir(path)? {
            evict(&entry?.path())?;
        }
    } else if facts.is_file() {
        let file = File::open(path)?;
        file.sync_all()?;
        fadvise(&file, 0, None, Advice::DontNeed)?;
    }
    Ok(())
}

/// `file= bytes=`: what the disk does with one large file, synced when written and not in memory when read.
pub fn disk_speed(arguments: &Arguments) -> Outcome {
    let (path, bytes): (_, usize) = (arguments.path("file")?, arguments.number("bytes")?);
    let mut part = vec![0; MIB];
    Random::new(1).fill(&mut part);
    let begin = Instant::now();
    let file = File::options().read(true).write(true).create(true).truncate(true).open(path)?;
    for index in 0..bytes / MIB {
        file.write_all_at(&part, (index * MIB) as u64)?;
    }
    file.sync_all()?;
    let write = begin.elapsed();
    evict(path)?;
    let begin = Instant::now();
    for index in 0..bytes / MIB {
        file.read_exact_at(&mut part, (index * MIB) as u64)?;
    }
    let read = begin.elapsed();
    std::fs::remove_file(path)?;
    let speed = |time: Duration| bytes as f64 / time.as_secs_f64();
    Ok(json!({ "write_bytes_per_second": speed(write), "read_bytes_per_second": speed(read) }))
}

/// `file= seconds=`: writes of 4 KiB at random places of a file whose blocks are written, each followed by fdatasync.
pub fn sync_loop(arguments: &Arguments) -> Outcome {
    let file = File::options().read(true).write(true).open(arguments.path("file")?)?;
    let mut random = Random::new(arguments.number_or("seed", 1)?);
    let mut syncs = Syncs::new(&file, &mut random)?;
    let begin = Instant::now();
    while begin.elapsed() < arguments.duration("seconds")? {
        syncs.once()?;
    }
    Ok(syncs.summary(begin.elapsed()))
}

/// Writes and syncs of a plain file.
pub struct Syncs<'a> {
    file: &'a File,
    random: &'a mut Random,
    blocks: u64,
    block: Vec<u8>,
    pub both: Figures,
    sync: Figures,
}

impl<'a> Syncs<'a> {
    pub fn new(file: &'a File, random: &'a mut Random) -> Outcome<Self> {
        let blocks = file.metadata()?.len() / BLOCK as u64;
        let mut block = vec![0; BLOCK];
        random.fill(&mut block);
        Ok(Syncs { file, random, blocks, block, both: Figures::default(), sync: Figures::default() })
    }

    pub fn once(&mut self) -> Outcome<()> {
        let place = self.random.below(self.blocks) * BLOCK as u64;
        self.block[..8].copy_from_slice(&place.to_le_bytes());
        let begin = Instant::now();
        self.file.write_all_at(&self.block, place)?;
        let written = begin.elapsed();
        self.file.sync_data()?;
        let whole = begin.elapsed();
        self.both.add(whole);
        self.sync.add(whole - written);
        Ok(())
    }

    fn summary(self, whole: Duration) -> serde_json::Value {
        json!({ "sync": self.sync.summary(whole), "both": self.both.summary(whole) })
    }
}

/// Paths of raw disks: the bytes of their distinct chunks of 16 KiB that are not zeros, each packed as the store packs it, and nothing else.
pub fn ideal(arguments: &Arguments) -> Outcome {
    let mut seen = HashSet::new();
    let mut packed = vec![0; lz4_flex::block::get_maximum_output_size(CHUNK)];
    let (mut chunks, mut bytes) = (0u64, 0);
    for path in &arguments.paths {
        let file = File::open(path)?;
        let len = file.metadata()?.len();
        let mut content = vec![0; CHUNK];
        for at in (0..len).step_by(CHUNK) {
            content.resize(CHUNK.min((len - at) as usize), 0);
            file.read_exact_at(&mut content, at)?;
            if content.iter().all(|&byte| byte == 0) {
                continue;
            }
            chunks += 1;
            if seen.insert(blake3::hash(&content)) {
                let len = lz4_flex::block::compress_into(&content, &mut packed)?;
                bytes += len.min(content.len());
            }
        }
    }
    Ok(json!({ "chunks": chunks, "distinct": seen.len(), "bytes": bytes }))
}
