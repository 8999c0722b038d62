//! Operations of a disk through a [`DiskQueue`], as a front end in this process gives them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use polder_store::disk::{Disk, Durability, Operation, Queue};
use polder_store::{DiskQueue, OpenDisk};
use rustix::event::{PollFd, PollFlags, poll};
use serde_json::json;

use crate::Outcome;
use crate::arguments::{Arguments, close, volume_of};
use crate::figures::Figures;
use crate::random::Random;

const MIB: usize = 1 << 20;

/// What is asked of the disk, again and again.
#[derive(Clone, Copy)]
pub enum Kind {
    Read,
    Write,
    /// So many reads in a hundred, the others writes.
    Mixed(u64),
    /// A write, and then a flush, which alone is timed.
    Flush,
}

/// A load of one thread.
pub struct Load {
    pub kind: Kind,
    pub depth: usize,
    pub block: usize,
    /// The disk's first bytes, which the load keeps to.
    pub range: u64,
    /// Operations a second; without, as many as there can be.
    pub rate: Option<f64>,
    pub seed: u64,
}

impl Load {
    /// `op= depth= block= range= rate= seed=`.
    fn from(arguments: &Arguments) -> Outcome<Self> {
        let kind = match arguments.text("op")? {
            "read" => Kind::Read,
            "write" => Kind::Write,
            "flush" => Kind::Flush,
            other => return Err(format!("there is no operation {other}").into()),
        };
        Ok(Load {
            kind,
            depth: arguments.number_or("depth", 1)?,
            block: arguments.number_or("block", 4096)?,
            range: arguments.number("range")?,
            rate: None,
            seed: arguments.number_or("seed", 1)?,
        })
    }

    /// Runs until told to stop, or for so many operations. Gives the times of its operations, and how long it ran.
    pub fn run(&self, disk: &Arc<OpenDisk>, stop: &AtomicBool, most: Option<u64>) -> Outcome<(Figures, Duration)> {
        let mut queue: DiskQueue<Vec<u8>> = disk.open_queue()?;
        // As front ends do that have a thread for each queue.
        Queue::<Vec<u8>>::let_flushes_wait(&mut queue);
        let mut random = Random::new(self.seed);
        let mut figures = Figures::default();
        let mut idle: Vec<(u64, Vec<u8>)> = (0..self.depth as u64)
            .map(|token| {
                let mut block = vec![0; self.block];
                random.fill(&mut block);
                (token, block)
            })
            .collect();
        let mut begun = vec![Instant::now(); self.depth];
        let mut flushing: Vec<Option<Vec<u8>>> = vec![None; self.depth];
        let begin = Instant::now();
        let mut operations = 0u64;
        loop {
            let stopped = stop.load(Ordering::Relaxed);
            let is_over = |operations| stopped || most.is_some_and(|most| operations >= most);
            if is_over(operations) && queue.in_flight() == 0 {
                return Ok((figures, begin.elapsed()));
            }
            while !is_over(operations)
                && let Some((token, mut buffer)) = idle.pop()
            {
                if let Some(rate) = self.rate {
                    let due = Duration::from_secs_f64(operations as f64 / rate);
                    std::thread::sleep(due.saturating_sub(begin.elapsed()));
                }
                operations += 1;
                let offset = random.below(self.range / self.block as u64) * self.block as u64;
                let reads = match self.kind {
                    Kind::Read => true,
                    Kind::Mixed(percent) => random.below(100) < percent,
                    Kind::Write | Kind::Flush => false,
                };
                begun[token as usize] = Instant::now();
                if reads {
                    queue.submit(token, Operation::Read { offset, buffer });
                } else {
                    // No two blocks are the same.
                    buffer[..8].copy_from_slice(&random.next().to_le_bytes());
                    queue.submit(token, Operation::Write { offset, buffer, durability: Durability::Cached });
                }
            }
            let Some(done) = queue.next_completion() else {
                if queue.in_flight() > 0 {
                    wait(&queue)?;
                }
                continue;
            };
            done.result?;
            match (self.kind, done.buffer) {
                (Kind::Flush, Some(buffer)) => {
                    flushing[done.token as usize] = Some(buffer);
                    begun[done.token as usize] = Instant::now();
                    queue.submit(done.token, Operation::Flush);
                }
                (_, buffer) => {
                    figures.add(begun[done.token as usize].elapsed());
                    let buffer = buffer.or_else(|| flushing[done.token as usize].take());
                    idle.extend(buffer.map(|buffer| (done.token, buffer)));
                }
            }
        }
    }

    /// The same for a time, on a number of threads with a queue each, as vCPUs have. Gives the times of all.
    pub fn run_for(&self, disk: &Arc<OpenDisk>, time: Duration, queues: u64) -> Outcome<(Figures, Duration)> {
        self.run_on(disk, queues, None, || std::thread::sleep(time))
    }

    /// The same until so many operations were done by all threads together.
    pub fn run_times(&self, disk: &Arc<OpenDisk>, operations: u64, queues: u64) -> Outcome<(Figures, Duration)> {
        self.run_on(disk, queues, Some(operations), || ())
    }

    fn run_on(
        &self,
        disk: &Arc<OpenDisk>,
        queues: u64,
        operations: Option<u64>,
        meanwhile: impl FnOnce(),
    ) -> Outcome<(Figures, Duration)> {
        let stop = AtomicBool::new(false);
        let most = operations.map(|operations| operations / queues.max(1));
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..queues)
                .map(|queue| {
                    let load = Load { seed: self.seed + (queue << 32), ..*self };
                    let stop = &stop;
                    scope.spawn(move || load.run(disk, stop, most).map_err(|error| error.to_string()))
                })
                .collect();
            meanwhile();
            if most.is_none() {
                stop.store(true, Ordering::Relaxed);
            }
            let (mut figures, mut longest) = (Figures::default(), Duration::ZERO);
            for thread in threads {
                let (more, whole) = thread.join().map_err(|_| "a queue's thread panicked")??;
                figures.extend(more);
                longest = longest.max(whole);
            }
            Ok((figures, longest))
        })
    }
}

/// Waits until a completion may be there.
fn wait(queue: &DiskQueue<Vec<u8>>) -> Outcome<()> {
    let signal = <DiskQueue<Vec<u8>> as Queue<Vec<u8>>>::signal(queue);
    poll(&mut [PollFd::new(&signal, PollFlags::IN)], None)?;
    let mut events = [0; 8];
    // What is not there any more needs no reading.
    let _ = rustix::io::read(signal, &mut events);
    Ok(())
}

/// Reads a range once, so that all of it has been looked up and is in the host's memory.
pub fn warm(disk: &OpenDisk, range: u64) -> Outcome<()> {
    let mut part = vec![0; MIB];
    for at in (0..range).step_by(MIB) {
        let len = (range - at).min(MIB as u64) as usize;
        volume_of(disk)?.read_at(at, &mut part[..len])?;
    }
    Ok(())
}

/// `store= volume= queues=` and the load, of each queue, for `seconds=` or for `operations=` of all: runs it once everything is warm.
pub fn load(arguments: &Arguments) -> Outcome {
    let store = arguments.store()?;
    let disk = Arc::new(OpenDisk::Volume(arguments.volume(&store)?));
    let load = Load::from(arguments)?;
    warm(&disk, load.range)?;
    let queues = arguments.number_or("queues", 1)?;
    let (figures, whole) = match arguments.number_or("operations", 0)? {
        0 => load.run_for(&disk, arguments.duration("seconds")?, queues)?,
        operations => load.run_times(&disk, operations, queues)?,
    };
    let begin = Instant::now();
    close(disk)?;
    Ok(json!({ "operations": figures.summary(whole), "settling_seconds": begin.elapsed().as_secs_f64() }))
}
